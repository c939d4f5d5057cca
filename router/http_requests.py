"""Bodies of the OpenAI-compatible HTTP API, and the requests of protos/inference.proto that they stand for.

What the API's servers do with a field decides what is done with it here: fields that change the answer are honoured or
refused, fields that only label a request are taken and ignored, and a field that nobody knows is refused, for it may be
a misspelt one. Ranges are the router's business: it checks a request of either door with the same words.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from protos import inference_pb2

MAX_CHOICES = 1024
"""Choices of one request: prompts times `n`."""
MAX_N = 128
UINT32 = 2**32 - 1
COMPLETION_MAX_TOKENS = 16
"""Of /v1/completions, as its specification says; /v1/chat/completions goes on to the router's own default."""

FAIL_FAST = Field(fail_fast=True)
"""The first wrong element of a long array is enough: it is the one that is reported."""
NonNegative = Annotated[int, Field(ge=0, le=UINT32)]
TokenId = Annotated[int, Field(ge=0, le=UINT32)]
TokenPrompt = Annotated[list[TokenId], FAIL_FAST]


def _prompt_kind(value: object) -> str | None:
    """Which kind of prompt this is going to be, by its first element; None: none."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    if isinstance(first, str):
        return "texts"
    return "token_lists" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenPrompt, Tag("tokens")]
    | Annotated[Annotated[list[str], FAIL_FAST], Tag("texts")]
    | Annotated[Annotated[list[TokenPrompt], FAIL_FAST], Tag("token_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, an array of token ids, or an array of either",
    ),
]

Stop = Annotated[
    Annotated[str, Tag("text")] | Annotated[Annotated[list[str], FAIL_FAST], Tag("texts")],
    Discriminator(
        lambda value: {str: "text", list: "texts"}.get(type(value)),
        custom_error_type="stop_type",
        custom_error_message="must be a string or an array of strings",
    ),
]


class NotSupported(ValueError):
    """A field asks for what is not done here."""


def _neutral(*values: object) -> BeforeValidator:
    """Accepts a field only where it asks for nothing that is not done anyway."""

    def check(value: object) -> object:
        # True == 1 in Python, but not in JSON.
        if value is None or any(value == neutral and type(value) is type(neutral) for neutral in values):
            return None
        raise NotSupported("is not supported; leave it out")

    return BeforeValidator(check)


Ignored = Annotated[Any, Field(default=None, description="Accepted and ignored: it changes no answer.")]


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    """A last chunk without choices says how many tokens there were."""
    include_obfuscation: Ignored


class GenerationBody(BaseModel):
    """What both kinds of completion take. An absent or null field takes the router's default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    """As /v1/models lists it; absent: the one served."""
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    """Answers drawn for each prompt."""
    max_tokens: NonNegative | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=64)] | None = None
    """The tenant: tenants share the server by tokens."""

    # Extensions, named as other servers name them.
    ignore_eos: bool | None = None
    min_tokens: NonNegative | None = None
    top_k: Annotated[int, Field(ge=-1, le=UINT32)] | None = None
    """-1 or 0: all."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[TokenId], FAIL_FAST] | None = None
    request_id: Annotated[str, Field(max_length=200)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout_s: float | None = None

    logit_bias: Annotated[dict[str, float] | None, _neutral({})] = None
    metadata: Ignored
    prompt_cache_key: Ignored
    safety_identifier: Ignored
    service_tier: Ignored
    store: Ignored

    def choices(self) -> list[inference_pb2.GenerateRequest]:
        """One request a choice, in order: the `n` of the first prompt, then those of the next.

        Raises:
            TooManyChoices: more than MAX_CHOICES.
        """
        prompts = self._prompts()
        n = self.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise TooManyChoices(f"{len(prompts)} prompts with n = {n} are more than {MAX_CHOICES} choices; send fewer")
        common = self._common()
        requests = []
        for number, prompt in enumerate(prompts):
            for sibling in range(n):
                request = inference_pb2.GenerateRequest()
                request.CopyFrom(common)
                request.MergeFrom(prompt)
                request.sibling = sibling
                if request.request_id and (number or sibling):
                    request.request_id += f"-{number * n + sibling}"
                requests.append(request)
        return requests

    def _prompts(self) -> list[inference_pb2.GenerateRequest]:
        """A request a prompt, with nothing but the prompt."""
        raise NotImplementedError

    def _max_tokens(self) -> int | None:
        raise NotImplementedError

    def _logprobs(self) -> tuple[int | None, int | None]:
        """Likeliest tokens to name beside each of output and prompt; None: no log-probabilities at all."""
        raise NotImplementedError

    def _common(self) -> inference_pb2.GenerateRequest:
        logprobs, prompt_logprobs = self._logprobs()
        return inference_pb2.GenerateRequest(
            model=self.model or "",
            request_id=self.request_id or "",
            max_tokens=self._max_tokens(),
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed % 2**64,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=bool(self.ignore_eos),
            tenant=self.user or "",
            priority=self.priority,
            timeout_s=self.timeout_s,
        )


class CompletionBody(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    """The prompt comes before the completion, with log-probabilities where they are asked for."""
    logprobs: NonNegative | None = None
    """Likeliest tokens to name beside each."""
    best_of: Annotated[int | None, _neutral(1)] = None
    suffix: Annotated[str | None, _neutral("")] = None

    def _prompts(self) -> list[inference_pb2.GenerateRequest]:
        return [_prompt_request(prompt) for prompt in self.prompt_list()]

    def prompt_list(self) -> Sequence[str | list[int]]:
        """The prompts, each a text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt or isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]
        return prompt

    def _max_tokens(self) -> int | None:
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def _logprobs(self) -> tuple[int | None, int | None]:
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            # An echo alone is generated too, as a request without output, which the router takes only for its prompt's
            # log-probabilities.
            return self.logprobs, self.logprobs or 0
        return self.logprobs, None


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[Annotated[list[TextPart], FAIL_FAST], Tag("parts")],
    Discriminator(
        lambda value: {str: "text", list: "parts"}.get(type(value)),
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of text parts",
    ),
]


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored
    refusal: Annotated[str | None, _neutral("")] = None

    def text(self) -> str:
        """The content, its parts one after the other."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], FAIL_FAST, Field(min_length=1)]
    max_completion_tokens: NonNegative | None = None
    """Goes before max_tokens, its older name."""
    logprobs: bool | None = None
    top_logprobs: NonNegative | None = None
    """Likeliest tokens to name beside each; needs `logprobs`."""
    tools: Annotated[list[Any] | None, _neutral([])] = None
    tool_choice: Annotated[str | None, _neutral("none", "auto")] = None
    functions: Annotated[list[Any] | None, _neutral([])] = None
    function_call: Annotated[str | None, _neutral("none", "auto")] = None
    response_format: Annotated[dict[str, Any] | None, _neutral({"type": "text"})] = None
    modalities: Annotated[list[str] | None, _neutral(["text"])] = None
    audio: Annotated[dict[str, Any] | None, _neutral()] = None
    prediction: Annotated[dict[str, Any] | None, _neutral()] = None
    web_search_options: Annotated[dict[str, Any] | None, _neutral()] = None
    parallel_tool_calls: Ignored
    reasoning_effort: Ignored
    verbosity: Ignored

    def _prompts(self) -> list[inference_pb2.GenerateRequest]:
        messages = [
            # "developer" is the API's newer name for what templates call "system".
            inference_pb2.ChatMessage(role="system" if m.role == "developer" else m.role, content=m.text())
            for m in self.messages
        ]
        return [inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages(messages=messages))]

    def _max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _logprobs(self) -> tuple[int | None, int | None]:
        return (self.top_logprobs or 0) if self.logprobs else None, None


class TooManyChoices(ValueError):
    """One request asks for more than it may."""


def _prompt_request(prompt: str | list[int]) -> inference_pb2.GenerateRequest:
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt))
