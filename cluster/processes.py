"""Processes this one is answerable for: found, ended within a bound, none left behind."""

import contextlib
import ctypes
import sys
import time

import psutil

_PR_SET_CHILD_SUBREAPER = 36
# Ray names an actor's process after its class.
_RANK = "RankActor"


def adopt_orphans() -> None:
    """Descendants whose parent died become this process's children, so that `descendants` finds them (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """All living processes below this one."""
    try:
        found = psutil.Process().children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if _is_alive(process)]


def end_descendants(grace_s: float, bound_s: float) -> list[int]:
    """End every process below this one: SIGTERM, and SIGKILL after `grace_s`.

    Returns pids that live on after `bound_s` (none, unless the kernel holds one).
    """
    deadline = time.monotonic() + bound_s
    asked = descendants()
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(asked, timeout=grace_s)
    # Whoever is killed may leave children of its own, which then become ours.
    while (left := descendants()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.5)
    return [process.pid for process in left]


def end_rank(pid: int, bound_s: float = 5.0) -> bool:
    """SIGKILL a rank's process on this host; True once it is gone. A number that another process took since is none."""
    try:
        process = psutil.Process(pid)
        if pid and _RANK in " ".join(process.cmdline()):
            process.kill()
            process.wait(bound_s)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        return False
    return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
