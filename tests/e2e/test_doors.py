"""Both front doors of a real server: the official OpenAI client, a common load, health, and a router that dies."""

import asyncio
import json
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import grpc
import openai
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.client import Client
from protos.requests import make_request
from tests.e2e.serving import Server

pytestmark = pytest.mark.e2e
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{server.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="caravan.v1.Inference")
        return stub.Check(request, timeout=5).status


def test_completions_of_both_doors_are_the_same(server, client) -> None:
    over_grpc = server.generate(PROMPT, "--max-tokens", "12", "--temperature", "0")
    settings = {"model": "nano", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**settings, logprobs=2)
    assert whole.choices[0].text == over_grpc["text"]
    assert whole.usage.completion_tokens == 12
    logprobs = whole.choices[0].logprobs
    assert all(
        max(top.values()) == chosen for top, chosen in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )
    streamed = client.completions.create(**settings, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == over_grpc["text"]
    echoed = client.completions.create(**settings, echo=True, logprobs=0)
    assert echoed.choices[0].text == PROMPT + over_grpc["text"]
    assert len(echoed.choices[0].logprobs.tokens) == echoed.usage.total_tokens
    several = client.completions.create(model="nano", prompt=PROMPT, max_tokens=12, seed=5, n=3)
    assert len({choice.text for choice in several.choices}) > 1, "siblings draw their own"
    again = client.completions.create(model="nano", prompt=PROMPT, max_tokens=12, seed=5, n=3)
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices]


def test_chats(server, client) -> None:
    settings = {
        "model": "nano",
        "messages": [{"role": "user", "content": "the sea"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.role == "assistant"
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    with pytest.raises(openai.NotFoundError, match="this is 'nano'"):
        client.chat.completions.create(**{**settings, "model": "other"})


def test_health_says_that_it_serves(server) -> None:
    assert health(server.address) == health_pb2.HealthCheckResponse.SERVING
    for path in ("/healthz", "/readyz"):
        with urllib.request.urlopen(f"http://{server.http}{path}", timeout=5) as response:
            assert response.status == 200


async def test_a_common_load(server) -> None:
    """The requests that all servers are measured with, fewer of them."""
    rng = random.Random(1)

    async def stream_one(session: aiohttp.ClientSession) -> int:
        body = {
            "model": "nano",
            "prompt": [rng.randrange(20, 2000) for _ in range(128)],
            "max_tokens": 64,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        completed = chunks = 0
        async with session.post(f"http://{server.http}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    completed = (event.get("usage") or {}).get("completion_tokens", completed)
                    chunks += bool(event["choices"])
        assert 0 < chunks <= 64
        return completed

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(90)) as session:
        assert await asyncio.gather(*(stream_one(session) for _ in range(16))) == [64] * 16


def test_clients_that_leave_free_their_blocks(server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"http://{server.http}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    responses = [urllib.request.urlopen(request, timeout=10) for _ in range(4)]
    for response in responses:
        response.readline()
    for response in responses:
        response.close()
    deadline = time.monotonic() + 5  # Ranks say their load once a second.
    while server.status()["gangs"][0]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def routers(server: Server) -> list[psutil.Process]:
    """Router replicas, by the title Ray gives their processes."""
    found = []
    for process in server.left:
        try:
            if ":Router" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_router_that_dies_is_not_missed(checkpoint: Path, tmp_path: Path) -> None:
    server = Server(
        tmp_path / "server", "--model", str(checkpoint), "--dtype", "float32", "--ranks", "2", "--routers", "2",
        "--model-name", "named",
    )  # fmt: skip
    try:
        server.wait_ready()
        assert len(routers(server)) == 2
        settings = {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True}
        with Client(server.address) as client:
            assert client.get_model().name == "named"
            undisturbed = client.complete(make_request(PROMPT, **settings))
        texts: dict[int, list[int]] = {}
        started = threading.Barrier(21)

        def stream(number: int) -> None:
            request = make_request(PROMPT, **settings, request_id=f"stream-{number}", resumable=True)
            got: list[int] = []
            with Client(server.address) as client:
                for response in client.generate(request, timeout_s=60):
                    if not got:
                        started.wait(30)
                    got.extend(response.token_ids)
            texts[number] = got

        threads = [threading.Thread(target=stream, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        started.wait(60)
        victim = routers(server)[0]
        victim.send_signal(signal.SIGKILL)
        victim.wait(10)
        # The other answers while Serve starts a new one.
        for _ in range(10):
            with urllib.request.urlopen(f"http://{server.http}/readyz", timeout=5) as response:
                assert response.status == 200
        for thread in threads:
            thread.join(90)
        assert sorted(texts) == list(range(20)), "all finish"
        assert all(got == undisturbed.token_ids for got in texts.values())
        deadline = time.monotonic() + 60
        while len(routers(server)) < 2:
            assert time.monotonic() < deadline, "Serve replaces it"
            time.sleep(0.2)
        assert server.end() < 10
        assert server.left == []
    finally:
        server.kill_all()
