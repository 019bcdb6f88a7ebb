"""The single table of errors, and its three forms: exception, gRPC status, JSON body.

    ServiceError            any error that is returned to a caller
      .code                 a key of ERRORS, which fixes HTTP status, type and gRPC status
      .param                the offending field, if any

Independent of HTTP frameworks and of what the services do.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from trivium.wire import telemetry

DOMAIN = "trivium"
CLIENT_LEFT = "client_closed_request"
# A message is sent three times, twice of them in base64. grpc-java takes no more than 8 KiB of
# headers, and reports INTERNAL otherwise.
MAX_MESSAGE_CHARACTERS = 1500

# Tells the calling stage, and its gRPC library, not to retry the call on another replica.
_DO_NOT_RETRY = ("grpc-retry-pushback-ms", "-1")


@dataclass(frozen=True)
class ErrorKind:
    """A row of the table. `retry_after` is the default in seconds; None means do not retry."""

    http: int
    type: str
    grpc: grpc.StatusCode
    when: str
    retry_after: int | None = None


def _invalid(when: str, http: int = 400) -> ErrorKind:
    return ErrorKind(http, "invalid_request_error", grpc.StatusCode.INVALID_ARGUMENT, when)


_UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
_NOT_FOUND = grpc.StatusCode.NOT_FOUND

ERRORS: dict[str, ErrorKind] = {
    "invalid_json": _invalid("the body is not JSON"),
    "missing_required_parameter": _invalid("a required field is absent"),
    "invalid_type": _invalid("a field has the wrong JSON type"),
    "invalid_value": _invalid("a field has an invalid value"),
    "integer_above_max_value": _invalid("an integer is too large"),
    "integer_below_min_value": _invalid("an integer is too small"),
    "decimal_above_max_value": _invalid("a number is too large"),
    "decimal_below_min_value": _invalid("a number is too small"),
    "array_above_max_length": _invalid("a list is too long"),
    "string_above_max_length": _invalid("a string is too long"),
    "empty_array": _invalid("a list needs at least one element"),
    "unsupported_value": _invalid("a known value that is not supported"),
    "unsupported_parameter": _invalid("a known field that is not supported"),
    "invalid_parameter_combination": _invalid("two fields contradict each other"),
    "invalid_json_schema": _invalid("a JSON schema cannot be compiled"),
    "json_schema_too_complex": _invalid("a JSON schema is over the limits"),
    "invalid_chat_template_input": _invalid(
        "the model's chat template rejects the messages, or the model has none"
    ),
    "context_length_exceeded": ErrorKind(
        400,
        "invalid_request_error",
        grpc.StatusCode.OUT_OF_RANGE,
        "the prompt fills the model's context",
    ),
    "invalid_api_key": ErrorKind(
        401,
        "invalid_request_error",
        grpc.StatusCode.UNAUTHENTICATED,
        "the API key is missing, wrong or expired",
    ),
    "model_not_found": ErrorKind(
        404, "invalid_request_error", _NOT_FOUND, "no such model, or the API key may not use it"
    ),
    "unknown_url": ErrorKind(404, "invalid_request_error", _NOT_FOUND, "no such path"),
    "method_not_allowed": _invalid("the path does not support this method", 405),
    "unsupported_media_type": _invalid("the body is not application/json", 415),
    "revision_mismatch": ErrorKind(
        503,
        "server_error",
        grpc.StatusCode.FAILED_PRECONDITION,
        "two stages serve different revisions of the model",
        retry_after=5,
    ),
    "request_read_timeout": ErrorKind(
        408, "timeout", grpc.StatusCode.DEADLINE_EXCEEDED, "the body arrived too slowly"
    ),
    "request_too_large": ErrorKind(
        413, "invalid_request_error", _EXHAUSTED, "the body is over the size limit"
    ),
    "queue_full": ErrorKind(
        429, "rate_limit_error", _EXHAUSTED, "the queue is full", retry_after=1
    ),
    "rate_limit_exceeded": ErrorKind(
        429, "rate_limit_error", _EXHAUSTED, "over a limit of the API key", retry_after=1
    ),
    CLIENT_LEFT: ErrorKind(
        499, "timeout", grpc.StatusCode.CANCELLED, "the client disconnected (only logged)"
    ),
    "internal_error": ErrorKind(
        500,
        "server_error",
        grpc.StatusCode.INTERNAL,
        "a server error; the log has it under the request id",
    ),
    "backend_unavailable": ErrorKind(
        503, "server_error", _UNAVAILABLE, "the next stage cannot be reached", retry_after=1
    ),
    "model_loading": ErrorKind(
        503, "server_error", _UNAVAILABLE, "the model is being loaded", retry_after=2
    ),
    "draining": ErrorKind(
        503, "server_error", _UNAVAILABLE, "this process is shutting down", retry_after=1
    ),
    "deadline_exceeded": ErrorKind(
        504, "timeout", grpc.StatusCode.DEADLINE_EXCEEDED, "the caller's deadline passed"
    ),
}

INTERNAL_MESSAGE = "The server had an error while processing your request."

# What a status without our details means: it comes from gRPC itself.
_BARE_STATUS = {
    grpc.StatusCode.UNAVAILABLE: ("backend_unavailable", "The model server cannot be reached."),
    grpc.StatusCode.DEADLINE_EXCEEDED: ("deadline_exceeded", "The request's deadline passed."),
    grpc.StatusCode.CANCELLED: ("client_closed_request", "The request was cancelled."),
    grpc.StatusCode.RESOURCE_EXHAUSTED: ("request_too_large", "The request is too large."),
    # The server at this address is not the intended one.
    grpc.StatusCode.UNIMPLEMENTED: ("backend_unavailable", "The model server cannot be reached."),
}


class ServiceError(Exception):
    """An error that is returned to the caller.

    `code` is a key of ERRORS (anything else is a bug). `param` names the field in
    OpenAI's notation, such as `messages[0].content`. `retry_after` is in seconds. `everywhere`
    says that every replica of this stage would fail the same way, so callers do not retry.
    """

    def __init__(
        self,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
        everywhere: bool = False,
    ) -> None:
        assert code in ERRORS, f"{code} is not in the table of errors. This is a bug."
        message = _fits_trailers(message, MAX_MESSAGE_CHARACTERS)
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = None if param is None else _fits_trailers(param, _MAX_PARAM_CHARACTERS)
        self.retry_after = ERRORS[code].retry_after if retry_after is None else retry_after
        self.everywhere = everywhere

    @property
    def kind(self) -> ErrorKind:
        return ERRORS[self.code]

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, always with all four keys."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def status(self) -> grpc.Status:
        """The error as a gRPC status with google.rpc details, for `context.abort_with_status`."""
        details: list[Any] = [error_details_pb2.ErrorInfo(reason=self.code.upper(), domain=DOMAIN)]
        if self.param is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.param, description=self.message
            )
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(int(self.retry_after * 1000))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(
            code=getattr(code_pb2, self.kind.grpc.name), message=self.message
        )
        status.details.extend(_packed(detail) for detail in details)
        grpc_status = rpc_status.to_status(status)
        if self.everywhere:
            grpc_status = grpc_status._replace(
                trailing_metadata=(*grpc_status.trailing_metadata, _DO_NOT_RETRY)
            )
        return cast("grpc.Status", grpc_status)


_MAX_PARAM_CHARACTERS = 400
_PLAIN = frozenset(map(chr, range(0x20, 0x7F))) - {"%"}


def _fits_trailers(text: str, max_length: int) -> str:
    """The longest prefix of `text` within `max_length` characters once gRPC percent-encodes it.

    A lone surrogate becomes a question mark.
    """
    length = 0
    for position, character in enumerate(text):
        length += 1 if character in _PLAIN else 3 * len(character.encode("utf-8", "replace"))
        if length > max_length:
            text = text[:position]
            break
    return text.encode("utf-8", "replace").decode("utf-8")


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def internal_error() -> ServiceError:
    """The error for a bug of ours; it tells the caller no details."""
    return ServiceError("internal_error", INTERNAL_MESSAGE)


def from_rpc_error(error: grpc.aio.AioRpcError) -> ServiceError:
    """The error that another stage raised, or the equivalent of gRPC's own status."""
    if (raised := _raised_by_stage(error)) is not None:
        return raised
    bare = _BARE_STATUS.get(_bare_code(error))
    return ServiceError(*bare) if bare else internal_error()


