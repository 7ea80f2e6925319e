"""deploy/redis.conf and users.acl, as far as they can be judged without a server."""

from __future__ import annotations

import re

from ingestq.common.embedded_server import DEFAULT_OPTIONS
from support.secured import DEPLOY, PLACEHOLDERS


def directives() -> dict[str, str]:
    lines = (DEPLOY / "redis.conf").read_text().splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return {name: value.strip('"') for name, value in pairs}


def users() -> dict[str, str]:
    lines = (DEPLOY / "users.acl").read_text().splitlines()
    return {line.split()[1]: line for line in lines}


def test_the_embedded_server_has_the_settings_of_the_file() -> None:
    assert {name: directives().get(name) for name in DEFAULT_OPTIONS} == DEFAULT_OPTIONS


def test_the_file_sets_nothing_that_the_tests_do_not_use() -> None:
    assert set(directives()) == {*DEFAULT_OPTIONS, "aclfile"}


def test_every_user_has_a_password_of_its_own_to_be_replaced() -> None:
    words = {user: re.findall(r"#(\w+)", line) for user, line in users().items()}
    assert words.pop("default") == []
    assert {word: user for user, [word] in words.items()} == PLACEHOLDERS


def test_nobody_but_the_administrator_leaves_the_prefix_or_has_all_commands() -> None:
    for user, line in users().items():
        if user not in ("admin", "default"):
            assert {*re.findall(r"[~&](\w+:)", line)} == {"rq:"}, user
            assert not re.search(r"[~&]\*|\+@all|nopass", line), user
            assert " resetchannels -@all " in line, user
    assert users()["default"] == "user default reset off"
