"""A router's one long-lived stream to a rank, shared by all of the router's sequences there."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple

from grpc import aio

from protos import gang_pb2, gang_pb2_grpc
from router.loss import Loss, LossReason
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
REFUSAL_PAUSE_S = 0.05
"""A rank that hands streams back gets nothing for so long."""
VIEW_LAG_S = 2.0
"""What the leader says of a rank's load is older than what the rank said itself this long ago."""
MOST_NAMED = 100
"""Requests of a lost rank that the log names."""


class Attempt(NamedTuple):
    """A stream at this rank."""

    stream: Stream
    epoch: int
    """That it was submitted in."""


class RankLink:
    """Submits and aborts sequences at one incarnation of one rank, and hands out what its steps produce.

    Reading never waits for a client. When the rank or the way to it is lost, so are all streams here, at once. The
    rank may go from epoch to epoch meanwhile: what it says in order on one stream is current as long as it lives.

    Args:
        router_id: this router's name.
        gang_id: the rank's gang.
        member: the rank and its incarnation.
        epoch: the gang's epoch when the link was made.
        reconnect_max_s: longest pause between two attempts to connect.
        on_fenced: called for every message that is dropped because it is not current.
        on_change: called whenever the rank may have room that it had not before.

    Attributes:
        epoch: that the rank is in, as far as is known.
        is_connected: the rank has accepted this router.
        is_current: the leader calls the rank ready.
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
        self.is_current = True
        self.load = member.load
        self._router_id = router_id
        self._reconnect_max_s = reconnect_max_s
        self._on_fenced = on_fenced
        self._on_change = on_change
        self._streams: dict[int, Attempt] = {}
        # Numbers below are of submissions that were lost with an earlier connection.
        self._lost_below = 0
        self._last_submitted = 0
        # By the rank itself.
        self._told_epoch = 0
        # By time.monotonic.
        self._pause_ends = 0.0
        # Prompt tokens and time of sequences that the rank's own report may not count yet.
        self._submitted: dict[int, tuple[int, float]] = {}
        # Time of aborts of sequences that the rank's own report may still count.
        self._aborted: dict[int, float] = {}
        self._told_load_at = 0.0
        # None: nothing follows.
        self._outbox: asyncio.Queue[gang_pb2.RouterMessage | None] = asyncio.Queue()

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.gang_id}"

    @property
    def is_open(self) -> bool:
        """Sequences can be submitted."""
        return self.is_connected and self.is_current and time.monotonic() >= self._pause_ends

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
        self._streams[stream.sequence_id] = Attempt(stream, self.epoch)
        self._last_submitted = max(self._last_submitted, stream.sequence_id)
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

    def lose_streams(self, loss: Loss) -> None:
        """Gives up every stream here."""
        attempts = list(self._streams.values())
        self._streams.clear()
        self._submitted.clear()
        self._aborted.clear()
        self._lost_below = self._last_submitted + 1
        if attempts and loss.reason != LossReason.SHUTDOWN:
            requests = ", ".join(attempt.stream.request.request_id for attempt in attempts[:MOST_NAMED])
            logger.warning("%s: %d streams have to go on elsewhere: %s", loss.detail, len(attempts), requests)
        for attempt in attempts:
            attempt.stream.lose(loss)

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
            if self.is_connected and not self._streams:
                logger.warning("%s at %s was lost: %s", self, self.address, problem)
            self.is_connected = False
            self._outbox = asyncio.Queue()
            self.lose_streams(Loss(LossReason.CONNECTION, f"{self} was lost ({problem})"))
            self._on_change()
            if time.monotonic() - start > self._reconnect_max_s:  # It had lasted; else the rank may be refusing us.
                pause = FIRST_PAUSE_S
            await asyncio.sleep(pause)
            pause = min(pause * 2, self._reconnect_max_s)

    async def _converse(self) -> None:
        """One connection, from Hello to its loss."""
        outbox = self._outbox
        async with aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            call = gang_pb2_grpc.RankStub(channel).Connect(self._messages(outbox))
            try:
                # The rank sends them when it has accepted us.
                await call.initial_metadata()
                if not call.done():
                    self.is_connected = True
                    self._on_change()
                async for message in call:
                    self._dispatch(message)
            finally:
                outbox.put_nowait(None)  # When the rank ends the call, gRPC goes on waiting for our next message.

    async def _messages(
        self, outbox: asyncio.Queue[gang_pb2.RouterMessage | None]
    ) -> AsyncIterator[gang_pb2.RouterMessage]:
        """What goes to the rank; gRPC asks for the next when the last is on its way."""
        hello = gang_pb2.Hello(
            router_id=self._router_id, gang_id=self.gang_id, epoch=self.epoch, incarnation=self.incarnation
        )
        yield gang_pb2.RouterMessage(hello=hello)
        while (message := await outbox.get()) is not None:
            yield message

    def _dispatch(self, message: gang_pb2.StepOutput) -> None:
        if not self._is_current(message):
            self._drop(message)
            return
        is_old = message.epoch < self.epoch
        self._told_epoch = message.epoch
        self.epoch = max(self.epoch, message.epoch)
        if message.HasField("load"):
            self._take_load(message.load)
            self._told_load_at = time.monotonic()
        outputs: Iterable[gang_pb2.SequenceOutput] = message.outputs
        if self._submitted:
            # Clients are written to in the order of delivery, and who has nothing yet waits the hardest.
            outputs = sorted(outputs, key=lambda output: output.sequence_id not in self._submitted)
        has_late, handed_back = False, 0
        for output in outputs:
            attempt = self._streams.get(output.sequence_id)
            if attempt is None:  # Aborted while this was on its way, or lost with an earlier connection or epoch.
                has_late = has_late or is_old or output.sequence_id < self._lost_below
                continue
            self._submitted.pop(output.sequence_id, None)
            attempt.stream.deliver(output)
            if output.resubmit:
                handed_back += 1
                self._hand_back(output, attempt, message.epoch)
            elif attempt.stream.is_rank_done:
                self._forget(output.sequence_id)
        if has_late:
            self._on_fenced()
        if handed_back:
            logger.warning("%s, in epoch %d, hands %d streams back", self, message.epoch, handed_back)
        self._on_change()

    def _hand_back(self, output: gang_pb2.SequenceOutput, attempt: Attempt, epoch: int) -> None:
        """The rank, which is in `epoch`, does not go on with a stream."""
        self._forget(output.sequence_id)
        if epoch < attempt.epoch:  # The leader has told us sooner than the rank.
            self.epoch = epoch
        # A rank in a newer epoch takes the next one; this one may do so again.
        if epoch <= attempt.epoch and self._pause_ends <= time.monotonic():
            self._pause_ends = time.monotonic() + REFUSAL_PAUSE_S
            asyncio.get_running_loop().call_later(REFUSAL_PAUSE_S * 1.01, self._on_change)
        reason = LossReason.GIVEN_UP if epoch == attempt.epoch else LossReason.REFUSED
        attempt.stream.lose(Loss(reason, f"{self} does not go on with it: {output.detail}"))

    def _drop(self, message: gang_pb2.StepOutput) -> None:
        self._on_fenced()
        told = f"gang {message.gang_id}, epoch {message.epoch}, incarnation {message.incarnation}"
        logger.warning("dropped a step of %s from %s: not current", told, self)
        # A stream that goes on here without these tokens would have a hole in it.
        loss = Loss(LossReason.FENCED, f"{self} sent tokens that are not current")
        lost = [self._streams[each.sequence_id] for each in message.outputs if each.sequence_id in self._streams]
        for attempt in lost:
            self.abort(attempt.stream.sequence_id)
            attempt.stream.lose(loss)
        if lost:
            self._on_change()

    def _is_current(self, message: gang_pb2.StepOutput) -> bool:
        """Of this gang and incarnation, and of no older epoch than the rank itself told of.

        A newer epoch is current: the rank may hear of it before the router does. So is one older than the leader's
        newest, as long as this incarnation lives: its step was whole, and the rank counts on these tokens.
        """
        return (
            message.gang_id == self.gang_id
            and message.rank == self.rank
            and message.incarnation == self.incarnation
            and message.epoch >= self._told_epoch
            and not (message.epoch < self.epoch and self._is_older_than_its_streams(message))
        )

    def _is_older_than_its_streams(self, message: gang_pb2.StepOutput) -> bool:
        """A rank takes nothing of another epoch, so it cannot have made tokens before."""
        found = [self._streams.get(output.sequence_id) for output in message.outputs if not output.resubmit]
        return any(attempt is not None and message.epoch < attempt.epoch for attempt in found)

    def _take_load(self, load: gang_pb2.RankLoad) -> None:
        self.load = load
        if self._submitted or self._aborted:
            counted = time.monotonic() - LOAD_LAG_S
            self._submitted = {k: v for k, v in self._submitted.items() if v[1] > counted}
            self._aborted = {k: v for k, v in self._aborted.items() if v > counted}

    def _forget(self, sequence_id: int) -> None:
        self._submitted.pop(sequence_id, None)
        self._streams.pop(sequence_id, None)
