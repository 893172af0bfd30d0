from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from tests.bench.simulate.simulated import MODEL, curve

from stepbatch.bench.options import GoalOptions, RequestOptions, SimulateOptions
from stepbatch.bench.simulate.workload import Workload, read_workload
from stepbatch.errors import OptionError


def read(config: object = "", goal: float | None = None, timeout: float | None = None, **options: object) -> Workload:
    text = json.dumps(config) if config else ""
    wanted = RequestOptions(random_request_config=text)
    simulate = SimulateOptions(**{"num_requests": 200, **options})  # type: ignore[arg-type]
    return read_workload(simulate, wanted, GoalOptions(slo=goal), curve(), timeout, 1)


def test_profiles_are_drawn_by_weight_and_the_rest_is_the_curves() -> None:
    load = read([{"weight": 3, "num_inference_steps": 8}, {"weight": 1, "size": "128x64", "n": 2}], num_requests=4000)
    asked = [(kind.request.size, kind.request.steps, kind.request.n) for kind in load.mixture[0]]
    found = dict(zip(asked, load.mixture[1], strict=True))
    assert set(found) == {((64, 64), 8, 1), ((128, 64), 4, 2)}
    assert found[(64, 64), 8, 1] == pytest.approx(3000, rel=0.05)


def test_times_are_of_the_rate() -> None:
    times = read().times(4.0, 1.0, seed=1)
    assert times is not None and len(times) == 200
    assert times[0] == 0.0 and times[-1] == pytest.approx(199 / 4.0)


def test_a_trace_says_when_and_what(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": t, "size": "64x64", "num_inference_steps": s, "slo_ms": 900} for t, s in ((5, 3), (6.5, 7))]
    trace.write_text("\n".join(map(json.dumps, lines)))
    load = read(trace=str(trace), num_requests=0)
    assert load.times(None, 1.0, seed=0) == [0.0, 1.5]
    assert [(kind.request.steps, kind.goal) for kind in load.kinds] == [(3, 0.9), (7, 0.9)]
    assert len(read(trace=str(trace), num_requests=5).kinds) == 5


def test_a_goal_may_be_relative_to_what_a_request_takes_by_itself() -> None:
    (kind,), _ = read(goal=0.0).mixture
    assert kind.goal == 3.0 * kind.alone(curve().costs)


def test_the_scheduler_sees_what_only_it_looks_at() -> None:
    (kind,), _ = read([{"priority": 3, "user": "me"}], timeout=9.0).mixture
    assert (kind.request.priority, kind.request.user, kind.request.timeout) == (3, "me", 9.0)


def test_what_guides_counts_as_the_model_has_it() -> None:
    profiles = [{"true_cfg_scale": 4.0}, {"negative_prompt": "blurry"}, {"negative_prompt": "", "true_cfg_scale": 3}]
    found = [len(read([profile]).kinds[0].lengths) for profile in profiles]
    assert found == [2, 1, 2]  # of the model, nothing is guided by default


def test_a_profile_is_laid_over_what_a_trace_says(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"timestamp": 1, "true_cfg_scale": 4.0, "priority": 1}))
    (kind,), _ = read([{"priority": 3}], trace=str(trace), num_requests=0).mixture
    assert (kind.request.true_cfg_scale, kind.request.priority) == (4.0, 3)


def test_requests_of_a_video_model_are_of_videos() -> None:
    defaults = msgspec.structs.replace(MODEL.defaults, num_frames=9)
    uses = (*MODEL.uses, "num_frames")
    model = msgspec.structs.replace(MODEL, tasks=("text-to-video",), defaults=defaults, uses=uses, max_frames=81)
    of = msgspec.structs.replace(curve(), model=model)
    for frames in (None, 17):
        wanted = RequestOptions(num_frames=frames)
        load = read_workload(SimulateOptions(num_requests=5), wanted, GoalOptions(), of, None, 1)
        assert load.kinds[0].request.frames == (frames or 9)
        assert load.kinds[0].lengths == (16 * (frames or 9),)
    wanted = RequestOptions(random_request_config=json.dumps([{"task": "text-to-image"}]))
    with pytest.raises(OptionError, match="task is text-to-image, but made, the model of --curve, makes videos"):
        read_workload(SimulateOptions(num_requests=5), wanted, GoalOptions(), of, None, 1)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"images": ["a.png"]}, "one with images"),
        ({"task": "image-to-image"}, "one with images"),
        ({"lora": "x"}, "doesn't know what lora does"),
        ({"task": "text-to-video"}, "task is text-to-video, but made, the model of --curve, makes pictures"),
        ({"guidance_scale": 4.0}, "guidance_scale has no effect on this model; it takes true_cfg_scale"),
        ({"size": "72x64"}, "width must be a multiple of 16"),
        ({"num_inference_steps": 5000}, "num_inference_steps must be from 1 to 1000"),
    ],
)
def test_what_is_not_simulated_is_refused(profile: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read([profile])
