"""Where the step goes, read from an exposition."""

import pytest

from cluster.bench_steps import RankSteps, add, growth, metrics_url, part_names, read_steps, scrape
from cluster.state_file import ServerState

PARTS = ("schedule", "attention", "experts", "exchange", "a part of tomorrow", "other")


def exposition(*ranks: tuple[float, float, float, dict[str, float]]) -> str:
    """As prometheus-client writes it: seconds, steps, tokens and parts of each rank."""
    lines = [
        "# HELP caravan_step_seconds Wall time of an engine step.",
        "# TYPE caravan_step_seconds histogram",
    ]
    for rank, (seconds, steps, _, _) in enumerate(ranks):
        labels = f'gang="g",rank="{rank}"'
        lines += [f'caravan_step_seconds_bucket{{{labels},le="+Inf"}} {steps}']
        lines += [f"caravan_step_seconds_count{{{labels}}} {steps}", f"caravan_step_seconds_sum{{{labels}}} {seconds}"]
    lines += ["# TYPE caravan_step_part_seconds_total counter"]
    for rank, (_, _, _, parts) in enumerate(ranks):
        lines += [
            f'caravan_step_part_seconds_total{{gang="g",part="{part}",rank="{rank}"}} {value}'
            for part, value in parts.items()
        ]
    lines += ["# TYPE caravan_computed_tokens_total counter"]
    lines += [f'caravan_computed_tokens_total{{gang="g",rank="{rank}"}} {one[2]}' for rank, one in enumerate(ranks)]
    lines += ["# TYPE caravan_expert_tokens_total counter", 'caravan_expert_tokens_total{expert="3"} 1e+06', "# EOF"]
    return "\n".join(lines) + "\n"


def test_growth_between_two_scrapes() -> None:
    before = read_steps(exposition((10.0, 100, 1000, {"experts": 5.0, "other": 1.0}), (1.0, 2, 3, {})))
    after = read_steps(exposition((12.0, 140, 1800, {"experts": 6.0, "exchange": 0.5, "other": 1.5}), (1.0, 2, 3, {})))
    grown = growth(before, after)
    assert grown["g", "0"] == RankSteps(2.0, 40, 800, {"experts": 1.0, "exchange": 0.5, "other": 0.5})
    assert grown["g", "0"].share("experts") == 0.5
    assert grown["g", "0"].explained == 0.75, "what is called other explains nothing"
    assert grown["g", "1"].steps == 0
    assert grown["g", "1"].explained == 0


def test_a_rank_that_began_anew_counts_from_zero() -> None:
    before = read_steps(exposition((10.0, 100, 1000, {"experts": 5.0})))
    after = read_steps(exposition((2.0, 20, 100, {"experts": 1.0}), (3.0, 30, 200, {"experts": 2.0})))
    grown = growth(before, after)
    assert (grown["g", "0"].seconds, grown["g", "1"].seconds) == (2.0, 3.0)
    assert growth(before, {}) == {}


def test_sums_and_names_of_parts() -> None:
    one = growth(
        {}, read_steps(exposition((2.0, 10, 5, dict(zip(PARTS, (0.1, 0.2, 0.9, 0.3, 0.15, 0.35), strict=True)))))
    )
    total = add([one, one])
    assert (total["g", "0"].seconds, total["g", "0"].steps, total["g", "0"].tokens) == (4.0, 20, 10)
    assert one["g", "0"].seconds == 2.0, "adding changes nothing it adds"
    assert part_names(total) == ["experts", "exchange", "attention", "a part of tomorrow", "schedule", "other"]
    assert total["g", "0"].explained == pytest.approx(1.65 / 2)


def test_an_exposition_without_parts() -> None:
    steps = read_steps(exposition((2.0, 10, 5, {})))
    assert part_names(steps) == []
    assert read_steps("") == {}


def test_nothing_to_scrape() -> None:
    assert scrape("http://127.0.0.1:1/metrics") is None


def server(address: str, metrics: str) -> ServerState:
    return ServerState(address, metrics, 1, 0.0)


@pytest.mark.parametrize(
    ("address", "servers", "url"),
    [
        ("127.0.0.1:9000", [("127.0.0.1:9000", "127.0.0.1:9400")], "http://127.0.0.1:9400/metrics"),
        ("localhost:9000", [("0.0.0.0:9000", "0.0.0.0:9401")], "http://127.0.0.1:9401/metrics"),
        ("127.0.0.1:9000", [("127.0.0.1:9001", "127.0.0.1:9400")], None),
        ("127.0.0.1:9000", [], None),
        ("http://127.0.0.1:8000", [("127.0.0.1:9001", "127.0.0.1:9400")], "http://127.0.0.1:9400/metrics"),
        ("http://127.0.0.1:8000", [("127.0.0.1:9001", "127.0.0.1:9400"), ("127.0.0.1:9002", "127.0.0.1:9402")], None),
        ("http://127.0.0.1:8000", [], None),
        ("10.0.0.5:9000", [("127.0.0.1:9000", "127.0.0.1:9777")], "http://10.0.0.5:9400/metrics"),
        ("http://host.example:8000", [], "http://host.example:9400/metrics"),
        ("http://host.example:8000", [("127.0.0.1:9001", "127.0.0.1:9400")], "http://host.example:9400/metrics"),
        ("http://[::1]:8000", [("[::1]:9001", "[::1]:9400")], "http://[::1]:9400/metrics"),
    ],
)
def test_where_the_metrics_are(address: str, servers: list[tuple[str, str]], url: str | None) -> None:
    assert metrics_url(address, [server(*one) for one in servers]) == url
