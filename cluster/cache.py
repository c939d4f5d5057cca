"""`caravan cache`: what lies in the caches of packed weights and fetched models, whether it is whole, what can go."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Column, Table

from cluster.errors import ExitCode, ServerError, UsageError
from workers.model_cache import CachedModel, ModelCache, default_models_folder
from workers.model_manifest import damaged_files
from workers.packed_cache import CachedPack, CacheUnusableError, PackedCache, default_cache_folder
from workers.packed_file import PackDamagedError, PackFile, damaged_tensors
from workers.remote import FetchError

SHORT = 12
"""Characters of a pack's name in the table: enough to tell packs apart."""


@dataclass(frozen=True)
class _Caches:
    packed: PackedCache
    fetched: ModelCache
    packs: list[CachedPack]
    models: list[CachedModel]
    is_named: bool
    """Chosen by name, not simply all."""


def run(arguments: argparse.Namespace) -> int:
    """List, verify or clean; verify returns 1 where a pack or a model is damaged.

    Raises:
        UsageError: no such folder, pack or model.
        ServerError: a folder cannot be read or changed.
    """
    try:
        given: Path | None = arguments.dir.expanduser() if arguments.dir is not None else None
        packed = PackedCache(given or default_cache_folder())
        fetched = ModelCache(given or default_models_folder())
    except (CacheUnusableError, FetchError) as error:
        raise UsageError(f"{error}, or name the folder with --dir") from None
    if given is not None and not given.is_dir():
        raise UsageError(f"dir: {given} is no folder")
    try:
        caches = _chosen(packed, fetched, arguments.names)
        return _ACTIONS[arguments.action](caches, arguments.json)
    except OSError as error:
        raise ServerError(f"{error.filename or packed.folder}: {error.strerror or error}") from None


def _list(caches: _Caches, as_json: bool) -> int:
    packs, models = caches.packs, caches.models
    if as_json:
        _print_json(
            {
                "folder": str(caches.packed.folder),
                "bytes": sum(pack.nbytes for pack in packs),
                "packs": [_pack_dict(pack) for pack in packs],
                "models_folder": str(caches.fetched.folder),
                "models": [_model_dict(model) for model in models],
            }
        )
        return ExitCode.OK
    console = Console(highlight=False)
    if packs:
        table = Table("name", "checkpoint", "type", "MB", "last use", "state")
        for pack in packs:
            source = Path(pack.header.source).name if pack.header else "?"
            dtype = pack.header.dtype if pack.header else "?"
            size = f"{pack.nbytes / 1e6:,.1f}"
            table.add_row(pack.path.name[:SHORT], source, dtype, size, _when(pack.last_use), _pack_state(pack))
        console.print(table)
    _say(console, _summary(caches.packed, _count(packs, "pack"), sum(pack.nbytes for pack in packs)))
    if models:
        table = Table(Column("name", overflow="fold"), "model", "version", "MB", "last use", "state")
        for model in models:
            source = model.manifest.source if model.manifest else "?"
            version = model.manifest.version[:SHORT] if model.manifest else "?"
            size = f"{model.nbytes / 1e6:,.1f}"
            table.add_row(model.folder.name, source, version, size, _when(model.last_use), _model_state(model))
        console.print(table)
        _say(console, _summary(caches.fetched, _count(models, "model"), sum(model.nbytes for model in models)))
    return ExitCode.OK


def _verify(caches: _Caches, as_json: bool) -> int:
    packs = [pack for pack in caches.packs if not pack.is_partial]
    models = [model for model in caches.models if model.manifest is not None and model.manifest.fetched]
    shown = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:

        def look(name: str, nbytes: int, damage: Callable[[Callable[[int], None]], str]) -> str:
            task = progress.add_task(name, total=nbytes)
            found = damage(partial(progress.advance, task))
            progress.remove_task(task)
            return found

        of_packs = {
            pack.path.name: look(pack.path.name[:SHORT], pack.nbytes, partial(_pack_damage, pack)) for pack in packs
        }
        of_models = {
            model.folder.name: look(model.folder.name, model.nbytes, partial(_model_damage, model)) for model in models
        }
    broken_packs = [name for name, damage in of_packs.items() if damage]
    broken_models = [name for name, damage in of_models.items() if damage]
    if as_json:
        found: dict[str, Any] = {"folder": str(caches.packed.folder), "packs": _damages(of_packs)}
        _print_json({**found, "models_folder": str(caches.fetched.folder), "models": _damages(of_models)})
        return ExitCode.SERVER_FAILURE if broken_packs or broken_models else ExitCode.OK
    console = Console(highlight=False)
    for name, damage in {**of_packs, **of_models}.items():
        _say(console, f"{name}: {damage or 'whole'}")
    sentences = []
    if broken_packs:
        sentences.append(
            f"{len(broken_packs)} of {len(packs)} packs are damaged; remove them with `caravan cache clean NAME`, and "
            "the next start packs anew"
        )
    if broken_models:
        sentences.append(
            f"{len(broken_models)} of {_count(models, 'model')} damaged; remove with `caravan cache clean NAME`, and "
            "the next start or `caravan fetch` fetches anew"
        )
    if sentences:
        raise ServerError("; ".join(sentences))
    if packs or not models:
        _say(console, f"{caches.packed.folder}: {_count(packs, 'pack')} verified")
    if models:
        _say(console, f"{caches.fetched.folder}: {_count(models, 'model')} verified")
    return ExitCode.OK


