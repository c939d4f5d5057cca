"""The rounds of a bench: every load on every server in turn, so that what disturbs the machine disturbs all alike."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from cluster.bench_drive import drive, warm_up
from cluster.bench_load import Load, Prompts, Shape
from cluster.bench_steps import SETTLE_S, Steps, add, growth, metrics_url, read_steps, scrape
from cluster.bench_stream import Stream
from cluster.bench_summary import Summary, summarise
from cluster.bench_target import Facts, Target
from cluster.errors import ServerError, UsageError
from cluster.state_file import running_servers

USER_ERRORS = ("INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "HTTP 400", "HTTP 404", "HTTP 422")


@dataclass(frozen=True)
class Plan:
    """A whole bench."""

    loads: tuple[Load, ...]
    shape: Shape
    rounds: int
    seed: int


@dataclass(frozen=True)
class Server:
    """One of those that are compared."""

    target: Target
    facts: Facts
    metrics: str | None
    """Where it says how its steps go; None: nobody knows."""


@dataclass
class Result:
    """One load on one server."""

    load: Load
    server: int
    """Its place in the list, 0 the one that is benched."""
    rounds: list[Summary] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    """Of each round; empty where there are no metrics."""

    @property
    def all_steps(self) -> Steps:
        """Of all rounds together; a rank that took no step is left out."""
        return {rank: one for rank, one in add(self.steps).items() if one.steps}


Tell = Callable[[int, Result, float], None]
"""Is told the round, from 0, what is being measured, and which share of it is done."""


async def open_servers(targets: Sequence[Target], shape: Shape) -> list[Server]:
    """Connect to all, and make sure that all can take the load.

    Raises:
        CommandError: one does not answer, or cannot take it.
    """
    servers = []
    local = running_servers()
    for target in targets:
        facts = await target.open()
        if facts.context_length is not None and shape.longest > facts.context_length:
            raise UsageError(
                f"{target.address}: a request has up to {shape.longest} tokens of prompt and output, but the context "
                f"of {facts.model} is {facts.context_length}; give less to --prompt-tokens, --output-tokens or --mix"
            )
        servers.append(Server(target, facts, metrics_url(target.address, local) if facts.is_caravan else None))
    return servers


async def run_rounds(servers: Sequence[Server], plan: Plan, tell: Tell) -> list[Result]:
    """For every load the servers in their order, then the next load; and so again, `plan.rounds` times.

    Raises:
        CommandError: a server fails already while it is warmed up.
    """
    # All draw from the same range, whatever their vocabularies have beyond it.
    tokens_end = min(server.facts.tokens_end for server in servers)
    results = [Result(load, number) for load in plan.loads for number in range(len(servers))]
    for number, server in enumerate(servers):
        prompts = Prompts(plan.shape, tokens_end, f"{plan.seed}/warm-up/{number}")
        _check(server, await warm_up(server.target, prompts, plan.shape.output_tokens))
    for round_ in range(plan.rounds):
        for result in results:
            server = servers[result.server]
            # The servers' prompts differ, for two addresses may be doors of one server, which may keep prefixes.
            seed = f"{plan.seed}/{round_}/{result.load.name}"
            prompts = Prompts(plan.shape, tokens_end, f"{seed}/{result.server}")
            tell(round_, result, 0.0)
            before = await _steps(server)
            tell_share = partial(tell, round_, result)
            done = await drive(server.target, result.load, plan.shape, prompts, seed, tell_share)
            after = await _steps(server)
            result.rounds.append(summarise(done))
            if before is not None and after is not None:
                result.steps.append(growth(before, after))
            tell(round_, result, 1.0)
    return results


def _check(server: Server, streams: Sequence[Stream]) -> None:
    for stream in streams:
        if stream.failed:
            kind = UsageError if stream.error in USER_ERRORS else ServerError
            raise kind(f"{server.target.address}: the warm-up failed with {stream.error}: {stream.detail}")


async def _steps(server: Server) -> Steps | None:
    if server.metrics is None:
        return None
    await asyncio.sleep(SETTLE_S)
    exposition = await asyncio.to_thread(scrape, server.metrics)
    return read_steps(exposition) if exposition is not None else None
