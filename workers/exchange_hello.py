"""What a rank says first on a connection to another: who it is, whom it means, for which epoch; and the answer."""

import hashlib
import struct
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"caravan\x06"
VERSION = 1
"""Of the messages between ranks; ranks of different versions do not talk."""
_HELLO = struct.Struct("<8sI32sQIQIQ")
_ANSWER = struct.Struct("<8sII")
HELLO_BYTES = _HELLO.size
ANSWER_BYTES = _ANSWER.size


class Answer(IntEnum):
    """What a rank says to a hello."""

    WELCOME = 0
    OTHER_VERSION = 1
    OTHER_GANG = 2
    OTHER_RANK = 3
    OLD_EPOCH = 4
    OTHER_INCARNATION = 5
    TAKEN = 6
    BUSY = 7


REASONS = {
    Answer.OTHER_VERSION: "it speaks another version of the exchange; install the same Caravan on every host",
    Answer.OTHER_GANG: "a rank of another gang listens there",
    Answer.OTHER_RANK: "another rank, or another incarnation of it, listens there",
    Answer.OLD_EPOCH: "the epoch is over for it",
    Answer.OTHER_INCARNATION: "it expects another incarnation of this rank",
    Answer.TAKEN: "it has a connection from this rank for the epoch already",
    Answer.BUSY: "too many connections wait there",
}


class HelloError(ValueError):
    """What came is not a hello; `answer` says why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.name)
        self.answer = answer


@dataclass(frozen=True)
class Hello:
    """The first message of the rank that connects."""

    gang: bytes
    """SHA-256 of the gang's id."""
    epoch: int
    rank: int
    incarnation: int
    to_rank: int
    to_incarnation: int

    def pack(self) -> bytes:
        numbers = (self.epoch, self.rank, self.incarnation, self.to_rank, self.to_incarnation)
        return _HELLO.pack(MAGIC, VERSION, self.gang, *numbers)

    @staticmethod
    def unpack(message: bytes) -> "Hello":
        """Raises HelloError for what is no hello of this version."""
        magic, version, gang, *numbers = _HELLO.unpack(message)
        if magic != MAGIC:
            raise HelloError(Answer.OTHER_GANG)
        if version != VERSION:
            raise HelloError(Answer.OTHER_VERSION)
        return Hello(gang, *numbers)


def gang_digest(gang_id: str) -> bytes:
    return hashlib.sha256(gang_id.encode()).digest()


def pack_answer(answer: Answer) -> bytes:
    return _ANSWER.pack(MAGIC, VERSION, answer)


def unpack_answer(message: bytes) -> Answer | None:
    """None: whoever answers is no rank."""
    magic, _, code = _ANSWER.unpack(message)
    return Answer(code) if magic == MAGIC and code in set(Answer) else None
