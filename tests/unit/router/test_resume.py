"""Requests that outlive their connection, and ends that come from elsewhere."""

import asyncio
import dataclasses
import random

import grpc
import pytest
from grpc import aio

from protos import inference_pb2
from protos.client import Client, Completion, Retries, add_response, make_request
from protos.errors import CaravanError
from router.call import CallInfo
from tests.unit.router.conftest import until
from tests.unit.router.test_service import TEXT, drain, ids_of

LENGTH = inference_pb2.FINISH_REASON_LENGTH
ABORT = inference_pb2.FINISH_REASON_ABORT
PATIENT = Retries(attempts=10, first_pause_s=0.01)
DIRECT = CallInfo()


class CuttingProxy:
    """Passes TCP on to one of several routers in turn, and cuts connections in the middle of what they say."""

    def __init__(self, addresses: list[str], cuts: int, seed: int) -> None:
        self.addresses, self.cuts_left, self.cuts = addresses, cuts, 0
        self.random = random.Random(seed)
        self.connections = 0
        self.port = 0
        self.tasks: set[asyncio.Task] = set()

    async def start(self) -> "CuttingProxy":
        self.server = await asyncio.start_server(self.take, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.addresses[self.connections % len(self.addresses)].split(":")
        self.connections += 1
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        limit = self.random.randint(250, 800) if self.cuts_left > 0 else None
        self.cuts_left -= 1
        pipes = [
            asyncio.create_task(self.pipe(reader, up_writer, None)),
            asyncio.create_task(self.pipe(up_reader, writer, limit)),
        ]
        self.tasks.update(pipes)
        await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        for pipe in pipes:
            pipe.cancel()
        for side in (writer, up_writer):
            side.transport.abort()

    async def pipe(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: int | None) -> None:
        while data := await source.read(65536):
            if limit is not None:
                data = data[:limit]
                limit -= len(data)
            sink.write(data)
            await sink.drain()
            if limit == 0:
                self.cuts += 1
                return


async def collect(service, request: inference_pb2.GenerateRequest, call: CallInfo = DIRECT) -> Completion:
    completion = Completion()
    async for response in service.generate(request, call):
        add_response(completion, response)
    return completion


@pytest.mark.parametrize("num_routers", [1, 2])
async def test_a_connection_cut_a_hundred_times_loses_nothing(house, tokenizer, num_routers):
    rank = house.ranks[0]
    rank.step_s = 0.004 if num_routers == 1 else 0.002
    addresses = [house.address]
    if num_routers == 2:
        addresses.append((await house.another_router())[1])
    prompt = ids_of(tokenizer, TEXT).ids

    def talk(address: str, number: int, **more) -> Completion:
        request = make_request(
            prompt[: len(prompt) - number], max_tokens=190, seed=number or None, logprobs=0, temperature=1.0,
            stop=["whale und Öl!"], stop_token_ids=[], **more,
        )  # fmt: skip
        with Client(address, retries=PATIENT) as client:
            return client.complete(request)

    undisturbed = await asyncio.gather(*(asyncio.to_thread(talk, house.address, number) for number in range(10)))
    proxies = [await CuttingProxy(addresses, cuts=11, seed=number).start() for number in range(10)]
    resumed = await asyncio.gather(
        *(
            asyncio.to_thread(talk, f"127.0.0.1:{proxy.port}", number, resumable=True, request_id=f"r{number}")
            for number, proxy in enumerate(proxies)
        )
    )
    assert sum(proxy.cuts for proxy in proxies) >= 100
    for one, other in zip(resumed, undisturbed, strict=True):
        assert one.text == other.text and len(one.text) > 100
        assert one.token_ids == other.token_ids
        assert [p.chosen.token_id for p in one.logprobs] == one.token_ids
        assert (one.finish_reason, one.usage) == (other.finish_reason, other.usage)
    assert resumed[5].seed == 5 and resumed[5].request_id == "r5"
    for proxy in proxies:
        await proxy.stop()
    if num_routers == 1:  # Nothing was generated twice.
        assert len(rank.submits) == 20


@pytest.mark.parametrize("stop", [[], ["sea shore", "whale me"]])
async def test_every_offset_gets_exactly_the_rest_here_and_elsewhere(house, tokenizer, stop):
    other, _ = await house.another_router()
    prompt = ids_of(tokenizer, "the sea 👩‍👩‍👧‍👦 e\u0301 世界")
    request = inference_pb2.GenerateRequest(
        token_ids=prompt, max_tokens=40, request_id="r", resumable=True, seed=4, stop=stop, logprobs=0
    )
    pieces, taken = [], 0
    texts = [""]
    async for response in house.service.generate(request):
        pieces.append(response)
        taken += len(response.token_ids)
        texts.append(texts[-1] + response.text)
    assert taken == 40 and len(pieces) == 40
    for offset in range(taken + 1):
        request.resume_offset = offset
        for service in (house.service, other) if offset % 7 == 3 else (house.service,):
            rest = await collect(service, request)
            assert texts[offset] + rest.text == texts[-1]
            assert rest.token_ids == [i for r in pieces for i in r.token_ids][offset:]
            assert len(rest.logprobs) == len(rest.token_ids)
            assert (rest.finish_reason, rest.usage.completion_tokens, rest.seed) == ("length", 40, 4)
    request.resume_offset = 41
    with pytest.raises(CaravanError, match="resume_offset: 41 is more than max_tokens"):
        await collect(other, request)


async def test_a_lost_client_finds_its_answer_finished(house):
    house.ranks[0].step_s = 0.002
    request = inference_pb2.GenerateRequest(
        text="the sea", max_tokens=30, ignore_eos=True, request_id="r", resumable=True
    )
    responses = house.service.generate(request)
    first = await anext(responses)
    await responses.aclose()
    generation = house.service._registry._resumable["", "r", 0]
    await until(lambda: generation.is_over)
    request.seed, request.resume_offset = first.seed, 1
    rest = await collect(house.service, request)
    assert (len(rest.token_ids), rest.finish_reason, rest.seed) == (29, "length", first.seed)
    assert len(house.ranks[0].submits) == 1 and not house.ranks[0].aborts


async def test_nobody_came_back(build, config):
    house = await build(config=dataclasses.replace(config, resume_retention_s=0.05))
    house.ranks[0].step_s = 0.01
    request = inference_pb2.GenerateRequest(
        text="the sea", max_tokens=200, ignore_eos=True, request_id="r", resumable=True
    )
    responses = house.service.generate(request)
    await anext(responses)
    await responses.aclose()
    await until(lambda: house.ranks[0].aborts)
    registry = house.service._registry
    assert not registry._resumable and not registry._alone and not registry._ended and not registry._running
    # An answer that was read to its end goes, too.
    request.max_tokens = 3
    assert (await collect(house.service, request)).finish_reason == "length"
    assert registry._resumable
    await until(lambda: not registry._resumable)
    assert registry._retained_tokens == 0


async def test_what_is_kept_is_bounded(build, config):
    house = await build(config=dataclasses.replace(config, max_retained_tokens=50))
    for number in range(10):
        await collect(
            house.service,
            inference_pb2.GenerateRequest(
                text="the sea", max_tokens=10, ignore_eos=True, request_id=f"r{number}", resumable=True, logprobs=1
            ),
        )
    registry = house.service._registry
    assert [key[1] for key in registry._resumable] == ["r8", "r9"]
    assert registry._retained_tokens == 40 and len(registry._alone) == 2


async def test_a_second_connection_takes_over(house):
    house.ranks[0].step_s = 0.01
    request = inference_pb2.GenerateRequest(
        text="the sea", max_tokens=20, ignore_eos=True, request_id="r", resumable=True, temperature=0
    )
    first = house.service.generate(request)
    await anext(first)
    request.resume_offset = 1
    second = asyncio.create_task(collect(house.service, request))
    with pytest.raises(CaravanError, match="another connection resumed") as caught:
        async for _ in first:
            pass
    assert caught.value.code == grpc.StatusCode.ABORTED
    assert len((await second).token_ids) == 19
    assert len(house.ranks[0].submits) == 1


async def test_a_changed_request_is_refused(house):
    fields = {"text": "the sea", "max_tokens": 5, "request_id": "r", "resumable": True}
    first = await collect(house.service, inference_pb2.GenerateRequest(**fields))
    for changes, sentence in (
        ({"text": "the whale"}, "request_id: 'r' names another resumable request"),
        ({"max_tokens": 6}, "request_id: 'r' names another"),
        ({"seed": first.seed ^ 1}, f"seed: this request draws with {first.seed}"),
    ):
        with pytest.raises(CaravanError, match=sentence) as caught:
            await collect(house.service, inference_pb2.GenerateRequest(**{**fields, **changes}))
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    # Another tenant's is another request; so is one that is not resumable, and another output of the same.
    await collect(house.service, inference_pb2.GenerateRequest(**{**fields, "text": "the whale", "tenant": "t"}))
    await collect(house.service, inference_pb2.GenerateRequest(**{**fields, "text": "the whale", "resumable": False}))
    await collect(house.service, inference_pb2.GenerateRequest(**{**fields, "text": "the whale", "sibling": 1}))


async def test_resuming_elsewhere_needs_the_seed_and_ends_the_work_here(house):
    house.ranks[0].step_s = 0.01
    other, _ = await house.another_router()
    request = inference_pb2.GenerateRequest(
        text="the sea", max_tokens=20, ignore_eos=True, request_id="r", resumable=True, tenant="t"
    )
    first = house.service.generate(request)
    seed = (await anext(first)).seed
    request.resume_offset = 1
    with pytest.raises(CaravanError, match="seed: is missing"):
        await collect(other, request)
    request.seed = seed
    assert len((await collect(other, request)).token_ids) == 19
    with pytest.raises(CaravanError, match="resumed at another router"):
        async for _ in first:
            pass
    assert [(c.tenant, c.request_id, c.sibling) for c in house.ranks[0].cancels] == [("t", "r", 0)]


async def test_a_lost_rank_s_stream_is_generated_again(build):
    house = await build(num_ranks=2)
    for rank in house.ranks:
        rank.step_s = 0.01

    def talk() -> Completion:
        with Client(house.address, retries=PATIENT) as client:
            request = make_request(
                "the sea", max_tokens=60, ignore_eos=True, resumable=True, stop=["the sea shore"], temperature=0.0
            )
            return client.complete(request)

    task = asyncio.create_task(asyncio.to_thread(talk))
    await until(lambda: any(rank.submits for rank in house.ranks))
    await asyncio.sleep(0.2)
    lost = next(rank for rank in house.ranks if rank.submits)
    await lost.die()
    done = await task
    whole = await collect(
        house.service,
        inference_pb2.GenerateRequest(text="the sea", max_tokens=60, ignore_eos=True, stop=["the sea shore"]),
    )
    assert (done.text, done.token_ids, done.finish_reason) == (whole.text, whole.token_ids, "length")
    assert len(house.ranks[1 - lost.rank].submits) == 2


async def test_cancel_ends_running_queued_and_kept_requests(house):
    house.ranks[0].step_s = 0.01
    fields = {"text": "the sea", "max_tokens": 200, "ignore_eos": True, "tenant": "t"}
    plain = asyncio.create_task(collect(house.service, inference_pb2.GenerateRequest(**fields, request_id="a")))
    gone = house.service.generate(inference_pb2.GenerateRequest(**fields, request_id="b", resumable=True))
    await anext(gone)
    await gone.aclose()
    await until(lambda: len(house.ranks[0].submits) == 2)

    async def cancel(request_id: str, tenant: str = "t") -> bool:
        response = await house.inference.Cancel(inference_pb2.CancelRequest(request_id=request_id, tenant=tenant))
        return response.found

    assert not await cancel("a", tenant="")
    assert await cancel("a") and await cancel("b")
    assert not await cancel("a") and not await cancel("b")
    with pytest.raises(CaravanError, match="the request was cancelled") as caught:
        await plain
    assert caught.value.code == grpc.StatusCode.CANCELLED
    await until(lambda: len(house.ranks[0].aborts) == 2)
    for bad in ("", "x" * 257):
        with pytest.raises(aio.AioRpcError, match="request_id: has 1 to 256 characters"):
            await cancel(bad)


async def test_a_cancel_reaches_the_other_router(house):
    house.ranks[0].step_s = 0.01
    other, _ = await house.another_router()
    call = house.inference.Generate(
        inference_pb2.GenerateRequest(text="the sea", max_tokens=200, ignore_eos=True, request_id="a")
    )
    stream = aiter(call)
    await anext(stream)
    response = await other.cancel(inference_pb2.CancelRequest(request_id="a"))
    assert not response.found
    responses, error = await drain(stream)
    assert error is not None and error.code() == grpc.StatusCode.CANCELLED
    assert responses[-1].finish_reason == ABORT
    assert responses[-1].usage.completion_tokens > 0


async def test_closing_the_client_s_iterator_ends_a_resumable_request(house):
    house.ranks[0].step_s = 0.01

    def talk() -> None:
        with Client(house.address) as client:
            stream = client.generate(make_request("the sea", max_tokens=200, ignore_eos=True, resumable=True))
            next(stream)
            stream.close()

    await asyncio.to_thread(talk)
    await until(lambda: house.ranks[0].aborts)
    assert not house.service._registry._resumable


async def test_generate_once(house, tokenizer):
    prompt = ids_of(tokenizer, TEXT)
    whole = await house.inference.GenerateOnce(
        inference_pb2.GenerateRequest(
            token_ids=prompt, max_tokens=len(prompt.ids), logprobs=0, prompt_logprobs=0, request_id="r", seed=3
        )
    )
    assert (whole.text, list(whole.token_ids)) == (TEXT, list(prompt.ids))
    assert len(whole.logprobs) == len(prompt.ids) == len(whole.prompt_logprobs) + 1
    assert (whole.finish_reason, whole.request_id, whole.seed) == (LENGTH, "r", 3)
    assert whole.usage.completion_tokens == whole.usage.prompt_tokens == len(prompt.ids)
    with pytest.raises(aio.AioRpcError, match="top_p") as caught:
        await house.inference.GenerateOnce(inference_pb2.GenerateRequest(text="a", top_p=0))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_no_output_but_the_prompt_s_log_probabilities(house, tokenizer):
    prompt = ids_of(tokenizer, "the sea and the whale")
    responses = await house.generate(token_ids=prompt, max_tokens=0, prompt_logprobs=1)
    assert len(responses) == 1
    assert len(responses[0].prompt_logprobs) == len(prompt.ids) - 1
    assert (responses[0].finish_reason, responses[0].text, list(responses[0].token_ids)) == (LENGTH, "", [])
    assert responses[0].usage.completion_tokens == 0
    # The context may be full of prompt.
    full = inference_pb2.TokenIds(ids=[7] * 256)
    assert (await house.generate(token_ids=full, max_tokens=0, prompt_logprobs=0))[0].finish_reason == LENGTH
    with pytest.raises(aio.AioRpcError, match="must be at least 1, got 0; 0 is for prompt_logprobs alone"):
        await house.generate(token_ids=prompt, max_tokens=0)


async def test_siblings_share_an_id_and_a_seed(house):
    fields = {"text": "the sea", "max_tokens": 3, "seed": 5, "request_id": "r"}
    await asyncio.gather(*(house.generate(**fields, sibling=n) for n in range(4)))
    submits = house.ranks[0].submits
    assert sorted(s.sibling for s in submits) == [0, 1, 2, 3]
    assert {(s.sampling.seed, s.request_id) for s in submits} == {(5, "r")}


async def test_a_client_whose_first_connection_is_dropped_tries_again(house, tokenizer):
    """A router that dies resets the connections it has not taken yet; the next one comes to another router."""
    proxy = await CuttingProxy([house.address], cuts=0, seed=0).start()
    take, drops = proxy.take, 2

    async def drop_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal drops
        drops -= 1
        if drops >= 0:
            writer.transport.abort()
        else:
            await take(reader, writer)

    proxy.take = drop_first
    await proxy.stop()
    await proxy.start()
    prompt = ids_of(tokenizer, TEXT).ids

    def talk(retries: Retries) -> Completion:
        with Client(f"127.0.0.1:{proxy.port}", retries=retries) as client:
            return client.complete(make_request(prompt, max_tokens=5))

    assert len((await asyncio.to_thread(talk, PATIENT)).token_ids) == 5
    assert drops < 0
    drops = 1
    with pytest.raises(CaravanError, match="no server answers at"):
        await asyncio.to_thread(talk, Retries(attempts=1))
    await proxy.stop()


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_another_router_goes_on_after_the_tokens_that_come_with_the_request(house, tokenizer, logprobs):
    rank = house.ranks[0]
    other, _ = await house.another_router()
    request = make_request(
        ids_of(tokenizer, TEXT).ids, max_tokens=40, request_id="r", resumable=True, seed=4, stop=["whale me"],
        logprobs=logprobs,
    )  # fmt: skip
    whole = await collect(house.service, request)
    for offset in (1, 2, 17, 39, 40):
        request.request_id, request.resume_offset = f"r{offset}", offset
        request.resume_token_ids[:] = whole.token_ids[:offset]
        rest = await collect(other, request)
        assert whole.text.endswith(rest.text)
        assert rest.token_ids == whole.token_ids[offset:]
        assert (rest.finish_reason, rest.usage.completion_tokens) == ("length", 40)
        # Not of logprobs: those of the tokens before are not known here.
        assert list(rank.submits[-1].output_ids) == (whole.token_ids[: offset - 1] if logprobs is None else [])


async def test_tokens_to_go_on_after_are_checked(house, tokenizer):
    request = make_request(ids_of(tokenizer, TEXT).ids, max_tokens=40, request_id="r", resumable=True, seed=4)
    request.resume_offset = 3
    for ids, says in (([1, 2], "resume_offset is 3"), ([1, 2, 10**9], "is no token")):
        request.resume_token_ids[:] = ids
        with pytest.raises(CaravanError, match=says) as caught:
            await collect(house.service, request)
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "resume_token_ids" in caught.value.message
