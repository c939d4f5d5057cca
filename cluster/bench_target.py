"""A server under the load of `caravan bench`, whatever it speaks."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.bench_stream import Stream
from cluster.errors import UsageError

CONNECT_BOUND_S = 10.0
# Token ids of prompts: past the special tokens that many vocabularies begin with, and in every vocabulary there is.
LEAST_TOKEN, TOKENS_END = 20, 8000


@dataclass(frozen=True)
class Facts:
    """What a server says about itself."""

    model: str
    tokens_end: int
    """Prompts may hold token ids below this one."""
    context_length: int | None
    """Tokens of prompt and output together; None: it does not say."""
    is_caravan: bool


class Target(Protocol):
    """One server. `open` comes first; what the methods share is one connection or several."""

    address: str
    """As the user wrote it."""

    async def open(self) -> Facts:
        """Connect, and learn what is served.

        Raises:
            CommandError: nothing answers, or what answers is another kind of server.
        """

    async def stream(self, prompt: Sequence[int], output_tokens: int) -> Stream:
        """Send one request, greedy, end-of-text ignored, and read its answer to the end. Failures are in the result."""

    async def close(self) -> None:
        """End every connection."""


def make_target(address: str, connections: int) -> Target:
    """Args:
        address: HOST:PORT of a Caravan server, spoken to by gRPC, or http://HOST:PORT of any server with OpenAI's
            completions; #NAME after it names the model of a server with several.
        connections: how many a gRPC target makes.

    Raises:
        UsageError: it is neither, or HTTP lacks its library.
    """
    if not is_http(address):
        # Each door's libraries are paid for by whoever goes through it.
        return importlib.import_module("cluster.bench_grpc").GrpcTarget(address, connections)  # type: ignore[no-any-return]
    try:
        module = importlib.import_module("cluster.bench_http")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{address}: HTTP needs {error.name}, which is not installed; install it with `pip install caravan[bench]`"
        ) from None
    return module.HttpTarget(address)  # type: ignore[no-any-return]


def is_http(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def tokens_end(vocab_size: int) -> int:
    """Where a range of token ids ends that the vocabulary has, and that halving TOKENS_END finds too."""
    end = TOKENS_END
    while end > vocab_size:
        end //= 2
    return end
