"""Examples keep to what was published; profiles tell of tokens what they know."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from stepbatch.bench.profile_file import ProfileFile, StepPoint
from stepbatch.bench.simulate.curves import of_profile, read_curve, shipped
from stepbatch.engine.cost import Costs, StepCost
from stepbatch.errors import OptionError, SetupError

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
    lengths = curve.lengths(curve.width, curve.height, 1, None)
    assert len(lengths) == 2
    tokens, squares = sum(lengths), sum(length**2 for length in lengths)
    alone = curve.costs.step.seconds(tokens, squares)
    for jobs, (seconds, ratio) in PUBLISHED[name].items():
        predicted = curve.costs.step.seconds(jobs * tokens, jobs * squares)
        assert predicted == pytest.approx(seconds, rel=1e-4), jobs
        assert jobs * alone / predicted == pytest.approx(ratio, rel=0.01), jobs


def test_guidance_takes_a_second_sequence() -> None:
    curve = read_curve("qwen-image-2512-h200-512")
    assert curve.lengths(512, 512, 1, 4.0) == (1024 + 32,) * 2
    assert curve.lengths(512, 256, 1, 1.0) == (512 + 32,)


def profile(**fields: object) -> ProfileFile:
    points = [  # two sequences a job, of a token for 16 x 16 pixels and 20 of text
        StepPoint(width=side, height=side, jobs=jobs, tokens=2 * jobs * n, squares=2 * jobs * n * n, seconds=1.0)
        for side, n in ((128, 64 + 20), (256, 256 + 20))
        for jobs in (1, 4)
    ]
    costs = Costs(known=True, step=StepCost(base=0.1, per_token=0.01))
    return ProfileFile(**{"name": "measured", "costs": costs, "device": "cpu", "points": points, **fields})  # type: ignore[arg-type]


def test_a_profile_tells_how_many_tokens_there_are(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(profile()))
    curve = read_curve(str(path))
    assert curve.name == "measured" and curve.guided
    assert curve.lengths(256, 256, 1, None) == (276, 276)
    assert curve.lengths(512, 256, 1, None) == (532, 532)
    assert curve.lengths(128, 128, 1, 0.0) == (84,)


def test_what_tells_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(SetupError, match="has no points"):
        of_profile(profile(points=[]))
    path.write_bytes(msgspec.json.encode(profile(costs=Costs())))
    with pytest.raises(SetupError, match="doesn't say what a step costs"):
        read_curve(str(path))
    path.write_text('{"name": "x"}')
    with pytest.raises(SetupError, match=r"is no profile: .*costs"):
        read_curve(str(path))
    path.write_bytes(b"\xff\x00")
    with pytest.raises(SetupError, match="is no profile"):
        read_curve(str(path))
    with pytest.raises(OptionError, match=r"one of qwen-image-2512-h200-1024, .*'nothing' is neither"):
        read_curve("")
