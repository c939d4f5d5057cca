"""One rank: a process with an engine thread and an event loop beside it for everything that talks.

A rank learns from its leader which epoch it is in: the members, their addresses and the expert maps. It then loads the
experts the map gives it, forms the process group and steps until it is stopped or its leader is gone.
"""

import asyncio
import contextlib
import logging
import os
import platform
import queue
import threading
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
import torch

from protos import gang_pb2, gang_pb2_grpc
from workers.abort_signal import AbortSignal
from workers.config import RankConfig
from workers.engine import Engine
from workers.errors import ExchangeError, UserError
from workers.exchange import Exchange, LocalExchange, check_exchange
from workers.exchange_join import join_mesh
from workers.exchange_links import Peer
from workers.exchange_listener import ExchangeListener
from workers.expert_map import ExpertMap
from workers.inbox import Inbox
from workers.lifeline import Lifeline
from workers.mesh_exchange import MeshShape
from workers.metrics import RankMetrics
from workers.model_config import ModelConfig
from workers.packed_loading import LoadProgress, rank_weights
from workers.ports import join_address, serve_on
from workers.runner import TORCH_DTYPES, Runner, resolve_device, resolve_dtype
from workers.scheduler import Emitted, Scheduler
from workers.token_server import TokenServer
from workers.torch_exchange import TorchExchange

log = logging.getLogger(__name__)

STOP_SECONDS = 3.0
STOP_GRACE_SECONDS = 0.3
JOIN_SECONDS = 3600.0
"""For the slowest rank's weights; the leader, which sees whether they get on, ends the wait much earlier."""
# A prompt of a million tokens is more than the default of 4 MiB.
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Else two ranks could have one port, and half of each other's messages.
    ("grpc.so_reuseport", 0),
]


