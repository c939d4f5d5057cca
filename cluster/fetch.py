"""`caravan fetch`: a model of the hub or a URL into this host's cache, before anybody needs it.

`caravan serve` does the same first.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cluster.config import ServeConfig, load_config
from cluster.errors import ExitCode, ServerError, UsageError
from workers.checkpoint_check import check_checkpoint
from workers.errors import UserError
from workers.model_cache import ModelLock, default_models_folder, hold
from workers.model_config import ModelConfig
from workers.model_download import FetchProgress
from workers.model_fetch import fetch, fetched, local_folder
from workers.model_source import ModelSource
from workers.remote import FetchError

LINE_S = 30.0
"""Between two lines of progress where nobody looks at a terminal."""


def run(arguments: argparse.Namespace) -> int:
    """Fetch a model, check that it is whole, and print its folder.

    Raises:
        UsageError: there is no such model, or it cannot be served.
        ServerError: it cannot be had now.
    """
    flags = {"model": arguments.model, "models_cache_dir": arguments.dir}
    config = load_config(flags, arguments.config)
    folder = fetch_model(config, Console(stderr=True))
    try:
        check_checkpoint(folder, ModelConfig.from_folder(folder))
    except UserError as error:
        raise UsageError(str(error)) from None
    print(folder, flush=True)
    return ExitCode.OK


def fetch_model(config: ServeConfig, console: Console) -> Path:
    """The model's folder on this host, fetched if need be, with progress on `console`.

    Raises:
        UsageError: there is no such model, or it may not be seen.
        ServerError: it cannot be had now.
        KeyboardInterrupt: what has been fetched stays.
    """
    source = config.source
    display: FetchDisplay | None = None
    try:
        if source.is_local:
            return local_folder(source)
        display = FetchDisplay(console, source)
        return fetch(
            source,
            models_folder(config),
            display.show,
            offline=config.serve.offline,
            limit_bytes=config.serve.models_cache_bytes,
        )
    except UserError as error:
        raise UsageError(str(error)) from None
    except FetchError as error:
        raise ServerError(str(error)) from None
    except (KeyboardInterrupt, SystemExit):
        if display is not None:
            display.note(f"stopped; what has been fetched of {source} is kept, and the next start goes on from there")
        raise
    finally:
        if display is not None:
            display.close()


def fetched_model(config: ServeConfig) -> Path:
    """The model's folder on this host, if nothing need be fetched.

    Raises:
        UsageError: it would have to be.
        ServerError: the cache cannot be read.
    """
    try:
        folder = fetched(config.source, models_folder(config))
    except UserError as error:
        raise UsageError(str(error)) from None
    except FetchError as error:
        raise ServerError(str(error)) from None
    if folder is None:
        raise UsageError(f"{config.source} is not on this host yet; run `caravan fetch {config.source}` first")
    return folder


def keep_model(folder: Path) -> ModelLock | None:
    """Have a fetched model stay while this process lives; None: it is the user's own folder.

    Raises:
        ServerError: it is gone.
    """
    try:
        return hold(folder)
    except FetchError as error:
        raise ServerError(str(error)) from None


def models_folder(config: ServeConfig) -> Path:
    """Where fetched models are kept on this host.

    Raises:
        UsageError: there is no home folder.
    """
    if config.serve.models_cache_dir is not None:
        return config.serve.models_cache_dir.expanduser().absolute()
    try:
        return default_models_folder()
    except FetchError as error:
        raise UsageError(f"{error}, or models_cache_dir in [serve]") from None


class FetchDisplay:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, source: ModelSource) -> None:
        self._console = console
        self._source = source
        self._note = ""
        self._said = time.monotonic()
        self._has_begun = False
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(f"fetching {source.name}", total=None)
        self._progress.start()

    def show(self, progress: FetchProgress) -> None:
        """How far it is."""
        if progress.note:
            self.note(progress.note)
        if not progress.bytes_total:
            return
        done, total = progress.bytes_done, progress.bytes_total
        if not self._has_begun:
            # What is there already was not fetched just now: it does not count as speed.
            self._has_begun = True
            self._progress.reset(self._task, total=total, completed=done)
            self._line(done, total)
        self._progress.update(self._task, completed=done, total=total)
        if time.monotonic() - self._said >= LINE_S:
            self._line(done, total)

    def note(self, text: str) -> None:
        """Something a person should know; said once."""
        if text != self._note:
            self._note = text
            self._print(f"caravan: {text}")

    def close(self) -> None:
        self._progress.stop()

    def _line(self, done: int, total: int) -> None:
        self._said = time.monotonic()
        if not self._console.is_terminal:
            self._print(f"caravan: fetching {self._source}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
