"""The one place that says which outcome is which gRPC status, on both sides of the wire."""

from enum import Enum, auto

import grpc

MAX_DETAILS_CHARS = 1024
"""Longest sentence sent with a status: gRPC refuses trailers past 8 KiB."""


class Outcome(Enum):
    """How a call can end other than well."""

    INVALID_INPUT = auto()
    """The request is at fault; sent again it fails again."""
    NOT_READY = auto()
    """No gang can take the request now; nothing of it was done, so it may be sent again."""
    RANK_LOST = auto()
    """The rank that worked on the request died or failed, and its stream could not go on."""
    OVERLOADED = auto()
    """A bound was reached; send it again after the delay that comes with it."""
    TOO_LATE = auto()
    """The request's deadline passed."""
    CANCELLED = auto()
    """Somebody ended the request by its id."""
    TAKEN_OVER = auto()
    """Another connection resumed the request; this one gets nothing more."""
    FAULT = auto()
    """A defect of the server."""


STATUS = {
    Outcome.INVALID_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Outcome.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Outcome.RANK_LOST: grpc.StatusCode.UNAVAILABLE,
    Outcome.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Outcome.TOO_LATE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Outcome.CANCELLED: grpc.StatusCode.CANCELLED,
    Outcome.TAKEN_OVER: grpc.StatusCode.ABORTED,
    Outcome.FAULT: grpc.StatusCode.INTERNAL,
}


class CaravanError(Exception):
    """A call that failed, with the status a client sees and one sentence for a person.

    Args:
        code: the gRPC status, or the outcome it belongs to.
        message: what is wrong, where, what to do.
        retry_after_s: seconds after which the server expects to take the request; None: it did not say.
    """

    def __init__(self, code: grpc.StatusCode | Outcome, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code: grpc.StatusCode = STATUS[code] if isinstance(code, Outcome) else code
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["CaravanError"], tuple[grpc.StatusCode, str, float | None]]:
        # By default an exception is pickled as a call with its `args`, which fit neither this class nor its heirs.
        return CaravanError, (self.code, self.message, self.retry_after_s)

    @property
    def details(self) -> str:
        """The message, cut to what fits beside a status."""
        if len(self.message) <= MAX_DETAILS_CHARS:
            return self.message
        return self.message[: MAX_DETAILS_CHARS - 1] + "…"