class Rank:
    """One incarnation of one rank.

    `run` blocks in the calling thread, which becomes the engine's. `stop` may be called from any thread.
    """

    def __init__(self, config: RankConfig) -> None:
        self.config = config
        self._inbox = Inbox()
        self._commands: queue.SimpleQueue[gang_pb2.Epoch | gang_pb2.Stop] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._engine: Engine | None = None
        self._exchange: Exchange = LocalExchange()
        self._joining: AbortSignal | None = None
        """While the exchange is being joined: ends that."""
        self._weights_bytes_read = 0
        self._broken: ConnectionError | None = None
        self._is_open = False

    def run(self) -> None:
        """Serve until the leader says stop, `stop` is called, or the leader is gone.

        Raises:
            UserError: the checkpoint or the configuration is at fault; the leader has been told.
            ConnectionError: the leader is gone or never answered.
            ExchangeError: a peer is lost; the leader has been told.
        """
        thread = threading.Thread(target=self._loop.run_forever, name="rank-io", daemon=True)
        thread.start()
        try:
            self._do(self._open())
            self._is_open = True
            command = self._commands.get()
            if isinstance(command, gang_pb2.Epoch):
                self._run_epoch(command)
            if self._broken is not None:
                raise self._broken
        except Exception as error:
            # Whoever stops the gang tears down its exchanges too: what fails then is no failure. A peer that heard it
            # a moment earlier has left already.
            if isinstance(error, ExchangeError) and not self._inbox.stopped:
                with contextlib.suppress(queue.Empty):
                    self._commands.get(timeout=STOP_GRACE_SECONDS)
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
        self._inbox.stop()
        self._commands.put(gang_pb2.Stop())
        if (joining := self._joining) is not None:
            joining.set()

    # ---- engine thread -------------------------------------------------------------------------------------------

    def _run_epoch(self, epoch: gang_pb2.Epoch) -> None:
        config, engine_config = self.config, self.config.engine
        torch.set_num_threads(engine_config.threads or max(1, (os.cpu_count() or 1) // config.ranks_on_host))
        device = resolve_device(engine_config.device)
        model = ModelConfig.from_folder(engine_config.model_dir)
        dtype = resolve_dtype(engine_config, model)
        expert_map = ExpertMap.from_proto(epoch.layers)
        self._enter(epoch, gang_pb2.Progress.STAGE_WEIGHTS)
        weights = rank_weights(
            engine_config, model, expert_map, config.rank, TORCH_DTYPES[dtype], device, self._report_loading
        )
        self._enter(epoch, gang_pb2.Progress.STAGE_GROUP)
        self._exchange = exchange = self._join_exchange(epoch, model, weights.embedding.dtype, device)
        members = [member.rank for member in epoch.members]
        try:
            self._enter(epoch, gang_pb2.Progress.STAGE_FIRST_EXCHANGE)
            check_exchange(exchange, model.hidden_size, weights.embedding.dtype, device)
            runner = Runner(engine_config, model, weights, expert_map, members, exchange)
            scheduler = Scheduler(
                runner.blocks,
                engine_config.max_num_batched_tokens,
                engine_config.max_num_seqs,
                engine_config.prefix_cache,
                engine_config.prefill_step_ratio,
            )
            counts = [layer.routed.tokens_E for layer in runner.model.moe_layers]
            expert_tokens = dict(zip(model.moe_layers, counts, strict=True))
            metrics = RankMetrics(config.gang_id, config.rank, epoch.epoch, exchange, runner.clock, expert_tokens)
            header = gang_pb2.StepOutput(
                gang_id=config.gang_id, epoch=epoch.epoch, rank=config.rank, incarnation=config.incarnation
            )
            server = TokenServer(header, self._inbox, model.vocab_size, runner.max_model_len)
            peers = [member.address for member in epoch.members if member.rank != config.rank]
            wake = gang_pb2.WakeRequest(gang_id=config.gang_id, epoch=epoch.epoch)

            def publish(step: int, emitted: list[Emitted]) -> None:
                self._loop.call_soon_threadsafe(server.publish, step, emitted, self._load())

            def wake_peers(step: int) -> None:
                asyncio.run_coroutine_threadsafe(self._wake(peers, wake, step), self._loop)

            self._engine = Engine(runner, scheduler, exchange, self._inbox, metrics, publish, wake_peers)
            self._do(self._serve(server))
            self._lifeline.send(
                gang_pb2.RankReport(
                    epoch_ready=gang_pb2.EpochReady(epoch=epoch.epoch, max_model_len=runner.max_model_len, dtype=dtype)
                )
            )
            self._engine.run()
            metrics.flush()
        finally:
            exchange.close()

    def _join_exchange(
        self, epoch: gang_pb2.Epoch, model: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> Exchange:
        index = [member.rank for member in epoch.members].index(self.config.rank)
        engine, size = self.config.engine, len(epoch.members)
        if size == 1:
            return LocalExchange()
        top_k, row_bytes, timeout_s = (
            model.experts_per_token,
            model.hidden_size * dtype.itemsize,
            engine.exchange_timeout_s,
        )
        if device.type == "cpu" and engine.exchange != "torch":
            # The first exchange has a row for everybody.
            capacity = max(engine.max_num_batched_tokens, size) * top_k
            return self._join_mesh(epoch, MeshShape(capacity, top_k, row_bytes, timeout_s))
        where = (epoch.store_address, epoch.epoch, index, size, self.config.host, device)
        hosts = [member.host for member in epoch.members]
        return TorchExchange(*where, top_k, row_bytes, timeout_s, hosts=hosts)

    def _join_mesh(self, epoch: gang_pb2.Epoch, shape: MeshShape) -> Exchange:
        peers = [Peer(each.rank, each.incarnation, each.host, each.exchange_address) for each in epoch.members]
        self._joining = joining = AbortSignal()
        if self._inbox.stopped:
            joining.set()
        exchange = join_mesh(
            self._listener, epoch.epoch, peers, shape, joining, JOIN_SECONDS, self.config.engine.exchange
        )
        self._joining = None
        return exchange

    def _enter(self, epoch: gang_pb2.Epoch, stage: gang_pb2.Progress.Stage.ValueType) -> None:
        self._lifeline.send(gang_pb2.RankReport(progress=gang_pb2.Progress(epoch=epoch.epoch, stage=stage)))

    def _report_loading(self, progress: LoadProgress) -> None:
        self._weights_bytes_read = progress.read
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
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # ---- event loop ----------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        # Until the epoch is ready nobody has this rank's address from the leader; connections wait for `_serve`.
        self._server = server = grpc.aio.server(options=SERVER_OPTIONS)
        config, host = self.config, self.config.host

        def bind(port: int) -> int:
            return int(server.add_insecure_port(join_address(host, port)))

        self._listener = ExchangeListener(config.gang_id, config.rank, config.incarnation, host, config.exchange_ports)
        try:
            port = serve_on(config.rank_ports, host, "rank_ports", bind)
        except BaseException:
            self._listener.close()
            raise
        joined = gang_pb2.Joined(
            gang_id=self.config.gang_id,
            rank=self.config.rank,
            incarnation=self.config.incarnation,
            pid=os.getpid(),
            host=self.config.host,
            address=join_address(host, port),
            device=self.config.engine.device,
            versions=_versions(),
            exchange_address=self._listener.address,
        )
        self._lifeline = Lifeline(self.config.leader_address, joined, self._load_report, self._on_command)
        self._lifeline_task = asyncio.create_task(self._hold_lifeline())

    async def _serve(self, server: TokenServer) -> None:
        gang_pb2_grpc.add_RankServicer_to_server(server, self._server)
        await self._server.start()

    async def _hold_lifeline(self) -> None:
        try:
            await self._lifeline.run(self.config.lifeline_timeout_s)
        except ConnectionError as error:
            self._broken = error
        self.stop()

    def _on_command(self, command: gang_pb2.LeaderCommand) -> None:
        if command.WhichOneof("message") == "epoch":
            self._commands.put(command.epoch)
        else:
            self.stop()

    async def _wake(self, peers: list[str], request: gang_pb2.WakeRequest, step: int) -> None:
        wake = gang_pb2.WakeRequest()
        wake.CopyFrom(request)
        wake.step = step
        for address in peers:
            if address not in self._channels:
                self._channels[address] = grpc.aio.insecure_channel(address)
        calls = [gang_pb2_grpc.RankStub(self._channels[address]).Wake(wake, timeout=30) for address in peers]
        for address, result in zip(peers, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(result, BaseException):
                # The exchange will time out on that peer; the leader decides.
                log.warning("rank %d could not wake %s: %s", self.config.rank, address, result)

    async def _close(self) -> None:
        self._lifeline_task.cancel()
        await self._server.stop(grace=0.2)
        self._listener.close()
        for channel in self._channels.values():
            await channel.close(None)

    def _load(self) -> gang_pb2.RankLoad:
        assert self._engine is not None
        load = self._engine.load
        return gang_pb2.RankLoad(
            running=load.running,
            waiting=load.waiting,
            pending_tokens=load.pending_tokens,
            kv_usage_ratio=load.kv_usage_ratio,
            tokens_computed=load.tokens_computed,
            tokens_exchanged=load.tokens_exchanged,
            weights_bytes_read=self._weights_bytes_read,
            max_num_seqs=load.max_num_seqs,
            kv_capacity_tokens=load.kv_capacity_tokens,
            bytes_within_host=self._exchange.bytes_within_host,
            bytes_between_hosts=self._exchange.bytes_between_hosts,
        )

    def _load_report(self) -> gang_pb2.RankLoad | None:
        return self._load() if self._engine is not None else None


def _versions() -> dict[str, str]:
    try:
        caravan = version("caravan")
    except PackageNotFoundError:
        caravan = "unknown"
    return {"caravan": caravan, "torch": torch.__version__, "python": platform.python_version()}
