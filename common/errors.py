"""Every error that ingestq raises, one sentence each."""

from __future__ import annotations

from collections.abc import Sequence


class IngestqError(Exception):
    """Base of all errors of ingestq."""


class SettingsError(IngestqError):
    """An environment variable is unknown, malformed or out of bounds."""


class RequestRefused(IngestqError):
    """A request can't be accepted as it is; the message names the document, the value, the bound and the way out.

    Attributes:
        accepted: job ids of the same call that are in Redis; neither this document nor those after it are.
    """

    def __init__(self, document_id: str, reason: str, accepted: Sequence[str] = ()) -> None:
        super().__init__(f"document {document_id!r}: {reason}")
        self.document_id = document_id
        self.reason = reason
        self.accepted = list(accepted)


class QueueUnavailable(IngestqError):
    """Redis can't be reached or refuses to write; says how many documents were accepted before that.

    Attributes:
        accepted: job ids that are safely in Redis. Enqueueing the same documents again completes the rest and
            repeats none.
    """

    def __init__(self, message: str, accepted: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.accepted = list(accepted)


class QueueRefused(QueueUnavailable):
    """Redis answers and refuses: it is full, a replica or locked out of its disk, or the user may not do this."""


class NotDurable(QueueUnavailable):
    """What Redis accepted may not outlive it: it can't do what INGEST_DURABILITY asks, or did not in time."""


class UnknownLayout(IngestqError):
    """A model's config.json describes something that the planner doesn't understand; it never guesses a size.

    Attributes:
        model: what the caller called it.
        reason: what isn't understood, and what to do.
    """

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"model {model!r}: {reason}")
        self.model = model
        self.reason = reason


class UnknownMachine(IngestqError):
    """No machine of that name is known to the planner."""


class ServerStartError(IngestqError):
    """The embedded server could not be started."""


class UnknownGroup(IngestqError):
    """No group of that name is in Redis: never created, or expired."""

    def __init__(self, group_id: str) -> None:
        super().__init__(f"group {group_id!r} is not in Redis: it was never created, or has expired")
        self.group_id = group_id


class ResultTimeout(IngestqError):
    """The wait for results ended before every member of the group was terminal.

    Attributes:
        outstanding: document ids without a row, at most MAX_LISTED of them.
        num_outstanding: how many there are.
    """

    # Enough to look into by hand; a group may have a million members.
    MAX_LISTED = 1000

    def __init__(self, group_id: str, timeout: float, outstanding: Sequence[str], num_outstanding: int) -> None:
        shown = ", ".join(repr(document_id) for document_id in outstanding[:5])
        more = ", ..." if num_outstanding > 5 else ""
        super().__init__(
            f"group {group_id!r}: {num_outstanding} documents have no result after {timeout:g} s ({shown}{more}); "
            f"is a worker running? Call again with the iterator's cursor to go on"
        )
        self.group_id = group_id
        self.outstanding = list(outstanding)
        self.num_outstanding = num_outstanding


class ProducerLost(IngestqError):
    """A group was never sealed and its producer has stopped; every row that it can have was delivered."""


class TokenizerError(IngestqError):
    """A tokenizer.json can't be used to count tokens."""


class DocumentError(IngestqError):
    """One document can't be run as it is; running it again would fail again. The class name goes into its result."""


class InvalidJob(DocumentError):
    """The job is not one that a worker may run: wrong function, arguments, or an RQ feature that isn't served."""


class PromptTooLong(DocumentError):
    """Prompt plus output don't fit the model's context."""


class KvLimitExceeded(DocumentError):
    """The document alone needs more KV cache than the admission limits leave to one engine."""


class PromptEmpty(DocumentError):
    """The prompt has no tokens."""


class PromptRefused(DocumentError):
    """The engine refused the prompt or its sampling parameters."""


class DocumentTimeout(DocumentError):
    """The document was in flight longer than INGEST_DOCUMENT_TIMEOUT; unlike the others it may be tried again."""


class EngineError(IngestqError):
    """The engine failed while it ran a document; another attempt may succeed."""
