"""Processes of their own for tests: started from a server that has imported torch, or each would take seconds for it.

`Processes` is a pool that tests share; a call costs milliseconds.
"""

import importlib
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

CALL_SECONDS = 60.0

context = multiprocessing.get_context("forkserver")
# Imported, not used: no thread of torch or gRPC is there yet when a process forks off.
context.set_forkserver_preload(["tests.distributed.jobs", "workers.rank"])


class Processes:
    """`run` calls a function in the first n processes at once. They end with `close`, or with their parent."""

    def __init__(self, size: int) -> None:
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def run(self, function: str, arguments: Sequence[tuple[Any, ...]], timeout_s: float = CALL_SECONDS) -> list[Any]:
        """Call `module:name` of tests.distributed in as many processes as there are tuples of arguments; the results.

        Raises:
            RuntimeError: any failed; every failure's stack trace is in it.
            TimeoutError: any did not answer.
        """
        for pipe, args in zip(self._pipes, arguments, strict=False):
            pipe.send((function, args))
        deadline = time.monotonic() + timeout_s
        results, failures = [], []
        for index in range(len(arguments)):
            if not self._pipes[index].poll(max(0.0, deadline - time.monotonic())):
                failures.append(f"process {index} did not answer within {timeout_s:.0f} s")
                self._processes[index].kill()
                continue
            succeeded, value = self._pipes[index].recv()
            if not succeeded:
                failures.append(f"process {index}: {value}")
            results.append(value)
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            module, name = function.split(":")
            result = getattr(importlib.import_module(f"tests.distributed.{module}"), name)(*args)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
