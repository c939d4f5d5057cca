"""Training at toy size: it learns, it can be stopped, and what it exports is what it trained."""

import dataclasses
import json
import math
import time
import zlib
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Llama4ForCausalLM

from tests.local_engine import LocalRank, engine_config, greedy
from workers.errors import UserError
from workers.model_config import ModelConfig
from workers.training import corpus
from workers.training.bigram import Bigram
from workers.training.corpus import Document, Source, clean, hold_out
from workers.training.evaluate import evaluate, held_out, windows
from workers.training.export import export
from workers.training.histogram import histogram
from workers.training.nano_model import NanoModel
from workers.training.release import load_run, release
from workers.training.stream import conversations, encode
from workers.training.stream import windows as training_windows
from workers.training.tokenizer import BEGIN_OF_TEXT, EOT, SPECIAL_TOKENS, train_tokenizer
from workers.training.train import Recipe, Shape, Trainer, main, train

SHAPE = Shape(
    vocab_size=384,
    hidden=32,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=8,
    expert_mlp=8,
    dense_mlp=32,
    experts=8,
    chunk=24,
    floor_scale=16,
    max_position=1024,
)
RECIPE = Recipe(steps=30, seed=3, tokens_per_step=256, lengths=((0.0, 48), (0.5, 64)), warmup_steps=3)
SENTENCES = (
    "The whale swam past the ship.",
    "The captain watched it go.",
    "No man spoke a word.",
    "It was gone by night.",
)


def documents(count: int = 60) -> list[Document]:
    texts = [" ".join(SENTENCES[(n * k + k) % 4] for k in range(12)) for n in range(count)]
    return [Document("toy", f"part {n}", text) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer((document.text for document in documents()), SHAPE.vocab_size)


@pytest.fixture(scope="module")
def stream(tokenizer: Tokenizer) -> np.ndarray:
    return encode(documents(), tokenizer, seed=0)


def new_trainer(run: Path, tokenizer: Tokenizer, stream: np.ndarray, recipe: Recipe = RECIPE) -> Trainer:
    run.mkdir(exist_ok=True)
    return Trainer(run, tokenizer, stream, SHAPE, recipe)


# ---- training ---------------------------------------------------------------------------------------------------


def test_a_toy_learns(tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray) -> None:
    started = time.monotonic()
    trainer = new_trainer(tmp_path, tokenizer, stream)
    losses = [trainer.train_step()["loss"] for _ in range(RECIPE.steps)]
    assert losses[0] == pytest.approx(math.log(SHAPE.vocab_size), rel=0.1)
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("bf16", [True, False])
def test_a_stopped_run_goes_on_as_if_it_had_not(
    tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray, bf16: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, steps=12, bf16=bf16)
    unbroken = new_trainer(tmp_path / "unbroken", tokenizer, stream, recipe)
    losses = [unbroken.train_step() for _ in range(12)]
    # Stopped while routers are still noisy, and again across the change of length.
    resumed = []
    for steps in (2, 5, 5):
        part = new_trainer(tmp_path / "stopped", tokenizer, stream, recipe)
        resumed += [part.train_step() for _ in range(steps)]
        part.save()
    assert resumed == losses
    other = new_trainer(tmp_path / "stopped", tokenizer, stream, recipe)
    assert (other.step, other.windows) == (unbroken.step, unbroken.windows)
    for (name, ours), theirs in zip(
        other.model.state_dict().items(), unbroken.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_a_run_of_another_shape_is_refused(tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray) -> None:
    new_trainer(tmp_path, tokenizer, stream).save()
    with pytest.raises(UserError, match="another shape"):
        Trainer(tmp_path, tokenizer, stream, dataclasses.replace(SHAPE, experts=4), RECIPE)


def test_a_budget_in_minutes_ends_the_run_and_leaves_a_model(
    tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray
) -> None:
    recipe = dataclasses.replace(RECIPE, steps=0, minutes=0.02)
    trainer = new_trainer(tmp_path, tokenizer, stream, recipe)
    quality = train(trainer, held_out(documents(4), tokenizer), save_minutes=0.005, export_minutes=0.005, stop=Event())
    assert quality is not None
    assert 1.2 <= trainer.elapsed_s < 10
    assert quality.bits_per_byte < 8
    assert (tmp_path / "export/model.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["heldout_bits_per_byte"] == pytest.approx(quality.bits_per_byte, abs=1e-3)


def test_a_run_asked_to_stop_saves_and_stops(tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray) -> None:
    trainer = new_trainer(tmp_path, tokenizer, stream)
    trainer.train_step()
    stop = Event()
    stop.set()
    assert train(trainer, held_out(documents(4), tokenizer), save_minutes=9, export_minutes=9, stop=stop) is None
    assert new_trainer(tmp_path, tokenizer, stream).step == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "one of the arguments --minutes --steps is required"),
        (("--steps", "-3"), "--minutes and --steps must be positive"),
        (("--steps", "5", "--experts", "0"), "--experts and --dense-mlp must be positive"),
        (("--steps", "5"), "heldout.jsonl: no such file; build the corpus with"),
    ],
)
def test_a_mistake_gets_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "corpus"), str(tmp_path / "run"), *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_balancing_loss_spreads_the_load(tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray) -> None:
    text = held_out(documents(), tokenizer)
    busiest = {}
    for balance in (0.0, 0.3):
        recipe = dataclasses.replace(RECIPE, balance=balance, router_learning_rate=5e-3, router_noise=0.0)
        trainer = new_trainer(tmp_path / str(balance), tokenizer, stream, recipe)
        for _ in range(RECIPE.steps):
            trainer.train_step()
        shares_ME = evaluate(trainer.model, text, 64, 63).shares_ME
        assert shares_ME.sum(1).tolist() == pytest.approx([8.0, 8.0])
        busiest[balance] = float(shares_ME.max())
    assert busiest[0.3] < busiest[0.0]


