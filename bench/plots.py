"""Line and bar plots as PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#4c72b0", "#dd8452", "#8c8c8c", "#937860", "#8172b3", "#64b5cd", "#55a868", "#c44e52", "#000000", "#da8bc3")
MARKERS = ("o", "s", "^")
Line = Mapping[int, float]
"""y by x; points that are missing are left out of the line."""


@dataclass(frozen=True)
class Panel:
    """One diagram of a figure.

    Attributes:
        title: what distinguishes it from its neighbours.
        lines: by name. The same name has the same colour and marker in all panels.
        level: draw a horizontal line there, for instance at 1.
    """

    title: str
    lines: Mapping[str, Line]
    level: float | None = None


def draw(
    path: Path, title: str, panels: Sequence[Panel], *, x_label: str, y_label: str, highlight: Sequence[str] = ()
) -> None:
    """Draws panels side by side, with one legend below them.

    Every x that occurs has the same distance to the next: batch sizes 1, 2, 4, 8, 16, 24 are all legible.

    Args:
        path: of the PNG file; its folder is made if it is not there.
        title: above all panels; says on what hardware.
        panels: from left to right; they share the y axis.
        x_label: with its unit.
        y_label: with its unit.
        highlight: names of lines that are drawn solid and thick; the others are dashed.
    """
    figure = Figure(figsize=(5.2 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    ticks = sorted({x for panel in panels for line in panel.lines.values() for x in line})
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel, names, ticks, highlight)
        axis.set_xlabel(x_label)
    axes[0].set_ylabel(y_label)
    axes[0].set_ylim(bottom=0)  # of all panels, and only now: it fixes the top as well
    handles = {line.get_label(): line for axis in axes for line in axis.get_lines() if line.get_label() in names}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * len(panels), frameon=False)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def bars(path: Path, title: str, heights: Mapping[str, Mapping[str, float]], *, y_label: str, level: float) -> None:
    """Draws bars beside one another for each name.

    Args:
        path: of the PNG file; its folder is made if it is not there.
        title: says on what hardware.
        heights: by name along x, and by what the bars of a name are; those that are missing are left out.
        y_label: with its unit.
        level: draw a horizontal line there.
    """
    figure = Figure(figsize=(1.5 + 0.9 * len(heights), 4.8), layout="constrained")
    axis = figure.subplots()
    kinds = list(dict.fromkeys(kind for each in heights.values() for kind in each))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        places = [place + width * number for place, each in enumerate(heights.values()) if kind in each]
        tops = [each[kind] for each in heights.values() if kind in each]
        axis.bar(places, tops, width, color=COLOURS[number % len(COLOURS)], label=kind)
    axis.axhline(level, color="black", linewidth=0.8)
    axis.set_xticks(
        [place + width * (len(kinds) - 1) / 2 for place in range(len(heights))], [*heights], rotation=30, ha="right"
    )
    axis.set_ylabel(y_label)
    axis.grid(visible=True, axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(kinds), frameon=False)
    figure.suptitle(title, fontsize=11, wrap=True)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _draw_panel(axis: Axes, panel: Panel, names: Sequence[str], ticks: Sequence[int], highlight: Sequence[str]) -> None:
    for name, line in panel.lines.items():
        width, style = (2.2, "-") if name in highlight else (1.4, "--")
        places = [ticks.index(x) for x in sorted(line)]
        heights = [line[x] for x in sorted(line)]
        turn, number = divmod(names.index(name), len(COLOURS))
        colour, marker = COLOURS[number], MARKERS[turn % len(MARKERS)]
        axis.plot(places, heights, marker=marker, markersize=4, color=colour, label=name, linewidth=width, ls=style)
    if panel.level is not None:
        axis.axhline(panel.level, color="black", linewidth=0.8)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xticks(range(len(ticks)), [str(x) for x in ticks])
    axis.grid(visible=True, alpha=0.3)
