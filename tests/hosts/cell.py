"""Namespaces of their own, held by a process of ours: the ground that hosts, and the network between them, stand on."""

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(__file__).with_name("launcher.py")
START_BOUND_S = 30.0
HOME = "/tmp/home"
MIB = 2**20
FOLDERS = {
    "HOME": HOME,
    "XDG_CACHE_HOME": f"{HOME}/.cache",
    "XDG_CONFIG_HOME": f"{HOME}/.config",
    "XDG_DATA_HOME": f"{HOME}/.local/share",
    "XDG_STATE_HOME": f"{HOME}/.local/state",
    "XDG_RUNTIME_DIR": "/tmp/run",
    "TMPDIR": "/tmp",
}
# What a shell of this machine says of this machine is not true of a host.
_FOREIGN = ("RAY_", "XDG_", "DBUS_", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


class HostsError(RuntimeError):
    """The harness could not do what it was asked; the message says what it tried or waited for."""


class CellProcess(subprocess.Popen[Any]):
    """A `subprocess.Popen` whose `pid` is that of the program in the cell: signals and waits go to it directly."""

    def __init__(self, holder: int, argv: Sequence[str], *, cwd: str, **options: Any) -> None:
        read, write = os.pipe()
        try:
            with _closing(write):
                options["pass_fds"] = (*options.get("pass_fds", ()), write)
                super().__init__(_launcher("enter", write, str(holder), cwd, *argv), **options)
            self.args = list(argv)
            os.waitpid(self.pid, 0)
            self.pid, rest = _answer(read)
        except HostsError:
            self._abandon(127)
            raise
        finally:
            os.close(read)
        if rest:
            self._abandon(self.wait())
            number, _, reason = rest.partition(" ")
            if int(number) == errno.ENOENT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
            raise HostsError(f"{argv[0]} could not be started: {reason}")

    def _abandon(self, returncode: int) -> None:
        self.returncode = returncode
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                stream.close()


@dataclass(frozen=True)
class Sizes:
    """Bounds on a cell's own file systems, in bytes. They are memory only as far as they are filled."""

    tmp: int = 4096 * MIB
    shm: int = 4096 * MIB
    home: int = 4096 * MIB


@dataclass(eq=False)
class Cell:
    """Net, pid, mount, uts and ipc namespaces with their own /tmp, /dev/shm, home and host name.

    A process of ours is process 1 in it. When that ends, the kernel ends everything in the cell, and it ends when the
    process that made the cell ends, be it by SIGKILL. Mounts, interfaces and files of a cell live only in it. All else
    of the file system is the machine's.

    Args:
        hostname: inside.
        sizes: of its file systems.
        shared: files or folders below /tmp or /dev/shm that the cell shall see although it has its own.
        names: text of its /etc/hosts.

    Raises:
        HostsError: the kernel refused.
    """

    hostname: str
    sizes: Sizes = field(default_factory=Sizes)
    shared: tuple[Path, ...] = ()
    names: str = field(default="127.0.0.1 localhost\n", repr=False)
    pid: int = field(init=False, default=0)
    """Of process 1, as this process sees it; 0: not started, or ended."""
    _started: list[CellProcess] = field(init=False, default_factory=list, repr=False)
    _report: int = field(init=False, default=-1, repr=False)
    _namespace: int = field(init=False, default=0, repr=False)

    def begin(self) -> None:
        """Start it; several cells begun in turn start side by side. `wait` is next."""
        plan = {
            "caller": os.getpid(),
            "hostname": self.hostname,
            "names": self.names,
            "tmp_bytes": self.sizes.tmp,
            "shm_bytes": self.sizes.shm,
            "home_bytes": self.sizes.home,
            "home": HOME,
            "folders": list(FOLDERS.values()),
            "keep": _hidden([ROOT, Path(sys.prefix), Path(sys.base_prefix), *self.shared]),
        }
        read, write = os.pipe()
        with _closing(write):
            launcher = subprocess.Popen(
                _launcher("make", write, json.dumps(plan)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(write,),
                start_new_session=True,
            )
        launcher.wait()
        self._report = read

    def wait(self) -> None:
        """Until it stands."""
        try:
            self.pid, rest = _answer(self._report)
        finally:
            os.close(self._report)
            self._report = -1
        if rest != "ready":
            self.kill()
            raise HostsError(f"{self.hostname} could not be made: {rest or 'its first process ended'}")
        self._namespace = os.stat(f"/proc/{self.pid}/ns/pid").st_ino

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """Of its processes: this one's, with its own folders, this interpreter's programs first, this repository."""
        given = dict(env or {})
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        paths = [given.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")]
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        python_path = os.pathsep.join(path for path in paths if path)
        return {**kept, **FOLDERS, "PATH": programs, "PYTHONPATH": python_path, "HOSTNAME": self.hostname, **given}

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        **options: Any,
    ) -> CellProcess:
        """Start a program inside.

        Args:
            argv: looked up in the environment's PATH.
            env: beside `environment`; a PYTHONPATH in it goes ahead of the repository.
            cwd: the repository's root where empty.
            options: of `subprocess.Popen`. By default in a session of its own: a terminal's Ctrl-C is not for it.

        Raises:
            FileNotFoundError: no such program.
            HostsError: the cell is gone.
        """
        if not self.pid:
            raise HostsError(f"{self.hostname} is gone: {argv[0]} cannot be started there")
        options.setdefault("start_new_session", True)
        options.setdefault("stdin", subprocess.DEVNULL)
        words = [os.fspath(word) for word in argv]
        process = CellProcess(self.pid, words, cwd=cwd or str(ROOT), env=self.environment(env), **options)
        self._started = [one for one in self._started if one.returncode is None]
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        input: str | None = None,
        timeout: float = 60,
        check: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end, with captured text; options as of `popen`.

        Raises:
            HostsError: with `check`, it failed.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was killed.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        if input is not None:
            options["stdin"] = subprocess.PIPE
        with self.popen(argv, **options) as process:
            try:
                out, err = process.communicate(input, timeout=timeout)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            reason = (err or out or "").strip()
            raise HostsError(f"{' '.join(map(str, argv))!r} on {self.hostname}: exit {process.returncode}: {reason}")
        return subprocess.CompletedProcess(list(map(str, argv)), process.returncode, out, err)

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """A file of the cell, as a path out here."""
        return Path(f"/proc/{self.pid}/root{os.path.abspath(inside)}")

    def processes(self) -> list[psutil.Process]:
        """Living processes inside, without the one that holds it."""
        if not self.pid:
            return []
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid == self.pid or os.stat(f"/proc/{process.pid}/ns/pid").st_ino != self._namespace:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ip(self, *lines: str, pass_fds: tuple[int, ...] = ()) -> None:
        """Lines of `ip -batch`, inside."""
        self.wait_ip(self.begin_ip(*lines, pass_fds=pass_fds))

    def begin_ip(self, *lines: str, pass_fds: tuple[int, ...] = ()) -> CellProcess:
        """The same, side by side with other cells'; `wait_ip` is next."""
        read, write = os.pipe()
        with open(read, "rb") as source:
            # A pipe holds 64 KiB, which is several times what is ever said.
            with open(write, "w") as batch:
                batch.write("".join(f"{line}\n" for line in lines))
            pipe = subprocess.PIPE
            return self.popen(["ip", "-batch", "-"], stdin=source, stderr=pipe, text=True, pass_fds=pass_fds)

    def wait_ip(self, process: CellProcess) -> None:
        """Raises:
        HostsError: `ip` refused a line.
        """
        with process:
            _, err = process.communicate(timeout=START_BOUND_S)
        if process.returncode:
            raise HostsError(f"`ip` on {self.hostname}: {err.strip()}")

    def signal_kill(self) -> None:
        """Begin `kill`."""
        if self._report >= 0:
            with contextlib.suppress(HostsError):
                self.wait()
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End everything inside, at once and for certain."""
        self.signal_kill()
        pid, self.pid = self.pid, 0
        if not pid:
            return
        # Process 1 ends last, and only when what this process started is waited for.
        deadline = time.monotonic() + START_BOUND_S
        while time.monotonic() < deadline:
            for process in self._started:
                process.poll()
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return
            except ChildProcessError:
                return
            time.sleep(0.002)
        raise HostsError(f"{self.hostname} did not end within {START_BOUND_S:.0f} s of its SIGKILL")


def _launcher(form: str, report: int, *arguments: str) -> list[str]:
    return [sys.executable, "-ISs", str(LAUNCHER), form, str(report), *arguments]


def _answer(report: int) -> tuple[int, str]:
    """The new process's id (0: it was not made), and what was said after it."""
    text = b""
    deadline = time.monotonic() + START_BOUND_S
    while select.select([report], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(report, 4096)
        if not chunk:
            break
        text += chunk
    else:
        raise HostsError(f"the launcher did not answer within {START_BOUND_S:.0f} s")
    # Two processes write, each a line; whichever comes first.
    lines = text.decode().splitlines()
    pid = next((int(line) for line in lines if line.isdigit()), 0)
    rest = "".join(line for line in lines if not line.isdigit())
    if not pid:
        raise HostsError(rest.partition(" ")[2] or "the launcher ended without a word")
    return pid, rest


def _hidden(paths: Iterable[Path]) -> list[str]:
    """Those that a cell's own mounts would hide."""
    resolved = {path.resolve() for path in paths} | {path.absolute() for path in paths}
    below = {str(path) for path in resolved if path.is_relative_to("/tmp") or path.is_relative_to("/dev/shm")}
    return sorted(path for path in below if path not in ("/tmp", "/dev/shm"))


@contextlib.contextmanager
def _closing(number: int) -> Any:
    try:
        yield
    finally:
        os.close(number)
