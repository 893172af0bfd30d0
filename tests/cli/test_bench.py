import pytest

from stepbatch.__main__ import main


def test_the_usage_is_told_where_it_is_asked_for_or_nothing_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    asked = capsys.readouterr()
    assert asked.out.startswith("usage: stepbatch bench COMMAND") and not asked.err
    assert main(["bench"]) == 2
    said = capsys.readouterr()
    assert said.err == asked.out and not said.out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("srving", "there is no command srving; did you mean serving?"),
        ("--hlep", "there is no flag --hlep; did you mean --help?"),
    ],
)
def test_what_is_no_command_is_refused_in_a_line(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", argument]) == 2
    assert capsys.readouterr().err == f"stepbatch: error: {message}\n"
