"""One rank: a process with an engine thread and an event loop beside it for everything that talks.

A rank learns from its leader which epoch it is in: the members, their addresses and the expert maps. It then loads the
experts the map gives it, connects with the others and steps until the next epoch begins, it is stopped or its leader is
gone. Weights, KV memory and sequences stay from one epoch to the next; a step that an epoch's end cuts off is planned
again in the next.
"""

import asyncio
import logging
import os
import platform
import threading
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
import torch

from protos import gang_pb2, gang_pb2_grpc
from workers.commands import Command, Commands
from workers.config import RankConfig
from workers.epoch_exchange import join_exchange
from workers.errors import ExchangeError, UserError
from workers.exchange import check_exchange
from workers.exchange_listener import ExchangeListener
from workers.expert_map import ExpertMap
from workers.inbox import Inbox
from workers.lifeline import Lifeline
from workers.packed_loading import LoadProgress
from workers.peers import Peers
from workers.ports import join_address, serve_on
from workers.rank_engine import RankEngine
from workers.scheduler import Emitted
from workers.token_server import TokenServer

log = logging.getLogger(__name__)

STOP_SECONDS = 3.0
LOOP_SECONDS = 60.0
"""For anything that the engine's thread asks of the event loop, which never waits for long itself."""
# A prompt of a million tokens is more than the default of 4 MiB.
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Else two ranks could have one port, and half of each other's messages.
    ("grpc.so_reuseport", 0),
]
Stage = gang_pb2.Progress.Stage


