"""Turn a finished run into the folder that ships: the checkpoint, its held-out text and a picture of its experts' load.

    python -m workers.training.release CORPUS RUN workers/nano --dense DENSE_RUN

Prints the tables of the folder's README.md, which a person writes, and leaves other files there alone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from workers.errors import UserError
from workers.model_config import ModelConfig
from workers.training.bigram import Bigram
from workers.training.corpus import read
from workers.training.evaluate import HeldOut, Quality, evaluate, held_out
from workers.training.export import export
from workers.training.histogram import histogram
from workers.training.nano_model import NanoModel
from workers.training.train import Shape, keep_memory

LOAD_WINDOW = 512


def load_run(run: Path) -> tuple[NanoModel, Shape, int]:
    """The model of a run, its shape, and the tokens it has seen.

    Raises:
        UserError: there is no run, or none that has saved anything.
    """
    try:
        state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{run}: holds no state.pt; train first, with python -m workers.training.train") from None
    shape = Shape(**state["shape"])
    model = NanoModel(ModelConfig.from_dict(shape.to_dict()))
    model.load_state_dict(state["model"])
    return model, shape, state["step"] * state["recipe"]["tokens_per_step"]


def release(corpus: Path, run: Path, out: Path, dense: Path | None) -> list[str]:
    """Write the folder; returns the lines of the README's tables.

    Raises:
        UserError: the corpus or a run is missing.
    """
    model, shape, tokens = load_run(run)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    text = held_out(read(corpus / "heldout.jsonl"), tokenizer)
    export(model, shape.to_dict(), tokenizer, out)
    (out / "heldout.txt").write_text(text.text, encoding="utf-8")
    # What ships is rounded to bfloat16; so is what is measured.
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    window = shape.max_position - 1
    quality = evaluate(model, text, window, window // 2)
    layers = model.config.moe_layers
    # Windows side by side, so that every token counts once.
    shares_ME = evaluate(model, text, LOAD_WINDOW, LOAD_WINDOW - 1).shares_ME
    picture = histogram(shares_ME.tolist(), layers, "Load of the 128 experts on held-out text")
    (out / "experts.svg").write_text(picture, encoding="utf-8")
    lines = ["| model | tokens seen | perplexity a token | bits a byte |", "|---|---|---|---|"]
    lines.append(_row("this model", tokens, quality))
    if dense is not None:
        other, _, seen = load_run(dense)
        lines.append(_row("dense, same active size", seen, evaluate(other, text, window, window // 2)))
    lines.append(_row("bigram", *bigram(np.load(run / "train.npy"), text, shape.vocab_size)))
    lines += ["", "| layer | idlest expert | busiest expert |", "|---|---|---|"]
    for layer, shares_E in zip(layers, shares_ME, strict=True):
        lines.append(f"| {layer} | {float(shares_E.min()):.2f} | {float(shares_E.max()):.2f} |")
    return lines


def bigram(stream: np.ndarray, text: HeldOut, vocab_size: int) -> tuple[int, Quality]:
    """Tokens counted, and the bigram model's quality on `text`."""
    nats = Bigram(stream, vocab_size).nats(np.asarray(text.ids))
    tokens = len(text.ids) - 1
    return len(stream), Quality(tokens, nats, len(text.text.encode()) / tokens, torch.empty(0, 0))


def _row(name: str, tokens: int, quality: Quality) -> str:
    return f"| {name} | {tokens / 1e6:.1f}M | {quality.perplexity:.2f} | {quality.bits_per_byte:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder that workers.training.corpus wrote")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dense", type=Path, help="folder of a run with --experts 1, to compare with")
    args = parser.parse_args()
    keep_memory()
    try:
        print("\n".join(release(args.corpus, args.run, args.out, args.dense)))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
