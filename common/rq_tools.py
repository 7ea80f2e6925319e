"""`SafeQueue` and `SafeJob`: RQ's own commands without what a job hash can make them do.

    export RQ_QUEUE_CLASS=ingestq.common.rq_tools.SafeQueue RQ_JOB_CLASS=ingestq.common.rq_tools.SafeJob

Without them `rq info` and `rq requeue` unpickle jobs (`info` whatever its -S says), and `info` calls the failure
callbacks that expired ones name.
"""

from __future__ import annotations

from typing import Any

from rq import Queue
from rq.job import Job

from .serializer import OrjsonSerializer


class SafeJob(Job):
    """Has no callbacks, and reads JSON only."""

    success_callback = failure_callback = stopped_callback = property(lambda self: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "serializer": OrjsonSerializer})


class SafeQueue(Queue):
    """Has SafeJobs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "serializer": OrjsonSerializer, "job_class": SafeJob})
