"""What each command reads and does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import stepbatch
from stepbatch.cli.bench import bench
from stepbatch.cli.parser import Parser, build, build_groups, dispatch, groups, suggestion
from stepbatch.cli.profile import profile
from stepbatch.config import (
    BatchingConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    ServerConfig,
)
from stepbatch.errors import OptionError

USAGE = """usage: stepbatch COMMAND ...

Serve diffusion models with requests that share every denoising step.

commands:
  serve       serve a model over HTTP, with OpenAI's image and video API
  generate    make pictures or videos from prompts or a file of requests, without a server
  edit        make pictures from images and a prompt, without a server
  demo        serve the bundled model, send it a burst of requests, and lay out what came
  profile     what a model's steps cost on this machine, and how far batching pays
  bench       how a server does under load: bench serving, sweep, compare, offline, simulate

options:
  --version   print the version
  --help      print this; stepbatch COMMAND --help tells a command's flags"""


def run(arguments: list[str]) -> int:
    """Run the command that ``arguments`` begin with; returns the exit status.

    Raises:
        SetupError: it can't be done as asked.
    """
    commands = {
        "serve": serve,
        "generate": generate,
        "edit": edit,
        "demo": demo,
        "profile": profile,
        "bench": bench,
        "--version": _version,
    }
    return dispatch(arguments, commands, USAGE)


def _version(arguments: Sequence[str]) -> int:
    print(f"stepbatch {stepbatch.__version__}")
    return 0


def serve_parser() -> Parser:
    """The flags of ``stepbatch serve``."""
    parser = Parser("serve", "stepbatch serve [FLAG ...]", "Serve a model over HTTP, with OpenAI's API.")
    for cls in (*groups(EngineConfig), *groups(ServerConfig)):
        parser.add_config(cls)
    return parser


def serve(arguments: Sequence[str]) -> int:
    """``stepbatch serve``: until it is told to stop."""
    values = serve_parser().read(arguments)
    server, engine = build_groups(ServerConfig, values), build_groups(EngineConfig, values)
    from stepbatch.server.run import run_server

    return run_server(server, engine)


