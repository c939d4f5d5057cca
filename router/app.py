"""The router as a Ray Serve deployment behind Serve's gRPC ingress.

Serve calls a method by its bare RPC name, so names are unique over all services. It awaits nothing of `__init__`, which
runs in the event loop that later runs the methods.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from ray import serve
from ray.serve._private import default_impl
from ray.serve._private.constants import RAY_SERVE_ENABLE_DIRECT_INGRESS
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from protos import inference_pb2
from protos.errors import CaravanError
from router.config import RouterConfig
from router.gang_view import LeaderResolver
from router.metrics import RouterMetrics
from router.service import RouterService

MAX_ONGOING_REQUESTS = 10_000
"""Streams a replica takes before Serve queues: admission is the router's business."""


class Router:
    """One router replica.

    Args:
        config: what is served and the bounds.
        gangs: a handle to each gang's leader deployment, which has `leader_address() -> "HOST:PORT"`.
    """

    def __init__(self, config: RouterConfig, *gangs: DeploymentHandle[Any]) -> None:
        if config.host:
            bind_ingress_to(config.host)
        self._service = RouterService(config, [_resolver(handle) for handle in gangs], RouterMetrics())

    async def Generate(
        self, request: inference_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        async with aclosing(self._service.Generate(request, grpc_context)) as responses:
            async for response in responses:
                yield response
        _raise_for_proxy(grpc_context)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.TokenizeResponse:
        response = await self._service.Tokenize(request, grpc_context)
        _raise_for_proxy(grpc_context)
        return response

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.DetokenizeResponse:
        response = await self._service.Detokenize(request, grpc_context)
        _raise_for_proxy(grpc_context)
        return response

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.Model:
        response = await self._service.GetModel(request, grpc_context)
        _raise_for_proxy(grpc_context)
        return response

    async def GetStatus(
        self, request: inference_pb2.GetStatusRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.Status:
        return await self._service.GetStatus(request, grpc_context)

    async def close(self) -> None:
        """Ends every stream with UNAVAILABLE, so that Serve has nothing to wait for when it stops the replica."""
        await self._service.close()

    async def check_health(self) -> None:
        """Raises when a new replica would help; that a gang is down is none of those cases."""
        if not self._service.is_alive:
            raise RuntimeError("a task of the router ended; a new replica is needed")


def build_router(
    config: RouterConfig, gangs: Sequence[Any], num_cpus: float = 0.1, env: Mapping[str, str] | None = None
) -> serve.Application:
    """The Serve application to run.

    Args:
        config: what is served and the bounds.
        gangs: the bound leader deployments, one a gang.
        num_cpus: logical CPUs a replica claims.
        num_replicas: router processes; each takes a port of its own from Serve's range.
        env: environment variables of the replicas alone, such as PROMETHEUS_MULTIPROC_DIR.
        env: environment of its process beside the inherited one.
    """
    decorate = serve.deployment(
        name="Router",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": num_cpus, "runtime_env": {"env_vars": dict(env or {})}},
        graceful_shutdown_timeout_s=2,
        health_check_period_s=2,
    )
    deployment: serve.Deployment = decorate(Router)
    return deployment.bind(config, *gangs)


def servicer_functions() -> list[str]:
    """What Serve's gRPC options need to know our services by."""
    return [
        "protos.inference_pb2_grpc.add_InferenceServicer_to_server",
        "protos.inference_pb2_grpc.add_AdminServicer_to_server",
    ]


def bind_ingress_to(host: str) -> None:
    """Makes this process's Serve gRPC server listen on one address. Serve itself knows only all of them."""

    def add_grpc_address(server: grpc.aio.Server, address: str) -> None:
        server.add_insecure_port(f"{host}:{address.rpartition(':')[2]}")

    setattr(default_impl, "add_grpc_address", add_grpc_address)  # noqa: B010


def _resolver(handle: DeploymentHandle[Any]) -> LeaderResolver:
    async def resolve() -> str:
        return str(await handle.leader_address.remote())

    return resolve


def _raise_for_proxy(context: RayServegRPCContext) -> None:
    """Serve's default proxy loses the status of a call that returns; direct ingress logs one that raises as a crash."""
    code: object = context.code()  # 0 until somebody sets it.
    if isinstance(code, grpc.StatusCode) and code != grpc.StatusCode.OK and not RAY_SERVE_ENABLE_DIRECT_INGRESS:
        raise CaravanError(code, context.details())
