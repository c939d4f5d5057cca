"""The Serve application: a router in front of a gang, on a Ray that is running."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import ControllerOptions, gRPCOptions

from cluster.config import ServeConfig
from cluster.errors import ServerError, UsageError, one_sentence
from cluster.gang import DEPLOYMENT, GangConfig, build_gang
from cluster.metrics_endpoint import ENVIRONMENT_VARIABLE
from cluster.ports import free_ports
from cluster.ray_launcher import remove_leftovers
from cluster.ray_runtime import within
from router.app import build_router, servicer_functions

APPLICATION = "caravan"


class Deployment:
    """The application on Ray, from `start` to `remove`.

    Args:
        env: Serve's environment, for its controller and replicas (see `cluster.serve_environment`).
        metrics_folder: where routers and ranks write their metrics.
    """

    def __init__(self, config: ServeConfig, env: Mapping[str, str], metrics_folder: Path) -> None:
        self._config = config
        self._env = dict(env)
        self._measured_env = {ENVIRONMENT_VARIABLE: str(metrics_folder)}
        self._started_serve = False
        self._started_application = False

    def start(self) -> None:
        """Deploy; returns once router and leader run, which is before the gang is ready.

        Raises:
            UsageError: this Ray serves a Caravan already.
            ServerError: Serve did not start the application.
        """
        for name in ("ray", "ray.serve"):
            # Serve tells its story on the terminal, which is ours; what matters comes back as an exception.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._check_vacant()
        config = self._config
        proxy_grpc_port, proxy_http_port = free_ports(2)
        try:
            serve.start(
                # Under direct ingress the replicas are the front door; the proxy beside them is Serve's own habit.
                grpc_options=gRPCOptions(
                    port=proxy_grpc_port, grpc_servicer_functions=servicer_functions(), enable_reflection=False
                ),
                http_options={"host": "127.0.0.1", "port": proxy_http_port},
                logging_config={"log_level": "WARNING"},
                controller_options=ControllerOptions(runtime_env={"env_vars": self._env}),
            )
            gang = build_gang(
                GangConfig(
                    config.serve.ranks,
                    config.engine,
                    config.leader,
                    rank_env=self._measured_env,
                    host="" if config.serve.ray_address else "127.0.0.1",
                ),
                self._env,
            )
            router = build_router(config.router, [gang], env=self._env | self._measured_env)
            self._started_application = True
            serve.run(router, name=APPLICATION, route_prefix=None)
        except Exception as error:
            raise ServerError(f"Ray Serve did not start the server: {_last_line(error)}") from error

    def leader_address(self, timeout_s: float = 30.0) -> str:
        """HOST:PORT of the gang's leader.

        Raises:
            ServerError: it did not answer in time.
        """
        try:
            handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
            return str(handle.leader_address.remote().result(timeout_s=timeout_s))
        except Exception as error:
            raise ServerError(f"the gang's leader cannot be reached: {_last_line(error)}") from error

    def remove(self) -> None:
        """Take the application off a Ray that lives on, within about 12 s, and nothing else with it."""
        if self._started_application:
            within(7.0, lambda: serve.delete(APPLICATION))
            within(2.0, remove_leftovers)
        if self._started_serve:
            within(3.0, serve.shutdown)

    def _check_vacant(self) -> None:
        actors: list[dict[str, Any]] = ray.util.list_named_actors(all_namespaces=True)
        self._started_serve = not any(actor["name"] == "SERVE_CONTROLLER_ACTOR" for actor in actors)
        if not self._started_serve and APPLICATION in serve.status().applications:
            raise UsageError(
                f"ray-address: the Ray at {self._config.serve.ray_address} serves a Caravan already; end that with "
                "`caravan down`, or join another Ray"
            )


def serve_environment(grpc_port: int, first_http_port: int, num_http_ports: int) -> dict[str, str]:
    """What Ray Serve reads from its environment, before anything of it starts.

    Clients connect straight to router replicas (direct ingress), on exactly `grpc_port`: the range is half-open.
    A replica opens an HTTP port too, from a range of free ones.
    """
    return {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(grpc_port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_http_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_http_port + num_http_ports),
        # A replica that is replaced takes its port over at once, and one that stops does not wait for load balancers.
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_sentence(lines[-1] if lines else repr(error), 300)
