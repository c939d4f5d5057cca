"""Token ids to text, piece by piece: the pieces together are the text of the whole, byte for byte."""

import codecs
from collections.abc import Iterable

from tokenizers import Tokenizer as FastTokenizer


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, for U+0100 and following.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """What each token of a byte-level vocabulary adds to the text, special tokens adding nothing."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        alphabet = byte_alphabet()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._bytes = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            if token in special:
                continue
            try:
                self._bytes[token_id] = bytes([alphabet[char] for char in token])
            except KeyError:  # An added token is written as it reads, not in the alphabet.
                self._bytes[token_id] = token.encode()

    def __len__(self) -> int:
        """The highest token id + 1."""
        return len(self._bytes)

    def of(self, token_id: int) -> bytes:
        """Bytes of one token; none for special tokens and ids past the vocabulary."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""


class Detokenizer:
    """Text of one growing output.

    A character comes out once all of its bytes are there. What can no longer become one comes out as U+FFFD.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        of = self._token_bytes.of
        return self._decoder.decode(b"".join([of(token_id) for token_id in token_ids]))

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for half a character, else nothing."""
        return self._decoder.decode(b"", final=True)