# ---- the model is Llama 4 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, stream: np.ndarray
) -> tuple[NanoModel, Path]:
    """A trained toy and its float32 export."""
    folder = tmp_path_factory.mktemp("exported")
    trainer = new_trainer(folder / "run", tokenizer, stream)
    for _ in range(15):
        trainer.train_step()
    export(trainer.model, SHAPE.to_dict(), tokenizer, folder / "toy", dtype="float32")
    return trainer.model.eval(), folder / "toy"


def prompts() -> list[list[int]]:
    # Shorter than a chunk, several chunks and a rest, a whole number of chunks.
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (length,), generator=generator).tolist() for length in (5, 65, 72)]


def test_transformers_computes_the_same(exported: tuple[NanoModel, Path]) -> None:
    model, folder = exported
    reference = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids in prompts():
        tokens = torch.tensor([ids])
        with torch.no_grad():
            ours, theirs = model(tokens)[0], reference(tokens).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_engine_generates_the_same(exported: tuple[NanoModel, Path]) -> None:
    model, folder = exported
    rank = LocalRank(engine_config(folder))
    outputs = rank.generate([greedy(n, ids, 20) for n, ids in enumerate(prompts())])
    ends = ModelConfig.from_folder(folder).eos_token_ids
    for ids, output in zip(prompts(), outputs, strict=True):
        expected: list[int] = []
        while len(expected) < 20 and not (expected and expected[-1] in ends):
            with torch.no_grad():
                expected.append(int(model(torch.tensor([ids + expected]))[0][0, -1].argmax()))
        assert output == expected


def test_training_drops_tokens_only_beyond_the_capacity() -> None:
    torch.manual_seed(0)
    experts = NanoModel(ModelConfig.from_dict(SHAPE.to_dict())).model.layers[1].feed_forward.experts
    x_TH, all_to_one = torch.randn(256, 32), torch.full((256,), 5)
    exact = experts.eval()(x_TH, all_to_one)
    capped = experts.train()(x_TH, all_to_one)
    kept = 4 * 256 // 8
    torch.testing.assert_close(capped[:kept], exact[:kept])
    assert not capped[kept:].any()
    assert exact[kept:].any()


# ---- tokenizer and stream ---------------------------------------------------------------------------------------


