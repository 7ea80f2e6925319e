"""`TcpProxy`: a link to a server that drops, goes silent, or loses answers when told to."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self


class TcpProxy:
    """Forwards 127.0.0.1:`port` to 127.0.0.1:`target`, from a thread of its own.

    While the server is away, connections are closed as soon as they are made.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._answers_to_lose = 0
        self._open = asyncio.Event()
        self._open.set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """Resets every connection."""
        self._loop.call_soon_threadsafe(self._reset)

    def lose_answers(self, number: int) -> None:
        """Of the next `number` answers none arrives: the server has done what it was asked, the connection is reset."""
        self._loop.call_soon_threadsafe(setattr, self, "_answers_to_lose", number)

    def cut(self) -> None:
        """Nothing passes any more, though connections stand and can be made, as when a machine is cut off."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        """Everything passes again, what was held up first."""
        self._loop.call_soon_threadsafe(self._open.set)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- on the loop's thread

    def _reset(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, back}
        self._writers |= pair
        try:
            with suppress(OSError):
                await asyncio.gather(self._pump(reader, back, answers=False), self._pump(there, writer, answers=True))
        except asyncio.CancelledError:
            pass
        finally:
            self._writers -= pair
            for end in pair:
                end.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await source.read(65536):
            await self._open.wait()
            if answers and self._answers_to_lose:
                self._answers_to_lose -= 1
                break
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError  # either side's end is both sides'
