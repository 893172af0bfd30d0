"""What crosses the boundary between the server and the engine process: msgpack of these types, nothing else."""

from __future__ import annotations

import math

import msgspec

from stepbatch.engine.cost import UNKNOWN, Costs
from stepbatch.model_info import ModelInfo
from stepbatch.request import GenerationRequest, Times


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Work for the engine: some or all outputs of a request."""

    request_id: str
    request: GenerationRequest
    indices: list[int]  # which of the n outputs
    arrival: float  # seconds on the system's monotonic clock
    alone: bool = False  # share no unit of work with other jobs


class Cancel(msgspec.Struct, tag=True, frozen=True):
    """The caller is gone: end what is left of the request."""

    request_id: str


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Leave at once."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The model is loaded, and what it costs was measured, if that was asked for."""

    info: ModelInfo
    costs: Costs = UNKNOWN


class Learned(msgspec.Struct, tag=True, frozen=True):
    """What steps and the rest are found to cost as the engine runs has changed."""

    costs: Costs


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The engine can't start as configured; it exits after this."""

    message: str


class Unit(msgspec.Struct, tag=True, frozen=True):
    """The engine begins a unit of work and will say nothing until it is done."""

    kind: str  # check, which is only written down, encode, denoise or decode
    jobs: list[tuple[str, int]]  # request id and output index
    seconds: float  # how long it is expected to take


class Progress(msgspec.Struct, tag=True, frozen=True):
    """Jobs have taken a step. One that is tried again after a fault in company begins anew."""

    jobs: list[tuple[str, int, int, int]]  # request id, output index, steps taken, steps in all


class Output(msgspec.Struct, tag=True, frozen=True):
    """A job is finished: RGB, 8 bits, frame by frame, rows from the top."""

    request_id: str
    index: int
    seed: int
    width: int
    height: int
    frames: int  # 1 for a picture
    pixels: bytes
    times: Times


class Failure(msgspec.Struct, tag=True, frozen=True):
    """A job failed; ``code`` is one of ``errors.REQUEST_ERRORS``."""

    request_id: str
    index: int
    code: str
    message: str
    param: str | None = None


class Cancelled(msgspec.Struct, tag=True, frozen=True):
    """A job left because it was cancelled."""

    request_id: str
    index: int


class Stats(msgspec.Struct, tag=True, frozen=True):
    """What the engine is doing, sent after each step and once a second when idle; it is the heartbeat too."""

    running: int = 0  # jobs that have begun and have not ended
    waiting: int = 0
    steps: int = 0  # denoising steps since the start
    jobs_in_step: int = 0  # in the last step; 0 when idle
    tokens_in_step: int = 0
    step_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    token_limit: float = math.inf  # the most that a step may have, as far as memory goes


ToEngine = Submit | Cancel | Shutdown
FromEngine = Ready | Learned | Refused | Unit | Progress | Output | Failure | Cancelled | Stats

encode = msgspec.msgpack.Encoder().encode
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def decode_to_engine(data: bytes) -> ToEngine:
    """Read a message for the engine; raises ``msgspec.DecodeError`` on anything else."""
    try:
        return _to_engine.decode(data)
    except UnicodeDecodeError as error:  # of a text in it, which msgspec lets through
        raise msgspec.DecodeError(str(error)) from error


def decode_from_engine(data: bytes) -> FromEngine:
    """Read a message of the engine; raises ``msgspec.DecodeError`` on anything else."""
    try:
        return _from_engine.decode(data)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from error
