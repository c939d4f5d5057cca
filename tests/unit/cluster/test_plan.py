"""Which host every rank gets: packed, even, of one accelerator, by label, or a sentence that tells what is missing."""

import random
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.placement import (
    NODE_ID_LABEL,
    HostOffer,
    NoRoomError,
    PlacementConfig,
    PlacementRequest,
    Plan,
    bundles,
    gpus_per_rank,
    plan,
    replicated_expert_map,
)
from workers.errors import UserError
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig

ACCELERATORS = ("", "A100", "H100")


def offer(number: int, cpus: float = 4, gpus: float = 0, accelerator: str = "", **labels: str) -> HostOffer:
    name = (f"node{number}", f"10.0.0.{number}", f"h{number}")
    return HostOffer(*name, cpus, gpus, 8, gpus, accelerator, labels, is_head=number == 1)


def offers() -> st.SearchStrategy[list[HostOffer]]:
    one = st.tuples(
        st.integers(0, 6), st.integers(0, 4), st.sampled_from(ACCELERATORS), st.sampled_from(("", "a", "b"))
    )
    return st.lists(one, max_size=7).map(
        lambda rows: [
            offer(number, cpus, gpus if kind else 0, kind, **({"zone": zone} if zone else {}))
            for number, (cpus, gpus, kind, zone) in enumerate(rows, start=1)
        ]
    )


def requests() -> st.SearchStrategy[PlacementRequest]:
    return st.builds(
        lambda ranks, hosts, gpus, accelerator, zone: PlacementRequest(
            ranks, 1, gpus, min(hosts, ranks), accelerator, {"zone": zone} if zone else {}
        ),
        st.integers(1, 12),
        st.integers(0, 5),
        st.sampled_from((0, 0, 1, 2)),
        st.sampled_from(("", "", "H100", "h100")),
        st.sampled_from(("", "", "a")),
    )


def room(request: PlacementRequest, host: HostOffer) -> int:
    """The same as in the code under test, said from the request's definition."""
    fits_labels = all(host.labels.get(name) == value for name, value in request.labels.items())
    if not fits_labels or (request.accelerator and host.accelerator.lower() != request.accelerator.lower()):
        return 0
    count = 0
    while (count + 1) * request.cpus <= host.cpus and (count + 1) * request.gpus <= host.gpus:
        count += 1
    return count


