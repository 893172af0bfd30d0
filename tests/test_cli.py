"""The command line: what it takes, what it refuses, and that it starts at once."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.pictures import file, image

from stepbatch import __version__
from stepbatch.__main__ import main
from stepbatch.config import EngineConfig, ServerConfig
from stepbatch.errors import CheckpointError
from stepbatch.server import run

KNOWN = (
    "--model-path DIR --backend auto --num-gpus 1 --host 127.0.0.1 --port 30200 --log-level info "
    "--dynamic-batch-max-size 4 --dynamic-batch-delay-ms 5"
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServerConfig, EngineConfig]]:
    """What ``serve`` would have served."""
    calls: list[tuple[ServerConfig, EngineConfig]] = []
    monkeypatch.setattr(run, "run_server", lambda server, engine: calls.append((server, engine)) or 0)
    return calls


def test_serve_takes_the_flags_that_people_know(served: list[tuple[ServerConfig, EngineConfig]]) -> None:
    assert main(["serve", *KNOWN.split()]) == 0
    server, engine = served[0]
    assert (server.http.host, server.http.port, server.log.log_level) == ("127.0.0.1", 30200, "info")
    assert (engine.model.model_path, engine.model.backend, engine.model.num_gpus) == ("DIR", "auto", 1)
    assert engine.batching.dynamic_batch_max_size == 4
    assert engine.batching.dynamic_batch_delay_ms == 5.0


@pytest.mark.parametrize(("text", "seconds"), [("auto", None), ("2.5", 2.5), ("inf", math.inf)])
def test_a_number_may_be_auto(
    served: list[tuple[ServerConfig, EngineConfig]], text: str, seconds: float | None
) -> None:
    assert main(["serve", "--max-queue-seconds", text]) == 0
    assert served[0][1].admission.max_queue_seconds == seconds


def test_serve_without_flags_has_the_defaults(
    served: list[tuple[ServerConfig, EngineConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve"]) == 0
    assert served == [(ServerConfig(), EngineConfig())]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srve"], "there is no command srve; did you mean serve?"),
        (["--verion"], "there is no flag --verion; did you mean --version?"),
        (
            ["serve", "--dynamic-batch-size", "4"],
            "has no flag --dynamic-batch-size; did you mean --dynamic-batch-max-size?",
        ),
        (["serve", "--prot=3"], "stepbatch serve has no flag --prot; did you mean --port?"),
        (["serve", "--model", "x"], "stepbatch serve has no flag --model; did you mean --model-path?"),
        (["serve", "--enable-torch-compile"], "stepbatch serve has no flag --enable-torch-compile\n"),
        (["serve", "x"], "stepbatch serve has no argument x"),
        (["serve", "--port"], "--port: expected one argument"),
        (["serve", "--port", "x"], "--port: invalid int value: 'x'"),
        (["serve", "--port", "70000"], "--port must be from 0 to 65535, not 70000"),
        (["serve", "--num-gpus", "2"], "--num-gpus must be 1, not 2"),
        (["serve", "--backend", "natve"], "not 'natve'; did you mean native?"),
        (["generate"], "stepbatch generate needs prompts, or a file of requests with --input"),
        (["generate", "x", "--input", "/nowhere"], "--input: there is no file /nowhere"),
        (["generate", "x", "--size", "12"], "--size: size must be"),
        (["generate", "x", "--size", "0x16"], "--size: width must be"),
        (["generate", "x", "--n", "11"], "--n: n must be from 1 to 10"),
        (["generate", "x", "--guidance-scale", "nan"], "--guidance-scale: guidance_scale must be a finite number"),
        (["generate", "x", "--output-format", "jpg"], "must be one of png, jpeg, webp; did you mean jpeg?"),
        (["generate", " "], "prompt must not be empty"),
        (["demo", "--ouput", "x"], "did you mean --output?"),
        (["edt"], "there is no command edt; did you mean edit?"),
        (["edit"], "stepbatch edit needs image files, and then a prompt"),
        (["edit", "a.png"], "stepbatch edit needs image files, and then a prompt"),
        (["edit", "b.png", "a prompt"], "error: there is no file b.png\n"),
        (["edit", "a.png", "b.png", "a prompt"], "error: there is no file b.png\n"),
        (["edit", ".", "a prompt"], "error: can't read .: Is a directory\n"),
        (["edit", "text", "a prompt"], "error: text is not a PNG, JPEG or WebP file\n"),
        (["edit", "cut.png", "a prompt"], "error: cut.png can't be read: it is damaged"),
        (["edit", "a.png", "a prompt", "--mask", "b.png"], "error: there is no file b.png\n"),
        (["edit", "a.png", "a prompt", "--mask", "text"], "error: text is not a PNG"),
        (["edit", "a.png", "a prompt", "--mask", "large.png"], "--mask: mask must be 12x8 like the image, not 16x16"),
        (["edit", "a.png", "a prompt", "--strength", "2"], "--strength: strength must be a finite number from 0 to 1"),
        (["edit", "a.png", "a prompt", "--strength", "x"], "--strength: invalid float value: 'x'"),
        (["edit", *["a.png"] * 17, "a prompt"], "error: there must be at most 16 images\n"),
        (["edit", "a.png", " "], "prompt must not be empty"),
        (["edit", "a.png", "a prompt", "--input", "x"], "stepbatch edit has no flag --input"),
    ],
)
def test_refused_in_one_line(
    arguments: Sequence[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(file(image()))
    (tmp_path / "cut.png").write_bytes(file(image())[:100])
    (tmp_path / "large.png").write_bytes(file(image(size=(16, 16))))
    (tmp_path / "text").write_text("https://example.com/a.png")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("stepbatch: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_what_the_server_refuses_at_start_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(server: ServerConfig, engine: EngineConfig) -> int:
        raise CheckpointError("there is no folder x\nanywhere")

    monkeypatch.setattr(run, "run_server", refuse)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == "stepbatch: error: there is no folder x anywhere\n"


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(server: ServerConfig, engine: EngineConfig) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_server", interrupt)
    assert main(["serve"]) == 130


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stepbatch {__version__}\n"
    assert main(["--help"]) == 0
    assert "serve" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_help_of_a_command_names_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["serve", "--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    for part in ("Which model, where, and in what precision:", "--port INT", "(default: the bundled model)"):
        assert part in text


def test_help_and_refusals_import_no_torch() -> None:
    code = (
        "import sys; from stepbatch.__main__ import main; main(['--version']); main(['serve', '--prot']);"
        "main(['generate', 'x', '--n', '0']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