def _clean(caches: _Caches, as_json: bool) -> int:
    """What no process uses. Whole models only by name: without a network, or for hours, they would be missed."""
    removed: list[tuple[str, int]] = []
    kept: list[str] = []
    spared = [model for model in caches.models if model.is_whole and not caches.is_named]
    for pack in caches.packs:
        if caches.packed.remove(pack.path):
            removed.append((pack.path.name, pack.nbytes))
        else:
            kept.append(pack.path.name)
    packs = len(removed)
    for model in caches.models:
        if model in spared:
            continue
        if caches.fetched.remove(model.folder):
            removed.append((model.folder.name, model.nbytes))
        else:
            kept.append(model.folder.name)
    freed = sum(nbytes for _, nbytes in removed)
    if as_json:
        names = {"removed": [name for name, _ in removed], "in_use": kept}
        _print_json({"folder": str(caches.packed.folder), "freed_bytes": freed, **names})
        return ExitCode.OK
    console = Console(highlight=False)
    what = _counted(packs, "pack")
    if models := len(removed) - packs:
        what = f"{what} and {_counted(models, 'model')}" if packs else _counted(models, "model")
    in_use = f"; {len(kept)} in use are kept" if kept else ""
    _say(console, f"{caches.packed.folder}: removed {what}, {freed / 1e6:,.1f} MB{in_use}")
    if spared:
        _say(
            console,
            f"{caches.fetched.folder}: {_count(spared, 'model')} kept; `caravan cache clean NAME` removes one by name",
        )
    return ExitCode.OK


_ACTIONS: dict[str, Callable[[_Caches, bool], int]] = {
    "list": _list,
    "verify": _verify,
    "clean": _clean,
}


def _chosen(packed: PackedCache, fetched: ModelCache, names: Sequence[str]) -> _Caches:
    packs, models = packed.files(), fetched.models()
    for name in names:
        if not any(known.startswith(name) for known in (*_names(packs), *_names(models))):
            raise UsageError(
                f"name: no pack in {packed.folder} begins with {name!r}, and no model; see `caravan cache list`"
                if models
                else f"name: no pack in {packed.folder} begins with {name!r}; see `caravan cache list`"
            )
    if names:
        begins = tuple(names)
        packs = [pack for pack in packs if pack.path.name.startswith(begins)]
        models = [model for model in models if model.folder.name.startswith(begins)]
    return _Caches(packed, fetched, packs, models, bool(names))


def _names(entries: Iterable[CachedPack | CachedModel]) -> list[str]:
    return [entry.path.name if isinstance(entry, CachedPack) else entry.folder.name for entry in entries]


def _pack_damage(file: CachedPack, progress: Callable[[int], None]) -> str:
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
    return f"not what was packed: {_some(names)}" if names else ""


def _model_damage(model: CachedModel, progress: Callable[[int], None]) -> str:
    """The same of a fetched model."""
    if model.manifest is None or not model.folder.exists():
        return ""
    names = list(damaged_files(model.folder, model.manifest, progress))
    return f"not what was fetched: {_some(names)}" if names else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _pack_dict(file: CachedPack) -> dict[str, Any]:
    """The shape of --json: a public contract."""
    header = file.header
    return {
        "name": file.path.name,
        "bytes": file.nbytes,
        "last_use": round(file.last_use),
        "state": _pack_state(file),
        "checkpoint": header.source if header else None,
        "dtype": header.dtype if header else None,
        "created": header.created if header else None,
    }


def _model_dict(model: CachedModel) -> dict[str, Any]:
    """The same of a fetched model."""
    manifest = model.manifest
    return {
        "name": model.folder.name,
        "bytes": model.nbytes,
        "last_use": round(model.last_use),
        "state": _model_state(model),
        "model": manifest.source if manifest else None,
        "version": manifest.version if manifest else None,
        "fetched": (manifest.fetched or None) if manifest else None,
    }


def _pack_state(file: CachedPack) -> str:
    if file.is_partial:
        return "being packed" if file.is_in_use else "left over"
    if file.damage:
        return "damaged"
    return "in use" if file.is_in_use else "unused"


def _model_state(model: CachedModel) -> str:
    if model.is_whole:
        return "in use" if model.is_in_use else "unused"
    if model.is_in_use:
        return "being fetched"
    return "damaged" if model.manifest is not None and model.manifest.fetched else "left over"


def _damages(found: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "damage": damage} for name, damage in found.items()]


def _summary(cache: PackedCache | ModelCache, count: str, nbytes: int) -> str:
    bound = f" of at most {cache.limit_bytes / 1e6:,.0f} MB by default" if cache.folder.exists() else ""
    return f"{cache.folder}: {count}, {nbytes / 1e6:,.1f} MB{bound}"


def _count(entries: Sequence[object], what: str) -> str:
    return _counted(len(entries), what)


def _counted(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"


def _when(seconds: float) -> str:
    today = time.strftime("%Y-%m-%d")
    moment = datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    return moment.removeprefix(today + " ")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, separators=(",", ":")), flush=True)
