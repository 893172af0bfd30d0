"""docs/benchmarks.md, from the JSON of servers side by side, and of the other benchmarks where that is beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parts import pipelines_docs, scheduling_docs, timing_docs
from parts.markdown import paragraphs
from parts.serving_report import COLUMNS, TITLES, rows
from parts.workloads import POISSON_LOAD, PROMPT_TOKENS, SEED, WARMUP

RESULTS = Path(__file__).parent.parent / "results"
PAGE = RESULTS.parent.parent / "docs" / "benchmarks.md"
SERIAL, BATCHING = "fastapi_lock", ("litserve_server", "ray_server")
SIGNATURE = ("size", "num_inference_steps", "guidance_scale")  # what must be equal for requests to share a peer's call
GOAL = 1.5  # times a peer's throughput, where work is mixed
ENOUGH_ROOM = 2.0  # what batching brings on equal requests where that goal can be asked for
NOT_VERSIONS = ("date", "cpu", "cores", "load", "platform", "settings")  # of the environment

COMPARED = """
| server | what it does |
| --- | --- |
| stepbatch | `stepbatch serve` as it is: up to 8 jobs share each step, whatever their sizes, steps and guidance |
| FastAPI and a lock | [`fastapi_lock.py`](../benchmarks/peers/fastapi_lock.py): one request at a time |
| LitServe | [`litserve_server.py`](../benchmarks/peers/litserve_server.py): up to 8 waiting requests are a batch |
| Ray Serve | [`ray_server.py`](../benchmarks/peers/ray_server.py): likewise, with `@serve.batch` |
"""

HEAD = """
stepbatch beside what one would write today around diffusers: same checkpoint, same route, same number of threads, same
client. `make bench` measures it anew and writes this page from `benchmarks/results/serving.json`, which has the figures
of every run.

Measured on {date}: {cpu}, {cores} cores, {platform}; {versions}.
"""
METHOD = """
The peers run diffusers' own pipeline in fp32 under `torch.inference_mode`. Those that batch wait 10 ms for company,
have the requests of equal size, steps and guidance in a batch share a call, and answer with the pictures that each
would get alone. [`shared.py`](../benchmarks/peers/shared.py) and each server's file say what else was chosen for them,
and why.

Each server's model computes with {threads}; the rest of the machine is for HTTP and for the client. One server is up at
a time, and takes its turn in each of {rounds}, whose orders are opposite. Figures are medians over the rounds; the
range of the throughput says how much the machine disturbed them.

A load is {requests}, after {warmup} that are not counted; every picture is decoded and its size checked. {concurrency}
requests are kept in flight, except where they come at random times: {load:g} times as many a second as the lock can
serve. With so few requests, P99 is nearly the slowest of them.
"""

DENSE = """
Where all is the same, a call for eight pictures is the best there is: dense tensors from end to end, and nobody waits
for another's steps. A server that mixes freely has to keep up with that.
"""
ROOM = """
What batching can bring at all shows where all is the same: the better of the peers that batch serves {room:.2f} times
what one request at a time does.
"""
LITTLE_ROOM = """
On mixed requests, sharing steps can bring about as much over one at a time, and less over a server that still brings
together what happens to be equal. So the model leaves no room for {goal:g} times everywhere: the least is {least:.2f}x.
"""

BESIDE = {  # results that have a section where they are beside the others
    "pipelines": pipelines_docs.section,
    "scheduling": scheduling_docs.section,
    "overload": timing_docs.overload,
    "prediction": timing_docs.prediction,
    "simulation": timing_docs.simulation,
    "scheduler_time": timing_docs.scheduler_time,
}


def write_docs(results: Path, docs: Path) -> None:
    """Write the page from what was saved: nothing in it comes from anywhere else."""
    data = json.loads(results.read_text())
    about = data["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about.items() if name not in NOT_VERSIONS)
    head = HEAD.format_map(about | {"date": about["date"][:10], "versions": versions})
    s = about["settings"]
    counts = {name: _counted(s[name], name.removesuffix("s")) for name in ("threads", "rounds", "requests")}
    method = METHOD.format_map(counts | {"concurrency": s["concurrency"], "warmup": WARMUP, "load": POISSON_LOAD})
    parts = ["# Benchmarks", paragraphs(head), "## What is compared", COMPARED.strip(), paragraphs(method)]
    parts.append(_command(s))
    for name in data["checkpoints"]:
        parts += _checkpoint(data, name)
    for name, section in BESIDE.items():
        more = results.with_name(f"{name}.json")
        if more.exists():
            parts.append(section(json.loads(more.read_text())))
    docs.write_text("\n\n".join(parts) + "\n")


def rewrite_page() -> None:
    """Write the project's page anew, from what is in results/."""
    write_docs(RESULTS / "serving.json", PAGE)


