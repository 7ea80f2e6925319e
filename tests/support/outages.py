"""Faults of Redis and of the way to it. Each returns when Redis is itself again."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ingestq.common.embedded_server import EmbeddedServer

from .faults import Times
from .ledger import Ledger
from .processes import wait_until
from .proxy import TcpProxy


@dataclass(slots=True, kw_only=True)
class Site:
    """The server, the ways to it, and what is known of its documents."""

    server: EmbeddedServer
    # Of every worker, and of the clients.
    proxies: list[TcpProxy]
    ledger: Ledger
    times: Times
    random: Random

    @contextmanager
    def admin(self) -> Iterator[Redis]:
        """A connection that goes round the proxies."""
        client = Redis(port=self.server.port, socket_timeout=30, retry=Retry(NoBackoff(), 0))
        try:
            yield client
        finally:
            client.close()

    def wait(self) -> None:
        time.sleep(self.times.refusal)


def drop(site: Site) -> None:
    for proxy in site.proxies:
        proxy.drop()


def lose_answers(site: Site) -> None:
    for proxy in site.proxies:
        proxy.lose_answers(site.random.randint(1, 3))
    time.sleep(0.5)


def stall(site: Site) -> None:
    assert site.server.pid is not None
    os.kill(site.server.pid, signal.SIGSTOP)
    time.sleep(site.times.stall)
    os.kill(site.server.pid, signal.SIGCONT)


def kill(site: Site) -> None:
    site.server.kill()
    time.sleep(site.random.uniform(0, site.times.refusal))
    site.server.start()


def fail_over(site: Site) -> None:
    """The server that takes over has what this one had a second ago."""
    folder = site.server.directory
    copy = folder.parent / f"{folder.name}-replica"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "appendonlydir", copy)
    time.sleep(1.0)
    site.server.kill()
    shutil.rmtree(folder / "appendonlydir")
    copy.rename(folder / "appendonlydir")
    with site.ledger.lock:
        site.ledger.epoch += 1
    site.server.start()


def fill(site: Site) -> None:
    with site.admin() as admin:
        admin.config_set("maxmemory", 1)
        site.wait()
        admin.config_set("maxmemory", 0)


def lock_disk(site: Site) -> None:
    """Its snapshots can't be written, so that it refuses every write (MISCONF)."""
    target = site.server.directory / "dump.rdb"
    (target / "in the way").mkdir(parents=True)
    with site.admin() as admin:
        admin.config_set("save", "3600 1")
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err", "the snapshot has failed")
        site.wait()
        admin.config_set("save", "")
    shutil.rmtree(target)


def demote(site: Site) -> None:
    """A replica of a master that isn't there: it refuses to write, and keeps its data."""
    with site.admin() as admin:
        admin.replicaof("127.0.0.1", "1")
        site.wait()
        admin.replicaof("NO", "ONE")


def change_password(site: Site) -> None:
    with site.admin() as admin:
        admin.config_set("requirepass", "changed")
        admin.client_kill_filter(_type="normal", skipme=True)
        site.wait()
        admin.config_set("requirepass", "")


OUTAGES: dict[str, Callable[[Site], None]] = {
    "connections dropped": drop,
    "answers lost": lose_answers,
    "Redis stalls": stall,
    "Redis killed": kill,
    "fail-over that lost a second": fail_over,
    "Redis full": fill,
    "Redis locked out of its disk": lock_disk,
    "Redis read-only": demote,
    "wrong password": change_password,
}
