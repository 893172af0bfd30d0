import msgspec
import pytest
from tests.bench.simulate.simulated import MODEL

from stepbatch.bench.profile.knees import errors, knees
from stepbatch.bench.profile.report import duration, render
from stepbatch.bench.profile_file import ProfileFile, StepPoint
from stepbatch.engine.cost import Costs, LinearCost, StepCost

# a 12B model: small pictures share reading the weights, large ones share nothing
MACHINE = StepCost(host=0.05, base=0.0, per_token=2e-4, per_square=1e-10)


def profile(cost: StepCost = MACHINE) -> ProfileFile:
    points = [
        StepPoint(
            width=side,
            height=side,
            jobs=jobs,
            tokens=jobs * tokens,
            squares=jobs * tokens * tokens,
            seconds=cost.seconds(jobs * tokens, jobs * tokens * tokens),
        )
        for side, tokens in ((1024, 4096), (64, 16), (256, 256))
        for jobs in (2, 1)
    ]
    costs = Costs(known=True, step=cost, prompt=LinearCost(each=0.01), decode=LinearCost(each=0.1, per_unit=1e-6))
    return ProfileFile(name="flux", costs=costs, model=MODEL, device="H200", dtype="bfloat16", points=points)


def test_each_size_has_its_knee() -> None:
    found = {knee.size: knee.width for knee in knees(profile())}
    assert list(found) == ["64x64", "256x256", "1024x1024"]
    assert found["64x64"] > 8
    assert found["1024x1024"] == 1


def test_errors_are_relative_to_what_was_measured() -> None:
    half = StepCost(per_token=1e-4)
    whole = [StepPoint(width=1, height=1, jobs=1, tokens=1000, squares=10**6, seconds=0.2)]
    assert errors(half, whole) == [pytest.approx(-0.5)]


def test_it_says_what_the_curve_means() -> None:
    said = render(profile())
    assert "the curve is off by 0.0% at the median, by 0.0% at the most" in said
    assert "50 ms  at least: the host launches it no faster" in said
    assert "At 1024x1024 a step pays 1 job" in said
    assert "At 64x64 a step pays up to " in said
    assert "Decoding a picture takes 100 ms and 1.05 s a megapixel." in said
    assert "times the pictures a second" in said
    assert "bent" not in said
    assert "beside steps" not in said
    assert max(map(len, said.splitlines())) <= 120


def test_it_says_where_outputs_are_decoded_beside_steps() -> None:
    one = profile()
    assert "beside steps" in render(msgspec.structs.replace(one, costs=msgspec.structs.replace(one.costs, beside=True)))


def test_videos_are_called_videos() -> None:
    model = msgspec.structs.replace(
        MODEL, tasks=("text-to-video",), defaults=msgspec.structs.replace(MODEL.defaults, num_frames=81)
    )
    said = render(msgspec.structs.replace(profile(), model=model))
    assert "6 steps of videos of 81 frames" in said
    assert "Decoding a video takes" in said and "picture" not in said


def test_times_have_the_unit_that_suits_them() -> None:
    said = [duration(seconds) for seconds in (0.0, 2.5e-8, 3.14159e-5, 0.0123, 0.99999, 59.4, 1234.5)]
    assert said == ["0 s", "25 ns", "31.4 µs", "12.3 ms", "1 s", "59.4 s", "1234 s"]
