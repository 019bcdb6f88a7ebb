"""A request's usage as known to the facade, and the usage records of refused requests.

The generator writes the records of all requests that it answers; the facade writes those of
requests that ended before an answer began.
"""

from dataclasses import dataclass

from starlette.types import Scope

from trivium.keys.keyed_request import KeyedRequest
from trivium.usage_log import UsageRecord
from trivium.wire import telemetry

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")

_STATE = "usage"
_CLIENT_CLOSED_REQUEST = 499


@dataclass
class RequestUsage(KeyedRequest):
    """The usage of one request. `began` once a generator has responded, which writes the record.

    `final_status` is the status of a failure after the response's own status was sent.
    """

    model: str = ""
    began: bool = False
    final_status: int | None = None

    def set_model(self, model: str) -> None:
        """Sets the requested model; raises ServiceError if the key may not use it."""
        self.model = model
        self.check_model(model)


def begin_usage(scope: Scope) -> RequestUsage:
    """Attaches usage to a request that begins."""
    usage = RequestUsage()
    scope.setdefault("state", {})[_STATE] = usage
    return usage


def usage_of(scope: Scope) -> RequestUsage:
    """The usage that `begin_usage` attached to this request."""
    usage: RequestUsage = scope["state"][_STATE]
    return usage


def refusal_record(usage: RequestUsage, status: int, seconds: float) -> UsageRecord:
    """The record of a request that ended with `status` before a generator responded."""
    status = usage.final_status or status
    return UsageRecord(
        service="rest_facade",
        request_id=telemetry.request_id.get(),
        trace_id=telemetry.trace_id(),
        key=telemetry.key_name.get(),
        model=usage.model,
        status=status,
        finish_reason="abort" if status == _CLIENT_CLOSED_REQUEST else "error",
        duration_seconds=seconds,
        reasoning_tokens=0,
    )
