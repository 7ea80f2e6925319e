"""The README's settings table is the settings."""

from __future__ import annotations

import re
from pathlib import Path

from ingestq.common.settings import Settings, variables

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_every_setting_is_in_the_readme_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(INGEST_[A-Z_]+)` \| (.*?) \|", README, re.MULTILINE))

    assert set(table) == set(variables())
    for variable, field in variables().items():
        default = Settings.model_fields[field].default
        told = table[variable].strip("`")
        if default is not None:
            assert told == (f"{default:g}" if isinstance(default, float) else str(default)), variable
