"""A router's one long-lived stream to a rank, shared by all of the router's sequences there."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable

from grpc import aio

from protos import gang_pb2, gang_pb2_grpc
from router.policy import Candidate
from router.stream import Stream

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS = [
    # A step's log-probabilities or a long prompt may pass the default of 4 MiB.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]
FIRST_PAUSE_S = 0.05
LOAD_LAG_S = 0.25
"""A rank's report of its load surely counts a sequence submitted or aborted this long before."""
VIEW_LAG_S = 2.0
"""What the leader says of a rank's load is older than what the rank said itself this long ago."""


class RankLink:
    """Submits and aborts sequences at one incarnation of one rank, and hands out what its steps produce.

    Reading never waits for a client. When the rank or the way to it is lost, every stream here fails at once.

    Args:
        router_id: this router's name.
        gang_id: the rank's gang.
        member: the rank and its incarnation.
        epoch: the gang's epoch when the link was made.
        reconnect_max_s: longest pause between two attempts to connect.
        on_fenced: called for every message that is dropped because it is not current.
        on_change: called whenever the rank may have room that it had not before.

    Attributes:
        is_connected: sequences can be submitted.
        load: what the rank said last of its load.
    """

    def __init__(
        self,
        router_id: str,
        gang_id: str,
        member: gang_pb2.RankView,
        epoch: int,
        reconnect_max_s: float,
        on_fenced: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self.gang_id = gang_id
        self.rank = member.rank
        self.incarnation = member.incarnation
        self.address = member.address
        self.epoch = epoch
        self.is_connected = False
        self.load = member.load
        self._router_id = router_id
        self._reconnect_max_s = reconnect_max_s
        self._on_fenced = on_fenced
        self._on_change = on_change
        self._streams: dict[int, Stream] = {}
        # Prompt tokens and time of sequences that the rank's own report may not count yet.
        self._submitted: dict[int, tuple[int, float]] = {}
        # Time of aborts of sequences that the rank's own report may still count.
        self._aborted: dict[int, float] = {}
        self._told_load_at = 0.0
        self._outbox: asyncio.Queue[gang_pb2.RouterMessage] = asyncio.Queue()

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.gang_id}"

    def candidate(self) -> Candidate:
        """What the rank has to do, for the routing policy."""
        load, submitted = self.load, sum(tokens for tokens, _ in self._submitted.values())
        free_kv_tokens = None
        if load.kv_capacity_tokens:
            free_kv_tokens = int(load.kv_capacity_tokens * (1 - load.kv_usage_ratio)) - submitted
        return Candidate(
            self.gang_id,
            self.rank,
            pending_tokens=load.pending_tokens + submitted,
            sequences=max(0, load.running + load.waiting - len(self._aborted)) + len(self._submitted),
            max_sequences=load.max_num_seqs,
            free_kv_tokens=free_kv_tokens,
        )

    def submit(self, stream: Stream) -> None:
        """Sends a sequence to the rank. Never waits."""
        request = stream.request
        self._streams[stream.sequence_id] = stream
        num_tokens = len(request.prompt_ids) + len(stream.output_ids)
        self._submitted[stream.sequence_id] = (num_tokens, time.monotonic())
        submit = gang_pb2.Submit(
            sequence_id=stream.sequence_id,
            epoch=self.epoch,
            prompt_ids=request.prompt_ids,
            output_ids=stream.output_ids,
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            stop_token_ids=sorted(request.stop_token_ids),
            sibling=request.sibling,
            request_id=request.request_id,
            tenant=request.tenant,
        )
        if stream.deadline is not None:
            submit.timeout_s = max(0.0, stream.deadline - time.monotonic())
        self._outbox.put_nowait(gang_pb2.RouterMessage(submit=submit))

    def abort(self, sequence_id: int) -> None:
        """Ends a sequence, if it has not ended. Never waits."""
        if sequence_id in self._streams:
            if sequence_id not in self._submitted:
                self._aborted[sequence_id] = time.monotonic()
            self._forget(sequence_id)
            self._outbox.put_nowait(gang_pb2.RouterMessage(abort=gang_pb2.Abort(sequence_id=sequence_id)))

    def cancel(self, tenant: str, request_id: str, sibling: int | None) -> None:
        """Ends what other routers submitted of a request. Never waits."""
        cancel = gang_pb2.Cancel(request_id=request_id, tenant=tenant, sibling=sibling)
        self._outbox.put_nowait(gang_pb2.RouterMessage(cancel=cancel))

    def update(self, epoch: int, load: gang_pb2.RankLoad) -> None:
        """Takes what the leader says of this incarnation."""
        self.epoch = max(self.epoch, epoch)
        if time.monotonic() - self._told_load_at > VIEW_LAG_S:
            self._take_load(load)
            self._on_change()

    def fail_streams(self, detail: str) -> None:
        """Ends every stream here with an error."""
        streams = list(self._streams.values())
        self._streams.clear()
        self._submitted.clear()
        self._aborted.clear()
        for stream in streams:
            stream.fail(detail)

    async def run(self) -> None:
        """Keeps the stream to the rank up. Ends by cancellation only."""
        pause = FIRST_PAUSE_S
        while True:
            start = time.monotonic()
            try:
                await self._converse()
                problem = "it closed the connection"
            except aio.AioRpcError as error:
                problem = f"{error.code().name}: {error.details()}"
            except Exception as error:
                logger.exception("the link to %s failed", self)
                problem = f"the router failed: {error}"
            if self.is_connected:
                logger.warning("lost %s at %s: %s", self, self.address, problem)
            self.is_connected = False
            self._outbox = asyncio.Queue()
            self.fail_streams(f"{self} was lost ({problem}); send the request again")
            if time.monotonic() - start > self._reconnect_max_s:  # It had lasted; else the rank may be refusing us.
                pause = FIRST_PAUSE_S
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._reconnect_max_s)

    async def _converse(self) -> None:
        """One connection, from Hello to its loss."""
        async with aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            call = gang_pb2_grpc.RankStub(channel).Connect(self._messages(self._outbox))
            async for message in call:
                self._dispatch(message)

    async def _messages(self, outbox: asyncio.Queue[gang_pb2.RouterMessage]) -> AsyncIterator[gang_pb2.RouterMessage]:
        """What goes to the rank; gRPC asks for the next when the last is on its way."""
        hello = gang_pb2.Hello(router_id=self._router_id, gang_id=self.gang_id, epoch=self.epoch)
        yield gang_pb2.RouterMessage(hello=hello)
        self.is_connected = True
        self._on_change()
        while True:
            yield await outbox.get()

    def _dispatch(self, message: gang_pb2.StepOutput) -> None:
        if not self._is_current(message):
            self._drop(message)
            return
        self.epoch = message.epoch
        if message.HasField("load"):
            self._take_load(message.load)
            self._told_load_at = time.monotonic()
        outputs: Iterable[gang_pb2.SequenceOutput] = message.outputs
        if self._submitted:
            # Clients are written to in the order of delivery, and who has nothing yet waits the hardest.
            outputs = sorted(outputs, key=lambda output: output.sequence_id not in self._submitted)
        for output in outputs:
            stream = self._streams.get(output.sequence_id)
            if stream is None:
                continue  # Aborted while this was on its way.
            self._submitted.pop(output.sequence_id, None)
            stream.deliver(output)
            if stream.is_rank_done:
                self._forget(output.sequence_id)
        self._on_change()

    def _drop(self, message: gang_pb2.StepOutput) -> None:
        self._on_fenced()
        told = f"gang {message.gang_id}, epoch {message.epoch}, incarnation {message.incarnation}"
        logger.warning("dropped a step of %s from %s: not current", told, self)
        # A stream that goes on without these tokens would have a hole in it.
        for output in message.outputs:
            if stream := self._streams.get(output.sequence_id):
                self.abort(output.sequence_id)
                stream.fail(f"{self} sent tokens of a past epoch; send the request again")

    def _is_current(self, message: gang_pb2.StepOutput) -> bool:
        """Of this gang and incarnation, and of no older epoch than known.

        A newer epoch is current: the rank hears of it before the router does.
        """
        return (
            message.gang_id == self.gang_id
            and message.rank == self.rank
            and message.incarnation == self.incarnation
            and message.epoch >= self.epoch
        )

    def _take_load(self, load: gang_pb2.RankLoad) -> None:
        self.load = load
        if self._submitted or self._aborted:
            counted = time.monotonic() - LOAD_LAG_S
            self._submitted = {k: v for k, v in self._submitted.items() if v[1] > counted}
            self._aborted = {k: v for k, v in self._aborted.items() if v > counted}

    def _forget(self, sequence_id: int) -> None:
        self._submitted.pop(sequence_id, None)
        self._streams.pop(sequence_id, None)
