"""Makes namespaces, and starts programs in them. Run as `python -ISs launcher.py make|enter …`, never imported.

Only the standard library, and little of it: this starts in about 15 ms. Both forms fork with CLONE_PARENT, so that what
they start is a child of their caller (who can wait for it and signal it) and the launcher itself ends at once.

    make REPORT JSON            process 1 of new namespaces; ends when the caller ends, however that happens
    enter REPORT PID CWD ARG…   ARG… in the namespaces of process PID

REPORT is the number of a file descriptor. On it come the new process's id, then `ready` (make), or why it failed.
"""

import ctypes
import json
import os
import platform
import select
import signal
import sys

CLONE_PARENT = 0x00008000
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 8192, 16384, 1 << 18
SYS_CLONE = {"x86_64": 56, "aarch64": 220}

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def fork_sibling() -> int:
    """0 in the new process, which is a child of this one's parent; else its id."""
    # By hand: libc has no call for it. Python goes on in the copy as it does after a fork, there is only one thread.
    number = ctypes.c_long(SYS_CLONE[platform.machine()])
    flags = ctypes.c_ulong(CLONE_PARENT | signal.SIGCHLD)
    zero = ctypes.c_ulong(0)
    return check(libc.syscall(number, flags, zero, zero, zero, zero), "clone")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    what = f"mount {kind or source} on {target}"
    check(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()), what)


def tmpfs(target: str, size: int, mode: str) -> None:
    os.makedirs(target, exist_ok=True)
    mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode={mode}")


def lay_out(plan: dict) -> None:
    """Mounts of a host: they live in its mount namespace and go with it."""
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    kept = [(path, os.open(path, os.O_PATH)) for path in plan["keep"]]
    tmpfs("/tmp", plan["tmp_bytes"], "1777")
    tmpfs("/dev/shm", plan["shm_bytes"], "1777")
    tmpfs(plan["home"], plan["home_bytes"], "700")
    for path, folder in kept:
        if os.path.isdir(f"/proc/self/fd/{folder}"):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "a").close()
        mount(f"/proc/self/fd/{folder}", path, "", MS_BIND | MS_REC)
        os.close(folder)
    # Only a sysfs mounted in this network namespace shows its interfaces.
    has_groups = os.path.isdir("/sys/fs/cgroup")
    if has_groups:
        os.mkdir("/tmp/cgroup")
        mount("/sys/fs/cgroup", "/tmp/cgroup", "", MS_BIND | MS_REC)
    mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if has_groups:
        mount("/tmp/cgroup", "/sys/fs/cgroup", "", MS_MOVE)
        os.rmdir("/tmp/cgroup")
    with open("/tmp/names", "w") as names:
        names.write(plan["names"])
    mount("/tmp/names", "/etc/hosts", "", MS_BIND)
    os.unlink("/tmp/names")
    for folder in plan["folders"]:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    hostname = plan["hostname"].encode()
    check(libc.sethostname(hostname, len(hostname)), "sethostname")


def make(report: int, plan: dict) -> None:
    # The caller's own end, not that of the thread that started this (which is what a parent-death signal tells), and
    # not that of a pipe, which any fork of the caller would hold open.
    caller = os.pidfd_open(os.getppid())
    if os.getppid() != plan["caller"]:
        return
    check(libc.unshare(NAMESPACES), "unshare")
    if child := fork_sibling():
        os.write(report, f"{child}\n".encode())
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps orphans.
    lay_out(plan)
    os.chdir("/")
    os.write(report, b"ready\n")
    os.close(report)
    poll = select.poll()
    poll.register(caller, select.POLLIN)
    # Ends only with the caller. With this process the kernel ends all of its namespace.
    while not poll.poll():
        pass


def enter(report: int, target: int, folder: str, arguments: list) -> None:
    check(libc.setns(os.pidfd_open(target), NAMESPACES), "setns")
    os.chdir(folder)
    if child := fork_sibling():
        os.write(report, f"{child}\n".encode())
        return
    os.set_inheritable(report, False)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and programs would inherit that.
        signal.signal(number, signal.SIG_DFL)
    os.execvp(arguments[0], arguments)


def main() -> None:
    form, report = sys.argv[1], int(sys.argv[2])
    try:
        if form == "make":
            make(report, json.loads(sys.argv[3]))
        else:
            enter(report, int(sys.argv[3]), sys.argv[4], sys.argv[5:])
    except OSError as error:
        os.write(report, f"{error.errno} {error}\n".encode())
        os._exit(1)
    os._exit(0)


main()
