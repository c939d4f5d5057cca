"""Both doors of a bench, against servers that do what servers do."""

from collections.abc import Iterator

import pytest

from cluster.bench_stream import BROKEN, SHORT, UNCOUNTED
from cluster.bench_target import Target, make_target
from cluster.errors import CommandError, ServerError, UsageError
from tests.unit.cluster.fake_servers import FakeServers


@pytest.fixture
def fake() -> Iterator[FakeServers]:
    with FakeServers() as servers:
        yield servers


@pytest.fixture(params=["gRPC", "HTTP"])
def address(fake: FakeServers, request: pytest.FixtureRequest) -> str:
    return fake.grpc_address if request.param == "gRPC" else fake.url


async def opened(address: str) -> Target:
    target = make_target(address, 2)
    await target.open()
    return target


async def test_facts(fake: FakeServers, address: str) -> None:
    target = make_target(address, 1)
    facts = await target.open()
    await target.close()
    assert (facts.model, facts.context_length) == ("fake", 1000)
    assert facts.tokens_end == 4000, "within the vocabulary of 5000, whichever door says so"
    assert facts.is_caravan == (not address.startswith("http"))


@pytest.mark.parametrize("split", [False, True])
async def test_tokens_are_counted_by_usage(fake: FakeServers, address: str, split: bool) -> None:
    fake.behaviour.tokens_a_message, fake.behaviour.split_events = 3, split
    target = await opened(address)
    stream = await target.stream([30, 31, 32], 8)
    await target.close()
    assert (stream.error, stream.output_tokens) == ("", 8)
    assert len(stream.arrivals) == 3
    assert stream.sent < stream.arrivals[0] <= stream.arrivals[-1] <= stream.ended
    assert fake.seen.prompts == [[30, 31, 32]]


@pytest.mark.parametrize(
    ("setting", "value", "error", "detail"),
    [
        ("shortfall", 2, SHORT, "6 of 8 tokens"),
        ("shortfall", 8, SHORT, "0 of 8 tokens"),
        ("has_usage", False, UNCOUNTED, "without a usage"),
        ("refuse_every", 1, ("RESOURCE_EXHAUSTED", "HTTP 429"), "the queue is full"),
        ("break_after", 2, ("UNAVAILABLE", "error event"), "rank 1 died"),
    ],
)
async def test_failures_have_a_name(
    fake: FakeServers, address: str, setting: str, value: object, error: str | tuple[str, str], detail: str
) -> None:
    setattr(fake.behaviour, setting, value)
    target = await opened(address)
    stream = await target.stream([30], 8)
    await target.close()
    expected = error if isinstance(error, str) else error[address.startswith("http")]
    assert (stream.error, stream.output_tokens) == (expected, 0)
    assert detail in stream.detail
    assert stream.ended > stream.sent


async def test_a_server_that_is_gone_is_a_failure_with_a_name(address: str, fake: FakeServers) -> None:
    target = await opened(address)
    fake.__exit__()
    stream = await target.stream([30], 8)
    await target.close()
    assert stream.error in ("UNAVAILABLE", BROKEN)
    assert stream.detail


async def test_what_http_asks_for(fake: FakeServers) -> None:
    target = await opened(fake.url + "/v1/")
    await target.stream([30, 31], 5)
    await target.close()
    assert fake.seen.bodies == [
        {
            "model": "fake",
            "prompt": [30, 31],
            "max_tokens": 5,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]


async def test_a_model_is_named_after_the_url(fake: FakeServers) -> None:
    fake.behaviour.models = ("one", "two")
    for address, name in ((fake.url, "one"), (f"{fake.url}#two", "two")):
        target = make_target(address, 1)
        assert (await target.open()).model == name
        await target.close()
    target = make_target(f"{fake.url}#three", 1)
    with pytest.raises(UsageError, match="no model 'three'; it has one, two"):
        await target.open()
    await target.close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1"])
async def test_nobody_there(address: str) -> None:
    target = make_target(address, 1)
    with pytest.raises(ServerError, match=r"no server answers at .*127\.0\.0\.1:1"):
        await target.open()
    await target.close()


async def test_the_other_kind_of_server(fake: FakeServers) -> None:
    for address in (fake.url.removeprefix("http://"), f"http://{fake.grpc_address}"):
        target = make_target(address, 1)
        with pytest.raises(CommandError):
            await target.open()
        await target.close()


def test_http_without_its_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("no", name="aiohttp")

    monkeypatch.setattr("cluster.bench_target.importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"needs aiohttp.*pip install caravan\[bench\]"):
        make_target("http://127.0.0.1:1", 1)
