"""The stages of a gang's start, in order: shown while it starts, and named when it fails."""

from enum import StrEnum


class Stage(StrEnum):
    """What has been reached when a stage is over; each has a bound of its own in `LeaderConfig`."""

    HOSTS_JOINED = "hosts joined"
    """Ray has hosts with room for every rank."""
    HOSTS_CHECKED = "hosts checked"
    """An agent runs on each; addresses, versions and disks are as they must be."""
    NETWORK = "network checked"
    """Every host reaches every other one and the leader, on the ports that ranks will use."""
    CHECKPOINT = "checkpoint present"
    """The same checkpoint lies on every host."""
    RANKS_PLACED = "ranks placed"
    """Every rank's process runs and holds its lifeline."""
    WEIGHTS = "weights loaded"
    GROUP = "group formed"
    """Every rank is connected with every other one."""
    FIRST_EXCHANGE = "first exchange"
    """Rows have gone from every rank to every other one and back."""


ORDER = tuple(Stage)


def place(stage: str) -> str:
    """Of how many it is which, as in "5/8"."""
    return f"{ORDER.index(Stage(stage)) + 1}/{len(ORDER)}"
