"""Plot learning curves and p over time from the metrics.csv of runs: of each arm the mean and the range of its seeds.

    python tools/experiments/plot.py runs/Walker2d-v4/awac-quickstart-seed* --output docs/quickstart.png

Runs whose folders differ in the seed only are an arm. Those that began at another's switch start there. Needs
requirements-dev.txt.
"""

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv; a last line that is still being written is left out."""
    text = (folder / "metrics.csv").read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def read_curve(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float], int]:
    """Steps (offline updates, then online steps), values, and the step of the switch; C-VAE updates take no room."""
    switch = max((int(row["step"]) for row in rows if row["phase"] == "offline"), default=0)
    rows = [row for row in rows if row[column] and row["phase"] != "coefficient"]
    steps = [int(row["step"]) + (switch if row["phase"] == "online" else 0) for row in rows]
    return steps, [float(row[column]) for row in rows], switch


def draw(axes: Any, curves: list[dict[int, float]], colour: str, **style: Any) -> None:
    """The mean of curves {step: value} at the steps that all have, and their range."""
    steps = sorted(set.intersection(*map(set, curves)))
    values = [[curve[step] for step in steps] for curve in curves]
    axes.plot(steps, [sum(column) / len(column) for column in zip(*values)], color=colour, **style)
    if len(curves) > 1:
        axes.fill_between(
            steps, *([f(column) for column in zip(*values)] for f in (min, max)), color=colour, alpha=0.15
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, such as curves.png")
    args = parser.parse_args()

    arms: dict[str, list[list[dict[str, str]]]] = {}
    columns, last = ("score", "p_mean", "p_share"), 0
    for folder in args.runs:
        try:
            rows = read_rows(folder)
            last = max(last, read_curve(rows, "score")[2])
            [read_curve(rows, column) for column in columns]
            arms.setdefault(re.sub(r"-seed\d+$", "", folder.name), []).append(rows)
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"error: no readable metrics.csv in {folder} ({error})") from None
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
    for i, (name, runs) in enumerate(arms.items()):
        curves = {}
        for column in columns:
            found = [read_curve(rows, column) for rows in runs]
            shifted = [([step + (0 if switch else last) for step in steps], values) for steps, values, switch in found]
            curves[column] = [dict(zip(steps, values)) for steps, values in shifted]
        label = f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name
        draw(top, curves["score"], f"C{i}", marker=".", label=label)
        if any(value for curve in curves["p_share"] for value in curve.values()):
            draw(bottom, curves["p_mean"], f"C{i}")
            draw(bottom, curves["p_share"], f"C{i}", linestyle="--")
    for axes in (top, bottom):
        axes.axvline(last, color="grey", linewidth=1)
        axes.grid(alpha=0.3)
    top.set_ylabel("score of an evaluation")
    top.legend(loc="lower right")
    bottom.set_ylabel("p in the buffer:\nmean (—), share > 0 (- -)")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("offline updates, then (right of the grey line) online steps")
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
