"""Plot learning curves and p over time from the metrics.csv of runs.

    python tools/plot.py runs/Hopper-v4/awac-quickstart-seed* --output docs/quickstart.png

Runs whose folders differ in the seed only are drawn in one colour. Needs requirements-dev.txt.
"""

import argparse
import csv
import re
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, such as curves.png")
    args = parser.parse_args()

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
    colours, switches = {}, set()
    for folder in args.runs:
        name = re.sub(r"-seed\d+$", "", folder.name)
        label = None if name in colours else name
        colour = colours.setdefault(name, f"C{len(colours)}")
        try:
            rows = read_rows(folder)
            steps, scores, switch = read_curve(rows, "score")
            top.plot(steps, scores, marker=".", color=colour, alpha=0.8, label=label)
            bottom.plot(*read_curve(rows, "p_mean")[:2], color=colour, alpha=0.8)
            bottom.plot(*read_curve(rows, "p_share")[:2], color=colour, alpha=0.8, linestyle="--")
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"error: no readable metrics.csv in {folder} ({error})") from None
        switches.add(switch)
    for axes in (top, bottom):
        for switch in switches:
            axes.axvline(switch, color="grey", linewidth=1)
        axes.grid(alpha=0.3)
    top.set_ylabel("score of an evaluation")
    top.legend(loc="upper left")
    bottom.set_ylabel("p in the buffer:\nmean (—), share > 0 (- -)")
    bottom.set_ylim(0, 1)
    bottom.set_xlabel("offline updates, then (right of the grey line) online steps")
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
