"""The HTTP API as its own clients see it, against a fake gang."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator

import openai
import pytest

from protos import inference_pb2
from protos.errors import CaravanError, Outcome
from router.detokenizer import Detokenizer
from router.http_shapes import LEAST_LOGPROB, _number, token_name
from tests.unit.router.conftest import until
from tests.unit.router.front import Front, open_front
from tests.unit.router.tiny_checkpoint import EOT, write_checkpoint

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>{{ m.content }}<|eot|>{% endfor %}"
)
# The languages that Llama 4 is tuned for, with combining marks and emoji.
LANGUAGES = {
    "Arabic": "اللُّغَةُ العَرَبِيَّةُ جَمِيلَةٌ 🌙",
    "English": "The naïve café’s façade 🏳️‍🌈 co\u0301operates",
    "French": "Où est l’élève ? Ça va, cœur 🥐 e\u0302tre",
    "German": "Größe, Übermut und a\u0308hnliche Straßen 🥨",
    "Hindi": "नमस्ते दुनिया, क्षत्रिय ज्ञान 🪔",
    "Indonesian": "Selamat pagi, apa kabar? 🌴👩🏽‍🌾",
    "Italian": "Perché così? La città è più bella 🍝",
    "Portuguese": "Não há coração são em João 🇧🇷",
    "Spanish": "¿Qué pasó, señor pingüino? 💃🏻 n\u0303",
    "Tagalog": "Magandáng umaga, kumustá ka? 🌞",
    "Thai": "สวัสดีครับ ผู้ใหญ่น้ำแข็ง 🐘",
    "Vietnamese": "Xin chào, tiếng Việt rất đẹp 🍜 e\u0302\u0301",
}


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    folder = write_checkpoint(tmp_path_factory.mktemp("models") / "chatty", eos_token_id=[1, EOT])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))
    return folder


@pytest.fixture
async def front(config, chat_checkpoint) -> AsyncIterator[Front]:
    config = dataclasses.replace(config, model_dir=chat_checkpoint, model_name="tiny", host="127.0.0.1")
    async with open_front(config) as front:
        yield front


@pytest.fixture
async def client(front: Front) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


async def events(front: Front, path: str = "/v1/completions", **body) -> list[dict]:
    """The events of a stream, apart from the [DONE] it ends with."""
    async with front.http.post(front.url + path, json={"stream": True, **body}) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_models(client) -> None:
    models = (await client.models.list()).data
    assert [model.id for model in models] == ["tiny"]
    assert (await client.models.retrieve("tiny")).max_model_len == 256
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")


async def test_a_completion(front, client, tokenizer) -> None:
    done = await client.completions.create(
        model="tiny", prompt="the sea", max_tokens=4, seed=3, temperature=0, user="t"
    )
    assert (done.object, done.model, done.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    assert done.choices[0].text == "the sea"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 4, 7)
    submit = front.ranks[0].submits[0]
    assert list(submit.prompt_ids) == tokenizer.encode("the sea")
    assert (submit.max_tokens, submit.sampling.seed, submit.sampling.temperature) == (4, 3, 0)


async def test_a_completion_streams(client) -> None:
    stream = await client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens, chunks[-1].usage.prompt_tokens) == ([], 3, 3)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_cached_tokens_are_told(front, client) -> None:
    done = await client.completions.create(model="tiny", prompt="the sea", max_tokens=4)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    front.ranks[0].cached_tokens = 2
    done = await client.completions.create(model="tiny", prompt="the sea", max_tokens=4, n=3)
    assert done.usage.prompt_tokens_details.cached_tokens == 2, "of a prompt that counts once"
    chunks = await events(front, prompt="the sea", max_tokens=4, stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    messages = [{"role": "user", "content": "the sea"}]
    chat = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert chat.usage.prompt_tokens_details.cached_tokens == 2


async def test_defaults_of_the_api(front) -> None:
    status, done = await front.post("/v1/completions", prompt="the sea")
    assert (status, done["usage"]["completion_tokens"]) == (200, 16)
    status, done = await front.post(
        "/v1/completions", prompt="the sea", model=None, stop=None, stream=None, logprobs=None
    )
    assert (status, done["choices"][0]["logprobs"]) == (200, None)
    assert (await events(front, prompt="the sea", max_tokens=2))[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_chat(front, client, tokenizer) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}], "name": "bob"},
    ]
    done = await client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5)
    message = done.choices[0].message
    assert (done.object, message.role, done.choices[0].finish_reason) == ("chat.completion", "assistant", "length")
    text = tokenizer.decode(front.ranks[0].submits[0].prompt_ids, keep_special_tokens=True)
    assert text == (
        "<|begin_of_text|><|header_start|>system<|header_end|>be brief<|eot|>"
        "<|header_start|>user<|header_end|>the sea<|eot|>"
    )
    stream = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None, None]
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


async def test_several_choices(front, client) -> None:
    done = await client.completions.create(model="tiny", prompt=["the sea", "call me"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in done.choices[::2]] == [choice.text for choice in done.choices[1::2]]
    prompts = [len(submit.prompt_ids) for submit in front.ranks[0].submits]
    assert done.usage.prompt_tokens == prompts[0] + prompts[2], "a prompt counts once"
    assert done.usage.completion_tokens == 16
    assert sorted(submit.sibling for submit in front.ranks[0].submits) == [0, 0, 1, 1]
    assert {submit.sampling.seed for submit in front.ranks[0].submits} == {1}
    assert len({submit.request_id for submit in front.ranks[0].submits}) == 4
    texts = dict.fromkeys(range(4), "")
    for event in await events(front, prompt=["the sea", "call me"], n=2, max_tokens=4):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice.text for choice in done.choices]


async def test_stop_and_ignore_eos(front, client, tokenizer) -> None:
    ids = tokenizer.encode("call me what you will")[1:]
    done = await client.completions.create(model="tiny", prompt=ids, max_tokens=99, stop=["whale", "what"])
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("call me ", "stop")
    status, answer = await front.post("/v1/completions", prompt=[*ids, EOT], max_tokens=99, stop="what")
    assert (status, answer["choices"][0]["text"]) == (200, "call me ")
    status, answer = await front.post("/v1/completions", prompt=[*ids, EOT], max_tokens=99)
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("call me what you will", "stop")
    status, answer = await front.post("/v1/completions", prompt=[*ids, EOT], max_tokens=99, ignore_eos=True)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (99, "length")


async def test_logprobs_of_a_completion(front, client, tokenizer) -> None:
    ids = tokenizer.encode("☃ sea")[1:]
    done = await client.completions.create(model="tiny", prompt=ids, max_tokens=len(ids), logprobs=1)
    logprobs = done.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == len(ids)
    assert set(logprobs.token_logprobs) == {-1}
    assert logprobs.tokens[0] == "bytes:\\xe2", "no text by itself"
    assert done.choices[0].text[logprobs.text_offset[-1] :] == logprobs.tokens[-1]
    streamed = await events(front, prompt=ids, max_tokens=len(ids), logprobs=1)
    tokens = [token for event in streamed for token in event["choices"][0]["logprobs"]["tokens"]]
    offsets = [offset for event in streamed for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert (tokens, offsets) == (logprobs.tokens, logprobs.text_offset)


async def test_logprobs_of_a_chat(front, client) -> None:
    messages = [{"role": "user", "content": "the sea"}]
    done = await client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=4, logprobs=True, top_logprobs=1
    )
    entries = done.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["<|begin_of_text|>", "<|header_start|>", "u", "s"]
    assert [bytes(entry.bytes).decode() for entry in entries] == [entry.token for entry in entries]
    assert entries[0].logprob == -1
    status, answer = await front.post("/v1/chat/completions", messages=messages, top_logprobs=1)
    assert (status, answer["error"]["param"]) == (400, "top_logprobs")


async def test_echo(front, client, tokenizer) -> None:
    done = await client.completions.create(model="tiny", prompt="the sea", max_tokens=4, echo=True, logprobs=0)
    logprobs = done.choices[0].logprobs
    assert done.choices[0].text == "the seathe sea"
    assert logprobs.token_logprobs == [None, -2, -2, -1, -1, -1, -1]
    assert logprobs.text_offset == [0, 0, 3, 7, 7, 10, 14]
    assert done.usage.prompt_tokens == 3
    ids = tokenizer.encode("the sea")[1:]
    for prompt in ("the sea", ids):
        done = await client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        assert (done.choices[0].text, done.usage.completion_tokens) == ("the sea", 0)
        assert done.choices[0].logprobs.token_logprobs[0] is None
        assert set(done.choices[0].logprobs.token_logprobs[1:]) == {-2}
    bare = await client.completions.create(model="tiny", prompt=ids, max_tokens=2, echo=True)
    assert bare.choices[0].text == "the seathe sea"
    assert bare.choices[0].logprobs is None
    status, _ = await front.post("/v1/completions", prompt="the sea", max_tokens=0)
    assert status == 400


async def test_extensions_reach_the_rank(front) -> None:
    status, _ = await front.post(
        "/v1/completions", prompt=[5, 6], max_tokens=3, min_tokens=2, top_k=-1, top_p=0.5, min_p=0.1, n=1, best_of=1,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, stop_token_ids=[9], seed=-1,
        logit_bias={}, request_id="mine", user="alice", priority=3, timeout_s=20, metadata={"a": "b"}, store=False,
    )  # fmt: skip
    assert status == 200
    submit = front.ranks[0].submits[0]
    sampling = submit.sampling
    assert (submit.min_tokens, submit.request_id, 9 in submit.stop_token_ids) == (2, "mine", True)
    assert (sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed) == (0, 0.5, 0.1, 2**64 - 1)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.5, 0.5, -0.5)


BAD_COMPLETIONS = [
        ({}, "prompt", "is missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": 5}, "prompt", "must be a string, an array of token ids"),
        ({"prompt": [1, "a"]}, "prompt.1", "integer"),
        ({"prompt": [[1], ["a"]]}, "prompt.1.0", "integer"),
        ({"prompt": [10**6]}, "prompt", "1000000 at position 0 is no token"),
        ({"prompt": [True]}, "prompt.0", "integer"),
        ({"prompt": "a", "top_p": 0}, "top_p", "must be a number of more than 0"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "integer"),
        ({"prompt": "a", "max_tokens": 10**20}, "max_tokens", "less than or equal to"),
        ({"prompt": "a", "max_tokens": 1000}, "max_tokens", "context of 256"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "at most 20"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": ["a"] * 100, "n": 100}, "n", "more than 1024 choices"),
        ({"prompt": "a", "ignore_eoss": True}, "ignore_eoss", "did you mean 'ignore_eos'"),
        ({"prompt": "a", "xyzzy": 1}, "xyzzy", "unknown field; leave it out"),
        ({"prompt": "a", "best_of": 3}, "best_of", "not supported"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"prompt": "a", "stop": 5}, "stop", "must be a string or an array of strings"),
        ({"prompt": "a", "stop": [""]}, "stop", "each has 1 to"),
        ({"prompt": "a", "request_id": "a\nb"}, "request_id", "printable"),
        ({"prompt": "a", "user": "u" * 65}, "user", "at most 64"),
]  # fmt: skip


async def test_bad_input(front) -> None:
    for body, param, says in BAD_COMPLETIONS:
        for stream in (False, True):
            status, answer = await front.post("/v1/completions", stream=stream, **body)
            error = answer["error"]
            assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param), error
            assert says in error["message"]
            assert error["message"].startswith(f"{param}: ")
    status, answer = await front.post("/v1/completions", prompt="a", stream_options={"include_usage": True})
    assert (status, answer["error"]["param"]) == (400, "stream_options")
    assert not front.ranks[0].submits


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
]


async def test_bad_chats(front) -> None:
    for body, param in BAD_CHATS:
        status, answer = await front.post("/v1/chat/completions", **body)
        assert (status, answer["error"]["param"]) == (400, param), answer


BAD_BODIES = [
    (b"", "application/json", 400),
    (b"{", "application/json", 400),
    (b"[]", "application/json", 400),
    (b"null", "application/json", 400),
    (b'{"prompt": "a"}', "text/plain", 400),
    (b'{"prompt": "\\ud800"}', "application/json", 400),
    (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
    (b"\xff\xfe", "application/json", 400),
    (b"1" * 6000, "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b"x" * (5 * 2**20), "application/json", 413),
]


async def test_bodies_that_are_none(front) -> None:
    for data, content_type, status in BAD_BODIES:
        headers = {"content-type": content_type}
        async with front.http.post(f"{front.url}/v1/completions", data=data, headers=headers) as response:
            assert response.status == status
            assert set((await response.json())["error"]) == {"message", "type", "param", "code"}
    assert (await front.post("/v1/completions", prompt="a", max_tokens=1))[0] == 200


async def test_a_long_body_without_a_length(front) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(90):
            yield b"x" * 50_000

    headers = {"content-type": "application/json"}
    async with front.http.post(f"{front.url}/v1/completions", data=pieces(), headers=headers) as response:
        assert response.status == 413


async def test_paths_and_methods(front) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/healthz", 405),
    ):
        async with front.http.request(method, front.url + path) as response:
            assert response.status == status
            assert (await response.json())["error"]["type"] == "invalid_request_error"
    status, answer = await front.post("/v1/completions", prompt="a", model="gpt-9")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")


async def test_a_client_that_goes_away_ends_the_work(front) -> None:
    rank = front.ranks[0]
    rank.step_s = 0.01
    body = {"prompt": "the sea", "max_tokens": 200, "ignore_eos": True}
    response = await front.http.post(f"{front.url}/v1/completions", json={**body, "stream": True})
    await response.content.readline()
    response.close()
    await until(lambda: len(rank.aborts) == 1, seconds=1)
    for stream in (False, True):
        rank.aborts.clear()
        if stream:
            rank.running.clear()  # Before the first token.
        submits = len(rank.submits)
        call = asyncio.create_task(
            front.http.post(f"{front.url}/v1/completions", json={**body, "n": 3, "stream": stream})
        )
        await until(lambda: len(rank.submits) == submits + 3)  # noqa: B023
        call.cancel()
        await until(lambda: len(rank.aborts) == 3, seconds=1)
    await until(lambda: front.metric("caravan_streams_running") == 0)
    assert front.metric("caravan_requests_total", finish_reason="abort", status="CANCELLED") == 7


@pytest.mark.parametrize(
    ("outcome", "retry_after_s", "status", "kind", "header"),
    [
        (Outcome.OVERLOADED, 2.3, 429, "rate_limit_error", ("3", "2300")),
        (Outcome.NOT_READY, None, 503, "service_unavailable_error", ("1", "1000")),
        (Outcome.FAULT, None, 500, "server_error", (None, None)),
    ],
)
async def test_refusals(front, client, monkeypatch, outcome, retry_after_s, status, kind, header) -> None:
    async def refuse(request, call):
        raise CaravanError(outcome, "no", retry_after_s=retry_after_s)
        yield

    monkeypatch.setattr(front.core, "generate", refuse)
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="tiny", prompt="a", stream=stream)
        assert (caught.value.status_code, caught.value.body["type"]) == (status, kind)
        headers = caught.value.response.headers
        assert (headers.get("retry-after"), headers.get("retry-after-ms")) == header


async def test_the_official_client_waits_and_comes_back(front, monkeypatch) -> None:
    attempts = []
    generate = front.core.generate

    async def refuse_once(request, call):
        attempts.append(call.attempt)
        if len(attempts) < 3:
            raise CaravanError(Outcome.OVERLOADED, "full", retry_after_s=0.02)
        async for response in generate(request, call):
            yield response

    monkeypatch.setattr(front.core, "generate", refuse_once)
    async with openai.AsyncOpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=3) as client:
        done = await client.completions.create(model="tiny", prompt="the sea", max_tokens=4)
    assert done.choices[0].text == "the sea"
    assert attempts == [0, 1, 2]


async def test_an_error_mid_stream_is_an_event(front, client, monkeypatch) -> None:
    generate = front.core.generate

    async def fail(request, call):
        async for response in generate(request, call):
            yield response
            raise CaravanError(Outcome.RANK_LOST, "rank 0 died")

    monkeypatch.setattr(front.core, "generate", fail)
    stream = await client.completions.create(model="tiny", prompt="the sea", stream=True)
    with pytest.raises(openai.APIError, match="rank 0 died"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model="tiny", prompt="the sea", n=3)
    assert caught.value.status_code == 503


async def test_a_deadline(front) -> None:
    front.ranks[0].running.clear()
    status, answer = await front.post("/v1/completions", prompt="the sea", timeout_s=0.1)
    assert (status, answer["error"]["type"]) == (504, "timeout_error")


async def test_ready_or_not(front) -> None:
    for path, body in (("/healthz", "ok"), ("/readyz", "ready")):
        async with front.http.get(front.url + path) as response:
            assert (response.status, (await response.json())["status"]) == (200, body)
    front.leader.view.state, front.leader.view.detail = "starting", "loading weights"
    front.leader.tell()
    await until(lambda: not front.core.is_ready)
    async with front.http.get(f"{front.url}/healthz") as response:
        assert response.status == 200
    async with front.http.get(f"{front.url}/readyz") as response:
        assert response.status == 503
        assert "loading weights" in (await response.json())["reason"]
    status, answer = await front.post("/v1/completions", prompt="a")
    assert (status, "loading weights" in answer["error"]["message"]) == (503, True)
    async with front.http.get(f"{front.url}/v1/models") as response:
        assert (await response.json())["data"][0]["id"] == "tiny"


async def test_one_write_a_step(front, tokenizer) -> None:
    front.ranks[0].per_step = 8
    ids = tokenizer.encode("the sea and the whale, call me")
    streamed = await events(front, prompt=ids, max_tokens=16, ignore_eos=True)
    assert len(streamed) <= 3


async def test_languages_stream_to_the_bytes_of_the_whole(front, client, tokenizer) -> None:
    for language, text in LANGUAGES.items():
        ids = tokenizer.encode(text)[1:]
        detokenizer = Detokenizer(tokenizer.token_bytes)
        assert detokenizer.push(ids) + detokenizer.finish() == tokenizer.decode(ids) == text, language
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), max_tokens=len(ids))
        over_grpc = "".join([response.text async for response in front.inference.Generate(request)])
        stream = await client.completions.create(model="tiny", prompt=ids, max_tokens=len(ids), stream=True)
        over_http = "".join([chunk.choices[0].text async for chunk in stream])
        whole = (await client.completions.create(model="tiny", prompt=ids, max_tokens=len(ids))).choices[0].text
        assert over_grpc.encode() == over_http.encode() == whole.encode() == text.encode(), language


def test_names_of_tokens() -> None:
    assert [token_name(b"sea"), token_name(b"\xe2\x98"), token_name(b"")] == ["sea", "bytes:\\xe2\\x98", ""]
    assert [_number(float("-inf")), _number(-0.5)] == [LEAST_LOGPROB, -0.5]
