"""The training text as one run of tokens, and the windows that steps take from it."""

import random
import re
from collections.abc import Iterable

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from workers.training.corpus import Document
from workers.training.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT, EOT, HEADER_END, HEADER_START

CHARACTERS_PER_CHAT = 8000
"""A document gives one conversation for so many characters, at least one where it has the sentences."""


def conversations(document: Document, seed: int) -> list[str]:
    """Passages of a document as chat: the user opens, the assistant carries on. Teaches the turns, and to end one."""
    sentences = re.split(r"(?<=[.!?]) +|(?<=[.!?;:,])\n", document.text)
    rng = random.Random(f"{seed} {document.source} {document.title}")
    found = []
    for _ in range(max(1, len(document.text) // CHARACTERS_PER_CHAT)):
        opening, answer = rng.randint(1, 2), rng.randint(3, 7)
        if len(sentences) < opening + answer:
            break
        start = rng.randrange(len(sentences) - opening - answer + 1)
        parts = (sentences[start : start + opening], sentences[start + opening : start + opening + answer])
        user, assistant = (" ".join(part) for part in parts)
        found.append(
            f"{HEADER_START}user{HEADER_END}\n\n{user}{EOT}{HEADER_START}assistant{HEADER_END}\n\n{assistant}{EOT}"
        )
    return found


def encode(documents: Iterable[Document], tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """All documents in one run: [N] uint16, each behind <|begin_of_text|>, text closed by <|end_of_text|>.

    The order is shuffled by `seed`, conversations among the documents.
    """
    texts = []
    for document in documents:
        texts.append(document.text + END_OF_TEXT)
        texts += conversations(document, seed)
    random.Random(seed).shuffle(texts)
    pieces = [np.asarray(encoding.ids, dtype=np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
    return np.concatenate(pieces)


def windows(stream: np.ndarray, begin: int, length: int, batch: int, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, length] int64 of the windows numbered from `first`; inputs open with token `begin`.

    Windows step through the stream by the golden ratio: after any number of them all of it is covered evenly, and a
    resumed run needs no other state than their number.
    """
    golden = (5**0.5 - 1) / 2
    offset = random.Random(seed).random()
    numbers = np.arange(first, first + batch, dtype=np.float64)
    starts = (((offset + numbers * golden) % 1.0) * (len(stream) - length)).astype(np.int64)
    targets = torch.from_numpy(np.stack([stream[start : start + length] for start in starts]).astype(np.int64))
    inputs = torch.cat([torch.full((batch, 1), begin, dtype=torch.int64), targets[:, :-1]], dim=1)
    return inputs, targets


def begin_token(tokenizer: Tokenizer) -> int:
    """The number of <|begin_of_text|>."""
    token = tokenizer.token_to_id(BEGIN_OF_TEXT)
    if token is None:
        raise ValueError(f"the tokenizer has no {BEGIN_OF_TEXT}")
    return token
