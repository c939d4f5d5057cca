"""A leader and ranks that answer as real ones do, on loopback, without a model."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
from grpc import aio

from protos import gang_pb2, gang_pb2_grpc, inference_pb2


class FakeRank(gang_pb2_grpc.RankServicer):
    """Answers a prompt with its own tokens, over and over, `per_step` a step, until max_tokens or a stop token.

    Cleared, `running` keeps it from stepping; `refuses`: it takes no connection.
    """

    def __init__(self, rank: int = 0, incarnation: int = 1, gang_id: str = "gang-0") -> None:
        self.rank, self.incarnation, self.gang_id, self.epoch = rank, incarnation, gang_id, 1
        self.per_step = 1
        self.step_s = 0.0
        self.refuses = False
        self.running = asyncio.Event()
        self.running.set()
        self.hellos: list[gang_pb2.Hello] = []
        self.submits: list[gang_pb2.Submit] = []
        self.aborts: list[int] = []
        self.cancels: list[gang_pb2.Cancel] = []
        self.cached_tokens = 0
        self.load: gang_pb2.RankLoad | None = None
        self.work: list[tuple[asyncio.Queue, dict[int, tuple[gang_pb2.Submit, asyncio.Task[None]]]]] = []
        self.outboxes: list[asyncio.Queue[gang_pb2.StepOutput]] = []
        self.server: aio.Server | None = None
        self.address = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> "FakeRank":
        self.server = aio.server(options=[("grpc.max_receive_message_length", -1)])
        gang_pb2_grpc.add_RankServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        return self

    async def die(self) -> None:
        for task in self._tasks:
            task.cancel()
        assert self.server is not None
        await self.server.stop(0)

    def output(self, *outputs: gang_pb2.SequenceOutput, epoch: int = 0, incarnation: int = 0) -> gang_pb2.StepOutput:
        return gang_pb2.StepOutput(
            gang_id=self.gang_id,
            epoch=epoch or self.epoch,
            rank=self.rank,
            incarnation=incarnation or self.incarnation,
            outputs=outputs,
            load=self.load,
        )

    def send(self, message: gang_pb2.StepOutput) -> None:
        self.outboxes[-1].put_nowait(message)

    async def Connect(self, request_iterator, context):
        if self.refuses:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "router is connected")
        outbox: asyncio.Queue[gang_pb2.StepOutput] = asyncio.Queue()
        self.outboxes.append(outbox)
        reader = asyncio.create_task(self._read(request_iterator, outbox))
        self._tasks.add(reader)
        try:
            await context.send_initial_metadata(())
            while True:
                yield await outbox.get()
        finally:
            reader.cancel()

    async def _read(self, messages: AsyncIterator[gang_pb2.RouterMessage], outbox: asyncio.Queue) -> None:
        work: dict[int, tuple[gang_pb2.Submit, asyncio.Task[None]]] = {}
        self.work.append((outbox, work))
        async for message in messages:
            kind = message.WhichOneof("message")
            if kind == "hello":
                self.hellos.append(message.hello)
            elif kind == "submit":
                self.submits.append(message.submit)
                task = asyncio.create_task(self._generate(message.submit, outbox))
                work[message.submit.sequence_id] = (message.submit, task)
                self._tasks.add(task)
            elif kind == "abort":
                self.aborts.append(message.abort.sequence_id)
                work[message.abort.sequence_id][1].cancel()
            else:
                self.cancels.append(message.cancel)
                self._cancel(message.cancel, outbox)

    def _cancel(self, cancel: gang_pb2.Cancel, asker: asyncio.Queue) -> None:
        for outbox, work in self.work:
            for submit, task in work.values():
                same = (submit.tenant, submit.request_id) == (cancel.tenant, cancel.request_id)
                if cancel.HasField("sibling") and cancel.sibling != submit.sibling:
                    same = False
                if same and outbox is not asker and not task.done():
                    task.cancel()
                    reason = inference_pb2.FINISH_REASON_ABORT
                    outbox.put_nowait(
                        self.output(gang_pb2.SequenceOutput(sequence_id=submit.sequence_id, finish_reason=reason))
                    )

    async def _generate(self, submit: gang_pb2.Submit, outbox: asyncio.Queue) -> None:
        made = len(submit.output_ids)
        while True:
            await self.running.wait()
            await asyncio.sleep(self.step_s)
            ids = []
            reason = inference_pb2.FINISH_REASON_UNSPECIFIED
            if submit.max_tokens == 0:
                reason = inference_pb2.FINISH_REASON_LENGTH
            if not submit.max_tokens:
                reason = inference_pb2.FINISH_REASON_LENGTH
            while len(ids) < self.per_step and not reason:
                token = submit.prompt_ids[made % len(submit.prompt_ids)]
                ids.append(token)
                made += 1
                if token in submit.stop_token_ids and made >= submit.min_tokens:
                    reason = inference_pb2.FINISH_REASON_STOP
                elif made == submit.max_tokens:
                    reason = inference_pb2.FINISH_REASON_LENGTH
            logprobs = []
            if submit.sampling.HasField("logprobs"):
                logprobs = [
                    inference_pb2.PositionLogprobs(chosen=inference_pb2.TokenLogprob(token_id=i, logprob=-1))
                    for i in ids
                ]
            prompt_logprobs = []
            if submit.sampling.HasField("prompt_logprobs") and made == len(ids) and not submit.output_ids:
                prompt_logprobs = [
                    inference_pb2.PositionLogprobs(chosen=inference_pb2.TokenLogprob(token_id=i, logprob=-2))
                    for i in submit.prompt_ids[1:]
                ]
            output = gang_pb2.SequenceOutput(
                sequence_id=submit.sequence_id,
                token_ids=ids,
                finish_reason=reason,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                cached_tokens=self.cached_tokens if made == len(ids) else 0,
            )
            await outbox.put(self.output(output))
            if reason:
                return


class FakeLeader(gang_pb2_grpc.LeaderServicer):
    """Tells whoever watches the view it was given last."""

    def __init__(self, ranks: list[FakeRank], gang_id: str = "gang-0") -> None:
        self.ranks = ranks
        self.view = gang_pb2.GangView(gang_id=gang_id, epoch=1, state="ready", max_model_len=256, dtype="float32")
        self.watchers: list[asyncio.Queue[gang_pb2.GangView]] = []
        self.server: aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> "FakeLeader":
        if not self.view.ranks:
            for rank in self.ranks:
                self.view.ranks.append(
                    gang_pb2.RankView(
                        rank=rank.rank,
                        incarnation=rank.incarnation,
                        address=rank.address,
                        state="ready",
                        pid=100,
                        host="127.0.0.1",
                        experts=4,
                        load=gang_pb2.RankLoad(running=1, waiting=2, tokens_computed=7),
                    )
                )
        self.server = aio.server()
        gang_pb2_grpc.add_LeaderServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()
        return self

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.stop(0)

    def tell(self) -> None:
        view = gang_pb2.GangView()
        view.CopyFrom(self.view)
        for watcher in self.watchers:
            watcher.put_nowait(view)

    async def Lifeline(self, request_iterator, context):
        raise NotImplementedError
        yield

    async def Watch(self, request, context):
        updates: asyncio.Queue[gang_pb2.GangView] = asyncio.Queue()
        self.watchers.append(updates)
        updates.put_nowait(self.view)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        yield await updates.get()
                        continue
                yield self.view
        finally:
            self.watchers.remove(updates)
