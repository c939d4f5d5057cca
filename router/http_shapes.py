"""Answers of the HTTP API as JSON: whole ones, and the events of a stream.

An event's constant parts are made once a choice, so that a token costs one string escaped and three joined.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Protocol

from protos import inference_pb2
from router.detokenizer import Detokenizer
from router.tokenizer import Tokenizer

DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass
class Usage:
    """Tokens of an answer with all its choices; a prompt counts once, however many answers are drawn for it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of prompt_tokens, those that were not computed again."""

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Choice:
    """One whole answer."""

    text: str = ""
    logprobs: dict[str, list[Any]] | None = None
    finish_reason: str = ""


class Logprobs(Protocol):
    """Log-probabilities of one choice, in an API's shape. Keeps count of where in the text a token stands."""

    def of(self, positions: Iterable[inference_pb2.PositionLogprobs]) -> dict[str, list[Any]]:
        """Of the next tokens."""
        ...


@dataclass
class CompletionLogprobs:
    """As /v1/completions has them: four arrays, an element a token."""

    tokenizer: Tokenizer
    _text: Detokenizer = field(init=False)
    _offset: int = 0

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer.token_bytes)

    def of(self, positions: Iterable[inference_pb2.PositionLogprobs]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for position in positions:
            chosen = position.chosen
            top = {self._name(entry.token_id): _number(entry.logprob) for entry in position.top}
            top.setdefault(self._name(chosen.token_id), _number(chosen.logprob))
            self._add(made, chosen.token_id, _number(chosen.logprob), top)
        return made

    def first(self, token_id: int) -> dict[str, list[Any]]:
        """Of the first token of an echoed prompt, which nothing predicts."""
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._add(made, token_id, None, None)
        return made

    def _add(
        self, made: dict[str, list[Any]], token_id: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        made["tokens"].append(self._name(token_id))
        made["token_logprobs"].append(logprob)
        made["top_logprobs"].append(top)
        made["text_offset"].append(self._offset)
        self._offset += len(self._text.push((token_id,)))

    def _name(self, token_id: int) -> str:
        return token_name(self.tokenizer.written(token_id))


@dataclass
class ChatLogprobs:
    """As /v1/chat/completions has them: an object a token."""

    tokenizer: Tokenizer

    def of(self, positions: Iterable[inference_pb2.PositionLogprobs]) -> dict[str, list[Any]]:
        content = []
        for position in positions:
            entry = self._entry(position.chosen)
            entry["top_logprobs"] = [self._entry(top) for top in position.top]
            content.append(entry)
        return {"content": content}

    def _entry(self, token: inference_pb2.TokenLogprob) -> dict[str, Any]:
        written = self.tokenizer.written(token.token_id)
        return {"token": token_name(written), "logprob": _number(token.logprob), "bytes": list(written)}


class Shape(Protocol):
    """How one API writes its answers."""

    def event(
        self, index: int, text: str, logprobs: dict[str, list[Any]] | None = None, finish_reason: str | None = None
    ) -> str:
        """What a stream says of one choice."""
        ...

    def usage_event(self, usage: Usage) -> str:
        """What a stream says last when it was asked for usage."""
        ...

    def whole(self, choices: Sequence[Choice], usage: Usage) -> str:
        """An answer that is not streamed."""
        ...


class _Base:
    def __init__(self, answer_id: str, kind: str, created: int, model: str, with_usage: bool) -> None:
        self._top = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._tail = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._no_more = f',"logprobs":null,"finish_reason":null}}]{self._tail}'

    def usage_event(self, usage: Usage) -> str:
        return f"data: {json.dumps({**self._top, 'choices': [], 'usage': usage.as_json()}, separators=(',', ':'))}\n\n"

    def _head(self) -> str:
        return "data: " + json.dumps(self._top, separators=(",", ":"))[:-1] + ',"choices":[{"index":'

    def _rest(self, logprobs: dict[str, list[Any]] | None, finish_reason: str | None) -> str:
        if logprobs is None and finish_reason is None:
            return self._no_more
        finish = "null" if finish_reason is None else f'"{finish_reason}"'
        return f',"logprobs":{json.dumps(logprobs)},"finish_reason":{finish}}}]{self._tail}'


class CompletionShape(_Base):
    """/v1/completions."""

    def __init__(self, answer_id: str, created: int, model: str, with_usage: bool, num_choices: int) -> None:
        super().__init__(answer_id, "text_completion", created, model, with_usage)
        self._heads = [f'{self._head()}{index},"text":' for index in range(num_choices)]

    def event(
        self, index: int, text: str, logprobs: dict[str, list[Any]] | None = None, finish_reason: str | None = None
    ) -> str:
        return self._heads[index] + quote(text) + self._rest(logprobs, finish_reason)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> str:
        made = [
            {"index": i, "text": c.text, "logprobs": c.logprobs, "finish_reason": c.finish_reason}
            for i, c in enumerate(choices)
        ]
        return json.dumps({**self._top, "choices": made, "usage": usage.as_json()})


class ChatShape(_Base):
    """/v1/chat/completions. The first event of a choice says who speaks."""

    def __init__(
        self, answer_id: str, created: int, model: str, with_usage: bool, num_choices: int, is_stream: bool
    ) -> None:
        kind = "chat.completion.chunk" if is_stream else "chat.completion"
        super().__init__(answer_id, kind, created, model, with_usage)
        self._heads = [f'{self._head()}{index},"delta":{{"content":' for index in range(num_choices)]
        self._firsts: set[int] = set(range(num_choices))

    def event(
        self, index: int, text: str, logprobs: dict[str, list[Any]] | None = None, finish_reason: str | None = None
    ) -> str:
        head = self._heads[index]
        if index in self._firsts:
            self._firsts.discard(index)
            head = head.removesuffix('"content":') + '"role":"assistant","content":'
        return head + quote(text) + "}" + self._rest(_chat(logprobs), finish_reason)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> str:
        made = [
            {
                "index": i,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                "logprobs": _chat(c.logprobs),
                "finish_reason": c.finish_reason,
            }
            for i, c in enumerate(choices)
        ]
        return json.dumps({**self._top, "choices": made, "usage": usage.as_json()})


def token_name(written: bytes) -> str:
    """A token as text; one that is no text by itself, such as half a character, as `bytes:\\xe2\\x98`."""
    try:
        return written.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def add_logprobs(sofar: dict[str, list[Any]] | None, more: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    """Both, one after the other."""
    if sofar is None or more is None:
        return more if sofar is None else sofar
    for key, values in more.items():
        sofar[key].extend(values)
    return sofar


def _chat(logprobs: dict[str, list[Any]] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {**logprobs, "refusal": None}


def _number(logprob: float) -> float:
    # A float of 32 bits has about 7 digits; more would be noise.
    return round(logprob, 7) if math.isfinite(logprob) else LEAST_LOGPROB
