"""The document at ``/openapi.json``, made from the tables that the server itself works by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from stepbatch.config import LimitsConfig
from stepbatch.engine.client import State
from stepbatch.errors import REQUEST_ERRORS, RequestError
from stepbatch.server.fields import (
    EDIT_FIELDS,
    EDITS,
    FIELDS,
    GENERATIONS,
    IGNORED_OPENAI,
    IGNORED_OTHERS,
    MAX_PAGE,
    PAGE,
    VIDEO_FIELDS,
    VIDEO_FILES,
    VIDEOS,
)
from stepbatch.server.video_store import ID, VARIANTS

Schema = dict[str, Any]

_CODES_ANYWHERE = (
    "invalid_host",
    "invalid_api_key",
    "not_found",
    "method_not_allowed",
    "request_timeout",
    "headers_too_large",
    "internal_error",
    "too_many_connections",
)
_CODES_ELSEWHERE = ("request_cancelled", "invalid_range", "server_died", "storage_full")
_CODES_OF_IMAGES = tuple(code for code in REQUEST_ERRORS if code not in (*_CODES_ANYWHERE, *_CODES_ELSEWHERE))

_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"},
    "description": "Of a request that may be sent again, and is to be worked on once",
}


def document(limits: LimitsConfig) -> Schema:
    """OpenAPI 3.1, of a server with these limits."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "stepbatch", "version": "1", "description": "Pictures and videos from diffusion models."},
        "paths": {
            GENERATIONS: {
                "post": _images("createImage", "Make pictures from a prompt", "application/json", "ImageRequest")
            },
            EDITS: {
                "post": _images(
                    "editImage", "Make pictures from a prompt and images", "multipart/form-data", "EditRequest"
                )
            },
            **_video_paths(),
            "/v1/files/{name}": {"get": _file()},
            "/v1/models": {"get": _get("The served model, as a list of one", _ref("ModelList"))},
            "/v1/models/{model}": {
                "get": _get("The served model", _ref("Model"), ("model_not_found", "invalid_value"), ["model"])
            },
            "/v1/model_info": {"get": _get("The served model, in the engine's words", {"type": "object"})},
            "/v1/profile": {"get": _get("What steps cost, as the engine has learned", {"type": "object"})},
            "/health": {"get": _get("200 unless the engine failed for good", _ref("Health"), ("engine_unavailable",))},
            "/ready": {"get": _get("200 when requests are worked on", _ref("Status"), ("engine_unavailable",))},
            "/metrics": {"get": _get("Prometheus' text format", None)},
            "/openapi.json": {"get": _get("This document", {"type": "object"})},
        },
        "components": {"schemas": _schemas(limits), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],  # where the server has keys
    }


def _images(operation: str, summary: str, media_type: str, body: str) -> Schema:
    return {
        "summary": summary,
        "operationId": operation,
        "parameters": [_IDEMPOTENCY_KEY],
        "requestBody": {"required": True, "content": {media_type: {"schema": _ref(body)}}},
        "responses": {"200": _json("The pictures", _ref("ImagesResponse")), **_errors(_CODES_OF_IMAGES)},
    }


def _video_paths() -> Schema:
    forms = {"application/json": "VideoRequest", "multipart/form-data": "VideoForm"}
    create = {
        "summary": "Have a video made",
        "operationId": "createVideo",
        "parameters": [_IDEMPOTENCY_KEY],
        "requestBody": {
            "required": True,
            "content": {media_type: {"schema": _ref(body)} for media_type, body in forms.items()},
        },
        "responses": {
            "200": _json("The video, to be looked after until it is made", _ref("Video")),
            **_errors((*_CODES_OF_IMAGES, "storage_full")),
        },
    }
    page = _get("The videos that there are, a page of them", _ref("VideoList"), ("invalid_value",))
    page["parameters"] = [
        _query("after", {"type": "string", "pattern": f"^{ID}$"}, "The id of the last video before the page"),
        _query(
            "limit",
            {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE},
            "The most videos of a page",
        ),
        _query("order", {"enum": ["asc", "desc"], "default": "desc"}, "By time of creation"),
    ]
    content = _get("A video, or what shows it in one picture", None, ("invalid_value", "invalid_range"), ["video_id"])
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"description": "The file", "content": {media_type: binary for _, media_type in VARIANTS.values()}}
    content["responses"] |= {"200": files, "206": {**files, "description": "The part of it that Range asks for"}}
    content["parameters"].append(_query("variant", {"enum": list(VARIANTS), "default": "video"}, "Which file"))
    one = f"{VIDEOS}/{{video_id}}"
    return {
        VIDEOS: {"post": create, "get": page},
        one: {
            "get": _get("How a video is", _ref("Video"), (), ["video_id"]),
            "delete": _get("Forget a video, or stop making it", _ref("VideoDeleted"), (), ["video_id"]),
        },
        f"{one}/content": {"get": content},
    }


def _file() -> Schema:
    picture = {"schema": {"type": "string", "format": "binary"}}
    kinds = {f"image/{name}": picture for name in FIELDS["output_format"]["enum"]}
    return {
        "summary": "A picture that was answered as a url, until it expires",
        "parameters": [_path_parameter("name")],
        "responses": {"200": {"description": "The picture", "content": kinds}, **_errors(("not_found",))},
    }


def _get(summary: str, schema: Schema | None, codes: Iterable[str] = (), parameters: Iterable[str] = ()) -> Schema:
    text = {"description": summary, "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {
        "summary": summary,
        "parameters": [_path_parameter(name) for name in parameters],
        "responses": {"200": text if schema is None else _json(summary, schema), **_errors(codes)},
    }


