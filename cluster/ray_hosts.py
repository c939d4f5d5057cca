"""Hosts of a Ray and what is free on them, as `cluster.placement` wants to know it."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import _raylet
from ray._private import accelerators, services
from ray._private.state import GlobalState, available_resources_per_node

from cluster.errors import UsageError, one_sentence
from cluster.placement import HostOffer

OWN_HOST = "127.0.0.1"
"""Where ranks of a Ray of our own are."""
ACCELERATOR_LABEL = "ray.io/accelerator-type"
ACCELERATOR_RESOURCE = "accelerator_type:"
HEAD_RESOURCE = "node:__internal_head__"


def hosts_from_ray(nodes: Sequence[Mapping[str, Any]], available: Mapping[str, Mapping[str, float]]) -> list[HostOffer]:
    """Hosts that live.

    Args:
        nodes: as `ray.nodes()` returns them.
        available: resources nobody has claimed, by node id. A host that is not in it has nothing free.
    """
    return [_offer(node, available.get(node["NodeID"], {})) for node in nodes if node["Alive"]]


def joined_hosts() -> list[HostOffer]:
    """Hosts of the Ray that this process has joined."""
    return hosts_from_ray(ray.nodes(), available_resources_per_node())  # type: ignore[no-untyped-call]


def hosts_at(address: str) -> list[HostOffer]:
    """Hosts of the Ray at `address`, HOST:PORT or "auto", without joining it. Takes about 15 s where none answers.

    Raises:
        UsageError: none answers.
    """
    # All of this is private to Ray, whose version is pinned; it is how `ray status` asks.
    raylet: Any = _raylet
    try:
        found = services.canonicalize_bootstrap_address(address)
        if found is None:
            raise ConnectionError("none runs on this host")
        state = GlobalState()  # type: ignore[no-untyped-call]
        options = raylet.GcsClientOptions.create(found, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        with _quiet():
            state._initialize_global_state(options)
            nodes, free = state.node_table(), state.available_resources_per_node()  # type: ignore[no-untyped-call]
        return hosts_from_ray(nodes, free)
    except Exception as error:
        raise UsageError(
            f"ray-address: no Ray answers at {address} ({one_sentence(error, 200)}); start one with "
            "`ray start --head`, or leave the flag out"
        ) from None


def this_host(cpus: float) -> HostOffer:
    """The one host of a Ray of our own, before it is started with `cpus` logical CPUs."""
    manager: Any = accelerators.get_accelerator_manager_for_resource("GPU")
    visible = manager.get_current_process_visible_accelerator_ids()
    found = manager.get_current_node_num_accelerators()
    gpus = float(found if visible is None else min(found, len(visible)))
    return HostOffer(
        node_id="",
        address=OWN_HOST,
        hostname=socket.gethostname(),
        cpus=cpus,
        gpus=gpus,
        total_cpus=cpus,
        total_gpus=gpus,
        accelerator=(manager.get_current_node_accelerator_type() or "") if gpus else "",
        is_head=True,
    )


def _offer(node: Mapping[str, Any], free: Mapping[str, float]) -> HostOffer:
    labels = {str(name): str(value) for name, value in node.get("Labels", {}).items()}
    resources = node.get("Resources", {})
    types = [name.removeprefix(ACCELERATOR_RESOURCE) for name in resources if name.startswith(ACCELERATOR_RESOURCE)]
    return HostOffer(
        node_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        hostname=node.get("NodeManagerHostname", ""),
        cpus=free.get("CPU", 0.0),
        gpus=free.get("GPU", 0.0),
        total_cpus=resources.get("CPU", 0.0),
        total_gpus=resources.get("GPU", 0.0),
        accelerator=labels.get(ACCELERATOR_LABEL) or (sorted(types)[0] if types else ""),
        labels=labels,
        is_head=HEAD_RESOURCE in resources,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray's C++ part says on stderr, at length, that nobody answers: what matters is in the exception."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
