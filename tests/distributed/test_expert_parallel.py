"""However the experts are spread, the greedy float32 tokens are the reference's."""

import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import SCOUT, one_expert, write
from tests.distributed.jobs import HIDDEN, Served, Spot, Work
from tests.distributed.processes import Processes
from tests.exactness import Exactness, Reference, Written
from tests.local_engine import prompt
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.rendezvous import RendezvousStore

Requests = list[tuple[int, list[int], int]]
_gangs = itertools.count()
# Prompts that end before, at and past chunks of 37; outputs of 64 and fewer.
REQUESTS: Requests = [
    (number, prompt(50 + number, length), count)
    for number, (length, count) in enumerate(
        [(3, 40), (37, 32), (75, 20), (130, 12), (1, 30), (20, 40), (90, 7), (38, 1)]
    )
]


def serve(
    processes: Processes,
    folder: Path,
    expert_map: ExpertMap,
    members: list[int],
    requests: dict[int, Requests],
    **options: Any,
) -> dict[int, Served]:
    """Run a gang to its end; what each rank did."""
    store, gang = RendezvousStore("127.0.0.1"), f"gang {next(_gangs)}"
    work = Work(folder, expert_map, members, requests, **options)
    size = len(members)
    try:
        served = processes.run("jobs:serve", [(Spot(store.address, index, size), work, gang) for index in range(size)])
    finally:
        store.close()
    assert len({one.steps for one in served}) == 1, "ranks step together"
    return dict(zip(members, served, strict=True))


def spread(members: list[int], requests: Requests = REQUESTS) -> dict[int, Requests]:
    return {rank: requests[index :: len(members)] for index, rank in enumerate(members)}


def check(
    written: Written, exactness: Exactness, served: dict[int, Served], requests: dict[int, Requests], what: str
) -> None:
    config = written.reference.model.config
    for rank, asked in requests.items():
        assert set(served[rank].outputs) == {number for number, _, _ in asked}
        for number, ids, count in asked:
            output = served[rank].outputs[number]
            assert len(output) == count
            exactness.check(written.reference, ids, output, f"{what}, rank {rank}, request {number}")
    # Every row was computed once, by a rank that holds its expert, in every MoE layer; in the last one only rows that a
    # token is drawn from.
    tokens = sum(len(ids) + count - 1 for asked in requests.values() for _, ids, count in asked)
    if all(one.num_preemptions == 0 for one in served.values()):
        by_layer = Counter[int]()
        for one in served.values():
            for (layer, _), count in one.expert_tokens.items():
                by_layer[layer] += count
        moe_layers = [n for n, layer in enumerate(written.reference.model.model.layers) if layer.is_moe_layer]
        expected = dict.fromkeys(moe_layers, tokens)
        if moe_layers[-1] == config.num_hidden_layers - 1:
            expected[moe_layers[-1]] = sum(count for asked in requests.values() for _, _, count in asked)
        assert by_layer == {layer: rows * config.num_experts_per_tok for layer, rows in expected.items()}
    assert sum(one.bytes_sent for one in served.values()) == sum(one.bytes_received for one in served.values())


def even(written: Written, members: list[int]) -> ExpertMap:
    config = ModelConfig.from_folder(written.folder)
    return ExpertMap.even(config.num_moe_layers, config.num_experts, members)


def random_map(written: Written, members: list[int], seed: int) -> ExpertMap:
    """Any expert on any rank, some with replicas, another for each layer, sizes uneven."""
    config, chance = ModelConfig.from_folder(written.folder), random.Random(seed)

    def replicas() -> tuple[int, ...]:
        count = chance.choice([1, 1, 1, 2, len(members)])
        return tuple(chance.sample(members, min(count, len(members))))

    return ExpertMap(tuple(tuple(replicas() for _ in range(config.num_experts)) for _ in range(config.num_moe_layers)))


