"""`OrjsonSerializer`: the only serializer on our queues. JSON in, JSON out; nothing is ever unpickled.

For RQ's own tools: `rq worker -S`, `Job.fetch(id, connection=..., serializer=OrjsonSerializer)`.
"""

from __future__ import annotations

from typing import Any

import orjson


class OrjsonSerializer:
    """RQ's serializer interface over orjson; reads what `rq.serializers.JSONSerializer` writes and the reverse."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        return orjson.dumps(value)

    @staticmethod
    def loads(raw: bytes) -> Any:
        return orjson.loads(raw)