def is_possible(request: PlacementRequest, hosts: list[HostOffer], number: int) -> bool:
    """Do any `number` of the hosts do? By trying all."""
    for chosen in combinations(hosts, number):
        if request.gpus and len({host.accelerator for host in chosen}) > 1:
            continue
        rooms = sorted((room(request, host) for host in chosen), reverse=True)
        counts = [request.ranks // number + (i < request.ranks % number) for i in range(number)]
        if request.hosts and all(has >= count for has, count in zip(rooms, counts, strict=True)):
            return True
        if not request.hosts and sum(rooms) >= request.ranks and min(rooms) > 0:
            return True
    return False


def outcome(request: PlacementRequest, hosts: list[HostOffer]) -> Plan | str:
    try:
        return plan(request, hosts)
    except NoRoomError as error:
        return str(error)


def counts_by_host(found: Plan) -> list[int]:
    return [len(ranks) for ranks in found.ranks_by_host.values()]


@given(request=requests(), hosts=offers())
def test_a_plan_keeps_what_was_asked_or_says_what_is_missing(request: PlacementRequest, hosts: list[HostOffer]) -> None:
    numbers = [request.hosts] if request.hosts else range(1, len(hosts) + 1)
    least = next((number for number in numbers if is_possible(request, hosts, number)), None)
    if least is None:
        with pytest.raises(NoRoomError) as caught:
            plan(request, hosts)
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert all(host.address in sentence for host in hosts)
        return
    found = plan(request, hosts)
    assert len(found.hosts) == request.ranks
    by_host = found.ranks_by_host
    assert len(by_host) == least, "as few hosts as do, or as many as asked"
    for ranks in by_host.values():
        assert list(ranks) == list(range(ranks[0], ranks[-1] + 1)), "neighbours share a host"
    for host in set(found.addresses):
        (chosen,) = (each for each in hosts if each.address == host)
        assert len(by_host[host]) <= room(request, chosen)
    if request.gpus:
        assert len({host.accelerator for host in found.hosts}) == 1
    if request.hosts:
        assert max(counts_by_host(found)) - min(counts_by_host(found)) <= 1
    else:
        offered = {host.address: host for host in hosts}
        full = [len(ranks) == room(request, offered[address]) for address, ranks in by_host.items()]
        assert all(full[:-1]), "all but the last"


@given(request=requests(), hosts=offers(), seed=st.integers())
def test_the_order_in_which_hosts_are_told_changes_nothing(
    request: PlacementRequest, hosts: list[HostOffer], seed: int
) -> None:
    shuffled = list(hosts)
    random.Random(seed).shuffle(shuffled)
    assert outcome(request, shuffled) == outcome(request, hosts)


def test_more_room_comes_first_then_addresses_as_numbers() -> None:
    hosts = [offer(10), offer(9), offer(2, cpus=6), offer(3)]
    found = plan(PlacementRequest(16), hosts)
    assert found.ranks_by_host == {
        "10.0.0.2": (0, 1, 2, 3, 4, 5),
        "10.0.0.3": (6, 7, 8, 9),
        "10.0.0.9": (10, 11, 12, 13),
        "10.0.0.10": (14, 15),
    }


def test_a_number_of_hosts_is_kept_and_even() -> None:
    found = plan(PlacementRequest(10, hosts=4), [offer(number) for number in (1, 2, 3, 4, 5)])
    assert counts_by_host(found) == [3, 3, 2, 2]
    assert list(found.ranks_by_host) == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"], "the head like any other"


def test_gpus_are_of_one_type_even_where_more_hosts_are_needed() -> None:
    hosts = [offer(1, 16, 4, "A100"), offer(2, 16, 2, "H100"), offer(3, 16, 3, "H100"), offer(4, 16, 2, "H100")]
    found = plan(PlacementRequest(6, gpus=1), hosts)
    assert found.ranks_by_host == {"10.0.0.3": (0, 1, 2), "10.0.0.2": (3, 4), "10.0.0.4": (5,)}
    four = plan(PlacementRequest(4, gpus=1), hosts)
    assert set(four.addresses) == {"10.0.0.1"}
    fast = plan(PlacementRequest(4, gpus=1, accelerator="H100"), hosts)
    assert counts_by_host(fast) == [3, 1]


def test_fractions_of_a_gpu() -> None:
    found = plan(PlacementRequest(10, cpus=0, gpus=0.1), [offer(1, 0, 1, "H100")])
    assert set(found.addresses) == {"10.0.0.1"}, "ten tenths are one"
    assert bundles(found)["bundles"][0] == {"GPU": 0.1}


def test_what_is_missing_is_told_host_by_host() -> None:
    hosts = [
        offer(1, cpus=8),
        offer(2, 8, 2, "H100"),
        replace(offer(3, 8, 0, "H100"), total_gpus=4),
        offer(4, 8, 8, "A100"),
        offer(5, 8, 8, "H100", zone="b"),
        offer(6, 0, 8, "H100", zone="a"),
    ]
    with pytest.raises(NoRoomError) as caught:
        plan(PlacementRequest(8, gpus=1, accelerator="H100"), hosts[:4])
    assert str(caught.value) == (
        "no room for 8 ranks of 1 CPU and 1 GPU (H100); hosts: 10.0.0.2 (h2) has room for 2 of type H100; "
        "10.0.0.1 (h1) has no accelerator that Ray knows; 10.0.0.3 (h3) has 0 of 4 GPUs of type H100 free; "
        "10.0.0.4 (h4) has accelerator A100; add hosts or ask for fewer ranks"
    )
    with pytest.raises(NoRoomError) as caught:
        plan(PlacementRequest(4, gpus=1, hosts=3, labels={"zone": "a"}), hosts[3:])
    says = str(caught.value)
    assert "4 ranks of 1 CPU and 1 GPU, 2 or 1 on each of 3 hosts" in says
    assert "10.0.0.4 (h4) has no label zone" in says
    assert "10.0.0.5 (h5) has label zone = 'b', not 'a'" in says
    assert "10.0.0.6 (h6) has 0 of 8 CPUs free" in says


def test_what_is_missing_stays_one_sentence_of_many_hosts() -> None:
    with pytest.raises(NoRoomError, match="88 more hosts have no more room") as caught:
        plan(PlacementRequest(2, cpus=9), [offer(number) for number in range(1, 101)])
    assert len(str(caught.value)) < 1000
    with pytest.raises(NoRoomError, match="hosts: there are none"):
        plan(PlacementRequest(1), [])
    with pytest.raises(NoRoomError, match="GPUs of a gang are all of one type"):
        plan(PlacementRequest(4, gpus=1), [offer(1, 4, 2, "A100"), offer(2, 4, 2, "H100")])


def test_an_address_of_two_hosts_is_refused() -> None:
    twin = HostOffer("node9", "10.0.0.2", "stray", 1)
    with pytest.raises(UserError, match=r"10\.0\.0\.2 is the address of two hosts, h2 and stray"):
        plan(PlacementRequest(3), [offer(2), twin])
    assert plan(PlacementRequest(1), [offer(1, cpus=8), offer(2), twin]).addresses == ("10.0.0.1",)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PlacementRequest(0), "ranks: must be at least 1"),
        (lambda: PlacementRequest(2, hosts=3), "hosts: 2 ranks cannot spread over 3 hosts"),
        (lambda: PlacementRequest(2, cpus=0), "must claim CPUs or GPUs"),
        (lambda: PlacementConfig(hosts=-1), "hosts: must be 1 or more"),
    ],
)
def test_impossible_wishes(make, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


def test_bundles_pin_each_rank_to_its_host() -> None:
    found = plan(PlacementRequest(5, gpus=1), [offer(1, 4, 3, "H100"), offer(2, 4, 3, "H100")])
    made = bundles(found)
    assert made["bundles"] == [{"CPU": 1.0, "GPU": 1.0}] * 5
    assert made["bundle_label_selector"] == [{NODE_ID_LABEL: f"node{number}"} for number in (1, 1, 1, 2, 2)]


def test_gpus_are_taken_where_there_is_one_for_every_rank() -> None:
    hosts = [offer(1, 4, 2, "H100"), offer(2), offer(3, 4, 1, "A100")]
    assert [gpus_per_rank("auto", ranks, hosts) for ranks in (1, 3, 4)] == [1, 1, 0]
    assert gpus_per_rank("cpu", 1, hosts) == 0
    assert gpus_per_rank("cuda", 9, hosts) == 1


# ---- redundant replicas -----------------------------------------------------------------------------------------


def model(experts: int) -> ModelConfig:
    text = {"model_type": "llama4_text", "num_hidden_layers": 4, "interleave_moe_layer_step": 2}
    return ModelConfig.from_dict({**text, "num_local_experts": experts})


@given(
    experts=st.integers(1, 40), hosts=st.lists(st.sampled_from("abcd"), min_size=1, max_size=9), spare=st.integers(0, 9)
)
def test_replicas_of_an_expert_are_on_different_hosts(experts: int, hosts: list[str], spare: int) -> None:
    assume(len(hosts) <= experts)
    host_of = dict(enumerate(hosts))
    found = replicated_expert_map(model(experts), host_of, spare)
    even = ExpertMap.even(2, experts, range(len(hosts)))
    assert len(found.replicas) == 2
    if spare == 0:
        assert found == even
    held = {rank: found.experts_of(0, rank) for rank in host_of}
    for rank, mine in held.items():
        assert len(mine) == min(experts, even.most_experts(rank) + spare), "every slot is used, none for a second copy"
    counts = [len(ranks) for ranks in found.replicas[0]]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    if spare == 0:
        return
    for host in set(hosts):
        on_host = [expert for rank in host_of if host_of[rank] == host for expert in held[rank]]
        assert len(on_host) - len(set(on_host)) == max(0, len(on_host) - experts), "twice only where it cannot but be"


def test_two_hosts_and_a_copy_of_everything() -> None:
    found = replicated_expert_map(model(16), {0: "a", 1: "a", 2: "b", 3: "b"}, 4)
    for ranks in found.replicas[0]:
        assert len(ranks) == 2
        assert {rank // 2 for rank in ranks} == {0, 1}
    runs = [found.experts_of(0, rank) for rank in range(4)]
    assert all(b - a == 1 for run in runs for a, b in pairwise(run))
    with pytest.raises(UserError, match="spare_slots: must not be negative"):
        replicated_expert_map(model(16), {0: "a"}, -1)
