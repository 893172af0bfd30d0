"""What a run consists of: which of dataset, flag and profile holds, what is made up, and what tells two runs apart."""

from __future__ import annotations

import io
import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from PIL import Image

from stepbatch.bench.options import DatasetOptions, LoadOptions, RequestOptions
from stepbatch.bench.workload.work import Task, WorkItem, build, digest
from stepbatch.demo.burst import BURST
from stepbatch.errors import OptionError

TRACE = (
    '{"timestamp": 10, "prompt": "a fox", "size": "512x512", "num_inference_steps": 9, "seed": 5, "n": 3, "user": ""}\n'
    '{"timestamp": 14, "prompt": "an owl", "task": "text-to-video", "num_frames": 17, "fps": 8, "slo_ms": 2000}\n'
    '{"timestamp": 16, "prompt": "a whale", "guidance_scale": 2}\n'
)


def made(count: int = 0, seed: int | None = None, dataset: str = "random", **flags: Any) -> list[WorkItem]:
    return build(DatasetOptions(dataset=dataset, num_prompts=count, seed=seed), RequestOptions(**flags))  # type: ignore[arg-type]


def traced(path: Path, text: str = TRACE, count: int = 0, seed: int | None = None, **flags: Any) -> list[WorkItem]:
    (path / "trace.jsonl").write_text(text)
    options = DatasetOptions(dataset="trace", dataset_path=str(path / "trace.jsonl"), num_prompts=count, seed=seed)
    return build(options, RequestOptions(**flags))


