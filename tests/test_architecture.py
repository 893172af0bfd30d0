"""The rules that keep the code the way it is."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "stepbatch"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = (SOURCE / "bench" / "offline.py", SOURCE / "bench" / "profile" / "run.py")  # these run an engine
LIGHT = (
    "stepbatch",
    "stepbatch.cli.commands",
    "stepbatch.cli.requests",
    "stepbatch.config",
    "stepbatch.demo.run",
    "stepbatch.engine.client",
    "stepbatch.engine.engine",
    "stepbatch.engine.messages",
    "stepbatch.engine.scheduler",
    "stepbatch.errors",
    "stepbatch.image_files",
    "stepbatch.model_info",
    "stepbatch.request",
    "stepbatch.testing",
    *(
        ".".join(("stepbatch", *path.relative_to(SOURCE).with_suffix("").parts))
        for path in sorted((SOURCE / "bench").rglob("*.py"))
        if path.stem != "__init__" and path not in HEAVY
    ),
    *(f"stepbatch.server.{path.stem}" for path in sorted((SOURCE / "server").glob("*.py")) if path.stem != "__init__"),
)


def name(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text())) for path in FILES]


@cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """Of all trees, those that any of the rules below is about."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ExceptHandler, ast.Call, ast.Import, ast.ImportFrom)
    return [(path, node) for path, tree in trees() for node in ast.walk(tree) if isinstance(node, kinds)]


def test_everything_around_the_engine_imports_without_torch() -> None:
    code = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module(module)
    heavy = {{"torch", "diffusers", "transformers"}} & set(sys.modules)
    assert not heavy, f"{{module}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_family_is_named_outside_the_models() -> None:
    family = re.compile(r"flux|qwen|z[-_]?image|wan ?2|stable.?diffusion", re.IGNORECASE)
    for path in FILES:
        if path.relative_to(SOURCE).parts[0] not in ("models", "demo"):
            assert not family.search(path.read_text()), name(path)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


def test_functions_are_short() -> None:
    for path, node in nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 50, f"{name(path)}: {node.name}"


def test_any_exception_is_caught_in_one_place_only() -> None:
    broad = []
    for path, node in nodes():
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"BaseException"}
            broad += [name(path)] * len(names & {"Exception", "BaseException"})
    assert broad == ["engine/engine.py"]


def test_attributes_are_not_probed() -> None:
    for path, node in nodes():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            probing = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) > 2)
            assert not probing, f"{name(path)}:{node.lineno}"


def test_nothing_is_pickled() -> None:
    for path, node in nodes():
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module not in ("pickle", "cloudpickle", "dill"), name(path)


def test_modules_and_public_classes_say_what_they_are() -> None:
    for path, tree in trees():
        assert not tree.body or ast.get_docstring(tree), name(path)
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name(path)}: {node.name}"


def test_what_is_exported_can_be_imported() -> None:
    import stepbatch

    for exported in stepbatch.__all__:
        if exported != "load_engine":  # imports torch; the README's block uses it
            assert getattr(stepbatch, exported)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stepbatch.nothing
