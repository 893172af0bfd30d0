"""The settings: small groups, checked values, frozen."""

import dataclasses
import math
import re

import pytest

from stepbatch.cli.parser import groups
from stepbatch.config import AdmissionConfig, EngineConfig, HttpConfig, ModelConfig, ServerConfig
from stepbatch.demo import MODEL_PATH
from stepbatch.errors import OptionError

GROUPS = (*groups(EngineConfig), *groups(ServerConfig))


@pytest.mark.parametrize("cls", [*GROUPS, EngineConfig, ServerConfig])
def test_groups_are_small_and_frozen(cls: type) -> None:
    assert len(dataclasses.fields(cls)) <= 15
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), next((field.name for field in dataclasses.fields(cls)), "any"), None)


def test_no_name_is_in_two_groups() -> None:
    names = [field.name for cls in GROUPS for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


def test_every_setting_is_explained() -> None:
    for cls in GROUPS:
        assert cls.__doc__
        assert all(field.metadata["help"] for field in dataclasses.fields(cls))


def test_without_a_path_it_is_the_bundled_model() -> None:
    assert EngineConfig().model.model_path == str(MODEL_PATH)


@pytest.mark.parametrize("value", [-1, 65536, math.nan, math.inf])
def test_values_out_of_range(value: float) -> None:
    with pytest.raises(OptionError, match=re.escape(f"--port must be from 0 to 65535, not {value}")):
        HttpConfig(port=value)  # type: ignore[arg-type]


def test_values_with_no_upper_bound_are_finite() -> None:
    with pytest.raises(OptionError, match="--drain-seconds must be at least 0, not inf"):
        HttpConfig(drain_seconds=math.inf)


def test_a_queue_may_be_without_bound_but_not_less_than_nothing() -> None:
    assert AdmissionConfig(max_queue_seconds=math.inf).max_queue_seconds == math.inf
    assert AdmissionConfig().max_queue_seconds is None
    with pytest.raises(OptionError, match="--max-queue-seconds must be at least 0, not -1"):
        AdmissionConfig(max_queue_seconds=-1)


def test_choices_are_checked_with_a_suggestion() -> None:
    with pytest.raises(OptionError, match=r"^--dtype must be one of .*, not 'bfloat'; did you mean bfloat16\?$"):
        ModelConfig(dtype="bfloat")  # type: ignore[arg-type]
