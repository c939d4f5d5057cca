"""`caravan cache`: what lies in the cache of packed weights, whether it is whole, and what can go."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from cluster.errors import ExitCode, ServerError, UsageError
from workers.packed_cache import CachedPack, CacheUnusableError, PackedCache, default_cache_folder
from workers.packed_file import PackDamagedError, PackFile, damaged_tensors

SHORT = 12
"""Characters of a name in the table: enough to tell packs apart."""


def run(arguments: argparse.Namespace) -> int:
    """List, verify or clean; verify returns 1 where a pack is damaged.

    Raises:
        UsageError: no such folder or pack.
        ServerError: the folder cannot be read or changed.
    """
    try:
        folder = arguments.dir.expanduser() if arguments.dir is not None else default_cache_folder()
    except CacheUnusableError as error:
        raise UsageError(f"{error}, or name the folder with --dir") from None
    if arguments.dir is not None and not folder.is_dir():
        raise UsageError(f"dir: {folder} is no folder")
    cache = PackedCache(folder)
    try:
        files = _chosen(cache.files(), arguments.names, folder)
        return _ACTIONS[arguments.action](cache, files, arguments.json)
    except OSError as error:
        raise ServerError(f"{error.filename or folder}: {error.strerror or error}") from None


def _list(cache: PackedCache, files: list[CachedPack], as_json: bool) -> int:
    total = sum(file.nbytes for file in files)
    limit = cache.limit_bytes if cache.folder.exists() else 0
    if as_json:
        _print_json({"folder": str(cache.folder), "bytes": total, "packs": [_as_dict(file) for file in files]})
        return ExitCode.OK
    console = Console(highlight=False)
    if files:
        table = Table("name", "checkpoint", "type", "MB", "last use", "state")
        for file in files:
            described = file.header
            source = Path(described.source).name if described else "?"
            dtype = described.dtype if described else "?"
            cells = (
                file.path.name[:SHORT],
                source,
                dtype,
                f"{file.nbytes / 1e6:,.1f}",
                _when(file.last_use),
                _state(file),
            )
            table.add_row(*cells)
        console.print(table)
    bound = f" of at most {limit / 1e6:,.0f} MB by default" if limit else ""
    console.print(f"{cache.folder}: {_count(files)}, {total / 1e6:,.1f} MB{bound}", soft_wrap=True, markup=False)
    return ExitCode.OK


def _verify(cache: PackedCache, files: list[CachedPack], as_json: bool) -> int:
    packs = [file for file in files if not file.is_partial]
    results: dict[str, str] = {}
    console = Console(highlight=False)
    shown = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        for file in packs:
            task = progress.add_task(file.path.name[:SHORT], total=file.nbytes)
            results[file.path.name] = _damage(file, partial(progress.advance, task))
            progress.remove_task(task)
    broken = {name: damage for name, damage in results.items() if damage}
    if as_json:
        described = [{"name": name, "damage": damage} for name, damage in results.items()]
        _print_json({"folder": str(cache.folder), "packs": described})
        return ExitCode.SERVER_FAILURE if broken else ExitCode.OK
    for name, damage in results.items():
        console.print(f"{name}: {damage or 'whole'}", soft_wrap=True, markup=False)
    if broken:
        raise ServerError(
            f"{len(broken)} of {len(packs)} packs are damaged; remove them with `caravan cache clean NAME`, and the "
            "next start packs anew"
        )
    console.print(f"{cache.folder}: {_count(packs)} verified", soft_wrap=True, markup=False)
    return ExitCode.OK


def _clean(cache: PackedCache, files: list[CachedPack], as_json: bool) -> int:
    removed: list[CachedPack] = []
    kept: list[CachedPack] = []
    for file in files:
        (removed if cache.remove(file.path) else kept).append(file)
    freed = sum(file.nbytes for file in removed)
    if as_json:
        names = {"removed": [file.path.name for file in removed], "in_use": [file.path.name for file in kept]}
        _print_json({"folder": str(cache.folder), "freed_bytes": freed, **names})
        return ExitCode.OK
    console = Console(highlight=False)
    in_use = f"; {len(kept)} in use are kept" if kept else ""
    console.print(
        f"{cache.folder}: removed {_count(removed)}, {freed / 1e6:,.1f} MB{in_use}", soft_wrap=True, markup=False
    )
    return ExitCode.OK


_ACTIONS: dict[str, Callable[[PackedCache, list[CachedPack], bool], int]] = {
    "list": _list,
    "verify": _verify,
    "clean": _clean,
}


def _chosen(files: list[CachedPack], names: Sequence[str], folder: Path) -> list[CachedPack]:
    for name in names:
        if not any(file.path.name.startswith(name) for file in files):
            raise UsageError(f"name: no pack in {folder} begins with {name!r}; see `caravan cache list`")
    return [file for file in files if not names or file.path.name.startswith(tuple(names))]


def _damage(file: CachedPack, progress: Callable[[int], None]) -> str:
    """What is wrong with a pack, in a phrase; empty where all is well, or where it is gone meanwhile."""
    try:
        pack = PackFile(file.path)
    except FileNotFoundError:
        return ""
    except PackDamagedError as error:
        return str(error)
    try:
        names = list(damaged_tensors(pack.fd, pack.header, progress))
    except PackDamagedError as error:
        return str(error)
    finally:
        pack.close()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"not what was packed: {', '.join(names[:3])}{more}" if names else ""


def _as_dict(file: CachedPack) -> dict[str, Any]:
    """The shape of --json: a public contract."""
    header = file.header
    return {
        "name": file.path.name,
        "bytes": file.nbytes,
        "last_use": round(file.last_use),
        "state": _state(file),
        "checkpoint": header.source if header else None,
        "dtype": header.dtype if header else None,
        "created": header.created if header else None,
    }


def _state(file: CachedPack) -> str:
    if file.is_partial:
        return "being packed" if file.is_in_use else "left over"
    if file.damage:
        return "damaged"
    return "in use" if file.is_in_use else "unused"


def _count(packs: list[CachedPack]) -> str:
    return "1 pack" if len(packs) == 1 else f"{len(packs)} packs"


def _when(seconds: float) -> str:
    today = time.strftime("%Y-%m-%d")
    moment = datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    return moment.removeprefix(today + " ")


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, separators=(",", ":")), flush=True)
