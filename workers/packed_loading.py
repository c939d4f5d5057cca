"""Where a rank's weights come from: on CPU a packed file that the host's ranks share, else the checkpoint."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from workers.checkpoint import Checkpoint
from workers.checkpoint_fingerprint import checkpoint_fingerprint
from workers.config import EngineConfig
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.packed_cache import CacheUnusableError, PackedCache, default_cache_folder
from workers.packed_file import Header, Writer, pack_name, plan_header
from workers.packed_layout import packed_tensors
from workers.packed_weights import Mapping, mapped_weights, write_pack
from workers.weights import ModelWeights, load_weights

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.1


@dataclass(frozen=True)
class LoadProgress:
    """How far a rank is."""

    read: int = 0
    """Bytes of weights that this rank has mapped or read."""
    total: int = 0
    """Bytes it will have in the end."""
    packed: int = 0
    """Bytes of the host's pack that this start has written, whichever process writes it; 0: it was there."""
    to_pack: int = 0
    note: str = ""
    """What an operator should know of where the weights are."""


def rank_weights(
    engine: EngineConfig,
    model: ModelConfig,
    expert_map: ExpertMap,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    report: Callable[[LoadProgress], None] = lambda progress: None,
) -> ModelWeights:
    """Map the checkpoint's packed file, made first if need be; where that cannot be (or `device` is no CPU), read what
    `rank` needs from the checkpoint. Numbers in reports only grow; what `report` raises ends the loading.

    Raises:
        UserError: a tensor is missing, truncated or of another shape than the configuration says.
        RuntimeError: the disk failed.
    """
    reporter = _Reporter(report)
    if device.type == "cpu" and engine.share_weights:
        try:
            return _packed(engine, model, expert_map, rank, dtype, reporter)
        except CacheUnusableError as error:
            reporter.note(f"{error}; each rank keeps a copy of its weights instead of sharing them")
    checkpoint = Checkpoint(engine.model_dir)
    return load_weights(checkpoint, model, expert_map, rank, dtype, device, progress=reporter.read)


def _packed(
    engine: EngineConfig,
    model: ModelConfig,
    expert_map: ExpertMap,
    rank: int,
    dtype: torch.dtype,
    reporter: "_Reporter",
) -> ModelWeights:
    tensors = packed_tensors(model)
    fingerprint = checkpoint_fingerprint(engine.model_dir, tensors)
    dtype_name = str(dtype).removeprefix("torch.")

    def header() -> Header:
        return plan_header(tensors, dtype_name, fingerprint, str(engine.model_dir.resolve()))

    def fill(writer: Writer, tick: Callable[[], None]) -> None:
        write_pack(writer, Checkpoint(engine.model_dir), tensors, dtype, tick)

    cache = PackedCache(engine.weights_cache_dir or default_cache_folder(), engine.weights_cache_bytes)
    pack = cache.get(pack_name(fingerprint, dtype_name), header, fill, reporter.packed)
    try:
        mapping = Mapping(pack)
    except OSError as error:
        pack.close()
        raise CacheUnusableError(f"{pack.path}: cannot be mapped ({error})") from None
    mapping.populate(mapping.spans(tensors, expert_map, rank), reporter.read)
    return mapped_weights(mapping, model, expert_map, rank)


class _Reporter:
    """Passes on what is new, ten times a second and whenever something is complete."""

    def __init__(self, report: Callable[[LoadProgress], None]) -> None:
        self._report = report
        self._progress = LoadProgress()
        self._sent = 0.0

    def packed(self, done: int, total: int) -> None:
        # A process that takes over from a dead one begins anew; nobody wants to see that run backwards.
        packed, to_pack = max(done, self._progress.packed), max(total, self._progress.to_pack)
        self._progress = replace(self._progress, packed=packed, to_pack=to_pack)
        self._send(is_last=done == total)

    def read(self, done: int, total: int) -> None:
        self._progress = replace(self._progress, read=done, total=total)
        self._send(is_last=done == total)

    def note(self, note: str) -> None:
        log.warning(note)
        self._progress = replace(self._progress, note=note)
        self._send(is_last=True)

    def _send(self, is_last: bool) -> None:
        if is_last or time.monotonic() - self._sent >= REPORT_SECONDS:
            self._sent = time.monotonic()
            self._report(self._progress)
