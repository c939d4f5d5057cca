"""Requests from plain Python values."""

from collections.abc import Mapping, Sequence
from typing import cast

from protos import inference_pb2


def make_request(
    prompt: str | Sequence[int] | Sequence[Mapping[str, str]],
    *,
    model: str = "",
    request_id: str = "",
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    tenant: str = "",
    priority: int | None = None,
    timeout_s: float | None = None,
    resumable: bool = False,
    sibling: int = 0,
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest; what is None takes the server's default.

    Args:
        prompt: text, token ids used as given, or a conversation: messages such as {"role": "user", "content": "Hi"}.
        model, ...: as in protos/inference.proto.

    Raises:
        ValueError: a number does not fit its field, such as a negative count.
        ValueError: a chat message has a field other than role and content.
        TypeError: a value is of another type than its field.
    """
    request = inference_pb2.GenerateRequest(
        model=model,
        request_id=request_id,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        tenant=tenant,
        priority=priority,
        timeout_s=timeout_s,
        resumable=resumable,
        sibling=sibling,
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.messages.extend([inference_pb2.ChatMessage(**cast(Mapping[str, str], one)) for one in prompt])
    else:
        request.token_ids.ids.extend(cast(Sequence[int], prompt))
        request.token_ids.SetInParent()
    return request
