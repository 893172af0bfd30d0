"""Pictures as matplotlib has them when they are written: what stands in them, and that it can be read."""

from itertools import combinations
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


def watched(patched: pytest.MonkeyPatch, written: bool = True) -> list[Figure]:
    """The figures that are written from now on, or else are only laid out, which takes half as long."""
    seen: list[Figure] = []
    write = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        if written:
            write(figure, *args, **options)
        else:
            figure.draw_without_rendering()
        assert_texts_are_apart(figure)
        seen.append(figure)

    patched.setattr(Figure, "savefig", savefig)
    return seen


def assert_texts_are_apart(figure: Figure) -> None:
    """No text lies over another or beyond the figure's edge."""
    unseen = ticks_out_of_view(figure)
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if text.get_text() and text not in unseen]
    assert len(boxes) > 10
    width, height = figure.bbox.size
    for content, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (content, box)
    for (content, box), (other, its_box) in combinations([(text, box.padded(-1)) for text, box in boxes], 2):
        assert not box.overlaps(its_box), (content, other)


def ticks_out_of_view(figure: Figure) -> set[Text]:
    """Labels that matplotlib keeps but doesn't draw."""
    unseen = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        near = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - near <= tick.get_loc() <= high + near:
                unseen |= {tick.label1, tick.label2}
    return unseen


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]
