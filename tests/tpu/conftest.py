"""`make test-tpu`: needs vllm-tpu and JAX in an environment of their own, so that `make test` doesn't collect it.

The last line of output is one JSON object of what the tests have found (`facts`).
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import Any

import pytest

from support.tpu_on_cpu import ENVIRONMENT

_HAS_RUNTIME = find_spec("tpu_inference") is not None

collect_ignore_glob = [] if _HAS_RUNTIME else ["test_*.py"]

_FACTS = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    if _HAS_RUNTIME:
        os.environ.update(ENVIRONMENT)  # before anything imports JAX or vLLM
    config.stash[_FACTS] = {}


def pytest_unconfigure(config: pytest.Config) -> None:
    if facts := config.stash[_FACTS]:
        print(json.dumps(facts))


@pytest.fixture(scope="session")
def facts(pytestconfig: pytest.Config) -> dict[str, Any]:
    """For the last line: name -> number or word."""
    return pytestconfig.stash[_FACTS]
