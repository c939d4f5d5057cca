"""`caravan serve`: one server in the foreground, from checks to the last process's end.

The main thread only waits: for a signal, or for word from the thread that does everything with Ray. So Ctrl-C works at
every moment, whatever Ray is doing, and ends whatever has been started.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from enum import Enum, auto
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any, NoReturn, TextIO

import grpc
from rich.console import Console

from cluster.config import ServeConfig, load_config
from cluster.default_model import default_model_dir
from cluster.display import LoadingDisplay
from cluster.errors import CommandError, ExitCode, ServerError, UsageError, one_sentence, report
from cluster.fetch import fetch_model, keep_model
from cluster.metrics_endpoint import ENVIRONMENT_VARIABLE, MetricsEndpoint
from cluster.placement import check_ranks
from cluster.ports import check_listens, check_port
from cluster.ray_runtime import SERVE_ENVIRONMENT, RayRuntime
from cluster.state_file import running_servers, this_server, write_state
from protos import gang_pb2, gang_pb2_grpc
from protos.client import Client
from protos.errors import CaravanError
from router.errors import RouterConfigError
from router.model_info import ModelInfo
from router.tokenizer import Tokenizer
from workers.checkpoint_check import check_checkpoint
from workers.errors import UserError
from workers.model_config import ModelConfig

# Flags that are keys of table [serve] too.
SERVE_FLAGS = (
    "model",
    "model_name",
    "ranks",
    "routers",
    "dtype",
    "host",
    "grpc_port",
    "http_port",
    "metrics_port",
    "ray_address",
)
LEADER_SILENCE_S = 60.0
ROUTER_READY_S = 60.0
DEPLOY_BOUND_S = 180.0
# Processes beside ranks and routers: the gang's leader and Serve's controller.
OTHER_ACTORS = 2


class _Stage(Enum):
    DEPLOYED = auto()
    """Router and leader run; what follows is bounded by the leader."""
    READY = auto()
    """The server answers."""


Event = int | _Stage | CommandError
"""A signal's number, or what the serving thread has to say."""


def run(arguments: argparse.Namespace) -> NoReturn:
    """Serve until a signal or a failure, and end this process once every other is gone.

    Raises:
        UsageError: the input cannot work; nothing has been started.
    """
    config = load_config(
        {name: getattr(arguments, name) for name in SERVE_FLAGS},
        arguments.config,
        default_model_dir(),
    )
    # Before what may take hours.
    check_ports(config)
    config = config.at(fetch_model(config, Console(stderr=True)))
    model_lock = keep_model(config.engine.model_dir)
    check(config)
    runtime = RayRuntime(config.serve.ray_address, config.serve.ranks + config.serve.routers + OTHER_ACTORS)
    stdout, stderr = divert_output(runtime.folder / "output.log")
    try:
        code = _Server(config, runtime, LoadingDisplay(Console(file=stderr)), stdout).run()
    except Exception as error:
        known = error if isinstance(error, CommandError) else ServerError(f"the server failed: {error!r}")
        report(known, stderr)
        code = known.exit_code
    with contextlib.suppress(BrokenPipeError):
        stdout.flush()
        stderr.flush()
    if model_lock is not None:
        model_lock.close()
    # Threads of Ray and gRPC may still be about, though no process of theirs: they have no say in how this one ends.
    os._exit(code)


def check(config: ServeConfig) -> None:
    """Everything that can be known to fail before anything is started.

    Raises:
        UsageError: no such model, no tokenizer, more ranks than experts, a port in use.
    """
    folder = config.engine.model_dir
    try:
        model = ModelConfig.from_folder(folder)
        check_ranks(model, config.serve.ranks)
        Tokenizer.from_folder(folder, ModelInfo.from_folder(folder).vocab_size)
        check_checkpoint(folder, model)
    except (UserError, RouterConfigError) as error:
        raise UsageError(str(error)) from None
    check_ports(config)


def check_ports(config: ServeConfig) -> None:
    """Of `check` what needs no model.

    Raises:
        UsageError: a port is in use, or no Ray listens where one should.
    """
    for other in running_servers():
        if other.answers_at(config.grpc_address):
            raise UsageError(
                f"grpc-port: process {other.pid} serves {other.address} already; end it with `caravan down --address "
                f"{other.address}`, or give another port"
            )
    check_port(config.serve.host, config.serve.grpc_port, "grpc-port")
    check_port(config.serve.host, config.serve.http_port, "http-port")
    check_port(config.serve.host, config.serve.metrics_port, "metrics-port")
    if config.serve.ray_address not in ("", "auto"):
        check_listens(config.serve.ray_address, "ray-address")


def divert_output(log: Path) -> tuple[TextIO, TextIO]:
    """Ray and gRPC write to stdout and stderr as they please, from Python and from C++, until this process's last
    moment: from here on to `log`. What is returned goes where stdout and stderr went."""
    own = []
    file = log.open("a", buffering=1, encoding="utf-8")
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        own.append(os.fdopen(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors="backslashreplace"))
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = file
    return own[0], own[1]