@pytest.mark.parametrize(
    ("model", "size", "mode"),
    [
        *itertools.product(["maverick"], [1, 2, 3, 4, 8], ["padded", "counted", "shared", "2 hosts", "own hosts"]),
        *itertools.product(["scout"], [1, 2, 3, 4, 8], ["padded", "shared", "2 hosts"]),
    ],
)
def test_any_number_of_ranks(
    request: pytest.FixtureRequest, processes: Processes, exactness: Exactness, model: str, size: int, mode: str
) -> None:
    written: Written = request.getfixturevalue(model)
    members = list(range(size))
    requests = spread(members)
    transport: dict[str, Any] = {
        "padded": {"padded_limit_bytes": 2**30},
        "counted": {"padded_limit_bytes": 0},
        "shared": {"hosts": 1, "kind": "shared"},
        "2 hosts": {"hosts": 2},
        "own hosts": {"hosts": 8},
    }[mode]
    served = serve(processes, written.folder, even(written, members), members, requests, exchange=transport)
    check(written, exactness, served, requests, f"{model}, EP {size}, {mode}")
    assert all((one.rows_sent > 0) == (size > 1) for one in served.values())


@pytest.mark.parametrize("size", [2, 8])
def test_idle_ranks_compute_for_the_one_that_has_work(
    maverick: Written, processes: Processes, exactness: Exactness, size: int
) -> None:
    members = list(range(size))
    requests = {size // 2: REQUESTS}
    served = serve(processes, maverick.folder, even(maverick, members), members, requests)
    check(maverick, exactness, served, requests, f"{size - 1} idle ranks")
    for rank, one in served.items():
        assert sum(one.expert_tokens.values()) > 0
        assert (one.rows_sent > 0) == (rank == size // 2)


def test_ranks_that_finish_early_and_late(maverick: Written, processes: Processes, exactness: Exactness) -> None:
    members = [0, 1, 2, 3]
    requests = {0: [(0, prompt(1, 5), 2)], 2: [(1, prompt(2, 150), 3), (2, prompt(3, 2), 90)]}
    config = {"max_num_batched_tokens": 16}
    served = serve(processes, maverick.folder, even(maverick, members), members, requests, config=config)
    check(maverick, exactness, served, requests, "early and late")


@pytest.mark.parametrize(
    ("model", "size", "seed"),
    [("maverick", 2, 1), ("maverick", 3, 2), ("maverick", 4, 3), ("maverick", 8, 4), ("scout", 2, 5), ("scout", 3, 6)],
)
def test_random_maps_with_replicas(
    request: pytest.FixtureRequest, processes: Processes, exactness: Exactness, model: str, size: int, seed: int
) -> None:
    written: Written = request.getfixturevalue(model)
    # Ranks in no order, with gaps in their numbers: a process's place is not its rank.
    members = random.Random(seed).sample(range(10), size)
    requests, expert_map = spread(members), random_map(written, members, seed)
    assert expert_map.replicas[0] != expert_map.replicas[1]
    served = serve(processes, written.folder, expert_map, members, requests)
    check(written, exactness, served, requests, f"{model}, random map {seed} over {members}")
    moe_layers = ModelConfig.from_folder(written.folder).moe_layers
    for rank, one in served.items():
        for layer, expert in one.expert_tokens:
            assert rank in expert_map.replicas[moe_layers.index(layer)][expert]


def test_a_rank_without_experts_and_one_with_all(maverick: Written, processes: Processes, exactness: Exactness) -> None:
    members = [0, 1, 2]
    config = ModelConfig.from_folder(maverick.folder)
    # Rank 2 has none, and in the last layer all are on rank 0.
    layers = [tuple((expert % 2,) for expert in range(128))] * (config.num_moe_layers - 1) + [((0,),) * 128]
    requests = spread(members)
    served = serve(processes, maverick.folder, ExpertMap(tuple(layers)), members, requests)
    check(maverick, exactness, served, requests, "a rank without experts")
    assert not served[2].expert_tokens
    assert all(layer != config.moe_layers[-1] for layer, _ in served[1].expert_tokens)


ALWAYS = {1: 3, 3: 120, 5: 3, 7: 64}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, maverick: Written) -> Written:
    """Every token on one expert, another for each layer."""
    folder = tmp_path_factory.mktemp("one")
    overrides = maverick.reference.model.config.to_dict()
    model = write(folder, overrides, edit=lambda model: one_expert(model, ALWAYS.get, lambda _layer: None))
    return Written(folder, Reference(model))


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_token_on_one_expert(one: Written, processes: Processes, exactness: Exactness, replicas: int) -> None:
    members = [0, 1, 2]
    requests = spread(members)
    layer = tuple(tuple(members) if replicas == 3 else (expert % 3,) for expert in range(128))
    served = serve(processes, one.folder, ExpertMap((layer,) * 4), members, requests)
    check(one, exactness, served, requests, "every token on one expert")
    computed = Counter(key for rank in served.values() for key in rank.expert_tokens)
    assert set(computed) == set(ALWAYS.items())
    if replicas == 1:
        assert [set(rank.expert_tokens) for rank in served.values()] == [
            {key for key in ALWAYS.items() if key[1] % 3 == index} for index in members
        ]
    else:
        # Replicas take their rows in turn.
        for key in ALWAYS.items():
            shares = [rank.expert_tokens[key] for rank in served.values()]
            assert max(shares) - min(shares) <= 0.2 * sum(shares)


def test_an_expert_that_no_token_chose(tmp_path: Path, processes: Processes, exactness: Exactness) -> None:
    never = {layer: layer % 16 for layer in range(8)}
    model = write(tmp_path, SCOUT, edit=lambda model: one_expert(model, lambda _layer: None, never.get))
    written, members = Written(tmp_path, Reference(model)), [0, 1, 2, 3]
    requests = spread(members)
    # In each layer the expert that nobody chooses is all that rank 3 has.
    layers = tuple(
        tuple((3,) if expert == never[layer] else (expert % 3,) for expert in range(16)) for layer in range(8)
    )
    served = serve(processes, tmp_path, ExpertMap(layers), members, requests)
    check(written, exactness, served, requests, "an expert no token chose")
    assert not served[3].expert_tokens


def test_two_experts_a_token(tmp_path: Path, processes: Processes, exactness: Exactness) -> None:
    written = Written(tmp_path, Reference(write(tmp_path, {**SCOUT, "num_experts_per_tok": 2})))
    members = [0, 1, 2]
    requests = spread(members)
    served = serve(
        processes, tmp_path, random_map(written, members, 5), members, requests, exchange={"rows_per_token": 2}
    )
    check(written, exactness, served, requests, "two experts a token")


def test_preemption_on_one_rank_while_others_step_on(
    maverick: Written, processes: Processes, exactness: Exactness
) -> None:
    members = [0, 1]
    crowd: Requests = [(number, prompt(number, 30), 40) for number in range(8)]
    requests = {0: crowd, 1: [(100, prompt(100, 10), 100)]}
    config = {"kv_memory_bytes": 14 * 8 * 2 * 2 * 16 * 4 * 16}
    served = serve(processes, maverick.folder, even(maverick, members), members, requests, config=config)
    assert served[0].num_preemptions > 0
    check(maverick, exactness, served, requests, "preemption")


def test_128_experts_over_3_ranks(maverick: Written, processes: Processes, exactness: Exactness) -> None:
    members = [0, 1, 2]
    expert_map = even(maverick, members)
    assert sorted(expert_map.most_experts(rank) for rank in members) == [42, 43, 43]
    requests = spread(members)
    served = serve(processes, maverick.folder, expert_map, members, requests)
    check(maverick, exactness, served, requests, "128 experts over 3 ranks")


def test_rows_and_bytes_are_counted(maverick: Written, processes: Processes) -> None:
    """Counted mode, where every byte is a row's: of what one rank sends, the others' receipts are the proof."""
    members, requests = [0, 1], {0: [(0, prompt(9, 30), 2)]}
    served = serve(
        processes,
        maverick.folder,
        even(maverick, members),
        members,
        requests,
        exchange={"padded_limit_bytes": 0},
        config={"max_num_batched_tokens": 64},
    )
    rows = served[0].rows_sent
    assert rows == sum(served[1].expert_tokens.values()) > 0
    assert served[1].rows_sent == 0
    # Two steps of four dispatches each tell their counts.
    assert served[0].bytes_sent == rows * (HIDDEN * 4 + 8) + 2 * 4 * 8
    assert served[1].bytes_sent == rows * HIDDEN * 4 + 2 * 4 * 8
