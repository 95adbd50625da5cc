"""How much of a task's data each data level covers (Section 5.5, Appendix C.8), and the gain against it (Figure 5).

    python tools/diagnostics/coverage.py --data medium=hopper_medium.hdf5 medium-replay=hopper_replay.hdf5 \\
        --task hopper --json hopper.json --picture hopper.png
    python tools/diagnostics/coverage.py --gain gains.csv --coverage hopper.json walker2d.json --picture gain.png

--data: HDF5 files in D4RL's raw layout, all of one task. A repetition draws 10 % of every file's rows, embeds the
states and, apart from them, the actions of all levels together in the plane (t-SNE), and cuts each embedding into
clusters (agglomerative). A level covers a cluster with more than 50 samples in it. The Markdown table gives the share
of the clusters that each level covers, in per cent: mean ± standard deviation over 10 repetitions. `--json` writes the
same as shares from 0 to 1, {"task", "levels": {level: {"states" | "actions" | "both": {"mean", "std", "values"}}},
"settings"}; `--picture` draws the first repetition's embeddings, coloured by level.

The 50 samples are a fixed number, so a coverage depends on the rows a draw, on each level's size and on the number of
clusters: compare only figures of the same settings.

"[ours]" marks what the paper leaves open:
- A draw has at most --max_rows rows, shared in proportion to the levels' rows: agglomerative clustering keeps a number
  for every pair of rows (20,000 rows took 3.2 GB), and t-SNE of 6,000 rows took 41 s on one core. [ours]
- 20 clusters an embedding: a level can cover no more of them than its drawn rows allow at over 50 each. The tool says
  where that limits a level. [ours]
- Ward's linkage; before t-SNE every dimension gets zero mean and unit variance; perplexity 30. [ours]
- One or two dimensions are clustered as they are: t-SNE would reduce nothing. [ours]
- `both`, the one figure for the gain: the mean of a level's shares of the states' and of the actions' clusters. [ours]

--gain: a CSV file with the columns task, level, gain (score with SAMG minus score without it) and coverage (a share
from 0 to 1); others are ignored. Where coverage is missing or empty, `both` of that task and level is taken from the
--coverage files. The picture has a small mark for each row and a large one for each level's mean, with the standard
deviations as bars [ours]; the table on stdout gives the latter. Needs requirements-dev.txt.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import h5py
import matplotlib
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from sklearn.cluster import AgglomerativeClustering
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

COMPARABLE = ("share", "min_samples", "clusters", "max_rows", "perplexity")  # settings that a coverage depends on
SPACES = {"states": "observations", "actions": "actions"}  # what is clustered, each on its own: its HDF5 key


def fail(message: str) -> NoReturn:
    raise SystemExit(f"error: {message}")


# --- Data
def read_level(path: Path) -> dict[str, np.ndarray]:
    """States (n, obs_dim) and actions (n, act_dim) of one data set, float32."""
    try:
        with h5py.File(path) as file:
            for key in SPACES.values():
                array = file.get(key)
                if not (isinstance(array, h5py.Dataset) and array.ndim == 2 and array.dtype.kind in "fiu"):
                    fail(f"{path} is not in D4RL's layout: {key} is no array of numbers with a row a step")
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is reported below
                level = {space: file[key][()].astype(np.float32, copy=False) for space, key in SPACES.items()}
    except OSError as error:
        fail(f"cannot read {path} as HDF5 ({error})")
    for space, rows in level.items():
        if not rows.size or len(rows) != len(level["states"]):
            fail(f"{path}: {len(level['states'])} rows of states, {space} of shape {rows.shape}")
        if not np.isfinite(rows).all():
            fail(f"{path}: {space} are not finite in row {np.argwhere(~np.isfinite(rows))[0][0]}")
    return level


def read_levels(words: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """The data sets of LEVEL=FILE words, which must be of one task."""
    paths = {}
    for word in words:
        level, _, path = word.partition("=")
        if not (level and path):
            fail(f"--data takes LEVEL=FILE, such as medium=hopper_medium.hdf5, not {word!r}")
        if level in paths:
            fail(f"--data names the level {level!r} twice")
        paths[level] = Path(path)
    levels = {level: read_level(path) for level, path in paths.items()}
    shapes = {level: tuple(rows.shape[1] for rows in data.values()) for level, data in levels.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{level} {obs_dim} and {act_dim}" for level, (obs_dim, act_dim) in shapes.items())
        fail(f"the files are of different tasks; dimensions of states and actions: {listed}")
    return levels


def draw_sizes(rows: list[int], share: float, max_rows: int) -> list[int]:
    """Rows that a draw takes from each level: that share of it, or an equal, smaller share of all levels."""
    share = min(share, max_rows / sum(rows))
    return [max(1, math.floor(n * share + 1e-9)) for n in rows]  # 1e-9: 0.29 * 100 is 28.999...


# --- Coverage
def embed(rows: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Rows (n, d) in the plane, (n, 2): by t-SNE, or as they are where d is 1 or 2."""
    spread = rows.std(axis=0, dtype=np.float64)
    rows = ((rows - rows.mean(axis=0, dtype=np.float64)) / np.where(spread > 0, spread, 1)).astype(np.float32)
    if rows.shape[1] > 2:
        return TSNE(perplexity=perplexity, random_state=seed).fit_transform(rows)
    return np.pad(rows, ((0, 0), (0, 2 - rows.shape[1])))


