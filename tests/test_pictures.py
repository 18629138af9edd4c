"""Grids of images, and figures that are told apart in grey."""

import math
from itertools import pairwise

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from diffusers_gm.calibration import picture
from diffusers_gm.calibration.calibrate import Calibration
from diffusers_gm.evaluation import report
from diffusers_gm.evaluation.results import Cell, Results, Statistic
from diffusers_gm.pictures import COLORS, curve_style, image_grid, style
from diffusers_gm.processes.mixture import GaussianMixtureNoise
from diffusers_gm.studies.pictures import RARE, shares_and_jumps, show_rows


def test_grids_are_full_enlarged_and_have_gaps():
    images = [Image.new("L", (8, 8), 10 * i) for i in range(12)]
    grid = image_grid(images)
    assert grid.size == (4 * 64 + 3 * 4, 3 * 64 + 2 * 4)
    middles = [(68 * (i % 4) + 32, 68 * (i // 4) + 32) for i in range(12)]
    assert [grid.getpixel(middle) for middle in middles] == [10 * i for i in range(12)]
    assert {grid.getpixel((64 + i, 32)) for i in range(4)} == {255}, "a gap"
    assert image_grid(images[:7]).size == (7 * 68 - 4, 64)
    assert image_grid(images[:7], columns=4).size == (4 * 68 - 4, 2 * 68 - 4)
    assert image_grid([Image.new("RGB", (100, 100))]).size == (100, 100)
    for other in ([], [images[0], Image.new("L", (16, 4))], [images[0], Image.new("RGB", (8, 8))]):
        with pytest.raises(ValueError, match="at least one image, and all of one size and mode, got "):
            image_grid(other)
    red = Image.new("P", (8, 8), 1)
    red.putpalette([0, 0, 0, 255, 0, 0])
    assert image_grid([red]).convert("RGB").getpixel((32, 32)) == (255, 0, 0)


def test_grids_of_tensors_are_not_smoothed():
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).mul(2.0).sub(1)[None, None]
    grid = image_grid(board)
    assert set(grid.tobytes()) == {0, 255}
    assert grid.resize((8, 8), Image.Resampling.NEAREST).tobytes() == bytes(255 * int(x > 0) for x in board.flatten())
    assert image_grid(torch.zeros(2, 3, 80, 40)).size == (2 * 80 + 5, 160)


def test_curves_are_told_apart_in_grey():
    styles = [curve_style(i) for i in range(len(COLORS) ** 2)]
    for pair in (("marker", "linestyle"), ("marker", "color"), ("color", "linestyle")):
        assert len({tuple(str(s[key]) for key in pair) for s in styles}) == len(styles), pair
    with matplotlib.rc_context(style()):
        axis = Figure().subplots()
        lines = [axis.plot([0, 1])[0] for _ in COLORS]
        spreads = {"a": 0.5, "b": None, "c": None}
        report.plot_curves(axis, {k: {5: Statistic(1.0, s), 9: Statistic(2.0, s)} for k, s in spreads.items()})
    assert len({line.get_linestyle() + str(getattr(line, "_dash_pattern", "")) for line in lines}) == len(COLORS)
    assert len({line.get_marker() for line in axis.get_legend_handles_labels()[0]}) == 3, "and no bars"
    assert len(axis.containers) == 1, "bars where there is a spread"
    greys = [ImageColor.getcolor(color, "L") for color in COLORS]
    assert min(abs(a - b) for a, b in pairwise(greys)) > 25, "neighbours"
    assert max(greys) < 190, "against white"


def test_figures_whose_lines_are_alike_in_grey_are_found(tmp_path):
    """In all tests, whatever draws the figure."""
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], "o-", color=COLORS[0], label="a")
    axis.plot([1, 0], "o--", color=COLORS[0], label="b")
    axis.plot([1, 1], "o-", color=COLORS[0])
    figure.savefig(tmp_path / "it.png")
    axis.errorbar([0, 1], [1, 2], [1, 1], fmt="o-", color=COLORS[1], label="c")
    with pytest.raises(AssertionError, match=r"alike in grey: .*'a'.*'c'"):
        figure.savefig(tmp_path / "it.png")


