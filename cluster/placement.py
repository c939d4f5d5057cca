"""Where ranks and experts go: pure functions from counts and hosts to a plan. No Ray here; see cluster/ray_hosts.py."""

import ipaddress
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from cluster.errors import one_sentence
from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig

NODE_ID_LABEL = "ray.io/node-id"
"""Ray gives this label to each of its hosts."""
# Ray counts in ten-thousandths.
_HAIR = 1e-6
_HOSTS_NAMED = 12


class NoRoomError(RuntimeError):
    """The hosts at hand cannot take the ranks; others, or these at another time, might. One sentence, host by host."""


@dataclass(frozen=True)
class PlacementConfig:
    """Table [placement] of a configuration file: on which hosts a gang's ranks may go.

    Raises:
        UserError: a value is out of its range.
    """

    hosts: int = 0
    """Hosts that the ranks spread over, evenly; 0: as few as have room."""
    accelerator: str = ""
    """Type of accelerator that a host must have, by Ray's name for it, such as "H100"; empty: any, but one for all."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels that a host must have, with their values, as given to `ray start --labels`."""

    def __post_init__(self) -> None:
        if self.hosts < 0:
            raise UserError(f"hosts: must be 1 or more, or 0 for as few as have room; got {self.hosts}")


@dataclass(frozen=True)
class HostOffer:
    """A host and what is free on it."""

    node_id: str
    """Ray's name for it."""
    address: str
    hostname: str = ""
    cpus: float = 0.0
    """Logical CPUs nobody has claimed."""
    gpus: float = 0.0
    """GPUs nobody has claimed."""
    total_cpus: float = 0.0
    """Claimed or not."""
    total_gpus: float = 0.0
    """Claimed or not."""
    accelerator: str = ""
    """Ray's name for its type of accelerator; empty: none, or one Ray does not know."""
    labels: Mapping[str, str] = field(default_factory=dict)
    is_head: bool = False
    """Ray's control store is here. It may take ranks like any other."""

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.address} ({self.hostname})" if self.hostname not in ("", self.address) else self.address


@dataclass(frozen=True)
class PlacementRequest:
    """What a gang needs.

    Raises:
        UserError: a value is out of its range, or there are more hosts than ranks.
    """

    ranks: int
    cpus: float = 1.0
    """Logical CPUs of a rank."""
    gpus: float = 0.0
    """GPUs of a rank."""
    hosts: int = 0
    """As in PlacementConfig."""
    accelerator: str = ""
    """As in PlacementConfig."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """As in PlacementConfig."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"ranks: must be at least 1, got {self.ranks}")
        if self.cpus < 0 or self.gpus < 0 or not (self.cpus or self.gpus):
            raise UserError(f"a rank must claim CPUs or GPUs, got {self.cpus:g} and {self.gpus:g}")
        if self.hosts < 0 or self.hosts > self.ranks:
            raise UserError(
                f"hosts: {self.ranks} ranks cannot spread over {self.hosts} hosts; each takes at least one of them"
            )

    @classmethod
    def of(cls, ranks: int, config: PlacementConfig, cpus: float = 1.0, gpus: float = 0.0) -> "PlacementRequest":
        """`ranks` ranks as `config` wants them placed."""
        return cls(ranks, cpus, gpus, config.hosts, config.accelerator, config.labels)


