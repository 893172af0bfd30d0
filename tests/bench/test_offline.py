import json
from pathlib import Path

import pytest
from PIL import Image

from stepbatch.bench.hardware import count_operations
from stepbatch.bench.offline import measure, operations_of, run_offline, to_request
from stepbatch.bench.options import DatasetOptions, OfflineOptions, ReportOptions, RequestOptions
from stepbatch.bench.workload.work import WorkItem
from stepbatch.config import BatchingConfig, EngineConfig, ModelConfig
from stepbatch.engine.runner import TorchRunner
from stepbatch.errors import OptionError, SetupError
from stepbatch.request import GenerationRequest, Job

FAKE = EngineConfig(
    model=ModelConfig(backend="fake", fake_step_ms=1.0), batching=BatchingConfig(dynamic_batch_max_size=4)
)


def run(
    engine: EngineConfig,
    dataset: DatasetOptions,
    wanted: RequestOptions,
    folder: Path,
    offline: OfflineOptions | None = None,
    pictures: bool = False,
) -> tuple[int, dict]:  # type: ignore[type-arg]
    report = ReportOptions(
        disable_tqdm=True,
        output_file=str(folder / "new" / "result.json"),
        save_outputs=str(folder / "pictures") if pictures else "",
    )
    status = run_offline(engine, dataset, wanted, offline or OfflineOptions(), report)
    return status, json.loads((folder / "new" / "result.json").read_text())


