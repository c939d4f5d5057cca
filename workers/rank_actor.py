"""The Ray actor around a rank: where it runs and how it is watched. Everything else is the rank's own."""

import importlib
import os
import threading
from typing import TYPE_CHECKING

import ray

from workers.config import RankConfig

if TYPE_CHECKING:
    from workers.rank import Rank


@ray.remote(num_cpus=0, max_restarts=0)
class RankActor:
    """Starts its rank in the constructor and ends its process with it: a rank that is gone leaves no actor behind."""

    def __init__(self, config: RankConfig) -> None:
        os.environ.update(config.env)
        # Here and not above: who launches ranks imports this file, and need not wait for torch.
        self._rank: Rank = importlib.import_module("workers.rank").Rank(config)
        self._thread = threading.Thread(target=self._run, name="rank-engine", daemon=True)
        self._thread.start()

    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Ask the rank to end; the process follows."""
        self._rank.stop()

    def _run(self) -> None:
        status = 1
        try:
            self._rank.run()
            status = 0
        finally:
            # An idle actor process would outlive its rank and look alive.
            os._exit(status)
