"""``multipart/form-data``: texts and files by name, held in memory, within limits that hold while they come in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from stepbatch.errors import InvalidForm, InvalidValue, PayloadTooLarge
from stepbatch.server.body import Share, chunks


@dataclass(frozen=True, kw_only=True)
class FormLimits:
    """What a form may hold. Every name that ``check_name`` lets pass and that no files go under is a text's."""

    body_bytes: int
    text_bytes: int  # of all texts together
    file_bytes: int  # of each file
    parts: int
    files: Mapping[str, int]  # how many files may come under a name
    check_name: Callable[[str], None]  # raises for a name that doesn't exist


@dataclass
class Form:
    """What came: one text a name, and any number of files."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


async def read_form(request: Request, limits: FormLimits, share: Share) -> Form:
    """Read a form. Files under ``name[]``, as some clients call a list, are under ``name``.

    Raises:
        InvalidForm: the body is something else, or malformed.
        InvalidValue: a name comes too often, a file where a text belongs or the other way round, a text isn't UTF-8.
        PayloadTooLarge: the body, a file or the texts are over their limit, or there are too many parts.
        Overloaded: there is no room for it.
        RequestCancelled: the client went away before its end.
        RequestError: what ``check_name`` raises.
    """
    reader = _Reader(_boundary(request), limits)
    async for chunk in chunks(request, limits.body_bytes, share):
        reader.write(chunk)
    return reader.finish()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        given = f"not {kind.decode('latin-1')[:64]}" if kind else "and say so"
        raise InvalidForm(f"the body must be multipart/form-data, with images as files, {given}")
    if not options.get(b"boundary"):
        raise InvalidForm("the content type must name the boundary of the body's parts")
    return options[b"boundary"]


class _Reader:
    """Takes a body's bytes as they come and refuses a part as soon as its name is known."""

    def __init__(self, boundary: bytes, limits: FormLimits) -> None:
        self.limits = limits
        self.form = Form()
        self._name, self._is_file, self._data = "", False, bytearray()  # of the part that is being read
        self._header, self._value = bytearray(), bytearray()
        self._disposition = ""
        self._text_bytes = 0
        self._parts = 0
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._start,
                    "on_part_data": self._add,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise InvalidForm(f"the body is no valid multipart/form-data: {error}") from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidForm(f"the body is no valid multipart/form-data: {error}") from None

    def finish(self) -> Form:
        if not self._ended:
            raise InvalidForm("the body is no valid multipart/form-data: it ends before its last boundary")
        return self.form

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self.limits.parts:
            raise PayloadTooLarge(f"the body must have at most {self.limits.parts} parts")
        self._disposition = ""
        self._data = bytearray()

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value.decode("latin-1")
        self._header, self._value = bytearray(), bytearray()

    def _start(self) -> None:
        """A part's headers are there: what is it, and may it come?"""
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise InvalidForm("every part of the body must have a name")
        name = options[b"name"].decode("utf-8", "replace")
        name = name.removesuffix("[]") if name.removesuffix("[]") in self.limits.files else name
        self._name, self._is_file = name, b"filename" in options
        most = self.limits.files.get(name)
        if most is None:
            self.limits.check_name(name)
            if self._is_file:
                raise InvalidValue(f"{name} must be text, not a file", name)
            if name in self.form.texts:
                raise InvalidValue(f"{name} must be given once", name)
            return
        if not self._is_file:
            raise InvalidValue(f"{name} must be uploaded as a file; addresses and base64 are not read", name)
        if len(self.form.files.get(name, ())) == most:
            raise InvalidValue(f"{name} must be at most {most} file{'s' * (most != 1)}", name)

    def _add(self, data: bytes, start: int, end: int) -> None:
        size = len(self._data) + end - start
        if self._is_file and size > self.limits.file_bytes:
            raise PayloadTooLarge(f"{self._name} must have at most {self.limits.file_bytes} bytes", self._name)
        if not self._is_file and size + self._text_bytes > self.limits.text_bytes:
            raise PayloadTooLarge(f"all texts together must have at most {self.limits.text_bytes} bytes", self._name)
        self._data += memoryview(data)[start:end]

    def _end_part(self) -> None:
        if self._is_file:
            self.form.files.setdefault(self._name, []).append(bytes(self._data))
            return
        self._text_bytes += len(self._data)
        try:
            self.form.texts[self._name] = self._data.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidValue(f"{self._name} must be UTF-8", self._name) from None

    def _end(self) -> None:
        self._ended = True
