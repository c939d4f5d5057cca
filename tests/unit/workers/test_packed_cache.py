"""The folder of packs: who makes one, who waits, who takes over, what goes when room is needed, what is left behind."""

import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.packs import BYTES, TENSORS, content, fill, get, header, name, put
from workers import disk_room, packed_cache
from workers.packed_cache import CacheUnusableError, PackedCache, default_cache_folder
from workers.packed_file import PackFile, Writer, damaged_tensors

context = get_context("spawn")


@pytest.fixture
def cache(tmp_path: Path) -> PackedCache:
    return PackedCache(tmp_path / "cache")


# ---- several processes ---------------------------------------------------------------------------------------------


def _slow_fill(folder: str, started: Any, is_stuck: bool) -> None:
    """A process's: packs the first piece, then waits to be killed, or for half a second."""

    def slow(writer: Writer, tick: Callable[[], None]) -> None:
        writer.write("a", memoryview(content(TENSORS[0])[:5000]))
        tick()
        started.set()
        time.sleep(60 if is_stuck else 0.5)
        writer.write("a", memoryview(content(TENSORS[0])[5000:]))
        for tensor in TENSORS[1:]:
            writer.write(tensor.name, memoryview(content(tensor)))

    get(PackedCache(Path(folder)), fill=slow).close()


@pytest.fixture
def start(cache: PackedCache) -> Iterator[Callable[[bool], Any]]:
    """Starts a process that packs; returns it once it is at it."""
    processes = []

    def start(is_stuck: bool) -> Any:
        started = context.Event()
        process = context.Process(target=_slow_fill, args=(str(cache.folder), started, is_stuck))
        process.start()
        processes.append(process)
        assert started.wait(30)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join(10)


def never(writer: Writer, tick: Callable[[], None]) -> None:
    raise AssertionError("packed twice")


def test_who_comes_second_waits_and_sees_progress(cache: PackedCache, start: Any) -> None:
    process = start(False)
    reports: list[tuple[int, int]] = []
    pack = get(cache, fill=never, report=lambda done, total: reports.append((done, total)))
    pack.close()
    assert (5000, BYTES) in reports
    process.join(10)
    assert process.exitcode == 0


def test_who_waits_can_be_stopped(cache: PackedCache, start: Any) -> None:
    start(True)

    def stop(done: int, total: int) -> None:
        raise InterruptedError("stopped")

    with pytest.raises(InterruptedError):
        get(cache, fill=never, report=stop)


def test_when_the_packer_is_killed_another_takes_over(cache: PackedCache, start: Any) -> None:
    process = start(True)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(get, cache) for _ in range(3)]
        time.sleep(0.2)
        assert not any(future.done() for future in waiting)
        os.kill(process.pid, signal.SIGKILL)
        packs = [future.result(30) for future in waiting]
    for pack in packs:
        assert list(damaged_tensors(pack.fd, pack.header)) == []
        pack.close()
    assert os.listdir(cache.folder) == [f"{name()}.pack"]


def test_a_packer_that_gets_nowhere(cache: PackedCache, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start(True)
    monkeypatch.setattr(packed_cache, "STALL_S", 0.3)
    with pytest.raises(CacheUnusableError, match=r"another process has been packing it and got nowhere for 0\.3 s"):
        get(cache, fill=never)


def test_many_at_once_pack_once(cache: PackedCache) -> None:
    packed = []
    gate = threading.Barrier(8)

    def counting(writer: Writer, tick: Callable[[], None]) -> None:
        packed.append(1)
        fill(writer, tick)

    def one(_: int) -> bool:
        gate.wait()
        pack = get(cache, fill=counting)
        is_whole = not list(damaged_tensors(pack.fd, pack.header))
        pack.close()
        return is_whole

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(8)))
    assert len(packed) == 1


def test_two_who_find_it_damaged_pack_once(cache: PackedCache) -> None:
    (path,) = put(cache, 0)
    for _ in range(20):
        path.write_bytes(path.read_bytes()[:-1])
        packed = []

        def counting(writer: Writer, tick: Callable[[], None], packed: list[int] = packed) -> None:
            packed.append(1)
            fill(writer, tick)

        with ThreadPoolExecutor(4) as threads:
            for pack in threads.map(lambda _, counting=counting: get(cache, fill=counting), range(4)):
                pack.close()
        assert len(packed) == 1


# ---- what fails ----------------------------------------------------------------------------------------------------


def failing(error: Exception) -> Callable[[Writer, Callable[[], None]], None]:
    def fail(writer: Writer, tick: Callable[[], None]) -> None:
        writer.write("a", memoryview(content(TENSORS[0])))
        raise error

    return fail


def test_a_disk_that_is_full_while_packing(cache: PackedCache) -> None:
    with pytest.raises(CacheUnusableError) as raised:
        get(cache, fill=failing(OSError(errno.ENOSPC, "No space left on device")))
    assert str(raised.value) == f"{cache.folder}: the disk is full"
    assert os.listdir(cache.folder) == []


