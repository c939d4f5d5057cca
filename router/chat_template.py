"""A conversation to the text of a prompt, by the checkpoint's own template."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from router.errors import RouterConfigError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"


class GenerationTag(Extension):
    """`{% generation %}` marks what an assistant said, for training. Here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplateError(ValueError):
    """The template refuses a conversation; one clause says why."""


class ChatTemplate:
    """A template as transformers runs them: sandboxed, since it comes with the checkpoint.

    Safe to use from several threads at once.

    Args:
        source: the Jinja template.
        special_tokens: what the template may name, such as `bos_token`.

    Raises:
        RouterConfigError: the template cannot be read.

    Attributes:
        source: as given.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise RouterConfigError(f"the chat template cannot be read: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate | None":
        """Reads chat_template.jinja, else what tokenizer_config.json holds; None where there is neither.

        Args:
            folder: a Hugging Face checkpoint.

        Raises:
            RouterConfigError: a file cannot be read.
        """
        template_file, config_file = Path(folder) / TEMPLATE_FILE, Path(folder) / CONFIG_FILE
        config: Any = {}
        try:
            if config_file.is_file():
                config = json.loads(config_file.read_text(encoding="utf-8"))
            source = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
        except (OSError, ValueError) as error:
            raise RouterConfigError(f"{folder}: the chat template cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise RouterConfigError(f"{config_file} must hold a JSON object")
        source = source if source is not None else _named(config.get("chat_template"))
        if source is None:
            return None
        return cls(source, {key: text for key, value in config.items() if (text := _token(key, value)) is not None})

    def render(self, messages: Sequence[Mapping[str, str]], time_s: int) -> str:
        """The prompt up to where the assistant speaks.

        Args:
            messages: role and content, in order.
            time_s: seconds since 1970 UTC, for templates that ask for the time.

        Raises:
            ChatTemplateError: the template refuses them.
        """
        now = datetime.fromtimestamp(time_s, UTC)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                strftime_now=now.strftime,
                **self._special_tokens,
            )
        except Exception as error:  # A template may fail in any way on messages its author did not think of.
            raise ChatTemplateError(str(error) or type(error).__name__) from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _named(value: object) -> str | None:
    """The template, or the one named "default" of several."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _token(key: str, value: object) -> str | None:
    """A special token as tokenizer_config.json writes them: a string, or an object with its content."""
    if not key.endswith("_token"):
        return None
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
