"""Train the model that ships with Caravan.

    python -m workers.training.corpus CORPUS
    python -m workers.training.train CORPUS RUN --minutes 90

RUN keeps the tokenizer, the run's state (stop it at any time; the same command goes on where it stood), log.jsonl and,
as RUN/export, the model in Hugging Face format. An accelerator is used when there is one.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F

from workers.errors import UserError
from workers.model_config import ModelConfig
from workers.training.corpus import read
from workers.training.evaluate import HeldOut, Quality, evaluate, held_out
from workers.training.export import export
from workers.training.nano_model import NanoModel
from workers.training.stream import begin_token, encode, windows
from workers.training.tokenizer import train_tokenizer

EVALUATION_WINDOW = 512
"""Tokens of the windows that a run is evaluated in, one beside the other."""


@dataclass(frozen=True)
class Shape:
    """Maverick's shape at nano size; one expert makes it a dense model of the same active size."""

    vocab_size: int = 4096
    hidden: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    expert_mlp: int = 48
    dense_mlp: int = 512
    experts: int = 128
    chunk: int = 128
    """Tokens of local attention's chunk."""
    floor_scale: int = 128
    max_position: int = 2048
    rope_theta: float = 10000.0

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, without token numbers."""
        return {
            "model_type": "llama4_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.expert_mlp,
            "intermediate_size_mlp": self.dense_mlp,
            "num_local_experts": self.experts,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "moe_layers": list(range(1, self.layers, 2)),
            "no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(self.layers)],
            "use_qk_norm": False,
            "attention_chunk_size": self.chunk,
            "attn_temperature_tuning": True,
            "floor_scale": self.floor_scale,
            "attn_scale": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "max_position_embeddings": self.max_position,
        }


@dataclass(frozen=True)
class Recipe:
    """How to train; progress runs from 0 to 1 over `steps` or `minutes`, whichever is not 0."""

    steps: int = 0
    minutes: float = 0.0
    seed: int = 0
    tokens_per_step: int = 4096
    lengths: tuple[tuple[float, int], ...] = ((0.0, 512), (0.7, 1024), (0.9, 2048))
    """Tokens a window from a progress on: short windows are cheaper and mix more texts into a step."""
    learning_rate: float = 3e-3
    router_learning_rate: float = 5e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 1.0
    """Weight of the load-balancing loss, a layer."""
    router_z: float = 1e-4
    router_noise: float = 0.5
    """Noise on the routing logits at the start; none from a fifth of the run on."""
    bf16: bool = True


class Trainer:
    """A run in the folder `run`: made new there, or taken up where it stopped.

    Raises:
        UserError: the folder's run is of another shape or recipe.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, stream: np.ndarray, shape: Shape, recipe: Recipe) -> None:
        self.run, self.tokenizer, self.stream, self.shape, self.recipe = run, tokenizer, stream, shape, recipe
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        torch.manual_seed(recipe.seed)
        self.model = NanoModel(ModelConfig.from_dict(shape.to_dict())).to(self.device)
        self.optimizers = _optimizers(self.model, recipe)
        self.step = 0
        self.windows = 0
        self.elapsed_s = 0.0
        self.begin = begin_token(tokenizer)
        if (state := run / "state.pt").exists():
            self._resume(state)

    @property
    def tokens(self) -> int:
        return self.step * self.recipe.tokens_per_step

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self.recipe.steps:
            return self.step / self.recipe.steps
        return self.elapsed_s / 60 / self.recipe.minutes

    def train_step(self) -> dict[str, float]:
        """One step; returns its loss (nats a token) and the busiest expert's load over the mean."""
        started = time.monotonic()
        recipe, progress = self.recipe, self.progress
        length = [tokens for start, tokens in recipe.lengths if progress >= start][-1]
        batch = max(1, recipe.tokens_per_step // length)
        inputs, targets = windows(self.stream, self.begin, length, batch, self.windows, recipe.seed)
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        rate = min(1.0, (self.step + 1) / recipe.warmup_steps) * max(0.0, 1.0 - progress)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
        # The noise of a step follows from its number, so that a resumed run draws the same.
        torch.manual_seed(recipe.seed * 1_000_003 + self.step)
        noise = recipe.router_noise * max(0.0, 1.0 - 5.0 * progress)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
            logits, routers = self.model(inputs, noise)
        text = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        (text + recipe.balance * routers.balance + recipe.router_z * routers.z).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.windows += batch
        loss = float(text.detach())
        self.elapsed_s += time.monotonic() - started
        if not math.isfinite(loss):
            raise RuntimeError(f"step {self.step}: the loss is {loss}; a lower --learning-rate may help")
        return {"loss": loss, "busiest": max((float(share.max()) for share in routers.shares), default=0.0)}

    def save(self) -> None:
        """Write the run's state, whole or not at all."""
        state = {
            "shape": asdict(self.shape),
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "windows": self.windows,
            "elapsed_s": self.elapsed_s,
        }
        partial = self.run / "state.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.run / "state.pt")

    def _resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["shape"] != asdict(self.shape):
            raise UserError(f"{path}: is a run of another shape; name a new folder, or give the same options")
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.windows, self.elapsed_s = state["step"], state["windows"], state["elapsed_s"]

    def export(self, out: Path) -> None:
        export(self.model, self.shape.to_dict(), self.tokenizer, out)

    def evaluate(self, text: HeldOut, every: int) -> Quality:
        return evaluate(self.model, text, EVALUATION_WINDOW, EVALUATION_WINDOW - 1, every, self.recipe.bf16)


def _optimizers(model: NanoModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices every token passes; AdamW for the rest, where it would cost more than it gains."""
    trunk, routers, decayed, plain = [], [], [], []
    for name, parameter in model.named_parameters():
        if "router" in name:
            routers.append(parameter)
        elif "experts." in name or "embed" in name or "lm_head" in name:
            decayed.append(parameter)
        elif parameter.dim() == 2:
            trunk.append(parameter)
        else:
            plain.append(parameter)
    peak, decay = recipe.learning_rate, recipe.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": decay, "peak": peak},
        {"params": plain, "weight_decay": 0.0, "peak": peak},
    ]
    if routers:
        groups.append({"params": routers, "weight_decay": decay, "peak": recipe.router_learning_rate})
    muon = torch.optim.Muon(
        [{"params": trunk, "peak": peak}], lr=peak, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
    )
    return [torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), eps=1e-10, fused=True), muon]


def prepare(corpus: Path, run: Path, vocab_size: int, seed: int) -> tuple[Tokenizer, np.ndarray]:
    """The run's tokenizer and its training text as tokens: made once, kept in `run`.

    Raises:
        UserError: there is no corpus, or `run` cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); name a folder that can") from None
    tokenizer_file, stream_file = run / "tokenizer.json", run / "train.npy"
    if not (tokenizer_file.exists() and stream_file.exists()):
        documents = read(corpus / "train.jsonl")
        tokenizer = train_tokenizer((document.text for document in documents), vocab_size)
        np.save(stream_file, encode(documents, tokenizer, seed))
        tokenizer.save(str(tokenizer_file))
    return Tokenizer.from_file(str(tokenizer_file)), np.load(stream_file)


def keep_memory() -> None:
    """Have glibc keep freed memory: handing each step's tensors back and faulting them in again takes half the time."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)  # M_TOP_PAD
    except (OSError, AttributeError):
        pass  # another C library; slower, not wrong


def train(
    trainer: Trainer, heldout: HeldOut, save_minutes: float, export_minutes: float, stop: threading.Event
) -> Quality | None:
    """Run to the end with a progress bar; returns the quality on `heldout`, all of it.

    Once `stop` is set the step under way is finished, the state saved, and None returned.
    """
    saved = exported = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars, (trainer.run / "log.jsonl").open("a", encoding="utf-8") as log:
        bar = bars.add_task("", total=1.0)
        smoothed = math.nan
        while trainer.progress < 1.0:
            if stop.is_set():
                trainer.save()
                return None
            facts = trainer.train_step()
            smoothed = facts["loss"] if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * facts["loss"]
            rate = trainer.tokens / max(trainer.elapsed_s, 1e-9)
            words = f"step {trainer.step}, loss {smoothed:.3f}, busiest {facts['busiest']:.1f}x, {rate:,.0f} tokens/s"
            bars.update(bar, completed=trainer.progress, description=words)
            if trainer.step % 20 == 0:
                _log(log, trainer, {**facts, "smoothed": smoothed})
            now = time.monotonic()
            if now - exported > export_minutes * 60:
                exported = now
                trainer.export(trainer.run / "export")
            if now - saved > save_minutes * 60:
                saved = now
                _log(log, trainer, _facts(trainer.evaluate(heldout, every=4)))
                # A budget in minutes holds these pauses too.
                trainer.elapsed_s += time.monotonic() - now
                trainer.save()
        trainer.save()
        trainer.export(trainer.run / "export")
        quality = trainer.evaluate(heldout, every=1)
        _log(log, trainer, _facts(quality))
    return quality


def _facts(quality: Quality) -> dict[str, float]:
    facts = {"heldout_bits_per_byte": quality.bits_per_byte, "heldout_perplexity": quality.perplexity}
    if len(quality.shares_ME):
        facts |= {"idlest": float(quality.shares_ME.min()), "busiest": float(quality.shares_ME.max())}
    return facts


def _log(log: Any, trainer: Trainer, facts: dict[str, float]) -> None:
    where = {"step": trainer.step, "tokens": trainer.tokens, "seconds": round(trainer.elapsed_s, 1)}
    log.write(json.dumps({**where, **{name: round(value, 4) for name, value in facts.items()}}) + "\n")
    log.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that workers.training.corpus wrote")
    parser.add_argument("run", type=Path, help="folder of this run")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--minutes", type=float, default=0.0, help="train for so long; the learning rate falls to its end"
    )
    budget.add_argument("--steps", type=int, default=0, help="train for so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores; 1 on a busy machine)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--balance", type=float, default=Recipe.balance, help="weight of the load-balancing loss")
    parser.add_argument("--dense-mlp", type=int, default=Shape.dense_mlp)
    parser.add_argument(
        "--experts",
        type=int,
        default=Shape.experts,
        help="routed experts; 1 trains a dense model of the same active size",
    )
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--export-minutes", type=float, default=20.0)
    args = parser.parse_args()
    if args.minutes <= 0 and args.steps <= 0:
        parser.error("--minutes and --steps must be positive")
    if args.threads < 0 or args.experts < 1 or args.dense_mlp < 1:
        parser.error("--threads must not be negative, --experts and --dense-mlp must be positive")
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = Shape(experts=args.experts, dense_mlp=args.dense_mlp)
    recipe = Recipe(
        steps=args.steps, minutes=args.minutes, seed=args.seed, learning_rate=args.learning_rate, balance=args.balance
    )
    try:
        documents = read(args.corpus / "heldout.jsonl")
        tokenizer, stream = prepare(args.corpus, args.run, shape.vocab_size, args.seed)
        heldout = held_out(documents, tokenizer)
        trainer = Trainer(args.run, tokenizer, stream, shape, recipe)
    except UserError as error:
        parser.error(str(error))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {len(stream) / 1e6:.1f}M tokens, on {trainer.device}")
    keep_memory()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    quality = train(trainer, heldout, args.save_minutes, args.export_minutes, stop)
    if quality is None:
        raise SystemExit(f"stopped and saved after step {trainer.step}; the same command goes on from there")
    print(f"held out: {quality.bits_per_byte:.3f} bits a byte, perplexity {quality.perplexity:.1f} a token")


if __name__ == "__main__":
    main()
