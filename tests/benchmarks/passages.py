"""Real English text in any amount, no two pieces alike: windows of Python's own language reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pydoc_data.topics import topics

# A prime: steps of this many characters visit every offset of the reference before one comes again.
_STRIDE = 7919


def reference() -> str:
    """The language reference that comes with every Python: 460 KB of ASCII, no section twice."""
    return "\n".join(dict.fromkeys(topics.values())).encode("ascii", "ignore").decode()


def passages(num_bytes: int) -> Iterator[str]:
    """Texts of `num_bytes` bytes, no two equal, some 400,000 of them; always the same."""
    text = reference()
    seen: set[int] = set()  # some paragraphs stand in more than one section
    for i in count():
        start = i * _STRIDE % (len(text) - num_bytes)
        passage = text[start : start + num_bytes]
        digest = hash(passage)
        if digest not in seen:
            seen.add(digest)
            yield passage