@dataclass(frozen=True)
class Plan:
    """A host for every rank: `hosts[rank]`. Ranks of one host have consecutive numbers."""

    request: PlacementRequest
    hosts: tuple[HostOffer, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of every rank's host."""
        return tuple(host.address for host in self.hosts)

    @property
    def ranks_by_host(self) -> dict[str, tuple[int, ...]]:
        """Ranks of each host, by its address, in the order of their numbers."""
        ranks: dict[str, tuple[int, ...]] = {}
        for rank, address in enumerate(self.addresses):
            ranks[address] = (*ranks.get(address, ()), rank)
        return ranks


class Bundles(TypedDict):
    """Keyword arguments of `ray.util.placement_group`."""

    bundles: list[dict[str, float]]
    bundle_label_selector: list[dict[str, str]]
    strategy: str


def plan(request: PlacementRequest, hosts: Sequence[HostOffer]) -> Plan:
    """Place a gang.

    It takes the fewest hosts that have room (or exactly `request.hosts`, with counts that differ by at most one), those
    with more room first, then by address. Where ranks have GPUs, all of them are of one type. The order of `hosts` does
    not matter.

    Raises:
        NoRoomError: there is none.
        UserError: a chosen host shares its address with another.
    """
    counts = [_chosen(request, hosts, accelerator) for accelerator in sorted({host.accelerator for host in hosts})]
    if not request.gpus:
        counts = [_chosen(request, hosts, None)]
    found = [chosen for chosen in counts if chosen]
    if not found:
        raise NoRoomError(_no_room(request, hosts))
    best = min(found, key=lambda chosen: (len(chosen), -sum(_room(request, host) for host, _ in chosen)))
    _check_addresses([host for host, _ in best], hosts)
    return Plan(request, tuple(host for host, count in best for _ in range(count)))


def bundles(plan: Plan) -> Bundles:
    """What reserves a plan's room: `placement_group(**bundles(plan), name=…, lifetime="detached")`; bundle i is rank
    i's, on the host that the plan names and no other."""
    request = plan.request
    claims = {"CPU": request.cpus, "GPU": request.gpus}
    claim = {name: float(count) for name, count in claims.items() if count}
    return Bundles(
        bundles=[dict(claim) for _ in plan.hosts],
        bundle_label_selector=[{NODE_ID_LABEL: host.node_id} for host in plan.hosts],
        strategy="PACK",
    )


def gpus_per_rank(device: str, ranks: int, hosts: Sequence[HostOffer]) -> float:
    """GPUs of each rank: 1 where `device` is "cuda", or is "auto" and the hosts have one, free or not, for every rank;
    else 0."""
    has_enough = sum(host.total_gpus for host in hosts) >= ranks
    return 1.0 if device == "cuda" or (device == "auto" and has_enough) else 0.0


def check_ranks(model: ModelConfig, num_ranks: int) -> None:
    """A rank without an expert would only get in the others' way.

    Raises:
        UserError: fewer ranks than one, or more than the model has experts.
    """
    if num_ranks < 1:
        raise UserError(f"ranks: must be at least 1, got {num_ranks}")
    if model.num_moe_layers and num_ranks > model.num_experts:
        raise UserError(
            f"ranks: {num_ranks} are more than the model's {model.num_experts} experts a layer; "
            f"ask for {model.num_experts} or fewer"
        )


def first_expert_map(model: ModelConfig, ranks: Sequence[int]) -> ExpertMap:
    """The map a gang starts with: contiguous runs of experts, sizes differing by at most one (43, 43 and 42 for 128
    experts over 3 ranks), one entry a MoE layer.

    Raises:
        UserError: as `check_ranks`.
    """
    check_ranks(model, len(ranks))
    return ExpertMap.even(model.num_moe_layers, model.num_experts, ranks)


def replicated_expert_map(model: ModelConfig, host_of: Mapping[int, str], spare_slots: int) -> ExpertMap:
    """A first map with redundant replicas, before any load is known: each rank holds `spare_slots` experts more than in
    `first_expert_map`, though none twice.

    Every expert has as many replicas as any other, or one more. Replicas of an expert are on different hosts; a host
    holds one twice only if it has more slots than there are experts.

    Args:
        host_of: the host of every rank.
        spare_slots: 0: `first_expert_map`.

    Raises:
        UserError: as `check_ranks`, or a negative number of slots.
    """
    if spare_slots < 0:
        raise UserError(f"spare_slots: must not be negative, got {spare_slots}")
    even = first_expert_map(model, sorted(host_of))
    if spare_slots == 0 or not even.replicas:
        return even
    num_experts = model.num_experts
    held: list[list[int]] = [[] for _ in range(num_experts)]
    next_expert = 0
    # Experts are dealt round and round, host after host: a host gets a run of them, and so does each of its ranks.
    by_host = sorted(host_of, key=lambda rank: (min(r for r in host_of if host_of[r] == host_of[rank]), rank))
    for rank in by_host:
        for _ in range(min(num_experts, even.most_experts(rank) + spare_slots)):
            held[next_expert].append(rank)
            next_expert = (next_expert + 1) % num_experts
    return ExpertMap((tuple(map(tuple, held)),) * model.num_moe_layers)


def ranks_on_same_host(hosts: Sequence[str]) -> tuple[int, ...]:
    """For each rank, given every rank's host: how many ranks share its host, itself included."""
    ranks_of = Counter(hosts)
    return tuple(ranks_of[host] for host in hosts)


def _chosen(
    request: PlacementRequest, hosts: Sequence[HostOffer], accelerator: str | None
) -> list[tuple[HostOffer, int]]:
    """Hosts, with ranks on each, of one type of accelerator (None: of any); empty: there is no room."""
    offers = [host for host in hosts if accelerator is None or host.accelerator == accelerator]
    rooms = [(host, _room(request, host)) for host in sorted(offers, key=lambda host: _order(request, host))]
    rooms = [(host, room) for host, room in rooms if room > 0]
    if request.hosts:
        least, more = divmod(request.ranks, request.hosts)
        counts = [least + (number < more) for number in range(request.hosts)]
        fits = len(rooms) >= len(counts) and all(room >= n for (_, room), n in zip(rooms, counts, strict=False))
        return [(host, n) for (host, _), n in zip(rooms, counts, strict=False)] if fits else []
    chosen, left = [], request.ranks
    for host, room in rooms:
        if left:
            chosen.append((host, min(room, left)))
            left -= min(room, left)
    return chosen if not left else []


def _order(request: PlacementRequest, host: HostOffer) -> tuple[int, int, int | str, str]:
    """More room first, then by address: numbers before names."""
    try:
        address = ipaddress.ip_address(host.address)
        return (-_room(request, host), address.version, int(address), host.node_id)
    except ValueError:
        # No two of one kind are compared with another: the kinds' numbers differ.
        return (-_room(request, host), 9, host.address, host.node_id)


def _room(request: PlacementRequest, host: HostOffer) -> int:
    """Ranks that a host can take."""
    if _unfit(request, host):
        return 0
    shares = ((host.cpus, request.cpus), (host.gpus, request.gpus))
    return max(0, min(int(free / each + _HAIR) for free, each in shares if each))


def _unfit(request: PlacementRequest, host: HostOffer) -> str:
    """Why a host does not come into question, however much of it is free; empty: it does."""
    for label, value in request.labels.items():
        if label not in host.labels:
            return f"has no label {label}"
        if host.labels[label] != value:
            return f"has label {label} = {host.labels[label]!r}, not {value!r}"
    if request.accelerator and host.accelerator.casefold() != request.accelerator.casefold():
        return f"has accelerator {host.accelerator}" if host.accelerator else "has no accelerator that Ray knows"
    return ""


def _no_room(request: PlacementRequest, hosts: Sequence[HostOffer]) -> str:
    each = " and ".join(
        f"{count:g} {name}{'s' if count != 1 else ''}" for count, name in ((request.cpus, "CPU"), (request.gpus, "GPU"))
        if count
    )  # fmt: skip
    kind = f" ({request.accelerator})" if request.accelerator else ""
    wanted = f"{request.ranks} rank{'s' if request.ranks != 1 else ''} of {each}{kind}"
    if request.hosts:
        least, more = divmod(request.ranks, request.hosts)
        share = f"{least + 1} or {least}" if more else f"{least}"
        wanted += f", {share} on each of {request.hosts} hosts"
    ordered = sorted(hosts, key=lambda host: _order(request, host))
    found = [f"{host.name} {_verdict(request, host)}" for host in ordered[:_HOSTS_NAMED]]
    if len(ordered) > _HOSTS_NAMED:
        found.append(f"{len(ordered) - _HOSTS_NAMED} more hosts have no more room")
    types = {host.accelerator for host in hosts if _room(request, host)}
    one_type = "; GPUs of a gang are all of one type" if request.gpus and len(types) > 1 else ""
    told = "; ".join(found) if found else "there are none"
    return one_sentence(f"no room for {wanted}; hosts: {told}{one_type}; add hosts or ask for fewer ranks", 2000)


def _verdict(request: PlacementRequest, host: HostOffer) -> str:
    if unfit := _unfit(request, host):
        return unfit
    room = _room(request, host)
    of_type = f" of type {host.accelerator}" if request.gpus and host.accelerator else ""
    if room:
        return f"has room for {room}{of_type}"
    if request.gpus and host.gpus < request.gpus:
        return f"has {host.gpus:g} of {host.total_gpus:g} GPUs{of_type} free" if host.total_gpus else "has no GPU"
    return f"has {host.cpus:g} of {host.total_cpus:g} CPUs free"


def _check_addresses(chosen: Sequence[HostOffer], hosts: Sequence[HostOffer]) -> None:
    for host in chosen:
        twins = [other for other in hosts if other.address == host.address and other.hostname != host.hostname]
        if twins:
            raise UserError(
                f"{host.address} is the address of two hosts, {host.hostname} and {twins[0].hostname}; give one of "
                "them another, with `ray start --node-ip-address`"
            )
