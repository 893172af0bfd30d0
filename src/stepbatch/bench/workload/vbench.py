"""VBench's prompts, in every layout in which they are published: lists in JSON, plain text, folders of images."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from stepbatch.bench.workload.entries import Entry, Task
from stepbatch.bench.workload.files import guess, lines, parse_json, read_text, wrong_layout
from stepbatch.errors import OptionError

TEXT_FILES = (  # within the repository, or a part of it
    "VBench_full_info.json",
    "vbench2/VBench2_full_info.json",
    "VBench2_full_info.json",
    "prompts/prompts_per_dimension/subject_consistency.txt",
    "prompts_per_dimension/subject_consistency.txt",
    "subject_consistency.txt",
)
IMAGE_FILES = (
    "data/i2v-bench-info.json",
    "i2v-bench-info.json",
    "vbench2_i2v_full_info.json",
    "vbench2_beta_i2v/data/i2v-bench-info.json",
    "vbench2_beta_i2v/vbench2_i2v_full_info.json",
)
IMAGE_FOLDERS = ("origin", "data/origin", "../data/origin", "crop/1-1", "data/crop/1-1")  # beside the lists
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_vbench(path: Path, task: Task) -> list[Entry]:
    """Every prompt once, with its image if the task takes one and the list names it.

    Args:
        path: A list, or a folder that holds one, or images, each named by its prompt.
        task: Decides which of a folder's files is taken.

    Raises:
        OptionError: there is no such file, or what is in it is laid out differently; the message names the line.
    """
    with_images = task.startswith("image")
    if os.path.isdir(path):
        found = _find(path, IMAGE_FILES if with_images else TEXT_FILES)
        if not found and (pictures := _pictures(path)):
            return [Entry(prompt=file.stem, images=(file,) if with_images else ()) for file in pictures]
        path = found or _find(path, TEXT_FILES if with_images else IMAGE_FILES) or _nothing(path)
    text = read_text(path, "--dataset-path")
    if text.lstrip().startswith("["):
        return _from_list(path, text, with_images)
    if guess(text) != "text":
        raise wrong_layout(path, text, "vbench", "a JSON list with prompt_en, or a prompt a line")
    return [Entry(prompt=prompt) for prompt in dict.fromkeys(line for _, line in lines(text))]


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _nothing(folder: Path) -> Path:
    names = ", ".join((*TEXT_FILES, *IMAGE_FILES))
    raise OptionError(f"--dataset-path: {folder} holds none of VBench's files ({names}) and no images")


def _pictures(folder: Path) -> list[Path]:
    for place in (folder, *(folder / name for name in IMAGE_FOLDERS)):
        files = sorted(place.iterdir()) if place.is_dir() else []
        if found := [file for file in files if file.suffix.lower() in SUFFIXES]:
            return found
    return []


def _from_list(path: Path, text: str, with_images: bool) -> list[Entry]:
    """A JSON list of objects with ``prompt_en`` and maybe ``image_name``, or ``caption`` and ``file_name``."""
    found: dict[tuple[str, str], int] = {}  # many prompts are listed once for each thing that is judged by them
    base = "", ""  # the last prompt that named its image
    for index, item in enumerate(parse_json(text, str(path), is_file=True)):
        prompt, image = _prompt(item)
        if not prompt:
            where = f"{path}:{_line(text, index)}: entry {index + 1}"
            raise OptionError(f"{where} is no object with text as its prompt_en or caption")
        if image:
            base = prompt, image
        elif prompt.startswith(base[0]):  # older lists name an image at the first of its prompts only
            image = base[1]
        found.setdefault((prompt, image if with_images else ""), index)
    if not found:
        raise OptionError(f"{path}:1: the list is empty")
    folder = _image_folder(path) if any(image for _, image in found) else path.parent
    for (_, image), index in found.items():
        if not os.path.isfile(folder / image) and image:
            raise OptionError(f"{path}:{_line(text, index)}: there is no image {folder / image}")
    return [Entry(prompt=prompt, images=(folder / image,) if image else ()) for prompt, image in found]


def _prompt(item: Any) -> tuple[str, str]:
    """An item's prompt and the name of its image; of what is no such item, no text."""
    if not isinstance(item, dict):
        return "", ""
    prompt, image = item.get("prompt_en", item.get("caption")), item.get("image_name", item.get("file_name"))
    return prompt if isinstance(prompt, str) and prompt.strip() else "", image if isinstance(image, str) else ""


def _line(text: str, index: int) -> int:
    """The line on which an entry of a list begins."""
    decoder, value = json.JSONDecoder(), re.compile(r"[^\s,]")
    start = end = text.index("[") + 1
    for _ in range(index + 1):
        found = value.search(text, end)
        assert found is not None
        start = found.start()
        _, end = decoder.raw_decode(text, start)
    return text.count("\n", 0, start) + 1


def _image_folder(path: Path) -> Path:
    folders = [path.parent / name for name in IMAGE_FOLDERS]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise OptionError(
        f"{path}: the images that it names are not there; they should be in {folders[0]} or {folders[1]}, where "
        "VBench's download_data.sh puts them"
    )
