"""The retry delay of a refused call as data: google.rpc.RetryInfo, where gRPC's own tools look for it."""

from collections.abc import Iterable
from datetime import timedelta

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from protos.errors import CaravanError

DETAILS_KEY = "grpc-status-details-bin"

Metadata = tuple[tuple[str, str | bytes], ...]


def trailing_metadata(error: CaravanError) -> Metadata:
    """What to send beside the error's status; empty where the status says all."""
    if error.retry_after_s is None:
        return ()
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromTimedelta(timedelta(seconds=error.retry_after_s))
    status = status_pb2.Status(code=error.code.value[0], message=error.details)
    status.details.add().Pack(retry)
    return ((DETAILS_KEY, status.SerializeToString()),)


def retry_after_s(metadata: Iterable[tuple[str, str | bytes]] | None) -> float | None:
    """Seconds the server asks to wait, from a call's trailing metadata; None where it does not say."""
    for key, value in metadata or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            details = status_pb2.Status.FromString(value).details
        except DecodeError:
            return None
        for detail in details:
            retry = error_details_pb2.RetryInfo()
            if detail.Unpack(retry):
                return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None
