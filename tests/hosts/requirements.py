"""What hosts on one machine need of it."""

import functools
import os
import shutil
import subprocess
import sys

import pytest

_TRIAL = "unshare --net --pid --fork --mount --uts --ipc ip link add name one type veth peer name two"


@functools.cache
def why_not() -> str:
    """Why there can be no hosts here; empty: there can."""
    if not sys.platform.startswith("linux"):
        return "not Linux"
    if os.geteuid():
        return "not root"
    if not hasattr(os, "pidfd_open"):
        return "no pidfd_open in this Python"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if not shutil.which(program):
            return f"no program `{program}` (Debian package {package})"
    done = subprocess.run(_TRIAL.split(), capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        lines = (done.stderr or f"exit {done.returncode}").strip().splitlines()
        return f"no namespaces or no veth: {lines[-1]}"
    return ""


def requires_hosts() -> pytest.MarkDecorator:
    """Marks tests that are left out, with the reason, where there can be no hosts.

    As root in CI they run in any case, and fail with the reason: there it is a fault of the machine's.
    """
    must = os.environ.get("CI") == "true" and os.geteuid() == 0
    reason = "" if must else why_not()
    return pytest.mark.skipif(bool(reason), reason=f"no hosts here: {reason}")
