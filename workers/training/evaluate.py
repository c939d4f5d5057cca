"""Quality on held-out text: bits a byte, perplexity, and every expert's share of the tokens.

Windows are those of `caravan eval`, so that its figures through a running server can be held against these.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from workers.training.corpus import DOCUMENT_SEPARATOR, Document
from workers.training.nano_model import NanoModel

BATCH_WINDOWS = 4


@dataclass(frozen=True)
class HeldOut:
    """A text to score."""

    text: str
    ids: list[int]
    """Its tokens, <|begin_of_text|> in front."""


@dataclass(frozen=True)
class Quality:
    tokens: int
    """Tokens scored: all but <|begin_of_text|>, where no window was skipped."""
    nats: float
    """Sum of their negative log-likelihoods."""
    bytes_per_token: float
    shares_ME: Tensor
    """[MoE layers, experts] float64: share of the tokens over the mean share."""

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / (self.tokens * self.bytes_per_token)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def held_out(documents: Sequence[Document], tokenizer: Tokenizer) -> HeldOut:
    """The documents as one text, two blank lines between."""
    text = DOCUMENT_SEPARATOR.join(document.text for document in documents) + "\n"
    return HeldOut(text, tokenizer.encode(text).ids)


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first scored, end) of windows that score every token but the first exactly once."""
    start, scored_from = 0, 1
    while scored_from < num_tokens:
        end = min(start + window, num_tokens)
        yield start, scored_from, end
        start, scored_from = start + stride, end


def evaluate(model: NanoModel, text: HeldOut, window: int, stride: int, every: int = 1, bf16: bool = False) -> Quality:
    """Score a text in windows of `window` tokens, `stride` (less than `window`) apart.

    Args:
        every: take every so many-th window only.
        bf16: compute products in bfloat16, as training does.
    """
    device = next(model.parameters()).device
    tokens = routed = 0
    nats = 0.0
    shares: list[Tensor] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        for batch in _batches(list(windows(len(text.ids), window, stride))[::every]):
            ids_BL = torch.tensor([text.ids[start:end] for start, _, end in batch], device=device)
            logits_BLV, routers = model(ids_BL)
            for (start, scored_from, end), logits_LV, ids_L in zip(batch, logits_BLV, ids_BL, strict=True):
                scored = slice(scored_from - start - 1, end - start - 1)
                targets = ids_L[1:][scored]
                nats += float(F.cross_entropy(logits_LV[scored].float(), targets, reduction="sum"))
                tokens += len(targets)
            counts = [share_E.double() * ids_BL.numel() for share_E in routers.shares]
            shares = [total + count for total, count in zip(shares, counts, strict=True)] if shares else counts
            routed += ids_BL.numel()
    model.train(was_training)
    shares_ME = torch.stack(shares).cpu() / routed if shares else torch.empty(0, 0)
    return Quality(tokens, nats, len(text.text.encode()) / (len(text.ids) - 1), shares_ME)


def _batches(items: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    # Of one length each, so that nothing is padded.
    for _, group in groupby(items, key=lambda item: item[2] - item[0]):
        alike = list(group)
        yield from (alike[at : at + BATCH_WINDOWS] for at in range(0, len(alike), BATCH_WINDOWS))
