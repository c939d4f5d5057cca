"""What a served gang answers: through the command line and a real gRPC client, to real Ray."""

import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Llama4ForCausalLM

from protos.client import Client, Completion, make_request
from protos.errors import CaravanError
from tests.e2e.serving import ROOT, Server
from tests.exactness import Exactness, Reference

PROMPT = "import os\n\ndef main():"


@pytest.fixture
def client(server: Server):
    with Client(server.address) as client:
        yield client


def wait_idle(client: Client, bound_s: float = 10) -> None:
    deadline = time.monotonic() + bound_s
    while any(gang.running or gang.waiting for gang in client.get_status().gangs):
        assert time.monotonic() < deadline, f"work for nobody: {client.get_status()}"
        time.sleep(0.1)


def test_status(server: Server, checkpoint: Path) -> None:
    status = server.status()
    assert set(status) == {"model", "gangs"}
    assert status["model"] == checkpoint.name
    (gang,) = status["gangs"]
    assert set(gang) == {"id", "epoch", "running", "waiting", "ranks", "hosts"}
    assert [(host["host"], host["ranks"]) for host in gang["hosts"]] == [("127.0.0.1", [0, 1, 2, 3])]
    assert gang["epoch"] == 1
    assert [rank["rank"] for rank in gang["ranks"]] == [0, 1, 2, 3]
    for rank in gang["ranks"]:
        sent = {"bytes_within_host", "bytes_between_hosts"}
        assert set(rank) == {"rank", "incarnation", "pid", "host", "state", "experts", "address"} | sent
        assert (rank["incarnation"], rank["state"], rank["experts"]) == (1, "ready", 32)
    assert len({rank["pid"] for rank in gang["ranks"]}) == 4


def test_greedy_tokens_are_the_references(client: Client, checkpoint: Path) -> None:
    """Four ranks, every hop real, float32: the exactness rule."""
    reference = Reference(Llama4ForCausalLM.from_pretrained(checkpoint, dtype="float32"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    exactness = Exactness()
    for prompt in (PROMPT, "Привет, мир 🙂", "x" * 700):
        completion = client.complete(make_request(prompt, max_tokens=32, temperature=0, ignore_eos=True))
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert client.tokenize(prompt) == prompt_ids
        exactness.check(reference, prompt_ids, completion.token_ids, repr(prompt[:20]))
    print(exactness.summary)
    exactness.verify()


def test_generate_json(server: Server) -> None:
    first = server.generate(PROMPT, "--max-tokens", "12", "--temperature", "0", "--ignore-eos")
    assert set(first) == {"text", "token_ids", "finish_reason", "usage"}
    assert len(first["token_ids"]) == 12
    assert first["finish_reason"] == "length"
    with Client(server.address) as client:
        prompt_ids = client.tokenize(PROMPT)
    assert first["usage"] == {"prompt_tokens": len(prompt_ids), "completion_tokens": 12}
    ids = " ".join(map(str, prompt_ids))
    again = server.generate(ids, "--token-ids", "--max-tokens", "12", "--temperature", "0", "--ignore-eos")
    assert again == first, "token ids are used as given"


def test_generate_text_is_the_json_text(server: Server) -> None:
    arguments = ("--max-tokens", "12", "--seed", "5", "--temperature", "1")
    text = server.caravan("generate", PROMPT, *arguments)
    assert text.returncode == 0
    assert text.stdout == server.generate(PROMPT, *arguments)["text"] + "\n"


def test_seeded_streams_do_not_see_each_other(client: Client) -> None:
    def request(number: int):
        return make_request(PROMPT + str(number), max_tokens=20, temperature=0.9, seed=number, ignore_eos=True)

    alone = [client.complete(request(number)).token_ids for number in range(6)]
    together: dict[int, Completion] = {}
    threads = [
        threading.Thread(target=lambda number=number: together.update({number: client.complete(request(number))}))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [together[number].token_ids for number in range(6)] == alone
    assert len({tuple(ids) for ids in alone}) == 6


def test_text_streams_as_it_is_made(client: Client) -> None:
    arrivals = []
    for response in client.generate(make_request(PROMPT, max_tokens=60, seed=1, ignore_eos=True)):
        arrivals.append((time.monotonic(), len(response.token_ids)))
    assert sum(count for _, count in arrivals) == 60
    assert len(arrivals) > 10
    assert arrivals[-1][0] - arrivals[0][0] > 0.05


def test_a_cancel_frees_the_work(client: Client) -> None:
    streams = [
        client.generate(make_request(PROMPT, max_tokens=1900, seed=number, ignore_eos=True)) for number in range(5)
    ]
    for stream in streams:
        assert next(stream).token_ids
    deadline = time.monotonic() + 10
    while sum(gang.running for gang in client.get_status().gangs) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for stream in streams:
        stream.close()
    wait_idle(client, 5)


def test_a_killed_client_frees_the_work(server: Server, client: Client) -> None:
    arguments = ["generate", PROMPT, "--max-tokens", "1900", "--ignore-eos", "--address", server.address]
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.read(20)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_idle(client, 5)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"prompt": "x", "model": "gpt"}, "model"),
        ({"prompt": ""}, "text"),
        ({"prompt": []}, "token_ids"),
        ({"prompt": [10**6]}, "token_ids"),
        ({"prompt": "x", "max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "x", "temperature": -1.0}, "temperature"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": 0.0}, "top_p"),
        ({"prompt": "x" * 10_000_000}, "text"),
    ],
)
def test_bad_requests_name_the_field(client: Client, request_: dict, field: str) -> None:
    with pytest.raises(CaravanError) as caught:
        client.complete(make_request(**request_))
    assert caught.value.code.name in ("INVALID_ARGUMENT", "NOT_FOUND")
    assert field in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("", "--max-tokens", "4"), "text"),
        (("x", "--temperature", "-1"), "temperature"),
        (("x", "--temperature", "nan"), "temperature"),
        (("999999", "--token-ids"), "token_ids"),
        (("x", "--max-tokens", "1000000"), "max_tokens"),
    ],
)
def test_bad_prompts_are_one_line_and_exit_2(server: Server, arguments: tuple[str, ...], says: str) -> None:
    done = server.caravan("generate", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_metrics(server: Server, client: Client) -> None:
    client.complete(make_request(PROMPT, max_tokens=8, ignore_eos=True))
    # Ranks write out what they summed up about once a second.
    deadline = time.monotonic() + 5
    while not (families := scrape(server)).get("caravan_expert_tokens_total"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for family in (
        *("caravan_time_to_first_token_seconds_bucket", "caravan_inter_token_seconds_bucket"),
        *("caravan_request_seconds_bucket", "caravan_step_seconds_bucket"),
        *("caravan_prompt_tokens_total", "caravan_output_tokens_total", "caravan_exchange_seconds_total"),
        *("caravan_exchange_bytes_total", "caravan_sequences_running", "caravan_sequences_waiting"),
        *("caravan_kv_usage_ratio", "caravan_epoch"),
    ):
        assert family in families, sorted(families)
    assert families["caravan_output_tokens_total"] >= 8
    assert families["caravan_expert_tokens_total"] > 0
    assert families["caravan_exchange_bytes_total"] > 0
    assert families["caravan_epoch"] == 4, "epoch 1 at each of four ranks"


def scrape(server: Server) -> dict[str, float]:
    """Sums over all labels by name."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    sums: dict[str, float] = {}
    for line in lines:
        if match := re.fullmatch(r"(\w+)(?:\{.*\})? (\S+)", line):
            sums[match[1]] = sums.get(match[1], 0) + float(match[2])
    return sums
