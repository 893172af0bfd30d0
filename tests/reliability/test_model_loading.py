"""Promise 19: of a checkpoint, numbers are read and nothing is run; what would be otherwise is refused by name."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipelines.checkpoints import write

from stepbatch.config import EngineConfig, ModelConfig
from stepbatch.engine.backends import load_runner
from stepbatch.errors import CheckpointError

from .record import Finding

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """What says that it was unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


class Tampered:
    """A checkpoint's copy, and what its code would leave behind if it ran."""

    def __init__(self, folder: Path, trace: Path) -> None:
        self.folder = folder
        self.trace = trace

    def code(self, path: str) -> None:
        """Python that could be anything that a loader looks for."""
        (self.folder / path).write_text(
            f"import os\nos.mkdir({str(self.trace)!r})\n"
            "class Evil:\n    from_pretrained = from_config = classmethod(lambda *a, **k: None)\n"
        )

    def pickled(self, path: str) -> None:
        (self.folder / path).write_bytes(pickle.dumps(Payload(self.trace)))

    def change(self, path: str, **values: Any) -> None:
        """Set keys of a JSON file, which is made if there is none."""
        file = self.folder / path
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | values))

    def weights(self, change: Callable[[bytes], bytes]) -> None:
        """Change a file of weights."""
        file = self.folder / "vae" / WEIGHTS
        file.write_bytes(change(file.read_bytes()))

    def cut(self, *parts: str) -> None:
        """Leave out the end of the first file of weights of the parts that there are."""
        for file in [next((self.folder / part).glob("*.safetensors"), None) for part in parts]:
            if file:
                file.write_bytes(file.read_bytes()[:-1000])

    def header(self, change: Callable[[dict[str, Any]], object], length: int | None = None) -> None:
        """Change what a file of weights says of itself."""

        def changed(data: bytes) -> bytes:
            (size,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + size])
            change(header)
            text = json.dumps(header).encode()
            return struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :]

        self.weights(changed)

    def without_weights(self) -> None:
        (self.folder / "vae" / WEIGHTS).unlink()

    def index(self, shard: str) -> None:
        """An index that names another file for the weights."""
        index = {"metadata": {}, "weight_map": {"decoder.conv_in.weight": shard}}
        (self.folder / "vae" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def tensor(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header[next(name for name in header if name != "__metadata__")]
    return found


def pickled_as(suffix: str) -> Callable[[Tampered], None]:
    def tamper(it: Tampered) -> None:
        it.without_weights()
        it.pickled(f"vae/diffusion_pytorch_model{suffix}")

    return tamper


def pickled_under_a_good_name(it: Tampered) -> None:
    it.without_weights()
    it.pickled(f"vae/{WEIGHTS}")


def pickled_shard(it: Tampered) -> None:
    it.index("shard.bin")
    it.pickled("vae/shard.bin")


def pickled_shard_of_the_text_encoder(it: Tampered) -> None:
    """With a file that isn't read beside it, so that there are weights."""
    (it.folder / "text_encoder" / "model.safetensors").rename(it.folder / "text_encoder" / "other.safetensors")
    it.change("text_encoder/model.safetensors.index.json", metadata={}, weight_map={"any": "shard.bin"})
    it.pickled("text_encoder/shard.bin")


def outside(it: Tampered) -> None:
    shutil.move(it.folder / "vae" / WEIGHTS, it.folder / "x.safetensors")
    (it.folder / "vae" / "other.safetensors").write_bytes(b"")
    it.index("../x.safetensors")


def elsewhere(it: Tampered) -> None:
    it.index(str(it.folder / "vae" / WEIGHTS))


def a_pipeline_of_its_own(it: Tampered) -> None:
    it.code("pipeline.py")
    it.change("model_index.json", _class_name=["pipeline", "Evil"])


def a_pipeline_that_is_found_by_its_name(it: Tampered) -> None:
    it.code("None.py")  # what some loaders look for when no pipeline is asked for


def a_part_of_its_own(part: str) -> Callable[[Tampered], None]:
    def tamper(it: Tampered) -> None:
        it.code(f"{part}/evil.py")
        it.change("model_index.json", **{part: ["evil", "Evil"]})

    return tamper


def a_pipeline_as_a_part(library: str, name: str, part: str = "tokenizer_2") -> Callable[[Tampered], None]:
    """Whose own part has pickled weights, which diffusers would read, as it passes ``use_safetensors`` on to models."""

    def tamper(it: Tampered) -> None:
        shutil.copytree(it.folder / "vae", it.folder / part / "vae")
        it.change(f"{part}/model_index.json", _class_name=name, vae=["diffusers", "AutoencoderKL"])
        (it.folder / part / "vae" / WEIGHTS).unlink()
        it.pickled(f"{part}/vae/diffusion_pytorch_model.bin")
        it.change("model_index.json", **{part: [library, name]})

    return tamper


def a_pipeline_by_another_name(it: Tampered) -> None:
    a_pipeline_as_a_part("diffusers", "DiffusionPipeline")(it)
    it.change("model_index.json", tokenizer_2=["diffusers", "AutoencoderKL"])


def weights_further_in(it: Tampered) -> None:
    (it.folder / "tokenizer" / "more").mkdir()
    it.pickled("tokenizer/more/model.bin")


def code_further_in(it: Tampered) -> None:
    (it.folder / "vae" / "more").mkdir()
    it.code("vae/more/diffusers.py")


def onnx(it: Tampered) -> None:
    (it.folder / "vae" / "model.onnx").write_bytes(b"x")
    it.change("model_index.json", vae=["diffusers", "OnnxRuntimeModel"])


def a_part_that_shadows_a_library(it: Tampered) -> None:
    it.code("vae/diffusers.py")
    it.change("model_index.json", vae=["diffusers", "Evil"])


def named(file: str, **values: Any) -> Callable[[Tampered], None]:
    return lambda it: it.change(file, **values)


def adapter_weights(it: Tampered) -> None:
    it.change("text_encoder/config.json", transformers_weights="adapter_model.bin")
    it.pickled("text_encoder/adapter_model.bin")


def remote_class(it: Tampered) -> None:
    it.code("text_encoder/modeling.py")
    it.change("text_encoder/config.json", auto_map={"AutoModel": "modeling.Evil"})
    it.change("model_index.json", text_encoder=["transformers", "AutoModel"])


CASES: dict[str, tuple[Callable[[Tampered], None], str]] = {  # and what the refusal names
    **{f"pickled {suffix}": (pickled_as(suffix), "vae holds pickled weights") for suffix in
       (".bin", ".ckpt", ".pt", ".pth", ".pkl")},
    "pickled, called safetensors": (pickled_under_a_good_name, WEIGHTS),
    "pickled shard": (pickled_shard, "shard.bin"),
    "pickled shard, text encoder": (pickled_shard_of_the_text_encoder, "shard.bin"),
    "a shard outside": (outside, "../x.safetensors"),
    "a shard by its whole path": (elsewhere, WEIGHTS),
    "empty": (lambda it: it.weights(lambda data: b""), WEIGHTS),
    "truncated": (lambda it: it.weights(lambda data: data[:-1000]), WEIGHTS),
    "truncated, transformer": (lambda it: it.cut("transformer", "unet"), WEIGHTS),
    "truncated, text encoder": (lambda it: it.cut("text_encoder"), "text_encoder/model.safetensors"),
    "truncated in the header": (lambda it: it.weights(lambda data: data[:100]), WEIGHTS),
    "more than the header says": (lambda it: it.weights(lambda data: data + bytes(64)), WEIGHTS),
    "a header without end": (lambda it: it.header(lambda header: None, length=2**63), WEIGHTS),
    "a header that is no JSON": (lambda it: it.weights(lambda data: data[:8] + b"x" + data[9:]), WEIGHTS),
    "sizes that disagree": (lambda it: it.header(lambda header: tensor(header).update(shape=[2**40])), WEIGHTS),
    "sizes beyond all numbers": (lambda it: it.header(lambda header: tensor(header).update(shape=[2**63, 4])), WEIGHTS),
    "offsets beyond the file": (
        lambda it: it.header(lambda header: tensor(header).update(data_offsets=[0, 2**40])), WEIGHTS),
    "offsets the wrong way": (
        lambda it: it.header(lambda header: tensor(header).update(data_offsets=[64, 0])), WEIGHTS),
    "a type that there isn't": (lambda it: it.header(lambda header: tensor(header).update(dtype="O")), WEIGHTS),
    "a pipeline of its own": (a_pipeline_of_its_own, "model_index.json"),
    "a pipeline by its name": (a_pipeline_that_is_found_by_its_name, "None.py"),
    "a pipeline beside it": (lambda it: it.code("pipeline.py"), "pipeline.py"),
    "no class of diffusers": (named("model_index.json", _class_name="Evil"), "Evil"),
    "no pipeline": (named("model_index.json", _class_name="AutoencoderKL"), "AutoencoderKL"),
    "a scheduler of its own": (a_part_of_its_own("scheduler"), "scheduler"),
    "a vae of its own": (a_part_of_its_own("vae"), "vae"),
    "a part like a library": (a_part_that_shadows_a_library, "vae/diffusers.py"),
    "a part of another library": (named("model_index.json", vae=["subprocess", "Popen"]), "subprocess"),
    "a part of a module": (named("model_index.json", vae=["diffusers.utils", "x"]), "diffusers.utils"),
    "a part elsewhere": (named("model_index.json", **{"../other": ["diffusers", "AutoencoderKL"]}), "../other"),
    "a pipeline as a part": (a_pipeline_as_a_part("diffusers", "DiffusionPipeline"), "tokenizer_2"),
    "a pipeline as a part, of a module": (
        a_pipeline_as_a_part("stable_diffusion", "StableDiffusionPipeline"), "tokenizer_2"),
    "a pipeline as a part, of a prefix": (
        a_pipeline_as_a_part("diffusers", "FlashPackDiffusionPipeline"), "tokenizer_2"),
    "a pipeline by another name": (a_pipeline_by_another_name, "tokenizer_2/model_index.json"),
    "pickled, further in": (weights_further_in, "tokenizer holds pickled weights"),
    "code, further in": (code_further_in, "vae/more/diffusers.py"),
    "ONNX": (onnx, "OnnxRuntimeModel"),
    "a remote class": (remote_class, "text_encoder/modeling.py"),
    "a remote class, of the text encoder": (
        named("text_encoder/config.json", auto_map={"AutoModel": "x--y.Evil"}), "text_encoder/config.json"),
    "a remote class, of the tokenizer": (
        named("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Evil"]}), "tokenizer_config.json"),
    "a remote class, further in": (
        named("text_encoder/config.json", text_config={"auto_map": {"AutoConfig": "x.Evil"}}), "auto_map"),
    "code of a repository": (
        named("text_encoder/config.json", attn_implementation="somebody/kernel"), "attn_implementation"),
    "weights by another name": (adapter_weights, "transformers_weights"),
    "an adapter": (named("text_encoder/adapter_config.json", base_model_name_or_path="x/y"), "adapter_config.json"),
    "an index without end": (
        lambda it: (it.folder / "model_index.json").write_text("[" * 200_000), "model_index.json"),
    "a config without end": (
        lambda it: (it.folder / "vae" / "config.json").write_text('{"a":' * 200_000), "config.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(z_image_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what runs them."""
    return {
        "native": z_image_path,
        "diffusers": write("stable-diffusion", tmp_path_factory.mktemp("checkpoint") / "stable-diffusion"),
    }


def load(path: Path, backend: str) -> None:
    load_runner(EngineConfig(model=ModelConfig(model_path=str(path), backend=backend)))  # type: ignore[arg-type]


def test_what_is_not_numbers_alone_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, note: Callable[[Finding], None]
) -> None:
    trace = tmp_path / "trace"
    for backend, path in checkpoints.items():
        for name, (tamper, named) in CASES.items():
            folder = tmp_path / backend / "copy"
            shutil.copytree(path, folder)
            tamper(Tampered(folder, trace))
            with pytest.raises(CheckpointError) as caught:
                load(folder, "auto" if backend == "native" else backend)
            message = str(caught.value)
            assert not trace.exists(), f"{backend}, {name}: it ran"
            assert named in message, f"{backend}, {name}: {message}"
            assert "\n" not in message, f"{backend}, {name}: {message}"
            shutil.rmtree(folder)
    faults = "pickled, truncated, headers that lie, files outside, code and classes of its own, adapters"
    figure = f"{2 * len(CASES)} of {2 * len(CASES)} refused, with the file or part named; nothing of them ran"
    note(Finding(19, "model loading", f"{2 * len(CASES)} checkpoints", faults, figure))


@pytest.mark.parametrize("backend", ["native", "diffusers"])
def test_what_lies_elsewhere_behind_links_is_loaded(checkpoints: dict[str, Path], tmp_path: Path, backend: str) -> None:
    """As it does in Hugging Face's cache; and pickled weights that nobody reads do no harm."""
    folder = tmp_path / "linked"
    for file in checkpoints[backend].rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(checkpoints[backend])
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    Tampered(folder, tmp_path / "trace").pickled("vae/diffusion_pytorch_model.bin")
    load(folder, backend)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".safetensors"])
def test_a_file_is_no_checkpoint(tmp_path: Path, suffix: str) -> None:
    it = Tampered(tmp_path, tmp_path / "trace")
    it.pickled(f"model{suffix}")
    with pytest.raises(CheckpointError, match=f"model{suffix} is (pickled weights|a file)"):
        load(tmp_path / f"model{suffix}", "auto")
    assert not it.trace.exists()


def test_what_runs_would_be_seen(tmp_path: Path) -> None:
    """Else the other tests would prove nothing."""
    it = Tampered(tmp_path, tmp_path / "trace")
    it.pickled("x.bin")
    pickle.loads((tmp_path / "x.bin").read_bytes())
    it.trace.rmdir()
    it.code("x.py")
    exec((tmp_path / "x.py").read_text(), {})
    assert it.trace.exists()
