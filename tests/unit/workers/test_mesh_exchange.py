"""The exchange between hosts: who shares memory, what goes over the wire, and how waiting ends."""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.mesh import GANG, join, listeners, mesh, outcomes, peers_of, together
from workers import exchange_join, host_memory
from workers.abort_signal import AbortSignal
from workers.errors import ExchangeError, UserError
from workers.exchange import Exchange, LocalExchange, check_exchange
from workers.exchange_hello import ANSWER_BYTES, Answer, Hello, gang_digest, unpack_answer
from workers.exchange_join import join_mesh
from workers.exchange_links import Peer
from workers.exchange_listener import ExchangeListener
from workers.kernels.build import KernelError
from workers.mesh_exchange import MeshExchange, MeshShape
from workers.plain_exchange import PlainExchange
from workers.prompt_limit import StepWork

A, B, C = "127.0.0.1", "127.0.0.2", "127.0.0.3"
HEADER_BYTES = 64
SHAPE = MeshShape(capacity=64, rows_per_token=1, row_bytes=256, timeout_s=20.0)


def double(x_SD: torch.Tensor, expert_S: torch.Tensor) -> torch.Tensor:
    return x_SD * 2 + expert_S[:, None].to(x_SD.dtype)


def trip(exchange: Exchange, rows: int, seed: int, dim: int = 64) -> None:
    """A step of `rows` random rows for random processes: they come home as if nothing had been sent."""
    chance = torch.Generator().manual_seed(seed * 100 + exchange.index)
    x_RD = torch.randn(rows, dim, generator=chance)
    process_R = torch.randint(0, exchange.size, (rows,), generator=chance)
    expert_R = torch.randint(0, 100, (rows,), generator=chance)
    exchange.agree(StepWork(prompt_tokens=rows))
    for _ in range(2):
        dispatched = exchange.dispatch(x_RD, process_R, expert_R)
        local = LocalExchange().dispatch(x_RD, process_R, expert_R)
        assert torch.equal(
            exchange.combine(double(dispatched.x_SD, dispatched.expert_S), dispatched),
            double(local.x_SD, local.expert_S),
        )


def trips(exchanges: Sequence[Exchange], rows: list[int], seed: int) -> None:
    together(lambda rank: trip(exchanges[rank], rows[rank], seed), len(exchanges))


@pytest.mark.parametrize("hosts", [[A], [A, A], [A, B], [A, A, B], [B, A, B], [A, B, C], [A, B, B, C, C]])
def test_rows_come_home_whatever_the_hosts(hosts: list[str]) -> None:
    chance = random.Random(len(hosts))
    with mesh(hosts) as exchanges:
        for index, exchange in enumerate(exchanges):
            assert exchange.neighbours == [other for other, host in enumerate(hosts) if host == hosts[index]]
        together(lambda rank: check_exchange(exchanges[rank], 64, torch.float32, torch.device("cpu")), len(exchanges))
        for seed in range(5):
            counts = [chance.choice([0, 1, 7, 64]) for _ in hosts]
            trips(exchanges, counts, seed)


def test_agreement_tells_everybodys_work() -> None:
    with mesh([A, B, B]) as exchanges:
        for step in range(3):
            agreed = together(lambda rank, step=step: exchanges[rank].agree(StepWork(rank, 10 * step)), 3)
            assert agreed == [[StepWork(rank, 10 * step) for rank in range(3)]] * 3


