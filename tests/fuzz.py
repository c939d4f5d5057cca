"""Random and mutated requests on both doors of a router: each gets an answer that blames the right side, none is left
running, and the router serves on.

`make fuzz` sends 10,000; the unit tests send a few hundred.
"""

import argparse
import asyncio
import collections
import gc
import http.client
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from protos import inference_pb2
from router.config import RouterConfig
from tests.unit.router.conftest import until
from tests.unit.router.front import Front, open_front
from tests.unit.router.tiny_checkpoint import EOT, write_checkpoint

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
Code = grpc.StatusCode
GRPC_FINE = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.RESOURCE_EXHAUSTED,
    Code.DEADLINE_EXCEEDED,
    Code.CANCELLED,
    Code.ABORTED,
    Code.NOT_FOUND,
    Code.UNIMPLEMENTED,
}
HTTP_FINE = {200, 400, 404, 405, 409, 413, 429, 499, 504}
STREAMS, ONCE = ("Generate",), ("GenerateOnce", "Cancel", "Tokenize", "Detokenize", "ListModels", "GetModel", "NoSuch")
ADMIN = ("GetStatus",)

Tally = collections.Counter[str]


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        print_blob=True,
    )


texts = st.text(max_size=60) | st.sampled_from(
    ["the sea", "", "\x00", "👩‍👩‍👧‍👦", "<|eot|>", "{{ 7 * 7 }}", "x" * 3000]
)
# Most are such as a request is answered for; the others are at and past every edge.
uint32s = st.integers(0, 30) | st.sampled_from([0, 255, 256, 257, 2**31, 2**32 - 1])
doubles = st.floats(0, 2) | st.floats() | st.sampled_from([0.0, -1.0, 1e308, float("nan"), float("-inf")])
ids = st.lists(st.integers(0, 420) | st.sampled_from([EOT, 10**6, 2**32 - 1]), max_size=20)


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda number: st.none() if number else strategy)


def _requests() -> st.SearchStrategy[inference_pb2.GenerateRequest]:
    message = st.builds(
        inference_pb2.ChatMessage, role=st.sampled_from(["user", "system", "assistant", "", "🐳"]), content=texts
    )
    prompts = st.one_of(
        st.fixed_dictionaries({"text": texts}),
        st.fixed_dictionaries({"token_ids": st.builds(inference_pb2.TokenIds, ids=ids)}),
        st.fixed_dictionaries({"chat": st.builds(inference_pb2.ChatMessages, messages=st.lists(message, max_size=4))}),
        st.just({}),
    )
    fields = st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 30) | st.integers(1, 30) | uint32s,
            "request_id": st.sampled_from([*["", "a", "b"] * 5, "x" * 300]),
            "model": st.sampled_from(["", "tiny"] * 6 + ["other"]),
            "min_tokens": _maybe(uint32s),
            "temperature": _maybe(doubles),
            "top_p": _maybe(doubles),
            "top_k": _maybe(uint32s),
            "min_p": _maybe(doubles),
            "repetition_penalty": _maybe(doubles),
            "presence_penalty": _maybe(doubles),
            "frequency_penalty": _maybe(doubles),
            "seed": _maybe(st.integers(0, 2**64 - 1)),
            "logprobs": _maybe(uint32s),
            "prompt_logprobs": _maybe(uint32s),
            "stop": st.just([]) | st.lists(st.text(min_size=1, max_size=5), max_size=3) | st.lists(texts, max_size=3),
            "stop_token_ids": st.just([]) | ids,
            "ignore_eos": st.booleans(),
            "tenant": st.sampled_from(["", "alice"] * 6 + ["🐳" * 80]),
            "priority": _maybe(st.integers(-12, 12)),
            "timeout_s": _maybe(doubles),
            "resumable": st.sampled_from([False] * 5 + [True]),
            "resume_offset": st.sampled_from([0] * 12 + [3, 2**32 - 1]),
            "sibling": st.sampled_from([0, 0, 5, 2**32 - 1]),
            "chat_time": _maybe(st.integers(-(2**63), 2**63 - 1)),
        }
    )
    return st.builds(lambda prompt, rest: inference_pb2.GenerateRequest(**prompt, **rest), prompts, fields)


