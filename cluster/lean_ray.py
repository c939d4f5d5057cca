"""Starts a Ray of our own with nothing that a server does not use: a GCS, a raylet, and actors' processes.

Ray starts five more Python processes on a head (dashboard and its agent, autoscaler monitor, log monitor, runtime
environment agent) and waits for two of them, which takes longer than all else that a start of a small model does. None
is of use here: no one submits jobs to this Ray, its hosts are fixed, logs are files, metrics are our own, and actors
inherit the environment. All of this is private to Ray, whose version is pinned exactly for such reasons.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Stands where the raylet wants an agent: lives until its parent's end of the pipe is closed. Ray adds arguments.
IDLE_AGENT = "sh -c cat"
SYSTEM_CONFIG = {"enable_metrics_collection": False}
"""For ray.init, beside the below."""
_RAYLET_ARGUMENTS = {
    "--dashboard_agent_command": IDLE_AGENT,
    "--runtime_env_agent_command": IDLE_AGENT,
    # A raylet waits for agents to say their ports, unless it is told them. Nobody listens there.
    "--metrics-agent-port": "1",
    "--metrics_export_port": "1",
    "--runtime_env_agent_port": "1",
}


@contextmanager
def lean_head() -> Iterator[None]:
    """Within it, `ray.init` starts such a Ray. For one thread of a process that starts no other Ray meanwhile."""
    node: Any = importlib.import_module("ray._private.node").Node
    services: Any = importlib.import_module("ray._private.services")
    start_process = services.start_ray_process

    def start_ray_process(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == "raylet":
            command = [*map(_replaced, command), "--dashboard_agent_listen_port=1"]
        return start_process(command, process_type, *args, **kwargs)

    def start_nothing(self: Any, **_: Any) -> None:
        pass

    methods = ("start_monitor", "start_log_monitor", "start_api_server")
    kept = {name: getattr(node, name) for name in methods}
    try:
        for name in methods:
            setattr(node, name, start_nothing)
        services.start_ray_process = start_ray_process
        yield
    finally:
        for name, method in kept.items():
            setattr(node, name, method)
        services.start_ray_process = start_process


def _replaced(argument: str) -> str:
    name = argument.partition("=")[0]
    return f"{name}={_RAYLET_ARGUMENTS[name]}" if name in _RAYLET_ARGUMENTS else argument
