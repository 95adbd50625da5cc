"""The figures of report.py, as PNG bytes that depend on the runs only."""

import io
import math
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from report_runs import Arm, interquartile_mean, interval, mean_curve, spread
from report_tables import PARTS, by_name, mean_seconds

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#000000")
MARKERS = "os^DvPX"  # a colour comes with another marker each time round
WIDTH = 5.6  # inches: legible on a phone


def picture(figure: Any) -> bytes:
    figure.savefig(stream := io.BytesIO(), format="png", dpi=130)
    plt.close(figure)
    image = Image.open(stream).convert("RGB").quantize(128, dither=Image.Dither.NONE)  # a third of the size
    image.save(small := io.BytesIO(), "png", optimize=True)
    return small.getvalue()


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, np.ndarray]:
    """A figure, and its axes as an array (rows, columns)."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True})
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False, **options)


def add_legend(figure: Any, axes: Any) -> None:
    """Below the axes, where it hides no curve."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        longest = max(map(len, labels))
        columns = 1 if longest > 28 else 2 if longest > 15 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def styles(arms: list[Arm], everywhere: list[Arm]) -> dict[str, dict[str, str]]:
    """Colour and marker by short label: the same in all figures, unless there are more labels than colours."""
    names = {arm.short for arm in everywhere}
    names = sorted(names if len(names) <= len(COLOURS) else {arm.short for arm in arms})
    pairs = [(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(names))]
    return {name: {"color": colour, "marker": marker} for name, (colour, marker) in zip(names, pairs)}


