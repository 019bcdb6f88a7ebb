"""What a request took, as far as the facade knows, and the record of one that took nothing.

The generator writes the records of all requests that it answers; here are those of requests that
ended before an answer began.
"""

from dataclasses import dataclass

from starlette.types import Scope

from trivium.keys.keyed_request import KeyedRequest
from trivium.usage_log import UsageRecord
from trivium.wire import telemetry

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")

_STATE = "usage"
_CLIENT_GONE = 499


@dataclass
class RequestUsage(KeyedRequest):
    """Of one request. `began` once a generator has answered: the record is the generator's then.

    `outcome` is the status of what became of an answer after its own had been sent.
    """

    model: str = ""
    began: bool = False
    outcome: int | None = None

    def is_for(self, model: str) -> None:
        """Notes the model that is asked for; raises ServiceError if the key does not open it."""
        self.model = model
        self.check_model(model)


def begin_usage(scope: Scope) -> RequestUsage:
    """A request begins."""
    usage = RequestUsage()
    scope.setdefault("state", {})[_STATE] = usage
    return usage


def usage_of(scope: Scope) -> RequestUsage:
    """What `begin_usage` has made for this request."""
    usage: RequestUsage = scope["state"][_STATE]
    return usage


def refusal_record(usage: RequestUsage, status: int, seconds: float) -> UsageRecord:
    """The record of a request that was answered with `status` after so many seconds, or left."""
    status = usage.outcome or status
    return UsageRecord(
        service="rest_facade",
        request_id=telemetry.request_id.get(),
        trace_id=telemetry.trace_id(),
        key=telemetry.key_name.get(),
        model=usage.model,
        status=status,
        finish_reason="abort" if status == _CLIENT_GONE else "error",
        duration_seconds=seconds,
        reasoning_tokens=0,
    )