def test_traffic_within_a_host_and_between_hosts_is_counted_apart() -> None:
    with mesh([A, A, B]) as exchanges:

        def step(rank: int) -> None:
            exchange = exchanges[rank]
            exchange.agree(StepWork(6))
            x_RD = torch.ones(6, 4)
            # Two to each.
            dispatched = exchange.dispatch(x_RD, torch.arange(6) % 3, torch.arange(6))
            exchange.combine(dispatched.x_SD, dispatched)

        together(step, 3)
        pair = 2 * (4 * 4 + 8) + 2 * 4 * 4
        for exchange, near, far in zip(exchanges, (1, 1, 0), (1, 1, 2), strict=True):
            assert exchange.rows_sent == 4
            assert exchange.bytes_within_host == exchange.received_within_host == near * pair
            # Rows with their experts, results, and a header for each of three messages.
            assert exchange.bytes_between_hosts == exchange.received_between_hosts == far * (pair + 3 * HEADER_BYTES)
            assert exchange.bytes_sent == near * pair + far * (pair + 3 * HEADER_BYTES)


def test_tcp_alone_and_shared_memory_alone() -> None:
    with mesh([A, A], kind="tcp") as exchanges:
        assert [exchange.neighbours for exchange in exchanges] == [[0], [1]]
        together(lambda rank: trip(exchanges[rank], 5, 1), 2)
        # It is the host that counts, not the way.
        assert all(exchange.bytes_within_host > 0 == exchange.bytes_between_hosts for exchange in exchanges)
    with mesh([A, A], kind="shared") as exchanges:
        assert all(exchange.neighbours == [0, 1] for exchange in exchanges)
    with listeners([A, B]) as made:
        peers = peers_of(made)
        found = outcomes(lambda r: join_mesh(made[r], 1, peers, SHAPE, AbortSignal(), 20, "shared"), 2)
    assert all(isinstance(error, UserError) and "exchange: shared" in str(error) for error in found)


@pytest.mark.parametrize("hidden", ["one", "all"])
def test_ranks_that_do_not_see_each_other_take_tcp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hidden: str
) -> None:
    """Other pid namespaces: /proc/PID is somebody else, or nobody."""
    real, opened = os.readlink, []

    def readlink(path: str) -> str:
        opened.append(path)
        if hidden == "one" and len(opened) > 1:
            return real(path)
        return "/dev/null"

    monkeypatch.setattr(host_memory.os, "readlink", readlink)
    with mesh([A, A, A]) as exchanges:
        sizes = sorted(len(exchange.neighbours) for exchange in exchanges)
        assert sizes == ([1, 2, 2] if hidden == "one" else [1, 1, 1])
        for seed in range(3):
            trips(exchanges, [9] * 3, seed)
    assert "rows go over TCP" in caplog.text


