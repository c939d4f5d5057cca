"""`caravan eval`: perplexity through the front door is the reference's own."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Llama4ForCausalLM

from cluster.eval import windows
from tests.e2e.serving import Server, caravan

WINDOW, STRIDE = 300, 200


def test_perplexity_is_that_of_transformers(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    text = (checkpoint / "heldout.txt").read_text(encoding="utf-8")[:6000]
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    done = server.caravan("eval", str(file), "--window", str(WINDOW), "--stride", str(STRIDE), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    model = Llama4ForCausalLM.from_pretrained(checkpoint, dtype="float32")
    ids = AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    nll = 0.0
    for window in windows(len(ids), WINDOW, STRIDE):
        with torch.no_grad():
            logits = model(torch.tensor([ids[window.start : window.end]])).logits[0]
        first = window.scored_from - window.start
        targets = torch.tensor(ids[window.scored_from : window.end])
        nll += torch.nn.functional.cross_entropy(logits[first - 1 : -1], targets, reduction="sum").item()
    assert result["tokens"] == len(ids) - 1
    assert result["bytes"] == len(text.encode())
    assert result["perplexity"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=0.001)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()), rel=0.001)


@pytest.mark.parametrize(
    ("content", "flags", "sentence"),
    [
        (None, [], "no such file"),
        (b"\xff\xfe", [], "UTF-8"),
        (b"word " * 50, ["--window", "1000000"], "--window"),
        (b"word " * 50, ["--window", "10", "--stride", "10"], "--stride"),
        (b"", [], "at least 2"),
    ],
)
def test_bad_input_is_one_sentence(
    server: Server, tmp_path: Path, content: bytes | None, flags: list[str], sentence: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    done = server.caravan("eval", str(file), *flags)
    assert done.returncode == 2
    assert sentence.lower() in done.stderr.lower()
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_server_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words")
    done = caravan("eval", str(file), "--address", "127.0.0.1:9")
    assert done.returncode == 1
    assert "no server answers" in done.stderr
