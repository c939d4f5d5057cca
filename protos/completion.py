"""A whole answer, put together from the messages of a stream."""

from dataclasses import dataclass, field

from protos import inference_pb2


@dataclass
class Completion:
    """A whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """Of the output."""
    logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    """One entry a token, when asked for."""
    prompt_logprobs: list[inference_pb2.PositionLogprobs] = field(default_factory=list)
    """One entry a prompt token but the first, when asked for."""
    finish_reason: str = ""
    """"stop", "length", "abort" or "error"."""
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)
    request_id: str = ""
    seed: int = 0


def finish_reason_name(reason: inference_pb2.FinishReason.ValueType) -> str:
    """ "stop" for FINISH_REASON_STOP, and so on; empty for FINISH_REASON_UNSPECIFIED."""
    if reason == inference_pb2.FINISH_REASON_UNSPECIFIED:
        return ""
    return inference_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()


def add_response(completion: Completion, response: inference_pb2.GenerateResponse) -> None:
    """Appends one message of a stream to the answer so far."""
    completion.text += response.text
    completion.token_ids.extend(response.token_ids)
    completion.logprobs.extend(response.logprobs)
    completion.prompt_logprobs.extend(response.prompt_logprobs)
    if response.request_id:
        completion.request_id, completion.seed = response.request_id, response.seed
    if response.finish_reason:
        completion.finish_reason = finish_reason_name(response.finish_reason)
        completion.usage = response.usage
