"""Nothing leaves the host: a server with a local model, where every packet that would is counted."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.serving import ROOT

# In a network of its own, whose only way out leads nowhere. Names are asked for there too.
INSIDE = """
import json, os, socket, subprocess, sys
from pathlib import Path

def run(*command):
    subprocess.run(command, check=True)

folder = Path(sys.argv[1])
run("ip", "link", "set", "lo", "up")
run("ip", "link", "add", "out", "type", "veth", "peer", "name", "far")
for end in ("out", "far"):
    ipv6 = Path(f"/proc/sys/net/ipv6/conf/{end}/disable_ipv6")
    if ipv6.exists():
        ipv6.write_text("1")
run("ip", "link", "set", "far", "up")
run("ip", "address", "add", "192.0.2.2/24", "dev", "out")
run("ip", "link", "set", "out", "up")
run("ip", "neighbour", "add", "192.0.2.1", "lladdr", "02:00:00:00:00:01", "dev", "out")
run("ip", "route", "add", "default", "via", "192.0.2.1")
names = folder / "resolv.conf"
names.write_text("nameserver 192.0.2.1\\noptions timeout:1 attempts:1\\n")
run("mount", "--bind", str(names), "/etc/resolv.conf")

def sent():
    with open("/proc/net/dev") as counters:
        return next(int(line.split()[10]) for line in counters if line.strip().startswith("out:"))

from tests.e2e.serving import Server
before = sent()
server = Server(folder / "server", "--ranks", "2")
try:
    server.wait_ready()
    text = server.generate("The whale", "--max-tokens", "8")["text"]
    server.end()
    left = len(server.left)
finally:
    server.kill_all()
after = sent()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    control.sendto(b"?", ("198.51.100.1", 9))
print(json.dumps({"text": text, "left": left, "sent": after - before, "control": sent() - after}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of one's own needs root")
@pytest.mark.skipif(not (shutil.which("unshare") and shutil.which("ip")), reason="needs unshare and ip")
def test_a_server_with_a_local_model_sends_nothing_outside(tmp_path: Path) -> None:
    # What tests switch off must be off without it.
    quiet = ("HF_HUB_", "TRANSFORMERS_OFFLINE", "RAY_USAGE_STATS_ENABLED", "DO_NOT_TRACK")
    env = {name: value for name, value in os.environ.items() if not name.startswith(quiet)}
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, "-c", INSIDE, str(tmp_path)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("this machine gives nobody a network of their own")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["text"]
    assert found == {"text": found["text"], "left": 0, "sent": 0, "control": 1}
