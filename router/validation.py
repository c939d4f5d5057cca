"""A client's request, checked once: what comes out can be generated without another question."""

import hashlib
import math
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from protos import gang_pb2, inference_pb2
from router.chat_template import ChatTemplate, ChatTemplateError
from router.config import RouterConfig
from router.errors import InvalidRequest
from router.model_info import ModelInfo
from router.tokenizer import Tokenizer

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_REQUEST_ID_CHARS = 256
MAX_PENALTY = 2.0
MAX_TENANT_CHARS = 64
MAX_PRIORITY = 10
MAX_ROLE_CHARS = 64
MAX_CHAT_MESSAGES = 4096
MAX_CHAT_TIME = 4_102_444_800
"""The year 2100: times beyond are mistakes, and some no calendar has."""
NOT_THE_REQUEST = ("resume_offset", "resume_token_ids", "timeout_s", "seed", "chat_time")
"""Fields in which a request that comes again may differ from the first time: the seed it was given is compared."""


@dataclass(frozen=True)
class ValidRequest:
    """A request that can be generated, nothing left to default."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """At least one token."""
    sampling: gang_pb2.Sampling
    """With the seed that was asked for or drawn. Not to be changed."""
    max_tokens: int
    """With the prompt it fits the context. 0 only where the prompt's log-probabilities are asked for."""
    min_tokens: int
    """At most max_tokens."""
    stop_token_ids: frozenset[int]
    """The model's end-of-text tokens unless ignored, and the request's own."""
    stop: tuple[str, ...]
    tenant: str = ""
    priority: int = 0
    """-10 to 10; higher goes first."""
    timeout_s: float | None = None
    """Seconds from arrival; None: no bound."""
    sibling: int = 0
    resumable: bool = False
    """Then the client gave the request_id."""
    resume_offset: int = 0
    """Output tokens the client has; less than max_tokens or equal."""
    resume_token_ids: tuple[int, ...] = ()
    """These, or nothing."""
    chat_time: int = 0
    """Seconds since 1970 that the chat template saw; 0 where the prompt is no chat."""
    has_id: bool = False
    """The client chose the request_id."""
    has_seed: bool = False
    """The client named the seed."""
    identity: bytes = b""
    """The request, to compare with when it comes again."""

    @property
    def cost(self) -> int:
        """Tokens it may take at most: prompt and output."""
        return len(self.prompt_ids) + self.max_tokens