def _command(s: Mapping[str, Any]) -> str:
    load = f"--num-prompts {s['requests']} --max-concurrency {s['concurrency']} --seed {SEED}"
    return f"""The load is that of `stepbatch bench serving`, which sends it to any server:

```bash
stepbatch bench serving --base-url http://127.0.0.1:30200 --dataset text --dataset-path prompts.txt \\
  {load} --random-request-config @profiles.json \\
  --extra-body '{{"max_sequence_length": {PROMPT_TOKENS}}}'
```

In the tables, *throughput* is ours over the server's, and *mean latency* the server's over ours: over 1, ours is
better. The code is [`serving.py`](../benchmarks/serving.py)."""


def _checkpoint(data: Mapping[str, Any], name: str) -> list[str]:
    about = data["checkpoints"][name]
    parts = [f"## The {name}", _summary(data, name)]
    for workload in about["workloads"]:
        lines = [f"| {' | '.join(COLUMNS)} |", "| --- " + "| ---: " * (len(COLUMNS) - 1) + "|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in rows(data, name, workload)]
        parts += [f"### {TITLES[workload]}", _explained(workload, about), "\n".join(lines)]
    return parts


def _summary(data: Mapping[str, Any], checkpoint: str) -> str:
    """What the tables come to."""
    found = {workload: rows(data, checkpoint, workload) for workload in data["checkpoints"][checkpoint]["workloads"]}
    ratios = {w: [row.faster for row in found[w] if row.faster is not None] for w in found if w != "poisson"}
    said = "; ".join(f"{TITLES[w].lower()}, {_range(ratios[w])}" for w in ratios if ratios[w])
    lines = [f"Our throughput over the peers': {said}."]
    if min(ratios.get("same") or [1.0]) < 1:
        lines.append(DENSE)
    rate = {row.server: row.throughput for row in found.get("same", [])}
    batched = [rate[name] for name in BATCHING if name in rate]
    mixed = [ratio for workload in ("steps", "everything") for ratio in ratios.get(workload, ())]
    if batched and rate.get(SERIAL):
        room = max(batched) / rate[SERIAL]
        lines.append(ROOM.format(room=room))
        if mixed and min(mixed) < GOAL and room < ENOUGH_ROOM:
            lines.append(LITTLE_ROOM.format(goal=GOAL, least=min(mixed)))
    return paragraphs("\n\n".join(line.strip() for line in lines))


def _explained(workload: str, about: Mapping[str, Any]) -> str:
    """What a workload's requests are, and what it shows."""
    choices = about["workloads"][workload]
    size, steps, guidance = (choices[name] for name in SIGNATURE)
    calls = f"Of 8 requests that are drawn so, {_calls(choices):.1f} calls come on average"
    if workload == "same":
        text = (
            f"{size[0]}, {steps[0]} steps, guidance {guidance[0]:g}; only prompts and seeds differ. The best case for "
            "servers that batch whole calls: each batch is one."
        )
    elif workload == "steps":
        text = (
            f"{size[0]}, guidance {guidance[0]:g}, {', '.join(map(str, steps[:-1]))} or {steps[-1]} steps. {calls}, "
            "and all of a batch are answered when its last call is done. Steps can be shared whatever their number."
        )
    elif workload == "everything":
        negative = ", with a negative prompt or without" if len(choices["negative_prompt"]) > 1 else ""
        text = (
            f"{len(size)} sizes, {len(steps)} numbers of steps, {len(guidance)} strengths of guidance{negative}. "
            f"{calls}: hardly two may share one."
        )
    else:
        text = (
            f"The same kind of requests, {about['poisson_rate']:.2f} a second on average. Servers that keep up have "
            "the throughput of the arrivals, so what differs is latency."
        )
    return paragraphs(text)


def _calls(choices: Mapping[str, Sequence[Any]], count: int = 8) -> float:
    """How many calls ``count`` requests make on average: how many signatures there are among them."""
    kinds = math.prod(len(choices[name]) for name in SIGNATURE)
    return kinds * (1 - (1 - 1 / kinds) ** count)


def _range(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return f"{low}x" if low == high else f"{low} to {high}x"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"
