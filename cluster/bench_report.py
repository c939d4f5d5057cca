"""What --json writes: everything a bench measured, and on what."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cluster.bench_rounds import Plan, Result, Server
from cluster.bench_steps import Steps, part_names
from cluster.bench_summary import Summary, median, ratios
from cluster.bench_tables import by_load


def as_dict(
    plan: Plan,
    servers: Sequence[Server],
    results: Sequence[Result],
    *,
    command: Sequence[str],
    started: str,
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The shape of the file: a public contract. What was not measured is null.

    Args:
        command: the command line.
        started: ISO 8601, UTC.
        machine: see bench_machine.
    """
    shape = plan.shape
    content = {
        "command": list(command),
        "started": started,
        "machine": machine,
        "settings": {
            "mix": shape.mix.name,
            "prompt_tokens": shape.prompt_tokens,
            "output_tokens": shape.output_tokens,
            "rounds": plan.rounds,
            "seed": plan.seed,
        },
        "servers": [
            {"address": server.target.address, "metrics": server.metrics, **asdict(server.facts)} for server in servers
        ],
        "results": [_result(result) for result in results],
        "ratios": [
            {
                "load": asdict(result.load),
                "server": result.server,
                **asdict(ratios(median(group[0].rounds), median(result.rounds))),
            }
            for group in by_load(results)
            for result in group[1:]
        ],
    }
    cleaned: dict[str, Any] = _without_nan(content)
    return cleaned


def _result(result: Result) -> dict[str, Any]:
    return {
        "load": asdict(result.load),
        "server": result.server,
        "median": _summary(median(result.rounds)),
        "rounds": [_summary(one) for one in result.rounds],
        "steps": _steps(result.all_steps),
    }


def _summary(summary: Summary) -> dict[str, Any]:
    content = asdict(summary) | {"failed": summary.failed}
    if summary.long is not None:
        content["long"]["stretch"] = summary.long.stretch
    return content


def _steps(steps: Steps) -> list[dict[str, Any]]:
    return [
        {
            "gang": gang,
            "rank": rank,
            "seconds": one.seconds,
            "steps": one.steps,
            "tokens": one.tokens,
            "parts_seconds": {part: one.parts.get(part, 0.0) for part in part_names(steps)},
            "explained": one.explained,
        }
        for (gang, rank), one in steps.items()
    ]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return value
