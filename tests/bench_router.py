"""How many messages a router carries, and what it adds to the first token, with an engine that costs nothing.

The router has one core, client and engine the other; beside it, in the same run, a bare grpc.aio server that makes the
same messages out of nothing. Run by `make bench-router`, on a machine that does nothing else.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

from grpc import aio
from prometheus_client import CollectorRegistry

from protos import gang_pb2, gang_pb2_grpc, inference_pb2, inference_pb2_grpc
from router.config import RouterConfig
from router.doors import Doors
from router.metrics import RouterMetrics
from router.service import RouterService
from tests.unit.router.fakes import FakeLeader
from tests.unit.router.tiny_checkpoint import EOT, write_checkpoint

STREAMS = 64
WINDOW_STEPS = 2
PROMPT = [5, 6, 7, 8]


class Engine(gang_pb2_grpc.RankServicer):
    """A rank that steps as soon as its clients have read almost all it made: one token a stream a step.

    Attributes:
        received: messages the clients got; they count it up.
        pace_s: seconds between two steps.
        waited: seconds from each sequence's arrival to its first token.
    """

    def __init__(self) -> None:
        self.rank, self.incarnation, self.address = 0, 1, ""
        self.received = 0
        self.sent = 0
        self.pace_s = 0.0
        self.waited: list[float] = []
        self._left: dict[int, int] = {}
        self._arrived: dict[int, float] = {}
        self._work = asyncio.Event()
        self._outbox: asyncio.Queue[gang_pb2.StepOutput] = asyncio.Queue()
        self._server: aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._server = aio.server()
        gang_pb2_grpc.add_RankServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._step()))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        assert self._server is not None
        await self._server.stop(0)

    async def Connect(self, request_iterator, context):
        self._tasks.append(asyncio.create_task(self._read(request_iterator)))
        await context.send_initial_metadata(())
        while True:
            yield await self._outbox.get()

    async def _read(self, messages) -> None:
        async for message in messages:
            kind = message.WhichOneof("message")
            if kind == "submit":
                self._left[message.submit.sequence_id] = message.submit.max_tokens
                self._arrived[message.submit.sequence_id] = time.perf_counter()
                self._work.set()
            elif kind == "abort":
                self._left.pop(message.abort.sequence_id, None)

    async def _step(self) -> None:
        while True:
            await self._work.wait()
            while self._left and self.sent - self.received > WINDOW_STEPS * len(self._left):
                await asyncio.sleep(0)
            output = gang_pb2.StepOutput(gang_id="gang-0", epoch=1, rank=0, incarnation=1)
            for sequence_id, left in list(self._left.items()):
                finish_reason = inference_pb2.FINISH_REASON_LENGTH if left == 1 else 0
                if (arrived := self._arrived.pop(sequence_id, None)) is not None:
                    self.waited.append(time.perf_counter() - arrived)
                output.outputs.add(sequence_id=sequence_id, token_ids=[5 + left % 200], finish_reason=finish_reason)
                if left == 1:
                    del self._left[sequence_id]
                else:
                    self._left[sequence_id] = left - 1
            self.sent += len(output.outputs)
            self._outbox.put_nowait(output)
            if not self._left:
                self._work.clear()
            await asyncio.sleep(self.pace_s)


class Bare(inference_pb2_grpc.InferenceServicer):
    """What gRPC in Python can do at most."""

    async def Generate(self, request, context):
        for number in range(request.max_tokens):
            yield inference_pb2.GenerateResponse(text="token", token_ids=[5 + number % 200])


async def _run_bare(pipe: Connection) -> None:
    server = aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Bare(), server)
    pipe.send((server.add_insecure_port("127.0.0.1:0"), 0))
    await server.start()
    await asyncio.to_thread(pipe.recv)
    await server.stop(0)


async def _run_router(pipe: Connection, checkpoint: Path, leader: str) -> None:
    async def resolve() -> str:
        return leader

    config = RouterConfig(model_dir=checkpoint, host="127.0.0.1", max_queued_tokens=10**9)
    core = RouterService(config, [resolve], RouterMetrics(CollectorRegistry()))
    doors = Doors(core, config)
    await doors.start()
    while not core.is_ready:
        await asyncio.sleep(0.01)
    pipe.send((doors.grpc_port, doors.http_port))
    await asyncio.to_thread(pipe.recv)
    await core.close()
    await doors.stop()


def _server_process(pipe: Connection, work: str, *arguments: object) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    _run_in_loop({"bare": _run_bare, "router": _run_router}[work](pipe, *arguments))  # type: ignore[operator]


def _run_in_loop(work: Awaitable[None]) -> None:
    import uvloop  # As Serve's replicas do.

    uvloop.run(work)


class Measured:
    """One server, in its own process on the first core."""

    def __init__(self, work: str, *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_server_process, args=(theirs, work, *arguments), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    async def ports(self) -> tuple[int, int]:
        return await asyncio.to_thread(self._pipe.recv)

    async def stop(self) -> None:
        self._pipe.send(None)
        await asyncio.to_thread(self._process.join, 5)
        self._process.kill()


def _request(tokens: int) -> inference_pb2.GenerateRequest:
    prompt = inference_pb2.TokenIds(ids=PROMPT)
    return inference_pb2.GenerateRequest(token_ids=prompt, max_tokens=tokens, ignore_eos=True, temperature=0)


async def _rate(streams: list[Callable[[], Awaitable[int]]]) -> float:
    started = time.perf_counter()
    messages = sum(await asyncio.gather(*(stream() for stream in streams)))
    return messages / (time.perf_counter() - started)


def _grpc_stream(stub, tokens: int, engine: Engine | None) -> Callable[[], Awaitable[int]]:
    async def stream() -> int:
        messages = 0
        async for response in stub.Generate(_request(tokens)):
            messages += 1
            if engine is not None:
                engine.received += len(response.token_ids)
        return messages

    return stream


def _http_stream(port: int, tokens: int, engine: Engine) -> Callable[[], Awaitable[int]]:
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}).encode()
    lines = (
        "POST /v1/completions HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body)}",
    )
    head = "".join(f"{line}\r\n" for line in (*lines, ""))

    async def stream() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        messages = 0
        while True:
            line = await reader.readline()
            if line.startswith(b"data: {"):
                messages += 1
                engine.received += 1
            elif not line or line.startswith(b"data: ["):
                writer.close()
                return messages

    return stream


async def _first_token(stub, times: int, engine: Engine | None = None) -> float:
    """Median milliseconds from a call to its first message, without the time the engine took for it."""
    taken = []
    for number in range(times):
        if engine is not None:
            engine.waited.clear()
            await asyncio.sleep(engine.pace_s * (number % 7) / 7)
        started = time.perf_counter()
        call = stub.Generate(_request(1))
        async for _response in call:
            engine_s = engine.waited[-1] if engine is not None else 0.0
            taken.append((time.perf_counter() - started - engine_s) * 1e3)
        await call.code()
    return statistics.median(taken)


async def main(tokens: int, only_router_s: float) -> None:
    cores = sorted(os.sched_getaffinity(0))
    folder = tempfile.TemporaryDirectory()
    checkpoint = write_checkpoint(Path(folder.name) / "tiny", eos_token_id=[1, EOT])
    engine = Engine()
    await engine.start()
    leader = FakeLeader([engine])  # type: ignore[list-item]
    leader.view.max_model_len = 2**20
    await leader.start()
    router = Measured("router", checkpoint, leader.address)
    bare = Measured("bare")
    os.sched_setaffinity(0, {cores[-1]})
    (grpc_port, http_port), (bare_port, _) = await router.ports(), await bare.ports()
    channels = [aio.insecure_channel(f"127.0.0.1:{port}") for port in (grpc_port, bare_port)]
    router_stub, bare_stub = map(inference_pb2_grpc.InferenceStub, channels)
    if only_router_s:
        print(f"router is process {router.pid}", flush=True)
        end = time.monotonic() + only_router_s
        while time.monotonic() < end:
            print(f"{await _rate([_grpc_stream(router_stub, tokens, engine)] * STREAMS):.0f}", flush=True)
    ratios = []
    for number in range(4):  # The first warms up.
        engine.sent = engine.received = 0
        bare_rate = await _rate([_grpc_stream(bare_stub, tokens, None)] * STREAMS)
        grpc_rate = await _rate([_grpc_stream(router_stub, tokens, engine)] * STREAMS)
        engine.sent = engine.received = 0
        http_rate = await _rate([_http_stream(http_port, tokens, engine)] * STREAMS)
        if number:
            ratios.append(grpc_rate / bare_rate)
            print(f"messages/s at {STREAMS} streams: bare grpc.aio {bare_rate:.0f}, router {grpc_rate:.0f} "
                  f"({grpc_rate / bare_rate:.2f}), HTTP {http_rate:.0f}", flush=True)  # fmt: skip
    engine.received = 10**9  # Never waits from here on.
    idle_bare, idle = await _first_token(bare_stub, 300), await _first_token(router_stub, 300, engine)
    print(f"first token, idle: bare {idle_bare:.2f} ms, router {idle:.2f} ms, added {idle - idle_bare:.2f} ms")
    # The others go on, at 50 steps a second.
    engine.pace_s = 0.02
    others = [asyncio.ensure_future(_grpc_stream(router_stub, 1000, engine)()) for _ in range(STREAMS - 1)]
    await asyncio.sleep(0.5)
    loaded = await _first_token(router_stub, 200, engine)
    print(f"first token among {STREAMS - 1} streams at 50 steps/s: router {loaded:.2f} ms")
    for other in others:
        other.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for channel in channels:
        await channel.close()
    await asyncio.gather(router.stop(), bare.stop())
    await engine.stop()
    await leader.stop()
    folder.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=300, help="messages a stream")
    parser.add_argument("--profile", type=float, default=0, metavar="SECONDS", help="first load only the router")
    parsed = parser.parse_args()
    asyncio.run(main(parsed.tokens, parsed.profile))
