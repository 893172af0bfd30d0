"""Examples keep to what was published; profiles tell of tokens what they know."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tests.bench.simulate.simulated import MODEL

from stepbatch.bench.profile_file import ProfileFile
from stepbatch.bench.results import save
from stepbatch.bench.simulate.curves import read_curve, shipped
from stepbatch.bench.simulate.kinds import make_kind
from stepbatch.engine.cost import Costs, LinearCost, StepCost
from stepbatch.errors import OptionError, SetupError
from stepbatch.model_info import Defaults, Guidance, Sizing
from stepbatch.request import GenerationRequest

PUBLISHED = {  # pictures in a step -> its seconds, and times the throughput of one
    "qwen-image-2512-h200-512": {
        1: (0.167, 1.0),
        2: (0.183, 1.82),
        3: (0.186, 2.69),
        4: (0.240, 2.77),
        8: (0.425, 3.14),
        16: (0.832, 3.21),
    },
    "qwen-image-2512-h200-1024": {1: (0.243, 1.0), 2: (0.474, 1.02), 3: (0.711, 1.02)},
}


def test_these_examples_are_shipped_and_say_where_they_come_from() -> None:
    assert shipped() == sorted(PUBLISHED)
    for name in shipped():
        assert "https://" in read_curve(name).note


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_example_has_the_published_figures(name: str) -> None:
    curve = read_curve(name)
    kind = make_kind(GenerationRequest(prompt="x"), curve)
    assert len(kind.lengths) == 2
    tokens, squares = kind.tokens, kind.squares
    alone = curve.costs.step.seconds(tokens, squares)
    for jobs, (seconds, ratio) in PUBLISHED[name].items():
        predicted = curve.costs.step.seconds(jobs * tokens, jobs * squares)
        assert predicted == pytest.approx(seconds, rel=1e-4), jobs
        assert jobs * alone / predicted == pytest.approx(ratio, rel=0.01), jobs


def test_guidance_takes_a_second_sequence() -> None:
    curve = read_curve("qwen-image-2512-h200-512")
    both, one = (
        make_kind(GenerationRequest(prompt="x", width=512, height=height, guidance_scale=scale), curve).lengths
        for height, scale in ((512, 4.0), (256, 1.0))
    )
    assert both == (1024 + 32,) * 2
    assert one == (512 + 32,)


def profile(**fields: object) -> ProfileFile:
    costs = Costs(known=True, step=StepCost(base=0.1, per_token=0.01))
    return ProfileFile(**{"name": "measured", "costs": costs, "model": MODEL, "device": "cpu", **fields})  # type: ignore[arg-type]


def kept(profile: ProfileFile, folder: Path) -> str:
    """A profile's file."""
    save(profile, folder / "profile.json")
    return str(folder / "profile.json")


def test_a_profile_tells_what_its_model_makes_of_requests(tmp_path: Path) -> None:
    sizing = Sizing(token=32, frame=4, prompt=6.0, character=0.5)
    defaults = Defaults(width=64, height=96, num_inference_steps=3, num_frames=9, guidance_scale=5.0)
    uses = ("guidance_scale", "num_frames", "negative_prompt", "max_sequence_length")
    model = msgspec.structs.replace(
        MODEL,
        tasks=("text-to-video",),
        sizing=sizing,
        defaults=defaults,
        guidance=Guidance(off=2.0),
        uses=uses,
        max_frames=81,
    )
    costs = msgspec.structs.replace(profile().costs, decode=LinearCost(each=1.0, per_unit=0.001))
    curve = read_curve(kept(profile(model=model, costs=costs), tmp_path))
    kind = make_kind(GenerationRequest(prompt="x" * 8), curve)
    assert kind.lengths == (2 * 3 * 3 + 10, 2 * 3 * 3 + 6)  # 1 + 8 / 4 latent frames; the empty prompt is shorter
    assert kind.decode == pytest.approx(1.0 + 0.001 * 64 * 96 * 9)
    assert kind.request.steps == 3
    short = make_kind(GenerationRequest(prompt="x" * 8, num_frames=5, guidance_scale=2.0), curve)
    assert short.lengths == (2 * 3 * 2 + 10,)
    assert short.decode == pytest.approx(1.0 + 0.001 * 64 * 96 * 5)


def test_whole_calls_are_refused(tmp_path: Path) -> None:
    model = msgspec.structs.replace(MODEL, sizing=Sizing(whole_calls=True))
    with pytest.raises(OptionError, match=r"--curve: .* is of measured, which runs in whole pipeline calls"):
        read_curve(kept(profile(model=model), tmp_path))


def test_a_profile_without_its_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    fields = msgspec.to_builtins(profile())
    del fields["model"]
    path.write_bytes(msgspec.json.encode(fields))
    with pytest.raises(SetupError, match=r"--curve: .* is of an earlier version, .*; stepbatch profile writes it anew"):
        read_curve(str(path))


def test_what_tells_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(SetupError, match="doesn't say what a step costs"):
        read_curve(kept(profile(costs=Costs()), tmp_path))
    path.write_text('{"name": "x"}')
    with pytest.raises(SetupError, match=r"is no profile: .*costs"):
        read_curve(str(path))
    path.write_bytes(b"\xff\x00")
    with pytest.raises(SetupError, match="is no profile"):
        read_curve(str(path))
    with pytest.raises(OptionError, match=r"one of qwen-image-2512-h200-1024, .*'nothing' is neither"):
        read_curve("")
