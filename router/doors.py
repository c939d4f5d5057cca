"""The two doors of a router replica, gRPC and HTTP: its own servers, on ports that replicas of one host share.

Each replica listens on the same addresses with SO_REUSEPORT, and the kernel deals connections out to those that live; a
replica that is replaced finds its port waiting.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import uvicorn
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos import inference_pb2_grpc
from router.config import RouterConfig
from router.errors import RouterConfigError
from router.grpc_guard import MessageGuard
from router.grpc_service import GrpcService
from router.health import SERVICES, Health
from router.http_app import build_app
from router.service import RouterService

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4 * 2**20
"""Longest request either door takes: INVALID_ARGUMENT and 413 beyond."""
MAX_READ_BYTES = 4 * MAX_MESSAGE_BYTES
"""What is longer than this gRPC refuses unread, with RESOURCE_EXHAUSTED: nobody can say which field is at fault."""
READY_GRACE_S = 2.0
"""A replica that starts beside a gang that runs listens once it has reached it, or after this."""
GONE_AFTER_S = 60
"""A client that acknowledges nothing for this long is gone."""
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""An idle HTTP connection is kept for the next request, longer than most clients keep theirs."""


@dataclass(frozen=True)
class ServerCredentials:
    """What the doors show and ask of those who come: nothing yet. TLS and identity have their place here."""

    grpc_credentials: grpc.ServerCredentials | None = None
    ssl_context: ssl.SSLContext | None = None


class _HttpServer(uvicorn.Server):
    """One that leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Doors:
    """Listens from `start` to `stop`. Must be made and used in the event loop of `core`.

    Args:
        core: what answers.
        config: addresses and options.
        credentials: of the servers.

    Attributes:
        grpc_port, http_port: where they listen, once started; of use where the configuration says 0.
    """

    def __init__(self, core: RouterService, config: RouterConfig, credentials: ServerCredentials | None = None) -> None:
        self.grpc_port = config.grpc_port
        self.http_port = config.http_port
        self._core = core
        self._config = config
        self._credentials = credentials or ServerCredentials()
        self._health = Health(lambda: core.is_ready)
        self._grpc: aio.Server | None = None
        self._http: _HttpServer | None = None
        self._http_run: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Opens both.

        Raises:
            RouterConfigError: a port is in use, or the host is no address of this machine.
        """
        await self._wait_until_useful()
        await self._health.start()
        host = self._config.host or "::"
        http_socket = listening_socket(host, self.http_port, "http-port")
        self.http_port = http_socket.getsockname()[1]
        try:
            await self._start_grpc(host)
        except BaseException:
            http_socket.close()
            raise
        await self._start_http(http_socket)

    @property
    def is_alive(self) -> bool:
        """Both listen."""
        return self._http_run is not None and not self._http_run.done() and self._health.is_alive

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more calls, gives those that run `grace_s` to end, and closes. Stopping twice is fine."""
        await self._health.stop()
        if self._http is not None:
            self._http.config.timeout_graceful_shutdown = max(1, round(grace_s))
            self._http.should_exit = True
        if self._grpc is not None:
            await self._grpc.stop(grace_s)
        if self._http_run is not None:
            await asyncio.gather(self._http_run, return_exceptions=True)

    async def _wait_until_useful(self) -> None:
        """The kernel gives a new listener its share of connections at once, also while it knows no rank yet."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_GRACE_S):
                while not self._core.is_ready and not self._is_gang_unready():  # noqa: ASYNC110 - once, and briefly
                    await asyncio.sleep(0.02)

    def _is_gang_unready(self) -> bool:
        """A leader has been heard, and its gang takes no requests yet: that may last."""
        return any(gang.state != "ready" for gang in self._core.get_status().gangs)

    async def _start_grpc(self, host: str) -> None:
        server = aio.server(
            interceptors=[MessageGuard(MAX_MESSAGE_BYTES)],
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", MAX_READ_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_time_ms", GONE_AFTER_S * 500),
                ("grpc.keepalive_timeout_ms", GONE_AFTER_S * 500),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
                ("grpc.keepalive_permit_without_calls", 1),
                *([("grpc.max_connection_age_ms", age)] if (age := self._max_connection_age_ms()) else []),
            ],
        )
        service = GrpcService(self._core)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        inference_pb2_grpc.add_AdminServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        if self._config.grpc_reflection:
            names = (*SERVICES[1:], "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        # gRPC says on stderr that it cannot bind, and nothing of why; a socket of our own does.
        probe = bound_socket(host, self.grpc_port, "grpc-port")
        try:
            address = f"{_bracketed(host)}:{probe.getsockname()[1]}"
            if self._credentials.grpc_credentials is not None:
                self.grpc_port = server.add_secure_port(address, self._credentials.grpc_credentials)
            else:
                self.grpc_port = server.add_insecure_port(address)
        except RuntimeError:
            raise RouterConfigError(f"grpc-port: cannot listen on {address}; give another port") from None
        finally:
            probe.close()
        await server.start()
        self._grpc = server

    def _max_connection_age_ms(self) -> int:
        return round(self._config.max_connection_age_s * 1000)

    async def _start_http(self, listener: socket.socket) -> None:
        config = uvicorn.Config(
            build_app(self._core, MAX_MESSAGE_BYTES),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            loop="none",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        config.load()
        config.ssl = self._credentials.ssl_context
        self._http = _HttpServer(config)
        self._http_run = asyncio.create_task(self._http.serve(sockets=[listener]), name="http")
        while not self._http.started:
            if self._http_run.done():
                await self._http_run
                raise RuntimeError("the HTTP server ended as it started")
            await asyncio.sleep(0.005)


def bound_socket(host: str, port: int, flag: str) -> socket.socket:
    """A TCP socket of an address that other replicas may have too.

    Args:
        host: an address of this machine, an IPv6 one with or without brackets.
        port: 0: any free one.
        flag: the option the port comes from, for the error.

    Raises:
        RouterConfigError: somebody else listens there, or it is no address of this machine.
    """
    bare = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise RouterConfigError(f"host: {bare!r} is no address of this machine ({error.strerror})") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise RouterConfigError(
            f"{flag}: cannot listen on {host}:{port} ({error.strerror}); give another port"
        ) from None
    return made


def listening_socket(host: str, port: int, flag: str) -> socket.socket:
    """One for HTTP: a connection whose client has vanished ends within about GONE_AFTER_S.

    Raises:
        RouterConfigError: somebody else listens there, or it is no address of this machine.
    """
    made = bound_socket(host, port, flag)
    # What is set here, each accepted connection inherits.
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, GONE_AFTER_S // 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, GONE_AFTER_S // 6)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, GONE_AFTER_S * 1000)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
