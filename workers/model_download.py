"""Fetching a model's files into its folder: several at once, each checked, so that a kill loses little."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from workers.file_download import FileDownload, HaltedError
from workers.model_manifest import JOURNAL, KeptFile, Manifest, write_manifest
from workers.remote import Remote, RemoteFile

CONNECTIONS = 4
TICK_S = 0.1
END_BOUND_S = 2.0


class FetchStoppedError(Exception):
    """The caller's `stop` was set; what has been fetched stays, and the next attempt goes on from there."""


@dataclass(frozen=True)
class FetchProgress:
    """How far a fetch is."""

    bytes_done: int
    """Of all the model's files that are there; what was there before counts."""
    bytes_total: int
    """0: not known yet."""
    file: str = ""
    """The one begun last."""
    note: str = ""
    """What a person should know: a try that failed, whom is waited for; empty most of the time."""


class Download:
    """Fetches files of one version into a folder that this process has locked.

    Args:
        journal: the version, and what of it is there whole; as it grows it is written to the folder.
        stop: set by the caller to end it.
    """

    def __init__(self, remote: Remote, folder: Path, journal: Manifest, stop: threading.Event) -> None:
        self.journal = journal
        self._remote = remote
        self._folder = folder
        self._stop = stop
        self._lock = threading.Lock()
        self._done: dict[str, int] = {name: kept.size for name, kept in journal.files.items()}
        self._notes: dict[str, str] = {}
        self._file = ""

    def progress(self) -> FetchProgress:
        with self._lock:
            note = next(iter(self._notes.values()), "")
            return FetchProgress(sum(self._done.values()), self.journal.total, self._file, note)

    def run(self, files: Sequence[RemoteFile], tick: Callable[[], None]) -> None:
        """Fetch those of `files` that are not there; `tick` is called some times a second, by this thread.

        Raises:
            UserError, FetchError: one cannot be had.
            FetchStoppedError: the caller wanted no more of it.
            OSError: the folder cannot be written.
            Whatever `tick` raises.
        """
        waiting: SimpleQueue[RemoteFile] = SimpleQueue()
        for file in files:
            if file.name not in self.journal.files:
                waiting.put(file)
        connections = _Connections(min(CONNECTIONS, waiting.qsize()), partial(self._fetch_all, waiting))
        try:
            while connections.are_busy():
                if self._stop.wait(TICK_S):
                    raise FetchStoppedError(f"{self.journal.source}: stopped")
                tick()
            connections.raise_error()
            tick()
        finally:
            connections.end()

    def _fetch_all(self, waiting: SimpleQueue[RemoteFile], gate: threading.Lock, halt: threading.Event) -> None:
        while not halt.is_set():
            try:
                file = waiting.get_nowait()
            except Empty:
                return
            with self._lock:
                self._file = file.name
            moved, say = partial(self._moved, file.name), partial(self._say, file.name)
            kept = FileDownload(self._remote, self.journal.version, self._folder, file, gate, halt, moved, say).run()
            with gate, self._lock:
                if halt.is_set():
                    return
                self.journal = self.journal.with_file(file.name, kept)
                write_manifest(self._folder, self.journal, JOURNAL)

    def _moved(self, name: str, nbytes: int) -> None:
        with self._lock:
            self._done[name] = nbytes

    def _say(self, name: str, note: str) -> None:
        with self._lock:
            if note:
                self._notes[name] = note
            else:
                self._notes.pop(name, None)


class _Connections:
    """Threads that fetch, each with a gate it passes whenever it changes anything on the disk."""

    def __init__(self, count: int, work: Callable[[threading.Lock, threading.Event], None]) -> None:
        self._work = work
        self._halt = threading.Event()
        self._errors: SimpleQueue[Exception] = SimpleQueue()
        self._gates = [threading.Lock() for _ in range(count)]
        # They end with the process, whatever they wait for.
        self._threads = [
            threading.Thread(target=self._run, args=(gate,), name="fetch", daemon=True) for gate in self._gates
        ]
        for thread in self._threads:
            thread.start()

    def are_busy(self) -> bool:
        """False: all is fetched, or one has failed."""
        return self._errors.empty() and any(thread.is_alive() for thread in self._threads)

    def raise_error(self) -> None:
        if not self._errors.empty():
            raise self._errors.get()

    def end(self) -> None:
        """Nothing is written any more when this returns."""
        self._halt.set()
        for gate in self._gates:
            with gate:
                pass
        # One that still waits for an answer has nothing to do with it any more.
        deadline = time.monotonic() + END_BOUND_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, gate: threading.Lock) -> None:
        try:
            self._work(gate, self._halt)
        except HaltedError:
            pass
        except Exception as error:
            self._errors.put(error)


def adopt(journal: Manifest, folder: Path, files: Sequence[RemoteFile]) -> Manifest:
    """Of what a journal says is there whole, what is still as long and still of the model."""
    sizes = {file.name: file.size for file in files}
    kept: dict[str, KeptFile] = {}
    for name, entry in journal.files.items():
        try:
            if sizes.get(name) == entry.size == (folder / name).stat().st_size:
                kept[name] = entry
        except OSError:
            continue
    return Manifest(journal.source, journal.version, sum(sizes.values()), kept)
