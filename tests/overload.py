"""Five times more requests than a real server can take: what those admitted see, and what the others are told.

    make overload        # about two minutes; prints a table

Unloaded is eight streams at once, what two ranks of four sequences take. Overload sends requests at five times the rate
that was measured there; a tenth of those refused come back once, after the delay they were told.
"""

import random
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from protos.client import Client, make_request
from protos.errors import CaravanError
from protos.retries import NO_RETRIES
from tests.e2e.serving import Server

STREAMS, OVERLOAD, SECONDS, TOKENS = 8, 5.0, 40.0, 32
CONFIG = """
[engine]
max_num_seqs = 4
[router]
max_queued_tokens = 2000
"""


@dataclass
class Seen:
    """What clients saw, seconds."""

    gaps: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    finished: int = 0
    came_back: int = 0
    came_back_admitted: int = 0
    failed: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def request(self, client: Client, number: int, comes_back: bool) -> None:
        request = make_request(
            [number % 4000 + 1] * 16, max_tokens=TOKENS, temperature=0, ignore_eos=True, request_id=f"r{number}"
        )
        started = time.monotonic()
        try:
            self.stream(client, request)
        except CaravanError as error:
            with self.lock:
                self.refusals.append(time.monotonic() - started)
                if error.retry_after_s is None:
                    self.failed.append(error.message)
                    return
            if not comes_back:
                return
            time.sleep(error.retry_after_s)
            try:
                self.stream(client, request)
                admitted = True
            except CaravanError:
                admitted = False
            with self.lock:
                self.came_back += 1
                self.came_back_admitted += admitted

    def stream(self, client: Client, request) -> None:
        gaps, last = [], None
        for _ in client.generate(request):
            now = time.monotonic()
            if last is not None:
                gaps.append(now - last)
            last = now
        with self.lock:
            self.gaps += gaps
            self.finished += 1


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def unloaded(client: Client) -> tuple[Seen, float]:
    seen, number = Seen(), iter(range(10**6))
    started = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        for future in [pool.submit(seen.request, client, next(number), False) for _ in range(STREAMS * 6)]:
            future.result()
    return seen, seen.finished / (time.monotonic() - started)


def overloaded(client: Client, rate: float) -> Seen:
    seen, rng = Seen(), random.Random(1)
    count = int(rate * OVERLOAD * SECONDS)
    with ThreadPoolExecutor(400) as pool:
        futures = []
        for number in track(range(count), description="overload", console=Console(stderr=True)):
            # A tenth of those refused come back: were it all of them, the load would grow past five times.
            futures.append(pool.submit(seen.request, client, 10_000 + number, rng.random() < 0.1))
            time.sleep(rng.expovariate(rate * OVERLOAD))
        for future in futures:
            future.result()
    return seen


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "overload.toml"
        config.write_text(CONFIG)
        server = Server(Path(folder) / "server", "--ranks", "2", "--config", str(config))
        try:
            server.wait_ready()
            with Client(server.address, retries=NO_RETRIES) as client:
                unloaded(client)
                calm, rate = unloaded(client)
                storm = overloaded(client, rate)
        finally:
            server.end()
            server.kill_all()
    table = Table("", "unloaded", f"{OVERLOAD:g}x overload", "goal")
    gap = [percentile(seen.gaps, 0.99) * 1e3 for seen in (calm, storm)]
    table.add_row("requests finished", str(calm.finished), str(storm.finished), "")
    table.add_row("gap p50, ms", *(f"{statistics.median(seen.gaps) * 1e3:.1f}" for seen in (calm, storm)), "")
    table.add_row("gap p99, ms", *(f"{value:.1f}" for value in gap), f"<= {2 * gap[0]:.1f}")
    table.add_row("refused", str(len(calm.refusals)), str(len(storm.refusals)), "")
    refusal = [percentile(storm.refusals, share) * 1e3 for share in (0.5, 0.99)]
    table.add_row("refusal p50, p99, ms", "", f"{refusal[0]:.1f}, {refusal[1]:.1f}", "< 50")
    share = storm.came_back_admitted / max(1, storm.came_back)
    table.add_row("came back as told, admitted", "", f"{share:.0%} of {storm.came_back}", ">= 90%")
    table.add_row("failed otherwise", str(len(calm.failed)), str(len(storm.failed)), "0")
    Console().print(table)


if __name__ == "__main__":
    main()
