"""A small client: needs grpcio, protobuf and googleapis-common-protos, nothing of a server.

with Client("127.0.0.1:9000") as client:
    for response in client.generate(make_request("Once upon a time", max_tokens=64)):
        print(response.text, end="", flush=True)
"""

import contextlib
import uuid
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc

from protos import inference_pb2, inference_pb2_grpc
from protos.completion import Completion, add_response, finish_reason_name
from protos.errors import CaravanError
from protos.requests import make_request
from protos.retries import NO_RETRIES, Patience, Retries
from protos.status_details import retry_after_s

__all__ = [
    "NO_RETRIES",
    "Client",
    "Completion",
    "Retries",
    "add_response",
    "finish_reason_name",
    "make_request",
]

Q = TypeVar("Q")
A = TypeVar("A")

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    # A stream that broke is to be resumed soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Two clients of one process are two connections.
    ("grpc.use_local_subchannel_pool", 1),
]
# Of a connection that somebody took and dropped, which no server does that is not dying.
DROPPED = ("Connection reset", "Socket closed", "Broken pipe")
BROKEN = (inference_pb2.FINISH_REASON_ERROR, inference_pb2.FINISH_REASON_ABORT)
DEFAULT_RETRIES = Retries()


class Client:
    """One connection to a server. May be used from several threads.

    Every method raises CaravanError with the server's status and sentence; with UNAVAILABLE when nothing answers.
    What failed before its first token is sent again where that may help, and a resumable stream that breaks is resumed.

    Args:
        address: HOST:PORT; also any other target of gRPC, such as ipv4:10.0.0.1:9000,10.0.0.2:9000.
        connect_timeout_s: seconds to wait for the first answer.
        timeout_s: seconds a call other than those that generate may take.
        retries: how often and how long to try again.
    """

    def __init__(
        self,
        address: str,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 30.0,
        retries: Retries = DEFAULT_RETRIES,
    ) -> None:
        self.address = address
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._retries = retries
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
        patience = Patience(self._retries, self._connect_timeout_s)
        while not self._is_connected:
            try:
                self._admin.GetStatus(inference_pb2.GetStatusRequest(), timeout=patience.left_s)
            except grpc.RpcError as error:
                failure = _caravan_error(error)
                # There may be another router beside the one that died.
                if any(sign in failure.message for sign in DROPPED) and patience.wait(failure):
                    continue
                raise self._why_not_connected(failure) from error
            self._is_connected = True

    def generate(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """Streams the continuation of a prompt. Closing the iterator cancels the request, also a resumable one.

        Args:
            request: see make_request.
            timeout_s: seconds in all, trying again included; None: no bound but the server's.
        """
        self.connect()
        request = _with_id(request)
        if request.resumable and timeout_s is not None and timeout_s > 0 and not request.HasField("timeout_s"):
            request.timeout_s = timeout_s  # It would go on without us.
        patience = Patience(self._retries, timeout_s)
        try:
            while not (yield from self._attempt(request, patience)):
                pass
        except GeneratorExit:
            if request.resumable:  # Without a word the server would go on and wait for us.
                with contextlib.suppress(CaravanError):
                    self.cancel(request.request_id, request.tenant)
            raise

    def generate_once(self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None) -> Completion:
        """Generates and gets the whole answer in one message.

        Args:
            request: see make_request.
            timeout_s: seconds in all, trying again included; None: no bound but the server's.
        """
        completion = Completion()
        patience = Patience(self._retries, timeout_s)
        add_response(completion, self._call(self._inference.GenerateOnce, _with_id(request), patience))
        return completion

    def complete(self, request: inference_pb2.GenerateRequest, timeout_s: float | None = None) -> Completion:
        """Generates and collects the whole answer."""
        completion = Completion()
        for response in self.generate(request, timeout_s):
            add_response(completion, response)
        return completion

    def cancel(self, request_id: str, tenant: str = "") -> bool:
        """Ends every generation of a request; False where the router that answers has none."""
        return self._call(
            self._inference.Cancel, inference_pb2.CancelRequest(request_id=request_id, tenant=tenant)
        ).found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, as Generate would read it."""
        request = inference_pb2.TokenizeRequest(text=text)
        return list(self._call(self._inference.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], keep_special_tokens: bool = False) -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids, keep_special_tokens=keep_special_tokens)
        return self._call(self._inference.Detokenize, request).text

    def list_models(self) -> list[inference_pb2.Model]:
        """All models served."""
        return list(self._call(self._inference.ListModels, inference_pb2.ListModelsRequest()).models)

    def get_model(self) -> inference_pb2.Model:
        """What is served."""
        return self._call(self._inference.GetModel, inference_pb2.GetModelRequest())

    def get_status(self) -> inference_pb2.Status:
        """Gangs and ranks as the router sees them now: never tried again."""
        patience = Patience(NO_RETRIES, self._timeout_s)
        return self._call(self._admin.GetStatus, inference_pb2.GetStatusRequest(), patience)

    def _why_not_connected(self, failure: CaravanError) -> CaravanError:
        sentences = {
            grpc.StatusCode.UNAVAILABLE: f"no server answers at {self.address}; start one with `caravan serve`",
            grpc.StatusCode.DEADLINE_EXCEEDED: f"{self.address} did not answer in {self._connect_timeout_s:g} s",
            grpc.StatusCode.UNIMPLEMENTED: f"what answers at {self.address} is not Caravan",
        }
        return CaravanError(failure.code, sentences.get(failure.code, failure.message))

    def _attempt(
        self, request: inference_pb2.GenerateRequest, patience: Patience
    ) -> Generator[inference_pb2.GenerateResponse, None, bool]:
        """One call. False when it broke; then `request` is what is to be sent next."""
        broken = None
        may_mend = True
        call = self._inference.Generate(request, timeout=patience.left_s, metadata=_attempts(patience))
        try:
            for response in call:
                if response.finish_reason in BROKEN:
                    broken = response  # Whether it is the last message is not decided.
                    continue
                may_mend = request.resumable
                _advance(request, response, patience)
                yield response
        except grpc.RpcError as error:
            failure = _caravan_error(error)
            may_mend = may_mend and (request.resumable or broken is None or not broken.token_ids)
            if not (may_mend and patience.wait(failure)):
                if broken is not None:
                    yield broken
                raise failure from error
            if broken is not None and broken.token_ids and request.resumable:
                for field in ("finish_reason", "usage", "detail"):
                    broken.ClearField(field)
                _advance(request, broken, patience)
                yield broken
            return False
        else:
            if broken is not None:  # A server that calls this well has the last word all the same.
                yield broken
        finally:
            call.cancel()  # type: ignore[no-untyped-call]
        return True

    def _call(self, method: "grpc.UnaryUnaryMultiCallable[Q, A]", request: Q, patience: Patience | None = None) -> A:
        self.connect()
        patience = patience or Patience(self._retries, self._timeout_s)
        while True:
            try:
                return method(request, timeout=patience.left_s, metadata=_attempts(patience))
            except grpc.RpcError as error:
                failure = _caravan_error(error)
                if not patience.wait(failure):
                    raise failure from error


def _with_id(request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateRequest:
    """A copy with an id: the server knows a request again by it."""
    named = inference_pb2.GenerateRequest()
    named.CopyFrom(request)
    named.request_id = request.request_id or uuid.uuid4().hex
    return named


def _advance(
    request: inference_pb2.GenerateRequest, response: inference_pb2.GenerateResponse, patience: Patience
) -> None:
    """Makes of a resumable request what gets the rest after `response`; takes out of it what was told before."""
    if response.token_ids:
        patience.progress()
    if not request.resumable:
        return
    if request.resume_offset:
        for field in ("request_id", "seed", "chat_time"):
            response.ClearField(field)
    if response.request_id:
        request.seed = response.seed
        if response.chat_time:
            request.chat_time = response.chat_time
    request.resume_offset += len(response.token_ids)
    request.resume_token_ids.extend(response.token_ids)


def _attempts(patience: Patience) -> tuple[tuple[str, str], ...]:
    return (("caravan-attempt", str(patience.failures)),) if patience.failures else ()


def _caravan_error(error: grpc.RpcError) -> CaravanError:
    call = cast(grpc.Call, error)  # So it is for every error a call raises, though the types do not say it.
    message = call.details() or "the server gave no reason"
    return CaravanError(call.code(), message, retry_after_s(call.trailing_metadata()))
