"""What goes wrong in a router, sorted by who can mend it."""

from protos.errors import CaravanError, Outcome


class RouterConfigError(ValueError):
    """The router's input is at fault: no checkpoint, no tokenizer, an impossible setting. One sentence for a person."""


class InvalidRequest(CaravanError):
    """A client's request is at fault.

    Args:
        field: name of the field in the .proto file.
        sentence: what is wrong with it and what would be right.
    """

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(Outcome.INVALID_INPUT, f"{field}: {sentence}")
        self.field = field


class NotReady(CaravanError):
    """No gang can take a request now."""

    def __init__(self, sentence: str) -> None:
        super().__init__(Outcome.NOT_READY, sentence)


class RankLost(CaravanError):
    """The rank under a stream died or failed."""

    def __init__(self, sentence: str) -> None:
        super().__init__(Outcome.RANK_LOST, sentence)


class Overloaded(CaravanError):
    """A bound was reached.

    Args:
        sentence: which one.
        retry_after_s: seconds after which the request will likely be taken.
    """

    def __init__(self, sentence: str, retry_after_s: float) -> None:
        super().__init__(Outcome.OVERLOADED, sentence, retry_after_s)


class TooLate(CaravanError):
    """A request's deadline passed."""

    def __init__(self, sentence: str) -> None:
        super().__init__(Outcome.TOO_LATE, sentence)


class Cancelled(CaravanError):
    """Somebody ended the request by its id."""

    def __init__(self, sentence: str) -> None:
        super().__init__(Outcome.CANCELLED, sentence)


class TakenOver(CaravanError):
    """Another connection resumed the request."""

    def __init__(self, sentence: str) -> None:
        super().__init__(Outcome.TAKEN_OVER, sentence)
