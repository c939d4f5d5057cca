"""Text in and out: tokenizer, detokenizer, stop strings."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, processors

from router.detokenizer import Detokenizer, byte_alphabet
from router.errors import RouterConfigError
from router.output_text import OutputText
from router.stop import StopMatcher, StopStrings
from router.tokenizer import Tokenizer
from tests.unit.router.tiny_checkpoint import BEGIN, EOT, build_tokenizer

SCRIPTS = (
    "Hello, wörld! Привет, мир. こんにちは世界。你好！안녕하세요 नमस्ते दुनिया สวัสดีชาวโลก مرحبا بالعالم שלום "
    "Xin chào thế giới e\u0301a\u0308o\u0302 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \u200d\ufeff\r\n\t"
)


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int] = []) -> list[str]:  # noqa: B006
    detokenizer = Detokenizer(tokenizer.token_bytes)
    edges = sorted({0, len(ids), *(c % (len(ids) + 1) for c in cuts)})
    pieces = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, detokenizer.finish()]


def test_byte_alphabet_is_the_librarys():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_every_script_streams_whole_characters(tokenizer):
    ids = tokenizer.encode(SCRIPTS)
    detokenizer = Detokenizer(tokenizer.token_bytes)
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) == SCRIPTS
    assert detokenizer.finish() == ""
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=400)
@given(data=st.data())
def test_pieces_are_the_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    cuts = data.draw(st.lists(st.integers(0, 99), max_size=6))
    assert "".join(stream(tokenizer, ids, cuts)) == tokenizer.decode(ids)


# Bytes that begin, continue, overrun, or never occur in UTF-8.
EDGE_BYTES = [0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]  # fmt: skip  # noqa: E501


@settings(max_examples=1000)
@given(raw=st.lists(st.sampled_from(EDGE_BYTES), max_size=9), special_at=st.integers(0, 9), tool_at=st.integers(0, 30))
def test_broken_utf8_is_replaced_as_the_library_does(tokenizer, raw, special_at, tool_at):
    char_of = {byte: char for char, byte in byte_alphabet().items()}
    vocab = build.get_vocab()
    ids = [vocab[char_of[byte]] for byte in raw]
    ids.insert(special_at, EOT)
    ids.insert(tool_at, vocab["<tool>"])
    detokenizer = Detokenizer(tokenizer.token_bytes)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == tokenizer.decode(ids)


build = build_tokenizer()


@settings(max_examples=200)
@given(text=st.text(max_size=40))
def test_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids, list(range(0, 50, 2)))) == tokenizer.decode(ids)
    assert ids[0] == BEGIN and BEGIN not in ids[1:2]


def test_begin_of_text_is_never_there_twice(tokenizer):
    plain = tokenizer.encode("the sea")
    assert plain[0] == BEGIN and plain.count(BEGIN) == 1
    assert tokenizer.encode("<|begin_of_text|>the sea") == plain
    assert tokenizer.encode("<|begin_of_text|>") == [BEGIN]
    assert tokenizer.encode("a<|begin_of_text|>b").count(BEGIN) == 2


def test_a_tokenizer_that_adds_nothing_is_left_as_it_is():
    fast = build_tokenizer()
    fast.post_processor = processors.ByteLevel()
    assert BEGIN not in Tokenizer(fast).encode("the sea")
    assert Tokenizer(fast).encode("<|begin_of_text|><|begin_of_text|>a")[:2] == [BEGIN, BEGIN]


def test_special_tokens_are_kept_on_request(tokenizer):
    ids = tokenizer.encode("the sea<|eot|>")
    assert tokenizer.decode(ids) == "the sea"
    assert tokenizer.decode(ids, keep_special_tokens=True) == "<|begin_of_text|>the sea<|eot|>"


def test_tokenizer_files_that_cannot_serve(tmp_path):
    with pytest.raises(RouterConfigError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path, 1000)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RouterConfigError, match="cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path, 1000)
    build.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RouterConfigError, match="vocab_size is 10"):
        Tokenizer.from_folder(tmp_path, 10)
    other = FastTokenizer(models.WordPiece({"a": 0, "[UNK]": 1}))
    other.decoder = decoders.WordPiece()
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RouterConfigError, match="not ByteLevel"):
        Tokenizer.from_folder(tmp_path, 1000)


def brute_force(pieces: list[str], stops: list[str], min_pieces: int) -> str:
    """Character by character: the first complete stop string ends the text, the longest of those that end together."""
    shown = ""
    for count, piece in enumerate(pieces, start=1):
        for char in piece:
            shown += char
            ends = [s for s in stops if shown.endswith(s)]
            if ends and count >= min_pieces:
                return shown[: len(shown) - max(map(len, ends))]
    return shown


@settings(max_examples=1500)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
    min_pieces=st.integers(0, 8),
)
def test_stop_strings_against_brute_force(pieces, stops, min_pieces):
    matcher = StopMatcher(StopStrings(stops))
    expected = brute_force(pieces, stops, min_pieces)
    shown, text = "", ""
    for count, piece in enumerate(pieces, start=1):
        text += piece
        shown += matcher.push(piece, count >= min_pieces)
        assert expected.startswith(shown)
        if matcher.stopped:
            break
        # Nothing waits that cannot become a stop string any more.
        waiting = text[len(shown) :]
        assert not waiting or any(s.startswith(waiting) and s != waiting for s in stops)
    else:
        shown += matcher.finish()
    assert shown == expected


@given(cuts=st.sets(st.integers(1, 40)), stops=st.lists(st.sampled_from(["sea", "and", "whale; ", "👍"]), min_size=1))
def test_cut_is_the_same_however_the_text_arrives(cuts, stops):
    text = "The whale 👍 and the sea, the whale; call me"
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    matcher = StopMatcher(StopStrings(stops))
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece, True)
        if matcher.stopped:
            break
    assert shown == text[: min(text.find(s) for s in stops if s in text)]


def test_long_outputs_cost_no_more_a_token(tokenizer):
    text = OutputText(tokenizer.token_bytes, ["x" * 256, "ab" * 100], 0)
    ids = tokenizer.encode("ababab" * 5000)[1:]
    assert text.push(ids)[1] < len(ids)
    assert text.is_stopped()


def test_min_tokens_counts_the_token_that_completes(tokenizer):
    ids = tokenizer.encode("sea sea sea")[1:]
    where = [i for i in range(1, len(ids) + 1) if tokenizer.decode(ids[:i]).endswith("sea")]
    for min_tokens, cut in ((0, 0), (where[0], 0), (where[0] + 1, 1), (where[1], 1), (where[2], 2)):
        text = OutputText(tokenizer.token_bytes, ["sea"], min_tokens)
        shown, taken = text.push(ids)
        assert (shown, taken) == (" ".join(["sea"] * cut) + (" " if cut else ""), where[cut])
    text = OutputText(tokenizer.token_bytes, ["sea"], len(ids) + 1)
    assert text.push(ids)[0] + text.finish() == "sea sea sea"


def test_a_stop_string_may_complete_in_the_last_flush(tokenizer):
    half = tokenizer.encode("☃")[1:2]
    text = OutputText(tokenizer.token_bytes, ["\ufffd"], 0)
    assert text.push(half) == ("", 1) and not text.is_stopped()
    assert text.finish() == "" and text.is_stopped()
