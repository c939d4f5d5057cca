"""How long a gang's leader waits for what, and how often it starts over."""

from dataclasses import dataclass

from workers.errors import UserError


@dataclass(frozen=True)
class LeaderConfig:
    """Bounds of what a leader waits for, all in seconds, and how often it starts over.

    Raises:
        UserError: a value is out of its range.
    """

    hosts_timeout_s: float = 60.0
    """Until Ray has hosts with room for every rank."""
    agents_timeout_s: float = 60.0
    """Until an agent runs on every host and has told of it."""
    network_timeout_s: float = 15.0
    """For every host to try the ports of every other one."""
    join_timeout_s: float = 120.0
    """From a launch until every rank has joined: process start and imports."""
    load_stall_timeout_s: float = 300.0
    """From the last byte that any host fetched, or rank read or packed, until all have their weights."""
    group_timeout_s: float = 60.0
    """Until every rank is connected with every other one."""
    first_exchange_timeout_s: float = 60.0
    """Until the first rows have gone round, and every rank is ready."""
    host_silence_s: float = 1.5
    """A host whose agent has not answered for so long is gone, and all its ranks with it."""
    rank_silence_s: float = 2.0
    """A rank that reports nothing for so long, though its connection stands, is stuck and counts as dead."""
    reshape_timeout_s: float = 10.0
    """For every member to enter the next epoch of a gang that runs; who has not by then counts as dead."""
    fewest_ranks: int = 1
    """With fewer the gang does not go on: its streams wait until it has been started anew."""
    fence_timeout_s: float = 10.0
    """Until a killed rank's process must be gone."""
    stop_timeout_s: float = 2.0
    """Ranks asked to stop have this long before they are killed."""
    restarts: int = 3
    """Starts after the first within `restart_window_s`; past them the gang has failed for good."""
    restart_window_s: float = 300.0
    restart_delay_s: float = 0.5
    """Between a fence and the next launch."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_s") and name != "restart_delay_s" and value <= 0:
                raise UserError(f"{name}: must be positive, got {value}")
        if self.restarts < 0 or self.restart_delay_s < 0:
            raise UserError("restarts and restart_delay_s: must not be negative")
