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
from workers.weights import ModelWeights, gain_experts, load_weights

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


class RankWeights:
    """A rank's weights through one epoch after the other.

    Args:
        report: told of the first loading; what it raises ends that.
    """

    def __init__(
        self,
        engine: EngineConfig,
        model: ModelConfig,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        report: Callable[[LoadProgress], None] = lambda progress: None,
    ) -> None:
        self._engine, self._model, self._rank = engine, model, rank
        self._dtype, self._device, self._report = dtype, device, report
        self._tensors = packed_tensors(model)
        self._mapping: Mapping | None = None
        self._own: ModelWeights | None = None
        """Where there is no mapping."""
        self._expert_map: ExpertMap | None = None

    def take(self, expert_map: ExpertMap) -> ModelWeights:
        """The weights with the experts that a map gives the rank; those taken before are of no use any more.

        What is there stays where it lies. Of what is mapped, gaining an expert costs a look at the table, and its pages
        from the host's memory; else it is read from the checkpoint.

        Raises:
            UserError: a tensor is missing, truncated or of another shape than the configuration says.
            RuntimeError: the disk failed.
        """
        if self._mapping is not None:
            gained = self._mapping.spans(self._tensors, expert_map, self._rank, self._expert_map)
            self._mapping.populate(gained, lambda done, total: None)
            weights = mapped_weights(self._mapping, self._model, expert_map, self._rank)
        elif self._own is not None:
            weights = gain_experts(self._own, self._checkpoint, self._model, expert_map, self._rank)
            self._own = weights
        else:
            weights = self._take_first(expert_map)
        self._expert_map = expert_map
        return weights

    def _take_first(self, expert_map: ExpertMap) -> ModelWeights:
        reporter = _Reporter(self._report)
        if self._device.type == "cpu" and self._engine.share_weights:
            try:
                mapping = self._map(reporter)
                mapping.populate(mapping.spans(self._tensors, expert_map, self._rank), reporter.read)
                self._mapping = mapping
                return mapped_weights(mapping, self._model, expert_map, self._rank)
            except CacheUnusableError as error:
                reporter.note(f"{error}; each rank keeps a copy of its weights instead of sharing them")
        self._own = load_weights(
            self._checkpoint(), self._model, expert_map, self._rank, self._dtype, self._device, reporter.read
        )
        return self._own

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self._engine.model_dir)

    def _map(self, reporter: "_Reporter") -> Mapping:
        engine, tensors, dtype = self._engine, self._tensors, self._dtype
        fingerprint = checkpoint_fingerprint(engine.model_dir, tensors)
        dtype_name = str(dtype).removeprefix("torch.")

        def header() -> Header:
            return plan_header(tensors, dtype_name, fingerprint, str(engine.model_dir.resolve()))

        def fill(writer: Writer, tick: Callable[[], None]) -> None:
            write_pack(writer, Checkpoint(engine.model_dir), tensors, dtype, tick)

        cache = PackedCache(engine.weights_cache_dir or default_cache_folder(), engine.weights_cache_bytes)
        pack = cache.get(pack_name(fingerprint, dtype_name), header, fill, reporter.packed)
        try:
            return Mapping(pack)
        except OSError as error:
            pack.close()
            raise CacheUnusableError(f"{pack.path}: cannot be mapped ({error})") from None


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
    return RankWeights(engine, model, rank, dtype, device, report).take(expert_map)


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
