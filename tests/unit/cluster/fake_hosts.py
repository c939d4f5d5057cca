"""Hosts whose agents work in this process, each at a loopback address of its own."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.host import Host, HostFacts, HostGoneError, HostSpec, HostWork, WantedModel
from cluster.network import NetworkConfig


class LocalHost(Host):
    """HostWork without Ray. What a test sets here overrides what the host finds."""

    def __init__(
        self, folder: Path, number: int, network: NetworkConfig | None = None, model: WantedModel | None = None
    ) -> None:
        address = f"127.0.0.{number}"
        super().__init__(address)
        metrics = folder / f"h{number}" / "metrics"
        self.work = HostWork(HostSpec(address, network or NetworkConfig(), metrics, 0, model or WantedModel()))
        self.pretended: dict[str, Any] = {"hostname": f"h{number}"}
        """Fields of its facts."""
        self.answers: dict[str, Any] = {}
        """By method: what it answers instead, or the exception it raises."""
        self.is_frozen = False

    async def call(self, method: str, *arguments: Any) -> Any:
        if self.is_frozen:
            await asyncio.Event().wait()
        if isinstance(answer := self.answers.get(method), Exception):
            raise answer
        if method not in self.answers:
            answer = await asyncio.to_thread(getattr(self.work, method), *arguments)
        return replace(answer, **self.pretended) if isinstance(answer, HostFacts) else answer

    async def close(self) -> None:
        self.work.close()


class GoneHost(LocalHost):
    """Its agent does not answer."""

    async def call(self, method: str, *arguments: Any) -> Any:
        raise HostGoneError(f"host {self.name} is gone: its agent does not answer")