def find_clusters(embedding: np.ndarray, n_clusters: int) -> np.ndarray:
    """The number of each row's cluster, (n,), from 0 to n_clusters - 1."""
    return AgglomerativeClustering(n_clusters, linkage="ward").fit_predict(embedding)


def covered(clusters: np.ndarray, levels: np.ndarray, n_clusters: int, n_levels: int, min_samples: int) -> np.ndarray:
    """Share of the clusters in which each level has more than min_samples rows, (n_levels,); both inputs (n,)."""
    counts = np.zeros((n_levels, n_clusters), int)
    np.add.at(counts, (levels, clusters), 1)
    return (counts > min_samples).mean(axis=1)


def measure(levels: dict[str, dict[str, np.ndarray]], args: argparse.Namespace) -> tuple[dict, dict, np.ndarray]:
    """Coverage by level, as --json has it, and of the first repetition the embeddings and each row's level."""
    rows = [len(data["states"]) for data in levels.values()]
    sizes = draw_sizes(rows, args.share, args.max_rows)
    say_limits(levels, rows, sizes, args)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    values = {space: np.zeros((args.repetitions, len(sizes))) for space in SPACES}
    pictured = {}
    with tqdm(total=args.repetitions * len(SPACES), desc="t-SNE and clusters", smoothing=0) as bar:
        for repetition in range(args.repetitions):
            random = np.random.default_rng((args.seed, repetition))
            drawn = [random.choice(n, size, replace=False) for n, size in zip(rows, sizes)]
            for space in SPACES:
                sample = np.concatenate([data[space][index] for data, index in zip(levels.values(), drawn)])
                if (sample == sample[0]).all():
                    fail(f"the {space} of a draw are all the same: there is nothing to cluster")
                embedding = embed(sample, args.perplexity, int(random.integers(2**31)))
                clusters = find_clusters(embedding, args.clusters)
                values[space][repetition] = covered(clusters, labels, args.clusters, len(sizes), args.min_samples)
                pictured.setdefault(space, embedding)
                bar.update()
    values["both"] = (values["states"] + values["actions"]) / 2
    result = {}
    for i, level in enumerate(levels):
        result[level] = {"rows": rows[i], "rows_drawn": sizes[i]}
        for space, shares in values.items():
            column = shares[:, i]
            result[level][space] = {"mean": column.mean(), "std": column.std(), "values": column.tolist()}
    return result, pictured, labels


