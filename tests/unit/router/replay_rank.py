"""A rank without a model, whose next token depends on all that a real one's does."""

import asyncio
import zlib
from collections import deque
from dataclasses import dataclass, field

from protos import gang_pb2, inference_pb2
from router.rank_link import RankLink

ERROR = inference_pb2.FINISH_REASON_ERROR
STOP, LENGTH = inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH
VOCAB = 300


@dataclass(eq=False)
class Wire:
    """One connection of a link: what is on its way down to the router, and the end of it."""

    link: RankLink
    outbox: asyncio.Queue[gang_pb2.RouterMessage]
    end: asyncio.Future[None]
    down: deque[gang_pb2.StepOutput] = field(default_factory=deque)


@dataclass(eq=False)
class Rank:
    """One incarnation. `sequences` are what it works on, by the router's number: submission and all tokens so far."""

    gang: str
    rank: int
    incarnation: int
    epoch: int
    address: str
    is_alive: bool = True
    max_num_seqs: int = 0
    free_kv_tokens: int | None = None
    wire: Wire | None = None
    sequences: dict[int, tuple[gang_pb2.Submit, list[int]]] = field(default_factory=dict)
    submits: list[gang_pb2.Submit] = field(default_factory=list)

    @property
    def load(self) -> gang_pb2.RankLoad:
        load = gang_pb2.RankLoad(running=len(self.sequences), max_num_seqs=self.max_num_seqs)
        if self.free_kv_tokens is not None:
            load.kv_capacity_tokens, load.kv_usage_ratio = 1000, 1 - self.free_kv_tokens / 1000
        return load

    def say(self, outputs: list[gang_pb2.SequenceOutput], epoch: int | None = None) -> None:
        if self.wire is not None:
            self.wire.down.append(
                gang_pb2.StepOutput(
                    gang_id=self.gang, epoch=self.epoch if epoch is None else epoch, rank=self.rank,
                    incarnation=self.incarnation, outputs=outputs,
                    load=self.load,
                )
            )  # fmt: skip

    def hear(self) -> None:
        """Takes what the router sent."""
        while self.wire is not None and not self.wire.outbox.empty():
            message = self.wire.outbox.get_nowait()
            if message.HasField("abort"):
                self.sequences.pop(message.abort.sequence_id, None)
            elif message.HasField("submit"):
                self._take(message.submit)

    def _take(self, submit: gang_pb2.Submit) -> None:
        assert submit.sequence_id not in {each.sequence_id for each in self.submits}, "a number was used twice"
        self.submits.append(submit)
        if submit.epoch != self.epoch:
            detail = f"submitted to epoch {submit.epoch}, but the gang is in epoch {self.epoch}"
            self.say([_output(submit.sequence_id, finish_reason=ERROR, detail=detail, resubmit=True)])
            return
        assert len(submit.output_ids) < submit.max_tokens or not submit.max_tokens, "there is nothing to do"
        self.sequences[submit.sequence_id] = (submit, list(submit.output_ids))

    def step(self) -> None:
        """One token of everything."""
        outputs = []
        for sequence_id, (submit, ids) in list(self.sequences.items()):
            output = draw(submit, ids)
            output.sequence_id = sequence_id
            if output.finish_reason:
                del self.sequences[sequence_id]
            outputs.append(output)
        if outputs:
            self.say(outputs)

    def give_up(self) -> None:
        """Hands back all it has."""
        outputs = [_output(each, finish_reason=ERROR, detail="draining", resubmit=True) for each in self.sequences]
        self.sequences.clear()
        if outputs:
            self.say(outputs)


def _output(sequence_id: int, **fields) -> gang_pb2.SequenceOutput:
    return gang_pb2.SequenceOutput(sequence_id=sequence_id, **fields)


def draw(submit: gang_pb2.Submit, ids: list[int]) -> gang_pb2.SequenceOutput:
    """The next token as a real rank would send it; appended to `ids`."""
    output = gang_pb2.SequenceOutput()
    is_first = not ids
    if is_first and submit.sampling.HasField("prompt_logprobs"):
        for i in submit.prompt_ids[1:]:
            output.prompt_logprobs.add().chosen.token_id = i
    if not submit.max_tokens:
        output.finish_reason = LENGTH
        return output
    output.cached_tokens = min(3, len(submit.prompt_ids)) + (0 if is_first else 1)
    state = (list(submit.prompt_ids), ids, submit.sampling.SerializeToString(deterministic=True), submit.sibling)
    key = zlib.crc32(repr(state).encode())
    token = key % VOCAB
    stops = submit.stop_token_ids
    while token in stops and len(ids) + 1 < submit.min_tokens:
        token = (token + 1) % VOCAB
    ids.append(token)
    output.token_ids.append(token)
    if submit.sampling.HasField("logprobs"):
        output.logprobs.add().chosen.CopyFrom(inference_pb2.TokenLogprob(token_id=token, logprob=-(key % 1000) / 100))
    if token in stops and len(ids) >= submit.min_tokens:
        output.finish_reason = STOP
    elif len(ids) == submit.max_tokens:
        output.finish_reason = LENGTH
    return output
