"""The notice that a spot machine is about to be taken away, as Google's metadata server gives it.

Source: https://cloud.google.com/compute/docs/instances/create-use-spot ("Detect preemption"): GET
instance/preempted with the header Metadata-Flavor: Google answers FALSE, or TRUE some 30 seconds before the end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

logger = logging.getLogger(__name__)

_GOOGLE_URL = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"

# Seconds between questions, and to wait for an answer.
_INTERVAL, _TIMEOUT = 1.0, 3.0


def default_url() -> str | None:
    """Where to ask on this machine: Google's server on a Google machine, else nowhere."""
    with suppress(OSError):
        if "Google" in Path("/sys/class/dmi/id/product_name").read_text():
            return _GOOGLE_URL
    return None


def watch(url: str, on_notice: Callable[[], None]) -> None:
    """Asks `url` once a second, in a thread of its own, until it says TRUE; then calls `on_notice`, once."""
    threading.Thread(target=_watch, args=(url, on_notice), name="ingestq-preemption", daemon=True).start()


def _watch(url: str, on_notice: Callable[[], None]) -> None:
    failing = False
    while True:
        try:
            if _is_preempted(url):
                on_notice()
                return
            failing = False
        except (OSError, HTTPException, ValueError) as error:
            if not failing:
                logger.warning("no word on preemption from %s: %s; asked again every second", url, error)
            failing = True
        time.sleep(_INTERVAL)


def _is_preempted(url: str) -> bool:
    request = Request(url, headers={"Metadata-Flavor": "Google"})
    # The metadata server is this machine's own: never through a proxy.
    with build_opener(ProxyHandler({})).open(request, timeout=_TIMEOUT) as answer:
        return bool(answer.read(16).strip().upper() == b"TRUE")
