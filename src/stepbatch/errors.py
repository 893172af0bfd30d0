"""Every error that stepbatch raises on purpose.

::

    StepbatchError
    ├── DeviceLost                  ends the engine process, which is started again
    ├── SetupError                  refused at start, one line on stderr, exit status 2
    │   ├── CheckpointError         missing, incomplete, pickled or of an unknown pipeline
    │   │   └── NotNative           whole, but of a kind that can only run as a diffusers pipeline
    │   └── OptionError             an unknown flag or a value that a flag can't take
    └── RequestError                has an HTTP status, a code and, where one field is at fault, its name
        ├── InvalidValue            400 invalid_value
        ├── UnknownParameter        400 unknown_parameter
        ├── InvalidJSON             400 invalid_json
        ├── InvalidForm             400 invalid_form
        ├── InvalidHost             400 invalid_host
        ├── ContentRejected         400 content_policy_violation
        ├── Unauthorized            401 invalid_api_key
        ├── NotFound                404 not_found
        ├── ModelNotFound           404 model_not_found
        ├── MethodNotAllowed        405 method_not_allowed
        ├── RequestTimeout          408 request_timeout
        ├── PayloadTooLarge         413 payload_too_large
        ├── InvalidRange            416 invalid_range
        ├── IdempotencyKeyReused    422 idempotency_key_reused
        ├── HeadersTooLarge         431 headers_too_large
        ├── Overloaded              429 overloaded
        ├── RequestCancelled        499 request_cancelled
        ├── GenerationFailed        500 generation_failed
        ├── InvalidModelOutput      500 invalid_model_output
        ├── OutOfMemory             500 out_of_memory
        ├── InternalError           500 internal_error
        ├── TooManyConnections      503 too_many_connections
        ├── EngineUnavailable       503 engine_unavailable
        ├── EngineDied              503 engine_died
        ├── ServerDied              503 server_died
        ├── DeadlineExceeded        504 deadline_exceeded
        └── StorageFull             507 storage_full
"""

from __future__ import annotations


class StepbatchError(Exception):
    """The root: catch this for anything that stepbatch raises on purpose."""


class DeviceLost(StepbatchError):
    """The device, or its driver, is in a state that only a new process gets it out of."""


class SetupError(StepbatchError):
    """The engine or server can't start as asked."""


class CheckpointError(SetupError):
    """A checkpoint that can't be served; the message names it and says why."""


class NotNative(CheckpointError):
    """A checkpoint that has no native form; diffusers may run its pipeline."""


class OptionError(SetupError):
    """A command-line option that doesn't exist or can't have this value."""


class RequestError(StepbatchError):
    """A request that ends without a result.

    Args:
        message: One sentence for the caller.
        param: The field at fault, if one is.
    """

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"
    should_retry: bool | None = None  # what clients are told by x-should-retry; None leaves it to the status
    retry_after: int | None = None  # seconds
    retry_spread: int = 0  # seconds; each caller is told some of them more, so that not all come again at once

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def fields(self) -> dict[str, str | None]:
        """What callers are told, by OpenAI's names."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class InvalidValue(RequestError):
    """A field's value is of the wrong type, out of range or not served by this model."""

    code = "invalid_value"


class UnknownParameter(RequestError):
    """A field that is neither served nor on the list of fields that are ignored."""

    code = "unknown_parameter"


class InvalidJSON(RequestError):
    """The body is not a JSON object."""

    code = "invalid_json"


class InvalidForm(RequestError):
    """The body is not multipart/form-data."""

    code = "invalid_form"


class InvalidHost(RequestError):
    """The request is for another host, or from another's page."""

    code = "invalid_host"
    should_retry = False


class ContentRejected(RequestError):
    """The model's own safety checker holds back what was drawn."""

    code = "content_policy_violation"


class Unauthorized(RequestError):
    """The request comes without a key, or with a wrong one."""

    status = 401
    code = "invalid_api_key"
    should_retry = False