def test_another_boot_and_no_memory_take_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "_BOOT_ID", Path("/nowhere"))
        with mesh([A, A]) as exchanges:
            assert all(len(exchange.neighbours) == 1 for exchange in exchanges)

    def no_memory(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(host_memory.os, "posix_fallocate", no_memory)
    with mesh([A, A]) as exchanges:
        assert all(len(exchange.neighbours) == 1 for exchange in exchanges)
        together(lambda rank: trip(exchanges[rank], 9, 0), 2)


@pytest.fixture(params=["one", "all"])
def without_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One host of several has no compiler, or none has."""
    real, asked = exchange_join.memory_bytes, []

    def memory_bytes(shape: MeshShape, ranks: int) -> int:
        asked.append(ranks)
        if request.param == "one" and len(asked) % 3 != 1:
            return real(shape, ranks)
        raise KernelError("no C++ compiler")

    monkeypatch.setattr(exchange_join, "memory_bytes", memory_bytes)


@pytest.mark.parametrize("hosts", [[A, A, A], [A, B, C], [A, B, B]])
def test_hosts_without_kernels_speak_the_same(without_kernels: None, hosts: list[str]) -> None:
    chance = random.Random(1)
    with mesh(hosts) as exchanges:
        kinds = [type(exchange) for exchange in exchanges]
        assert PlainExchange in kinds
        together(lambda rank: check_exchange(exchanges[rank], 64, torch.bfloat16, torch.device("cpu")), 3)
        for seed in range(5):
            trips(exchanges, [chance.choice([0, 1, 7, 64]) for _ in hosts], seed)
        assert sum(each.bytes_between_hosts for each in exchanges) == sum(
            each.received_between_hosts for each in exchanges
        )
        assert sum(each.bytes_within_host for each in exchanges) == sum(each.received_within_host for each in exchanges)
        if hosts == [A, B, C]:
            headers = exchanges[0].bytes_between_hosts - exchanges[0].rows_sent * (64 * 4 + 8)
            assert headers > 0
        for exchange in exchanges:
            with pytest.raises(ValueError, match="for a process that is not in the group"):
                exchange.dispatch(torch.ones(1, 4), torch.tensor([3]), torch.tensor([0]))


def test_without_kernels_megabytes_abort_and_silence(without_kernels: None) -> None:
    rows, dim = 700, 1024
    with mesh([A, B, C], shape=MeshShape(rows, 1, dim * 4, 60.0)) as exchanges:
        together(lambda rank: trip(exchanges[rank], rows, 1, dim), 3)
    with mesh([A, B, C], shape=MeshShape(8, 1, 256, 1.0)) as exchanges:
        found = outcomes(lambda rank: exchanges[rank].agree(StepWork()) if rank else None, 3)
        assert all("rank 0 at 127.0.0.1:" in str(error) and "did not answer" in str(error) for error in found[1:])
    with mesh([A, B, C], shape=SHAPE) as exchanges:
        for exchange in exchanges[1:]:
            threading.Timer(0.3, exchange.abort).start()
        started = time.monotonic()
        found = outcomes(lambda rank: exchanges[rank].agree(StepWork()) if rank else None, 3)
        assert all("it was aborted" in str(error) or "is gone" in str(error) for error in found[1:])
        assert time.monotonic() - started < 10


def test_megabytes_both_ways_at_once() -> None:
    """Far more than sockets hold: nobody may wait for the other to read before it reads itself."""
    rows, dim = 1500, 1024
    shape = MeshShape(rows, 1, dim * 4, 60.0)
    with mesh([A, B, C], shape=shape) as exchanges:
        together(lambda rank: trip(exchanges[rank], rows, 1, dim), 3)
        # From very large to none, and from one rank alone.
        together(lambda rank: trip(exchanges[rank], rows if rank == 1 else 0, 5, dim), 3)
        together(lambda rank: trip(exchanges[rank], 0, 6, dim), 3)


def test_ranks_may_be_a_round_ahead() -> None:
    """A fast peer's next message stands behind the present one while a third is waited for."""
    with mesh([A, B, C]) as exchanges:
        chance = random.Random(1)
        naps = [[chance.choice([0, 0, 0.002, 0.01]) for _ in range(30)] for _ in exchanges]

        def run(rank: int) -> None:
            for seed, nap in enumerate(naps[rank]):
                time.sleep(nap)
                trip(exchanges[rank], seed % 5 * 10, seed)

        together(run, 3)


@pytest.mark.parametrize("hosts", [[A, B, C], [A, A, A], [A, A, B]])
def test_abort_ends_a_call_that_waits(hosts: list[str]) -> None:
    with mesh(hosts) as exchanges:
        ends: list[float] = []

        def wait(rank: int) -> Exception:
            with pytest.raises(ExchangeError) as caught:
                exchanges[rank].agree(StepWork())
            ends.append(time.monotonic())
            return caught.value

        # Rank 2 does not come.
        threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        started = time.monotonic()
        for exchange in exchanges[:2]:
            exchange.abort()
        for thread in threads:
            thread.join(20)
        assert len(ends) == 2
        assert max(ends) - started < 2
        exchanges[1].abort()
        with pytest.raises(ExchangeError, match="it was aborted"):
            exchanges[1].agree(StepWork())
        exchanges[1].close()
        exchanges[1].abort()
        exchanges[1].close()
        with pytest.raises(ExchangeError, match="it was closed"):
            exchanges[1].agree(StepWork())


def test_abort_between_calls_ends_the_next() -> None:
    with mesh([A, B]) as exchanges:
        exchanges[0].abort()
        with pytest.raises(ExchangeError, match="it was aborted"):
            exchanges[0].agree(StepWork())
        with pytest.raises(ExchangeError, match=r"rank 0 at 127\.0\.0\.1:\d+ is gone"):
            exchanges[1].agree(StepWork())


@pytest.mark.parametrize("hosts", [[A, B], [A, A]])
def test_a_stop_that_comes_just_when_the_group_is_joined(hosts: list[str]) -> None:
    """Who holds the signal of the joining sets it a moment late: the first call ends, at once."""
    with listeners(hosts) as made:
        aborts = [AbortSignal(), AbortSignal()]
        exchanges = together(lambda rank: join_mesh(made[rank], 1, peers_of(made), SHAPE, aborts[rank], 20.0), 2)
        aborts[0].set()
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="it was aborted"):
            exchanges[0].agree(StepWork())
        assert time.monotonic() - started < 10
        for exchange in exchanges:
            exchange.close()


