"""What report.py knows of the runs: their folders read, their arms, and the statistics over seeds and tasks."""

import csv
import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from plot import read_curve, read_rows
from scipy import stats

from d4rl_envs import sources

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "algorithms"))
from awac_samg import COEFFICIENTS, fail  # noqa: E402  (found only now)

# The paper's column for an algorithm; a field that only this algorithm's configuration has; the name of its arms.
ALGORITHMS = {
    "cql": ("cql", "cql_alpha"),
    "awac": ("awac", "awac_lambda"),
    "iql": ("iql", "iql_tau"),
    "calql": ("cal_ql", "is_sparse_reward"),
    "td3_bc": ("td3_bc", "bc_decay"),
    "spot": ("spot", "lambd"),
    "wsrl": ("wsrl", "utd"),
    "edis": ("edis", "generated"),
}
# Fields that do not change what a run computes, apart from its seed.
BOOKKEEPING = {
    *("seed", "name", "runs_dir", "resume", "offline_checkpoint", "eval_only", "device", "threads", "wandb", "project"),
    *("group", "checkpoint_frequency", "log_frequency"),
}
# Fields that mean nothing without SAMG.
SAMG_ONLY = rf"({'|'.join(COEFFICIENTS)}|fit|adapt|guidance|p|refresh)_.*|coefficient.*|mastered_share"
PAPER_STEPS = {1: 200_000, 2: 200_000, 3: 500_000}  # online steps of each of the paper's tables
NEEDED = {"env", "dataset", "offline_iterations", "online_iterations"}
CURVES = ("score", "p_mean", "p_share")
RESAMPLES = 2_000


# --- Runs
@dataclass
class Run:
    """One folder. `state` is finished, unfinished, diverged or failed; only finished runs are ever averaged."""

    place: str  # the folder, relative to the folder of all runs
    env: str
    algorithm: str  # of ALGORITHMS; '' if nothing tells
    arm: str  # the run's name, without its seed
    seed: int
    state: str
    detail: str  # one line, of what is not as it should be
    config: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # online: steps and values of each of CURVES


def find_runs(root: Path) -> list[Run]:
    """All runs below a folder, however deep, in the order of their paths."""
    runs = []
    for path, folders, files in os.walk(root):
        folders.sort()
        name = re.fullmatch(r"(.+)-seed(\d+)", Path(path).name)
        if name and {"config.yaml", "metrics.csv", "summary.json", "error.txt"} & set(files):
            folders.clear()
            runs.append(read_run(root, Path(path), name[1], int(name[2])))
    return sorted(runs, key=lambda run: run.place)


def read_run(root: Path, folder: Path, arm: str, seed: int) -> Run:
    files = {name: folder / name for name in ("config.yaml", "summary.json", "metrics.csv", "error.txt")}
    found = {name: path for name, path in files.items() if path.is_file()}
    try:
        config = yaml.safe_load(found["config.yaml"].read_text()) if "config.yaml" in found else {}
        summary = json.loads(found["summary.json"].read_text()) if "summary.json" in found else {}
        rows = read_rows(folder) if "metrics.csv" in found else []
        online = [row for row in rows if row["phase"] == "online"]
        curves = {column: [np.array(part) for part in read_curve(online, column)[:2]] for column in CURVES if online}
        if not (isinstance(config, dict) and isinstance(summary, dict)):
            raise ValueError("config.yaml or summary.json does not hold fields")
        if config and (lacking := sorted(NEEDED - config.keys())):
            raise ValueError(f"config.yaml has no {', '.join(lacking)}")
    except (OSError, KeyError, ValueError, TypeError, yaml.YAMLError) as error:
        fail(f"cannot read the run in {folder} ({type(error).__name__}: {error}); repair it or move it away")
    algorithm = summary.get("algorithm", "").removesuffix("_samg")
    marks = [name for name, (_, mark) in ALGORITHMS.items() if mark in config]
    algorithm = algorithm or (marks or [name for name in ALGORITHMS if name == arm.split("-")[0]] or [""])[-1]
    state, detail = judge(rows, config, summary, found)
    env, place = config.get("env", folder.parent.name), folder.relative_to(root).as_posix()
    return Run(place, env, algorithm, arm, seed, state, detail, config, summary, curves)


