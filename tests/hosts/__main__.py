"""Hosts for a command: `python -m tests.hosts --hosts 4 --ray -- COMMAND` runs it on the first, then takes all down."""

import argparse
import os
import sys

from tests.hosts import HostNetwork, HostsError, start_cluster


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    parser.add_argument("--hosts", type=int, default=4, metavar="N", help="(default 4)")
    parser.add_argument("--client", action="store_true", help="one more host, `client`, without Ray")
    parser.add_argument("--ray", action="store_true", help="start Ray on them; the command finds RAY_ADDRESS")
    parser.add_argument("--num-cpus", type=int, default=2, metavar="N", help="logical ones a node (default 2)")
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="of every frame between hosts")
    parser.add_argument("--on", default="", metavar="HOST", help="where the command runs (default: the first)")
    parser.add_argument("--shell", action="store_true", help="a shell instead of a command (also without one)")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="after --")
    given = parser.parse_args()
    if not 1 <= given.hosts <= 64:
        parser.error("--hosts must be from 1 to 64")
    try:
        with HostNetwork(given.hosts, client=given.client) as network:
            return _run(network, given)
    except HostsError as error:
        print(f"tests.hosts: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(network: HostNetwork, given: argparse.Namespace) -> int:
    everyone = [*network.hosts, *([network.client] if given.client else [])]
    by_name = {host.hostname: host for host in everyone}
    where = by_name.get(given.on or network[0].hostname)
    if where is None:
        raise HostsError(f"--on: no host {given.on!r}, there are {', '.join(by_name)}")
    env = {}
    if given.delay:
        how = [network.delay(host, given.delay) for host in everyone]
        print(f"{given.delay:g} ms on every frame that leaves a host, by {how[0]}", file=sys.stderr)
    if given.ray:
        nodes = start_cluster(network.hosts, num_cpus=given.num_cpus)
        env["RAY_ADDRESS"] = nodes[0].address
    print(", ".join(str(host) for host in everyone), file=sys.stderr)
    command = given.command if given.command and not given.shell else [os.environ.get("SHELL", "/bin/bash")]
    try:
        process = where.popen(command, env=env, cwd=os.getcwd(), stdin=None, start_new_session=False)
    except FileNotFoundError:
        raise HostsError(f"there is no program {command[0]!r}") from None
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue  # The terminal told the command too, and what to do is its decision.
        return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
