from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.simulate.test_report import outcome
from tests.bench.simulate.test_results import setting

from stepbatch.bench.simulate.results import Outcome, SimulationResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def drawn(outcomes: list[Outcome], path: Path) -> None:
    from stepbatch.bench.simulate.picture import draw_simulation  # here, for it takes a second to import

    result = SimulationResult(
        created="", environment={}, options={}, curve="made", note="", capacity=1.0, outcomes=outcomes
    )
    draw_simulation(result, path)


def test_each_kind_of_machines_has_a_line_and_what_falls_behind_is_hollow(
    tmp_path: Path, figures: list[Figure]
) -> None:
    runs = [
        outcome(setting(amount=load, width=width), mean=load * 10, steady=load < 1)
        for load in (1.2, 0.5)
        for width in (None, 2)
    ]
    drawn(runs, tmp_path / "a.png")
    mean = figures[0].axes[0]
    lines = [line for line in mean.lines if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in lines] == [[0.5, 1.2], [0.5, 1.2]]
    assert [list(line.get_ydata()) for line in lines] == [[5.0, 12.0], [5.0, 12.0]]
    hollow = [line for line in mean.lines if line.get_marker() == "o" and line.get_markerfacecolor() == "white"]
    assert {line.get_xdata()[0] for line in hollow} == {1.2}
    assert len(figures[0].axes) == 4  # nothing to compare policies by


def test_policies_are_drawn_as_a_frontier(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [
        outcome(setting(), mean=4.0, p99=10.0),
        outcome(setting(policy="srpt", ageing=0.0), mean=2.0, p99=20.0),
        outcome(setting(policy="srpt", ageing=0.5), mean=3.0, p99=11.0),
    ]
    drawn(runs, tmp_path / "a.png")
    frontier = figures[0].axes[4]
    line = next(line for line in frontier.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert list(line.get_xdata()) == [0.5, 0.75] and list(line.get_ydata()) == [2.0, 1.1]
    assert [text.get_text() for text in frontier.texts] == ["0", "0.5"]
