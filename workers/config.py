"""Configuration of a rank and its engine: frozen, every field with its unit."""

from dataclasses import dataclass, field
from pathlib import Path

from workers.errors import UserError
from workers.ports import PortRange

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
EXCHANGES = ("auto", "shared", "tcp", "torch")
KERNELS = ("auto", "native", "eager")


@dataclass(frozen=True)
class EngineConfig:
    """What every rank of a gang computes and how much it may hold.

    Raises:
        UserError: a value is out of its range.
    """

    model_dir: Path
    """Folder of a Hugging Face checkpoint."""
    dtype: str = "auto"
    """Computation and KV type; "auto" is the checkpoint's own."""
    device: str = "auto"
    """"auto" is CUDA where there is one."""
    block_size: int = 16
    """Tokens in a KV block."""
    kv_memory_bytes: int = 256 * 2**20
    """Bytes of a rank's KV pools, global and local layers together."""
    max_num_batched_tokens: int = 512
    """Tokens a rank computes in one step at most."""
    max_num_seqs: int = 128
    """Sequences a rank runs at once at most."""
    max_model_len: int = 0
    """Tokens of the longest sequence; 0: what the checkpoint allows and the KV pools hold."""
    prefix_cache: bool = True
    """Keep the KV blocks of sequences that ended until they are needed, for others that begin as they did."""
    prefill_step_ratio: float = 1.5
    """While streams run: the longest step with prompts longer than a step, in steps that only decode; 0: no bound."""
    kernels: str = "auto"
    """How CPU ranks compute: "native" kernels, compiled on the host at its first start, "eager" torch operators, or
    "auto": native where there is a compiler."""
    threads: int = 0
    """Compute threads of a rank; 0: the host's cores shared among its ranks, at least one."""
    exchange: str = "auto"
    """How CPU ranks exchange rows: "shared" memory alone, "tcp" alone, "torch" (torch.distributed's Gloo), or "auto":
    shared memory between ranks of a host that can share it, TCP between all others. GPUs take NCCL."""
    exchange_timeout_s: float = 60.0
    """Seconds until an exchange that nobody answers is an error."""
    share_weights: bool = True
    """CPU ranks of a host map one packed copy of the checkpoint; False: each reads its own part into its own memory."""
    weights_cache_dir: Path | None = None
    """Folder of packed checkpoints; None: $XDG_CACHE_HOME/caravan/weights, else ~/.cache/caravan/weights."""
    weights_cache_bytes: int = 0
    """Bytes of all packed checkpoints together; 0: half of the file system that folder lies on."""

    @property
    def needs_store(self) -> bool:
        """Whether ranks find each other through torch.distributed's rendezvous store."""
        return self.device != "cpu" or self.exchange == "torch"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise UserError(f"device: {self.device!r} is not one of {', '.join(DEVICES)}")
        if self.kernels not in KERNELS:
            raise UserError(f"kernels: {self.kernels!r} is not one of {', '.join(KERNELS)}")
        if self.exchange not in EXCHANGES:
            raise UserError(f"exchange: {self.exchange!r} is not one of {', '.join(EXCHANGES)}")
        for name in ("block_size", "kv_memory_bytes", "max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if not (self.prefill_step_ratio == 0 or self.prefill_step_ratio > 1):
            raise UserError(
                f"prefill_step_ratio: must be more than 1, so that prompts have some time, or 0 for no bound; "
                f"got {self.prefill_step_ratio}"
            )
        if self.weights_cache_bytes < 0:
            raise UserError(f"weights_cache_bytes: must not be negative, got {self.weights_cache_bytes}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise UserError(
                f"max_num_seqs: {self.max_num_seqs} is more than max_num_batched_tokens "
                f"({self.max_num_batched_tokens}), so some sequences could never take a step; lower it"
            )


@dataclass(frozen=True)
class RankConfig:
    """One incarnation of one rank: who it is and where its leader is."""

    gang_id: str
    rank: int
    """Logical number in the gang, from 0."""
    incarnation: int
    """Grows with every process that is started for this rank; a fencing token."""
    leader_address: str
    """HOST:PORT of the leader's gRPC server."""
    host: str
    """Address this rank binds and is reached at."""
    ranks_on_host: int
    """How many ranks share this host's cores."""
    engine: EngineConfig
    rank_ports: PortRange | None = None
    """Of which it takes the first free one for what routers and peers send it; None: any."""
    exchange_ports: PortRange | None = None
    """Of which it takes the first free one for other hosts' rows; None: any."""
    lifeline_timeout_s: float = 30.0
    """Seconds to wait for the leader to answer before giving up."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the process beside the inherited one."""
