import pickle

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from protos.errors import STATUS, CaravanError, Outcome
from protos.status_details import DETAILS_KEY, retry_after_s, trailing_metadata


def test_every_outcome_has_a_status():
    assert set(STATUS) == set(Outcome)


def test_the_delay_survives_pickling_and_the_wire():
    error = CaravanError(Outcome.OVERLOADED, "too much", 2.25)
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.retry_after_s) == (error.code, "too much", 2.25)
    ((key, value),) = trailing_metadata(error)
    assert key == DETAILS_KEY and retry_after_s((("other", "x"), (key, value))) == 2.25
    status = status_pb2.Status.FromString(value)
    assert (status.code, status.message) == (code_pb2.RESOURCE_EXHAUSTED, "too much")


@pytest.mark.parametrize("metadata", [None, (), (("a", "b"),), ((DETAILS_KEY, "text"),), ((DETAILS_KEY, b"\xff"),)])
def test_without_a_delay_there_is_none(metadata):
    assert retry_after_s(metadata) is None


def test_other_details_are_passed_over():
    status = status_pb2.Status(code=8)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="x"))
    assert retry_after_s(((DETAILS_KEY, status.SerializeToString()),)) is None
    assert trailing_metadata(CaravanError(grpc.StatusCode.UNAVAILABLE, "x")) == ()
