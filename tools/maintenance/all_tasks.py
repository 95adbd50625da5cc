"""Every algorithm on every task of the paper, each briefly, one after another: what runs here, and how long it takes.

    python tools/maintenance/all_tasks.py                                # all of them, on random data made here
    python tools/maintenance/all_tasks.py --data ~/.d4rl/datasets --json s.json  # on D4RL's data or anybody's, by name
    python tools/maintenance/all_tasks.py --algorithms awac iql --tasks hopper_medium antmaze_umaze

A cell of the table is one algorithm's file with its configs/<algorithm>/<task>.yaml, networks and batches at full size,
in a process and a folder of its own: 200 offline updates, 50 of a VAE, and 300 online steps, the last 200 of a guided
one with an update each and two periods of the coefficient; one episode is evaluated before and one after them. The
table has the seconds of wall-clock from the process's start to its end. All this says what works, and nothing about
learning.

Without --data, each task gets whole episodes of random actions in its own simulator, 2,000 rows or a few more, in
D4RL's HDF5 layout. --data names a folder with files under D4RL's names or as <env>.hdf5, or Cal-QL's for the binary
Adroit tasks. --json also has each cell's CPU seconds. Exit status 1 if a cell fails. Needs requirements.txt and
`pip install ./d4rl_envs`, or D4RL's own stack (tools/maintenance/install_d4rl.sh).
"""

import argparse
import difflib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import h5py
import mujoco
import numpy as np
import yaml
from tqdm import tqdm

from d4rl_envs import sources

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("awac", "iql", "cql", "calql")  # of the first columns; the others follow by name
TASKS = (
    *(f"{robot}_{level}" for robot in ("hopper", "halfcheetah", "walker2d")
      for level in ("medium", "medium_replay", "medium_expert")),
    *("antmaze_umaze", "antmaze_umaze_diverse", "antmaze_medium_play", "antmaze_medium_diverse"),
    *("antmaze_large_play", "antmaze_large_diverse", "pen_binary", "door_binary", "relocate_binary"),
)  # fmt: skip
# What is not as in configs/
SETTINGS = {
    "offline_iterations": 200,
    "vae_iterations": 50,
    "online_iterations": 300,
    "warmup_steps": 100,
    "coefficient_frequency": 150,
    "log_frequency": 100,
    "eval_frequency": 300,
    "n_test_episodes": 1,
}
ROWS = 2000  # of random data a task


def script(algorithm: str) -> Path:
    """Its file: <algorithm>_samg.py, or <algorithm>.py for one without guidance."""
    guided = ROOT / "algorithms" / f"{algorithm}_samg.py"
    return guided if guided.is_file() else guided.with_name(f"{algorithm}.py")


def find_algorithms() -> tuple[str, ...]:
    """All that have a file and a folder of configurations."""
    names = {path.stem.removesuffix("_samg") for path in (ROOT / "algorithms").glob("*.py")}
    return tuple(sorted((n for n in names if (ROOT / "configs" / n).is_dir()), key=lambda n: ((*ORDER, n).index(n), n)))


ALGORITHMS = find_algorithms()


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit("error: " + " ".join(message.split()))


# --- Cells
@dataclass
class Cell:
    algorithm: str
    task: str
    env: str
    seconds: float | None = None  # wall-clock; None: it has not run to its end
    cpu_seconds: float | None = None
    failed: str = ""  # why, in a line

    @property
    def script(self) -> Path:
        return script(self.algorithm)

    def show(self) -> str:
        if self.failed:
            return f"failed: {self.failed.replace('|', '/')}"
        return f"{self.seconds:.0f}" if self.seconds else ""


def config_file(algorithm: str, task: str) -> Path:
    return ROOT / "configs" / algorithm / f"{task}.yaml"


def plan(algorithms: list[str], tasks: list[str]) -> list[Cell]:
    """The cells in the order in which they run, a task's one after another, as they share its data."""
    for wanted, there in ((algorithms, ALGORITHMS), (tasks, TASKS)):
        if unknown := [name for name in wanted if name not in there]:
            near = "".join(f" (did you mean {name}?)" for name in difflib.get_close_matches(unknown[0], there, n=1))
            fail(f"there is no {unknown[0]!r}{near}; there are {', '.join(there)}")
    pairs = [(name, task) for task in TASKS if task in tasks for name in ALGORITHMS if name in algorithms]
    return [Cell(*pair, yaml.safe_load(config_file(*pair).read_text())["env"]) for pair in pairs]