def test_a_model_is_measured(z_image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = EngineConfig(
        model=ModelConfig(model_path=str(z_image_path)), batching=BatchingConfig(dynamic_batch_max_size=2)
    )
    wanted = RequestOptions(width=64, height=32, num_inference_steps=3, guidance_scale=0.0, n=2)
    status, kept = run(engine, DatasetOptions(num_prompts=3, seed=5), wanted, tmp_path, pictures=True)
    figures = kept["figures"]
    assert status == 0 and kept["errors"] == {}
    assert (figures["requests"], figures["images"], figures["failed_images"]) == (3, 6, 0)
    assert figures["steps"] * figures["jobs_per_step"] == pytest.approx(6 * 3)
    assert figures["images_per_second"] == pytest.approx(6 / figures["duration"])
    assert figures["job_steps_per_second"] == pytest.approx(18 / figures["duration"])
    assert figures["megapixels_per_second"] == pytest.approx(6 * 64 * 32 / 1e6 / figures["duration"])
    stages = [figures[f"{stage}_seconds"] for stage in ("encode", "denoise", "decode", "other")]
    assert sum(stages) == pytest.approx(figures["duration"]) and min(stages) > 0
    assert figures["step_ms_mean"] * figures["steps"] == pytest.approx(1000 * figures["denoise_seconds"])
    assert figures["step_ms_median"] <= figures["step_ms_p99"]
    assert figures["tflops"] == pytest.approx(6 * figures["operations_per_image"] / figures["denoise_seconds"] / 1e12)
    assert figures["matrix_share"] == pytest.approx(figures["tflops"] / figures["matrix_tflops"])
    assert 0 < figures["matrix_share"] < 1
    assert kept["model"]["id"] == "tiny-z-image" and kept["options"]["dynamic_batch_max_size"] == 2
    assert kept["environment"]["torch"] and kept["work"]["all"]
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == ["0-0.png", "0-1.png", "1-0.png", "1-1.png", "2-0.png", "2-1.png"]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (64, 32)
    table = capsys.readouterr().out
    assert "Image throughput (images/s):" in table and "Share of the matrix rate:" in table


def hand_counted(picture: int, prompt: int) -> int:
    """Operations of a step of ``tiny.z_image`` for so many tokens, of which none is a pad."""
    dim, hidden, channels, blocks = 48, 128, 16, 4  # of the blocks, two see the picture alone
    of_row = 2 * (dim * 3 * dim + dim * dim + dim * 2 * hidden + hidden * dim)
    rows = 2 * picture + 2 * (picture + prompt)
    attention = 4 * dim * (2 * picture**2 + 2 * (picture + prompt) ** 2)
    modulation = 2 * (256 * 1024 + 1024 * dim + blocks * dim * 4 * dim + dim * dim)
    ends = 2 * picture * (channels * dim + dim * channels)
    return of_row * rows + attention + modulation + ends


def test_operations_are_those_that_one_counts_by_hand(z_image_runner: TorchRunner) -> None:
    request = GenerationRequest(prompt="w1 w2", width=64, height=64, guidance_scale=0.0).resolve(z_image_runner.info)
    (prompt,) = z_image_runner.model.prompts(request)
    tokens = sum(z_image_runner.lengths(request)) - prompt.length
    assert tokens == 8 * 8
    assert operations_of(z_image_runner, request) == hand_counted(tokens, prompt.length)


def test_operations_of_a_packed_step_are_those_of_its_jobs(z_image_path: Path, z_image_runner: TorchRunner) -> None:
    requests = [
        GenerationRequest(prompt="w1", width=64, height=64, guidance_scale=0.0),
        GenerationRequest(prompt="w2 " * 40, width=32, height=96, guidance_scale=3.0),
    ]
    resolved = [request.resolve(z_image_runner.info) for request in requests]
    alone = sum(operations_of(z_image_runner, request) for request in resolved)
    jobs = [Job(str(i), 0, request, z_image_runner.lengths(request), 0.0) for i, request in enumerate(resolved)]
    z_image_runner.encode(jobs)
    together = count_operations(lambda: z_image_runner.denoise(jobs, lambda step, steps: None))
    assert together == alone
    for job in jobs:
        z_image_runner.forget(job)


def test_requests_with_images_are_measured(tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.new("RGB", (32, 48), "red").save(picture)
    wanted = RequestOptions(
        task="image-to-image",
        num_inference_steps=4,
        extra_body='{"strength": 0.5}',
        random_request_config=json.dumps([{"weight": 1, "images": [str(picture)]}]),
    )
    status, kept = run(FAKE, DatasetOptions(num_prompts=4), wanted, tmp_path)
    assert status == 0 and kept["figures"]["images"] == 4
    assert kept["figures"]["job_steps_per_second"] == pytest.approx(4 * 2 / kept["figures"]["duration"])
    assert kept["figures"]["tflops"] is None  # there is no model behind a fake


def test_the_run_of_median_throughput_is_told_of_several(tmp_path: Path) -> None:
    offline = OfflineOptions(warmup_requests=0, repeats=3)
    wanted = RequestOptions(num_inference_steps=2)
    _, kept = run(FAKE, DatasetOptions(num_prompts=4), wanted, tmp_path, offline)
    rates = sorted(repeat["images_per_second"] for repeat in kept["repeats"])
    assert len(rates) == 3 and kept["figures"]["images_per_second"] == rates[1]


def test_as_many_jobs_share_a_step_as_the_flags_allow(tmp_path: Path) -> None:
    wanted = RequestOptions(num_inference_steps=30)
    _, kept = run(FAKE, DatasetOptions(num_prompts=4), wanted, tmp_path)
    assert 3.5 < kept["figures"]["jobs_per_step"] <= 4


def test_what_fails_is_told_and_the_rest_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n[nan] b\nc\n[raise-denoise] d\n")
    dataset = DatasetOptions(dataset="text", dataset_path=str(prompts))
    status, kept = run(FAKE, dataset, RequestOptions(), tmp_path)
    assert status == 1 and (kept["figures"]["images"], kept["figures"]["failed_images"]) == (2, 2)
    assert sorted(kept["errors"].values()) == [1, 1]
    assert "1 x the model failed on this request" in capsys.readouterr().out


def test_what_no_request_can_be_is_refused_in_a_line() -> None:
    with pytest.raises(OptionError, match="can't do --task text-to-video"):
        to_request(WorkItem(prompt="a", task="text-to-video"), 1)
    with pytest.raises(OptionError, match="--extra-body: colour is not a field"):
        to_request(WorkItem(prompt="a", extra={"colour": "red"}), 1)
    with pytest.raises(OptionError, match="request 7: n must be from 1 to 10"):
        to_request(WorkItem(prompt="a", n=11), 7)


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("output_file", "file/result.json", "can't write .*result.json: "),
        ("output_file", "folder", "can't write .*folder: it is a folder"),
        ("save_outputs", "file", "--save-outputs: .*file can't be made"),
    ],
)
def test_what_could_not_be_kept_is_not_measured(
    tmp_path: Path, flag: str, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    report = ReportOptions(disable_tqdm=True, **{flag: str(tmp_path / name)})
    with pytest.raises(SetupError, match=message):
        run_offline(FAKE, DatasetOptions(num_prompts=1), RequestOptions(), OfflineOptions(), report)
    assert not capsys.readouterr().out


def test_units_are_timed_stage_by_stage(z_image_runner: TorchRunner) -> None:
    request = GenerationRequest(prompt="w1", width=64, height=64, num_inference_steps=3, guidance_scale=0.0, seed=1)
    run = measure(TorchRunner(z_image_runner.model), EngineConfig(), [request, request])
    assert [unit.stage for unit in run.units] == ["encode", "denoise", "denoise", "denoise", "decode", "decode"]
    assert [unit.requests for unit in run.units] == [("0", "1")] * 4 + [("0",), ("1",)]
    assert run.widths == [2, 2, 2] and all(unit.seconds > 0 for unit in run.units)
    assert all(output.pixels == b"" for output in run.outputs)