def is_foreign(error: grpc.aio.AioRpcError) -> bool:
    """Whether this status comes neither from a stage nor from losing one, but from something else,
    such as a service mesh; only its details say what it means."""
    code = _bare_code(error)
    is_known = code in _BARE_STATUS and code is not grpc.StatusCode.UNIMPLEMENTED
    return not is_known and _raised_by_stage(error) is None


def _bare_code(error: grpc.aio.AioRpcError) -> grpc.StatusCode:
    # When a proxy loses the server behind it, it resets the stream, which arrives as INTERNAL.
    is_reset = "RST_STREAM" in (error.details() or "")
    return grpc.StatusCode.UNAVAILABLE if is_reset else error.code()


def _raised_by_stage(error: grpc.aio.AioRpcError) -> ServiceError | None:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # details that do not match the status: not ours
        status = None
    code, param, retry_after = None, None, None
    for detail in status.details if status is not None else ():
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            code = info.reason.lower()
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad_request = error_details_pb2.BadRequest()
            detail.Unpack(bad_request)
            param = bad_request.field_violations[0].field
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if status is not None and code in ERRORS:
        return ServiceError(code, status.message, param, retry_after)
    return None


def code_of(error: BaseException | None) -> str:
    """How a request ended, for metrics and logs: "ok", or the error's code."""
    if error is None:
        return "ok"
    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc_error(error)
    if isinstance(error, ServiceError):
        return error.code
    if not isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "internal_error"
    return CLIENT_LEFT if time.monotonic() < telemetry.deadline_at.get() else "deadline_exceeded"


def is_final(error: grpc.aio.AioRpcError) -> bool:
    """Whether the error says that every replica of the stage would fail the same way."""
    return _DO_NOT_RETRY in tuple(error.trailing_metadata() or ())


def markdown_table() -> str:
    """The table for docs/errors.md."""
    lines = [
        "| code | HTTP | type | gRPC | Retry-After | when |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for code, kind in ERRORS.items():
        retry = "" if kind.retry_after is None else f"{kind.retry_after} s"
        row = (f"`{code}`", str(kind.http), kind.type, kind.grpc.name, retry, kind.when)
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