def _mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled or put in."""
    made = bytearray(data or b"\x00")
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(made) + 1)
        what = rng.randrange(4)
        if what == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del made[at:]
            made = made or bytearray(b"\xff")
        elif what == 2:
            made[at:at] = made[at : at + 10]
        else:
            made[at:at] = rng.randbytes(rng.randrange(1, 8))
    return bytes(made)


def fuzz_grpc(address: str, examples: int) -> Tally:
    """Random messages, a third of them mutated, on random methods; some are cancelled."""
    tally: Tally = collections.Counter()
    with grpc.insecure_channel(address) as channel:

        def call(method: str, data: bytes, cancel: bool) -> Code:
            service = "Admin" if method in ADMIN else "Inference"
            path = f"/caravan.v1.{service}/{method}"
            running: Any
            if method in STREAMS:
                running = channel.unary_stream(path)(data, timeout=20)
            else:
                running = channel.unary_unary(path).future(data, timeout=20)
            if cancel:
                running.cancel()
            try:
                if method in STREAMS:
                    collections.deque(running, maxlen=0)
                else:
                    running.result()
            except (grpc.RpcError, grpc.FutureCancelledError):
                pass
            return running.code()

        @_settings(examples)
        @given(
            request=_requests(),
            method=st.sampled_from([*STREAMS * 6, *ONCE, *ADMIN]),
            mutate=st.sampled_from([False, False, True]),
            cancel=st.sampled_from([False] * 9 + [True]),
            rng=st.randoms(use_true_random=False),
        )
        def one(
            request: inference_pb2.GenerateRequest, method: str, mutate: bool, cancel: bool, rng: random.Random
        ) -> None:
            data = request.SerializeToString()
            code = call(method, _mutated(data, rng) if mutate else data, cancel)
            tally[f"gRPC {code.name}"] += 1
            assert code in GRPC_FINE, (method, code, request)

        one()
    return tally


def _bodies(path: str) -> st.SearchStrategy[dict[str, Any]]:
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    numbers = st.integers(-1, 20) | st.floats(0, 2) | st.sampled_from([2**40, -(2**70), 1.5])
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "system", "tool"]), "content": texts | texts | anything}
    )
    names = (
        "n max_tokens max_completion_tokens temperature top_p top_k min_p seed logprobs top_logprobs min_tokens "
        "presence_penalty frequency_penalty repetition_penalty priority timeout_s best_of stop stop_token_ids user "
        "request_id logit_bias tools stream_options response_format suffix nonsense"
    )
    known: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(names.split(), numbers | anything)
    known |= {name: st.integers(1, 3) for name in ("n", "top_k", "seed", "logprobs", "min_tokens")}
    known |= {name: st.booleans() | anything for name in ("stream", "echo", "ignore_eos")}
    prompt = texts | texts | ids | st.lists(texts, max_size=3) | st.lists(ids, max_size=3) | anything
    some = st.fixed_dictionaries({}, optional=known).flatmap(
        lambda body: st.sets(st.sampled_from(sorted(body) or ["n"]), max_size=2).map(
            lambda names: {name: body[name] for name in names if name in body}
        )
    )
    heads = {
        "/v1/completions": st.fixed_dictionaries({"prompt": prompt}),
        "/v1/chat/completions": st.fixed_dictionaries({"messages": st.lists(message, min_size=1, max_size=3)}),
    }
    wrong = st.fixed_dictionaries({}, optional={"prompt": prompt, "messages": anything})
    head = heads.get(path, wrong)
    return st.builds(
        lambda a, b: {"max_tokens": 5, **a, **b}, head | head | head | head | head | wrong, some | st.just({})
    )


def fuzz_http(url: str, examples: int) -> Tally:
    """Random bodies, a third of them mutated, on random paths and methods; some clients leave at once."""
    tally: Tally = collections.Counter()
    host = url.removeprefix("http://")
    paths = (
        ["/v1/completions"] * 12 + ["/v1/chat/completions"] * 8 + ["/v1/models", "/v1/models/%00/x", "/readyz", "/%ff"]
    )

    @_settings(examples)
    @given(
        target=st.sampled_from(paths).flatmap(lambda path: st.tuples(st.just(path), _bodies(path))),
        method=st.sampled_from(["POST"] * 24 + ["GET", "PUT", "HEAD"]),
        mutate=st.sampled_from([False, False, True]),
        leave=st.sampled_from([False] * 9 + [True]),
        content_type=st.sampled_from(["application/json"] * 40 + ["text/plain", "application/json; charset=x", "\xff"]),
        rng=st.randoms(use_true_random=False),
    )
    def one(
        target: tuple[str, dict[str, Any]],
        method: str,
        mutate: bool,
        leave: bool,
        content_type: str,
        rng: random.Random,
    ) -> None:
        path, body = target
        data = json.dumps(body).encode()
        connection = http.client.HTTPConnection(host, timeout=20)
        try:
            connection.request(method, path, _mutated(data, rng) if mutate else data, {"content-type": content_type})
            if leave:
                tally["HTTP left"] += 1
                return
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError:
            raise AssertionError(f"no answer to {method} {path} {body}") from None
        finally:
            connection.close()
        tally[f"HTTP {response.status}"] += 1
        assert response.status in HTTP_FINE, (method, path, body, answer)
        if response.status >= 400 and method != "HEAD":
            assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}, answer

    one()
    return tally


def fuzz_schema(url: str, examples: int) -> Tally:
    """What schemathesis makes of the HTTP door's own schema: bodies that fit it and bodies that do not."""
    tally: Tally = collections.Counter()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        for mode in GenerationMode:
            if mode == GenerationMode.NEGATIVE and operation.method != "post":
                continue

            @_settings(max(1, examples // (len(operations) + 2)))
            @given(case=operation.as_strategy(generation_mode=mode))
            def one(case: schemathesis.Case) -> None:
                response = case.call(base_url=url, timeout=20)
                tally[f"schema {response.status_code}"] += 1
                assert response.status_code in HTTP_FINE, (case.body, response.text)
                described = {int(code) for code in case.operation.definition.raw["responses"]}
                assert response.status_code in described | {405}, (response.status_code, described)

            one()
    return tally


async def fuzz(front: Front, requests: int) -> Tally:
    """All of it, and proof that nothing of it stays.

    Raises:
        AssertionError: an answer that must not be, something left running, or the router serves no more.
    """
    await _serves(front)
    tasks = len(asyncio.all_tasks())
    tally: Tally = collections.Counter()
    for work, address, share in (
        (fuzz_grpc, front.address, requests // 2),
        (fuzz_http, front.url, requests // 3),
        (fuzz_schema, front.url, requests // 3),
    ):
        run: Callable[[str, int], Tally] = work
        tally += await asyncio.to_thread(run, address, share)
    await until(lambda: front.metric("caravan_streams_running") == 0)
    await until(lambda: not any(link._streams for link in front.links), 10)
    await until(lambda: len(asyncio.all_tasks()) <= tasks + 2, 10)
    await _serves(front)
    return tally


async def _serves(front: Front) -> None:
    request = inference_pb2.GenerateRequest(text="the sea", max_tokens=4)
    assert (await front.inference.GenerateOnce(request, timeout=10)).text == "the sea"
    assert (await front.post("/v1/completions", prompt="the sea", max_tokens=4))[0] == 200


def fuzz_config(folder: Path) -> RouterConfig:
    """A router that forgets quickly what it keeps for clients that come back."""
    write_checkpoint(folder / "tiny", eos_token_id=[1, EOT])
    (folder / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    return RouterConfig(
        model_dir=folder / "tiny", host="127.0.0.1", reconnect_max_s=0.1, resume_retention_s=0.5, default_max_tokens=20
    )


async def _main(requests: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with open_front(fuzz_config(Path(folder))) as front:
            front.ranks[0].per_step = 4
            process = psutil.Process()
            tally: Tally = collections.Counter()
            grown = []
            started = time.monotonic()
            # Several rounds: what leaks grows in each of them.
            for _ in range(5):
                before = process.memory_info().rss
                tally += await fuzz(front, requests // 5)
                gc.collect()
                grown.append((process.memory_info().rss - before) / 2**20)
            print(f"{sum(tally.values())} requests in {time.monotonic() - started:.0f} s")
            for name, count in sorted(tally.items()):
                print(f"  {name:28} {count}")
            print("grown by, MiB a round:", ", ".join(f"{mib:.1f}" for mib in grown))
            assert sum(grown[2:]) < 100, "it leaks"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    asyncio.run(_main(parser.parse_args().requests))
