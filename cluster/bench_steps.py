"""Where the step goes: what a Caravan server's ranks say of the time between two scrapes of their metrics."""

import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from cluster.bench_target import is_http
from cluster.state_file import LOOPBACK, WILDCARDS, ServerState

PARTS, SECONDS, STEPS, TOKENS = (
    "caravan_step_part_seconds_total",
    "caravan_step_seconds_sum",
    "caravan_step_seconds_count",
    "caravan_computed_tokens_total",
)
UNEXPLAINED = "other"
"""The part that is a step's rest."""
DEFAULT_METRICS_PORT = 9400
SCRAPE_BOUND_S = 5.0
# Ranks write once a second, and before they park, which they do when they have nothing left to compute.
SETTLE_S = 0.3

Rank = tuple[str, str]
"""Gang and rank, as the labels say."""


@dataclass
class RankSteps:
    """One rank's steps, or their sum over several times."""

    seconds: float = 0.0
    """Wall time of steps."""
    steps: float = 0.0
    tokens: float = 0.0
    """Computed, prompt and output."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of each part, in the order of the exposition."""

    @property
    def explained(self) -> float:
        """Share of the wall that has a name."""
        named = sum(seconds for part, seconds in self.parts.items() if part != UNEXPLAINED)
        return named / self.seconds if self.seconds else 0.0

    def share(self, part: str) -> float:
        """Of the wall."""
        return self.parts.get(part, 0.0) / self.seconds if self.seconds else 0.0


Steps = dict[Rank, RankSteps]


def scrape(url: str) -> str | None:
    """The exposition; None where nothing of the kind answers."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=SCRAPE_BOUND_S) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError, ValueError):
        return None


def read_steps(exposition: str) -> Steps:
    """Every rank's counters."""
    found: Steps = defaultdict(RankSteps)
    # A server counts thousands of series, for each expert of each layer.
    ours = "\n".join(line for line in exposition.splitlines() if "caravan_step" in line or "caravan_computed" in line)
    for family in text_string_to_metric_families(ours + "\n"):
        for sample in family.samples:
            if sample.name not in (PARTS, SECONDS, STEPS, TOKENS):
                continue
            steps = found[(sample.labels.get("gang", ""), sample.labels.get("rank", ""))]
            if sample.name == PARTS:
                part = sample.labels.get("part", "")
                steps.parts[part] = steps.parts.get(part, 0.0) + sample.value
            elif sample.name == SECONDS:
                steps.seconds += sample.value
            elif sample.name == STEPS:
                steps.steps += sample.value
            else:
                steps.tokens += sample.value
    return dict(found)


def growth(before: Steps, after: Steps) -> Steps:
    """What happened between two scrapes. A rank that was not there before, or that began anew, counts from zero."""
    grown: Steps = {}
    for rank, now in after.items():
        then = before.get(rank, RankSteps())
        if then.steps > now.steps:
            then = RankSteps()
        parts = {part: seconds - then.parts.get(part, 0.0) for part, seconds in now.parts.items()}
        grown[rank] = RankSteps(now.seconds - then.seconds, now.steps - then.steps, now.tokens - then.tokens, parts)
    return grown


def add(several: Iterable[Steps]) -> Steps:
    """The sum, rank by rank."""
    total: Steps = {}
    for steps in several:
        for rank, one in steps.items():
            sum_ = total.setdefault(rank, RankSteps())
            sum_.seconds += one.seconds
            sum_.steps += one.steps
            sum_.tokens += one.tokens
            for part, seconds in one.parts.items():
                sum_.parts[part] = sum_.parts.get(part, 0.0) + seconds
    return total


def part_names(steps: Mapping[Rank, RankSteps]) -> list[str]:
    """Every part of any rank, largest first, the rest last."""
    totals: dict[str, float] = defaultdict(float)
    for one in steps.values():
        for part, seconds in one.parts.items():
            totals[part] += seconds
    return sorted(totals, key=lambda part: (part == UNEXPLAINED, -totals[part], part))


def metrics_url(address: str, servers: Sequence[ServerState]) -> str | None:
    """Where a server's metrics should be, as far as anybody here can know.

    Args:
        address: as the bench is given it.
        servers: this user's servers on this machine.
    """
    if is_http(address):
        # Which of several servers has this HTTP door their files do not say.
        name = urlsplit(address).hostname or ""
        host = f"[{name}]" if ":" in name else name
        here = [server for server in servers if server.answers_at(f"{host}:{_port(server.address)}")]
        found = here[0] if len(here) == 1 else None
    else:
        host = address.rpartition(":")[0]
        here = [server for server in servers if server.answers_at(address)]
        found = here[0] if here else None
    if found is not None:
        told, _, port = found.metrics_address.rpartition(":")
        return f"http://{'127.0.0.1' if told in WILDCARDS else told}:{port}/metrics"
    is_local = bool(here) or host in LOOPBACK or host in WILDCARDS
    return None if is_local else f"http://{host}:{DEFAULT_METRICS_PORT}/metrics"


def _port(address: str) -> str:
    return address.rpartition(":")[2]
