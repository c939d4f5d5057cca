"""Compiles the CPU kernels for this very machine, once: the library stays in a cache folder.

Without a compiler ranks compute with torch's own operators, slower and to the same results but for rounding.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from workers.cache_folder import cache_folder

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
FLAGS = (
    *("-O3", "-march=native", "-std=gnu++17", "-fno-exceptions", "-fno-rtti", "-fno-math-errno"),
    *("-fno-trapping-math", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Werror=return-type"),
)
COMPILERS = ("g++", "c++")
COMPILE_SECONDS = 180.0


class KernelError(RuntimeError):
    """The kernels cannot be had on this machine; the message says why and what to do."""


@functools.cache
def load_kernels(cache: Path | None = None) -> ctypes.CDLL:
    """The kernels' library, compiled if it is not in `cache` (default: the user's cache folder); loaded once a process.

    Raises:
        KernelError: no compiler, or it failed, or the library does not load.
    """
    library = _compiled(cache or default_cache())
    # OpenMP's symbols are left open in the library: they must be those of the pool that torch has already.
    for openmp in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")) or [Path("libgomp.so.1")]:
        try:
            ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise KernelError(f"OpenMP's library {openmp} does not load ({error}); install libgomp1") from None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(f"{library}: does not load ({error}); delete it, and it is compiled again") from None


def default_cache() -> Path:
    """$XDG_CACHE_HOME/caravan/kernels, or ~/.cache/caravan/kernels."""
    try:
        return cache_folder("kernels")
    except OSError as error:
        raise KernelError(str(error)) from None


def _compiled(cache: Path) -> Path:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelError(f"no C++ compiler ({', '.join(COMPILERS)}) on this host; install one, such as Debian's g++")
    library = cache / f"{_key(compiler)}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            _wait_for(lock.fileno())  # another rank of this host may be at it
            if not library.exists():
                _compile(compiler, library)
    except OSError as error:
        raise KernelError(f"{cache}: cannot be written ({error}); make it writable, or set XDG_CACHE_HOME") from None
    return library


def _key(compiler: str) -> str:
    """Changes with whatever could change the library: sources, flags, compiler, processor."""
    digest = hashlib.sha256()
    for source in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.cc")]):
        digest.update(source.read_bytes())
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{compiler} does not run ({error})") from None
    digest.update(version + " ".join(FLAGS).encode() + _processor())
    return digest.hexdigest()[:24]


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    names = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(names)})).encode()


def _wait_for(lock: int) -> None:
    give_up = time.monotonic() + COMPILE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise KernelError(f"another process has compiled kernels for {COMPILE_SECONDS:.0f} s") from None
            time.sleep(0.05)


def _compile(compiler: str, library: Path) -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run([compiler, *FLAGS, "-c", str(FOLDER / "kernels.cc"), "-o", str(made)])
        _run([compiler, "-shared", str(made), "-o", str(linked)])
        linked.rename(library)
    log.info("compiled the CPU kernels in %.1f s: %s", time.monotonic() - started, library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} did not compile the kernels within {COMPILE_SECONDS:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise KernelError(f"{command[0]} cannot compile the kernels: {said[0]}")
