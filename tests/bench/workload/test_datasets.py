"""Every layout is read as it is published, and what is wrong with a file is said with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepbatch.bench.options import DatasetOptions
from stepbatch.bench.workload.datasets import RANDOM_PROMPTS, read
from stepbatch.bench.workload.entries import Entry, Task
from stepbatch.bench.workload.prompts import made_up
from stepbatch.demo.burst import BURST
from stepbatch.errors import OptionError

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "element\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n"
    'A robot painted as graffiti on a brick wall. The words "Fly an airplane" are written on the wall.\tOutdoor Scenes'
    "\tComplex\t\n"
    '"WRAPPER" on a bar of chocolate\tArtifacts\tWriting & Symbols\t\n'
    "Salvador Dalí\tPeople\tBasic\t\n"
)
DRAWBENCH = (
    "Prompts,Category\n"
    "A red colored car.,Colors\n"
    '"An emoji of a baby panda wearing a red hat, green gloves, red shirt, and green pants.",DALL-E\n'
    "A pear cut into seven pieces arranged in a ring.,Gary Marcus et al. \n"
)
VBENCH = (
    '[{"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]}, '
    '{"prompt_en": "a bird and a cat", "dimension": ["multiple_objects"], '
    '"auxiliary_info": {"multiple_objects": {"object": "bird and cat"}}}, '
    '{"prompt_en": "a bird and a cat", "dimension": ["color"]}, '
    '{"prompt_en": "Petra\'s rock-carved fa\\u00e7ades", "dimension": ["scene"]}]'
)
VBENCH_2 = """[
    {
        "prompt_en": "Garden, zoom in.",
        "dimension": [
            "Camera_Motion"
        ],
        "auxiliary_info": "zoom_in"
    },
    {
        "prompt_en": "An ant gradually grow big.",
        "dimension": [
            "Dynamic_Attribute"
        ],
        "auxiliary_info": [
            "Does the size of the ant increase? (yes or no)"
        ]
    }
]"""
VBENCH_I2V = """[
    {
        "prompt_en": "a sea fan in the water",
        "dimension": ["i2v_background"],
        "image_type": "abstract",
        "image_name": "a sea fan in the water.jpg"
    },
    {
        "prompt_en": "a sea fan in the water, camera pans left",
        "dimension": ["camera_motion"],
        "image_type": "abstract"
    },
    {
        "prompt_en": "a squirrel eats",
        "dimension": ["i2v_subject"],
        "image_type": "animal",
        "image_name": "a squirrel eats.jpg"
    }
]"""
VBENCH_I2V_INFO = (
    '[{"file_name": "a squirrel eats.jpg", "url": "www.pexels.com/photo/751829", "type": "animal", '
    '"origin_width": 3381, "caption": "a squirrel eats"}]'
)
OMNI = (
    "Request(request_id='req-0001', timestamp=12.5, prompt='a city, it\\'s dawn', height=1536, width=1024, "
    "num_inference_steps=70)\n"
    "\n"
    "Request(request_id='req-0002', timestamp=10.0, prompt=\"a fox\", width=512, height=512, num_inference_steps=20, "
    "slo_ms=1500.0, seed=None)\n"
)
JSON_LINES = (
    '{"timestamp": 1700000003.5, "prompt": "a fox", "size": "512x768", "num_inference_steps": 20, "seed": 3, "n": 2}\n'
    '{"timestamp": 1700000000, "text": "an owl", "guidance_scale": 4, "negative_prompt": "", "fps": 16, '
    '"num_frames": 81, "task": "text-to-video", "slo_ms": 900, "id": "b", "true_cfg_scale": 2.5}\n'
)


def entries(dataset: str, path: Path | str, task: Task = "text-to-image", **options: Any) -> list[Entry]:
    return read(DatasetOptions(dataset=dataset, dataset_path=str(path), **options), task)  # type: ignore[arg-type]


def prompts(dataset: str, path: Path, task: Task = "text-to-image") -> list[str]:
    return [entry.prompt for entry in entries(dataset, path, task)]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)


def refusal(dataset: str, path: Path | str, task: Task = "text-to-image") -> str:
    with pytest.raises(OptionError) as caught:
        entries(dataset, path, task)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_the_demo_is_the_bundled_models_burst() -> None:
    found = entries("demo", "")
    assert len(found) == len(BURST)
    first = {"prompt": BURST[0].prompt, "width": 128, "height": 128, "seed": 1}
    assert found[0].said() == first | {"num_inference_steps": 8, "guidance_scale": 1.5}


def test_random_prompts_are_the_same_every_time_and_never_alike() -> None:
    found = entries("random", "", num_prompts=300, seed=7)
    assert found == entries("random", "", num_prompts=300, seed=7)
    assert found != entries("random", "", num_prompts=300, seed=8)
    assert found[:20] == entries("random", "", num_prompts=20, seed=7)
    assert len({entry.prompt for entry in found}) == 300
    words = [len(entry.prompt.split()) for entry in found]
    assert min(words) < 8 and max(words) > 50
    assert len(entries("random", "")) == RANDOM_PROMPTS
    assert entries("random", "") == entries("random", "", seed=0)


def test_random_prompts_are_the_same_on_every_machine() -> None:
    first, second, third = made_up(3, 0)
    assert (first, second) == ("Picture 1: a paper market", "Picture 2: a golden castle")
    assert third.startswith("Picture 3: a frozen staircase, a floating teapot, a broken clock, a frozen balloon, ")


def test_parti_keeps_quotes_as_they_are(tmp_path: Path) -> None:
    for text in (PARTI, PARTI.replace("\n", "\r\n")):
        assert prompts("parti", write(tmp_path / "PartiPrompts.tsv", text)) == [
            "element",
            'A robot painted as graffiti on a brick wall. The words "Fly an airplane" are written on the wall.',
            '"WRAPPER" on a bar of chocolate',
            "Salvador Dalí",
        ]


@pytest.mark.parametrize("header", ["Prompts,Category", "Prompt,Category", "prompts", "prompt", "Category,Prompts"])
def test_drawbench(tmp_path: Path, header: str) -> None:
    text = DRAWBENCH.replace("Prompts,Category", header)
    if header == "Category,Prompts":
        text = f"{header}\nColors,A red colored car.\n\n"
        assert prompts("drawbench", write(tmp_path / "d.csv", text)) == ["A red colored car."]
        return
    assert prompts("drawbench", write(tmp_path / "d.csv", text)) == [
        "A red colored car.",
        "An emoji of a baby panda wearing a red hat, green gloves, red shirt, and green pants.",
        "A pear cut into seven pieces arranged in a ring.",
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_text_is_a_prompt_a_line(tmp_path: Path, mark: bytes) -> None:
    data = mark + "a fox\r\n\n   \n  [an owl], {quiet}\nein Käfer\u2028im Gras\n".encode()
    assert prompts("text", write(tmp_path / "p.txt", data)) == ["a fox", "[an owl], {quiet}", "ein Käfer\u2028im Gras"]


def test_vbench_lists_and_text(tmp_path: Path) -> None:
    assert prompts("vbench", write(tmp_path / "VBench_full_info.json", VBENCH)) == [
        "In a still frame, a stop sign",
        "a bird and a cat",
        "Petra's rock-carved façades",
    ]
    second = ["Garden, zoom in.", "An ant gradually grow big."]
    assert prompts("vbench", write(tmp_path / "VBench2_full_info.json", VBENCH_2)) == second
    text = write(tmp_path / "subject_consistency.txt", "a person swimming in ocean\na bicycle\na bicycle\n")
    assert prompts("vbench", text) == ["a person swimming in ocean", "a bicycle"]


@pytest.mark.parametrize("place", ["data/origin", "origin", "data/crop/1-1"])
def test_vbench_with_images(tmp_path: Path, place: str) -> None:
    path = write(tmp_path / "vbench2_i2v_full_info.json", VBENCH_I2V)
    images(tmp_path / place, "a sea fan in the water.jpg", "a squirrel eats.jpg")
    fan, squirrel = (tmp_path / place / f"{name}.jpg" for name in ("a sea fan in the water", "a squirrel eats"))
    assert entries("vbench", path, "image-to-video") == [
        Entry(prompt="a sea fan in the water", images=(fan,)),
        Entry(prompt="a sea fan in the water, camera pans left", images=(fan,)),
        Entry(prompt="a squirrel eats", images=(squirrel,)),
    ]
    assert not any(entry.images for entry in entries("vbench", path, "text-to-video"))


def test_vbench_image_suite(tmp_path: Path) -> None:
    path = write(tmp_path / "data/i2v-bench-info.json", VBENCH_I2V_INFO)
    images(tmp_path / "data/origin", "a squirrel eats.jpg")
    for place in (path, tmp_path, tmp_path / "data"):
        (entry,) = entries("vbench", place, "image-to-image")
        assert entry.prompt == "a squirrel eats"
        assert [image.resolve() for image in entry.images] == [tmp_path / "data/origin/a squirrel eats.jpg"]
    write(tmp_path / "VBench_full_info.json", VBENCH)
    assert len(entries("vbench", tmp_path, "text-to-image")) == 3


def test_vbench_folders(tmp_path: Path) -> None:
    write(tmp_path / "repo/prompts/prompts_per_dimension/subject_consistency.txt", "a car turning a corner\n")
    for folder in ("repo", "repo/prompts", "repo/prompts/prompts_per_dimension"):
        assert prompts("vbench", tmp_path / folder) == ["a car turning a corner"]
        assert prompts("vbench", tmp_path / folder, "image-to-video") == ["a car turning a corner"]
    images(tmp_path / "pictures", "b owl.png", "a fox.jpg", "c.JPEG")
    write(tmp_path / "pictures/notes.txt", "nothing")
    found = entries("vbench", tmp_path / "pictures", "image-to-image")
    assert [entry.prompt for entry in found] == ["a fox", "b owl", "c"]
    assert [image.name for entry in found for image in entry.images] == ["a fox.jpg", "b owl.png", "c.JPEG"]
    assert entries("vbench", tmp_path / "pictures") == [Entry(prompt=name) for name in ("a fox", "b owl", "c")]


def test_a_trace_of_calls(tmp_path: Path) -> None:
    later, first = (
        Entry(prompt="a city, it's dawn", width=1024, height=1536, num_inference_steps=70, timestamp=2.5),
        Entry(prompt="a fox", width=512, height=512, num_inference_steps=20, timestamp=0.0, slo_ms=1500.0),
    )
    assert entries("trace", write(tmp_path / "sd3_trace.txt", OMNI)) == [first, later]


def test_a_trace_of_json_lines(tmp_path: Path) -> None:
    assert entries("trace", write(tmp_path / "t.jsonl", JSON_LINES)) == [
        Entry(
            prompt="an owl",
            task="text-to-video",
            guidance_scale=4.0,
            num_frames=81,
            fps=16,
            timestamp=0.0,
            slo_ms=900.0,
            extra={"negative_prompt": "", "true_cfg_scale": 2.5},
        ),
        Entry(prompt="a fox", width=512, height=768, num_inference_steps=20, seed=3, n=2, timestamp=3.5),
    ]


def test_a_trace_as_a_table(tmp_path: Path) -> None:
    images(tmp_path / "in", "a.png")
    text = (
        "timestamp, prompt,width,height,guidance_scale,negative_prompt,true_cfg_scale,flow,user,image_paths,task\n"
        '1,"a fox, an owl",512,256,,7,2.5,true,me,"[""in/a.png"", ""in/a.png""]",image-to-image\n'
        "\n"
        "0.5,42,,,3,,,,,in/a.png,\n"
        "0.5,last\n"
    )
    image = tmp_path / "in/a.png"
    assert entries("trace", write(tmp_path / "t.csv", text)) == [
        Entry(prompt="42", guidance_scale=3.0, images=(image,), timestamp=0.0),
        Entry(prompt="last", timestamp=0.0),
        Entry(
            prompt="a fox, an owl",
            width=512,
            height=256,
            task="image-to-image",
            images=(image, image),
            timestamp=0.5,
            extra={"negative_prompt": "7", "true_cfg_scale": 2.5, "flow": True, "user": "me"},
        ),
    ]


def test_images_of_a_trace_may_be_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "in", "a.png")
    monkeypatch.chdir(tmp_path)
    (entry,) = entries("trace", write(tmp_path / "traces/t.jsonl", '{"image_path": "in/a.png"}'))
    assert entry.images == (Path("in/a.png"),)


def test_a_trace_without_timestamps_keeps_its_order_and_without_prompts_gets_some(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"size": "512x512"}\n{"prompt": " ", "size": "auto"}\n{"prompt": "a fox"}\n')
    found = entries("trace", path, seed=4)
    assert [entry.timestamp for entry in found] == [None] * 3
    assert [entry.prompt for entry in found] == [*made_up(2, 4), "a fox"]
    assert [entry.width for entry in found] == [512, None, None]


WRONG = {
    "parti as drawbench": ("drawbench", PARTI, 1, "it looks like --dataset parti"),
    "drawbench as parti": ("parti", DRAWBENCH, 1, "it looks like --dataset drawbench"),
    "vbench as text": ("text", VBENCH, 1, "it looks like --dataset vbench"),
    "parti as text": ("text", PARTI, 1, "it looks like --dataset parti"),
    "drawbench as vbench": ("vbench", DRAWBENCH, 1, "it looks like --dataset drawbench"),
    "calls as vbench": ("vbench", OMNI, 1, "it looks like --dataset trace"),
    "text as parti": ("parti", "a fox\nan owl", 1, "it looks like --dataset text"),
    "vbench as a trace": ("trace", VBENCH, 1, "it looks like --dataset vbench"),
    "a table of traces as text": ("text", "timestamp,size\n0,512x512", 1, "it looks like --dataset trace"),
    "text as a trace": ("trace", "a fox\nan owl", 1, "it looks like --dataset text"),
    "names twice": ("trace", "timestamp,timestamp\n0,0", 1, "a JSON object a line, CSV"),
    "no prompt": ("parti", PARTI + "\tAbstract\tBasic\t\n", 6, "no prompt on the line"),
    "header alone": ("drawbench", "Prompts,Category\n", 1, "there are no prompts"),
    "open quote": ("drawbench", DRAWBENCH + '"A red', 5, "unexpected end of data"),
    "empty": ("text", " \n\n", 1, "nothing in the file"),
    "binary": ("text", b"a fox\n\xff\xfe\x00", 2, "not text in UTF-8"),
    "broken list": ("vbench", '[\n{"prompt_en": "a"},\n{"prompt_en" "b"}]', 3, "not JSON: Expecting ':' delimiter"),
    "deep list": ("vbench", "[" * 100_000, None, "not JSON"),
    "not a number": ("vbench", '[{"prompt_en": "a", "x": NaN}]', None, "NaN is none of its numbers"),
    "no prompt in a list": ("vbench", '[\n{"prompt_en": "a"},\n\n{"dimension": []}]', 4, "entry 2 is no object"),
    "no object in a list": ("vbench", '["a [,] fox",\n3]', 1, "entry 1 is no object"),
    "empty list": ("vbench", "[ ]", 1, "the list is empty"),
    "broken line": ("trace", '{"prompt": "a"}\n\n{"prompt": }', 3, "not a JSON object"),
    "list in a line": ("trace", '{"prompt": "a"}\n[1]', 2, "not a JSON object: Expected `object`, got `array`"),
    "negative size": ("trace", '{"width": -8, "height": 8}', 1, "width must be a whole number of at least 1, not -8"),
    "width alone": ("trace", '{"width": 8}', 1, "width and height go together"),
    "size and width": ("trace", '{"size": "8x8", "width": 8, "height": 8}', 1, "size goes without width and height"),
    "bad size": ("trace", '{"size": "8 x 8"}', 1, "size must be"),
    "no size": ("trace", '{"size": "0x8"}', 1, "width must be a whole number of at least 1, not 0"),
    "half a step": ("trace", "num_inference_steps\n4\n4.5\n", 3, "num_inference_steps must be a whole number"),
    "steps of text": ("trace", "num_inference_steps\nmany\n", 2, "num_inference_steps must be a whole number"),
    "true steps": ("trace", '{"n": true}', 1, "n must be a whole number of at least 1, not True"),
    "endless guidance": ("trace", "Request(guidance_scale=1e999)", 1, "this is not Request"),
    "guidance that is none": ("trace", "guidance_scale\nnan\n", 2, "guidance_scale must be a number of at least 0"),
    "far too late": ("trace", '{"timestamp": 1e300}', 1, "timestamp must be a number, not 1e+300"),
    "huge seed": ("trace", '{"seed": ' + "9" * 4000 + "}", 1, "seed must be a whole number"),
    "unknown task": ("trace", '{"task": "text-to-imag"}', 1, "did you mean text-to-image?"),
    "task twice": ("trace", '{"task": "text-to-image", "kind": "text-to-image"}', 1, "task is given twice"),
    "number as prompt": ("trace", '{"prompt": 3}', 1, "prompt must be text, not 3"),
    "no path": ("trace", '{"image_paths": ["a.png", 3]}', 1, "an image must be a file's path"),
    "image for a task without": ("trace", '{"image_path": "a", "task": "text-to-image"}', 1, "takes no image"),
    "missing image": ("trace", '{"prompt": "a"}\n{"image_path": "no/such.png"}', 2, "there is no image"),
    "image as data": ("trace", '{"image_path": "data:image/png;base64,' + "A" * 9000 + '"}', 1, "there is no image"),
    "one timestamp": ("trace", '{"timestamp": 1}\n{"prompt": "a"}', 2, "there is no timestamp, while other lines"),
    "too many cells": ("trace", "prompt,n\na fox, red,1\n", 2, "there are 3 values for 2 names"),
    "header of a trace alone": ("trace", "timestamp,prompt\n", 1, "there are no requests"),
    "not a request": ("trace", "Request(prompt='a')\nRespond(prompt='a')", 2, "this is not Request(name=value, ...)"),
    "a call in a value": ("trace", "Request(prompt=open('/etc/passwd').read())", 1, "this is not Request"),
    "a call around it": ("trace", "Request(prompt='a').run()", 1, "this is not Request"),
    "values without names": ("trace", "Request('a', **{'n': 2})", 1, "this is not Request"),
    "what JSON can't say": ("trace", "Request(mask={1, 2})", 1, "this is not Request"),
    "half a call": ("trace", "Request(prompt='a'", 1, "this is not Request"),
    "deep call": ("trace", "Request(x=" + "(" * 5000 + ")", 1, "this is not Request"),
}


@pytest.mark.parametrize(("dataset", "text", "line", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_its_line(
    tmp_path: Path, dataset: str, text: str | bytes, line: int | None, message: str
) -> None:
    path = write(tmp_path / "file", text)
    found = refusal(dataset, path)
    assert found.startswith(f"{path}:" if line is None else f"{path}:{line}: ")
    assert message in found


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.sampled_from(["prompt_en", "x"]), st.text('a[]{},"\n\\', max_size=5)), max_size=6))
def test_the_line_of_an_entry_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any]
) -> None:
    texts = [*map(json.dumps, items), "3"]
    path = write(tmp_path_factory.mktemp("list") / "list.json", "[" + " ,\n".join(texts) + "]")
    wrong = next((i for i, item in enumerate(items) if not item.get("prompt_en", "").strip()), len(items))
    assert refusal("vbench", path).startswith(f"{path}:{wrong + 1}: entry {wrong + 1} ")


def test_missing_files_and_images(tmp_path: Path) -> None:
    assert refusal("vbench", "") == "--dataset-path is needed for --dataset vbench"
    assert refusal("demo", "x") == "--dataset-path has no use with --dataset demo"
    assert refusal("text", tmp_path / "no.txt") == f"--dataset-path: there is no file {tmp_path / 'no.txt'}"
    assert refusal("vbench", tmp_path / "no.json") == f"--dataset-path: there is no file {tmp_path / 'no.json'}"
    assert "Is a directory" in refusal("text", tmp_path)
    assert "File name too long" in refusal("vbench", "a" * 300)
    assert "holds none of VBench's files (VBench_full_info.json, " in refusal("vbench", tmp_path)
    path = write(tmp_path / "vbench2_i2v_full_info.json", VBENCH_I2V)
    assert "the images that it names are not there" in refusal("vbench", path, "image-to-video")
    images(tmp_path / "origin", "a sea fan in the water.jpg")
    missing = refusal("vbench", path, "image-to-video")
    assert missing == f"{path}:13: there is no image {tmp_path / 'origin' / 'a squirrel eats.jpg'}"


def test_milliseconds_are_not_taken_for_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 1731000000500, "prompt": "a fox"}\n{"timestamp": 1731000000700, "prompt": "an owl"}\n'
    )
    assert "looks like milliseconds" in refusal("trace", path)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    path.write_text('[{"prompt_en": "bad \\ud800 half", "dimension": []}]')
    assert "is not JSON" in refusal("vbench", path)


def test_nothing_of_a_trace_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "run"
    refusal("trace", write(tmp_path / "t.txt", f"Request(prompt=__import__('pathlib').Path({str(mark)!r}).touch())"))
    assert not mark.exists()


def test_backslashes_in_a_prompt_warn_of_nothing(tmp_path: Path) -> None:
    (entry,) = entries("trace", write(tmp_path / "t.txt", r"Request(prompt='a\dog')"))
    assert entry.prompt == r"a\dog"
