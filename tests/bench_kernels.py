"""The CPU kernels beside what the machine gives: bytes of weights a second for few tokens, products a second for many.

    make bench-kernels

Routed experts of mini's shape (128 of 512 x 512) and one linear layer (8192 x 512), bfloat16, all cores; the machine's
own figures are a sum over 256 MB of float32 and torch's product of two 1024 x 1024 bfloat16 matrices. Best of many:
other work only ever adds time.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from workers.native import Kernels, NativeExperts, NativeHead
from workers.weights import ExpertWeights

EXPERTS, HIDDEN, INNER, ROWS = 128, 512, 512, 8192
TOKENS = (1, 2, 4, 8, 16, 64, 128, 512)
LAYERS = 4
"""Sets of weights taken in turn, so that none is still in a cache."""


def best(runs: int, calls: list[Callable[[], object]]) -> float:
    """Seconds of the quickest of all calls."""
    least = float("inf")
    for _ in range(runs):
        for call in calls:
            started = time.perf_counter()
            call()
            least = min(least, time.perf_counter() - started)
    return least


def randoms(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


@torch.inference_mode()
def main() -> None:
    threads = torch.get_num_threads()
    many, square = torch.randn(64 * 2**20), randoms(1024, 1024)
    read = many.nbytes / best(10, [many.sum]) / 1e9
    product = 2 * 1024**3 / best(20, [lambda: square @ square]) / 1e9
    kernels = Kernels(torch.bfloat16, threads)
    heads = [NativeHead(kernels, randoms(HIDDEN), randoms(ROWS, HIDDEN), 1e-5) for _ in range(LAYERS * 2)]
    weights = [
        ExpertWeights(
            list(range(EXPERTS)),
            list(range(EXPERTS)),
            randoms(EXPERTS, 2 * INNER, HIDDEN),
            randoms(EXPERTS, HIDDEN, INNER),
        )
        for _ in range(LAYERS)
    ]
    experts = [NativeExperts(kernels, each, EXPERTS) for each in weights]
    table = Table(
        title=f"{threads} threads; this machine reads {read:.0f} GB/s, torch multiplies at {product:.0f} GFLOP/s",
        caption="GB/s of weights, and GFLOP/s",
    )
    for name in ("tokens", "experts touched", "experts", "linear layer", "torch, linear layer"):
        table.add_column(name, justify="right")
    for tokens in TOKENS:
        x = randoms(tokens, HIDDEN)
        chosen = torch.randint(0, EXPERTS, (tokens,), generator=torch.Generator().manual_seed(tokens))
        touched = len(chosen.unique())
        size = 3 * HIDDEN * INNER * touched * 2
        seconds = best(10, [partial(layer, x, chosen) for layer in experts])
        cells = [f"{size / seconds / 1e9:.0f} · {6 * HIDDEN * INNER * tokens / seconds / 1e9:.0f}"]
        plain = [partial(torch.nn.functional.linear, x, head._head) for head in heads]
        for calls in ([partial(head.logits, x) for head in heads], plain):
            seconds = best(10, calls)
            cells.append(f"{ROWS * HIDDEN * 2 / seconds / 1e9:.0f} · {2 * ROWS * HIDDEN * tokens / seconds / 1e9:.0f}")
        table.add_row(str(tokens), str(touched), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
