"""Step time against the number of exchanges in a step and the delay between hosts, and what batching hides of it.

    make bench-hosts        # root; some minutes; prints a table

Four hosts, a rank on each, models of nano's size with 2, 4 and 8 MoE layers: a step is one agreement, a dispatch and
a combine a MoE layer. A delay is on every frame that leaves a host, so a message takes it once each way.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cluster.default_model import default_model_dir
from tests.checkpoints import write
from tests.hosts.cell import CellProcess, HostsError
from tests.hosts.host import Host
from tests.hosts.network import HostNetwork
from tests.hosts.ray_nodes import start_cluster
from tests.hosts.requirements import why_not
from workers.cache_folder import cache_folder

HOSTS = 4
MOE_LAYERS = (2, 4, 8)
DELAYS_MS = (0.0, 1.0, 5.0)
STREAMS = (1, 8, 32)
OUTPUT_TOKENS = 32
NANO_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "intermediate_size_mlp", "num_local_experts", "num_experts_per_tok", "use_qk_norm"),
    *("attention_chunk_size", "attn_temperature_tuning", "floor_scale", "attn_scale", "rope_parameters"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hosts.bench_delay", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--moe-layers", type=int, nargs="+", default=MOE_LAYERS, metavar="N", help="(default 2 4 8)")
    given = parser.parse_args()
    console = Console()
    if reason := why_not():
        console.print(f"hosts cannot be made here: {reason}")
        return 1
    rows = []
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("models", total=len(given.moe_layers) * len(DELAYS_MS))
        for layers in given.moe_layers:
            # Not below /tmp, which every host has for itself.
            folder = Path(tempfile.mkdtemp(prefix="caravan-delay-", dir="/var/tmp"))
            try:
                make_model(folder, layers)
                for row in measure(folder, layers, lambda text: progress.update(task, description=text)):
                    rows.append(row)
                    progress.advance(task)
                    # What has been measured is not lost to who loses patience.
                    console.print(json.dumps(row), soft_wrap=True)
            finally:
                shutil.rmtree(folder)
    console.print(table(rows))
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def make_model(folder: Path, moe_layers: int) -> None:
    """Random weights in nano's shape, but for the number of MoE layers; nano's tokenizer."""
    nano = json.loads((default_model_dir() / "config.json").read_text())
    shape = {key: nano[key] for key in NANO_KEYS} | {
        "interleave_moe_layer_step": nano["num_hidden_layers"] // moe_layers
    }
    write(folder, shape)
    for file in default_model_dir().glob("tokenizer*"):
        shutil.copy(file, folder)


def measure(folder: Path, moe_layers: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One server, every delay."""
    with HostNetwork(HOSTS, client=True, shared=[folder]) as network:
        for host in network.hosts:
            kernels = host.path("/tmp/home/.cache/caravan")
            kernels.mkdir(parents=True)
            (kernels / "kernels").symlink_to(cache_folder("kernels").resolve())
        say(f"{moe_layers} MoE layers: starting")
        head = start_cluster(network.hosts, num_cpus=1)[0]
        server = serve(network[0], head.address, folder)
        for delay in DELAYS_MS:
            say(f"{moe_layers} MoE layers, {delay:g} ms")
            how = {network.delay(host, delay) for host in network.hosts if delay}
            yield {
                "moe_layers": moe_layers,
                "delay_ms": delay,
                "by": "".join(how),
                "round_trip_ms": round_trip(network),
                "gap_ms": bench(network.client, network[0]),
            }
        server.terminate()
        server.wait(30)


def serve(host: Host, ray_address: str, folder: Path) -> CellProcess:
    command = ["caravan", "serve", "--ray-address", ray_address, "--host", host.address, "--ranks", str(HOSTS)]
    log = host.path("/tmp/serve.log")
    with log.open("w") as stderr:
        server = host.popen([*command, "--model", str(folder)], stdout=PIPE, stderr=stderr, text=True)
    assert server.stdout is not None
    if not server.stdout.readline().startswith("ready"):
        raise HostsError(log.read_text()[-500:])
    return server


def bench(client: Host, server: Host) -> dict[int, float]:
    """Milliseconds between two tokens of a stream, p50, by the number of streams."""
    command = [sys.executable, "-m", "cluster.cli", "bench", "--address", f"{server.address}:9000", "--rounds", "1"]
    shape = ["--prompt-tokens", "16", "--output-tokens", str(OUTPUT_TOKENS), "--json", "/tmp/bench.json"]
    done = client.run([*command, *shape, "--streams", ",".join(map(str, STREAMS))], timeout=300)
    if done.returncode:
        raise HostsError(done.stderr[-500:])
    found = json.loads(client.path("/tmp/bench.json").read_text())
    return {result["load"]["streams"]: 1e3 * result["median"]["gap"]["p50"] for result in found["results"]}


def round_trip(network: HostNetwork) -> float:
    """Milliseconds of a byte from the second host to the first and back, median."""
    listen = (
        "import socket; s = socket.create_server(('', 7000)); print(flush=True); c = s.accept()[0]\n"
        "while d := c.recv(1): c.send(d)"
    )
    ask = (
        "import socket, statistics, time\n"
        f"s = socket.create_connection(('{network[0].address}', 7000)); t = []\n"
        "s.setsockopt(6, 1, 1)\n"
        "for _ in range(50):\n a = time.perf_counter(); s.send(b'x'); s.recv(1); t.append(time.perf_counter() - a)\n"
        "print(statistics.median(t) * 1e3)"
    )
    answering = network[0].popen([sys.executable, "-c", listen], stdout=PIPE, text=True)
    assert answering.stdout is not None
    answering.stdout.readline()
    done = network[1].run([sys.executable, "-c", ask], timeout=60)
    answering.wait(10)
    return float(done.stdout)


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table("MoE layers", "exchanges a step", "delay", "round trip", *(f"{n} streams" for n in STREAMS))
    for row in rows:
        gaps = row["gap_ms"]
        made.add_row(
            str(row["moe_layers"]),
            str(1 + 2 * row["moe_layers"]),
            f"{row['delay_ms']:g} ms",
            f"{row['round_trip_ms']:.2f} ms",
            *(f"{gaps[streams]:.1f} ms, {1e3 * streams / gaps[streams]:.0f} tok/s" for streams in STREAMS),
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
