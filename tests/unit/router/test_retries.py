"""The client's patience, alone and against a router that refuses, breaks and comes back."""

import asyncio
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from protos import gang_pb2, inference_pb2, inference_pb2_grpc
from protos.client import NO_RETRIES, Client, Retries, make_request
from protos.errors import CaravanError
from protos.retries import Patience
from protos.status_details import trailing_metadata
from tests.unit.router.conftest import until
from tests.unit.router.test_deadlines import small

UNAVAILABLE = CaravanError(grpc.StatusCode.UNAVAILABLE, "x")


def refusal(delay: float) -> CaravanError:
    return CaravanError(grpc.StatusCode.RESOURCE_EXHAUSTED, "x", delay)


def test_pauses_grow_and_end():
    waits: list[float] = []
    patience = Patience(Retries(attempts=6, first_pause_s=1, longest_pause_s=5), None, waits.append)
    assert [patience.wait(UNAVAILABLE) for _ in range(6)] == [True] * 5 + [False]
    for wait, bound in zip(waits, (1, 2, 4, 5, 5), strict=True):
        assert bound / 2 <= wait <= bound
    patience.progress()
    assert patience.wait(UNAVAILABLE) and waits[-1] <= 1


def test_a_delay_is_obeyed_within_bounds():
    waits: list[float] = []
    patience = Patience(Retries(longest_wait_s=10), None, waits.append)
    assert patience.wait(refusal(4)) and 4 <= waits[0] <= 4.4
    assert patience.wait(refusal(4)) and not patience.wait(refusal(4))
    assert not Patience(Retries(), 3, waits.append).wait(refusal(4))
    assert len(waits) == 2


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "INTERNAL"])
def test_what_waiting_does_not_mend(code):
    assert not Patience(Retries(), None).wait(CaravanError(grpc.StatusCode[code], "x"))
    assert not Patience(NO_RETRIES, None).wait(UNAVAILABLE)
    assert not Patience(Retries(), None).wait(CaravanError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large"))


class Moody(inference_pb2_grpc.InferenceServicer, inference_pb2_grpc.AdminServicer):
    """Fails as told, then answers."""

    def __init__(self, *failures) -> None:
        self.failures = list(failures)
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.attempts: list[str] = []

    async def GetStatus(self, request, context):
        return inference_pb2.Status()

    async def GenerateOnce(self, request, context):
        return [response async for response in self.Generate(request, context)][-1]

    async def Generate(self, request, context):
        self.requests.append(request)
        self.attempts.append(dict(context.invocation_metadata()).get("caravan-attempt", "0"))
        offset = request.resume_offset
        if self.failures:
            error, tokens, says_so = self.failures.pop(0)
            for i in range(offset, offset + tokens):
                yield inference_pb2.GenerateResponse(token_ids=[i], text=f"{i} ", request_id=request.request_id, seed=9)
            if says_so:
                yield inference_pb2.GenerateResponse(
                    finish_reason=inference_pb2.FINISH_REASON_ERROR, detail="x", token_ids=[offset + tokens],
                    text=f"{offset + tokens} ",
                )  # fmt: skip
            await context.abort(error.code, error.message, trailing_metadata(error))
        for i in range(offset, 6):
            yield inference_pb2.GenerateResponse(token_ids=[i], text=f"{i} ", seed=9, request_id=request.request_id)
        yield inference_pb2.GenerateResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH)


@pytest.fixture
async def moody():
    servers = []

    async def start(*failures) -> tuple[Moody, str]:
        servicer, server = Moody(*failures), grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
        inference_pb2_grpc.add_AdminServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return servicer, f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(0)


QUICK = Retries(attempts=4, first_pause_s=0.01)


async def complete(address: str, retries: Retries = QUICK, **fields):
    def talk():
        with Client(address, retries=retries) as client:
            return client.complete(make_request("a", **fields))

    return await asyncio.to_thread(talk)


async def test_before_the_first_token_it_is_sent_again(moody):
    servicer, address = await moody((UNAVAILABLE, 0, False), (refusal(0.05), 0, False))
    done = await complete(address)
    assert done.text == "0 1 2 3 4 5 " and done.finish_reason == "length"
    assert servicer.attempts == ["0", "1", "2"]
    # It is known again by its id, and was not told a seed.
    assert len({request.request_id for request in servicer.requests}) == 1 and servicer.requests[0].request_id
    assert not any(request.HasField("seed") or request.resumable for request in servicer.requests)


