"""The processes of a server: whom chaos strikes, and when all of them are back."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil

from protos import inference_pb2
from protos.client import NO_RETRIES, Client
from protos.errors import CaravanError
from tests.chaos_schedule import Event, Kind
from tests.e2e.serving import Server

ROUTER, LEADER = "ray::ServeReplica:caravan:Router", "ray::ServeReplica:caravan:Gang"
POLL_S = 0.05
ELSEWHERE = re.compile(r"streams have to go on elsewhere: (.*)$", re.MULTILINE)


@dataclass
class Struck:
    """An event that happened; times by time.monotonic."""

    event: Event
    at: float
    noticed_at: float = 0.0
    """The routers' view changed; 0: it never did."""
    whole_at: float = 0.0
    """All was back; 0: never, within the bound."""
    moved: set[str] = field(default_factory=set)
    """Ids of requests whose rank was lost, as the routers' logs name them."""
    log: list[str] = field(default_factory=list)
    """What leader and routers wrote meanwhile."""


class Victims:
    """Of one server.

    Args:
        ranks, routers: that it has when it is whole.
    """

    def __init__(self, server: Server, ranks: int, routers: int) -> None:
        self._server, self._num_ranks, self._num_routers = server, ranks, routers
        self._client = Client(server.address, connect_timeout_s=2.0, timeout_s=2.0, retries=NO_RETRIES)
        self._read: dict[Path, int] = {}

    def close(self) -> None:
        self._client.close()

    @property
    def logs(self) -> Path:
        """Of the server's Ray."""
        raylet = next(process for process in self._server.left if process.name() == "raylet")
        folder = re.search(r"--raylet_socket_name=(.*?)/session_", " ".join(raylet.cmdline()))
        assert folder, "a raylet says where its socket is"
        return Path(folder[1]) / "session_latest" / "logs"

    def strike(self, event: Event, bound_s: float) -> Struck:
        """Do it, and wait until all is back or the bound has passed."""
        self.news()
        before = self._gang()
        assert before is not None, "chaos begins with a gang that is whole"
        pids, signal_ = self._pids(event, before), signal.SIGSTOP if event.kind is Kind.STUCK else signal.SIGKILL
        for pid in pids:
            os.kill(pid, signal_)
        struck = Struck(event, time.monotonic())

        def has_changed() -> bool:
            if event.kind is Kind.ROUTER:
                return self._listening().isdisjoint(pids)
            gang = self._gang()
            return gang is not None and (gang.id, gang.epoch) != (before.id, before.epoch)

        def is_whole() -> bool:
            gang = self._gang()
            return self._is_whole(gang) and gang is not None and pids.isdisjoint(rank.pid for rank in gang.ranks)

        deadline = struck.at + bound_s
        if _until(has_changed, deadline):
            struck.noticed_at = time.monotonic()
            if _until(is_whole, deadline):
                struck.whole_at = time.monotonic()
        return struck

    def account(self, struck: Struck) -> None:
        """Read what the logs say of it."""
        news = self.news()
        struck.log = news.splitlines()
        struck.moved = {name for found in ELSEWHERE.findall(news) for name in found.split(", ")}

    def news(self) -> str:
        """What the server's processes wrote since the last call."""
        told = []
        for file in sorted(self.logs.glob("worker-*.err")):
            with file.open(errors="replace") as text:
                text.seek(self._read.get(file, 0))
                told.append(text.read())
                self._read[file] = text.tell()
        return "".join(told)

    def _pids(self, event: Event, gang: inference_pb2.GangStatus) -> set[int]:
        if event.kind is Kind.LEADER:
            return set(self._titled(LEADER))
        if event.kind is Kind.ROUTER:
            routers = sorted(self._titled(ROUTER))
            return {routers[number] for number in event.victims}
        return {rank.pid for rank in gang.ranks if rank.rank in event.victims}

    def _is_whole(self, gang: inference_pb2.GangStatus | None) -> bool:
        if gang is None or gang.state != "ready" or len(gang.ranks) != self._num_ranks:
            return False
        return all(rank.state == "ready" for rank in gang.ranks) and len(self._listening()) == self._num_routers

    def _gang(self) -> inference_pb2.GangStatus | None:
        """As a router sees it; None where no router answers."""
        with contextlib.suppress(CaravanError, grpc.RpcError):
            return next(iter(self._client.get_status().gangs), None)
        return None

    def _listening(self) -> set[int]:
        """Routers whose door is open."""
        port = int(self._server.address.rpartition(":")[2])
        found = set()
        for pid in self._titled(ROUTER):
            with contextlib.suppress(psutil.Error):
                sockets = psutil.Process(pid).net_connections("tcp")
                if any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in sockets):
                    found.add(pid)
        return found

    def _titled(self, title: str) -> list[int]:
        found = []
        for process in psutil.Process(self._server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and " ".join(process.cmdline()).startswith(title):
                    found.append(process.pid)
        return found


def _until(is_over: Callable[[], bool], deadline: float) -> bool:
    while not is_over():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