# --- One environment
def curves(arms: list[Arm], everywhere: list[Arm]) -> bytes:
    """Score over online steps of the arms of one algorithm and environment, and below it p in the buffer.

    `everywhere` are all arms of the report, for the colours.
    """
    look = styles(arms, everywhere)
    guided = [arm for arm in arms if arm.config.get("samg") and any("p_mean" in run.curves for run in arm.runs)]
    rows = 2 if guided else 1
    height = 3.6 + 1.6 * (rows - 1) + 0.2 * math.ceil(len(arms) / 2)
    figure, grid = new_figure(rows, 1, height, height_ratios=(5, 3)[:rows], sharex=True)
    top, bottom = grid[0, 0], grid[-1, 0]
    for arm in arms:
        colour = look[arm.short]["color"]
        steps, scores = mean_curve(arm, "score")
        start = arm.values("offline_score")
        if len(start) == scores.shape[-1] and len(start):
            steps, scores = np.append(0, steps), np.vstack((start, scores))
        if len(steps):
            every = max(1, len(steps) // 8)
            label = f"{arm.short} ({arm.seeds_text()})"
            top.plot(steps, scores.mean(-1), label=label, markersize=5, markevery=every, **look[arm.short])
            low, high = interval([scores], mean_of_one)
            top.fill_between(steps, low, high, color=colour, alpha=0.2 if len(arms) < 4 else 0.1, linewidth=0)
        for run in arm.runs:
            if run not in arm.counted and "score" in run.curves and len(run.curves["score"][0]):
                label = f"{arm.short} seed {run.seed}: {run.state if not arm.differing else 'not counted'}"
                top.plot(*run.curves["score"], color=colour, linestyle=":", linewidth=1, label=label)
        if arm in guided:
            for column, style in (("p_mean", "-"), ("p_share", "--")):
                steps, values = mean_curve(arm, column)
                if len(steps):
                    bottom.plot(steps, values.mean(-1), color=colour, linestyle=style, linewidth=1.2)
    for axes in grid[:, 0]:
        axes.grid(alpha=0.3)
    top.set_ylabel("score" if any(arm.normalized for arm in arms) else "return")
    if guided:
        values = [value for line in bottom.lines for value in line.get_ydata() if math.isfinite(value)]
        highest = max(values, default=0) or 1
        bottom.set_ylim(-0.04 * highest, 1.06 * highest)
        bottom.set_ylabel("p: mean (—),\nshare > 0 (- -)")
    bottom.set_xlabel("online steps")
    add_legend(figure, top)
    return picture(figure)


def mean_of_one(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return values.mean(axis)


# --- Over all tasks
def aggregate(arms: list[Arm]) -> bytes:
    """Interquartile means with their intervals."""
    named = by_name(arms)
    figure, ((axes,),) = new_figure(1, 1, 1.2 + 0.32 * len(named))
    for i, members in enumerate(named.values()):
        tasks = [arm.values("final_score") for arm in members]
        low, high = interval(tasks, interquartile_mean)
        axes.plot([low, high], [i, i], color=COLOURS[0], linewidth=7, alpha=0.35, solid_capstyle="butt")
        axes.plot(interquartile_mean(*tasks), i, "|", color=COLOURS[0], markersize=13, markeredgewidth=2)
    axes.set_yticks(range(len(named)), [f"{label} ({len(tasks)})" for label, tasks in named.items()])
    axes.set_ylim(len(named) - 0.4, -0.6)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("IQM of final scores (in brackets: tasks)")
    return picture(figure)


def profiles(arms: list[Arm], everywhere: list[Arm]) -> bytes:
    """The share of runs above each score, the mean over tasks, of the arms of one algorithm; else like curves."""
    look = styles(arms, everywhere)
    named = by_name(arms)
    values = np.concatenate([arm.values("final_score") for members in named.values() for arm in members])
    levels = np.linspace(min(0.0, values.min()), max(100.0, math.ceil(values.max())), 101)
    figure, ((axes,),) = new_figure(1, 1, 3.6 + 0.2 * math.ceil(len(named) / 2))
    for members in named.values():
        above = [arm.values("final_score") > levels[:, None] for arm in members]  # (levels, seeds) for each task
        above = [task.astype(float) for task in above]
        label, style = f"{members[0].short} ({len(members)})", look[members[0].short]
        axes.plot(levels, mean_of_tasks(*above), label=label, markersize=5, markevery=10, **style)
        low, high = interval(above, mean_of_tasks)
        axes.fill_between(levels, low, high, color=style["color"], alpha=0.15 if len(named) < 4 else 0.08, linewidth=0)
    axes.grid(alpha=0.3)
    axes.set_xlabel("score τ (in brackets: tasks)")
    axes.set_ylabel("share of runs with a final score > τ")
    add_legend(figure, axes)
    return picture(figure)


def mean_of_tasks(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean([task.mean(axis) for task in tasks], axis=0)


# --- Ablations
def ablation(groups: list[tuple[str, list[tuple[Any, Arm]]]]) -> bytes:
    """Final score and regret of arms that differ in one field, a bar for each of its values."""
    arms = [arm for _, pairs in groups for _, arm in pairs]
    metrics = {"final score": "final_score"} | ({"regret": "regret"} if all(arm.normalized for arm in arms) else {})
    values = dict.fromkeys(repr(value) for _, pairs in groups for value, _ in pairs)
    colours = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(values)}
    places, labels, at = [], [], 0.0
    for env, pairs in groups:
        for value, arm in pairs:
            places.append((at, value, arm))
            labels.append(f"{env}: {value} ({len(arm.counted)})")
            at += 1
        at += 0.6
    figure, grid = new_figure(1, len(metrics), 1.1 + 0.28 * at, sharey=True)
    for axes, (title, metric) in zip(grid[0], metrics.items()):
        for y, value, arm in places:
            numbers = arm.values(metric)
            error = spread(numbers) if len(numbers) > 1 else 0.0
            axes.barh(y, numbers.mean(), xerr=error, color=colours[repr(value)], height=0.8, ecolor="#333333")
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, axis="x")
    grid[0, 0].set_yticks([y for y, _, _ in places], labels)
    grid[0, 0].set_ylim(at - 1.0, -0.6)
    return picture(figure)


# --- Time and memory
def cost(arms: list[Arm]) -> bytes:
    """Seconds by part, stacked, and peak memory, for each arm of one environment."""
    figure, ((left, right),) = new_figure(1, 2, 1.4 + 0.28 * len(arms), sharey=True, width_ratios=(3, 1))
    start = np.zeros(len(arms))
    for colour, part in zip(COLOURS, PARTS):
        seconds = np.array([mean_seconds(arm)[part] for arm in arms])
        left.barh(range(len(arms)), seconds, left=start, color=colour, label=part)
        start += seconds
    memory = [max(arm.values("peak_memory_mb"), default=0) for arm in arms]
    right.barh(range(len(arms)), memory, color=COLOURS[6])
    left.set_yticks(range(len(arms)), [arm.label for arm in arms])
    left.set_ylim(len(arms) - 0.4, -0.6)
    left.set_xlabel("mean seconds of a run")
    right.set_xlabel("peak MB")
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
    add_legend(figure, left)
    return picture(figure)
