"""Requests that no client should send: wrong values, broken forms, framing that lies, bytes that are no HTTP."""

from __future__ import annotations

import http.client
import json
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.pictures import file, image

from .odd_words import BOUNDARY, FORM, IDS, JSON, METHODS, TARGETS, TYPES, VALUES

VALID = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 1}
PICTURE = file(image(size=(16, 16)))


@dataclass(frozen=True)
class Hostile:
    """What is sent on a connection of its own."""

    kind: str
    data: bytes
    whole: bool = True  # by its own account; else nobody has to answer it

    @property
    def method(self) -> str:
        return self.data[:4].decode("latin-1").strip()


class Attacker:
    """Makes up requests, the same ones for the same seed.

    Args:
        route: Where bodies are posted that are JSON.
        form_route: Where forms are.
        file: The name of a form's file.
        fields: The names of all fields.
    """

    def __init__(self, seed: int, route: str, form_route: str, file: str, fields: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.route, self.form_route, self.file, self.fields = route, form_route, file, list(fields)
        self._count = 0

    def next(self) -> Hostile:
        """Another one, of each kind in turn."""
        kinds: tuple[Callable[[], Hostile], ...] = (
            *(self.wrong_value, self.odd_json, self.damaged_json, self.odd_form, self.damaged_form, self.wrong_text),
            *(self.odd_part, self.lying_length, self.odd_chunks, self.odd_head, self.garbage),
        )
        self._count += 1
        return kinds[self._count % len(kinds)]()

    def wrong_value(self) -> Hostile:
        fields = {name: json.dumps(value) for name, value in VALID.items()}
        for _ in range(self.random.choice((1, 1, 1, 2, 5))):
            fields[self.random.choice(self.fields)] = self.random.choice(VALUES)
        return self._json("wrong value", "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}")

    def odd_json(self) -> Hostile:
        depth, wide = 100_000, 20_000
        prompt = '{"prompt": "a cat", "size": "16x16", "num_inference_steps": 1, '
        bodies: tuple[bytes | str, ...] = (
            *("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, '{"prompt": ' + "[" * depth + "]" * depth + "}"),
            *('{"a":' * depth + "1" + "}" * depth, "", " ", "null", "1", '"x"', "[]", "{}", "[1", "\x00", "\ufeff{}"),
            *(prompt + '"prompt": 1}', prompt + '"seed": ' + "9" * 400_000 + "}", prompt + "}", prompt + '"": 1}'),
            *(prompt + '"user": "' + "a" * 900_000 + '"}', prompt + '"' + "k" * 500_000 + '": 1}'),
            prompt + ", ".join(f'"k{number}": {number}' for number in range(wide)) + "}",
            prompt + '"quality": [' + ",".join(["{}"] * wide) + "]}",
            prompt + '"quality": ' + "1" * 4301 + "}",
            prompt + '"quality": [' + ",".join("1" * 500_000) + "]}",
            prompt + '"quality": [' + ",".join(["[[[[]]]]"] * 100_000) + "]}",
            *(json.dumps(VALID).encode(encoding) for encoding in ("utf-16", "utf-32", "utf-7")),
            *(b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "a\nb"}', b'{"prompt": "a\x00"}'),
            *(b'{"\\ud800": 1}', b'{"prompt": "\\ud83d"}', b"\xf4\x90\x80\x80", b"{}" * 1000, b"\xef\xbb\xbf{}"),
        )
        body = self.random.choice(bodies)
        return self._json("odd JSON", body)

    def damaged_json(self) -> Hostile:
        fields = {**VALID, "negative_prompt": "no dog", "n": 2, "seed": 7, "user": "u"}
        return self._json("damaged JSON", self._damage(json.dumps(fields).encode()))

    def wrong_text(self) -> Hostile:
        name = self.random.choice([*self.fields, self.file, f"{self.file}[]", "", "\x00", "a" * 5000, "[]", "prompt[]"])
        value = self.random.choice(VALUES).strip('"').encode("utf-8", "surrogatepass")
        parts = [
            *(_part(key, str(given).encode()) for key, given in VALID.items()),
            _part(name, value),
            self._picture(),
        ]
        self.random.shuffle(parts)
        return self._form("wrong text", _joined(parts))

    def odd_form(self) -> Hostile:
        texts = [_part(name, str(value).encode()) for name, value in VALID.items()]
        inner = b"--inner\r\n" + _part("prompt", b"b") + b"\r\n--inner--\r\n"
        bodies = (
            b"",
            b"--" + BOUNDARY + b"--\r\n",
            _joined([*texts, self._picture()])[: self.random.randrange(400)],
            _joined([*texts, self._picture()]).replace(BOUNDARY, b"another"),
            _joined([*texts, *texts, self._picture()]),
            _joined([*texts, *[self._picture()] * 40]),
            _joined([_part(f"k{number}", b"v") for number in range(5000)]),
            _joined([_part("", b"")] * 5000),
            _joined([*texts, _part(self.file, inner, "x", "multipart/mixed; boundary=inner")]),
            _joined([*texts, self._picture()]).replace(b"\r\n", b"\n"),
            _joined([*texts, self._picture()]).replace(b"\r\n", b"\r"),
            _joined([*texts, self._picture()]).replace(b"\r\n", b"\r\n\r\n", 3),
            _joined([*texts, self._picture()]) + b"more" * 1000,
            b"before" * 1000 + _joined([*texts, self._picture()]),
            (b"--" + BOUNDARY + b"\r\n") * 5000,
            (b"\r\n--" + BOUNDARY[:-1]) * 20_000,
            _joined([*texts, _part(self.file, b"\r\n--boundary-of-part" * 20_000, "x")]),
            _joined([*texts, _part(self.file, self._damage(PICTURE), "x")]),
        )
        return self._form("odd form", self.random.choice(bodies))

    def odd_part(self) -> Hostile:
        head = 'Content-Disposition: form-data; name="prompt"'
        heads: tuple[str, ...] = (
            *("", "\r\n" * 3, "Content-Disposition: form-data", "Content-Disposition: attachment; name=x", head * 500),
            *(
                head + "; " + "x=y; " * 20_000,
                head + "; name=seed",
                "A: b\r\n" * 5000 + head,
                f"X: {'a' * 300_000}\r\n{head}",
            ),
            *(
                head.replace("prompt", "pro\x00mpt"),
                head.replace("prompt", "\xff\xfe\xfd"),
                head.replace('"', ""),
                head[:-1],
            ),
            *(
                head.replace("prompt", '\\"'),
                head.replace("prompt", "a\\"),
                head.replace(":", " :"),
                " " + head,
                head + ";",
            ),
            *(
                head.replace("name=", "name*=utf-8''%00%ff"),
                head.replace("name", "name*0"),
                head + '; filename="../../x"',
            ),
            *(
                "Content-Transfer-Encoding: base64\r\n" + head,
                head + "\r\n folded",
                head.replace("\r\n", "\n"),
                head + "\r",
            ),
            *(
                'Content-Disposition: form-data; name="' + "a" * 300_000 + '"',
                head + '; filename="',
                "\x00: \x00",
                "no colon",
            ),
            'Content-Disposition: form-data; name="a' + '\\"' * 50_000 + '"',
            'Content-Disposition: form-data; name=""' + ';"' * 50_000,
            "Content-Disposition: form-data" + " ;" * 100_000 + 'name="prompt"',
        )
        odd = self.random.choice(heads).encode("latin-1") + b"\r\n\r\na cat"
        return self._form("odd part", _joined([odd, _part("size", b"16x16"), self._picture()]))

    def damaged_form(self) -> Hostile:
        texts = [_part(name, str(value).encode()) for name, value in VALID.items()]
        return self._form("damaged form", self._damage(_joined([*texts, self._picture()])))

    def lying_length(self) -> Hostile:
        body = json.dumps(VALID).encode()
        length = self.random.choice(
            (
                len(body) - 5,
                len(body) + 5,
                -1,
                0,
                "+5",
                "1e3",
                "0x10",
                "9" * 30,
                "9" * 5000,
                "",
                " ",
                "1, 2",
                "5\r\nContent-Length: 6",
            )
        )
        head = f"POST {self.route} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode()
        return Hostile("lying length", head + body, whole=False)

    def odd_chunks(self) -> Hostile:
        body = json.dumps(VALID).encode()
        good = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        chunks = (
            *(
                good,
                good[:-2],
                good[:-7],
                b"0\r\n\r\n",
                b"",
                b"-1\r\n\r\n",
                b"FFFFFFFFFFFFFFFFF\r\n",
                b"g\r\n",
                b"\r\n",
                good * 3,
            ),
            *(
                b"%x;a=%s\r\n%s\r\n0\r\n\r\n" % (len(body), b"b" * 20_000, body),
                good[:-2] + b"X: y\r\n" * 5000 + b"\r\n",
            ),
            *(
                b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n",
                b"0x5\r\nabcde\r\n0\r\n\r\n",
                b"5\nabcde\n0\n\n",
            ),
            b"00000000000000000000000000000005\r\nabcde\r\n0\r\n\r\n",
            b"1\r\n \r\n" * 40_000,
            good[:-2] + b"A: b\r\n" * 40_000,
        )
        coding = self.random.choice(
            ("chunked",) * 6 + ("gzip, chunked", "chunked, chunked", "identity", "CHUNKED", "x", "")
        )
        more = self.random.choice(
            ("", "", "", "Content-Length: 5\r\n", "Expect: 100-continue\r\n", "Expect: x\r\n", "TE: x\r\n")
        )
        head = f"POST {self.route} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: {coding}\r\n{more}\r\n".encode()
        return Hostile("odd chunks", head + self.random.choice(chunks), whole=False)

    def odd_head(self) -> Hostile:
        headers = ["Host: 127.0.0.1", f"x-request-id: {self.random.choice(IDS)}"]
        odd = (
            "A: b",
            "A:",
            ": b",
            "A b",
            " A: b",
            "A : b",
            "A: b\r\n c",
            "A: \x00",
            "A: \x0b",
            "\xe9: \xe9",
            "Host: b",
            "Host:",
        )
        many = (
            "A: " + "b" * 100_000,
            "\r\n".join(["A: b"] * 2000),
            "Cookie: " + "a=b; " * 3000,
            "Range: bytes=" + "0-1," * 3000,
        )
        upgrades = (
            "Upgrade: websocket\r\nConnection: Upgrade",
            "Upgrade: h2c\r\nConnection: Upgrade",
            "Connection: " + "x," * 999,
        )
        headers += self.random.choices([*odd, *many, *upgrades], k=self.random.choice((0, 0, 1, 1, 2)))
        version = self.random.choice(("HTTP/1.1",) * 8 + ("HTTP/1.0", "HTTP/9.9", "HTTP/2", "HTTP/1.1 ", "ICY"))
        target = self.random.choice((*TARGETS, self.route, self.form_route))
        head = "\r\n".join([f"{self.random.choice(METHODS)} {target} {version}", *headers, "", ""])
        return Hostile("odd head", head.encode("latin-1"), whole=False)

    def garbage(self) -> Hostile:
        heads = (
            *(b"", b"\r\n\r\n", b"\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + self.random.randbytes(500)),
            *(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET /\r\n\r\n",
                b"GET  / HTTP/1.1\r\n\r\n",
                b"\x00" * 100_000,
                b"A" * 200_000,
            ),
            *(
                b"GET / HTTP/1.1\r\n\r\n" * 50,
                b"SSH-2.0-x\r\n",
                b"GET /\xff HTTP/1.1\r\n\r\n",
                b"\xff" * 1000 + b"\r\n\r\n",
            ),
            *(self.random.randbytes(self.random.randrange(2000)), self.random.randbytes(200) + b"\r\n\r\n"),
            self._damage(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n\r\n"),
        )
        return Hostile("garbage", self.random.choice(heads), whole=False)

    def _json(self, kind: str, body: bytes | str) -> Hostile:
        data = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
        return self._post(
            kind, self.route, data, self.random.choice((JSON,) * 5 + TYPES) if kind == "damaged JSON" else JSON
        )

    def _form(self, kind: str, body: bytes) -> Hostile:
        return self._post(kind, self.form_route, body, self.random.choice((FORM,) * 30 + TYPES))

    def _post(self, kind: str, route: str, body: bytes, media_type: str) -> Hostile:
        lines = (
            f"POST {route} HTTP/1.1",
            "Host: 127.0.0.1",
            f"Content-Type: {media_type}",
            f"Content-Length: {len(body)}",
        )
        head = "".join(f"{line}\r\n" for line in (*lines, ""))
        return Hostile(kind, head.encode("latin-1") + body)

    def _picture(self) -> bytes:
        return _part(self.file, PICTURE, "x.png")

    def _damage(self, data: bytes) -> bytes:
        """The same with some bytes changed, left out, doubled or put in."""
        damaged = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 4, 8))):
            at = self.random.randrange(len(damaged) + 1)
            upto = min(len(damaged), at + self.random.choice((1, 1, 2, 8, 40)))
            new = self.random.choice(
                (b"", self.random.randbytes(upto - at), bytes(damaged[at:upto]) * 2, b"\r\n", b'"', b"\x00")
            )
            damaged[at:upto] = new
        return bytes(damaged)


def send(port: int, hostile: Hostile) -> list[tuple[http.client.HTTPResponse, bytes]]:
    """Send it and read the answers, of which there are several to pipelined requests."""
    answers = []
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(hostile.data)
            if not hostile.whole:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused while it was still being sent
        try:
            while not answers or not answers[-1][0].will_close:
                answer = http.client.HTTPResponse(connection, method=hostile.method)
                answer.begin()
                answers.append((answer, answer.read()))
                if hostile.whole:
                    break
        except (http.client.HTTPException, ConnectionError):
            pass  # closed
    return answers


def _part(name: str, data: bytes, filename: str | None = None, media_type: str | None = None) -> bytes:
    head = b'Content-Disposition: form-data; name="' + name.encode("utf-8", "surrogatepass") + b'"'
    head += f'; filename="{filename}"'.encode() if filename else b""
    head += f"\r\nContent-Type: {media_type}".encode() if media_type else b""
    return head + b"\r\n\r\n" + data


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(b"--" + BOUNDARY + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + BOUNDARY + b"--\r\n"