def test_one_budget_is_a_row_a_scheduler(tmp_path):
    results = Results(tmp_path / "results.json", {"model": "m", "num_samples": 4, "num_reference": 9, "data": "d"})
    results.floor = [{"FD-Lite0": 2.0, "sliced W2": 0.1}]
    scores = {"a": (30.0, 0.2), "b": (3.0, 0.4), "c": None}
    for name, values in scores.items():
        found = dict(zip(("FD-Lite0", "sliced W2"), values, strict=True)) if values else {}
        results.cells.append(Cell(name, 10, 0, found))
    report.plot(results, tmp_path / "one.png")
    axes = Figure().subplots(1, 2, sharey=True)
    report.plot_rows(axes[0], {"b": Statistic(3.0, 0.5), "a": Statistic(30.0, None), "c": None}, 2.0)
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == ["b", "a", "c"]
    left, right = axes[0].get_xlim()
    ticks = [t for t in axes[0].get_xticks() if left <= t <= right]
    assert 2 <= len(ticks) <= 8
    assert left < 2.0, "the floor"
    assert right > 30.0
    with Image.open(tmp_path / "one.png") as one:
        results.cells += [Cell(name, 20, 0, {"FD-Lite0": 3.0, "sliced W2": 0.2}) for name in "ab"]
        report.plot(results, tmp_path / "two.png")
        with Image.open(tmp_path / "two.png") as two:
            assert one.size != two.size


@pytest.mark.parametrize("errors", [{}, {3: (0.04, 0.01), 4: (0.01, 0.01)}], ids=["fast", "full"])
def test_a_calibration_is_shown_before_and_after(errors):
    before, after = {3: [9.0, 3.0, 0.1], 4: [9.0, 5.0, 1.0, 0.1]}, {3: [9.0, 2.0, 0.1], 4: [9.0, 4.0, 1.0, 0.1]}
    found = Calibration(None, levels=after, fixed=before, errors=errors, stochasticity={3: 0.0, 4: 0.7})
    figure = picture._figure(found)
    left, *right = figure.axes
    assert [list(line.get_xdata()) for line in left.lines] == [before[3] + before[4], after[3] + after[4]]
    assert [label.get_text() for label in left.get_yticklabels()] == ["3, tau 0", "4, tau 0.7"]
    distances = [list(line.get_ydata()) for axis in right for line in axis.lines]
    assert distances == ([[0.2, 0.1], [0.1, 0.1]] if errors else [])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fixed grid", "calibrated"]


def test_every_jump_of_a_law_is_shown():
    law = GaussianMixtureNoise.from_stable(1.5, 8)
    shares, rare = shares_and_jumps(law, 14)
    assert shares == sorted(shares)
    assert rare[-1] == (float(law.scales.max()), pytest.approx(float(law.weights[-1])))
    assert rare[-1][0] > 10
    assert all(probability < RARE for _, probability in rare)
    # The rest in proportion to how often it is drawn.
    common = law.weights[law.weights >= RARE]
    expected = (common / common.sum() * len(shares)).tolist()
    counts = [shares.count(scale) for scale in law.scales[law.weights >= RARE].tolist()]
    assert all(math.floor(e) <= n <= math.ceil(e) for n, e in zip(counts, expected, strict=True))
    assert shares_and_jumps(GaussianMixtureNoise([1.0], [1.0]), 5) == ([1.0] * 5, [])


def test_rows_of_images_stand_beside_their_names():
    axis = Figure().subplots()
    show_rows(axis, {"first": torch.full((3, 1, 8, 8), -1.0), "second": torch.ones(5, 1, 8, 8)}, columns=4)
    (picture,) = axis.images
    array = picture.get_array()
    at = [int(tick) for tick in axis.get_yticks()]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second"]
    assert [int(array[y, 3]) for y in at] == [0, 255]
