"""How much KV memory a sequence needs: `python -m workers.kv_table` prints the table of the published models."""

from dataclasses import dataclass

from workers.model_config import ModelConfig


@dataclass(frozen=True)
class KVShape:
    """What a model's KV memory depends on."""

    num_layers: int
    num_local_layers: int
    """Those that see the current chunk alone."""
    num_kv_heads: int
    head_dim: int
    chunk_size: int
    """Tokens."""

    @classmethod
    def of(cls, model: ModelConfig) -> "KVShape":
        return cls(model.num_layers, sum(model.rope_layers), model.num_kv_heads, model.head_dim, model.chunk_size)

    def token_bytes(self, item_bytes: int) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * item_bytes


LLAMA4 = KVShape(num_layers=48, num_local_layers=36, num_kv_heads=8, head_dim=128, chunk_size=8192)
"""Maverick and Scout are alike in this."""
ROWS = (("8k", 2**13), ("128k", 2**17), ("1M (Maverick)", 2**20), ("10M (Scout)", 10 * 2**20))


def table_bytes(shape: KVShape, num_tokens: int, item_bytes: int = 2, frees_local: bool = True) -> int:
    """Bytes of the KV that a sequence holds at most, up to and at `num_tokens`; blocks not rounded up.

    Args:
        item_bytes: of one number: 2 for bfloat16.
        frees_local: local layers keep the current chunk only; else everything, as global ones do.
    """
    local_tokens = min(num_tokens, shape.chunk_size) if frees_local else num_tokens
    global_layers = shape.num_layers - shape.num_local_layers
    return shape.token_bytes(item_bytes) * (global_layers * num_tokens + shape.num_local_layers * local_tokens)


def markdown(shape: KVShape = LLAMA4, item_bytes: int = 2) -> str:
    """The table, a row a length."""
    lines = ["| tokens | all layers keep everything | local blocks freed | |", "|---|---|---|---|"]
    for name, num_tokens in ROWS:
        whole = table_bytes(shape, num_tokens, item_bytes, frees_local=False)
        freed = table_bytes(shape, num_tokens, item_bytes)
        lines.append(f"| {name} | {_gib(whole)} | {_gib(freed)} | {whole / freed:.1f}× less |")
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:.4g} GiB"


if __name__ == "__main__":
    print(markdown())