def test_a_disk_that_is_full_before(cache: PackedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "free_bytes", lambda folder: 10**6)
    put_bytes = header().file_bytes
    with pytest.raises(CacheUnusableError) as raised:
        get(cache)
    assert str(raised.value).startswith(f"{cache.folder}: no room for a pack of 0.0 MB: 0.0 MB of at most ")
    assert str(raised.value).endswith("are in use there, and 1.0 MB of the disk are free")
    assert put_bytes > 0
    assert os.listdir(cache.folder) == []


def test_a_disk_that_fails(cache: PackedCache) -> None:
    with pytest.raises(CacheUnusableError, match=r"cannot hold packed weights \(Input/output error\)"):
        get(cache, fill=failing(OSError(errno.EIO, "Input/output error")))


def test_what_fill_raises_comes_through(cache: PackedCache) -> None:
    with pytest.raises(ZeroDivisionError):
        get(cache, fill=failing(ZeroDivisionError()))
    assert os.listdir(cache.folder) == []
    get(cache).close()


def test_no_locks_on_this_file_system(cache: PackedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(CacheUnusableError, match="No locks available"):
        get(cache)


def test_a_file_system_that_cannot_reserve(cache: PackedCache, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoFallocate:
        number = errno.EOPNOTSUPP

        def fallocate(self, *_: Any) -> int:
            ctypes.set_errno(self.number)
            return -1

    monkeypatch.setattr(disk_room, "_LIBC", NoFallocate())
    pack = get(cache)
    assert list(damaged_tensors(pack.fd, pack.header)) == []
    pack.close()
    monkeypatch.setattr(NoFallocate, "number", errno.ENOSPC)
    with pytest.raises(CacheUnusableError, match="the disk is full"):
        get(cache, 1)


# ---- room ----------------------------------------------------------------------------------------------------------


def test_the_pack_used_longest_ago_goes_first(cache: PackedCache) -> None:
    size = header().file_bytes
    bounded = PackedCache(cache.folder, limit_bytes=3 * size)
    paths = put(bounded, 1, 2, 3)
    get(bounded, 1).close()  # used just now
    get(bounded, 4).close()
    assert [path.exists() for path in paths] == [True, False, True]
    assert sum(file.nbytes for file in bounded.files()) == 3 * size


def test_a_pack_in_use_never_goes(cache: PackedCache) -> None:
    size = header().file_bytes
    bounded = PackedCache(cache.folder, limit_bytes=2 * size)
    paths = put(bounded, 1, 2)
    used = [PackFile(path) for path in paths]
    with pytest.raises(CacheUnusableError, match="no room for a pack"):
        get(bounded, 3)
    assert all(path.exists() for path in paths)
    used[1].close()
    get(bounded, 3).close()
    assert [path.exists() for path in paths] == [True, False]
    used[0].close()


def test_a_pack_larger_than_the_bound_evicts_nothing(cache: PackedCache) -> None:
    (path,) = put(cache, 1)
    with pytest.raises(CacheUnusableError, match="exceeds the bound"):
        get(PackedCache(cache.folder, limit_bytes=header().file_bytes - 1), 2)
    assert path.exists()


def test_leftovers_of_killed_packers_go_and_those_at_work_stay(cache: PackedCache, start: Any) -> None:
    start(True)  # of number 0
    (cache.folder / f"{name(7)}.partial").write_bytes(bytes(10**6))
    (cache.folder / "notes.txt").write_text("not ours")
    get(cache, 1).close()
    assert sorted(os.listdir(cache.folder)) == sorted([f"{name(0)}.partial", f"{name(1)}.pack", "notes.txt"])


def test_half_of_the_file_system_by_default(cache: PackedCache) -> None:
    cache.folder.mkdir()
    status = os.statvfs(cache.folder)
    assert cache.limit_bytes == status.f_frsize * status.f_blocks // 2
    assert PackedCache(cache.folder, 5).limit_bytes == 5


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("/x/y", "/x/y/caravan/weights"),
        ("", "/home/me/.cache/caravan/weights"),
        ("rel", "/home/me/.cache/caravan/weights"),
    ],
)
def test_the_default_folder(given: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_folder() == Path(found)


def test_what_lies_there(cache: PackedCache, start: Any) -> None:
    assert cache.files() == [], "no folder, no packs"
    start(True)
    used_path, unused_path, damaged_path = put(cache, 1, 2, 3)
    used = PackFile(used_path)
    damaged_path.write_bytes(b"?")
    (cache.folder / f"{name(4)}.partial").touch()
    found = {file.path.name: file for file in cache.files()}
    assert found[f"{name(0)}.partial"].is_in_use
    assert not found[f"{name(4)}.partial"].is_in_use
    assert found[used_path.name].is_in_use
    assert not found[unused_path.name].is_in_use
    assert found[unused_path.name].header.source == "/models/2"
    assert found[damaged_path.name].damage == "it is no packed file"
    used.close()