class Rank:
    """One incarnation of one rank.

    `run` blocks in the calling thread, which becomes the engine's. `stop` may be called from any thread.
    """

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        self._inbox = Inbox()
        self._commands = Commands(self._inbox)
        self._engine = RankEngine(config, self._inbox, self._report_loading, self._publish, self._wake_peers)
        self._loop = asyncio.new_event_loop()
        self._server: TokenServer | None = None
        self._broken: ConnectionError | None = None
        self._is_open = False

    def run(self) -> None:
        """Serve until the leader says stop, `stop` is called, or the leader is gone.

        Raises:
            UserError: the checkpoint or the configuration is at fault; the leader has been told.
            ConnectionError: the leader is gone or never answered.
            ExchangeError: a peer is lost, and no epoch followed; the leader has been told.
        """
        thread = threading.Thread(target=self._loop.run_forever, name="rank-io", daemon=True)
        thread.start()
        try:
            self._do(self._open())
            self._is_open = True
            self._follow()
            if self._broken is not None:
                raise self._broken
        except Exception as error:
            # Whoever stops the gang tears down its exchanges too: what fails then is no failure.
            if self._inbox.stopped and self._broken is None:
                return
            if not isinstance(error, ConnectionError):
                self._report_failure(error)
            raise
        finally:
            if self._is_open:
                self._do(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join(STOP_SECONDS)

    def stop(self) -> None:
        self._commands.put(gang_pb2.Stop())

    # ---- engine thread -------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Do what the leader says, one epoch after the other, until it says stop."""
        suspicion: ExchangeError | None = None
        while True:
            match command := self._next_command(suspicion):
                case gang_pb2.Stop():
                    return
                case gang_pb2.Prepare():
                    self._prepare(ExpertMap.from_proto(command.layers))
                case _:
                    suspicion = self._run_epoch(command)

    def _next_command(self, suspicion: ExchangeError | None) -> Command:
        """Waits as long as there is a leader. With a suspicion, which the leader alone can judge: for so long as it is
        given to answer."""
        if suspicion is None:
            return self._commands.take()
        try:
            return self._commands.take(self.config.lifeline_timeout_s)
        except TimeoutError:
            raise suspicion from None

    def _prepare(self, expert_map: ExpertMap) -> None:
        if not self._engine.has_weights:
            self._enter(0, Stage.STAGE_WEIGHTS)
        self._engine.prepare(expert_map)
        if self._server is None:
            self._do(self._announce(gang_pb2.Epoch()))
        self._enter(0, Stage.STAGE_GROUP)

    def _run_epoch(self, epoch: gang_pb2.Epoch) -> ExchangeError | None:
        """Step until it is over; returns what broke it, if it was not a command."""
        try:
            self._step_in(epoch)
        except ExchangeError as error:
            if self._commands.is_interrupted:
                log.info("rank %d left epoch %d: %s", self.config.rank, epoch.epoch, error)
                return None
            # Perhaps a peer is dead; the leader knows, and will say what follows.
            log.warning("rank %d left epoch %d: %s", self.config.rank, epoch.epoch, error)
            return error
        return None

    def _step_in(self, epoch: gang_pb2.Epoch) -> None:
        engine, expert_map = self._engine, ExpertMap.from_proto(epoch.layers)
        if not engine.has_weights:
            self._enter(epoch.epoch, Stage.STAGE_WEIGHTS)
        engine.load(expert_map)
        self._enter(epoch.epoch, Stage.STAGE_GROUP)
        if self._commands.is_interrupted:
            return
        rows = engine.rows
        exchange = join_exchange(epoch, self.config, rows, self._listener, self._commands.attach)
        try:
            self._enter(epoch.epoch, Stage.STAGE_FIRST_EXCHANGE)
            check_exchange(exchange, rows.dim, rows.dtype, rows.device)
            engine.enter(epoch.epoch, [member.rank for member in epoch.members], expert_map, exchange)
            self._do(self._announce(epoch))
            ready = gang_pb2.EpochReady(epoch=epoch.epoch, max_model_len=engine.max_model_len, dtype=engine.dtype)
            self._lifeline.send(gang_pb2.RankReport(epoch_ready=ready))
            engine.run()
        finally:
            self._commands.detach()
            exchange.close()

    def _publish(self, step: int, emitted: list[Emitted]) -> None:
        load = self._engine.load_report()
        assert self._server is not None
        assert load is not None
        self._loop.call_soon_threadsafe(self._server.publish, step, emitted, load)

    def _wake_peers(self, epoch: int, step: int) -> None:
        asyncio.run_coroutine_threadsafe(self._peers.wake(self.config.gang_id, epoch, step), self._loop)

    def _enter(self, epoch: int, stage: gang_pb2.Progress.Stage.ValueType) -> None:
        self._lifeline.send(gang_pb2.RankReport(progress=gang_pb2.Progress(epoch=epoch, stage=stage)))

    def _report_loading(self, progress: LoadProgress) -> None:
        if self._inbox.stopped:
            raise InterruptedError("stopped while loading")
        loading = gang_pb2.Loading(
            bytes_read=progress.read,
            bytes_total=progress.total,
            bytes_packed=progress.packed,
            bytes_to_pack=progress.to_pack,
            note=progress.note,
        )
        self._lifeline.send(gang_pb2.RankReport(loading=loading))

    def _report_failure(self, error: Exception) -> None:
        log.error("rank %d of gang %s failed: %s", self.config.rank, self.config.gang_id, error)
        if not self._is_open:
            return
        failed = gang_pb2.Failed(message=str(error) or repr(error), is_user_error=isinstance(error, UserError))
        self._lifeline.send(gang_pb2.RankReport(failed=failed))
        # The report must leave before the connection does.
        self._do(asyncio.sleep(0.2))

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(LOOP_SECONDS)

    # ---- event loop ----------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        # Until the epoch is ready nobody has this rank's address from the leader; connections wait for `_announce`.
        self._grpc = server = grpc.aio.server(options=SERVER_OPTIONS)
        config, host = self.config, self.config.host

        def bind(port: int) -> int:
            return int(server.add_insecure_port(join_address(host, port)))

        self._peers = Peers(config.rank)
        self._listener = ExchangeListener(config.gang_id, config.rank, config.incarnation, host, config.exchange_ports)
        try:
            port = serve_on(config.rank_ports, host, "rank_ports", bind)
        except BaseException:
            self._listener.close()
            raise
        joined = gang_pb2.Joined(
            gang_id=config.gang_id,
            rank=config.rank,
            incarnation=config.incarnation,
            pid=os.getpid(),
            host=host,
            address=join_address(host, port),
            device=config.engine.device,
            versions=_versions(),
            exchange_address=self._listener.address,
        )
        self._lifeline = Lifeline(config.leader_address, joined, self._engine.load_report, self._on_command)
        self._lifeline_task = asyncio.create_task(self._hold_lifeline())

    async def _announce(self, epoch: gang_pb2.Epoch) -> None:
        """Serve as a member of the epoch."""
        await self._peers.enter(epoch)
        if self._server is not None:
            await self._server.enter(epoch.epoch)
            return
        config, engine = self.config, self._engine
        header = gang_pb2.StepOutput(
            gang_id=config.gang_id, epoch=epoch.epoch, rank=config.rank, incarnation=config.incarnation
        )
        self._server = TokenServer(header, self._inbox, engine.model.vocab_size, engine.max_model_len)
        gang_pb2_grpc.add_RankServicer_to_server(self._server, self._grpc)
        await self._grpc.start()

    async def _hold_lifeline(self) -> None:
        try:
            await self._lifeline.run(self.config.lifeline_timeout_s)
        except ConnectionError as error:
            self._broken = error
        self.stop()

    def _on_command(self, command: gang_pb2.LeaderCommand) -> None:
        match command.WhichOneof("message"):
            case "epoch":
                self._commands.put(command.epoch)
            case "prepare":
                self._commands.put(command.prepare)
            case _:
                self.stop()

    async def _close(self) -> None:
        self._lifeline_task.cancel()
        await self._grpc.stop(grace=0.2)
        self._listener.close()
        await self._peers.close()


def _versions() -> dict[str, str]:
    try:
        caravan = version("caravan")
    except PackageNotFoundError:
        caravan = "unknown"
    return {"caravan": caravan, "torch": torch.__version__, "python": platform.python_version()}