class NotFound(RequestError):
    """No such route or file."""

    status = 404
    code = "not_found"


class ModelNotFound(RequestError):
    """The named model is not the one that is served."""

    status = 404
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The route exists, the method doesn't."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """The request took too long to come in."""

    status = 408
    code = "request_timeout"


class PayloadTooLarge(RequestError):
    """The body is over the limit."""

    status = 413
    code = "payload_too_large"


class InvalidRange(RequestError):
    """The part of a file that is asked for isn't there."""

    status = 416
    code = "invalid_range"


class IdempotencyKeyReused(RequestError):
    """The request's Idempotency-Key is another request's."""

    status = 422
    code = "idempotency_key_reused"


class HeadersTooLarge(RequestError):
    """The request line and the headers are over the limit."""

    status = 431
    code = "headers_too_large"


class Overloaded(RequestError):
    """More waits already than may; nothing has been begun.

    Args:
        retry_after: Seconds until there may be room.
    """

    status = 429
    code = "overloaded"
    type = "rate_limit_error"
    should_retry = True
    retry_spread = 2

    def __init__(self, message: str, param: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, param)
        self.retry_after = retry_after


class RequestCancelled(RequestError):
    """The caller went away or asked for the end."""

    status = 499
    code = "request_cancelled"


class GenerationFailed(RequestError):
    """The model raised while it worked on this request."""

    status = 500
    code = "generation_failed"
    type = "server_error"
    should_retry = False


class InvalidModelOutput(RequestError):
    """The model made NaN or infinite values for this request."""

    status = 500
    code = "invalid_model_output"
    type = "server_error"
    should_retry = False


class OutOfMemory(RequestError):
    """The request needs more memory than the device has, even by itself."""

    status = 500
    code = "out_of_memory"
    type = "server_error"
    should_retry = False


class InternalError(RequestError):
    """A fault of the server; details are in its log, never in the answer."""

    status = 500
    code = "internal_error"
    type = "server_error"


class TooManyConnections(RequestError):
    """As many clients are connected as may be."""

    status = 503
    code = "too_many_connections"
    type = "server_error"
    retry_after = 1
    retry_spread = 4


class EngineUnavailable(RequestError):
    """The engine is starting, restarting or shutting down."""

    status = 503
    code = "engine_unavailable"
    type = "server_error"
    retry_after = 5
    retry_spread = 5


class EngineDied(RequestError):
    """The engine process died twice while it worked on this request."""

    status = 503
    code = "engine_died"
    type = "server_error"
    should_retry = False  # not by itself: it may be to blame; a caller who knows better waits until all is well again
    retry_after = 5
    retry_spread = 5


class ServerDied(RequestError):
    """The server ended, without a word, before a video was made."""

    status = 503
    code = "server_died"
    type = "server_error"
    should_retry = False


class DeadlineExceeded(RequestError):
    """The request can't be done before the deadline that it came with, and has not been begun."""

    status = 504
    code = "deadline_exceeded"
    type = "server_error"
    should_retry = False


class StorageFull(RequestError):
    """There is no room for a video or its record."""

    status = 507
    code = "storage_full"
    type = "server_error"
    should_retry = False


REQUEST_ERRORS: dict[str, type[RequestError]] = {
    cls.code: cls
    for cls in (
        RequestError,
        InvalidValue,
        UnknownParameter,
        InvalidJSON,
        InvalidForm,
        InvalidHost,
        ContentRejected,
        Unauthorized,
        NotFound,
        ModelNotFound,
        MethodNotAllowed,
        RequestTimeout,
        PayloadTooLarge,
        InvalidRange,
        IdempotencyKeyReused,
        HeadersTooLarge,
        Overloaded,
        RequestCancelled,
        GenerationFailed,
        InvalidModelOutput,
        OutOfMemory,
        InternalError,
        TooManyConnections,
        EngineUnavailable,
        EngineDied,
        ServerDied,
        DeadlineExceeded,
        StorageFull,
    )
}
