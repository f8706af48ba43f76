"""Every failure of a call is an exception that carries what the server said."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from service.client import (
    NO_RETRY,
    Client,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    SaeserveError,
    Unavailable,
)
from tests.service.client.both_clients import QUICK, Run, value
from tests.service.client.fake_server import Failure, FakeServer


def test_errors_carry_their_details(run: Run, fake: FakeServer):
    violation = error_details_pb2.BadRequest.FieldViolation(field="inputs[0]", description="is empty")
    bad_request = error_details_pb2.BadRequest(field_violations=[violation])
    fake.failures["ExtractFeatures"] = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "wrong", (bad_request,))]
    with pytest.raises(InvalidArgument) as caught:
        run(lambda client: value(client.extract_features("", "resid-mid", request_id="mine")))
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.message, error.request_id) == ("wrong", "mine")
    assert error.field_violations == (FieldViolation("inputs[0]", "is empty"),)
    assert str(error) == "INVALID_ARGUMENT: wrong\n  inputs[0]: is empty (request mine)"
    assert len(fake.requests("ExtractFeatures")) == 1


def test_not_found_names_the_resource(run: Run):
    with pytest.raises(NotFound, match="no dictionary named 'x'") as caught:
        run(lambda client: value(client.get_dictionary("x")))
    assert caught.value.resources == ("x",)


def test_a_failed_precondition_says_which_field(run: Run, fake: FakeServer):
    violation = error_details_pb2.PreconditionFailure.Violation(type="S", subject="edits[0]", description="no maximum")
    details = (error_details_pb2.PreconditionFailure(violations=[violation]),)
    fake.failures["Generate"] = [Failure(grpc.StatusCode.FAILED_PRECONDITION, "cannot", details)]
    with pytest.raises(FailedPrecondition) as caught:
        run(lambda client: value(client.generate("x").result()))
    assert caught.value.field_violations == (FieldViolation("edits[0]", "no maximum"),)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_raises_its_class(code: grpc.StatusCode, fake: FakeServer):
    fake.failures["ListDictionaries"] = [Failure(code, "no")]
    with Client(fake.address, retry=NO_RETRY) as client, pytest.raises(SaeserveError) as caught:
        client.list_dictionaries()
    assert caught.value.code is code
    named = code.name.title().replace("_", "")
    # Codes that the API does not use have no class of their own.
    assert type(caught.value).__name__ in (named, "SaeserveError")


def test_a_server_that_is_not_there(unused_address: str):
    with Client(unused_address, retry=QUICK) as client, pytest.raises(Unavailable) as caught:
        client.server_info()
    assert caught.value.request_id == ""
