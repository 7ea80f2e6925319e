"""`read_documents`: files, folders, globs and standard input to requests, one at a time.

| kind | documents | document id |
|---|---|---|
| .jsonl, - | one a line: `text`; optional `document_id` (or `id`), `instruction`, `system` | its own, or FILE:LINE |
| .txt, .md | the file as it is | the path as given |
| .html, .htm | the page's title and main text, tables and code kept (trafilatura) | the path as given |
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import orjson
from pydantic import ValidationError

from ..common.errors import RequestRefused
from ..common.schema import IngestRequest, Sampling

# What one document's own fields are; a reader that can't go on with a document yields the refusal instead.
Row = dict[str, str]
Reader = Callable[[BinaryIO, str], Iterator[Row | RequestRefused]]

# The name of standard input, as in most commands, and in document ids.
STDIN, STDIN_NAME = "-", "stdin"

# Bytes of a page, text file or JSON line: four times the largest text that any setting lets through (16 MiB), since
# markup can outweigh text. What is larger is refused before it fills the memory.
MAX_SOURCE_BYTES = 64 * 1024 * 1024


def read_documents(
    paths: Iterable[str],
    *,
    model: str,
    sampling: Sampling | None = None,
    system: str | None = None,
    instruction: str | None = None,
    chat: bool = True,
    on_refused: Callable[[RequestRefused], None] | None = None,
) -> Iterator[IngestRequest]:
    """The requests of all documents under `paths`, read as they are asked for, in a stable order.

    Args:
        paths: files, folders (all files in them and below, sorted; hidden ones left out), glob patterns (`**` for any
            depth), or "-" for JSON lines on standard input.
        system: of documents that bring none of their own; so is `instruction`.
        on_refused: called with what can't be read; reading goes on. Without it the first such document raises.

    Raises:
        RequestRefused: without `on_refused`; its `document_id` is the path or FILE:LINE.
    """
    shared = {"model": model, "sampling": sampling or Sampling(), "chat": chat}
    defaults = {"system": system, "instruction": instruction}
    for item in _rows(paths):
        request = item if isinstance(item, RequestRefused) else _request({**shared, **defaults, **item})
        if isinstance(request, IngestRequest):
            yield request
        elif on_refused:
            on_refused(request)
        else:
            raise request


def _request(fields: dict[str, Any]) -> IngestRequest | RequestRefused:
    if not fields["text"].strip():
        return RequestRefused(fields["document_id"], "has no text")
    try:
        return IngestRequest(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        return RequestRefused(fields["document_id"], f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


# --- where documents are


def _rows(paths: Iterable[str]) -> Iterator[Row | RequestRefused]:
    for path in paths:
        if path == STDIN:
            yield from _jsonl(sys.stdin.buffer, STDIN_NAME)
            continue
        for item in _files(path):
            if isinstance(item, RequestRefused):
                yield item
            else:
                yield from _read_file(item)


def _files(path: str) -> Iterator[str | RequestRefused]:
    """The files that `path` stands for."""
    if os.path.isdir(path):
        yield from _files_in(path)
    elif os.path.lexists(path):
        yield path
    elif glob.has_magic(path):
        yield from _matching(path)
    else:
        yield RequestRefused(path, "no such file or folder")


def _matching(pattern: str) -> Iterator[str | RequestRefused]:
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        yield RequestRefused(pattern, "no file matches")
    for match in matches:
        if not os.path.isdir(match):
            yield match
        elif "**" not in pattern:  # `**` matches what is in a folder as well
            yield from _files_in(match)


def _files_in(folder: str) -> Iterator[str | RequestRefused]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        yield RequestRefused(folder, f"can't be read: {error.strerror}")
        return
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if not os.path.isdir(path):
            yield path
        elif os.path.islink(path):  # it may lead back up
            yield RequestRefused(path, "links to folders are not followed; name the folder itself")
        else:
            yield from _files_in(path)


# --- what is in them


def _read_file(path: str) -> Iterator[Row | RequestRefused]:
    kind = PurePath(path).suffix.lower()
    reader = READERS.get(kind)
    if reader is None:
        yield RequestRefused(path, f"unknown kind of file {kind!r}; known are {', '.join(READERS)}")
        return
    try:
        with open(path, "rb") as file:
            yield from reader(file, path)
    except RequestRefused as refusal:
        yield refusal
    except OSError as error:
        yield RequestRefused(path, f"can't be read: {error.strerror}")


def _plain_text(file: BinaryIO, name: str) -> Iterator[Row | RequestRefused]:
    try:
        yield {"document_id": name, "text": _source(file, name).decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        yield RequestRefused(name, f"is not UTF-8: {error.reason} at byte {error.start}; convert it first")


def _html(file: BinaryIO, name: str) -> Iterator[Row | RequestRefused]:
    page = _source(file, name)
    try:
        text = _html_text(page)
    except Exception as error:  # whatever a stranger's page sets off in the parser, it is about that page
        yield RequestRefused(name, f"can't be read as HTML: {type(error).__name__}: {error}")
        return
    yield {"document_id": name, "text": text} if text else RequestRefused(name, "no text found in the page")


def _html_text(page: bytes) -> str:
    """The page's title and main text, or all of its text if no part stands out; "" if there is none."""
    import trafilatura

    tree = trafilatura.load_html(page)
    if tree is None:
        return ""
    title = " ".join((tree.findtext(".//title") or "").split())
    # Of 240 pages of PostgreSQL's manual, `favor_recall` keeps 97 % of the words outside of navigation, and the most
    # of all output formats with "txt".
    body = trafilatura.extract(tree, output_format="txt", include_comments=False, favor_recall=True)
    text = str(body or trafilatura.html2txt(page)).strip()
    return text if not text or text.startswith(title) else f"{title}\n\n{text}"


