"""Text to token ids and back, as the checkpoint's tokenizer.json says."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from router.detokenizer import TokenBytes
from router.errors import RouterConfigError

LONG_CHARS = 4096
"""Texts from here on are tokenized without holding up other threads."""


class Tokenizer:
    """A checkpoint's byte-level BPE.

    Safe to use from several threads at once.

    Attributes:
        token_bytes: bytes of every token, for incremental detokenization.
    """

    def __init__(self, fast: FastTokenizer) -> None:
        """Raises RouterConfigError when the decoder is not byte-level, so bytes of tokens would be unknown."""
        self._fast = fast
        spec = json.loads(fast.to_str())
        if not _is_byte_level(spec.get("decoder")):
            raise RouterConfigError("tokenizer.json: its decoder is not ByteLevel; Caravan streams byte-level BPE only")
        self.token_bytes = TokenBytes(fast)
        self._begin_of_text = self._find_begin_of_text()

    @classmethod
    def from_folder(cls, folder: Path, vocab_size: int) -> "Tokenizer":
        """Reads tokenizer.json.

        Args:
            folder: a Hugging Face checkpoint.
            vocab_size: rows of the checkpoint's embedding; no token may have a higher id.

        Raises:
            RouterConfigError: the file is missing, unreadable, no byte-level BPE, or of another checkpoint.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise RouterConfigError(f"{folder} has no tokenizer.json; Caravan needs the checkpoint's fast tokenizer")
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception for whatever is wrong with the file.
            raise RouterConfigError(f"{path} cannot be read as a tokenizer: {error}") from error
        # A file may ask for truncation or padding, meant for training; a prompt must come through as it is.
        fast.no_truncation()
        fast.no_padding()
        tokenizer = cls(fast)
        if tokenizer.vocab_size > vocab_size:
            raise RouterConfigError(
                f"{path} has token ids up to {tokenizer.vocab_size - 1}, but config.json's vocab_size is {vocab_size}; "
                "take the tokenizer of this checkpoint"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The highest token id + 1."""
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` with what the tokenizer puts around it, begin-of-text never twice.

        Special tokens written out in the text (`<|eot|>`) become those tokens.
        """
        if len(text) < LONG_CHARS:
            ids: list[int] = self._fast.encode(text).ids
        else:
            # The library lets other threads run only in its batch calls.
            ids = self._fast.encode_batch_fast([text])[0].ids
        if self._begin_of_text is not None and ids[:2] == [self._begin_of_text] * 2:
            del ids[0]
        return ids

    def decode(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """Text of `token_ids`. Ids without a token give nothing; bytes that are no UTF-8 give U+FFFD."""
        return self._fast.decode(list(token_ids), skip_special_tokens=not keep_special_tokens)

    def written(self, token_id: int) -> bytes:
        """One token as it is written, special ones by their name; nothing for ids without a token."""
        return self.token_bytes.of(token_id) or (self._fast.id_to_token(token_id) or "").encode()

    def _find_begin_of_text(self) -> int | None:
        """The token the tokenizer itself puts before any text, if it does."""
        plain = self._fast.encode("a", add_special_tokens=False).ids
        dressed = self._fast.encode("a").ids
        return dressed[0] if dressed and dressed[:1] != plain[:1] else None


def _is_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        steps = decoder.get("decoders", [])
        return bool(steps) and all(_is_byte_level(step) for step in steps)
    return decoder.get("type") == "ByteLevel"
