"""Several hosts on one machine, as real as Linux lets them be: for tests, demos and chaos runs. Needs root.

with HostNetwork(4, client=True) as network:
    nodes = start_cluster(network.hosts)
    network[0].popen(["caravan", "serve", "--ray-address", nodes[0].address, "--host", network[0].address])
    ...
    network.cut(network[2])

A host is a net, pid, mount, uts and ipc namespace with a /tmp, /dev/shm and home of its own (`Cell`); a bridge in one
more joins their cables (`HostNetwork`). Process 1 of each watches the process that made it, and the kernel ends what is
in a pid namespace with its process 1, so nothing outlives the harness, even one that is killed.
"""

from tests.hosts.cell import Cell, CellProcess, HostsError, Sizes
from tests.hosts.host import Host
from tests.hosts.network import HostNetwork
from tests.hosts.ray_nodes import RayNode, keep_logs, start_cluster, start_ray, wait_joined
from tests.hosts.requirements import requires_hosts, why_not

__all__ = [
    "Cell",
    "CellProcess",
    "Host",
    "HostNetwork",
    "HostsError",
    "RayNode",
    "Sizes",
    "keep_logs",
    "requires_hosts",
    "start_cluster",
    "start_ray",
    "wait_joined",
    "why_not",
]
