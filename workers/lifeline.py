"""A rank's connection to its leader: reports up, commands down, beside the engine so that a long step is no death."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from protos import gang_pb2, gang_pb2_grpc

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5


class Lifeline:
    """Runs on an event loop; `send` may be called from any thread.

    Args:
        joined: the first report.
        load: called about twice a second for the current load, None while there is none.
        on_command: called on the loop with every command.
    """

    def __init__(
        self,
        leader_address: str,
        joined: gang_pb2.Joined,
        load: Callable[[], gang_pb2.RankLoad | None],
        on_command: Callable[[gang_pb2.LeaderCommand], None],
    ) -> None:
        self._leader_address, self._joined = leader_address, joined
        self._load, self._on_command = load, on_command
        self._reports: asyncio.Queue[gang_pb2.RankReport] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def send(self, report: gang_pb2.RankReport) -> None:
        self._loop.call_soon_threadsafe(self._reports.put_nowait, report)

    async def run(self, connect_timeout_s: float) -> None:
        """Hold the lifeline until the leader ends it or is gone.

        Raises:
            ConnectionError: the leader did not answer in time, or the connection broke.
        """
        async with grpc.aio.insecure_channel(self._leader_address) as channel:
            try:
                async with asyncio.timeout(connect_timeout_s):
                    await channel.channel_ready()
            except TimeoutError:
                raise ConnectionError(
                    f"the leader at {self._leader_address} did not answer within {connect_timeout_s:.0f} s"
                ) from None
            call = gang_pb2_grpc.LeaderStub(channel).Lifeline(self._outgoing())
            try:
                async for command in call:
                    self._on_command(command)
            except grpc.aio.AioRpcError as error:
                raise ConnectionError(
                    f"the lifeline to the leader at {self._leader_address} broke: {error.details()}"
                ) from error

    async def _outgoing(self) -> AsyncIterator[gang_pb2.RankReport]:
        yield gang_pb2.RankReport(joined=self._joined)
        while True:
            try:
                async with asyncio.timeout(REPORT_SECONDS):
                    report = await self._reports.get()
                yield report
            except TimeoutError:
                if (load := self._load()) is not None:
                    yield gang_pb2.RankReport(load=load)