def children_cpu() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(cell: Cell, dataset: Path | str, folder: Path, device: str, limit: float) -> str:
    """Run a cell with its runs below `folder`, and note how long it took, or why it failed. Returns its stderr."""
    words = ["--config", config_file(cell.algorithm, cell.task)]
    fields = re.findall(r"^    (\w+): ", cell.script.read_text(), re.M)  # without guidance there are fewer
    settings = {name: value for name, value in SETTINGS.items() if name in fields}
    settings |= {"device": device, "dataset": dataset, "runs_dir": folder / cell.algorithm}
    words += [f"--{name}={value}" for name, value in settings.items()]
    start, cpu_start = time.perf_counter(), children_cpu()
    try:
        done = subprocess.run(
            [sys.executable, cell.script, *words], timeout=limit, cwd=folder, env=os.environ | {"TQDM_DISABLE": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        cell.failed = f"not at its end after {limit:g} s"
        return (expired.stderr or b"").decode(errors="replace")
    if done.returncode < 0:
        cell.failed = f"killed by {signal.Signals(-done.returncode).name}"
    elif done.returncode:
        cell.failed = [f"exit status {done.returncode}", *filter(str.strip, done.stderr.splitlines())][-1].strip()
    elif not list((folder / cell.algorithm).rglob("summary.json")):
        cell.failed = "it ended without a summary.json"
    else:
        cell.seconds, cell.cpu_seconds = time.perf_counter() - start, children_cpu() - cpu_start
    return done.stderr


# --- Data
@cache
def load_algorithm(path: Path) -> ModuleType:
    """An algorithm's file, for its simulators and its search for data."""
    spec = importlib.util.spec_from_file_location(f"all_tasks_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(module: ModuleType, env: str, n_rows: int, path: Path) -> Path:
    """Write whole episodes of random actions, n_rows rows or as many more as the last one has, in D4RL's layout."""
    simulator, rng, rows, seed = module.Environment(env), np.random.default_rng(0), [], 0
    while len(rows) < n_rows:
        observation, over = simulator.reset(seed), False
        while not over:
            action = rng.uniform(simulator.action_low, simulator.action_high)
            successor, reward, terminated, truncated = simulator.step(action)
            rows.append((observation, action, reward, successor, terminated, truncated and not terminated))
            observation, over = successor, terminated or truncated
        seed += 1
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    with h5py.File(path, "w") as file:
        for name, column in zip(names, zip(*rows)):
            file[name] = np.array(column, bool if name in ("terminals", "timeouts") else np.float32)
    return path


def find_data(cell: Cell, data: Path | None, folder: Path) -> Path | str:
    """What a cell's --dataset is: of the folder `data`, or collected below `folder`."""
    module = load_algorithm(cell.script)
    if data:
        try:
            return sources.find(data, cell.env)
        except sources.SourceError as error:
            fail(str(error))
    path = folder / f"{cell.env}.hdf5"
    return path if path.is_file() else collect(module, cell.env, ROWS, path)


# --- Result
def table(cells: list[Cell]) -> str:
    """Markdown: a row a task, a column an algorithm."""
    algorithms = [name for name in ALGORITHMS if any(cell.algorithm == name for cell in cells)]
    lines = [f"| seconds | {' | '.join(algorithms)} |", f"| --- |{' ---: |' * len(algorithms)}"]
    for task in dict.fromkeys(cell.task for cell in cells):
        lines.append(f"| {task} | {' | '.join(cell.show() for cell in cells if cell.task == task)} |")
    return "\n".join(lines)


def write_json(path: Path, cells: list[Cell], settings: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "w") as file:
            json.dump({"cells": [asdict(cell) for cell in cells], "settings": settings}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        fail(f"cannot write {path}: {error}")
    finally:
        aside.unlink(missing_ok=True)


# --- Main
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, help=f"only these of {', '.join(ALGORITHMS)}")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="only these, by their file's name in configs/")
    parser.add_argument("--data", type=Path, help="folder of data sets (default: random data, collected now)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a cell may take (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file, too")
    args = parser.parse_args()
    if args.data and not args.data.is_dir():
        fail(f"there is no folder {args.data}")
    args.data = args.data and args.data.absolute()  # a cell runs in a folder of its own
    if args.json and (args.json.is_dir() or not os.access(args.json.absolute().parent, os.W_OK)):
        fail(f"cannot write {args.json}: it is a folder, or its folder is not there or not writable")
    if not args.limit > 0:
        fail(f"--limit must be positive, it is {args.limit:g}")
    return args


def stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    args = parse_args()
    cells = plan(args.algorithms, args.tasks)
    spec = importlib.util.find_spec("d4rl_envs")
    if not (spec and spec.origin) and not all(map(importlib.util.find_spec, ("gym", "d4rl"))):
        fail("the tasks need D4RL's simulators: pip install ./d4rl_envs")
    signal.signal(signal.SIGTERM, stop)
    mujoco.set_mju_user_warning(lambda message: None)  # else it writes MUJOCO_LOG.TXT
    stopped, start = False, time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="all_tasks_") as temporary, tqdm(total=len(cells), unit="cell") as bar:
        try:
            for cell in cells:
                bar.set_description(f"{cell.task} {cell.algorithm}")
                messages = ""
                with tempfile.TemporaryDirectory(dir=temporary) as folder:
                    try:
                        dataset = find_data(cell, args.data, Path(temporary))
                    except (SystemExit, Exception) as error:  # of a simulator, or no such data
                        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
                        cell.failed = " ".join(f"{kind}{error}".split())
                    else:
                        messages = run(cell, dataset, Path(folder), args.device, args.limit)
                if cell.failed:
                    text = messages.strip() or cell.failed
                    bar.write(f"{cell.task} {cell.algorithm} failed: {text}", file=sys.stderr)
                bar.update()
        except KeyboardInterrupt:
            stopped = True
    failed, done = sum(bool(cell.failed) for cell in cells), sum(bool(cell.seconds) for cell in cells)
    print(table(cells))
    minutes, cpu_minutes = (time.perf_counter() - start) / 60, children_cpu() / 60
    print(f"\n{done} of {len(cells)} ran to their end, in {minutes:.1f} minutes, {cpu_minutes:.1f} of them of CPU")
    if args.json:
        data = str(args.data) if args.data else f"random actions, {ROWS} rows"
        write_json(args.json, cells, SETTINGS | {"device": args.device, "data": data})
    if stopped or failed:
        fail("stopped" if stopped else f"{failed} of {len(cells)} failed")


if __name__ == "__main__":
    main()
