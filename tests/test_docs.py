"""The documentation is held to its word: settings, errors, metrics, modules; and the README's blocks are run."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.pictures import file, image

from stepbatch.bench import options
from stepbatch.cli import bench, commands
from stepbatch.cli.parser import Parser, groups
from stepbatch.config import (
    EngineConfig,
    HttpConfig,
    ModelConfig,
    ServerConfig,
)
from stepbatch.demo import MODEL_PATH
from stepbatch.demo.burst import serving
from stepbatch.errors import REQUEST_ERRORS, RequestError
from stepbatch.server.schema import parse
from stepbatch.testing import FakeRunner

ROOT = Path(__file__).parent.parent
README, API, SETTINGS, ARCHITECTURE, BENCHMARKING = (
    (ROOT / path).read_text()
    for path in ("README.md", "docs/api.md", "docs/settings.md", "docs/architecture.md", "docs/benchmarking.md")
)
SERVING = (*groups(EngineConfig), *groups(ServerConfig))
BENCH = (*bench.SERVING, *bench.SIMULATE, options.SweepOptions, options.OfflineOptions)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("cls", "text"), [*((cls, SETTINGS) for cls in SERVING), *((cls, BENCHMARKING) for cls in BENCH)]
)
def test_every_setting_is_documented(cls: type, text: str) -> None:
    for field in dataclasses.fields(cls):
        default = "" if field.default in (None, "", ()) else f"`{field.default}`"
        default = default.lower() if isinstance(field.default, bool) else default
        if field.default == str(MODEL_PATH):
            default = "the bundled model"
        elif field.default is None and field.metadata["auto"]:
            default = "`auto`"
        row = f"| `--{field.name.replace('_', '-')}` | {default} | {field.metadata['help']} |"
        assert row in text, f"the documentation lacks this row:\n{row}"


def test_no_setting_is_documented_that_is_none() -> None:
    flags = set(re.findall(r"^\| `(--[a-z-]+)`", SETTINGS, re.MULTILINE))
    assert flags <= set(commands.serve_parser().flags)
    flags = set(re.findall(r"^\| `(--[a-z-]+)`", BENCHMARKING, re.MULTILINE))
    assert flags <= {
        *bench.sweep_parser().flags,
        *bench.offline_parser().flags,
        *bench.simulate_parser().flags,
    }


@pytest.mark.parametrize("code", sorted(set(REQUEST_ERRORS) - {RequestError.code}))
def test_every_error_is_documented(code: str) -> None:
    row = re.search(rf"^\|.*`{code}`.*$", API, re.MULTILINE)
    assert row, f"docs/api.md has no row for {code}"
    assert str(REQUEST_ERRORS[code].status) in row[0]


def test_every_module_is_in_the_architecture() -> None:
    source = ROOT / "src" / "stepbatch"
    modules = {str(path.relative_to(source)) for path in source.rglob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"^\| `([a-z_/]+\.py)` \|", ARCHITECTURE, re.MULTILINE)) == modules


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = next(block for block in blocks(README, "text") if block.startswith("src/"))
    source = ROOT / "src" / "stepbatch"
    for path in [*source.glob("*.py"), *source.glob("engine/*.py"), *(p for p in source.iterdir() if p.is_dir())]:
        if path.name not in ("__init__.py", "__pycache__"):
            assert re.search(rf"── {re.escape(path.name)}/?\s", tree), f"README's tree lacks {path.name}"


def test_links_lead_somewhere() -> None:
    for text, folder in (
        (README, ROOT),
        (API, ROOT / "docs"),
        (SETTINGS, ROOT / "docs"),
        (ARCHITECTURE, ROOT / "docs"),
        (BENCHMARKING, ROOT / "docs"),
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


def commands_in(text: str) -> list[list[str]]:
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ")
    pattern = r"^(?:stepbatch|make) (?:[^'\n]|'[^']*')*$|^curl (?:.*\n)*?.*'$"
    return [shlex.split(part) for part in re.findall(pattern, lines, re.MULTILINE)]


def check_make(arguments: list[str]) -> None:
    assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def check_stepbatch(arguments: list[str]) -> None:
    parsers: dict[str, Callable[[], Parser]] = {
        "serve": commands.serve_parser,
        "generate": commands.generate_parser,
        "edit": commands.edit_parser,
        "demo": commands.demo_parser,
        "bench serving": bench.serving_parser,
        "bench sweep": bench.sweep_parser,
        "bench compare": bench.compare_parser,
        "bench offline": bench.offline_parser,
        "bench simulate": bench.simulate_parser,
    }
    words = 2 if arguments[0] == "bench" else 1
    assert parsers[" ".join(arguments[:words])]().read(arguments[words:])


def check_curl(arguments: list[str]) -> None:
    assert arguments[0] == f"http://{HttpConfig().host}:{HttpConfig().port}/v1/images/generations"
    assert parse(json.loads(arguments[arguments.index("-d") + 1]), FakeRunner(ModelConfig()).info)


@pytest.mark.parametrize("command", [*commands_in(README), *commands_in(BENCHMARKING)], ids=lambda c: " ".join(c)[:40])
def test_commands_in_the_documentation(command: list[str]) -> None:
    {"make": check_make, "stepbatch": check_stepbatch, "curl": check_curl}[command[0]](command[1:])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(["--backend", "fake"], tmp_path_factory.mktemp("server") / "log") as server:
        yield f"http://{server.host}:{server.port}"


def test_the_client_block_runs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks(README, "python") if "OpenAI(" in block)
    exec(block.replace("http://127.0.0.1:30200", address), {})
    assert (tmp_path / "star.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to be in, with the files that docs/api.md speaks of."""
    monkeypatch.chdir(tmp_path)
    for name, mode in (("room.png", "RGB"), ("chair.jpg", "RGB"), ("window.png", "L")):
        (tmp_path / name).write_bytes(file(image(mode, (64, 48)), "PNG" if name.endswith("png") else "JPEG"))
    return tmp_path


def test_the_client_block_about_edits_runs(address: str, pictures: Path) -> None:
    block = next(block for block in blocks(API, "python") if "images.edit(" in block)
    exec(block.replace("http://127.0.0.1:30200", address), {})
    assert (pictures / "edited.png").read_bytes().startswith(b"\x89PNG")


def test_the_curl_command_about_edits_is_served(address: str, pictures: Path) -> None:
    block = next(block for block in blocks(API, "bash") if "/v1/images/edits" in block)
    program, url, *arguments = shlex.split(block.replace("\\\n", " "))
    assert (program, url) == ("curl", f"http://{HttpConfig().host}:{HttpConfig().port}/v1/images/edits")
    assert set(arguments[::2]) == {"-F"}
    fields = [argument.split("=", 1) for argument in arguments[1::2]]
    texts = {name: value for name, value in fields if not value.startswith("@")}
    files = [(name, (value, (pictures / value[1:]).read_bytes())) for name, value in fields if value.startswith("@")]
    answer = httpx.post(f"{address}/v1/images/edits", data=texts, files=files)
    assert answer.status_code == 200, answer.text


@pytest.mark.skipif(not MODEL_PATH.exists(), reason="the bundled model is not there")
def test_the_library_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks(README, "python") if "load_engine" in block)
    exec(block, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-0.png", "1-0.png", "1-1.png"]


def test_the_settings_block_runs() -> None:
    names: dict[str, object] = {}
    exec(blocks(SETTINGS, "python")[0], names)
    assert isinstance(names["config"], EngineConfig)
