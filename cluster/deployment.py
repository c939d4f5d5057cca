"""The Serve application: a router in front of a gang, on a Ray that is running."""

import logging
import re
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cluster.config import ServeConfig
from cluster.default_model import default_model_dir
from cluster.errors import ServerError, UsageError, one_sentence
from cluster.gang import DEPLOYMENT, GangConfig, build_gang
from cluster.host import WantedModel
from cluster.metrics_endpoint import ENVIRONMENT_VARIABLE
from cluster.ray_launcher import own_host, remove_leftovers
from cluster.ray_runtime import SERVE_ENVIRONMENT, within
from router.app import build_router

APPLICATION = "caravan"
ROUTER_CPUS = 0.1


class Deployment:
    """The application on Ray, from `start` to `remove`.

    Args:
        metrics_folder: where routers and ranks write their metrics, on every host.
    """

    def __init__(self, config: ServeConfig, metrics_folder: Path) -> None:
        self._config = config
        self._metrics_folder = metrics_folder
        # Processes of a Ray of our own have all this from the start; see RayRuntime.start.
        is_own = not config.serve.ray_address
        self._serve_env = {} if is_own else SERVE_ENVIRONMENT
        self._measured_env = {} if is_own else {ENVIRONMENT_VARIABLE: str(metrics_folder)}
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
        is_joined = bool(config.serve.ray_address)
        here = own_host() if is_joined else ""
        try:
            # Routers have doors of their own: nothing comes in through Serve.
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
            gang = build_gang(
                GangConfig(
                    config.serve.ranks,
                    config.engine,
                    config.leader,
                    rank_env=self._measured_env,
                    host="" if is_joined else "127.0.0.1",
                    model=_wanted(config),
                    placement=config.placement,
                    network=config.network,
                    metrics_folder=self._metrics_folder,
                    metrics_port=config.serve.metrics_port,
                    served_from=here,
                ),
                self._serve_env | self._measured_env,
            )
            router = build_router(
                config.router,
                [gang],
                # What is free on a Ray with hosts of its own is for ranks.
                num_cpus=0 if is_joined else ROUTER_CPUS,
                num_replicas=config.serve.routers,
                env=self._serve_env | self._measured_env,
                # Where clients were told to come.
                host=here,
            )
            self._started_application = True
            serve.run(router, name=APPLICATION, route_prefix=None)
        except Exception as error:
            raise ServerError(f"Ray Serve did not start the server: {_replica_error() or _last_line(error)}") from error

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


def _wanted(config: ServeConfig) -> WantedModel:
    source = "" if config.engine.model_dir == default_model_dir() else str(config.source)
    serve = config.serve
    return WantedModel(source, serve.offline, serve.models_cache_dir, serve.models_cache_bytes)


def _replica_error() -> str:
    """What a replica said as it failed to start, or nothing: Serve's own exception only names the deployment."""
    try:
        deployments = serve.status().applications[APPLICATION].deployments.values()
    except Exception:
        return ""
    told = re.findall(r"^[\w.]*(?:Error|Exception): (.+)$", "\n".join(d.message for d in deployments), re.MULTILINE)
    return one_sentence(told[-1], 300) if told else ""


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_sentence(lines[-1] if lines else repr(error), 300)
