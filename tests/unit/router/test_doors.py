"""What the doors do beside the calls: health, limits, reflection, ports."""

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import inference_pb2, inference_pb2_grpc
from router.doors import MAX_MESSAGE_BYTES, Doors, bound_socket
from router.errors import RouterConfigError
from tests.unit.router.conftest import until
from tests.unit.router.fakes import FakeLeader
from tests.unit.router.front import Front, open_front

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ("", "caravan.v1.Inference", "caravan.v1.Admin")


@pytest.fixture
def local(config):
    return dataclasses.replace(config, host="127.0.0.1")


@pytest.fixture
async def front(local) -> AsyncIterator[Front]:
    async with open_front(local) as front:
        yield front


async def check(front: Front, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(front.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status


async def test_health_follows_the_gang(front) -> None:
    for service in SERVICES:
        assert await check(front, service) == SERVING
    with pytest.raises(aio.AioRpcError) as caught:
        await check(front, "caravan.v1.Nothing")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    stub = health_pb2_grpc.HealthStub(front.channel)
    watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="caravan.v1.Inference")))
    assert (await anext(watch)).status == SERVING
    await front.ranks[0].die()
    async with asyncio.timeout(1):
        assert (await anext(watch)).status == NOT_SERVING
    for service in SERVICES:
        assert await check(front, service) == NOT_SERVING


async def test_health_before_and_after_the_gang(local, monkeypatch) -> None:
    async with open_front(local, wait=False) as front:
        await until(lambda: front.core.is_ready)
        front.leader.view.state = "starting"
        front.leader.tell()
        async with asyncio.timeout(1):
            while await check(front) != NOT_SERVING:
                await asyncio.sleep(0.02)
        front.leader.view.state = "ready"
        front.leader.tell()
        async with asyncio.timeout(1):
            while await check(front) != SERVING:
                await asyncio.sleep(0.02)
        stub = health_pb2_grpc.HealthStub(front.channel)
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest()))
        assert (await anext(watch)).status == SERVING
        stopping = asyncio.create_task(front.doors.stop(grace_s=0.5))
        assert (await anext(watch)).status == NOT_SERVING, "said before the door closes"
        await stopping


