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
    """A bound was reached; send it again later."""
    FAULT = auto()
    """A defect of the server."""


STATUS = {
    Outcome.INVALID_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Outcome.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Outcome.RANK_LOST: grpc.StatusCode.UNAVAILABLE,
    Outcome.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Outcome.FAULT: grpc.StatusCode.INTERNAL,
}


class CaravanError(Exception):
    """A call that failed, with the status a client sees and one sentence for a person.

    Args:
        code: the gRPC status, or the outcome it belongs to.
        message: what is wrong, where, what to do.
    """

    def __init__(self, code: grpc.StatusCode | Outcome, message: str) -> None:
        super().__init__(message)
        self.code: grpc.StatusCode = STATUS[code] if isinstance(code, Outcome) else code
        self.message = message

    def __reduce__(self) -> tuple[type["CaravanError"], tuple[grpc.StatusCode, str]]:
        # By default an exception is pickled as a call with its `args`, which fit neither this class nor its heirs.
        return CaravanError, (self.code, self.message)

    @property
    def details(self) -> str:
        """The message, cut to what fits beside a status."""
        if len(self.message) <= MAX_DETAILS_CHARS:
            return self.message
        return self.message[: MAX_DETAILS_CHARS - 1] + "…"
