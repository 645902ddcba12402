"""The report's pictures, as SVG whose colours follow the reader's light or dark theme."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shared import significance
from shared.params import Metric
from shared.report import MODELS, title
from shared.scores import score

COLOURS = {"base": "#8c959f", "reference": "#d4a72c", "finetuned": "#2f81f7"}
RANK_GROUPS = {"1": 1, "2–3": 3, "4–10": 10, "11–100": 100, "over 100": np.inf}  # and the last rank of each
LENGTH_CLASSES = 5
INK, PAPER, FAINT = "#1f2328", "#ffffff", "#d1d9e0"
IN_DARK = {INK: "#f0f6fc", PAPER: "#0d1117", FAINT: "#3d444d"}

matplotlib.rcdefaults()  # a user's matplotlibrc would change the bytes
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, and readable differences in Git
        "svg.hashsalt": "0",  # the same picture gives the same bytes
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": FAINT,
        "legend.frameon": False,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
)


def scores(ranks: dict[str, np.ndarray], groups: np.ndarray, metrics: list[Metric]) -> str:
    """The three models side by side. `ranks`: model → shape (seeds, queries); `groups`: shape (queries,)."""
    figure, axes = canvas()
    width = 0.26
    for offset, model in enumerate(MODELS):
        values = [score(metric, ranks[model]) for metric in metrics]
        heights = [value.mean() for value in values]
        positions = np.arange(len(metrics)) + (offset - 1) * width
        axes.bar(positions, heights, width * 0.94, color=COLOURS[model], label=MODELS[model])
        intervals = [significance.score_interval(value, groups) for value in values]
        whiskers(axes, positions, heights, intervals)
        for position, height, (_, high) in zip(positions, heights, intervals, strict=True):
            axes.text(position, high + 0.02, f"{height:.3f}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(np.arange(len(metrics)), [title(metric) for metric in metrics])
    axes.set_ylim(0, 1.1)  # the same for all runs, so that two pictures can be compared
    axes.set_title("Scores on the test queries; whiskers: 95% interval of each score by itself")
    legend_below(figure, axes)
    return svg(figure)


def training(curves: Path, chosen: dict[int, dict[str, float]], before: float, metric: Metric) -> str:
    """Loss, and score on the validation rows, by step; a line a seed. `curves` holds <seed>/{loss,validation}.csv,
    `chosen` is metrics/train/ by seed: the step of the model, and its score, which is above the line at that step where
    the base model's weights are mixed in. `before` is the base model's score (in float32; the others in the precision
    of training).
    """
    figure, (left, right) = canvas(columns=2)
    for axes, name, column in ((left, "loss", "loss"), (right, "validation", "score")):
        for seed, model in chosen.items():
            with (curves / str(seed) / f"{name}.csv").open(encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            steps, values = [int(row["step"]) for row in rows], [float(row[column]) for row in rows]
            if name == "validation":
                steps, values = [0, *steps], [before, *values]
            style = "-" if name == "loss" else ".:"  # only the points are measured
            axes.plot(steps, values, style, color=COLOURS["finetuned"], alpha=0.8)
            if name == "validation":
                axes.plot(model["step"], model["validation"], "o", markersize=9, fillstyle="none", color=INK)
    left.set_xlabel("step (an epoch's last batch is smaller)")
    right.set_xlabel("step")
    left.set_title("Training loss")
    right.set_title(f"Validation {title(metric)} (circle: the model)")
    figure.tight_layout()
    return svg(figure)


def recall(ranks: dict[str, np.ndarray]) -> str:
    """Share of the queries whose passage is among the first k, for k from 1 to 100."""
    figure, axes = canvas()
    depths = np.arange(1, 101)
    for model in MODELS:
        shares = [(ranks[model] <= depth).mean() for depth in depths]
        axes.plot(depths, shares, color=COLOURS[model], label=MODELS[model], linewidth=2)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 5, 10, 20, 50, 100], ["1", "2", "3", "5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("passages read (k)")
    axes.set_title("Recall@k: how often the right passage is among the first k")
    legend_below(figure, axes)
    return svg(figure)


def rank_moves(before: np.ndarray, after: np.ndarray) -> str:
    """How many queries went from which rank to which. `before`: (1, queries); `after`: (seeds, queries), averaged."""
    figure, axes = canvas()
    before, after = np.broadcast_arrays(before, after)
    ends = list(RANK_GROUPS.values())
    cells, _, _ = np.histogram2d(
        np.searchsorted(ends, before.ravel()), np.searchsorted(ends, after.ravel()), bins=[np.arange(len(ends) + 1)] * 2
    )
    cells /= len(after)
    for row, column in np.ndindex(cells.shape):
        share = cells[row, column] / cells.max()
        colour = COLOURS["finetuned"] if column < row else COLOURS["reference"] if column > row else COLOURS["base"]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.7 * share**0.5))
        axes.text(column, row, f"{cells[row, column]:.0f}", ha="center", va="center")
    places = np.arange(len(ends))
    axes.set_xticks(places, RANK_GROUPS)
    axes.set_yticks(places, RANK_GROUPS)
    axes.set_xlim(-0.5, len(ends) - 0.5)
    axes.set_ylim(len(ends) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_xlabel("rank after fine-tuning")
    axes.set_ylabel("rank before (base)")
    axes.set_title("Queries by the rank of their passage (blue: risen, yellow: fallen)")
    figure.tight_layout()
    return svg(figure)


def gain_by_length(gains: np.ndarray, groups: np.ndarray, words: np.ndarray, metric: Metric) -> str:
    """The gain over the base for short to long queries. `gains`: (seeds, queries); the others: (queries,)."""
    figure, axes = canvas()
    labels, heights, intervals = zip(*gains_by_length(gains, groups, words), strict=True)
    places = np.arange(len(labels))
    axes.bar(places, heights, 0.6, color=COLOURS["finetuned"])
    whiskers(axes, places, heights, intervals)
    axes.axhline(0, color=INK, linewidth=0.8)
    lows, highs = np.transpose(intervals)
    # Mostly the same, so that two pictures can be compared.
    axes.set_ylim(min(-0.1, *lows - 0.02), max(0.5, *highs + 0.02))
    axes.set_xticks(places, labels)
    axes.set_xlabel("words in the query")
    axes.set_title(f"Gain in {title(metric)} over the base model, by query length; whiskers: 95%")
    figure.tight_layout()
    return svg(figure)


def gains_by_length(
    gains: np.ndarray, groups: np.ndarray, words: np.ndarray
) -> Iterator[tuple[str, float, tuple[float, float]]]:
    """A label, the mean gain and its interval, for about LENGTH_CLASSES classes of as many queries each."""
    edges = np.unique(np.quantile(words, np.linspace(0, 1, LENGTH_CLASSES + 1)[1:], method="higher"))
    classes = np.searchsorted(edges, words)
    for one in np.unique(classes):
        chosen = classes == one
        first, last, mean = words[chosen].min(), words[chosen].max(), gains[:, chosen].mean()
        own_groups = significance.several_groups(groups, chosen)
        between = (mean, mean) if own_groups is None else significance.score_interval(gains[:, chosen], own_groups)
        yield f"{first if first == last else f'{first}–{last}'}\n({chosen.sum():,} queries)", mean, between


def canvas(columns: int = 1) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.6, 3.6))
    return figure, figure.subplots(1, columns)


def whiskers(axes: Axes, places: np.ndarray, heights: list, intervals: list) -> None:
    lows, highs = np.transpose(intervals)
    down_and_up = np.maximum(0, [heights - lows, highs - heights])  # an interval may miss its mean by a rounding error
    axes.errorbar(places, heights, down_and_up, fmt="none", ecolor=INK, elinewidth=1, capsize=3)


def legend_below(figure: Figure, axes: Axes) -> None:
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=len(MODELS))


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Viewers that know no themes (and no CSS variables) show the colours as drawn.
    dark = [
        f'[style*="{role}: {colour}"] {{ {role}: {other} !important }}'
        for colour, other in IN_DARK.items()
        for role in ("fill", "stroke")
    ]
    head, defs, rest = text.getvalue().partition("<defs>")
    return head + f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(dark)} }}</style>\n  " + defs + rest