@pytest.mark.parametrize("hosts", [[A, B], [A, A]])
def test_silence_is_an_error_in_time(hosts: list[str]) -> None:
    with mesh(hosts, shape=MeshShape(8, 1, 256, 1.0)) as exchanges:
        started = time.monotonic()
        with pytest.raises(ExchangeError, match=r"rank 1 at 127\.0\.0\.\d:\d+ did not answer within 1 s"):
            exchanges[0].agree(StepWork())
        assert 0.9 < time.monotonic() - started < 10


@pytest.mark.parametrize("hosts", [[A, B, C], [A, A, B], [A, A, A]])
def test_who_has_all_it_needs_finishes_although_a_peer_left(hosts: list[str]) -> None:
    """Ranks leave an epoch after its last round; the slower ones still finish that."""
    for slow in range(3):
        with mesh(hosts) as exchanges:

            def last(rank: int, slow: int = slow, exchanges: list[MeshExchange] = exchanges) -> list[StepWork]:
                if rank == slow:
                    time.sleep(0.1)
                agreed = exchanges[rank].agree(StepWork(rank))
                exchanges[rank].close()
                return agreed

            assert together(last, 3) == [[StepWork(0), StepWork(1), StepWork(2)]] * 3


def test_more_rows_than_agreed() -> None:
    with mesh([A, B], shape=MeshShape(64, 1, 256, 2.0)) as exchanges:

        def step(rank: int) -> None:
            exchanges[rank].agree(StepWork(1))
            rows = 3 if rank == 0 else 0
            exchanges[rank].dispatch(torch.ones(rows, 4), torch.ones(rows, dtype=torch.int64), torch.arange(rows))

        found = outcomes(step, 2)
        assert "rank 0" in str(found[1])
        assert "sent more rows than it agreed to" in str(found[1])


def test_rows_that_nobody_could_take() -> None:
    with mesh([A, B]) as exchanges:
        together(lambda rank: exchanges[rank].agree(StepWork(9)), 2)
        with pytest.raises(ValueError, match="row 1 is for a process that is not in the group of 2"):
            exchanges[0].dispatch(torch.ones(2, 4), torch.tensor([0, 2]), torch.tensor([0, 0]))
        with pytest.raises(ValueError, match="64 rows of 256 bytes at most, got 65 of 16"):
            exchanges[0].dispatch(torch.ones(65, 4), torch.zeros(65, dtype=torch.int64), torch.zeros(65))


def header(kind: int, epoch: int, round_number: int, rows: int = 0, magic: int = 0x52415643) -> bytes:
    return struct.pack("<IIQQqqqqq", magic, kind, epoch, round_number, rows, 0, 0, 0, 0)