def pixels(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image


def test_the_flag_knows_every_task() -> None:
    assert get_args(Task) == get_args(get_type_hints(RequestOptions)["task"])
    assert get_type_hints(WorkItem)["task"] == Task


def test_what_the_dataset_says_is_asked_for(tmp_path: Path) -> None:
    assert traced(tmp_path) == [
        WorkItem(
            prompt="a fox",
            width=512,
            height=512,
            num_inference_steps=9,
            seed=5,
            n=3,
            extra={"user": ""},
            timestamp=0.0,
        ),
        WorkItem(prompt="an owl", task="text-to-video", num_frames=17, fps=8, timestamp=4.0, slo_ms=2000.0),
        WorkItem(prompt="a whale", guidance_scale=2.0, timestamp=6.0),
    ]


def test_flags_go_over_the_dataset_and_profiles_over_flags(tmp_path: Path) -> None:
    flags = {"width": 256, "height": 128, "num_inference_steps": 9, "guidance_scale": 0.0, "n": 2, "num_frames": 5}
    found = traced(tmp_path, seed=100, fps=4, **flags)
    for index, item in enumerate(found):
        assert (item.width, item.height, item.num_inference_steps, item.guidance_scale) == (256, 128, 9, 0.0)
        assert (item.n, item.seed) == (2, 100 + index)
        assert (item.num_frames, item.fps) == ((5, 4) if item.is_video else (None, None))
    assert [item.task for item in found] == ["text-to-image", "text-to-video", "text-to-image"]

    profile = {"size": "64x32", "num_inference_steps": 3, "num_outputs_per_prompt": 4, "kind": "text-to-image"}
    profile |= {"slo_ms": 10, "user": "profile", "weight": 2, "quality": "low"}
    for item in traced(tmp_path, random_request_config=json.dumps([profile]), **flags):
        assert (item.width, item.height, item.num_inference_steps, item.guidance_scale) == (64, 32, 3, 0.0)
        assert (item.n, item.slo_ms, item.task) == (4, 10.0, "text-to-image")
        assert item.extra == {"user": "profile", "quality": "low"}
    last = traced(tmp_path, random_request_config=json.dumps([profile]), extra_body='{"user": "flag", "a": [1]}')
    assert last[0].extra == {"user": "flag", "quality": "low", "a": [1]}


def test_as_many_as_are_asked_for() -> None:
    burst = [wish.prompt for wish in BURST]
    assert [item.prompt for item in made(dataset="demo")] == burst
    assert [item.prompt for item in made(5, dataset="demo")] == burst[:5]
    assert [item.prompt for item in made(50, dataset="demo")] == (burst * 3)[:50]
    assert len(made()) == 100
    assert len({item.prompt for item in made(250)}) == 250


def test_a_trace_that_begins_anew_goes_on_in_time(tmp_path: Path) -> None:
    times = [item.timestamp for item in traced(tmp_path, count=8)]
    assert times == [0.0, 4.0, 6.0, 9.0, 13.0, 15.0, 18.0, 22.0]  # three in 6 s are one every 3 s
    at_once = '{"timestamp": 5}\n{"timestamp": 5}\n'
    assert [item.timestamp for item in traced(tmp_path, at_once, count=5)] == [0.0] * 5
    assert [item.timestamp for item in traced(tmp_path, '{"timestamp": 5}', count=2)] == [0.0, 0.0]
    assert [item.timestamp for item in traced(tmp_path, '{"n": 1}', count=2)] == [None, None]


def test_seeds() -> None:
    assert [item.seed for item in made(3)] == [None] * 3
    assert [item.seed for item in made(3, seed=0)] == [0, 1, 2]
    assert [item.seed for item in made(2, dataset="demo")] == [1, 2]
    assert [item.seed for item in made(2, seed=40, dataset="demo")] == [40, 41]


@pytest.mark.parametrize("dataset", ["random", "demo"])
def test_profiles_are_drawn_by_weight_and_the_same_every_time(dataset: str) -> None:
    config = json.dumps([{"weight": 0.25, "num_inference_steps": 4}, {"weight": 0.75, "width": 64, "height": 96}])
    found = made(2000, seed=3, dataset=dataset, random_request_config=config)
    assert found == made(2000, seed=3, dataset=dataset, random_request_config=config)
    shares = Counter(item.width == 64 and item.height == 96 for item in found)
    assert 0.72 < shares[True] / 2000 < 0.78
    assert [item.width for item in found] != [
        item.width for item in made(2000, seed=4, dataset=dataset, random_request_config=config)
    ]


def test_no_profile_goes_with_longer_prompts() -> None:
    config = '[{"num_inference_steps": 1}, {"num_inference_steps": 2}]'
    for seed in range(3):
        lengths: dict[int | None, list[int]] = {1: [], 2: []}
        for item in made(1000, seed=seed, random_request_config=config):
            lengths[item.num_inference_steps].append(len(item.prompt))
        means = [sum(found) / len(found) for found in lengths.values()]
        assert 0.85 < means[0] / means[1] < 1.18


def test_profiles_may_be_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    path.write_text('[{"size": "64x64"}]')
    assert made(1, random_request_config=f"@{path}")[0].width == 64


PROFILES = {
    "not JSON": ("[{]", "--random-request-config: this is not JSON: "),
    "no list": ('{"weight": 1}', "--random-request-config: it must be a JSON list of objects, like "),
    "empty": ("[]", "--random-request-config: it must be a JSON list of objects, like "),
    "no object": ("[{}, 3]", "--random-request-config: profile 2 must be a JSON object, not 3"),
    "no weight": ('[{"weight": 0}]', "--random-request-config: profile 1: weight must be a number of more than 0"),
    "negative": ('[{"weight": -1}]', "--random-request-config: profile 1: weight must be a number of more than 0"),
    "true": ('[{"weight": true}]', "--random-request-config: profile 1: weight must be a number of more than 0"),
    "huge": ('[{"weight": 1e400}]', "--random-request-config: profile 1: weight must be a number of more than 0"),
    "size": ('[{}, {"width": -8, "height": 8}]', "--random-request-config: profile 2: width must be a whole number"),
    "width": ('[{"width": 8}]', "--random-request-config: profile 1: width and height go together"),
    "task": ('[{"kind": "edit"}]', "--random-request-config: profile 1: task must be one of text-to-image, "),
    "timestamp": ('[{"timestamp": 1}]', "--random-request-config: profile 1: a timestamp is a trace's"),
    "no file": ("@no/such.json", "--random-request-config: there is no file no/such.json"),
}


@pytest.mark.parametrize(("config", "message"), PROFILES.values(), ids=PROFILES)
def test_wrong_profiles(config: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        made(1, random_request_config=config)
    assert str(caught.value).startswith(message)


def test_wrong_profiles_in_a_file_are_said_with_it(tmp_path: Path) -> None:
    path = tmp_path / "profiles.json"
    path.write_text("[{},\n{]")
    with pytest.raises(OptionError, match=f"^{path}:2: this is not JSON"):
        made(1, random_request_config=f"@{path}")
    path.write_text('[{"n": 0}]')
    with pytest.raises(OptionError, match=f"^--random-request-config: {path}: profile 1: n must be"):
        made(1, random_request_config=f"@{path}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 512}, "--width and --height go together"),
        ({"height": 512}, "--width and --height go together"),
        ({"extra_body": "[1]"}, r"--extra-body must be a JSON object, not \[1\]"),
        ({"extra_body": "{"}, "--extra-body: this is not JSON: "),
        ({"extra_body": '{"a": NaN}'}, "--extra-body: this is not JSON: NaN is none of its numbers"),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}"):
        made(1, **flags)


def test_images_are_made_up_where_a_task_needs_them() -> None:
    found = made(40, task="image-to-image", width=96, height=64)
    assert all(len(item.images) == 1 and pixels(item.images[0].data).size == (96, 64) for item in found)
    assert all(pixels(item.images[0].data).mode == "RGB" for item in found)
    assert len({item.images[0].data for item in found}) == len({item.images[0].digest for item in found}) == 40
    assert found == made(40, task="image-to-image", width=96, height=64)
    assert pixels(made(1, task="image-to-video")[0].images[0].data).size == (512, 512)
    assert not made(1)[0].images
    burst = made(dataset="demo", task="image-to-image")
    assert [pixels(item.images[0].data).size for item in burst] == [(wish.width, wish.height) for wish in BURST]


def test_made_up_images_are_the_same_on_every_machine() -> None:
    (item,) = made(1, task="image-to-image", width=33, height=17)
    assert item.images[0].digest == "0776f9a7eb602221cbeb638b7d97283b3189aa6025d198872ebe9a2b890c2f93"
    shown = pixels(item.images[0].data)  # the file itself may differ, as PNG encoders do
    assert sha256(b"33x17 " + shown.tobytes()).hexdigest() == item.images[0].digest


def test_images_of_a_trace_are_read_once_and_decide_the_task(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    text = '{"image_path": "a.png"}\n{"image_paths": ["a.png", "a.png"], "task": "image-to-video"}\n{"prompt": "a"}\n'
    first, second, third = traced(tmp_path, text)
    assert [item.task for item in (first, second, third)] == ["image-to-image", "image-to-video", "text-to-image"]
    assert first.images[0].data == (tmp_path / "a.png").read_bytes()
    assert first.images[0].name == "a.png"
    assert first.images[0] is second.images[0] is second.images[1]
    assert not third.images
    (drawn, *_) = traced(tmp_path, text, random_request_config='[{"task": "text-to-image"}]')
    assert (drawn.task, drawn.images) == ("text-to-image", ())


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"can't read the image no/such\.png: No such file"):
        made(1, task="image-to-image", random_request_config='[{"image_path": "no/such.png"}]')


def test_what_was_asked_is_kept_without_the_images_themselves() -> None:
    (item,) = made(1, seed=0, task="image-to-image", guidance_scale=0.0)
    asked = item.asked()
    assert asked == msgspec.json.decode(msgspec.json.encode(asked))
    assert asked["images"] == [item.images[0].digest]
    assert (asked["seed"], asked["guidance_scale"]) == (0, 0.0)
    assert "width" not in asked


def test_digests_are_the_same_on_every_machine() -> None:
    found = digest(made(3, seed=1, width=64, height=64), LoadOptions(request_rate=2.5))
    assert (found["prompts"], found["load"], found["all"]) == (
        "9cff249ea874a701",
        "a039465c4a5647b6",
        "457edfab6f97c151",
    )


def test_digests_say_what_differs(tmp_path: Path) -> None:
    load = LoadOptions()
    base = {"task": "image-to-video", "width": 64, "height": 64, "seed": 1}

    def digests(load: LoadOptions = load, **changed: Any) -> dict[str, str]:
        return digest(made(2, **{**base, **changed}), load)

    def differing(load: LoadOptions = load, **changed: Any) -> set[str]:
        other = digests(load, **changed)
        assert set(other) == set(before)
        return {name for name, value in other.items() if value != before[name]} - {"all"}

    before = digests()
    assert differing() == set()
    assert differing(width=128) == {"sizes", "images"}
    assert differing(num_frames=9) == differing(fps=9) == {"sizes"}
    assert differing(num_inference_steps=3) == {"steps"}
    assert differing(guidance_scale=3) == {"guidance"}
    assert differing(n=2) == {"outputs"}
    assert differing(task="text-to-video") == {"tasks", "images"}
    assert differing(extra_body='{"a": 1}') == {"extra"}
    assert differing(seed=2) == {"seeds", "prompts"}
    assert differing(LoadOptions(request_rate=2)) == {"load"}
    assert differing(LoadOptions(burstiness=2)) == {"load"}
    assert differing(LoadOptions(max_concurrency=2)) == {"load"}
    assert differing(LoadOptions(warmup_requests=9)) == set()
    assert digests(extra_body='{"a": 1, "b": 2}') == digests(extra_body='{"b": 2, "a": 1}')
    for other in (digests(n=2), digests(LoadOptions(max_concurrency=2))):
        assert other["all"] != before["all"]

    later = TRACE.replace("14", "15")
    traces = [digest(traced(tmp_path, text), load) for text in (TRACE, later)]
    assert {name for name in traces[0] if traces[0][name] != traces[1][name]} == {"load", "all"}
