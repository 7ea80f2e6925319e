from __future__ import annotations

import pytest
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError, InvalidResponse, RedisError, ResponseError, TimeoutError, WatchError

from ingestq.common.connections import explained, outage, persist
from ingestq.common.errors import QueueRefused, QueueUnavailable

# As redis-server 7.0 and Valkey 9.1 word them, to a command and to a script.
OUTAGES = [
    "OOM command not allowed when used memory > 'maxmemory'.",
    "OOM command not allowed when used memory > 'maxmemory'. script: 9282fe9c, on @user_script:1.",
    "READONLY You can't write against a read only replica.",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    "NOREPLICAS Not enough good replicas to write.",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    "MISCONF Errors writing to the AOF file: No space left on device script: 9282fe9c, on @user_script:1.",
    "NOPERM this user has no permissions to run the 'set' command",
    "ERR ACL failure in script: User reader has no permissions to run the 'set' command script: on @user_script:1.",
    "ERR The user executing the script can't run this command or subcommand script: 9282fe9c, on @user_script:1.",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
    "ERR Script killed by user with SCRIPT KILL. script: on @user_script:1.",
    "NOAUTH Authentication required.",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "LOADING Redis is loading the dataset in memory",
    "CLUSTERDOWN The cluster is down",
]

OF_THE_DATA = [
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "WRONGTYPE Operation against a key holding the wrong kind of value script: 620cd258, on @user_script:1.",
    "ERR value is not an integer or out of range",
    "ERR user_script:3: attempt to compare nil with number script: 620cd258, on @user_script:3.",
    "NOSCRIPT No matching script. Please use EVAL.",
]


def said(line: str) -> RedisError:
    """The error that redis-py makes of a server's answer."""
    error = BaseParser.parse_error(line)
    assert isinstance(error, RedisError)
    return error


def in_pipeline(line: str) -> RedisError:
    error = said(line)
    error.args = (f"Command # 1 (GET OOM) of pipeline caused error: {error.args[0]}", *error.args[1:])
    return error


@pytest.mark.parametrize("make", [said, in_pipeline])
@pytest.mark.parametrize("line", OUTAGES)
def test_a_server_that_can_not_serve_is_an_outage(line: str, make) -> None:
    assert outage(make(line))
    assert len(explained(make(line)).splitlines()) == 1


@pytest.mark.parametrize("make", [said, in_pipeline])
@pytest.mark.parametrize("line", OF_THE_DATA)
def test_what_would_fail_again_is_no_outage(line: str, make) -> None:
    assert not outage(make(line))


def test_a_dropped_connection_is_an_outage() -> None:
    assert outage(ConnectionError("Connection closed by server."))
    assert outage(TimeoutError("Timeout reading from socket"))
    assert outage(InvalidResponse("Protocol Error: x"))
    assert not outage(WatchError("Watched variable changed."))


@pytest.mark.parametrize(
    ("line", "way_out"),
    [
        (OUTAGES[0], "raise maxmemory"),
        (OUTAGES[2], "to the master"),
        (OUTAGES[5], "make room there"),
        (OUTAGES[8], "deploy/users.acl"),
        (OUTAGES[13], "set user and password in RQ_REDIS_URL"),
    ],
)
def test_a_refusal_is_not_tried_again_and_says_what_to_do(line: str, way_out: str) -> None:
    calls = []

    def refused() -> None:
        calls.append(line)
        raise said(line)

    with pytest.raises(QueueRefused, match=way_out):
        persist(refused, patience=10)
    assert len(calls) == 1


def test_a_long_answer_is_cut() -> None:
    assert len(explained(ResponseError("MISCONF " + "x y " * 1000))) < 500


def test_a_busy_server_is_tried_again() -> None:
    answers = iter([said("BUSY Redis is busy running a script."), ConnectionError("closed"), None])

    def once() -> str:
        if error := next(answers):
            raise error
        return "done"

    assert persist(once, patience=30) == "done"


def test_a_connection_that_stays_away_is_no_refusal() -> None:
    def dropped() -> None:
        raise ConnectionError("Connection refused.")

    with pytest.raises(QueueUnavailable, match="Connection refused; is Redis running") as raised:
        persist(dropped, patience=0)
    assert not isinstance(raised.value, QueueRefused)
