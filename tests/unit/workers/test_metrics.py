"""What a rank's exchange tells its metrics."""

from prometheus_client import REGISTRY

from workers.exchange import LocalExchange
from workers.metrics import RankMetrics
from workers.step_clock import StepClock


def exchanged(gang: str) -> dict[tuple[str, str], float]:
    """Bytes by direction and scope."""
    return {
        (sample.labels["direction"], sample.labels["scope"]): sample.value
        for metric in REGISTRY.collect()
        if metric.name == "caravan_exchange_bytes"
        for sample in metric.samples
        if sample.name == "caravan_exchange_bytes_total" and sample.labels["gang"] == gang
    }


def test_bytes_within_and_between_hosts_are_series_of_their_own() -> None:
    exchange = LocalExchange()
    metrics = RankMetrics("bytes", 3, 1, exchange, StepClock(), {})
    exchange.bytes_within_host, exchange.bytes_between_hosts = 100, 30
    exchange.received_within_host, exchange.received_between_hosts = 7, 20
    metrics.flush()
    exchange.bytes_between_hosts += 5
    metrics.flush()
    metrics.flush()
    assert exchanged("bytes") == {
        ("sent", "within_host"): 100,
        ("sent", "between_hosts"): 35,
        ("received", "within_host"): 7,
        ("received", "between_hosts"): 20,
    }
    assert (exchange.bytes_sent, exchange.bytes_received) == (135, 27)