@pytest.mark.parametrize(
    "message",
    [header(1, 2, 1), header(1, 1, 2), header(2, 1, 1), header(1, 1, 1, rows=5), header(1, 1, 1, rows=-1), b"x" * 64],
    ids=["epoch", "round", "kind", "rows", "fewer than none", "garbage"],
)
def test_what_does_not_belong_to_the_round_is_an_error(message: bytes) -> None:
    with listeners([A]) as (listener,), socket.create_server((B, 0)) as unused:
        me = peers_of([listener])[0]
        peers = [me, Peer(7, 3, B, f"{B}:{unused.getsockname()[1]}")]
        with socket.create_connection((A, int(listener.address.rpartition(":")[2]))) as stranger:
            stranger.sendall(Hello(gang_digest(GANG), 1, 7, 3, 0, 1).pack())
            exchange = join_mesh(listener, 1, peers, SHAPE, AbortSignal(), 10.0)
            assert unpack_answer(stranger.recv(ANSWER_BYTES)) == Answer.WELCOME
            stranger.sendall(message)
            with pytest.raises(ExchangeError, match=r"rank 7 at 127\.0\.0\.2:\d+ sent "):
                exchange.agree(StepWork())
            exchange.close()


# ---- joining -----------------------------------------------------------------------------------------------------


def test_epochs_side_by_side_over_the_same_listeners() -> None:
    with listeners([A, B, C]) as made:
        old = join(made, epoch=1)
        new = join(made[::2], epoch=2)
        together(lambda rank: trip(old[rank], 5, 1), 3)
        together(lambda rank: trip(new[rank], 5, 2), 2)
        for exchange in old:
            exchange.close()
        together(lambda rank: trip(new[rank], 5, 3), 2)
        for exchange in new:
            exchange.close()


def test_a_peer_that_never_comes_is_named() -> None:
    with listeners([A, B]) as made:
        peers = peers_of(made)
        started = time.monotonic()
        with pytest.raises(ExchangeError, match=r"nothing came from rank 1 at 127\.0\.0\.2:\d+"):
            join_mesh(made[0], 1, peers, SHAPE, AbortSignal(), 0.5)
        with pytest.raises(ExchangeError, match=r"nothing came from rank 0 at 127\.0\.0\.1:\d+"):
            join_mesh(made[1], 2, peers, SHAPE, AbortSignal(), 0.5)
        assert time.monotonic() - started < 10


def test_a_closed_port_is_named() -> None:
    with listeners([A, B]) as made:
        peers = peers_of(made)
        made[0].close()
        with pytest.raises(ExchangeError, match=r"rank 0 at \S+ cannot be reached from \S+: Connection refused"):
            join_mesh(made[1], 1, peers, SHAPE, AbortSignal(), 20.0)


def test_joining_can_be_aborted() -> None:
    with listeners([A, B]) as made:
        for rank in range(2):
            abort = AbortSignal()
            threading.Timer(0.3, abort.set).start()
            started = time.monotonic()
            with pytest.raises(ExchangeError, match="it was aborted"):
                join_mesh(made[rank], 1 + rank, peers_of(made), SHAPE, abort, 60.0)
            assert time.monotonic() - started < 10
            abort.set()


def test_another_incarnation_is_refused() -> None:
    with listeners([A, B]) as made, listeners([B]) as others:
        other = ExchangeListener(GANG, 1, 2, B)
        peers = peers_of(made)
        stale = [peers[0], peers_of([other])[0]]
        found = outcomes(lambda r: join_mesh([made[0], other][r], 1, [peers, stale][r], SHAPE, AbortSignal(), 1.0), 2)
        assert "nothing came from rank 1" in str(found[0])
        assert "refused the connection: it expects another incarnation of this rank" in str(found[1])
        other.close()
        assert others


def test_nothing_is_left_behind() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with listeners([A, A, B]) as made:
        for exchange in join(made, epoch=1):
            exchange.close()
        before = open_files()
        for epoch in range(2, 30):
            exchanges = join(made, epoch=epoch)
            trips(exchanges, [3] * 3, epoch)
            for exchange in exchanges:
                exchange.close()
        assert open_files() <= before
    assert threading.active_count() < 20
