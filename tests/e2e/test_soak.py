"""A short run of tests/soak.py; `make soak` is the long one."""

import pytest

from tests.e2e.serving import Server
from tests.soak import SHORT, STREAMS, judge, soak

pytestmark = pytest.mark.e2e


async def test_nothing_grows_and_no_block_is_lost(server: Server) -> None:
    soaked = await soak(server, 15)
    _, missed = judge(soaked, SHORT)
    assert missed == []
    assert len(soaked.streams) >= 2 * STREAMS
    assert {"rank 0", "router 0"} <= set(soaked.memory)
    assert all(min(samples) > 1e6 for samples in soaked.memory.values())
