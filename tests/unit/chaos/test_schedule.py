"""The schedule of tests/chaos.py."""

from collections import Counter
from itertools import islice

from tests.chaos_schedule import LONG_DECK, PAUSE_S, Kind, draw


def test_the_same_seed_draws_the_same_events() -> None:
    assert list(islice(draw(3, 4, 2), 50)) == list(islice(draw(3, 4, 2), 50))
    assert list(islice(draw(3, 4, 2), 50)) != list(islice(draw(4, 4, 2), 50))


def test_every_deck_is_dealt_whole() -> None:
    events = list(islice(draw(1, 4, 2), 3 * len(LONG_DECK)))
    assert Counter(event.kind for event in events[: len(LONG_DECK)]) == Counter(LONG_DECK)
    assert Counter(event.kind for event in events) == {kind: 3 * n for kind, n in Counter(LONG_DECK).items()}


def test_victims_are_there_and_differ() -> None:
    most = {Kind.RANK: 4, Kind.TWO_RANKS: 4, Kind.STUCK: 4, Kind.ROUTER: 2, Kind.LEADER: 0}
    counts = {Kind.RANK: 1, Kind.TWO_RANKS: 2, Kind.STUCK: 1, Kind.ROUTER: 1, Kind.LEADER: 0}
    struck = set()
    for event in islice(draw(5, 4, 2), 500):
        assert len(set(event.victims)) == counts[event.kind]
        assert all(0 <= victim < most[event.kind] for victim in event.victims)
        assert PAUSE_S[0] <= event.pause_s <= PAUSE_S[1]
        if event.kind is Kind.RANK:
            struck |= set(event.victims)
    assert struck == {0, 1, 2, 3}
