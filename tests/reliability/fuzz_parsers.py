"""What reads what strangers send, tried by coverage: anything raised but a ``RequestError`` is a crash.

``python tests/reliability/fuzz_parsers.py --seconds 600`` shares the time among the targets, each in a process of its
own, and needs ``pip install -e '.[fuzz]'``. Exit status 1 if anything crashed, took over ten seconds or over 2 GiB.
With ``--soak``, a run without such a thing becomes a row of the table in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.pictures

with atheris.instrument_imports(include=["stepbatch", "python_multipart", "PIL"]):
    from starlette.requests import Request
    from starlette.types import Message
    from tests.pictures import file, image

    from stepbatch.config import LimitsConfig, ModelConfig
    from stepbatch.errors import RequestError
    from stepbatch.image_files import read_picture
    from stepbatch.server import edits, video_request
    from stepbatch.server.body import Room
    from stepbatch.server.fields import ROUTES
    from stepbatch.server.forms import read_form
    from stepbatch.server.schema import parse, parse_json
    from stepbatch.sizes import parse_size
    from stepbatch.testing import FakeRunner

LIMITS = LimitsConfig()
PICTURES, VIDEOS = (FakeRunner(ModelConfig(backend="fake", fake_videos=videos)).info for videos in (False, True))
HEAD = b'--b\r\nContent-Disposition: form-data; name="'
WORDS = {name for fields in ROUTES.values() for name in fields} | {
    "1024x1024",
    "auto",
    "null",
    "true",
    "NaN",
    "filename=",
}


def size(data: bytes) -> None:
    parse_size(data.decode("utf-8", "surrogateescape"))


def body(data: bytes) -> None:
    values = parse_json(data)
    parse(values, PICTURES).generation.resolve(PICTURES)


def video(data: bytes) -> None:
    wanted = video_request.parse_video(parse_json(data), VIDEOS)
    wanted.generation.resolve(VIDEOS)


def texts(data: bytes) -> None:
    """A form's fields: names and values in turn, by line."""
    words = data.decode("utf-8", "replace").split("\n")
    given = {name: text for name, text in zip(words[::2], words[1::2], strict=False) if name not in ("image", "mask")}
    edits.parse_edit(edits.Form(given, {"image": [b"x"]}), PICTURES)  # a text where a file belongs is refused before


def form(data: bytes) -> None:
    """A whole upload, in two chunks; the first byte says where it is cut, the second which content type it has."""
    cut, kind, whole = data[:1], data[1:2], data[2:]
    content_type = whole[:40] if kind == b"\x00" else b"multipart/form-data; boundary=b"
    at = cut[0] * len(whole) // 256 if cut else 0
    messages: list[Message] = [
        {"type": "http.request", "body": whole[:at], "more_body": True},
        {"type": "http.request", "body": whole[at:], "more_body": False},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def read() -> None:
        request = Request({"type": "http", "method": "POST", "headers": [(b"content-type", content_type)]}, receive)
        with Room(1 << 30).share() as share:
            found = await read_form(request, edits.form_limits(LIMITS, PICTURES), share)
        wanted, strength = edits.parse_edit(found, PICTURES)
        edits.check_before_decoding(wanted, strength, found, PICTURES)

    with suppress(StopIteration):
        read().send(None)  # nothing in it waits
        raise AssertionError("it waits for something")


def picture(data: bytes) -> None:
    read = read_picture(data, 1 << 16, "image", "image")
    read.on_white()
    read.as_mask()


TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "size": (size, [b"1024x1024", b"auto"]),
    "body": (body, [b'{"prompt": "a cat", "n": 2, "size": "64x64", "seed": 7, "timeout": 1.5}']),
    "video": (video, [b'{"prompt": "a cat", "seconds": "1.5", "fps": 8, "num_frames": 9, "size": "64x64"}']),
    "texts": (texts, [b"prompt\na cat\nn\n2\nguidance_scale\n1.5\nstream\nfalse\nstrength\n0.5"]),
    "form": (
        form,
        [b"\x80\x01" + HEAD + b'prompt"\r\n\r\na cat\r\n' + HEAD + b'image[]"; filename="x"\r\n\r\nabc\r\n--b--\r\n'],
    ),
    "picture": (
        picture,
        [
            *(file(image(mode), kind) for mode in ("RGB", "L") for kind in ("PNG", "JPEG", "WEBP")),
            *(file(image(mode)) for mode in ("RGBA", "P", "1", "LA")),
        ],
    ),
}


def run(name: str, seconds: int, folder: Path) -> None:
    """Try one target; this ends the process."""
    target, seeds = TARGETS[name]
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    words = folder.with_suffix(".words")
    words.write_text("\n".join(f'"{word}"' for word in sorted(WORDS)))

    def tried(data: bytes) -> None:
        with suppress(RequestError):
            target(data)

    limits = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=4096",
        "-print_final_stats=1",
    ]
    paths = [f"-dict={words}", f"-artifact_prefix={folder}/crash-", str(folder)]
    atheris.Setup([sys.argv[0], *limits, *paths], tried)
    atheris.Fuzz()


def run_all(seconds: int, soak: bool) -> int:
    """Try every target; returns the exit status. ``soak`` is whether to write down what was found."""
    status, inputs, began = 0, 0, time.monotonic()
    for name in TARGETS:
        with tempfile.TemporaryDirectory(prefix="stepbatch-fuzz-") as parent:
            folder = Path(parent) / name
            folder.mkdir()
            command = [sys.executable, __file__, "--target", name, "--folder", str(folder)]
            given = [*command, "--seconds", str(seconds // len(TARGETS))]
            done = subprocess.run(given, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
            executed = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
            count = int(executed[-1]) if executed else 0
            inputs += count
            print(f"{name}: {count:,} inputs, exit status {done.returncode}", flush=True)
            if done.returncode:
                status = 1
                crashes = [f"{path.name}: {path.read_bytes()!r}" for path in folder.glob("crash-*")]
                print("\n".join([*done.stderr.splitlines()[-40:], *crashes]), flush=True)
    if soak and status == 0:
        write_down(inputs, time.monotonic() - began)
    return status


def write_down(inputs: int, seconds: float) -> None:
    """Put a run without a crash into the table."""
    from tests.reliability import record  # here, as what it imports would not be instrumented

    load, faults = f"{inputs:,} inputs to {len(TARGETS)} parsers", "mutated, by what code they reach"
    found = "no crash; none took over ten seconds or over 2 GiB"
    record.save([record.Finding(10, "parsers, by coverage", load, faults, found, round(seconds, 1))])
    record.write_table()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.target is None:
        return run_all(options.seconds, options.soak)
    run(options.target, options.seconds, options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
