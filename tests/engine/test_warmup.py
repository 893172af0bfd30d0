from dataclasses import replace
from pathlib import Path

import pytest

from stepbatch.config import EngineConfig, ModelConfig, WarmupConfig
from stepbatch.engine.cost import UNKNOWN
from stepbatch.engine.local import load_engine
from stepbatch.engine.warmup import measure, remembered, warm_up
from stepbatch.errors import OptionError
from stepbatch.testing import FakeRunner, WholeCallRunner


def config(folder: Path | str, warmup: bool = True, **model: object) -> EngineConfig:
    made = ModelConfig(backend="fake", **{"fake_step_ms": 1.0, **model})  # type: ignore[arg-type]
    return EngineConfig(model=made, warmup=WarmupConfig(warmup=warmup, profile_cache=str(folder)))


def runner(settings: EngineConfig) -> FakeRunner:
    return FakeRunner(settings.model)


def test_what_was_measured_is_known_at_the_next_start(tmp_path: Path) -> None:
    settings = config(tmp_path)
    first, second = runner(settings), runner(settings)
    costs = warm_up(first, settings)
    assert costs.known
    assert first.steps
    assert warm_up(second, settings) == costs
    assert not second.steps
    assert load_engine(settings).scheduler.costs == costs


def test_a_fake_model_of_slow_steps_has_the_time_that_a_few_of_them_take(tmp_path: Path) -> None:
    settings = config(tmp_path, fake_step_ms=50.0)
    assert warm_up(runner(settings), settings).known


def test_another_model_is_measured_by_itself(tmp_path: Path) -> None:
    one, other = config(tmp_path), config(tmp_path, fake_step_ms=2.0)
    warm_up(runner(one), one)
    assert remembered(runner(other), other) == UNKNOWN
    warm_up(runner(other), other)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_can_not_be_read_is_written_anew(tmp_path: Path) -> None:
    settings = config(tmp_path)
    costs = warm_up(runner(settings), settings)
    (file,) = tmp_path.iterdir()
    for bad in (b"", b"{", b"[]", b"\xff\xfe", b'{"depends": {}, "measured": {"points": []}}'):
        file.write_bytes(bad)
        assert remembered(runner(settings), settings) == UNKNOWN
        warm_up(runner(settings), settings)
        assert remembered(runner(settings), settings).known
    assert list(tmp_path.iterdir()) == [file]  # nothing unfinished is left
    assert costs.known


def test_a_folder_that_can_not_be_written_is_no_hindrance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    settings = config(tmp_path / "file")
    assert warm_up(runner(settings), settings).known
    assert "can't be kept" in caplog.text


def test_nothing_is_kept_where_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = config("off")
    assert warm_up(runner(settings), settings).known
    assert not list(tmp_path.iterdir())


def test_it_is_kept_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = config("")
    measure(runner(settings), settings)
    assert len(list((tmp_path / "stepbatch" / "profiles").iterdir())) == 1


def test_nothing_is_measured_that_is_not_asked_for(tmp_path: Path) -> None:
    settings = config(tmp_path, warmup=False)
    idle = runner(settings)
    assert warm_up(idle, settings) == UNKNOWN
    assert load_engine(settings).scheduler.costs == UNKNOWN
    assert not idle.steps


def test_whole_calls_are_tried_at_sizes_that_are_named(tmp_path: Path) -> None:
    settings = config(tmp_path)
    calls = WholeCallRunner(settings.model)
    assert warm_up(calls, settings) == UNKNOWN
    assert not calls.calls
    named = replace(settings, warmup=replace(settings.warmup, warmup_sizes=("64x64", "128x128")))
    assert warm_up(calls, named).known
    assert {len(jobs) for jobs in calls.calls} > {1, 2}
    assert remembered(calls, named).known


def test_sizes_are_width_and_height() -> None:
    assert WarmupConfig(warmup_sizes=("64x32", "128x128")).sizes == [(64, 32), (128, 128)]
    with pytest.raises(OptionError, match="--warmup-sizes"):
        WarmupConfig(warmup_sizes=("64",))
