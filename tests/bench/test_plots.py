import numpy as np
from matplotlib.figure import Figure

from bench import plots


def test_a_figure_says_what_is_drawn_where(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    panels = [
        plots.Panel("left", {"ours": {24: 5.0, 1: 2.0}, "theirs": {1: 1.0, 8: 1.0, 24: 1.0}}, level=1.0),
        plots.Panel("right", {"theirs": {1: 9.0}}),
    ]
    plots.draw(tmp_path / "plot.png", "model, machine", panels, x_label="rows", y_label="tokens/s", highlight=["ours"])
    (figure,) = figures
    left, right = figure.axes
    assert figure.get_suptitle() == "model, machine"
    assert (left.get_title(), right.get_title()) == ("left", "right")
    assert (left.get_xlabel(), right.get_xlabel(), left.get_ylabel()) == ("rows", "rows", "tokens/s")
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["1", "8", "24"]
    ours, theirs, level = left.get_lines()
    assert np.asarray(ours.get_xydata()).tolist() == [[0, 2], [2, 5]]  # sorted, and 8 is not made up
    assert (ours.get_linestyle(), theirs.get_linestyle()) == ("-", "--")
    assert np.asarray(level.get_ydata()).tolist() == [1, 1]
    assert theirs.get_color() == right.get_lines()[0].get_color() != ours.get_color()
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] == 0
    assert left.get_ylim()[1] > 9  # the panels share an axis on which every point is seen
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "theirs"]


def test_bars_of_a_name_are_beside_one_another(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    heights = {"match": {"chain": 2.0, "tree": 3.0}, "block": {"chain": 2.5}}
    plots.bars(tmp_path / "plot.png", "model, machine", heights, y_label="tokens", level=1.0)
    (axis,) = figures[0].axes
    drawn = [[(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in kind] for kind in axis.containers]
    assert drawn == [[(0.0, 2.0), (1.0, 2.5)], [(0.4, 3.0)]]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["match", "block"]
    assert axis.get_xticks().tolist() == [0.2, 1.2]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["chain", "tree"]


def test_no_two_of_many_lines_look_alike(tmp_path, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    lines = {f"drafter {number}": {1: float(number)} for number in range(25)}
    plots.draw(tmp_path / "plot.png", "model, machine", [plots.Panel("", lines)], x_label="rows", y_label="")
    drawn = figures[0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == len(lines)
