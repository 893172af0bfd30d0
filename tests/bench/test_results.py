from pathlib import Path

import msgspec
import pytest
from tests.bench.made import made

from stepbatch.bench.results import check_writable, load, make_folder, save
from stepbatch.errors import SetupError


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = made(requests=12, slo=2.0, failing=["failed", "timeout"])
    save(result, tmp_path / "new" / "run.json")
    assert load(tmp_path / "new" / "run.json") == result


def test_what_was_not_told_stays_untold(tmp_path: Path) -> None:
    result = made(requests=3, metrics=False)
    result.records[0].status = None
    save(result, tmp_path / "run.json")
    again = load(tmp_path / "run.json")
    assert again.summary.jobs_per_step is None and again.summary.goodput_qps is None
    assert again.work.request_rate is None and again.records[0].status is None


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    save(made(requests=2), tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    assert text.endswith("}\n") and '\n "summary": {\n' in text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no result of stepbatch bench serving"),
        (b"{}", "missing required field"),
        (b"[1, 2]", "is no result of stepbatch bench serving"),
        (b'{"created": "\xff"}', "is no result of stepbatch bench serving"),
        (b'{"kind": "sweep"}', "is a sweep"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=why) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"can't read .*none\.json: No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(SetupError, match=r"can't read .*: Is a directory"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"can't write .*run\.json"):
        save(made(requests=1), tmp_path / "file" / "run.json")


def test_a_file_that_could_not_be_written_is_told_before() -> None:
    with pytest.raises(SetupError, match=r"can't write /dev/null/run\.json: "):
        check_writable(Path("/dev/null/run.json"))
    with pytest.raises(SetupError, match="can't write /dev: it is a folder"):
        check_writable(Path("/dev"))


def test_a_file_that_can_be_written_is_not_touched(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "run.json")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_a_folder_is_made_where_it_is_not_there(tmp_path: Path) -> None:
    assert make_folder("") is None
    for _ in range(2):
        folder = make_folder(str(tmp_path / "new" / "folder"))
        assert folder is not None and folder.is_dir()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SetupError, match=f"--save-outputs: {file} can't be made"):
        make_folder(str(file))


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save(made(requests=1), path)
    kept = msgspec.json.decode(path.read_bytes())
    kept["records"][0]["ended"] = "later"
    path.write_bytes(msgspec.json.encode(kept))
    with pytest.raises(SetupError, match=r"records.*ended"):
        load(path)