def say_limits(levels: dict, rows: list[int], sizes: list[int], args: argparse.Namespace) -> None:
    """Fail where a draw is too small; say on stderr where its size, and not the data, bounds the coverage."""
    total = sum(sizes)
    if total < args.clusters or total <= args.perplexity:
        fail(f"a draw has {total} rows: it needs {args.clusters} for --clusters and more than --perplexity")
    if args.share * sum(rows) > args.max_rows + len(rows):
        wanted = f"{args.share:.3g} of {sum(rows):,} rows"
        print(f"note: {wanted} is more than --max_rows {args.max_rows:,}: {total:,} are drawn", file=sys.stderr)
    for level, size in zip(levels, sizes):
        if (most := size // (args.min_samples + 1)) < args.clusters:
            limit = f"it can cover at most {most} of {args.clusters} clusters"
            print(f"note: {level} has {size:,} rows in a draw: {limit}", file=sys.stderr)


def coverage_table(levels: dict[str, dict[str, Any]]) -> str:
    """Markdown, in per cent of the clusters."""
    lines = ["| level | rows | rows a draw | states, % | actions, % | both, % |", "|" + " --- |" * 6]
    for level, result in levels.items():
        cells = [f"{100 * result[space]['mean']:.1f} ± {100 * result[space]['std']:.1f}" for space in (*SPACES, "both")]
        lines.append(f"| {level} | {result['rows']:,} | {result['rows_drawn']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_embeddings(embeddings: dict[str, np.ndarray], labels: np.ndarray, levels: dict, task: str) -> plt.Figure:
    figure, panels = plt.subplots(1, len(SPACES), figsize=(12, 6), layout="constrained")
    order = np.random.default_rng(0).permutation(len(labels))  # else the last level hides the others
    colours = np.array([matplotlib.colors.to_rgb(f"C{i}") for i in range(len(levels))])[labels]
    for axes, (space, embedding) in zip(panels, embeddings.items()):
        axes.scatter(*embedding[order].T, c=colours[order], s=4, linewidths=0, alpha=0.7, rasterized=True)
        axes.set_title(f"{task} {space}".strip())
        axes.set(xticks=[], yticks=[])
        for i, (level, result) in enumerate(levels.items()):
            share = f"{100 * result[space]['mean']:.0f} % of the clusters"
            axes.scatter([], [], color=f"C{i}", s=25, label=f"{level}: {share}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False)
    return figure


# --- Gain against coverage
def read_coverage(paths: list[Path]) -> dict[tuple[str, str], float]:
    """(task, level): coverage, of files that --json wrote."""
    coverage, settings = {}, {}
    for path in paths:
        try:
            content = json.loads(path.read_text())
            task, levels = content["task"], content["levels"]
            settings[path] = {name: content["settings"][name] for name in COMPARABLE}
            found = {(task, level): float(result["both"]["mean"]) for level, result in levels.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{path} is no readable file of --json ({error!r})")
        if not task:
            fail(f"{path} does not name its task: measure it again with --task")
        if settings[path] != settings[paths[0]]:
            fail(f"{path} and {paths[0]} do not compare, their settings differ: {settings[path]}, {settings[paths[0]]}")
        if twice := coverage.keys() & found.keys():
            fail(f"{path}: the coverage of {' '.join(min(twice))} is given twice")
        coverage |= found
    return coverage


def read_gains(path: Path, known: dict[tuple[str, str], float]) -> list[tuple[str, str, float, float]]:
    """Rows (task, level, coverage, gain); coverages that the file lacks are taken from `known`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            table, names = list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        fail(f"cannot read {path} ({error})")
    if missing := [name for name in ("task", "level", "gain") if name not in names]:
        fail(f"{path} has no column {', '.join(missing)}")
    if not table:
        fail(f"{path} has no rows")
    rows = []
    for number, row in enumerate(table, start=1):
        task, level = row["task"], row["level"]
        if not (task and level):
            fail(f"{path}, row {number}: task and level must not be empty")
        try:
            coverage = float(row["coverage"]) if row.get("coverage") else known[task, level]
            gain = float(row["gain"])
        except KeyError:
            fail(f"{path}, row {number}: no coverage of {task} {level}, neither there nor in a --coverage file")
        except (TypeError, ValueError):
            fail(f"{path}, row {number}: coverage and gain must be numbers")
        if not (0 <= coverage <= 1 and math.isfinite(gain)):
            fail(f"{path}, row {number}: coverage must be a share from 0 to 1, gain finite")
        rows.append((task, level, coverage, gain))
    return rows


def summarise_gains(rows: list[tuple[str, str, float, float]]) -> dict[str, np.ndarray]:
    """By level, lowest mean coverage first: [[mean, std] of the coverage, [mean, std] of the gain]."""
    numbers = {level: np.array([row[2:] for row in rows if row[1] == level]) for level in {row[1] for row in rows}}
    order = sorted(numbers, key=lambda level: (numbers[level][:, 0].mean(), level))
    return {level: np.array([numbers[level].mean(axis=0), numbers[level].std(axis=0)]).T for level in order}


def gain_table(rows: list[tuple[str, str, float, float]]) -> str:
    lines = ["| level | rows | coverage, % | gain |", "|" + " --- |" * 4]
    for level, ((coverage, spread), (gain, deviation)) in summarise_gains(rows).items():
        n = sum(row[1] == level for row in rows)
        lines.append(f"| {level} | {n} | {100 * coverage:.1f} ± {100 * spread:.1f} | {gain:.1f} ± {deviation:.1f} |")
    return "\n".join(lines)


def draw_gains(rows: list[tuple[str, str, float, float]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    tasks = list(dict.fromkeys(row[0] for row in rows))
    marks = dict(zip(tasks, "osD^vP*Xph<>" * (len(tasks) // 12 + 1)))
    for i, (level, ((coverage, spread), (gain, deviation))) in enumerate(summarise_gains(rows).items()):
        for task in tasks:
            points = np.array([row[2:] for row in rows if row[:2] == (task, level)]).reshape(-1, 2)
            axes.scatter(100 * points[:, 0], points[:, 1], marker=marks[task], s=25, color=f"C{i}", alpha=0.5)
        bars = {"xerr": 100 * spread, "yerr": deviation, "markersize": 11, "capsize": 3}
        axes.errorbar(100 * coverage, gain, **bars, fmt="o", color=f"C{i}", label=f"{level} (mean ± std)")
    for task in tasks:
        axes.scatter([], [], marker=marks[task], s=25, color="grey", label=task)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xlabel("clusters covered by the offline data, %")
    axes.set_ylabel("gain in score")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


# --- Files and command line
def write_whole(path: Path, content: bytes) -> None:
    """Write aside and rename, so that a file under its final name is always complete."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        fail(f"cannot write {path}: {error}")
    finally:
        aside.unlink(missing_ok=True)


def write_picture(path: Path, figure: plt.Figure) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=110)
    plt.close(figure)
    write_whole(path, image.getvalue())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    command = parser.add_mutually_exclusive_group(required=True)
    command.add_argument("--data", nargs="+", metavar="LEVEL=FILE", help="measure the coverage of these data sets")
    command.add_argument("--gain", type=Path, metavar="CSV", help="draw the gain of this file against the coverage")
    parser.add_argument("--picture", type=Path, help="picture to write, such as coverage.png")
    parser.add_argument("--task", default="", help="with --data: the task's name in --json and in the picture")
    parser.add_argument("--json", type=Path, help="with --data: file to write the coverage to")
    parser.add_argument("--coverage", type=Path, nargs="+", default=[], help="with --gain: files that --json wrote")
    for name, default, text in (
        ("share", 0.1, "share of every data set's rows in a draw"),
        ("repetitions", 10, "draws"),
        ("min_samples", 50, "a level covers a cluster with more samples than this in it"),
        ("clusters", 20, "clusters an embedding [ours]"),
        ("max_rows", 20_000, "rows in a draw at most, all levels together [ours]"),
        ("perplexity", 30.0, "t-SNE's [ours]"),
        ("seed", 0, "draws and t-SNE"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    args = parser.parse_args()

    if not 0 < args.share <= 1:
        fail("--share must be above 0 and at most 1")
    if not 1 <= args.perplexity < math.inf:
        fail("--perplexity must be at least 1")
    for name, least in (("repetitions", 1), ("min_samples", 0), ("clusters", 2), ("max_rows", 2), ("threads", 1)):
        if getattr(args, name) < least:
            fail(f"--{name} must be at least {least}")
    if not 0 <= args.seed < 2**31:
        fail("--seed must be from 0 to 2**31 - 1")
    if args.gain and args.json or args.data and args.coverage:
        fail("--json goes with --data, --coverage with --gain")
    if args.gain and not args.picture:
        fail("--gain needs --picture")
    for path in filter(None, (args.json, args.picture)):
        if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            fail(f"cannot write {path}: no such writable directory, or it is one itself")
    kinds = FigureCanvasBase.get_supported_filetypes()
    if args.picture and args.picture.suffix[1:] not in kinds:
        fail(f"--picture must end in one of {', '.join(kinds)}")
    return args


def main() -> None:
    args = parse_args()
    if args.gain:
        rows = read_gains(args.gain, read_coverage(args.coverage))
        print(gain_table(rows))
        return write_picture(args.picture, draw_gains(rows))
    levels = read_levels(args.data)
    try:
        with threadpool_limits(args.threads):
            result, embeddings, labels = measure(levels, args)
    except MemoryError:
        fail("not enough memory for the pairs of a draw's rows: lower --max_rows")
    print(coverage_table(result))
    if args.json:
        names = (*COMPARABLE, "repetitions", "seed")
        content = {"task": args.task, "levels": result, "settings": {name: getattr(args, name) for name in names}}
        write_whole(args.json, json.dumps(content, indent=2, allow_nan=False).encode())
    if args.picture:
        write_picture(args.picture, draw_embeddings(embeddings, labels, result, args.task))


if __name__ == "__main__":
    main()
