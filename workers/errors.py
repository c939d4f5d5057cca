"""What goes wrong in a rank, sorted by who can mend it."""


class UserError(ValueError):
    """The user's input is at fault: a bad checkpoint, an impossible configuration.

    The message is one sentence for a person: what is wrong, where, what to do. Starting again would not help.
    """


class ExchangeError(RuntimeError):
    """A collective failed: a suspicion that a peer died, not a verdict (the leader gives that)."""