def generate_parser() -> Parser:
    """The flags of ``stepbatch generate``."""
    parser = Parser(
        "generate",
        "stepbatch generate [PROMPT ...] [FLAG ...]",
        "Make pictures or videos from prompts or a file of requests, without a server.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    parser.add_flag("--input", type=Path, metavar="FILE", help="JSON Lines, a request a line; what is done is skipped")
    parser.add_flag("--video", action="store_true", help="refuse a model that makes pictures")
    parser.add_flag("--image", type=Path, metavar="FILE", help="what each video begins with: a PNG, JPEG or WebP file")
    for name, kind, text in (
        ("--seconds", str, "how long a video is; goes to the nearest number of frames"),
        ("--num-frames", int, "the same in frames"),
        ("--fps", int, "frames a second"),
        ("--guidance-scale-2", float, "strength of guidance in the last steps, where the model has two transformers"),
        ("--flow-shift", float, "shift of the noise schedule"),
    ):
        parser.add_flag(name, type=kind, metavar=kind.__name__.upper(), help=text)
    _add_request_flags(parser, ", where a request doesn't say")
    return parser


def edit_parser() -> Parser:
    """The flags of ``stepbatch edit``."""
    parser = Parser(
        "edit",
        "stepbatch edit IMAGE [IMAGE ...] PROMPT [FLAG ...]",
        "Make pictures from images and a prompt, without a server.",
    )
    parser.add_argument("inputs", nargs="*", metavar="IMAGE ... PROMPT", help="PNG, JPEG or WebP files; what to make")
    parser.add_flag("--mask", type=Path, metavar="FILE", help="what to paint anew: transparent, or white, in this file")
    parser.add_flag("--strength", type=float, metavar="FLOAT", help="how far to go from the image, from 0 to 1")
    _add_request_flags(parser)
    return parser


def _add_request_flags(parser: Parser, where: str = "") -> None:
    parser.add_flag("-o", "--output", type=Path, default=Path("output"), metavar="DIR", help="(default: output)")
    for name, kind, text in (
        ("--size", str, "WIDTHxHEIGHT, pixels"),
        ("--num-inference-steps", int, "denoising steps"),
        ("--guidance-scale", float, "strength of guidance"),
        ("--true-cfg-scale", float, "strength of classifier-free guidance, where --guidance-scale is something else"),
        ("--negative-prompt", str, "what not to draw"),
        ("--seed", int, "of each request's first picture; random without it"),
        ("--n", int, "pictures of each request"),
    ):
        parser.add_flag(name, type=kind, metavar=kind.__name__.upper(), help=f"{text}{where}")
    parser.add_flag("--output-format", metavar="{png,jpeg,webp}", help="of pictures (default: png); videos are mp4")
    parser.add_config(ModelConfig)
    parser.add_config(BatchingConfig)
    parser.add_config(MemoryConfig)


def generate(arguments: Sequence[str]) -> int:
    """``stepbatch generate``: 1 if a request failed, the rest are done."""
    values = generate_parser().read(arguments)
    if not values["prompts"] and values["input"] is None:
        raise OptionError("stepbatch generate needs prompts, or a file of requests with --input")
    if values["video"] and values["output_format"]:
        raise OptionError("--output-format is for pictures: videos are mp4")
    given = {name: values[name] for name in ("seconds", "num_frames", "fps", "guidance_scale_2", "flow_shift")}
    if values["image"]:
        from stepbatch.cli.requests import read_images

        given |= read_images([values["image"]], None)
    return _generate(values, values["prompts"], values["input"], given, values["video"])


def edit(arguments: Sequence[str]) -> int:
    """``stepbatch edit``: 1 if a picture failed."""
    values = edit_parser().read(arguments)
    if len(values["inputs"]) < 2:
        raise OptionError("stepbatch edit needs image files, and then a prompt")
    *images, prompt = values["inputs"]
    from stepbatch.cli.requests import read_images

    given = read_images([Path(image) for image in images], values["mask"])
    return _generate(values, [prompt], None, given | {"strength": values["strength"]})


def _generate(
    values: dict[str, Any], prompts: Sequence[str], file: Path | None, given: Mapping[str, Any], video: bool = False
) -> int:
    """Make what ``prompts`` and ``file`` ask for, all of which have what is ``given`` and what the flags say."""
    from stepbatch.cli.requests import OUTPUT_FORMATS, Source

    config = build_groups(EngineConfig, values)
    if values["output_format"] not in (None, *OUTPUT_FORMATS):
        hint = suggestion(values["output_format"], OUTPUT_FORMATS)
        raise OptionError(f"--output-format must be one of {', '.join(OUTPUT_FORMATS)}{hint}")
    names = ("size", "num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt", "seed", "n")
    common = {**given, **{name: values[name] for name in names}}
    source = Source(prompts, file, {name: value for name, value in common.items() if value is not None})
    from stepbatch.cli.bulk import generate_all

    return generate_all(source, values["output"], values["output_format"], config, video)


def demo_parser() -> Parser:
    """The flags of ``stepbatch demo``."""
    parser = Parser(
        "demo",
        "stepbatch demo [FLAG ...]",
        "Serve the bundled model, send it a burst of requests, and lay out what came.",
    )
    parser.add_flag(
        "-o", "--output", type=Path, default=Path("demo-output"), metavar="DIR", help="(default: demo-output)"
    )
    parser.add_config(ModelConfig)
    return parser


def demo(arguments: Sequence[str]) -> int:
    """``stepbatch demo``: 1 if a request failed."""
    values = demo_parser().read(arguments)
    model = build(ModelConfig, values)
    from stepbatch.demo.run import run_demo

    return run_demo(values["output"], model)
