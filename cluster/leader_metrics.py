"""Prometheus metrics of a gang's leader: what changed the gang, and how long that took."""

from prometheus_client import Counter, Histogram

# A death on one host takes tens of milliseconds, a host that falls silent seconds.
SECONDS_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24)

LOSSES = Counter("caravan_ranks_lost", "Ranks that died, were stuck, or whose host was lost.", ("gang", "reason"))
RETURNS = Counter("caravan_ranks_returned", "Ranks that were started anew and taken in.", ("gang",))
RESHAPES = Counter("caravan_reshapes", "Epochs after the first that every member has entered.", ("gang",))
RESHAPE_SECONDS = Histogram(
    "caravan_reshape_seconds",
    "From the decision until every member is in the next epoch, by phase: fence (no lost process acts any more), enter "
    "(the members connect and exchange their first rows).",
    ("gang", "phase"),
    buckets=SECONDS_BUCKETS,
)
