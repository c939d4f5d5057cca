"""The same on GPUs: the model on one, the exchange over NCCL between as many as there are."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import MAVERICK, SCOUT, write
from tests.distributed.jobs import HIDDEN, Spot, Work
from tests.distributed.processes import Processes
from tests.exactness import Exactness, Reference, Written
from tests.local_engine import LocalRank, engine_config, greedy, prompt
from workers.expert_map import ExpertMap
from workers.model_config import ModelConfig
from workers.rendezvous import RendezvousStore
from workers.sampler import sample
from workers.sequence import SamplingParams, Sequence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCE = 1e-4
_gangs = itertools.count()


@pytest.fixture(scope="module", params=[MAVERICK, SCOUT], ids=["maverick", "scout"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    return Written(folder, Reference(write(folder, request.param)))


@pytest.fixture
def exactness() -> Iterator[Exactness]:
    exactness = Exactness()
    yield exactness
    print(exactness.summary)
    exactness.verify()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    pool = Processes(min(torch.cuda.device_count(), 4))
    yield pool
    pool.close()


@pytest.fixture(params=[1, 2, 4])
def size(request: pytest.FixtureRequest) -> int:
    if request.param > torch.cuda.device_count():
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices")
    return int(request.param)


@pytest.mark.parametrize("budget", [17, 512])
def test_logits(model: Written, budget: int) -> None:
    ids = prompt(1, 170)
    rank = LocalRank(engine_config(model.folder, device="cuda", max_num_batched_tokens=budget))
    (got,) = rank.all_logits([greedy(0, ids, 1)])
    assert got.is_cuda
    assert float((got.cpu() - model.reference.logits(ids)).abs().max()) <= TOLERANCE


def test_greedy_tokens(model: Written, exactness: Exactness) -> None:
    prompts = [prompt(length, length) for length in (3, 37, 60, 110)]
    rank = LocalRank(engine_config(model.folder, device="cuda"))
    outputs = rank.generate(greedy(number, ids, 64) for number, ids in enumerate(prompts))
    for ids, output in zip(prompts, outputs, strict=True):
        exactness.check(model.reference, ids, output, f"prompt of {len(ids)}")


def test_bfloat16_runs(model: Written) -> None:
    rank = LocalRank(engine_config(model.folder, device="cuda", dtype="bfloat16"))
    (output,) = rank.generate([greedy(0, prompt(1, 60), 16)])
    assert len(output) == 16


def test_draws_are_the_cpus() -> None:
    logits = 3 * torch.randn(64, 2000, generator=torch.Generator().manual_seed(0))
    sequences = [
        Sequence(("a", n), [1], SamplingParams(temperature=1.0, top_k=n % 3 * 20, top_p=1 - n % 2 * 0.2, seed=n), 9)
        for n in range(64)
    ]
    on_cpu, on_gpu = (sample(values, sequences) for values in (logits, logits.cuda()))
    assert [item.token_id for item in on_gpu] == [item.token_id for item in on_cpu]


@pytest.mark.parametrize("limit", [2**30, 0], ids=["padded", "counted"])
def test_combine_undoes_dispatch(processes: Processes, size: int, limit: int) -> None:
    store, name = RendezvousStore("127.0.0.1"), f"exchange {next(_gangs)}"
    spots = [Spot(store.address, index, size, "cuda") for index in range(size)]
    options = {"padded_limit_bytes": limit}
    processes.run("jobs:open_exchange", [(name, spot, options) for spot in spots])
    # Some everywhere, all to one, none at all but of one.
    for case in ([7, 3, 0, 5], [9, 9, 9, 9], [0, 0, 0, 0], [1, 0, 0, 0]):
        rows = [[(row + index) % size if case[0] != 9 else 0 for row in range(case[index])] for index in range(size)]
        arguments = [
            (name, len(to), to, [row % 128 for row in range(len(to))], HIDDEN, "bfloat16", index, "cuda")
            for index, to in enumerate(rows)
        ]
        for index, trip in enumerate(processes.run("jobs:round_trip", arguments)):
            assert trip.came_home
            assert len(trip.experts) == sum(to.count(index) for to in rows)
    processes.run("jobs:close_exchange", [(name,)] * size)
    store.close()


def test_expert_parallel_tokens(model: Written, processes: Processes, size: int, exactness: Exactness) -> None:
    config, members = ModelConfig.from_folder(model.folder), list(range(size))
    requests = {rank: [(rank, prompt(rank, 30 + rank), 40)] for rank in members}
    work = Work(model.folder, ExpertMap.even(config.num_moe_layers, config.num_experts, members), members, requests)
    store, gang = RendezvousStore("127.0.0.1"), f"gang {next(_gangs)}"
    served = processes.run(
        "jobs:serve", [(Spot(store.address, index, size, "cuda"), work, gang) for index in range(size)], 300
    )
    store.close()
    for rank, one in enumerate(served):
        for number, ids, _ in requests[rank]:
            exactness.check(model.reference, ids, one.outputs[number], f"EP {size}, rank {rank}")
