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
