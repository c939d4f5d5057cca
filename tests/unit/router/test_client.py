"""The client library against the whole router; its calls block, so they run in threads."""

import asyncio
import socket
import time

import grpc
import pytest

from protos.client import Client, make_request
from protos.errors import CaravanError
from tests.unit.router.conftest import until


async def test_it_talks_to_a_router(house, tokenizer):
    def talk() -> None:
        with Client(house.address) as client:
            assert client.get_model().name == "tiny"
            assert client.get_status().gangs[0].id == "gang-0"
            ids = client.tokenize("the sea")
            assert ids == tokenizer.encode("the sea")
            assert client.detokenize(ids) == "the sea"
            assert client.detokenize(ids, keep_special_tokens=True) == "<|begin_of_text|>the sea"
            done = client.complete(make_request(ids, max_tokens=len(ids), seed=5, logprobs=0, request_id="r"))
            assert (done.text, done.token_ids, done.finish_reason) == ("the sea", ids, "length")
            assert (done.seed, done.request_id, done.usage.completion_tokens) == (5, "r", len(ids))
            assert len(done.logprobs) == len(ids)
            with pytest.raises(CaravanError, match=r"top_p: must be") as caught:
                client.complete(make_request("a", top_p=0))
            assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(CaravanError, match=r"token_ids: the prompt is empty"):
                client.complete(make_request([]))

    await asyncio.to_thread(talk)


async def test_closing_the_iterator_cancels(house):
    house.ranks[0].step_s = 0.01

    def talk() -> None:
        with Client(house.address) as client:
            stream = client.generate(make_request("the sea", max_tokens=200, ignore_eos=True))
            next(stream)
            stream.close()

    await asyncio.to_thread(talk)
    await until(lambda: house.ranks[0].aborts)


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        start = time.monotonic()
        with Client(address) as client, pytest.raises(CaravanError, match=f"no server answers at {address}") as caught:
            client.get_model()
        assert caught.value.code == grpc.StatusCode.UNAVAILABLE
        assert "caravan serve" in caught.value.message
        assert time.monotonic() - start < 3


def test_somebody_listens_and_says_nothing():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with Client(address, connect_timeout_s=0.3) as client:
            with pytest.raises(CaravanError, match=r"did not answer in 0\.3 s"):
                client.complete(make_request("a"))


async def test_somebody_else_listens(house):
    def talk() -> None:
        with Client(house.ranks[0].address) as client, pytest.raises(CaravanError, match="is not Caravan"):
            client.get_status()

    await asyncio.to_thread(talk)


def test_requests_are_checked_as_they_are_made():
    with pytest.raises(ValueError):
        make_request("a", max_tokens=-1)
    request = make_request([1, 2], temperature=0, seed=0)
    assert list(request.token_ids.ids) == [1, 2]
    assert request.HasField("temperature") and request.HasField("seed") and not request.HasField("top_p")
