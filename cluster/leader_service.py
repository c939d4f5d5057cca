"""The leader's gRPC server: lifelines of ranks and watches of routers, translated to and from `Membership`."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc

from cluster.membership import STARTING, Loss, Member, Membership
from protos import gang_pb2, gang_pb2_grpc
from workers.ports import PortRange, join_address, serve_on

Context = grpc.aio.ServicerContext[gang_pb2.RankReport, gang_pb2.LeaderCommand]

# A host that vanished without closing its connections is noticed by these.
SERVER_OPTIONS = [
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


class LeaderService(gang_pb2_grpc.LeaderServicer):
    """Serves `Leader`. Keeps no state of its own beside the server."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int = 0) -> str:
        """Listen on a port of `host`, 0: one that the system chooses; returns HOST:PORT.

        Raises:
            UserError: the port is taken.
        """
        self._server = server = grpc.aio.server(options=SERVER_OPTIONS)
        gang_pb2_grpc.add_LeaderServicer_to_server(self, server)

        def bind(port: int) -> int:
            return int(server.add_insecure_port(join_address(host, port)))

        port = serve_on(PortRange(port, port) if port else None, host, "leader_port", bind)
        await server.start()
        return join_address(host, port)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=0.2)

    async def Lifeline(
        self, request_iterator: AsyncIterator[gang_pb2.RankReport], context: Context
    ) -> AsyncIterator[gang_pb2.LeaderCommand]:
        reports = aiter(request_iterator)
        member = await self._admit(reports, context)
        reader = asyncio.create_task(self._read(member, reports))
        command: asyncio.Task[gang_pb2.LeaderCommand] | None = None
        try:
            while True:
                command = asyncio.create_task(member.commands.get())
                await asyncio.wait((command, reader), return_when=asyncio.FIRST_COMPLETED)
                if not command.done():
                    return
                yield command.result()
        finally:
            reader.cancel()
            if command is not None:
                command.cancel()
            self._membership.record_loss(member.rank, member.incarnation, Loss("its process fell silent"))

    async def Watch(self, request: gang_pb2.WatchRequest, context: Context) -> AsyncIterator[gang_pb2.GangView]:
        version = -1
        while True:
            version = self._membership.version
            yield self._membership.view()
            tick_s = 0.25 if self._membership.state == STARTING else 1.0
            await self._membership.changed_since(version, timeout_s=tick_s)

    async def _admit(self, reports: AsyncIterator[gang_pb2.RankReport], context: Context) -> Member:
        first = await anext(reports, None)
        if first is None or not first.HasField("joined"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a lifeline's first report must be Joined")
        joined = first.joined
        member = self._membership.current(joined.rank, joined.incarnation)
        if joined.gang_id != self._membership.gang_id or member is None or member.loss is not None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"rank {joined.rank}, incarnation {joined.incarnation}, of gang {joined.gang_id} is no member now",
            )
        if member.joined is not None:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"rank {joined.rank} has a lifeline already")
        member.joined = joined
        self._membership.notify()
        return member

    async def _read(self, member: Member, reports: AsyncIterator[gang_pb2.RankReport]) -> None:
        async for report in reports:
            member.heard_at = time.monotonic()
            match report.WhichOneof("message"):
                case "loading":
                    is_first = member.loading is None
                    member.loading = report.loading
                    if is_first:
                        self._membership.notify()
                case "progress":
                    # 0: it prepares for an epoch that is not there yet.
                    if report.progress.epoch in (0, self._membership.epoch):
                        member.progress = report.progress
                        self._membership.notify()
                case "load":
                    member.load = report.load
                case "epoch_ready":
                    if report.epoch_ready.epoch == self._membership.epoch:
                        member.ready = report.epoch_ready
                        self._membership.notify()
                case "failed":
                    loss = Loss(report.failed.message, report.failed.is_user_error, reason="failed", is_told=True)
                    self._membership.record_loss(member.rank, member.incarnation, loss)
                case _:
                    pass
