"""What `caravan serve` runs with: the command line over a TOML file over defaults."""

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cluster.errors import UsageError
from cluster.leader_config import LeaderConfig
from cluster.network import NetworkConfig, PortRange, join_address
from cluster.placement import PlacementConfig
from router.config import RouterConfig
from router.errors import RouterConfigError
from workers.config import DTYPES, EngineConfig
from workers.errors import UserError
from workers.model_fetch import pinned
from workers.model_source import ModelSource

DEFAULT_GRPC_PORT = 9000
DEFAULT_HTTP_PORT = 8000
DEFAULT_METRICS_PORT = 9400


# Of RouterConfig, what table [serve] says.
ROUTER_HIDDEN = ("model_dir", "host", "grpc_port", "http_port")
# The same of EngineConfig.
ENGINE_HIDDEN = ("model_dir", "dtype", "prefix_cache")
NOT_FETCHED = Path("not fetched yet")
"""Where a model of the hub or a URL is until `ServeConfig.at` says."""
TABLES = ("serve", "engine", "router", "gang", "placement", "network")


@dataclass(frozen=True)
class ServeTable:
    """Table [serve] of a configuration file; a key that is a flag of `caravan serve` too yields to it.

    Raises:
        UserError: a value is out of its range.
    """

    model: ModelSource | None = None
    """Folder of a Hugging Face checkpoint, hf://ORG/NAME[@REVISION], or the URL of a folder; without one, the model
    that comes with Caravan."""
    model_name: str = ""
    """Name that clients ask for; empty: the folder's or the repository's."""
    offline: bool = False
    """Request nothing outside: a model of the hub or a URL must have been fetched already."""
    models_cache_dir: Path | None = None
    """Folder of fetched models on every host; None: $XDG_CACHE_HOME/caravan/models, else ~/.cache/caravan/models."""
    models_cache_bytes: int = 0
    """Bytes of all fetched models of a host together; 0: half of the file system that folder lies on."""
    ranks: int = 4
    """Expert-parallel ranks of the gang."""
    routers: int = 1
    """Router processes; those of one host share its ports."""
    dtype: str = "auto"
    """"auto" (the checkpoint's own), "float32" or "bfloat16"."""
    prefix_cache: bool = True
    """Do not compute again what a prompt shares with an earlier one."""
    host: str = "127.0.0.1"
    """Address on which clients and Prometheus are answered."""
    grpc_port: int = DEFAULT_GRPC_PORT
    http_port: int = DEFAULT_HTTP_PORT
    metrics_port: int = DEFAULT_METRICS_PORT
    ray_address: str = ""
    """A running Ray to join (HOST:PORT or "auto"); empty: start one and end it with the server."""

    def __post_init__(self) -> None:
        for name in ("ranks", "routers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.models_cache_bytes < 0:
            raise UserError(f"models_cache_bytes: must not be negative, got {self.models_cache_bytes}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("grpc_port", "http_port", "metrics_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise UserError(f"{name.replace('_', '-')}: must be a port from 1 to 65535, got {getattr(self, name)}")
        if self.grpc_port == self.http_port:
            raise UserError(f"http-port: {self.http_port} is the gRPC port too; give another one")
        for other, port in (("gRPC", self.grpc_port), ("HTTP", self.http_port)):
            if port == self.metrics_port:
                raise UserError(f"metrics-port: {port} is the {other} port too; give another one")
        if not self.host:
            raise UserError("host: must not be empty; give an address of this machine, such as 127.0.0.1 or 0.0.0.0")


@dataclass(frozen=True)
class ServeConfig:
    """A deployment: one gang behind its routers.

    Raises:
        UserError: two of its tables do not go together.
    """

    source: ModelSource
    """What is served."""
    serve: ServeTable
    engine: EngineConfig
    router: RouterConfig
    leader: LeaderConfig
    placement: PlacementConfig
    network: NetworkConfig

    def __post_init__(self) -> None:
        serve, placement, network = self.serve, self.placement, self.network
        if placement.hosts > serve.ranks:
            raise UserError(f"hosts: {placement.hosts} are more than the {serve.ranks} ranks; each takes at least one")
        ports = {"gRPC": serve.grpc_port, "HTTP": serve.http_port, "metrics": serve.metrics_port}
        network.check_apart(ports)
        if not serve.ray_address:
            for name, is_asked in (("hosts", placement.hosts > 1), ("interface", bool(network.interface))):
                if is_asked:
                    raise UserError(
                        f"{name}: without ray_address, all ranks are on this host; start Ray on every host "
                        "(`ray start`) and give --ray-address"
                    )
            network.check_room(serve.ranks, "this host")

    def at(self, folder: Path) -> "ServeConfig":
        """The same with the model in a local folder, where it has been fetched to, and named by that very version: so
        other hosts fetch the same."""
        return dataclasses.replace(
            self,
            source=pinned(self.source, folder),
            engine=dataclasses.replace(self.engine, model_dir=folder),
            router=dataclasses.replace(self.router, model_dir=folder),
        )

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gRPC front door."""
        return join_address(self.serve.host, self.serve.grpc_port)

    @property
    def http_address(self) -> str:
        """HOST:PORT of the HTTP front door."""
        return join_address(self.serve.host, self.serve.http_port)

    @property
    def metrics_address(self) -> str:
        """HOST:PORT of this host's metrics."""
        return join_address(self.serve.host, self.serve.metrics_port)


def load_config(flags: Mapping[str, Any], file: Path | None, default_model: Path | None = None) -> ServeConfig:
    """Compose a deployment's configuration.

    Args:
        flags: values of [serve] keys the user gave on the command line; None where they gave none.
        file: a TOML file with tables [serve], [engine], [router], [gang], [placement] and [network], or None.
        default_model: served where neither names a model; None: that is an error.

    Raises:
        UsageError: the file cannot be read, has a key nobody knows or a value that cannot be.
    """
    tables = _read_tables(file) if file is not None else {}
    where = str(file) if file is not None else "the command line"
    try:
        given = {key: value for key, value in flags.items() if value is not None}
        from_file = _values(ServeTable, tables.get("serve", {}), f"{file}, [serve]", hidden=())
        if file is not None:
            from_file |= _beside_file(file, from_file)
        if "model" in given:
            given["model"] = ModelSource.parse(str(given["model"]))
        serve = ServeTable(**{**from_file, **given})
        source = serve.model or (ModelSource.of(default_model) if default_model is not None else None)
        if source is None:
            raise UsageError("model: none given; name a checkpoint's folder with --model")
        if source.is_local:
            # Told to other processes, which may stand elsewhere.
            source = ModelSource.of(source.path)
        model = source.path if source.is_local else NOT_FETCHED
        names = {} if source.is_local else {"model_name": source.name}
        engine = _values(EngineConfig, tables.get("engine", {}), f"{file}, [engine]", hidden=ENGINE_HIDDEN)
        if file is not None and isinstance(engine.get("weights_cache_dir"), Path):
            engine["weights_cache_dir"] = _beside(file, engine["weights_cache_dir"])
        router = _values(RouterConfig, tables.get("router", {}), f"{file}, [router]", hidden=ROUTER_HIDDEN)
        leader = _values(LeaderConfig, tables.get("gang", {}), f"{file}, [gang]", hidden=())
        placement = _values(PlacementConfig, tables.get("placement", {}), f"{file}, [placement]", hidden=())
        network = _values(NetworkConfig, tables.get("network", {}), f"{file}, [network]", hidden=())
        return ServeConfig(
            source=source,
            serve=serve,
            engine=EngineConfig(model_dir=model, dtype=serve.dtype, prefix_cache=serve.prefix_cache, **engine),
            router=RouterConfig(
                model_dir=model,
                host=join_address(serve.host, 0).removesuffix(":0"),
                grpc_port=serve.grpc_port,
                http_port=serve.http_port,
                **names | router | ({"model_name": serve.model_name} if serve.model_name else {}),
            ),
            leader=LeaderConfig(**leader),
            placement=PlacementConfig(**placement),
            network=NetworkConfig(**network),
        )
    except (UserError, RouterConfigError) as error:
        raise UsageError(f"{error} (in {where})" if file is not None else str(error)) from None


def _beside_file(file: Path, serve: dict[str, Any]) -> dict[str, Any]:
    """Paths of table [serve]."""
    found: dict[str, Any] = {}
    if isinstance(source := serve.get("model"), ModelSource) and source.is_local:
        found["model"] = ModelSource.of(_beside(file, Path(source.location)))
    if isinstance(folder := serve.get("models_cache_dir"), Path):
        found["models_cache_dir"] = _beside(file, folder)
    return found


def _beside(file: Path, path: Path) -> Path:
    """A path in a file means what it means beside that file."""
    return (file.parent / path.expanduser()).resolve()


def _read_tables(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            tables = tomllib.load(stream)
    except FileNotFoundError:
        raise UsageError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: is not valid TOML: {error}") from None
    for name, table in tables.items():
        if name not in TABLES:
            raise UsageError(_unknown(name, "table", str(file), TABLES))
        if not isinstance(table, dict):
            raise UsageError(f"{file}: {name} must be a table, written [{name}]")
    return tables


def _values(kind: type, table: Mapping[str, Any], where: str, hidden: Collection[str]) -> dict[str, Any]:
    """Values of `table` that fit the fields of dataclass `kind`, apart from those `hidden` from the file."""
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.name not in hidden]
    values = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(_unknown(key, "key", where, known))
        values[key] = _convert(value, hints[key], f"{where}: {key}")
    return values


def _convert(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} must be a table, got {value!r}")
        return {key: _convert(one, get_args(kind)[1], f"{where}.{key}") for key, one in value.items()}
    if get_origin(kind) is not None or type(kind).__name__ == "UnionType":
        kind = next(option for option in get_args(kind) if option is not type(None))
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (PortRange, ModelSource) and isinstance(value, str):
        try:
            return kind.parse(value)
        except UserError as error:
            raise UsageError(f"{where}: {str(error).removeprefix('model: ')}") from None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        named = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", Path: "a string"}
        named[ModelSource] = "a string"
        named[PortRange] = 'a string such as "20000-20099"'
        raise UsageError(f"{where} must be {named.get(kind, kind.__name__)}, got {value!r}")
    return value


def _unknown(name: str, what: str, where: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"{where}: unknown {what} {name!r}; {hint}"
