"""Who waits, who is told to come back, and whether that is true: against made-up ranks and a made-up clock."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.admission import LEAST_DELAY_S, Admission, AdmissionLimits
from router.bookings import Bookings
from router.errors import Overloaded
from router.fair_queue import FairQueue, Ticket
from router.quota import Quotas
from router.rate import RateMeter, UsedShare
from tests.unit.router.simulation import STEP_S, Simulation


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def load(simulation: Simulation, factors: dict[str, float], seconds: float, obeys: bool = True) -> Simulation:
    """Each tenant sends so many times what the ranks can do."""
    owed = dict.fromkeys(factors, 0.0)
    for _ in range(int(seconds / STEP_S)):
        simulation.step()
        for tenant, factor in factors.items():
            owed[tenant] += factor * simulation.tokens_per_s / 60 * STEP_S
            while owed[tenant] >= 1:
                owed[tenant] -= 1
                simulation.send(simulation.request(tenant), obeys)
    return simulation


# ---- the whole ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["always the same", "never the same", "not at all"])
@pytest.mark.parametrize("factor", [1.2, 2, 5])
@pytest.mark.parametrize("max_queued_tokens", [6_000, 20_000, 200_000])
def test_who_obeys_the_delay_is_taken(factor, named, max_queued_tokens):
    simulation = load(Simulation(AdmissionLimits(max_queued_tokens), named=named), {"": factor}, 60)
    assert simulation.retries_admitted >= 0.9 * simulation.retries
    assert simulation.refused or max_queued_tokens > 20_000
    assert simulation.max_queued <= max_queued_tokens
    # Nobody's place is kept at the price of idle ranks: they do what they can, 16 sequences all the time.
    assert simulation.idle_steps <= 1
    assert sum(simulation.tokens.values()) / simulation.now > 2700


def test_who_never_comes_back_leaves_no_rank_idle():
    simulation = load(Simulation(AdmissionLimits(20_000)), {"": 5}, 60, obeys=False)
    assert simulation.idle_steps <= 1 and simulation.refused > 1000
    assert sum(simulation.tokens.values()) / simulation.now > 2700


def test_more_clients_than_fit_are_all_served():
    simulation = Simulation(AdmissionLimits(20_000))
    for _ in range(400):
        simulation.send(simulation.request())
    while simulation.now < 60:
        for request in simulation.step():
            simulation.send(simulation.request(request.tenant))
    assert simulation.retries_admitted >= 0.9 * simulation.retries > 100
    assert simulation.idle_steps <= 1


@pytest.mark.parametrize("greedy_obeys", [True, False])
@pytest.mark.parametrize("modest", [0.5, 0.6])
def test_a_greedy_tenant_slows_only_itself(greedy_obeys, modest):
    simulation = load(Simulation(AdmissionLimits(20_000)), {"greedy": 10 * modest, "modest": modest}, 60, greedy_obeys)
    fair = sum(simulation.tokens.values()) / 2
    assert simulation.tokens["modest"] >= 0.8 * fair
    waits = [r.started - r.arrived for r in simulation.finished if r.tenant == "modest"]
    assert len(waits) > 500


def test_a_tenant_below_its_share_does_not_wait_for_the_greedy_one():
    simulation = load(Simulation(AdmissionLimits(20_000)), {"greedy": 8, "modest": 0.2}, 60)
    waits = sorted(r.started - r.arrived for r in simulation.finished if r.tenant == "modest")
    assert waits[len(waits) // 2] < 0.3 and waits[-1] < 2
    assert all(r.tries == 1 for r in simulation.finished if r.tenant == "modest")


def test_higher_priority_goes_first():
    simulation = Simulation(AdmissionLimits(50_000))
    for number in range(100):
        simulation.send(simulation.request(priority=(number % 3) - 1))
    while len(simulation.finished) < 100:
        simulation.step()
    by_start = sorted(simulation.finished[16:], key=lambda request: request.started)
    first = [request.priority for request in by_start[:25]]
    assert first.count(1) >= 23
    assert [request.priority for request in by_start[-25:]].count(-1) == 25


def test_a_refusal_is_cheap():
    simulation = load(Simulation(AdmissionLimits(200_000)), {"": 5}, 60)
    start = time.perf_counter()
    for _ in range(100):
        simulation.send(simulation.request(), obeys=False)
    assert (time.perf_counter() - start) / 100 < 0.005
    assert simulation.refused


# ---- its parts ---------------------------------------------------------------------------------------------------


def ticket(cost: int = 100, tenant: str = "", priority: int = 0) -> Ticket[str]:
    return Ticket("x", tenant, priority, cost)


def test_an_empty_queue_takes_any_request(clock):
    admission = Admission[str](AdmissionLimits(1000), clock)
    admission.offer(ticket(10**6))
    assert admission.queue.total == 10**6
    with pytest.raises(Overloaded):
        admission.offer(ticket(10))


def test_room_at_a_rank_needs_no_place_in_the_queue(clock):
    admission = Admission[str](AdmissionLimits(1000), clock)
    for _ in range(100):
        admission.offer(one := ticket(900), has_room=True)
        admission.start(one)
    assert admission.queue.total == 0


def test_who_cannot_start_in_time_is_told_at_once(clock):
    admission = Admission[str](AdmissionLimits(100_000), clock)
    admission.offer(first := ticket(1000))
    admission.start(first)
    for _ in range(20):  # 500 tokens a second, and a request takes all it may.
        clock.now += 0.2
        admission.served(100)
        admission.offer(ticket(100))
    assert admission.rate.tokens_per_s == pytest.approx(500, rel=0.3)
    with pytest.raises(Overloaded, match=r"would wait about [345]\.\d s for a rank, longer than the 1\.0 s") as caught:
        admission.offer(ticket(100), within_s=1)
    assert 1 < caught.value.retry_after_s < 5
    admission.offer(ticket(100), within_s=30)
    admission.offer(ticket(100, priority=1), within_s=1)  # Goes before the others.


def test_nobody_is_turned_away_for_time_before_a_rate_was_measured(clock):
    admission = Admission[str](AdmissionLimits(100_000), clock)
    for _ in range(40):
        admission.offer(ticket(900), within_s=0.01)


def test_delays_without_a_rate_are_still_sensible(clock):
    admission = Admission[str](AdmissionLimits(10_000), clock)
    delays = []
    for number in range(100):
        try:
            admission.offer(ticket(1000), key=number)
        except Overloaded as error:
            delays.append(error.retry_after_s)
    assert delays == sorted(delays) and LEAST_DELAY_S <= delays[0] < 5 < delays[-1]


def test_coming_back_early_does_not_lose_the_place(clock):
    admission = Admission[str](AdmissionLimits(1000), clock)
    waiting = [ticket(100) for _ in range(4)]
    for one in waiting:
        admission.offer(one)
    with pytest.raises(Overloaded) as first:
        admission.offer(ticket(300), key="a")
    clock.now += first.value.retry_after_s / 2
    with pytest.raises(Overloaded) as again:
        admission.offer(ticket(300), key="a", is_retry=True)
    assert again.value.retry_after_s == pytest.approx(first.value.retry_after_s / 2)
    with pytest.raises(Overloaded) as later:
        admission.offer(ticket(300), key="b")
    assert later.value.retry_after_s > again.value.retry_after_s
    clock.now += again.value.retry_after_s
    for one in waiting[:3]:
        admission.withdraw(one)
    admission.offer(ticket(300), key="a", is_retry=True)


def test_quotas(clock):
    quotas = Quotas(600, {"big": 6000, "free": 0}, clock)
    assert quotas.take("a", 400) == 0
    assert quotas.take("a", 400) == pytest.approx(20)
    assert quotas.take("b", 600) == 0
    assert quotas.take("big", 6000) == quotas.take("free", 10**9) == 0
    clock.now += 20
    assert quotas.take("a", 400) == 0
    quotas.give_back("a", 100)
    assert quotas.take("a", 100) == 0
    # More than a minute's tokens: once the bucket is full, which then stays empty for longer.
    clock.now += 60
    assert quotas.take("b", 1200) == 0
    assert quotas.take("b", 1) == pytest.approx(60.1)
    quotas.give_back("b", 10**6)
    assert not [name for name in quotas._buckets if name == "b"]


def test_quotas_forget_tenants_who_are_gone(clock):
    quotas = Quotas(60, {}, clock)
    for number in range(10_000):
        assert quotas.take(str(number), 1) == 0
        clock.now += 0.1
    assert len(quotas._buckets) <= 1024


def test_a_quota_refuses_with_its_delay_and_what_was_not_used_comes_back(clock):
    admission = Admission[str](AdmissionLimits(10**6, tenant_tokens_per_minute={"a": 600}), clock)
    admission.offer(one := ticket(600, "a"), has_room=True)
    admission.start(one)
    with pytest.raises(Overloaded, match="tenant 'a' may use 600 tokens a minute") as caught:
        admission.offer(ticket(60, "a"), has_room=True)
    assert caught.value.retry_after_s == pytest.approx(6)
    admission.offer(ticket(6000, "b"), has_room=True)
    admission.finish(one, 200, True)
    admission.offer(two := ticket(400, "a"), has_room=True)
    admission.withdraw(two)
    admission.offer(ticket(400, "a"), has_room=True)


def test_rates(clock):
    meter = RateMeter(clock)
    assert meter.tokens_per_s is None
    meter.set_busy(True)
    for _ in range(50):
        clock.now += 0.1
        meter.add(100, False)
    assert meter.tokens_per_s == pytest.approx(1000, rel=0.2)
    meter.set_busy(False)
    clock.now += 1000  # Idle time says nothing.
    meter.set_busy(True)
    for _ in range(50):
        clock.now += 0.1
        meter.add(50, False)
    assert meter.tokens_per_s == pytest.approx(1000, rel=0.2)
    for _ in range(200):  # Now it does what it can.
        clock.now += 0.1
        meter.add(50, True)
    assert meter.tokens_per_s == pytest.approx(500, rel=0.1)


def test_the_used_share():
    share = UsedShare()
    assert share.ratio == 1
    for _ in range(2000):
        share.add(10, 40)
    assert share.ratio == pytest.approx(0.25, rel=0.01)


def test_bookings_end(clock):
    bookings = Bookings(clock)
    bookings.add("a", None, 50, 9)
    bookings.add("a", "x", 100, 10)
    assert bookings.tokens_of("a") == 150
    assert bookings.find("a", None, False) is bookings.find("a", None, True) is None
    assert bookings.early_by(bookings.find("a", "x", True)) == pytest.approx(10)
    clock.now += 10
    assert bookings.early_by(bookings.find("a", "x", False)) == 0
    nameless = bookings.find("a", None, True)
    bookings.drop(nameless)
    bookings.drop(nameless)
    assert bookings.tokens_of("a") == 100 and bookings.find("b", None, True) is None
    # A name that nobody was refused under takes the place that has been due longest.
    assert bookings.find("a", "y", False) is None and bookings.find("a", "y", True).key == "x"
    clock.now += 5.01
    assert bookings.tokens_of("a") == 0 and bookings.find("a", "x", True) is None
    assert not bookings._named and not bookings._by_due and not bookings._tokens and not bookings._by_expiry


ACTIONS = st.lists(
    st.tuples(st.sampled_from("padt"), st.integers(0, 3), st.integers(-1, 1), st.integers(1, 500)), max_size=80
)


@given(ACTIONS)
def test_the_queue_adds_up(actions):
    queue = FairQueue[str]()
    waiting: list[Ticket[str]] = []
    taken: list[Ticket[str]] = []
    for action, tenant, priority, cost in actions:
        if action in "pa":
            waiting.append(ticket(cost, str(tenant), priority))
            queue.push(waiting[-1])
        elif action == "d" and waiting:
            one = waiting.pop(cost % len(waiting))
            assert queue.remove(one) and not queue.remove(one)
        elif action == "t" and waiting:
            one = queue.peek()
            assert one is not None and one.priority == max(other.priority for other in waiting)
            earlier = [other for other in waiting if (other.tenant, other.priority) == (one.tenant, one.priority)]
            assert earlier[0] is one
            queue.take(one, one.cost)
            waiting.remove(one)
            taken.append(one)
            if cost % 2:
                queue.settle(one, cost % 100)
        assert queue.total == sum(one.cost for one in waiting)
        assert sorted(map(id, queue)) == sorted(map(id, waiting)) and len(queue) == len(waiting)
        for name in "0123":
            assert queue.tokens_of(name) == sum(one.cost for one in waiting if one.tenant == name)
        assert queue.num_tenants == len({one.tenant for one in waiting})
    for one in list(queue):
        queue.remove(one)
    assert queue.peek() is None and not queue._lines and not queue._tokens
    # What is remembered of tenants who are away is what they had ahead of the others.
    assert all(had > queue._present for had in queue._served.values())
