"""A Caravan server under load, over gRPC."""

import asyncio
import itertools
import time
from collections.abc import Sequence

import grpc
from grpc import aio

from cluster.bench_stream import STREAM_BOUND_S, TIMED_OUT, Stream
from cluster.bench_target import Facts, tokens_end
from cluster.generate import command_error
from protos import inference_pb2, inference_pb2_grpc
from protos.client import CHANNEL_OPTIONS, NO_RETRIES, Client
from protos.errors import CaravanError
from protos.requests import make_request


class GrpcTarget:
    """Drives caravan.v1 by the bare stub: the project's client reads in threads, and one loop is lighter.

    Args:
        address: HOST:PORT.
        connections: streams take them in turn. With several router processes each gets its share of them.
    """

    def __init__(self, address: str, connections: int = 1) -> None:
        self.address = address
        self._connections = connections
        self._channels: list[aio.Channel] = []

    async def open(self) -> Facts:
        def ask() -> inference_pb2.Model:
            with Client(self.address, retries=NO_RETRIES) as client:
                return client.get_model()

        try:
            model = await asyncio.to_thread(ask)
        except CaravanError as error:
            raise command_error(error) from None
        self._channels = [aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) for _ in range(self._connections)]
        self._stubs = itertools.cycle([inference_pb2_grpc.InferenceStub(channel) for channel in self._channels])
        return Facts(model.name, tokens_end(model.vocab_size), model.context_length, is_caravan=True)

    async def stream(self, prompt: Sequence[int], output_tokens: int) -> Stream:
        request = make_request(prompt, max_tokens=output_tokens, temperature=0, ignore_eos=True)
        generate = next(self._stubs).Generate
        stream = Stream(time.perf_counter())
        arrived = stream.arrivals.append
        counted = None
        try:
            async for response in generate(request, timeout=STREAM_BOUND_S):
                if response.token_ids:
                    arrived(time.perf_counter())
                if response.finish_reason:
                    counted = response.usage.completion_tokens
        except aio.AioRpcError as error:
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            stream.fail(time.perf_counter(), TIMED_OUT if late else error.code().name, error.details() or "")
        else:
            stream.close(time.perf_counter(), counted, output_tokens)
        return stream

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(None)