class _Server:
    def __init__(self, config: ServeConfig, runtime: RayRuntime, display: LoadingDisplay, stdout: TextIO) -> None:
        self._config = config
        self._runtime = runtime
        self._display = display
        self._stdout = stdout
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._ending = threading.Event()
        # Of cluster.deployment, which only the serving thread imports.
        self._deployment: Any = None

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        state_file: Path | None = None
        metrics: MetricsEndpoint | None = None
        try:
            metrics_folder = self._runtime.folder / "metrics"
            metrics = MetricsEndpoint(self._config.serve.host, self._config.serve.metrics_port, metrics_folder)
            state_file = write_state(this_server(self._config.grpc_address, self._config.metrics_address))
            return self._run(metrics_folder)
        finally:
            self._ending.set()
            # More signals from here on only queue up: the end is bounded, and cut short it would leave processes.
            self._display.close()
            if self._deployment is not None and not self._runtime.is_own:
                self._deployment.remove()
            self._runtime.stop()
            if metrics is not None:
                metrics.close()
            if state_file is not None:
                with contextlib.suppress(OSError):
                    state_file.unlink()

    def _run(self, metrics_folder: Path) -> int:
        threading.Thread(target=self._serve, args=(metrics_folder,), name="serve", daemon=True).start()
        is_ready = False
        bound_s: float | None = DEPLOY_BOUND_S
        while isinstance(event := self._next_event(bound_s), _Stage):
            bound_s = None
            if event == _Stage.READY:
                is_ready = True
                self._display.close()
                config = self._config
                ready = f"grpc={config.grpc_address} http={config.http_address} metrics={config.metrics_address}"
                print(f"ready {ready}", file=self._stdout, flush=True)
        if isinstance(event, CommandError):
            if event.exit_code == ExitCode.SERVER_FAILURE and (logs := self._runtime.keep_logs()):
                raise ServerError(f"{event}; logs are in {logs}")
            raise event
        return ExitCode.OK if is_ready else 128 + event

    def _next_event(self, bound_s: float | None) -> Event:
        try:
            return self._events.get(timeout=bound_s)
        except Empty:
            return ServerError(
                f"Ray has not started router and leader within {DEPLOY_BOUND_S:g} s; has it room for their actors?"
            )

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._events.put(number)

    def _serve(self, metrics_folder: Path) -> None:
        """The serving thread. It never ends: Ray's processes end with the thread that started them."""
        try:
            self._display.stage("starting Ray" if self._runtime.is_own else "joining Ray")
            # Ray Serve imports the same web server, and Ray's start mostly waits. It imports nothing of this itself.
            threading.Thread(target=importlib.import_module, args=("router.doors",), daemon=True).start()
            self._runtime.start({**SERVE_ENVIRONMENT, ENVIRONMENT_VARIABLE: str(metrics_folder)})
            # Imports Ray Serve, which takes a second.
            deployment = importlib.import_module("cluster.deployment")
            self._deployment = deployed = deployment.Deployment(self._config, metrics_folder)
            self._display.stage("starting the router and the gang's leader")
            deployed.start()
            self._events.put(_Stage.DEPLOYED)
            self._watch(deployed)
        except CommandError as error:
            self._events.put(error)
        except BaseException as error:
            self._events.put(ServerError(f"the server failed: {one_sentence(repr(error))}"))
        threading.Event().wait()

    def _watch(self, deployment: Any) -> None:
        """Follow the gang; raises CommandError once it has failed for good."""
        is_announced = False
        heard = time.monotonic()
        while not self._ending.is_set():
            try:
                address = _leader_address(deployment)
                with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
                    request = gang_pb2.WatchRequest(router_id=f"caravan-serve-{os.getpid()}")
                    for view in gang_pb2_grpc.LeaderStub(channel).Watch(request):
                        heard = time.monotonic()
                        _show(view, self._display, is_announced)
                        if view.state == "ready" and not is_announced:
                            self._wait_for_router()
                            self._events.put(_Stage.READY)
                            is_announced = True
            except (grpc.RpcError, _LeaderGoneError) as error:
                if self._ending.is_set():
                    return
                # Serve starts a new leader when one dies.
                self._display.note("the gang's leader is gone; waiting for the next")
                if time.monotonic() - heard > LEADER_SILENCE_S:
                    raise ServerError(f"the gang's leader has been gone for {LEADER_SILENCE_S:g} s ({error})") from None
            time.sleep(0.5)

    def _wait_for_router(self) -> None:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._config.serve.host, self._config.router.host)
        deadline = time.monotonic() + ROUTER_READY_S
        with Client(f"{host}:{self._config.serve.grpc_port}", connect_timeout_s=2, timeout_s=5) as client:
            while True:
                try:
                    client.get_model()
                    return
                except CaravanError as error:
                    if time.monotonic() > deadline:
                        raise ServerError(f"the router did not answer in {ROUTER_READY_S:g} s: {error}") from None
                time.sleep(0.1)


class _LeaderGoneError(Exception):
    """No leader answers at the moment; what else fails is final."""


def _leader_address(deployment: Any) -> str:
    try:
        return str(deployment.leader_address())
    except ServerError as error:
        raise _LeaderGoneError(str(error)) from None


def _show(view: gang_pb2.GangView, display: LoadingDisplay, is_announced: bool) -> None:
    if view.state == "failed":
        raise UsageError(view.detail) if view.is_user_error else ServerError(f"the gang failed: {view.detail}")
    if not is_announced:
        display.view(view)
    elif view.state == "starting" and view.detail.startswith("starting over"):
        display.note(f"epoch {view.epoch} is over, {view.detail}")
    elif view.state == "ready" and view.epoch > 1:
        display.note(f"epoch {view.epoch}: {view.detail or 'every rank is there'}")
