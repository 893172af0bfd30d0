"""The contact sheet: every picture of a burst over what it was asked to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from stepbatch.demo.burst import Answer

COLUMNS = 6
PICTURE, PADDING, GAP = 256, 12, 16  # pixels: the largest picture, the room around it in its cell, between cells
TITLE, CAPTION = 116, 116  # pixels: heights
LINES = 3  # of a prompt; all prompts of the burst fit
PAGE, CELL, FRAME = (244, 244, 242), (255, 255, 255), (222, 222, 218)
INK, FAINT, RIGHT, WRONG = (28, 28, 30), (112, 112, 116), (34, 150, 74), (206, 54, 46)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Entry:
    """An answer and what the checker found wrong with it; ``None`` for a prompt that it can't check."""

    answer: Answer
    mismatch: str | None


def contact_sheet(entries: Sequence[Entry], title: str, subtitle: str) -> Image.Image:
    """Lay all pictures out at their own sizes in a grid of equal cells."""
    rows = -(-len(entries) // COLUMNS)
    width, height = PICTURE + 2 * PADDING, PICTURE + 2 * PADDING + CAPTION
    size = GAP + COLUMNS * (width + GAP), TITLE + rows * (height + GAP)
    sheet = Image.new("RGB", size, PAGE)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP + 2, 22), title, INK, ImageFont.load_default(34))
    draw.text((GAP + 2, 70), subtitle, FAINT, ImageFont.load_default(20))
    for i, entry in enumerate(entries):
        x, y = GAP + i % COLUMNS * (width + GAP), TITLE + i // COLUMNS * (height + GAP)
        draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 8, CELL, FRAME)
        _paint(sheet, draw, entry, x, y)
    return sheet


def _paint(sheet: Image.Image, draw: ImageDraw.ImageDraw, entry: Entry, x: int, y: int) -> None:
    wish, picture = entry.answer.wish, entry.answer.picture
    middle = x + PADDING + PICTURE // 2, y + PADDING + PICTURE // 2
    if picture is None:
        text = "\n".join(wrap(entry.answer.error, ImageFont.load_default(15), PICTURE))
        draw.multiline_text(middle, text, WRONG, ImageFont.load_default(15), "mm", align="center")
    else:
        left, top = middle[0] - picture.width // 2, middle[1] - picture.height // 2
        draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=FRAME)
        sheet.paste(picture, (left, top))
    left, top = x + PADDING, y + 2 * PADDING + PICTURE
    font = ImageFont.load_default(16)
    for i, line in enumerate(wrap(wish.prompt, font, PICTURE)[:LINES]):
        draw.text((left, top - 2 + 21 * i), line, INK, font)
    details = f"{wish.width} x {wish.height}, {wish.steps} steps\nguidance {wish.guidance:g}, seed {wish.seed}"
    draw.multiline_text((left, top + 68), details, FAINT, ImageFont.load_default(13), spacing=5)
    if entry.mismatch is not None:
        _mark(draw, x + PADDING + PICTURE - 11, top + 85, not entry.mismatch)


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross on a disc; the default font has neither."""
    draw.ellipse((x - 11, y - 11, x + 11, y + 11), RIGHT if right else WRONG)
    if right:
        draw.line([(x - 5, y), (x - 1, y + 4), (x + 6, y - 4)], CELL, 2, "curve")
    else:
        draw.line([(x - 4, y - 4), (x + 4, y + 4)], CELL, 2)
        draw.line([(x - 4, y + 4), (x + 4, y - 4)], CELL, 2)


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