def _path_parameter(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query(name: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _errors(codes: Iterable[str]) -> Schema:
    """Answers by status, each naming the codes that come with it."""
    by_status: dict[int, list[type[RequestError]]] = {}
    for code in (*codes, *_CODES_ANYWHERE):
        by_status.setdefault(REQUEST_ERRORS[code].status, []).append(REQUEST_ERRORS[code])
    return {
        str(status): _json(", ".join(dict.fromkeys(cls.code for cls in classes)), _ref("Error"))
        for status, classes in sorted(by_status.items())
    }


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _schemas(limits: LimitsConfig) -> Schema:
    fields, videos = _within(limits, FIELDS), _within(limits, VIDEO_FIELDS)
    return {
        "Error": _object({"error": _error_object()}),
        "Status": _object({"status": {"type": "string"}}),
        "Health": _object({"status": {"type": "string"}, "engine": {"enum": list(get_args(State))}}),
        "Model": _object({"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}}),
        "ModelList": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}}),
        "ImageRequest": _request(_nullable(fields), ["prompt"]),
        "EditRequest": _edit(fields),
        "ImagesResponse": _answer(),
        "VideoRequest": _request(_nullable(videos), ["prompt"]),
        "VideoForm": _request({**videos, **VIDEO_FILES}, ["prompt"]),
        "Video": _video(),
        "VideoList": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": _ref("Video")},
                "first_id": {"type": ["string", "null"]},
                "last_id": {"type": ["string", "null"]},
                "has_more": {"type": "boolean"},
            }
        ),
        "VideoDeleted": _object(
            {"id": {"type": "string"}, "object": {"const": "video.deleted"}, "deleted": {"const": True}}
        ),
    }


def _object(properties: Schema, optional: Iterable[str] = ()) -> Schema:
    required = [name for name in properties if name not in set(optional)]
    return {"type": "object", "properties": properties, "required": required}


def _error_object() -> Schema:
    text = {"type": "string"}
    param = {"type": ["string", "null"], "description": "The field at fault"}
    return _object({"message": text, "type": text, "param": param, "code": {"enum": list(REQUEST_ERRORS)}})


def _request(fields: Schema, required: list[str]) -> Schema:
    ignored = {name: {"description": "Accepted, and listed as ignored."} for name in (*IGNORED_OPENAI, *IGNORED_OTHERS)}
    return {
        "type": "object",
        "properties": {**fields, **ignored},
        "required": required,
        "additionalProperties": False,
    }


def _within(limits: LimitsConfig, fields: Schema) -> Schema:
    """The fields with the bounds that this server has."""
    bounds = {"n": limits.max_outputs, "num_inference_steps": limits.max_steps}
    return {name: {**field, "maximum": bounds[name]} if name in bounds else field for name, field in fields.items()}


def _edit(fields: Schema) -> Schema:
    schema = _request({**fields, **EDIT_FIELDS, "image[]": EDIT_FIELDS["image"]}, ["prompt"])
    return {**schema, "anyOf": [{"required": ["image"]}, {"required": ["image[]"]}]}


def _nullable(fields: Schema) -> Schema:
    return {name: field if name == "prompt" else _or_null(field) for name, field in fields.items()}


def _or_null(field: Schema) -> Schema:
    kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    nullable = {**field, "type": [*kinds, "null"]}
    if "enum" in field:
        nullable["enum"] = [*field["enum"], None]
    return nullable


def _video() -> Schema:
    number, text, whole = {"type": "number"}, {"type": "string"}, {"type": "integer"}
    maybe = {"type": ["integer", "null"], "description": "Unix time, seconds"}
    percent = {
        **whole,
        "minimum": 0,
        "maximum": 100,
        "description": "Percent of the denoising steps; 100 when it is made",
    }
    return _object(
        {
            "id": text,
            "object": {"const": "video"},
            "created_at": whole,
            "completed_at": maybe,
            "expires_at": maybe,
            "status": {"enum": ["queued", "in_progress", "completed", "failed"]},
            "progress": percent,
            "error": {"oneOf": [_error_object(), {"type": "null"}]},
            "remixed_from_video_id": {"type": "null"},
            "model": text,
            "prompt": text,
            "seconds": {**text, "description": "How long it is, by its frames"},
            "size": text,
            "num_frames": whole,
            "fps": whole,
            "seed": whole,
            "ignored": {"type": "array", "items": text, "description": "Fields that had no effect"},
            "predicted": _predicted(),
            "inference_time_s": {**number, "description": "From the first unit of work to the last frame"},
            "peak_memory_mb": number,
            "timings": _timings(),
        },
        optional=("predicted", "inference_time_s", "peak_memory_mb", "timings"),
    )


def _predicted() -> Schema:
    number = {"type": "number"}
    text = "Seconds until it would begin and be done, as was said when it came in; null where costs aren't known"
    return {"description": text, "oneOf": [_object({"queue": number, "total": number}), {"type": "null"}]}


def _timings() -> Schema:
    number = {"type": "number"}
    return _object({"queue": number, "encode": number, "denoise": number, "decode": number})


def _answer() -> Schema:
    number, text = {"type": "number"}, {"type": "string"}
    picture = _object({"seed": {"type": "integer"}, "b64_json": text, "url": text}, optional=("b64_json", "url"))
    return _object(
        {
            "created": {"type": "integer"},
            "data": {"type": "array", "items": picture},
            "background": text,
            "output_format": text,
            "size": text,
            "model": text,
            "seeds": {"type": "array", "items": {"type": "integer"}},
            "inference_time_s": {**number, "description": "From the first unit of work to the last picture"},
            "peak_memory_mb": number,
            "timings": {**_timings(), "description": "Seconds; of several pictures, the longest of each"},
            "predicted": _predicted(),
            "ignored": {"type": "array", "items": text, "description": "Fields that had no effect"},
        }
    )
