from pathlib import Path

import pytest
from tests.bench.simulate.simulated import MODEL

from stepbatch.bench.profile_file import ProfileFile, StepPoint, read_profile
from stepbatch.bench.results import save
from stepbatch.engine.cost import Costs, StepCost
from stepbatch.errors import SetupError


def test_what_is_written_is_read(tmp_path: Path) -> None:
    point = StepPoint(width=64, height=32, jobs=2, tokens=32, squares=512, seconds=0.1)
    cost = StepCost(base=0.1, factors=((5.0, 1.1), (6.0, 1.0)))
    profile = ProfileFile(name="a", costs=Costs(known=True, step=cost), model=MODEL, points=[point])
    save(profile, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"name": 1, "costs": {}}'])
def test_what_is_no_profile_is_told(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(SetupError, match="is no profile"):
        read_profile(tmp_path / "bad")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="can't read"):
        read_profile(tmp_path / "none")
