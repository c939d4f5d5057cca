"""A real server under load while its processes are killed: nobody notices.

    make chaos            # 1,000 streams and 50 events; a table, a picture, and ends with 1 where a goal is missed

Streams, greedy and sampled, go through two routers to four ranks, so many at a time; each is one of 32 requests whose
outputs were taken before the first event. Meanwhile a schedule drawn from a seed (chaos_schedule.py) strikes ranks,
routers and the gang's leader, each time when all is whole again. Judged are

* failed streams: none, whatever happens; clients try again and resume, as the project's client library does;
* outputs: token ids and text are those of the undisturbed server, so that nothing was lost or doubled;
* the worst gap between two messages of a stream around each event, by kind (chaos_report.GOALS);
* the time until all is back, by kind;
* the end: no KV block in use once all streams are done, and no process left.

What a kind of event comes to:

* a killed rank: its lifeline and its peers' connections break, the others enter the next epoch, its streams go on at
  another rank, and it is started anew and taken in by a later epoch;
* a stopped rank: the same, once it has been silent for 3 s;
* a killed router: clients resume at the other one; Serve starts a new one;
* a killed leader: Serve starts another, which ends the ranks and forms the gang anew; streams wait in their routers,
  which submit them again: up to a start of the gang and 60 s at most (the router's `replay_wait_s`).
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.chaos_plot import draw as draw_picture
from tests.chaos_report import Seen, as_json, calm_p99, judge, tabulate
from tests.chaos_schedule import LONG_DECK, Event, Kind, draw
from tests.chaos_streams import NUM_REQUESTS, Load, Told, list_of_requests
from tests.chaos_victims import Victims
from tests.e2e.serving import Server
from tests.soak import IDLE_BOUND_S, not_zero

RANKS, ROUTERS, AT_A_TIME = 4, 2, 16
STREAMS, EVENTS = 1000, 50
WHOLE_BOUND_S = 120.0
"""For all to be back; then the run is given up."""


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seed: int
    streams: int = STREAMS
    """Done at least."""
    events: int = EVENTS
    """At least; they go on until the streams are done."""
    at_a_time: int = AT_A_TIME
    requests: int = NUM_REQUESTS
    calm_rounds: int = 3
    """Of all requests before the first event."""
    deck: tuple[Kind, ...] = LONG_DECK


def start(folder: Path) -> Server:
    """The server that chaos is made for."""
    return Server(folder, "--ranks", str(RANKS), "--routers", str(ROUTERS), "--dtype", "float32")


def undisturbed(server: Server, plan: Plan) -> tuple[dict[int, Told], list[Told]]:
    """Every request's output by its number, and all streams that were run."""
    load = Load(server.address, plan.at_a_time, list_of_requests(plan.requests))
    load.start(plan.requests * plan.calm_rounds)
    told = load.wait()
    reference = {each.asked.number: each for each in told[: plan.requests]}
    for each in told:
        problem = each.failure or each.difference(reference[each.asked.number])
        assert not problem, f"undisturbed: {problem}"
    return reference, told


def make_chaos(server: Server, plan: Plan, progress: Progress) -> Seen:
    """From the first undisturbed stream to the last one's end; the server lives on."""
    task = progress.add_task("undisturbed", total=plan.streams)
    reference, calm = undisturbed(server, plan)
    victims = Victims(server, RANKS, ROUTERS)
    load = Load(server.address, plan.at_a_time, list_of_requests(plan.requests))
    seen = Seen(plan.seed, time.monotonic(), 0.0, calm_p99(calm), [], reference, [])
    load.start()

    def is_enough() -> bool:
        return load.done >= plan.streams and len(seen.struck) >= plan.events

    def show(what: str) -> None:
        progress.update(task, completed=load.done, description=f"{len(seen.struck)} events, {what}")

    try:
        for event in draw(plan.seed, RANKS, ROUTERS, plan.deck):
            # The streams must be under way, and go on until all is back.
            _pause(event, lambda: show("whole"))
            if is_enough():
                break
            show(str(event))
            struck = victims.strike(event, WHOLE_BOUND_S)
            victims.account(struck)
            seen.struck.append(struck)
            if not struck.whole_at:
                seen.trouble.append(f"after {event} all was not back within {WHOLE_BOUND_S:g} s")
                break
            if server.process.poll() is not None:
                seen.trouble.append(f"the server ended: {server.stderr[-500:]}")
                break
        load.stop()
        seen.told = load.wait(lambda: show("the last streams"))
        seen.seconds = time.monotonic() - seen.started_at
        seen.compare()
        seen.left = not_zero(server)
        deadline = time.monotonic() + IDLE_BOUND_S
        while seen.left and time.monotonic() < deadline:
            time.sleep(0.5)
            seen.left = not_zero(server)
    finally:
        load.stop()
        victims.close()
    return seen


def end(server: Server, seen: Seen) -> None:
    """Of the server; what is left of it is noted."""
    server.end()
    for process in server.left:
        with contextlib.suppress(Exception):
            seen.processes.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description:32}"), BarColumn(), TextColumn("{task.completed} streams"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), refresh_per_second=2) as progress:
        yield progress


def _pause(event: Event, show: Callable[[], None]) -> None:
    ends = time.monotonic() + event.pause_s
    while (left := ends - time.monotonic()) > 0:
        show()
        time.sleep(min(0.25, left))


def _keep_logs(server: Server) -> Path | None:
    """Of a server that lives."""
    with contextlib.suppress(StopIteration, OSError, shutil.Error):
        kept = Path(tempfile.mkdtemp(prefix="caravan-chaos-logs-", dir="/tmp"))
        logs = Victims(server, RANKS, ROUTERS).logs
        shutil.copytree(logs, kept, ignore_dangling_symlinks=True, dirs_exist_ok=True)
        return kept
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill a real server's processes.")
    parser.add_argument("--seed", type=int, default=1, help="of the schedule (default 1)")
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"at least (default {STREAMS})")
    parser.add_argument("--events", type=int, default=EVENTS, help=f"at least (default {EVENTS})")
    parser.add_argument("--at-a-time", type=int, default=AT_A_TIME, help=f"streams (default {AT_A_TIME})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was seen")
    parser.add_argument("--png", type=Path, metavar="FILE", default=Path("chaos.png"), help="(default chaos.png)")
    arguments = parser.parse_args()
    if min(arguments.streams, arguments.events, arguments.at_a_time) < 1:
        parser.error("--streams, --events and --at-a-time must be at least 1")
    plan = Plan(arguments.seed, arguments.streams, arguments.events, arguments.at_a_time)
    kept = None
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder:
        server = start(Path(folder) / "server")
        try:
            server.wait_ready()
            with progress_bar() as progress:
                seen = make_chaos(server, plan, progress)
            if judge(seen):
                kept = _keep_logs(server)
            end(server, seen)
        finally:
            server.kill_all()
    missed = judge(seen)
    Console(width=140 if not sys.stdout.isatty() else None).print(tabulate(seen))
    draw_picture(arguments.png, seen)
    print(f"picture: {arguments.png}")
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(seen), indent=1))
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    if missed and kept:
        print(f"the logs of the server's Ray are in {kept}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