def test_the_tokenizer_is_llama_4s_in_small(exported: tuple[NanoModel, Path]) -> None:
    loaded = AutoTokenizer.from_pretrained(exported[1])
    text = "The whale swam past — naïvely, at 10 knots.\n\n\n"
    ids = loaded(text).input_ids
    begin = loaded.convert_tokens_to_ids(BEGIN_OF_TEXT)
    assert ids.count(begin) == 1 and ids[0] == begin
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert len(loaded) <= SHAPE.vocab_size
    assert all(len(loaded.encode(token, add_special_tokens=False)) == 1 for token in SPECIAL_TOKENS)
    chat = loaded.apply_chat_template(
        [{"role": "user", "content": " Hello "}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHello<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_conversations_carry_a_passage_on() -> None:
    document = documents(1)[0]
    (chat,) = conversations(document, seed=0)
    said = chat.replace("<|header_start|>user<|header_end|>\n\n", "").removesuffix(EOT)
    user, assistant = said.split(EOT + "<|header_start|>assistant<|header_end|>\n\n")
    assert f"{user} {assistant}" in document.text
    assert conversations(Document("toy", "short", "One sentence."), seed=0) == []


def test_windows_cover_the_stream_evenly(tokenizer: Tokenizer) -> None:
    stream = np.arange(10_000, dtype=np.uint16)
    seen = np.zeros(10_000, dtype=int)
    for first in range(0, 400, 4):
        inputs, targets = training_windows(stream, begin=7, length=100, batch=4, first=first, seed=1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert inputs[:, 0].tolist() == [7] * 4
        for row in targets.tolist():
            assert row == list(range(row[0], row[0] + 100))
            seen[row] += 1
    # 400 windows of 100 are four times the stream.
    assert seen[100:-100].min() >= 3
    assert seen[100:-100].max() <= 6


# ---- evaluation -------------------------------------------------------------------------------------------------


def test_evaluation_scores_every_token_once(exported: tuple[NanoModel, Path], tokenizer: Tokenizer) -> None:
    model, _ = exported
    text = held_out(documents(3), tokenizer)
    assert [n for _, scored, end in windows(50, 20, 7) for n in range(scored, end)] == list(range(1, 50))
    whole = evaluate(model, text, len(text.ids), len(text.ids) - 1)
    with torch.no_grad():
        logits = model(torch.tensor([text.ids]))[0][0]
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text.ids[1:]), reduction="sum")
    assert whole.tokens == len(text.ids) - 1
    assert whole.nats == pytest.approx(float(nats), rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(float(nats) / math.log(2) / len(text.text.encode()), rel=1e-5)
    parts = evaluate(model, text, 40, 13)
    assert parts.tokens == whole.tokens


def test_bigram_probabilities_sum_to_one() -> None:
    stream = np.array([1, 2, 3, 1, 2, 4, 1, 2, 3, 5], dtype=np.uint16)
    bigram = Bigram(stream, 8)
    for first in range(8):
        total = sum(math.exp(-bigram.nats(np.array([first, second]))) for second in range(8))
        assert total == pytest.approx(1.0)
    assert bigram.nats(np.array([1, 2])) < bigram.nats(np.array([1, 3]))


def test_histogram_shows_every_expert() -> None:
    picture = histogram([[0.5, 1.5, 1.0], [0.1, 2.8, 0.1]], [1, 3], "Load")
    assert picture.count('fill="#4c78a8"') == 6
    assert "layer 3: busiest 2.80, idlest 0.10 times the mean" in picture


def test_release_writes_the_folder_that_ships(tmp_path: Path, tokenizer: Tokenizer, stream: np.ndarray) -> None:
    trainer = new_trainer(tmp_path / "run", tokenizer, stream)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    tokenizer.save(str(tmp_path / "run/tokenizer.json"))
    np.save(tmp_path / "run/train.npy", stream)
    (tmp_path / "corpus").mkdir()
    corpus.write(tmp_path / "corpus/heldout.jsonl", documents(3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("mine")

    lines = release(tmp_path / "corpus", tmp_path / "run", tmp_path / "out", dense=tmp_path / "run")

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("model.safetensors", "heldout.txt", "experts.svg"),
    }
    assert (tmp_path / "out/README.md").read_text() == "mine"
    assert ModelConfig.from_folder(tmp_path / "out").dtype == "bfloat16"
    assert "\n".join(lines).count("| 0.0M |") == 3
    with pytest.raises(UserError, match=r"holds no state\.pt"):
        load_run(tmp_path)


# ---- corpus -----------------------------------------------------------------------------------------------------


def test_one_document_in_fifty_is_held_out_in_order() -> None:
    all_of_them = documents(130)
    train_part, held = hold_out(all_of_them)
    assert [document.title for document in held] == ["part 24", "part 74", "part 124"]
    assert train_part == [document for document in all_of_them if document not in held]
    assert hold_out(all_of_them[:24]) == (all_of_them[:24], [])


def test_clean_unwraps_prose_and_keeps_verse() -> None:
    text = "A line that\nwas wrapped.\n\n\n\n  Two lines\n  of _verse_,\n\n“Quoted”—it’s\r\nso\x02."
    assert clean(text) == 'A line that was wrapped.\n\nTwo lines\nof verse,\n\n"Quoted"--it\'s so.'


def test_a_corpus_is_built_from_what_the_packages_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(package: str, downloads: Path, unpacked: Path) -> Path:
        data = unpacked / "package/data"
        data.mkdir(parents=True)
        for number in range(1, 31):
            (data / f"chapter_{number}.txt").write_text(f"CHAPTER {number}.\n\nText of\n{number}.\n")
        file = downloads / "toy.tgz"
        file.write_bytes(b"package")
        return file

    monkeypatch.setattr(corpus, "fetch", fetch)
    corpus.build(tmp_path, (Source("moby-dick", ("npm:toy@1",), "public domain", corpus.read_moby_dick),))
    held, kept = corpus.read(tmp_path / "heldout.jsonl"), corpus.read(tmp_path / "train.jsonl")
    assert held == [Document("moby-dick", "chapter_25", "CHAPTER 25.\n\nText of 25.")]
    assert [document.title for document in kept] == [f"chapter_{n}" for n in range(1, 31) if n != 25]
    (facts,) = json.loads((tmp_path / "sources.json").read_text())
    assert (facts["documents"], facts["heldout_documents"], facts["licence"]) == (30, 1, "public domain")
    assert facts["packages"][0]["sha256"] == "bc4a71180870f7945155fbb02f4b0a2e3faa2a62d6d31b7039013055ed19869a"


def test_sonnets_and_novels_are_read_out_of_their_formats(tmp_path: Path) -> None:
    (tmp_path / "package/lib/data").mkdir(parents=True)
    sonnet = [{"number": 1, "lines": ["From fairest creatures", "we desire increase"]}]
    (tmp_path / "package/lib/data/sonnet-data.js").write_text(f"exports.SonnetData = {json.dumps(sonnet)};")
    assert corpus.read_sonnets(tmp_path) == [
        Document("sonnets", "sonnet 1", "From fairest creatures\nwe desire increase")
    ]

    def integer(value: int) -> bytes:
        return value.to_bytes(4, "big")

    lines = [
        "EMMA",
        "",
        "By Jane Austen",
        "CHAPTER I",
        "",
        "Emma Woodhouse,",
        "handsome.",
        "CHAPTER II",
        "",
        "Mr. Weston.",
    ]
    strings = b"".join(integer(0x40009) + integer(len(line)) + line.encode() for line in lines)
    value = b"X\n" + integer(3) + integer(0) * 2 + integer(5) + b"UTF-8" + integer(16) + integer(len(lines)) + strings
    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    (folder / "Rdata.rdb").write_bytes(integer(len(value)) + zlib.compress(value))
    assert corpus.read_austen(tmp_path) == [
        Document("austen", "EMMA 1", "Emma Woodhouse, handsome."),
        Document("austen", "EMMA 2", "Mr. Weston."),
    ]


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no such file; build the corpus"):
        corpus.read(tmp_path / "train.jsonl")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm is needed to fetch toy@1, and is not installed"):
        corpus.fetch("npm:toy@1", tmp_path / "downloads", tmp_path / "unpacked")