def _jsonl(file: BinaryIO, name: str) -> Iterator[Row | RequestRefused]:
    empty = True
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            empty = False
            yield _json_row(line, f"{name}:{number}")
    if empty:
        yield RequestRefused(name, "is empty")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; one over MAX_SOURCE_BYTES is cut there, so that it is seen to be too long."""
    while line := file.readline(MAX_SOURCE_BYTES + 1):
        rest = line
        while len(rest) > MAX_SOURCE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_SOURCE_BYTES + 1)
        yield line


_ROW_FIELDS = ("text", "document_id", "id", "instruction", "system")


def _json_row(line: bytes, place: str) -> Row | RequestRefused:
    if len(line) > MAX_SOURCE_BYTES:
        return RequestRefused(place, f"the line is over {MAX_SOURCE_BYTES} bytes; split the document")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return RequestRefused(place, f"is not JSON: {error.msg} at character {error.pos}")
    if not isinstance(row, dict):
        return RequestRefused(place, "is not a JSON object")
    row = {name: value for name, value in row.items() if value is not None}
    if unknown := ", ".join(repr(name) for name in row if name not in _ROW_FIELDS):
        return RequestRefused(place, f"unknown fields {unknown}; known are {', '.join(_ROW_FIELDS)}")
    if "id" in row and "document_id" in row:
        return RequestRefused(place, "has both id and document_id; keep one")
    document_id = row.pop("id", row.pop("document_id", place))
    row["document_id"] = str(document_id) if type(document_id) is int else document_id
    if wrong := [name for name, value in row.items() if not isinstance(value, str)]:
        return RequestRefused(place, f"not a string: {', '.join(wrong)}")
    return row if "text" in row else RequestRefused(place, "has no field text")


def _source(file: BinaryIO, name: str) -> bytes:
    content = file.read(MAX_SOURCE_BYTES + 1)
    if len(content) > MAX_SOURCE_BYTES:
        raise RequestRefused(name, f"is over {MAX_SOURCE_BYTES} bytes; split it")
    if not content:
        raise RequestRefused(name, "is empty")
    return content


READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".txt": _plain_text,
    ".md": _plain_text,
    ".html": _html,
    ".htm": _html,
}
