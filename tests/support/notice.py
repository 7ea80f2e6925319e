"""`NoticeServer`: stands in for a cloud's metadata server, which tells a machine that it is about to be preempted."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class NoticeServer:
    """Answers TRUE or FALSE under a path for each machine."""

    def __init__(self) -> None:
        self._doomed: set[str] = set()
        doomed = self._doomed

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told = b"TRUE" if self.path.strip("/") in doomed else b"FALSE"
                self.send_response(200)
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url_of(self, machine: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{machine}"

    def announce(self, machine: str) -> None:
        self._doomed.add(machine)

    def revoke(self, machine: str) -> None:
        self._doomed.discard(machine)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, name="notices", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