class Validator:
    """Checks requests against one model.

    Args:
        config: the router's bounds.
        model: the checkpoint served.
        tokenizer: its tokenizer.
        chat_template: its chat template; None: it has none, and chats are refused.
    """

    def __init__(
        self, config: RouterConfig, model: ModelInfo, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None
    ) -> None:
        self._config = config
        self._model = model
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def check(self, request: inference_pb2.GenerateRequest, context_length: int) -> ValidRequest:
        """Checks everything, the cheap before the dear: text is tokenized last.

        Args:
            request: as the client sent it.
            context_length: tokens of prompt and output together that a gang takes.

        Raises:
            InvalidRequest: names the field and what would be right.
        """
        if request.model and request.model != self._model.name:
            raise InvalidRequest("model", f"{request.model[:100]!r} is not served here; this is {self._model.name!r}")
        self._check_delivery(request)
        if request.HasField("max_tokens") and request.max_tokens < 1 and not request.HasField("prompt_logprobs"):
            raise InvalidRequest("max_tokens", "must be at least 1, got 0; 0 is for prompt_logprobs alone")
        sampling = self._sampling(request)
        stop = _stop_strings(request.stop)
        stop_token_ids = self._stop_token_ids(request)
        chat_time = (request.chat_time or int(time.time())) if request.HasField("chat") else 0
        prompt_ids = self._prompt_ids(request, context_length, chat_time)
        max_tokens = self._max_tokens(request, len(prompt_ids), context_length)
        if request.min_tokens > max_tokens:
            raise InvalidRequest("min_tokens", f"{request.min_tokens} is more than max_tokens ({max_tokens})")
        if request.resume_offset > max_tokens:
            raise InvalidRequest("resume_offset", f"{request.resume_offset} is more than max_tokens ({max_tokens})")
        if (given := len(request.resume_token_ids)) not in (0, request.resume_offset):
            raise InvalidRequest("resume_token_ids", f"{given}, and resume_offset is {request.resume_offset}")
        self.check_token_ids("resume_token_ids", request.resume_token_ids)
        return ValidRequest(
            request_id=request.request_id or uuid.uuid4().hex,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            stop_token_ids=stop_token_ids,
            stop=stop,
            tenant=request.tenant,
            priority=request.priority,
            timeout_s=request.timeout_s if request.HasField("timeout_s") else None,
            sibling=request.sibling,
            resumable=request.resumable,
            resume_offset=request.resume_offset,
            resume_token_ids=tuple(request.resume_token_ids),
            chat_time=chat_time,
            has_id=bool(request.request_id),
            has_seed=request.HasField("seed"),
            identity=_identity(request) if request.resumable else b"",
        )

    def check_text(self, field: str, text: str) -> None:
        """Refuses text too long to be tokenized.

        Raises:
            InvalidRequest: it is.
        """
        # A character is at most 4 bytes, so most texts need not be encoded to know.
        limit = self._config.max_prompt_bytes
        if len(text) * 4 > limit and (size := len(text.encode())) > limit:
            raise InvalidRequest(field, f"at most {limit} bytes of text, got {size}")

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Refuses ids the model does not have.

        Raises:
            InvalidRequest: names the first one.
        """
        vocab_size = self._model.vocab_size
        if token_ids and max(token_ids) >= vocab_size:
            position = next(i for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
            raise InvalidRequest(
                field, f"{token_ids[position]} at position {position} is no token; ids go from 0 to {vocab_size - 1}"
            )

    def _check_delivery(self, request: inference_pb2.GenerateRequest) -> None:
        """What says how the answer is delivered, to whom and when."""
        if len(request.request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                "request_id", f"at most {MAX_REQUEST_ID_CHARS} characters, got {len(request.request_id)}"
            )
        if len(request.tenant) > MAX_TENANT_CHARS:
            raise InvalidRequest("tenant", f"at most {MAX_TENANT_CHARS} characters, got {len(request.tenant)}")
        if abs(request.priority) > MAX_PRIORITY:
            raise InvalidRequest("priority", f"from -{MAX_PRIORITY} to {MAX_PRIORITY}, got {request.priority}")
        if request.HasField("timeout_s") and not 0 < request.timeout_s < math.inf:
            raise InvalidRequest("timeout_s", f"must be a number of seconds more than 0, got {request.timeout_s:g}")
        if request.HasField("chat_time") and not 0 < request.chat_time < MAX_CHAT_TIME:
            raise InvalidRequest("chat_time", f"must be seconds since 1970, more than 0, got {request.chat_time}")
        if request.resumable and not request.request_id:
            raise InvalidRequest("request_id", "is missing; a resumable request is known by it when it comes again")
        if request.resume_offset and not request.resumable:
            raise InvalidRequest("resume_offset", "is for resumable requests; set resumable, as in the first request")

    def _prompt_ids(self, request: inference_pb2.GenerateRequest, context_length: int, chat_time: int) -> Sequence[int]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", "is missing; set text, token_ids or chat")
        if kind == "token_ids":
            ids: Sequence[int] = request.token_ids.ids
            if not ids:
                raise InvalidRequest("token_ids", "the prompt is empty; give at least one token id")
            if len(ids) <= context_length:  # A longer one is refused for its length, unread.
                self.check_token_ids("token_ids", ids)
        else:
            if kind == "text" and not request.text:
                raise InvalidRequest("text", "the prompt is empty; give at least one character")
            text = request.text if kind == "text" else self._render(request.chat, chat_time)
            self.check_text(kind, text)
            ids = self._tokenizer.encode(text)
            if not ids:
                raise InvalidRequest(kind, "the tokenizer makes no token of this prompt")
        if len(ids) + self._wants_output(request) > context_length:
            raise InvalidRequest(
                kind,
                f"the prompt has {len(ids)} tokens; the context takes {context_length} of prompt and output together",
            )
        return ids

    def _wants_output(self, request: inference_pb2.GenerateRequest) -> bool:
        return not request.HasField("max_tokens") or request.max_tokens > 0

    def _render(self, chat: inference_pb2.ChatMessages, chat_time: int) -> str:
        if self._chat_template is None:
            raise InvalidRequest("chat", "the checkpoint has no chat template; send text or token_ids")
        if not 1 <= len(chat.messages) <= MAX_CHAT_MESSAGES:
            raise InvalidRequest("chat", f"needs 1 to {MAX_CHAT_MESSAGES} messages, got {len(chat.messages)}")
        for i, message in enumerate(chat.messages):
            if not 1 <= len(message.role) <= MAX_ROLE_CHARS:
                raise InvalidRequest(
                    "chat", f"a role has 1 to {MAX_ROLE_CHARS} characters; message {i} has {len(message.role)}"
                )
        limit, size = self._config.max_prompt_bytes, sum(len(message.content) for message in chat.messages)
        if size > limit:  # Before the template has to deal with it; the text that comes out is checked again.
            raise InvalidRequest("chat", f"at most {limit} bytes of text, got {size} characters")
        try:
            messages = [{"role": message.role, "content": message.content} for message in chat.messages]
            return self._chat_template.render(messages, chat_time)
        except ChatTemplateError as error:
            raise InvalidRequest("chat", f"the checkpoint's chat template refuses the messages: {error}") from error

    def _max_tokens(self, request: inference_pb2.GenerateRequest, prompt_tokens: int, context_length: int) -> int:
        left = context_length - prompt_tokens
        if not request.HasField("max_tokens"):
            return min(self._config.default_max_tokens, left)
        if request.max_tokens > left:
            raise InvalidRequest(
                "max_tokens",
                f"{prompt_tokens} prompt tokens and {request.max_tokens} more pass the context of {context_length}; "
                f"ask for at most {left}",
            )
        return request.max_tokens

    def _sampling(self, request: inference_pb2.GenerateRequest) -> gang_pb2.Sampling:
        defaults = self._model.defaults

        def number(field: str, default: float, low: float, high: float, low_excluded: bool = False) -> float:
            value: float = getattr(request, field) if request.HasField(field) else default  # type: ignore[arg-type]
            if math.isfinite(value) and low <= value <= high and not (low_excluded and value == low):
                return value
            bounds = f"{'more than' if low_excluded else 'at least'} {low:g}"
            if math.isfinite(high):
                bounds += f" and at most {high:g}"
            raise InvalidRequest(field, f"must be a number of {bounds}, got {value:g}")

        sampling = gang_pb2.Sampling(
            temperature=number("temperature", defaults.temperature, 0, math.inf),
            top_p=number("top_p", defaults.top_p, 0, 1, low_excluded=True),
            top_k=request.top_k if request.HasField("top_k") else defaults.top_k,
            min_p=number("min_p", 0, 0, 1),
            repetition_penalty=number("repetition_penalty", 1, 0, math.inf, low_excluded=True),
            presence_penalty=number("presence_penalty", 0, -MAX_PENALTY, MAX_PENALTY),
            frequency_penalty=number("frequency_penalty", 0, -MAX_PENALTY, MAX_PENALTY),
            seed=request.seed if request.HasField("seed") else secrets.randbits(64),
        )
        most = min(MAX_LOGPROBS, self._model.vocab_size)
        for field in ("logprobs", "prompt_logprobs"):
            if request.HasField(field):
                if (count := getattr(request, field)) > most:
                    raise InvalidRequest(field, f"at most {most}, got {count}")
                setattr(sampling, field, count)
        return sampling

    def _stop_token_ids(self, request: inference_pb2.GenerateRequest) -> frozenset[int]:
        if len(request.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS}, got {len(request.stop_token_ids)}")
        self.check_token_ids("stop_token_ids", request.stop_token_ids)
        own = frozenset(request.stop_token_ids)
        return own if request.ignore_eos else own | frozenset(self._model.eos_token_ids)


def _identity(request: inference_pb2.GenerateRequest) -> bytes:
    same = inference_pb2.GenerateRequest()
    same.CopyFrom(request)
    for field in NOT_THE_REQUEST:
        same.ClearField(field)  # type: ignore[arg-type]
    return hashlib.sha256(same.SerializeToString(deterministic=True)).digest()


def _stop_strings(strings: Sequence[str]) -> tuple[str, ...]:
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", f"at most {MAX_STOP_STRINGS} stop strings, got {len(strings)}")
    for i, string in enumerate(strings):
        if not 1 <= len(string) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequest(
                "stop", f"each has 1 to {MAX_STOP_STRING_CHARS} characters; number {i} has {len(string)}"
            )
    return tuple(strings)
