"""A server started from deploy/redis.conf and deploy/users.acl themselves, with passwords and, if wanted, TLS."""

from __future__ import annotations

import secrets
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlencode

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ingestq.common.embedded_server import EmbeddedServer

DEPLOY = Path(__file__).parents[2] / "deploy"

# The words to replace in users.acl, each with its user.
PLACEHOLDERS = {
    "ADMIN_SHA256": "admin",
    "PRODUCER_SHA256": "ingest-producer",
    "WORKER_SHA256": "ingest-worker",
    "READER_SHA256": "ingest-reader",
    "OPERATOR_SHA256": "ingest-operator",
}


class SecuredServer(EmbeddedServer):
    """As an administrator sets it up: the port, the folders and the passwords are all that isn't in the files.

    Args:
        tls: folder of server.crt, server.key and ca.crt, and client.crt and client.key for those who connect; the lines
            on TLS in redis.conf are taken in.
        check_hostname: False: our own clients, `client`, take a server certificate of another host.
    """

    def __init__(
        self, binary: str | Path | None, directory: Path, *, tls: Path | None = None, check_hostname: bool = True
    ) -> None:
        super().__init__(binary, directory=directory / "data")
        self._tls = tls
        self._lenient = {} if check_hostname else {"ssl_check_hostname": "False"}
        self._config, self._acl = directory / "redis.conf", directory / "users.acl"
        self.passwords = {user: secrets.token_hex(16) for user in PLACEHOLDERS.values()}
        config, acl = (DEPLOY / "redis.conf").read_text(), (DEPLOY / "users.acl").read_text()
        if tls:
            config = config.replace("# port 0", "port 0").replace("# tls-", "tls-").replace("/etc/redis/tls", str(tls))
        for word, user in PLACEHOLDERS.items():
            acl = acl.replace(word, sha256(self.passwords[user].encode()).hexdigest())
        self._config.write_text(config)
        self._acl.write_text(acl)

    def url_of(self, user: str, **parameters: str | None) -> str:
        """The URL that a user of this server puts into RQ_REDIS_URL.

        Args:
            parameters: of its query; None leaves one out that it needs for TLS.
        """
        credentials = f"{user}:{self.passwords[user]}"
        if not self._tls:
            return f"redis://{credentials}@127.0.0.1:{self.port}/0"
        files = {"ssl_ca_certs": "ca.crt", "ssl_certfile": "client.crt", "ssl_keyfile": "client.key"}
        given = {**{name: str(self._tls / file) for name, file in files.items()}, **parameters}
        query = urlencode({name: value for name, value in given.items() if value is not None})
        return f"rediss://{credentials}@localhost:{self.port}/0?{query}"

    def client(self, user: str) -> Redis:
        return Redis.from_url(self.url_of(user, **self._lenient), socket_timeout=5, retry=Retry(NoBackoff(), 0))

    def _arguments(self) -> list[str]:
        port = "--tls-port" if self._tls else "--port"
        options = ["--bind", "127.0.0.1", port, str(self.port), "--dir", str(self.directory)]
        return [str(self._config), *options, "--aclfile", str(self._acl)]

    def _client(self) -> Redis:
        return self.client("admin")