async def test_a_message_too_long_is_refused(front) -> None:
    for factor, code, says in (
        (1, grpc.StatusCode.INVALID_ARGUMENT, "text: the message has 41943.. bytes; at most 4194304"),
        (2.5, grpc.StatusCode.INVALID_ARGUMENT, "text: the message has"),
        (4, grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    ):
        text = "x" * round(factor * MAX_MESSAGE_BYTES)
        for call in (
            front.inference.Tokenize(inference_pb2.TokenizeRequest(text=text)),
            front.inference.Generate(inference_pb2.GenerateRequest(text=text)).read(),
            front.inference.GenerateOnce(inference_pb2.GenerateRequest(text=text)),
        ):
            with pytest.raises(aio.AioRpcError, match=says) as caught:
                await call
            assert caught.value.code() == code
            assert "grpc-status-details-bin" not in dict(caught.value.trailing_metadata()), "no use to come again"
    fits, too_long = (inference_pb2.TokenIds(ids=[5] * (MAX_MESSAGE_BYTES + more)) for more in (-100, 100))
    with pytest.raises(aio.AioRpcError, match="tokens; the context takes 256"):
        await front.inference.GenerateOnce(inference_pb2.GenerateRequest(token_ids=fits))
    with pytest.raises(aio.AioRpcError, match="token_ids: the message has"):
        await front.inference.GenerateOnce(inference_pb2.GenerateRequest(token_ids=too_long))


async def test_bytes_that_are_no_message(front) -> None:
    for method in ("Tokenize", "GetModel", "GenerateOnce", "Cancel"):
        call = front.channel.unary_unary(f"/caravan.v1.Inference/{method}")
        with pytest.raises(aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "cannot be read" in caught.value.details()
    call = front.channel.unary_stream("/caravan.v1.Inference/Generate")(b"\x12\x02\xff\xff")
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(aio.AioRpcError) as caught:
        await front.channel.unary_unary("/caravan.v1.Inference/Fly")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_every_method_answers_through_the_committed_stubs(front, tokenizer) -> None:
    inference = front.inference
    tokens = await inference.Tokenize(inference_pb2.TokenizeRequest(text="the sea"))
    assert list(tokens.token_ids) == tokenizer.encode("the sea")
    text = await inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == "the sea"
    assert (await inference.GetModel(inference_pb2.GetModelRequest())).name == "tiny"
    assert len((await inference.ListModels(inference_pb2.ListModelsRequest())).models) == 1
    once = await inference.GenerateOnce(inference_pb2.GenerateRequest(text="the sea", max_tokens=4))
    assert (once.text, once.usage.completion_tokens) == ("the sea", 4)
    streamed = [r async for r in inference.Generate(inference_pb2.GenerateRequest(text="the sea", max_tokens=4))]
    assert "".join(response.text for response in streamed) == "the sea"
    assert not (await inference.Cancel(inference_pb2.CancelRequest(request_id="nobody"))).found
    assert (await front.admin.GetStatus(inference_pb2.GetStatusRequest())).model == "tiny"


async def test_reflection_is_an_option(local) -> None:
    requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
    for wanted in (False, True):
        async with open_front(dataclasses.replace(local, grpc_reflection=wanted)) as front:
            call = reflection_pb2_grpc.ServerReflectionStub(front.channel).ServerReflectionInfo(iter(requests))
            if wanted:
                names = [s.name for s in (await call.read()).list_services_response.service]
                assert {"caravan.v1.Inference", "caravan.v1.Admin", "grpc.health.v1.Health"} <= set(names)
            else:
                with pytest.raises(aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_replicas_share_their_ports(local, front) -> None:
    shared = dataclasses.replace(local, grpc_port=front.doors.grpc_port, http_port=front.doors.http_port)
    async with open_front(shared) as other:
        assert (other.address, other.url) == (front.address, front.url)

        async def ask() -> None:
            async with aio.insecure_channel(front.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                await stub.GenerateOnce(inference_pb2.GenerateRequest(text="a", max_tokens=1), timeout=5)

        for _ in range(40):
            await ask()
        assert front.ranks[0].submits
        assert other.ranks[0].submits
    # One is gone; whoever comes now finds the other.
    before = len(front.ranks[0].submits)
    for _ in range(10):
        await ask()
    assert len(front.ranks[0].submits) == before + 10
    assert (await front.post("/v1/completions", prompt="a", max_tokens=1))[0] == 200


async def test_a_port_in_use_is_one_sentence(local, front) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("grpc", "http"):
            doors = Doors(front.core, dataclasses.replace(local, **{f"{flag}_port": port}))
            with pytest.raises(RouterConfigError, match=f"^{flag}-port: cannot listen on 127.0.0.1:{port} .*another"):
                await doors.start()
            await doors.stop()
    with pytest.raises(RouterConfigError, match="host"):
        bound_socket("no.such.host.invalid", 0, "grpc-port")


async def test_a_replica_waits_for_the_gang_it_is_started_beside(local, monkeypatch) -> None:
    began = asyncio.get_running_loop().time()
    async with open_front(local, wait=False) as front:
        assert front.core.is_ready, "it listens once it can answer"
    assert asyncio.get_running_loop().time() - began < 2
    original = FakeLeader.start

    async def start_unready(self: FakeLeader) -> FakeLeader:
        self.view.state = "starting"
        return await original(self)

    monkeypatch.setattr(FakeLeader, "start", start_unready)
    began = asyncio.get_running_loop().time()
    async with open_front(local, wait=False) as front:
        assert not front.core.is_ready
        assert await check(front) == NOT_SERVING
        assert asyncio.get_running_loop().time() - began < 1.5, "a gang that loads may take long"


async def test_old_connections_make_room(local) -> None:
    async with open_front(dataclasses.replace(local, max_connection_age_s=0.2)) as front:
        front.ranks[0].step_s = 0.02
        request = inference_pb2.GenerateRequest(text="the sea", max_tokens=40, ignore_eos=True)
        assert sum([len(r.token_ids) async for r in front.inference.Generate(request)]) == 40
