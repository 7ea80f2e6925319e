"""`Intake`: from a leased job to a prompt that is ready for the engine, with the KV cache that it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redis import Redis

from ..common import scripts
from ..common.errors import InvalidJob, KvLimitExceeded
from ..common.limits import AdmissionLimits
from ..common.schema import IngestRequest
from ..common.scripts import LeasedJob
from ..common.settings import Settings
from ..common.sizes import whole_blocks
from .engines.base import Engine
from .lengths import ExpectedOutput
from .pool import Ready
from .prompts import build_prompt, parse_request


class Intake:
    """Readies documents for one engine, and learns how long their outputs become. Not thread-safe: the courier's."""

    def __init__(
        self, connection: Redis, settings: Settings, engine: Engine, queues: Sequence[str], *, max_kv_tokens: int
    ) -> None:
        """
        Args:
            max_kv_tokens: that this worker may have reserved in all; 0: no bound.
        """
        self._connection = connection
        self._settings = settings
        self._engine = engine
        self._max_kv_tokens = max_kv_tokens
        self._lengths = {queue: ExpectedOutput() for queue in queues}

    def request(self, job: LeasedJob) -> IngestRequest:
        """The request in a job.

        Raises:
            NewerSchema: it is for a newer worker.
            InvalidJob: it can't be run here, or is not what it was queued as.
        """
        request = parse_request(job)
        if request.model != self._engine.card.model:
            raise InvalidJob(
                f"job {job.job_id}: it was queued for {self._engine.card.model!r}, its request asks for another model; "
                f"enqueue it anew"
            )
        return request

    def ready(self, job: LeasedJob, request: IngestRequest, limits: AdmissionLimits) -> Ready:
        """The prompt of a leased job, and what it needs.

        Args:
            limits: of its queue.

        Raises:
            PromptEmpty, PromptTooLong, PromptRefused: see `build_prompt`.
            KvLimitExceeded: no admission limit leaves it that much KV cache, ever.
        """
        engine, lengths = self._engine, self._lengths[job.queue]
        prompt = build_prompt(request, job.execution_id, engine, self._settings.over_length)
        num_prompt_tokens, max_tokens = len(prompt.token_ids), prompt.sampling.max_tokens
        num_output_tokens = lengths.reserve(job.task, max_tokens)
        num_tokens, block_size = num_prompt_tokens + num_output_tokens, engine.kv_cache.block_size
        kv_tokens = whole_blocks(num_tokens, block_size)
        self._refuse_beyond_limits(kv_tokens, num_prompt_tokens, num_output_tokens, limits)
        return Ready(
            prompt=prompt,
            num_blocks=engine.kv_cache.blocks_for(num_tokens, engine.card.max_num_batched_tokens or num_tokens),
            expected_output=self.expected_output(job, max_tokens),
            kv_tokens=kv_tokens,
        )

    def _refuse_beyond_limits(
        self, kv_tokens: int, num_prompt_tokens: int, num_output_tokens: int, limits: AdmissionLimits
    ) -> None:
        bounds = {
            "INGEST_MAX_KV_TOKENS": self._max_kv_tokens,
            "INGEST_MAX_KV_TOKENS_FLEET": self._settings.max_kv_tokens_fleet,
            "the queue's limit max_kv_tokens": limits.max_kv_tokens,
            "the queue's limit max_kv_tokens_fleet": limits.max_kv_tokens_fleet,
        }
        for name, bound in bounds.items():
            if bound and kv_tokens > bound:
                raise KvLimitExceeded(
                    f"the document needs {kv_tokens} KV tokens ({num_prompt_tokens} of prompt, {num_output_tokens} of "
                    f"expected output, in whole blocks), {name} is {bound}; split the document, lower max_tokens, or "
                    f"raise the limit"
                )

    @property
    def reservations(self) -> Mapping[str, Mapping[str, int]]:
        """Queue -> task -> output tokens to reserve."""
        return {queue: lengths.reservations() for queue, lengths in self._lengths.items()}

    def expected_output(self, job: LeasedJob, max_tokens: int) -> float:
        """Output tokens to expect of a job that may write `max_tokens`."""
        return self._lengths[job.queue].mean(job.task, max_tokens)

    def observe(self, job: LeasedJob, num_output_tokens: int) -> bool:
        """A document of a task has ended with so many tokens of output.

        Returns:
            Whether what waits is to be ordered anew.
        """
        return bool(job.task) and self._lengths[job.queue].observe(job.task, num_output_tokens)

    @property
    def has_news(self) -> bool:
        """Whether there are lengths that the other workers have not heard of."""
        return any(lengths.has_observed for lengths in self._lengths.values())

    def learn(self) -> None:
        """Tells the other workers of the lengths that were observed here, and hears of theirs.

        Raises:
            RedisError: Redis is away; what was observed since the last time is lost, which costs time only.
        """
        for queue, lengths in self._lengths.items():
            lengths.replace(scripts.learn(self._connection, queue, lengths.take_observed()))
