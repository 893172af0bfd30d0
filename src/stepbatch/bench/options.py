"""The flags of the benchmarks, grouped."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stepbatch.config import check, option

SECRET = ("api_key", "header")


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which server is driven, and how it is spoken to."""

    base_url: tuple[str, ...] = option((), "the server's address; given several times, the load goes to all of them")
    host: str = option("127.0.0.1", "the server's host, without --base-url")
    port: int = option(30200, "the server's port, without --base-url", low=1, high=65535)
    model: str = option("", "the model that requests name; without it, the first that the server lists")
    api: Literal["auto", "images", "edits", "videos"] = option(
        "auto", "OpenAI's routes that are used: image generations, image edits or videos; auto goes by the task"
    )
    api_key: str = option("", "sent as a bearer token; without it, OPENAI_API_KEY, if that is set")
    header: tuple[str, ...] = option((), "sent with every request, as 'NAME: VALUE'; may be given several times")
    timeout: float = option(600.0, "after how many seconds a request counts as timed out", low=0.001)
    retries: int = option(
        0, "how often a request that was turned away (429, 503) is sent again, when the server says or later", low=0
    )
    ready_timeout: float = option(300.0, "how many seconds to wait until the server is up", low=0)
    poll_interval: float = option(0.25, "seconds between two looks at a video that is being made", low=0.01)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class DatasetOptions:
    """Where prompts come from."""

    dataset: Literal["demo", "random", "vbench", "parti", "drawbench", "text", "trace"] = option(
        "demo", "demo are the bundled model's, random are made up; the others are read from --dataset-path"
    )
    dataset_path: str = option(
        "", "VBench's JSON or text, PartiPrompts' TSV, DrawBench's CSV, lines of text, or a trace"
    )
    num_prompts: int = option(
        0, "how many requests are sent; a dataset with fewer begins anew; 0 is each of the dataset once", low=0
    )
    seed: int | None = option(
        None, "fixes what is drawn by chance, and is sent: request number i gets the seed plus i", low=0
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What each request asks for."""

    task: Literal["text-to-image", "image-to-image", "text-to-video", "image-to-video"] = option(
        "text-to-image", "what kind of requests"
    )
    width: int | None = option(None, "pixels", low=1)
    height: int | None = option(None, "pixels", low=1)
    num_inference_steps: int | None = option(None, "denoising steps", low=1)
    guidance_scale: float | None = option(None, "strength of guidance", low=0)
    n: int = option(1, "outputs of each request", low=1, aliases=("num_outputs_per_prompt",))
    num_frames: int | None = option(None, "frames of a video", low=1)
    fps: int | None = option(None, "frames a second of a video", low=1)
    random_request_config: str = option(
        "", "profiles to draw from, as a JSON list of objects: a weight, and any of a request's fields or its task"
    )
    extra_body: str = option("", "a JSON object that is laid over every request's body")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """When requests are sent."""

    request_rate: float = option(
        math.inf, "requests a second; inf sends each as soon as it may be", low=1e-6, endless=True
    )
    burstiness: float = option(
        1.0, "shape of the Gamma distribution of the gaps: 1 is Poisson, less is burstier, more is steadier", low=1e-3
    )
    max_concurrency: int = option(0, "the most requests in flight; 0 is no bound", low=0)
    warmup_requests: int = option(1, "sent first, one after another, and not measured", low=0)
    warmup_inference_steps: int = option(0, "denoising steps of those; 0 leaves them as they are", low=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class GoalOptions:
    """What latency is asked for."""

    slo: float | None = option(
        None,
        "seconds that a request may take; without a value, or 0, --slo-scale times what it takes on an idle server",
        low=0,
        bare=0.0,
    )
    slo_scale: float = option(3.0, "for --slo without a value: how many times the idle server's latency", low=0.01)

    def __post_init__(self) -> None:
        check(self)

    @property
    def is_relative(self) -> bool:
        """Whether it goes by what a request takes on an idle server."""
        return self.slo == 0


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is varied from run to run."""

    request_rates: str = option(
        "", "requests a second, as 1,2,4,8; auto searches for the tipping point, and is what is done without either"
    )
    concurrencies: str = option("", "requests in flight, as 1,2,4,8; auto goes on until it is too much")
    slo_attainment: float = option(
        0.99, "the share of requests that must meet their goal; without --slo, that must be answered", low=0, high=1
    )
    precision: float = option(0.1, "auto: the relative precision of what is searched for", low=0.01, high=1)
    max_runs: int = option(12, "auto: the most loads that are tried", low=1)
    duration: float = option(
        0.0, "seconds that a run should take; without it or --num-prompts, 30 by rate and 4 requests a slot", low=0
    )
    server_command: str = option(
        "", "a command that starts a server; {port} in it becomes a free port; without it, --base-url is what there is"
    )
    server_flag: tuple[str, ...] = option(
        (), "NAME=VALUE,VALUE,...: the server is started with each; given several times, with every combination"
    )
    servers: int = option(1, "how many servers are started side by side; {index} in the command counts them", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """How the engine is measured without a server."""

    warmup_requests: int = option(1, "run first, one after another, and not measured", low=0)
    repeats: int = option(1, "how often all requests are run; the run with the median throughput is reported", low=1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What is simulated."""

    curve: str = option("", "what steps cost: a file of stepbatch profile, or an example's name; --curve list has them")
    trace: str = option("", "a file that says when requests come, and which, as of --dataset trace")
    num_requests: int = option(
        0, "how many requests come in each run; 0 is a trace's, or 20000 and at least 100 a replica", low=0
    )
    seed: int = option(0, "fixes what is drawn by chance", low=0)
    loads: str = option("", "shares of what the replicas can do at most, as 0.5,0.8,0.95")
    request_rates: str = option("", "requests a second, as 1,2,4,8")
    concurrencies: str = option("", "requests in flight, as 1,2,4,8: each comes when another has ended")
    burstiness: float = option(
        1.0, "shape of the Gamma distribution of the gaps: 1 is Poisson, less is burstier, more is steadier", low=1e-3
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """On which machines; of lists, every combination is simulated."""

    policies: str = option("fcfs", "--scheduling-policy of each run, as fcfs,boost,srpt,deadline")
    ageings: str = option("", "--ageing of each run with srpt, as 0,0.1,0.3; without it, the default")
    widths: str = option("auto", "the most jobs in a step, as auto,1,2,4,8; auto is as many as pay")
    replicas: str = option("1", "how many machines, as 1,2,4; at most 10000")
    routings: str = option(
        "round-robin", "which machine a request goes to: round-robin, least-work or two-choices, or several of them"
    )
    max_queue_seconds: float = option(
        math.inf, "a request that finds more predicted seconds of work at its machine is refused", low=0, endless=True
    )
    timeout: float | None = option(
        None, "seconds after which a request is of no use, and is dropped if it hasn't begun", low=0.001
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the results go, besides the terminal."""

    output_file: str = option(
        "", "JSON with everything that was measured; of all but offline, a picture goes beside it, as .png"
    )
    save_outputs: str = option("", "a folder for the pictures and videos that came")
    disable_tqdm: bool = option(False, "show no progress")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ServingOptions:
    """All that there is to say of a load."""

    target: TargetOptions
    dataset: DatasetOptions
    wanted: RequestOptions
    load: LoadOptions
    goal: GoalOptions = field(default_factory=GoalOptions)
    report: ReportOptions = field(default_factory=ReportOptions)

    def told(self) -> dict[str, Any]:
        """Every flag by name, as ``told`` has them."""
        return told(*vars(self).values())


def told(*groups: Any) -> dict[str, Any]:
    """Every flag of these groups by name, as JSON can have it; of secrets, only whether there was any."""
    flags = {name: value for group in groups for name, value in asdict(group).items()}
    flags |= {name: bool(flags[name]) for name in SECRET if name in flags}
    return {name: str(value) if value == math.inf else value for name, value in flags.items()}
