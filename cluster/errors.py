"""How a command ends when it cannot do its work: one sentence on stderr and an exit code."""

import sys
from enum import IntEnum
from typing import TextIO


class ExitCode(IntEnum):
    """Exit codes of every `caravan` command."""

    OK = 0
    SERVER_FAILURE = 1
    """The server, or the way to it, failed."""
    USER_ERROR = 2
    """What the user gave cannot work: trying again would not help."""
    INTERRUPTED = 130
    """Ended by Ctrl-C."""
    TERMINATED = 143
    """Ended by SIGTERM."""


class CommandError(Exception):
    """Ends a command with `message`, one sentence for a person, and `exit_code`."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(CommandError):
    """The user's input is at fault: exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USER_ERROR)


class ServerError(CommandError):
    """The server, or the way to it, failed: exit code 1."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.SERVER_FAILURE)


def one_sentence(text: object, limit: int = 600) -> str:
    """`text` on one line, cut at `limit` characters: what a terminal or a status field can show."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def report(error: CommandError, stream: TextIO | None = None) -> None:
    """The one line a person gets instead of a stack trace; on stderr if `stream` is None."""
    print(f"caravan: {one_sentence(error, 2000)}", file=stream or sys.stderr, flush=True)