def judge(rows: list[dict[str, str]], config: dict, summary: dict, found: dict[str, Path]) -> tuple[str, str]:
    """State and detail of a run. summary.json is a run's last file: with it, an older error has been overcome."""
    error = ""
    if "error.txt" in found:
        lines = found["error.txt"].read_text(errors="replace").split("\n")
        error = next((line.strip() for line in reversed(lines) if line.strip()), "error.txt is empty")
    last = rows[-1] if rows else {}
    if bad := [name for name, value in last.items() if str(value).strip("+-").lower() in ("nan", "inf", "infinity")]:
        return "diverged", f"{bad[0]} is {last[bad[0]]} in {last['phase']} step {last['step']}"
    if summary:
        if summary.get("final_score") is None and config.get("online_iterations"):
            return "diverged", "summary.json has no final score"
        return "finished", f"finished in a later try; before: {error}" if error else ""
    if error:
        return "failed", error
    phase = last.get("phase", "")
    total = config.get(f"{phase}_iterations", "?")
    return "unfinished", f"at {phase} step {last['step']} of {total}" if last else "no row of metrics.csv yet"


# --- Arms
@dataclass
class Arm:
    """The runs of one algorithm, environment and name; all their configurations agree, or none is counted."""

    env: str
    algorithm: str
    label: str  # the name, with what else is needed to know the arm: its algorithm, its tree
    name: str
    runs: list[Run]
    seeds: list[int]  # that should be there
    differing: list[str] = field(default_factory=list)  # fields in which the runs' configurations disagree

    def __post_init__(self) -> None:
        configs = [settings(run.config) for run in self.runs if run.config]
        self.config = configs[0] if configs else {}
        names = sorted(set().union(*configs))
        self.differing = [name for name in names if len({repr(config.get(name)) for config in configs}) > 1]
        self.counted = [] if self.differing else [run for run in self.runs if run.state == "finished"]

    def values(self, metric: str) -> np.ndarray:
        """One number for each counted run that has it, by seed; dots lead into summary.json's parts."""
        found = []
        for run in sorted(self.counted, key=lambda run: run.seed):
            value: Any = run.summary
            for part in metric.split("."):
                value = (value or {}).get(part)
            found += [] if value is None else [float(value)]
        return np.array(found)

    @property
    def short(self) -> str:
        """The label without the algorithm, for where that is said already."""
        return self.label.removeprefix(f"{self.algorithm}-")

    @property
    def missing(self) -> list[int]:
        return sorted(set(self.seeds) - {run.seed for run in self.runs})

    def gaps(self) -> str:
        """What keeps seeds from being counted, such as '1 unfinished, 1 missing'; '' if nothing."""
        if self.differing:
            return f"configurations differ in {', '.join(self.differing)}"
        counts = Counter(run.state for run in self.runs if run.state != "finished")
        counts["missing"] = len(self.missing)
        return ", ".join(f"{n} {state}" for state, n in sorted(counts.items()) if n)

    def seeds_text(self) -> str:
        """'5' of 5; else '3/5: 1 failed, 1 missing'."""
        n, wanted = len(self.counted), len(set(self.seeds) | {run.seed for run in self.runs})
        return f"{n}/{wanted}: {self.gaps()}" if self.gaps() else str(n)

    @property
    def offline_only(self) -> bool:
        """An offline phase that others start from, as sweep.py makes them: it has no score online."""
        return self.config.get("online_iterations") == 0

    @property
    def normalized(self) -> bool:
        """Its score is out of 100: only then a run has a regret."""
        return len(self.values("regret")) > 0

    def incomparable(self, table: int, offline: bool = False) -> str:
        """Why its figures, or its `offline` one, must not be held against that table of the paper; '' if they may."""
        config, address = self.config, next(iter(sources.addresses(self.env)), "")
        if not config:
            return "no config.yaml"
        if not address or Path(config["dataset"]).name not in ("", Path(address).name):
            return f"not on D4RL's own data set ({config['dataset'] or 'none'})"
        for phase, steps in (("offline", 1_000_000), ("online", PAPER_STEPS[table])):
            if (own := config[f"{phase}_iterations"]) != steps and not (offline and phase == "online"):
                return f"{own:,} {phase} steps, the paper has {steps:,}"
        return ""


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a run's numbers; of the data set its file name, for its folder differs between machines."""
    config = config | {"dataset": Path(config.get("dataset") or "").name}
    without = "|".join(BOOKKEEPING) + ("" if config.get("samg", True) else f"|{SAMG_ONLY}")
    return {name: value for name, value in config.items() if not re.fullmatch(without, name)}