@pytest.mark.parametrize("says_so", [False, True])
async def test_after_the_first_token_only_what_is_resumable_goes_on(moody, says_so):
    servicer, address = await moody((UNAVAILABLE, 2, says_so))
    with pytest.raises(CaravanError) as caught:
        await complete(address)
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE and len(servicer.requests) == 1
    servicer, address = await moody((UNAVAILABLE, 2, says_so), (UNAVAILABLE, 0, False), (UNAVAILABLE, 1, says_so))
    done = await complete(address, resumable=True)
    assert done.text == "0 1 2 3 4 5 " and done.token_ids == [0, 1, 2, 3, 4, 5] and done.finish_reason == "length"
    extra = int(says_so)
    assert [r.resume_offset for r in servicer.requests] == [0, 2 + extra, 2 + extra, 3 + 2 * extra]
    assert [r.seed for r in servicer.requests] == [0, 9, 9, 9]
    if not says_so:
        assert servicer.attempts == ["0", "1", "2", "1"]  # A token is progress.


async def test_a_failure_in_the_last_message_alone_is_not_shown_when_it_is_mended(moody):
    servicer, address = await moody((UNAVAILABLE, 0, True))
    with pytest.raises(CaravanError):  # It brought a token.
        await complete(address)
    assert len(servicer.requests) == 1


async def test_patience_ends(moody):
    servicer, address = await moody(*[(UNAVAILABLE, 0, False)] * 9)
    with pytest.raises(CaravanError):
        await complete(address)
    assert len(servicer.requests) == 4
    with pytest.raises(CaravanError):
        await complete(address, NO_RETRIES)
    assert len(servicer.requests) == 5


async def test_generate_once_is_sent_again(moody):
    servicer, address = await moody((refusal(0.02), 0, False))

    def talk():
        with Client(address, retries=QUICK) as client:
            return client.generate_once(make_request("a"))

    assert (await asyncio.to_thread(talk)).finish_reason == "length"
    assert servicer.attempts == ["0", "1"]


async def test_a_refused_client_obeys_and_is_served(build, config):
    house = await build(config=dataclasses.replace(config, max_queued_tokens=500))
    rank = house.ranks[0]
    small(house, max_num_seqs=1)
    rank.running.clear()
    request = make_request("the sea", max_tokens=50, ignore_eos=True)

    def talk() -> str:
        with Client(house.address, retries=Retries(attempts=20, longest_wait_s=20)) as client:
            return client.complete(request).finish_reason

    # Many clients at once: threads of their own, so that all of them wait.
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(16) as pool:
        tasks = [loop.run_in_executor(pool, talk) for _ in range(16)]
        await until(
            lambda: house.registry.get_sample_value(
                "caravan_requests_total", {"finish_reason": "error", "status": "RESOURCE_EXHAUSTED"}
            )
        )
        rank.running.set()
        assert await asyncio.gather(*tasks) == ["length"] * 16
    assert len(rank.submits) == 16


async def test_the_new_calls(house):
    def talk() -> None:
        with Client(house.address) as client:
            (model,) = client.list_models()
            assert model == client.get_model() and model.name == "tiny"
            assert not client.cancel("nobody")
            done = client.generate_once(make_request("the sea", max_tokens=3, seed=1))
            assert (len(done.token_ids), done.seed, done.finish_reason) == (3, 1, "length")
            with pytest.raises(CaravanError, match="chat: the checkpoint has no chat template"):
                client.generate_once(make_request([{"role": "user", "content": "hi"}]))

    await asyncio.to_thread(talk)


async def test_a_resumable_request_ends_with_its_client_s_time(house):
    house.ranks[0].step_s = 0.01

    def talk() -> None:
        with Client(house.address) as client:
            client.complete(make_request("the sea", max_tokens=200, ignore_eos=True, resumable=True), timeout_s=0.3)

    start = time.monotonic()
    with pytest.raises(CaravanError) as caught:
        await asyncio.to_thread(talk)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - start < 1
    await until(lambda: house.ranks[0].aborts)


def test_requests():
    request = make_request([{"role": "user", "content": "hi"}], tenant="t", priority=2, timeout_s=3, sibling=1)
    assert request.chat.messages[0].content == "hi" and request.priority == 2
    assert (request.tenant, request.timeout_s, request.sibling) == ("t", 3, 1)
    assert make_request([]).WhichOneof("prompt") == "token_ids"
    with pytest.raises(ValueError):
        make_request([{"role": "user", "text": "hi"}])
    assert gang_pb2.Submit().tenant == ""
