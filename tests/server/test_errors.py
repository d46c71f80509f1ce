"""What lower layers raise, as clients see it: a status, a stable code, and no word that is the operator's."""

import pytest

from loramux.errors import LoramuxError
from loramux.formats.errors import FormatError
from loramux.registry.checks import UploadError
from loramux.registry.errors import Conflict, Corrupt, NotFound, StorageError
from loramux.server.errors import as_api_error, response_of
from loramux.tenancy.errors import QuotaError

PATH = "/srv/loramux/registry/blobs/ab"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (LoramuxError(f"{PATH} is gone"), 400, "invalid_request"),
        (FormatError(f"{PATH} is damaged", code="corrupt"), 500, "adapter_unreadable"),
        (Corrupt(f"{PATH} is damaged"), 500, "adapter_unreadable"),
        (StorageError(f"{PATH}: no space left"), 503, "storage"),
        (NotFound.of("acme/law"), 404, "model_not_found"),
        (Conflict("latest leads to 3"), 409, "conflict"),
        (UploadError("not an intact safetensors file", code="corrupt"), 400, "corrupt"),
        (UploadError("too many bytes", code="too_large"), 413, "too_large"),
        (
            QuotaError("too many tokens", kind="tokens", retry_after_s=2.2),
            429,
            "rate_limit_exceeded",
        ),
    ],
)
def test_each_error_has_its_status_and_code_and_never_a_path(error, status, code, caplog):
    found = as_api_error(error)
    assert (found.status, found.code) == (status, code)
    assert PATH not in str(found)
    if PATH in str(error):
        assert PATH in caplog.text  # the operator is told
    assert b'"error"' in response_of(error).body


def test_a_quota_says_when_to_come_again():
    assert (
        as_api_error(QuotaError("x", kind="tokens", retry_after_s=2.2)).headers["Retry-After"]
        == "3"
    )
