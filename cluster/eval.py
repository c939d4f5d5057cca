"""`caravan eval`: how well a running server's model predicts a text, through the front door."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.errors import ExitCode, UsageError
from cluster.generate import command_error
from protos.client import Client, make_request
from protos.errors import CaravanError

# Windows under way at once: enough to fill the ranks' steps, few enough to leave room for others.
CONCURRENT_WINDOWS = 8


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` - 1 go to the model; those from `scored_from` on are scored."""

    start: int
    scored_from: int
    end: int


@dataclass(frozen=True)
class Evaluation:
    """What came out. Perplexity is exp(nll / tokens), bits per byte nll / ln 2 / bytes."""

    tokens: int
    """Tokens scored: all but the first, which nothing predicts."""
    bytes: int
    """UTF-8 bytes of the text."""
    nll: float
    """Negative log-likelihood of the scored tokens, natural logarithm."""
    perplexity: float
    bits_per_byte: float
    window: int
    """Tokens of a window."""
    stride: int
    """Tokens from one window to the next: each token is scored once, with at least window - stride before it."""


def run(arguments: argparse.Namespace) -> int:
    """Print the evaluation.

    Raises:
        UsageError: the file cannot be read, or window and stride cannot work.
        ServerError: the server failed or is not there.
    """
    text = _read(arguments.file)
    try:
        with Client(arguments.address) as client:
            longest = client.get_model().context_length - 1
            window = arguments.window or longest
            stride = arguments.stride or max(1, window // 2)
            if not 2 <= window <= longest:
                raise UsageError(f"--window: must be from 2 to {longest}, the context less one token, got {window}")
            if stride >= window:
                raise UsageError(f"--stride: must be less than the window of {window}, got {stride}")
            evaluation = evaluate(client, text, window, stride)
    except CaravanError as error:
        raise command_error(error) from None
    if arguments.json:
        print(json.dumps(asdict(evaluation), separators=(",", ":")))
    else:
        _show(evaluation)
    return ExitCode.OK


def evaluate(client: Client, text: str, window: int, stride: int) -> Evaluation:
    """Score a text with prompt log-probabilities.

    Raises:
        UsageError: the text has fewer than two tokens.
        CaravanError: a call failed.
    """
    tokens = client.tokenize(text)
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens; at least 2 are needed")
    plan = list(windows(len(tokens), window, stride))
    total = 0.0
    progress = Progress(
        TextColumn("windows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with progress, ThreadPoolExecutor(CONCURRENT_WINDOWS) as pool:
        for nll in progress.track(pool.map(lambda item: _score(client, tokens, item), plan), total=len(plan)):
            total += nll
    scored, size = len(tokens) - 1, len(text.encode())
    return Evaluation(scored, size, total, math.exp(total / scored), total / math.log(2) / size, window, stride)


def windows(num_tokens: int, window: int, stride: int) -> Iterator[Window]:
    """Cover every token but the first exactly once."""
    start, scored_from = 0, 1
    while scored_from < num_tokens:
        end = min(start + window, num_tokens)
        yield Window(start, scored_from, end)
        start, scored_from = start + stride, end


def _score(client: Client, tokens: list[int], window: Window) -> float:
    ids = tokens[window.start : window.end]
    completion = client.complete(make_request(ids, max_tokens=1, temperature=0, prompt_logprobs=0))
    # Entry i is of token i + 1 of the window.
    scored = completion.prompt_logprobs[window.scored_from - window.start - 1 :]
    return -math.fsum(position.chosen.logprob for position in scored)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a text file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8 text; convert it first") from None


def _show(evaluation: Evaluation) -> None:
    table = Table("tokens", "bytes", "perplexity", "bits per byte", "window", "stride")
    table.add_row(
        str(evaluation.tokens),
        str(evaluation.bytes),
        f"{evaluation.perplexity:.3f}",
        f"{evaluation.bits_per_byte:.4f}",
        str(evaluation.window),
        str(evaluation.stride),
    )
    Console(file=sys.stdout).print(table)