def group(runs: list[Run], n_seeds: int = 0) -> list[Arm]:
    """Arms by environment, algorithm and name. Expected are the seeds 0 to n_seeds - 1, or all that the env has."""
    arms, seeds = defaultdict(list), defaultdict(set)
    for run in runs:
        arms[run.env, run.algorithm, run.arm].append(run)
        seeds[run.env].add(run.seed)
    result = []
    for (env, algorithm, name), members in sorted(arms.items()):
        wanted = list(range(n_seeds)) or sorted(seeds[env])
        trees = defaultdict(list)  # the same seed twice: one arm for each tree of runs
        twice = len({run.seed for run in members}) < len(members)
        for run in members:
            trees["/".join(run.place.split("/")[:-2]) if twice else ""].append(run)
        for tree, some in sorted(trees.items()):
            if len({run.seed for run in some}) < len(some):
                places = ", ".join(run.place for run in some)
                fail(f"{name} on {env} has a seed twice: {places}; move one of them away")
            label = name if name.split("-")[0] == algorithm else f"{algorithm or 'unknown'} {name}"
            result.append(Arm(env, algorithm, f"{tree}/{label}" if tree else label, name, some, wanted))
    return result


def arm_of_column(arms: list[Arm], env: str, algorithm: str, guided: bool) -> list[Arm]:
    """The arm of a column of the paper, as a list: empty if there is none, several if it is not clear which."""
    usual = (f"{algorithm}-samg",) if guided else (algorithm, f"{algorithm}-vanilla")
    mine = [arm for arm in arms if (arm.env, arm.algorithm) == (env, algorithm)]
    if named := [arm for arm in mine if arm.name in usual]:
        return named
    plain = {"samg": False, "keep_offline_data": True}  # also what holds for an algorithm without these fields
    want = {"samg": True, "coefficient": "vae"} if guided else plain
    configs = [(arm, plain | arm.config) for arm in mine if arm.config]
    return [arm for arm, config in configs if all(config[name] == value for name, value in want.items())]


def one_field_apart(arms: list[Arm]) -> dict[tuple[str, str], list[tuple[str, list[tuple[Any, Arm]]]]]:
    """Arms that differ in one field of the configuration: {(algorithm, field): [(env, [(value, arm), ...]), ...]}.

    For the field samg, whose arms may differ in SAMG's own fields, these are the two arms of the paper's tables.
    """
    found = defaultdict(list)
    by_task = defaultdict(list)
    for arm in arms:
        if arm.counted:
            by_task[arm.algorithm, arm.env].append(arm)
    for (algorithm, env), mine in by_task.items():
        pair = [arm_of_column(mine, env, algorithm, guided) for guided in (False, True)]
        if [len(some) for some in pair] == [1, 1]:
            found[algorithm, "samg"].append((env, [("vanilla", pair[0][0]), ("SAMG", pair[1][0])]))
        for name in sorted(set().union(*(arm.config for arm in mine)) - {"samg"}):
            rest = defaultdict(list)
            for arm in mine:
                others = {key: value for key, value in arm.config.items() if key != name}
                rest[repr(sorted(others.items()))].append((arm.config.get(name), arm))
            for pairs in rest.values():
                if len({repr(value) for value, _ in pairs}) > 1:
                    pairs.sort(key=lambda pair: (isinstance(pair[0], str), pair[0]))
                    found[algorithm, name].append((env, pairs))
    return dict(sorted(found.items()))


# --- The paper
def read_paper() -> dict[tuple[int, str, str], tuple[float, float]]:
    """{(table, task, column): (mean, std)} of paper_tables.csv."""
    lines = Path(__file__).with_name("paper_tables.csv").read_text().splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(int(r["table"]), r["task"], r["column"]): (float(r["mean"]), float(r["std"])) for r in rows}


# --- Statistics
def spread(values: np.ndarray) -> float:
    """The sample standard deviation, nan for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else np.nan


def interquartile_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half of all runs of all tasks (Agarwal et al., 2021)."""
    return stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def pooled_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.concatenate(tasks, axis).mean(axis)


def optimality_gap(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """By how much runs fall short of 100, on average; what lies above 100 does not make up for it."""
    return 100 - np.minimum(np.concatenate(tasks, axis), 100).mean(axis)


def interval(tasks: list[np.ndarray], statistic: Any) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the bootstrap that draws seeds task by task; nan if a task has one seed only."""
    if any(task.shape[-1] < 2 for task in tasks):
        none = np.full(tasks[0].shape[:-1], np.nan)
        return none, none
    options = {"n_resamples": RESAMPLES, "batch": 200, "method": "percentile", "rng": np.random.default_rng(0)}
    bounds = stats.bootstrap(tasks, statistic, vectorized=True, axis=-1, **options).confidence_interval
    return bounds.low, bounds.high


def mean_curve(arm: Arm, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all counted runs have, and their values, (steps, runs); empty if there are none."""
    curves = [run.curves[column] for run in arm.counted if column in run.curves and len(run.curves[column][0])]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.stack([values[np.isin(at, steps)] for at, values in curves], -1)
