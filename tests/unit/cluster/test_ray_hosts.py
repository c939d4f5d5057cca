"""Hosts as Ray tells of them, and that Ray still has what it is asked by, which is private to it."""

import inspect
from pathlib import Path

import pytest
from ray import _raylet
from ray._private import accelerators, services, state
from ray.util.placement_group import placement_group

from cluster import ray_hosts
from cluster.errors import UsageError
from cluster.placement import NODE_ID_LABEL, HostOffer, PlacementRequest, bundles, plan
from cluster.ray_hosts import hosts_at, hosts_from_ray, this_host

# As ray.nodes() of Ray 2.60 returns them, less what nobody reads.
HEAD = {
    "NodeID": "5355",
    "Alive": True,
    "NodeManagerAddress": "10.0.0.1",
    "NodeManagerHostname": "h1",
    "Resources": {"node:__internal_head__": 1.0, "CPU": 2.0, "node:10.0.0.1": 1.0, "memory": 24966848512.0},
    "Labels": {"ray.io/node-id": "5355", "zone": "a"},
}
GPUS = {
    "NodeID": "cd9c",
    "Alive": True,
    "NodeManagerAddress": "10.0.0.2",
    "NodeManagerHostname": "h2",
    "Resources": {"CPU": 3.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "node:10.0.0.2": 1.0},
    "Labels": {"ray.io/node-id": "cd9c"},
}
DEAD = {**GPUS, "NodeID": "2035", "Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": {}, "Labels": {}}


def test_hosts_that_live_with_what_is_free() -> None:
    # What is all claimed, Ray leaves out.
    found = hosts_from_ray([HEAD, GPUS, DEAD], {"5355": {"CPU": 1.9}, "cd9c": {"CPU": 3.0}, "2035": {"CPU": 9.0}})
    assert found == [
        HostOffer("5355", "10.0.0.1", "h1", 1.9, 0.0, 2.0, 0.0, "", HEAD["Labels"], is_head=True),
        HostOffer("cd9c", "10.0.0.2", "h2", 3.0, 0.0, 3.0, 2.0, "H100", GPUS["Labels"]),
    ]
    assert hosts_from_ray([HEAD], {})[0].cpus == 0, "a host that has just joined has told nothing yet"


def test_the_accelerators_label_wins() -> None:
    node = {**GPUS, "Labels": {"ray.io/accelerator-type": "H200"}}
    assert hosts_from_ray([node], {})[0].accelerator == "H200"


def test_this_host_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    host = this_host(5)
    assert (host.address, host.cpus, host.is_head) == ("127.0.0.1", 5, True)
    manager = accelerators.get_accelerator_manager_for_resource("GPU")
    monkeypatch.setattr(manager, "get_current_node_num_accelerators", lambda: 4)
    monkeypatch.setattr(manager, "get_current_node_accelerator_type", lambda: "H100")
    monkeypatch.setattr(manager, "get_current_process_visible_accelerator_ids", lambda: None)
    assert (this_host(5).gpus, this_host(5).accelerator) == (4, "H100")
    monkeypatch.setattr(manager, "get_current_process_visible_accelerator_ids", lambda: ["2", "3"])
    assert this_host(5).gpus == this_host(5).total_gpus == 2
    monkeypatch.setattr(manager, "get_current_process_visible_accelerator_ids", list)
    assert (this_host(5).gpus, this_host(5).accelerator) == (0, "")


def test_ray_still_has_what_it_is_asked_by() -> None:
    assert callable(state.available_resources_per_node)
    for name in ("_initialize_global_state", "node_table", "available_resources_per_node"):
        assert callable(getattr(state.GlobalState, name))
    assert list(inspect.signature(state.GlobalState).parameters) == []
    assert callable(_raylet.GcsClientOptions.create)
    assert services.canonicalize_bootstrap_address("127.0.0.1:6379").endswith(":6379")
    made = bundles(plan(PlacementRequest(1), [HostOffer("5355", "10.0.0.1", cpus=1)]))
    inspect.signature(placement_group).bind(**made, name="x", lifetime="detached")
    assert NODE_ID_LABEL in HEAD["Labels"]


def test_no_ray_on_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda address: None)
    with pytest.raises(
        UsageError, match=r"no Ray answers at auto \(none runs on this host\); start one with `ray start"
    ):
        hosts_at("auto")


def test_an_address_where_no_ray_is(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(self: object) -> None:
        print("C++ speaks", flush=True)
        raise RuntimeError("Failed to connect to GCS.\nPlease check.")

    monkeypatch.setattr(ray_hosts.GlobalState, "node_table", fail)
    with pytest.raises(UsageError, match=r"no Ray answers at 127\.0\.0\.1:1 \(Failed to connect to GCS\. Please check"):
        hosts_at("127.0.0.1:1")
    assert capfd.readouterr().err == ""
