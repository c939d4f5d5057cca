"""`caravan down`: ends a server that was started elsewhere on this machine."""

import argparse
import os
import signal
import time

from cluster.errors import ExitCode, ServerError, UsageError
from cluster.state_file import running_servers

# A server is gone 10 s after a signal; this is a little more patient.
BOUND_S = 15.0


def run(arguments: argparse.Namespace) -> int:
    """Ask the server to end and wait until its process is gone.

    Raises:
        UsageError: no server of this user runs there.
        ServerError: it did not end in time.
    """
    servers = running_servers()
    server = next((server for server in servers if server.answers_at(arguments.address)), None)
    if server is None:
        others = ", ".join(server.address for server in servers)
        hint = f"running are: {others}" if others else "none runs at all"
        raise UsageError(
            f"address: no server that this user started on this machine runs at {arguments.address}; {hint}"
        )
    try:
        os.kill(server.pid, signal.SIGTERM)
    except ProcessLookupError:
        return ExitCode.OK
    deadline = time.monotonic() + BOUND_S
    while server.is_alive:
        if time.monotonic() > deadline:
            raise ServerError(f"the server at {server.address}, process {server.pid}, did not end within {BOUND_S:g} s")
        time.sleep(0.05)
    return ExitCode.OK
