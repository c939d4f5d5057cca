"""The `caravan` command: flags and exit codes are a public contract; each command lives in a module of its own."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from cluster.errors import CommandError, ExitCode, UsageError, report

DEFAULT_ADDRESS = "127.0.0.1:9000"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the server failed, 2 the user's input cannot work, 130 ended
    by Ctrl-C, 143 by SIGTERM."""
    try:
        arguments = make_parser().parse_args(argv)
        if arguments.command is None:
            raise UsageError("no command given; see `caravan --help`")
        signal.signal(signal.SIGTERM, _on_terminate)
        # Only the chosen command's imports are paid for.
        module = "dry_run" if getattr(arguments, "dry_run", False) else arguments.command
        return int(importlib.import_module(f"cluster.{module}").run(arguments))
    except CommandError as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def make_parser() -> argparse.ArgumentParser:
    """Every flag of every command."""
    parser = _Parser(prog="caravan", description="Serve a Llama 4 model from a gang of expert-parallel ranks.")
    parser.add_argument("--version", action="version", version=f"caravan {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="start a server in the foreground",
        description="Start a server in the foreground. It prints one line, `ready grpc=HOST:PORT http=HOST:PORT "
        "metrics=HOST:PORT`, when it can answer, and ends with every process it started on Ctrl-C or SIGTERM.",
    )
    # No defaults here: what is not given comes from the configuration file, and only then from cluster.config.
    serve.add_argument(
        "--model", metavar="MODEL", help="checkpoint's folder, hf://ORG/NAME[@REVISION] or URL (default: a small model)"
    )
    serve.add_argument("--model-name", metavar="NAME", help="name clients ask for (default: the folder's)")
    serve.add_argument("--ranks", type=_whole_number(1), metavar="N", help="expert-parallel ranks (default 4)")
    serve.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), help="computation type (default auto: the checkpoint's)"
    )
    serve.add_argument("--routers", type=_whole_number(1), metavar="N", help="router processes (default 1)")
    serve.add_argument("--host", help="address to answer on (default 127.0.0.1)")
    serve.add_argument("--grpc-port", type=_whole_number(1, 65535), metavar="PORT", help="(default 9000)")
    serve.add_argument("--http-port", type=_whole_number(1, 65535), metavar="PORT", help="(default 8000)")
    serve.add_argument("--metrics-port", type=_whole_number(1, 65535), metavar="PORT", help="(default 9400)")
    serve.add_argument("--ray-address", metavar="ADDRESS", help="a running Ray to join (default: start one)")
    serve.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="tables [serve], [engine], [router], [gang], [placement] and [network]",
    )
    serve.add_argument("--dry-run", action="store_true", help="print which ranks go where, with what; start nothing")

    generate = commands.add_parser("generate", help="continue a prompt", description="Stream a prompt's continuation.")
    generate.add_argument("prompt", metavar="PROMPT", help="text, or token ids with --token-ids")
    _add_address(generate)
    generate.add_argument("--max-tokens", type=_whole_number(1, 2**32 - 1), metavar="N", help="most tokens to generate")
    generate.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: the model's)")
    generate.add_argument(
        "--seed", type=_whole_number(0, 2**64 - 1), metavar="S", help="the same seed draws the same tokens"
    )
    generate.add_argument("--ignore-eos", action="store_true", help="go on past the end of the text")
    generate.add_argument("--token-ids", action="store_true", help="PROMPT is space-separated token ids")
    generate.add_argument("--json", action="store_true", help="print one JSON object instead of text")

    status = commands.add_parser("status", help="show gangs and ranks", description="Show a server's gangs and ranks.")
    _add_address(status)
    status.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    down = commands.add_parser(
        "down", help="end a server of this machine", description="End a server started elsewhere."
    )
    _add_address(down)

    evaluate = commands.add_parser(
        "eval",
        help="perplexity of a text",
        description="How well a running server's model predicts a text: perplexity and bits per byte, "
        "from prompt log-probabilities over windows of the model's context.",
    )
    evaluate.add_argument("file", type=Path, metavar="FILE", help="UTF-8 text")
    _add_address(evaluate)
    evaluate.add_argument("--window", type=_whole_number(2), metavar="N", help="tokens (default: the context less 1)")
    evaluate.add_argument("--stride", type=_whole_number(1), metavar="N", help="tokens (default: half the window)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    bench = commands.add_parser(
        "bench",
        help="speed of a running server, beside others'",
        description="Put load on a running server and measure it: output tokens a second, time to first token, gaps "
        "between messages. With --against, another server takes turns with it. A failed stream is counted and named, "
        "and makes the exit code 1. URL is HOST:PORT (gRPC) or http://HOST:PORT (any server with OpenAI's completions, "
        "#MODEL after it where it has several).",
    )
    bench.add_argument(
        "--address", type=_target, default=DEFAULT_ADDRESS, metavar="URL", help=f"(default {DEFAULT_ADDRESS})"
    )
    bench.add_argument(
        "--against",
        type=_target,
        action="append",
        default=[],
        metavar="URL",
        help="a server to compare with; repeatable",
    )
    bench.add_argument(
        "--streams", type=_several(_whole_number(1, 10_000)), metavar="N,…", help="closed load (default 1,8,64)"
    )
    bench.add_argument(
        "--rate", type=_several(_positive), metavar="R,…", help="open load: Poisson arrivals a second, not --streams"
    )
    bench.add_argument(
        "--seconds",
        type=_positive,
        metavar="S",
        help="how long requests are begun (default: 20 with --rate, else 6, 24, 128 requests for 1, 8, 64 streams)",
    )
    bench.add_argument(
        "--mix",
        default="random",
        metavar="MIX",
        help="prompts: random (default), shared-prefix[:TOKENS], or long-prompt[:TOKENS] (long ones beside streams)",
    )
    bench.add_argument("--prompt-tokens", type=_whole_number(1), default=128, metavar="N", help="(default 128)")
    bench.add_argument("--output-tokens", type=_whole_number(1), default=64, metavar="N", help="(default 64)")
    bench.add_argument("--rounds", type=_whole_number(1), default=3, metavar="N", help="medians are of (default 3)")
    bench.add_argument("--seed", type=_whole_number(0), metavar="S", help="of prompts and arrivals (default: fresh)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    bench.add_argument("--png", type=Path, metavar="FILE", help="draw it")

    fetch = commands.add_parser(
        "fetch",
        help="a model into this host's cache",
        description="Fetch what serving needs of a model into this host's cache, on from where an earlier attempt was "
        "broken off, and print its folder. `caravan serve` does the same for its --model. Tokens and endpoints of the "
        "hub are its own: HF_TOKEN, HF_ENDPOINT.",
    )
    fetch.add_argument("model", metavar="MODEL", help="hf://ORG/NAME[@REVISION], or the URL of a checkpoint's folder")
    fetch.add_argument("--dir", type=Path, metavar="DIR", help="(default ~/.cache/caravan/models)")
    fetch.add_argument("--config", type=Path, metavar="FILE.toml", help="of [serve] what says where models are kept")

    cache = commands.add_parser(
        "cache",
        help="packed weights and fetched models of this host",
        description="Show, check or remove packed weights and fetched models. Ranks on CPU lay a checkpoint out once, "
        "in a file that all ranks of the host share and later starts find again; models of the hub or a URL are "
        "fetched once a host.",
    )
    cache.add_argument(
        "action",
        choices=("list", "verify", "clean"),
        help="clean removes what no process uses, of whole models those named; verify reads everything",
    )
    cache.add_argument("names", nargs="*", metavar="NAME", help="beginnings of names, as listed (default: all)")
    cache.add_argument("--dir", type=Path, metavar="DIR", help="(default weights and models in ~/.cache/caravan)")
    cache.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    commands.add_parser(
        "demo",
        help="four ranks, several prompts, text as it streams",
        description="Start a server of four ranks on a small model, stream several prompts at once, and end it again.",
    )
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", type=_address, default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"(default {DEFAULT_ADDRESS})"
    )


def _whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    bounds = f"at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return value

    return read


def _several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: list(dict.fromkeys(read(one) for one in text.split(",")))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0 and finite, got {text}")
    return value


def _target(text: str) -> str:
    if "/" not in text:
        return _address(text)
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:  # Its port is none.
        is_url = False
    if not is_url:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT or http://HOST:PORT, got {text!r}")
    return text


def _address(text: str) -> str:
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, such as {DEFAULT_ADDRESS}, got {text!r}")
    return text


def _on_terminate(_number: int, _frame: object) -> NoReturn:
    sys.exit(ExitCode.TERMINATED)


def _version() -> str:
    try:
        return metadata.version("caravan")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
