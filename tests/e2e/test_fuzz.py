"""A short run of tests/fuzz.py; `make fuzz` is the long one."""

from tests.fuzz import fuzz, fuzz_config
from tests.unit.router.front import open_front


async def test_random_requests_on_both_doors(tmp_path) -> None:
    async with open_front(fuzz_config(tmp_path)) as front:
        front.ranks[0].per_step = 4
        tally = await fuzz(front, 600)
    assert sum(tally.values()) > 500
    assert tally["gRPC OK"] > 20
    assert tally["HTTP 200"] + tally["schema 200"] > 20
