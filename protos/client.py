"""A small client: needs grpcio and protobuf, nothing of a server.

with Client("127.0.0.1:9000") as client:
    for response in client.generate(make_request("Once upon a time", max_tokens=64)):
        print(response.text, end="", flush=True)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc

from protos import inference_pb2, inference_pb2_grpc
from protos.errors import CaravanError

Q = TypeVar("Q")
A = TypeVar("A")

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
]


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


def make_request(
    prompt: str | Sequence[int],
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
) -> inference_pb2.GenerateRequest:
    """A GenerateRequest; what is None takes the server's default.

    Args:
        prompt: text, or token ids used as given.
        model, ...: as in protos/inference.proto.

    Raises:
        ValueError: a number does not fit its field, such as a negative count.
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
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()
    return request


class Client:
    """One connection to a server. May be used from several threads.

    Every method raises CaravanError with the server's status and sentence; with UNAVAILABLE when nothing answers.

    Args:
        address: HOST:PORT.
        connect_timeout_s: seconds to wait for the first answer.
        timeout_s: seconds a call other than `generate` may take.
    """

    def __init__(self, address: str, connect_timeout_s: float = 5.0, timeout_s: float = 30.0) -> None:
        self.address = address
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._is_connected = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = inference_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and with it every stream."""
        self._channel.close()

    def connect(self) -> None:
        """Makes sure a server answers; at once where nothing listens. Every method does it first."""
        if self._is_connected:
            return
        try:
            self._admin.GetStatus(inference_pb2.GetStatusRequest(), timeout=self._connect_timeout_s)
        except grpc.RpcError as error:
            failure = _caravan_error(error)
            sentences = {
                grpc.StatusCode.UNAVAILABLE: f"no server answers at {self.address}; start one with `caravan serve`",
                grpc.StatusCode.DEADLINE_EXCEEDED: f"{self.address} did not answer in {self._connect_timeout_s:g} s",
                grpc.StatusCode.UNIMPLEMENTED: f"what answers at {self.address} is not Caravan",
            }
            raise CaravanError(failure.code, sentences.get(failure.code, failure.message)) from error
        self._is_connected = True

    def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Streams the continuation of a prompt. Closing the iterator cancels the request.

        Args:
            request: see make_request.
            timeout_s: seconds until the server gives up; None: no bound but the server's.
        """
        self.connect()
        call = self._inference.Generate(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            raise _caravan_error(error) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def complete(self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None) -> Completion:
        """Generates and collects the whole answer."""
        completion = Completion()
        for response in self.generate(request, timeout_s):
            add_response(completion, response)
        return completion

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as Generate would read it."""
        request = inference_pb2.TokenizeRequest(text=text)
        return list(self._call(self._inference.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids, keep_special_tokens=keep_special_tokens)
        return self._call(self._inference.Detokenize, request).text

    def get_model(self) -> inference_pb2.Model:
        """What is served."""
        return self._call(self._inference.GetModel, inference_pb2.GetModelRequest())

    def get_status(self) -> inference_pb2.Status:
        """Gangs and ranks as the router sees them."""
        return self._call(self._admin.GetStatus, inference_pb2.GetStatusRequest())

    def _call(self, method: "grpc.UnaryUnaryMultiCallable[Q, A]", request: Q) -> A:
        self.connect()
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise _caravan_error(error) from error


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


def _caravan_error(error: grpc.RpcError) -> CaravanError:
    call = cast(grpc.Call, error)  # So it is for every error a call raises, though the types do not say it.
    return CaravanError(call.code(), call.details() or "the server gave no reason")
