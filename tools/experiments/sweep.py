"""Run a sweep, algorithms x tasks x arms x seeds, on this machine or on a Ray cluster; each offline phase runs once.

    python tools/experiments/sweep.py sweeps/smoke.yaml --dry_run   # what would run
    python tools/experiments/sweep.py sweeps/smoke.yaml             # the same command goes on after any interruption
    python tools/experiments/sweep.py sweeps/paper.yaml --tasks hopper_medium walker2d_medium --seeds 0 1
    python tools/experiments/sweep.py sweeps/paper.yaml --address auto   # on a Ray cluster

For each algorithm, task and seed there is one offline phase; where arms need a fitted coefficient, one fit of each
kind, which starts from the phase's checkpoint; and one online run an arm, which starts from the fit's or the phase's.
Each is a process of the algorithm's own file, and its result is what the same configuration gives in one go.
docs/sweeps.md tells the rest. Needs requirements.txt and ray[default].
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml

from d4rl_envs import sources

ROOT = Path(__file__).resolve().parents[2]

# Fields that an offline phase and the fit of a coefficient do not look at: arms that differ in these alone share both.
ONLINE_ONLY = set(
    """
    online_iterations warmup_steps policy_hold_steps overlap buffer_size samg keep_offline_data coefficient
    p_threshold coefficient_frequency refresh_offline_critic guidance_steps guidance_fade mastered_share
    adapt_iterations adapt_learning_rate adapt_hold adapt_max_drop expl_noise noise_clip cql_alpha_online
    mixing_ratio online_discount reset_optimizers online_data keep_last update_after bc_decay bc_decay_end
    bc_decay_steps lambd_cool lambd_end generated retrain_frequency n_generated generation_batch sample_steps
    model_terminals diffusion_iterations diffusion_lr denoiser_width denoiser_layers embed_dim state_weight
    action_weight next_state_weight max_guidance guidance_form energy_updates energy_hidden_dim energy_lr
    n_negatives energy_pool pool_steps positive_rows
    """.split()
)
OFFLINE_TOO = {"noise_clip": "policy_noise"}  # but these, in an algorithm that has the other field
# Fields that change where and how a run runs, not what it computes.
BOOKKEEPING = {"device", "threads", "graphs", "runs_dir", "name", "resume", "offline_checkpoint", "eval_only"}
BOOKKEEPING |= {"checkpoint_frequency", "evaluate_beside", "wandb", "project", "group"}
SET_BY_THE_SWEEP = {"seed", "runs_dir", "name", "resume", "offline_checkpoint", "eval_only"}
UNFITTED = ("even", "random", "none")  # coefficients that look at no data
SAME_FIT = {"static": "vae"}  # coefficients that are fitted as another one is

LOCK_PATIENCE = 60  # seconds in which a run waits for another process that has its folder, before others may try
# Starts a run that dies with its parent, even if that is killed; without the hazards of code between fork and exec.
GUARD = """import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() != int(sys.argv[1]):
    sys.exit("its parent is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"""


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit("error: " + " ".join(message.split()))


# --- The sweep's file
@dataclass
class Sweep:
    path: Path
    runs_dir: str
    algorithms: dict[str, dict]  # name or path -> overrides; so are tasks and arms
    tasks: dict[str, dict]
    arms: dict[str, dict]
    seeds: list[int]
    own_arms: dict[str, dict[str, dict]] = field(default_factory=dict)  # of an algorithm, in place of `arms`
    overrides: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, float] = field(default_factory=lambda: {"cpus": 1, "gpus": 0})
    retries: int = 3

    def arms_of(self, algorithm: str) -> dict[str, dict]:
        return self.own_arms.get(algorithm, self.arms)

    def cells(self) -> list[tuple[str, str, str]]:
        """(algorithm, task, arm) of all runs of a seed."""
        return [(name, *pair) for name in self.algorithms for pair in product(self.tasks, self.arms_of(name))]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep's YAML; what is in the overrides is checked by the algorithms' own files, in plan()."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"cannot read the sweep {path}: {error}")
    names = [entry.name for entry in dataclasses.fields(Sweep) if entry.name != "path"]
    if not isinstance(content, dict):
        fail(f"{path} holds no sweep; it needs algorithms, tasks, arms and seeds")
    if unknown := sorted(map(str, content.keys() - set(names))):
        near = difflib.get_close_matches(unknown[0], names, n=1)
        fail(f"{path}: unknown entry {unknown[0]!r}" + (f" (did you mean {near[0]}?)" if near else f"; it has {names}"))
    content = {"runs_dir": f"runs/{path.stem}", "arms": {"samg": {}}} | content
    for name in ("algorithms", "tasks", "arms"):
        content[name] = read_names(path, name, content.get(name))
    own_arms = content["own_arms"] = content.get("own_arms") or {}
    if not isinstance(own_arms, dict) or any(name not in content["algorithms"] for name in own_arms):
        fail(f"{path}: own_arms must be 'algorithm: {{arm: {{field: value}}}}' lines of the sweep's, not {own_arms!r}")
    for name, arms in own_arms.items():
        own_arms[name] = read_names(path, f"own_arms, {name}", arms)
    overrides = content["overrides"] = read_overrides(path, "overrides", content.get("overrides"))
    seeds, retries, resources = content.get("seeds"), content.get("retries", 3), content.get("resources", {})
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        fail(f"{path}: seeds must be a list of whole numbers such as [0, 1, 2], not {seeds!r}")
    if len(set(seeds)) < len(seeds):
        fail(f"{path}: a seed stands twice in {seeds}")
    if type(retries) is not int or retries < 0:
        fail(f"{path}: retries must be a whole number, not {retries!r}")
    if not isinstance(resources, dict) or not all(
        name in ("cpus", "gpus") and type(value) in (int, float) and 0 <= value < math.inf
        for name, value in resources.items()
    ):
        fail(f"{path}: resources must look like {{cpus: 1, gpus: 0.2}}, they are {resources!r}")
    if not isinstance(content["runs_dir"], str) or not content["runs_dir"]:
        fail(f"{path}: runs_dir must name a folder, it is {content['runs_dir']!r}")
    for arm in (arm for arms in (content["arms"], *own_arms.values()) for arm in arms):
        if not re.fullmatch(r"[\w.+-]+", arm) or arm == "offline":
            fail(f"{path}: an arm's name becomes part of a folder's: letters, digits, . + - _, and not {arm!r}")
    content |= {"overrides": overrides, "resources": {"cpus": 1, "gpus": 0} | resources}
    return Sweep(path, **content)


def read_names(path: Path, what: str, value: Any) -> dict[str, dict]:
    """A list of names, or a mapping of names to their overrides, as the latter."""
    if isinstance(value, list):
        if len(set(map(str, value))) < len(value):
            fail(f"{path}: {what}: a name stands twice in {value}")
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, dict) or not value:
        fail(f"{path}: {what} must be a list of names, or 'name: {{field: value}}' lines, not {value!r}")
    return {str(name): read_overrides(path, f"{what}, {name}", overrides) for name, overrides in value.items()}


def read_overrides(path: Path, what: str, value: Any) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict):
        fail(f"{path}: {what}: 'field: value' lines are needed, not {value!r}")
    for name, content in value.items():
        if name in SET_BY_THE_SWEEP:
            fail(f"{path}: {what}: {name} is set by the sweep itself")
        if not isinstance(content, (str, int, float)):
            fail(f"{path}: {what}: {name} needs a plain value, not {content!r}")
    return {str(name): content for name, content in value.items()}


# --- The plan
@dataclass(eq=False)
class Job:
    """One process to run: an offline phase, a fit of a coefficient, or an online run."""

    kind: str  # offline, fit, online
    algorithm: "Algorithm"
    config: Any  # the TrainConfig of its file
    words: list[str]  # the command line that gives this configuration
    parent: "Job | None" = None  # whose offline_checkpoint.pt it starts from
    state: str = "waiting"  # waiting, running, done, failed
    attempts: int = 0
    detail: str = ""  # of its last failure
    node: str = ""  # of Ray, that it ran on

    @property
    def folder(self) -> Path:
        config = self.config
        return Path(config.runs_dir) / config.env.replace("/", "-") / f"{config.name}-seed{config.seed}"

    @property
    def steps(self) -> int:
        """Updates, online environment steps with one update each."""
        config, prefix = self.config, f"{self.kind}_"
        if self.kind == "fit":
            prefix = self.algorithm.module.COEFFICIENTS[config.coefficient].PREFIX
        return getattr(config, f"{prefix}iterations")

    @property
    def label(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


@cache
def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sweep_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"cannot load {path}: {type(error).__name__}: {error}")
    return module


class Algorithm:
    """An algorithm's file, loaded for its TrainConfig and its checks."""

    def __init__(self, name: str) -> None:
        own = name.endswith(".py")
        guided, plain = (ROOT / "algorithms" / f"{name}{end}.py" for end in ("_samg", ""))
        self.path = (Path(name) if own else guided if guided.is_file() else plain).absolute()
        self.name = self.path.stem.removesuffix("_samg")
        if not self.path.is_file():
            there = sorted(path.stem.removesuffix("_samg") for path in (ROOT / "algorithms").glob("*.py"))
            fail(f"there is no algorithm {name!r}; there are {', '.join(there)}, and files of your own by path (x.py)")
        self.module = load_module(self.path)
        self.fields = [entry.name for entry in dataclasses.fields(self.module.TrainConfig)]

    def config_file(self, task: str) -> Path:
        own = task.endswith((".yaml", ".yml"))
        path = (Path(task) if own else ROOT / "configs" / self.name / f"{task}.yaml").absolute()
        if not path.is_file():
            near = difflib.get_close_matches(task, [other.stem for other in path.parent.glob("*.yaml")], n=1)
            fail(f"there is no configuration {path}" + (f" (did you mean {near[0]}?)" if near else ""))
        return path

    def parse(self, words: list[str]) -> Any:
        return self.module.parse_config(self.module.TrainConfig, words)

    def fit_fields(self) -> set[str]:
        """The fields that the fit of a coefficient looks at, and the offline phase does not, such as vae_iterations."""
        coefficients = getattr(self.module, "COEFFICIENTS", {})  # an algorithm without guidance has none
        kinds = {kind for kind in coefficients.values() if hasattr(kind, "fit_settings")}
        return {name for kind in kinds for name in kind.fit_settings(dict.fromkeys(self.fields))}


def plan(sweep: Sweep) -> list[Job]:
    """All jobs in the order in which they are to be started: seed by seed, each job behind the one it starts from."""
    algorithms = {name: Algorithm(name) for name in sweep.algorithms}
    settled: dict[tuple, tuple] = {}
    for name, task, arm in sweep.cells():
        algorithm, file = algorithms[name], algorithms[name].config_file(task)
        given = sweep.overrides | sweep.algorithms[name] | sweep.tasks[task] | sweep.arms_of(name)[arm]
        if unknown := [field for field in given if field not in algorithm.fields]:  # argparse would take abbreviations
            near = "".join(
                f" (did you mean {one}?)" for one in difflib.get_close_matches(unknown[0], algorithm.fields, 1)
            )
            fail(f"{sweep.path}: {algorithm.name}, {task}, {arm}: there is no field {unknown[0]!r}{near}")
        given |= {"name": f"{algorithm.name}-{arm}", "runs_dir": sweep.runs_dir}
        base = ["--config", str(file)]
        try:
            settled[name, task, arm] = (base, algorithm.parse(base), algorithm.parse(base + as_words(given)))
        except SystemExit as stop:
            fail(f"{sweep.path}: {algorithm.name}, {task}, {arm}: {str(stop).removeprefix('error: ')}")
    jobs: dict[Path, Job] = {}
    for seed, (name, task, arm) in product(sweep.seeds, sweep.cells()):
        algorithm, (base, plain, config) = algorithms[name], settled[name, task, arm]
        parent = None
        try:
            chain = chain_of_configs(algorithm, dataclasses.replace(config, seed=seed))
        except ValueError as error:
            fail(f"{sweep.path}: {algorithm.name}, {task}, {arm}: {error}")
        for kind, wanted in chain:
            if parent:
                wanted = dataclasses.replace(wanted, offline_checkpoint=str(parent.folder / "offline_checkpoint.pt"))
            words = base + as_words({key: value for key, value in vars(wanted).items() if value != getattr(plain, key)})
            job = Job(kind, algorithm, wanted, words, parent)
            other = jobs.setdefault(job.folder, job)
            if other is not job and (kind == "online" or results_of(other.config) != results_of(wanted)):
                fail(f"{sweep.path}: two runs would have the folder {job.folder}: give them runs_dirs of their own")
            parent = other
    return list(jobs.values())


def chain_of_configs(algorithm: Algorithm, config: Any) -> list[tuple[str, Any]]:
    """What leads to an online run: the offline phase, the fit if it needs one, and the run itself.

    Fields that a phase does not look at have their defaults in it, so that it is the same for all arms that share it.
    A phase is named by the fields that are left: another value, another folder.
    """
    default, fit_fields = algorithm.module.TrainConfig(), algorithm.fit_fields()
    unused = {name: getattr(default, name) for name in algorithm.fields if name in ONLINE_ONLY}
    unused = {name: value for name, value in unused.items() if OFFLINE_TOO.get(name) not in algorithm.fields}
    unused |= {name: value for name, value in (("samg", True), ("coefficient", "none")) if name in algorithm.fields}
    unused["online_iterations"] = 0
    if "buffer_size" in algorithm.fields:
        unused["buffer_size"] = max(default.buffer_size, config.batch_size)
    unused |= {"runs_dir": str(Path(config.runs_dir) / "offline")}
    offline = dataclasses.replace(config, **unused | {name: getattr(default, name) for name in fit_fields})
    what = {name: value for name, value in results_of(offline).items() if name not in ("seed", "env")}
    key = fingerprint({name: value for name, value in what.items() if value != getattr(default, name)})
    chain = [("offline", dataclasses.replace(offline, name=f"{algorithm.name}-offline-{key}"))]
    if getattr(config, "samg", False) and config.coefficient not in UNFITTED:
        kind = SAME_FIT.get(config.coefficient, config.coefficient)
        what = {name: getattr(config, name) for name in fit_fields}
        key = fingerprint({name: value for name, value in what.items() if value != getattr(default, name)})
        names = {"coefficient": kind, "name": f"{chain[0][1].name}-{kind}-{key}"}
        chain.append(("fit", dataclasses.replace(offline, **what | names)))
    return [*chain, ("online", config)]


def results_of(config: Any) -> dict[str, Any]:
    """The fields that change what a run computes."""
    return {name: value for name, value in vars(config).items() if name not in BOOKKEEPING}


def fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]


def as_words(settings: dict[str, Any]) -> list[str]:
    """{"seed": 1} as ["--seed=1"]: with "=", since a value may begin with a minus sign."""
    return [f"--{name}={value}" for name, value in settings.items()]


def missing_for(jobs: list[Job], download: bool) -> dict[str, str]:
    """What keeps environments and data sets from being used here: {environment: a line}."""
    found = {}
    for job in {(job.config.env, job.config.dataset): job for job in jobs}.values():
        config, module = job.config, job.algorithm.module
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module.Environment(config.env)
            if download or config.dataset or not sources.addresses(config.env):
                sources.find(config.dataset, config.env)
        except (SystemExit, sources.SourceError) as stop:
            found.setdefault(config.env, str(stop).removeprefix("error: "))
    return found


# --- What is there already
def differences(job: Job) -> list[str]:
    """Where the configuration in a job's folder is not the planned one; empty also if there is none yet."""
    try:
        saved = yaml.load((job.folder / "config.yaml").read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        return []
    except (OSError, yaml.YAMLError) as error:
        fail(f"cannot read {job.folder}/config.yaml: {error}")
    if not isinstance(saved, dict):
        fail(f"{job.folder}/config.yaml holds no configuration")
    planned = vars(job.config)
    found = {name: saved.get(name, default) for name, default in vars(type(job.config)()).items()}
    parents = [Path(value["offline_checkpoint"]).parent.name for value in (found, planned)]
    other = [f"offline_checkpoint of {parents[0]} there, of {parents[1]} in the sweep"] * (parents[0] != parents[1])
    names = [name for name, value in results_of(job.config).items() if found[name] != value]
    return [f"{name} {found[name]} there, {planned[name]} in the sweep" for name in names] + other


def finished(job: Job) -> bool:
    return (job.folder / "summary.json").is_file() and not differences(job)


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs to run: online runs that are not finished, and what these still need."""
    left, needed = [], set()
    for job in reversed(jobs):
        there = finished(job) and (job.kind == "online" or (job.folder / "offline_checkpoint.pt").is_file())
        if not there and (job.kind == "online" or id(job) in needed):
            if (job.folder / "summary.json").is_file():
                fail(f"{job.folder} is finished, but has no offline_checkpoint.pt any more: remove that folder")
            left.append(job)
            needed.add(id(job.parent))
    return left[::-1]


def read_progress(job: Job) -> tuple[str, str]:
    """Phase and step, and the last score, of a run's metrics.csv."""
    try:
        with open(job.folder / "metrics.csv", "rb") as file:
            header = file.readline().decode()
            file.seek(max(len(header), os.fstat(file.fileno()).st_size - 50_000))
            text = file.read().decode()
    except (OSError, UnicodeDecodeError):
        return "", ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    columns = header.strip().split(",")
    rows = [dict(zip(columns, row)) for row in csv.reader(lines) if len(row) == len(columns)]
    if not rows:
        return "", ""
    phase, step = rows[-1]["phase"], int(rows[-1]["step"])
    total = job.steps if phase == {"fit": "coefficient"}.get(job.kind, job.kind) else step
    scores = [row["score"] for row in rows if row.get("score")]
    return f"{phase} {step:,}/{total:,}", f"{float(scores[-1]):.1f}" if scores else ""


# --- Estimate
def estimate(jobs: list[Job], bench: Path) -> dict[str, float]:
    """Hours of updates of the jobs, by algorithm, from updates per second that were measured."""
    try:
        content = yaml.safe_load(bench.read_text())  # JSON is YAML
        table = content.get("updates_per_second") or content["seconds_per_update"]
        seconds = {str(name).removesuffix("_samg"): value for name, value in table.items()}
        phases = {}
        for name in {job.algorithm.name for job in jobs}:
            rates = seconds[name] if isinstance(seconds[name], dict) else {"offline": seconds[name]}
            rates = {phase: float(rates.get(phase, rates["offline"])) for phase in ("offline", "coefficient", "online")}
            inverse = "updates_per_second" in content
            phases[name] = {phase: 1 / rate if inverse else rate for phase, rate in rates.items()}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, ZeroDivisionError, yaml.YAMLError) as error:
        form = '{"updates_per_second": {"awac": 900, "iql": {"offline": 800, "coefficient": 1000, "online": 700}}}'
        fail(f"no updates per second of every algorithm in {bench} ({type(error).__name__}: {error}); it needs {form}")
    hours = Counter()
    for job in jobs:
        phase = {"offline": "offline", "fit": "coefficient", "online": "online"}[job.kind]
        hours[job.algorithm.name] += job.steps * phases[job.algorithm.name][phase] / 3600
    return dict(hours)


def print_plan(sweep: Sweep, jobs: list[Job], left: list[Job], args: argparse.Namespace) -> None:
    kinds = Counter(job.kind for job in jobs)
    fits = f", with {kinds['fit']} fits of a coefficient between them" if kinds["fit"] else ""
    print(f"{kinds['offline']} offline phases, {kinds['online']} online runs{fits}")
    print(f"in {sweep.runs_dir}: {len(left)} of these {len(jobs)} processes are left to run")
    if args.bench:
        hours = estimate(left, args.bench)
        at_once = max(1, int((args.num_cpus or os.cpu_count()) / (sweep.resources["cpus"] or 1)))
        print("estimate, of updates alone: " + ", ".join(f"{name} {value:.3g} h" for name, value in hours.items()))
        total = sum(hours.values())
        print(f"  {total:.3g} h one after another, {total / at_once:.3g} h with {at_once} at a time (--num_cpus)")
    else:
        print("no estimate of time: --bench FILE takes one from tools/diagnostics/bench.py's updates per second")


# --- In a Ray worker
def attempt(order: dict[str, Any], number: int, of: int) -> dict[str, Any]:
    """One try at a run. Returns its outcome: busy if another process has the folder, else its exit status and why."""
    import ray

    node, host = ray.get_runtime_context().get_node_id()[:8], socket.gethostname()
    folder = Path(order["cwd"], order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as lock:
        # The run itself inherits the lock: it ends with that process, not with this one.
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with open(folder / "run.lock", "a+") as taken:  # by the run itself, perhaps one that no sweep started
                    fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    found = [text for name in ("run.lock", "lock") if (text := (folder / name).read_text().strip())]
                    return {"busy": f"its folder is in use by {(*found, 'another process')[0]}", "node": node}
                time.sleep(0.5)
        if (folder / "summary.json").is_file():  # finished meanwhile, by that other process
            return {"status": 0, "node": node}
        begun = (folder / "config.yaml").is_file()
        command = [order["script"], *(["--resume", order["folder"]] if begun else order["words"])]
        with open(folder / "log.txt", "ab") as log:
            title = f"--- attempt {number} of {of} on node {node} of {host}: python {shlex.join(command)}\n"
            log.write(title.encode())
            log.flush()
            start = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-c", GUARD, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=order["cwd"], env=os.environ | order["environment"], pass_fds=[lock.fileno()],
            )  # fmt: skip
            lock.truncate(0)
            lock.write(f"process {process.pid} on {host}, node {node}\n")
            lock.flush()
            status = process.wait()
        if status == 0:
            (folder / "error.txt").unlink(missing_ok=True)
            return {"status": 0, "node": node}
        with open(folder / "log.txt", "rb") as log:
            log.seek(start)
            output = log.read()[-20_000:].decode(errors="replace").strip()
        last = output.splitlines()[-1] if output else "it printed nothing"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}: {last}"
        reason = f"attempt {number} of {of} on {host}: {how}"
        write_error(folder, f"{output}\n{reason}\n".lstrip())
        return {"status": status, "reason": reason, "node": node}


def write_error(folder: Path, text: str) -> None:
    """error.txt, whole or not at all; its last line says it all."""
    aside = folder / "error.txt.part"
    aside.write_text(text)
    aside.replace(folder / "error.txt")


# --- In the driver
def run_sweep(sweep: Sweep, jobs: list[Job], args: argparse.Namespace) -> None:
    """Run what is not finished; at the end, exit status 1 if something failed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # attempt() hides the GPUs itself
    try:
        import ray
    except ImportError:
        fail("sweeps need Ray: pip install 'ray[default]'")
    options = {"address": args.address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if not args.address:
        options |= {"num_cpus": args.num_cpus, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    for trial in range(1, 4):  # Ray gives itself 30 seconds to start, which can be too little on a busy machine
        try:
            ray.init(**options)
            break
        except Exception as error:
            ray.shutdown()
            if trial == 3 or args.address:
                fail(f"cannot {'connect to' if args.address else 'start'} Ray: {str(error)[:300]}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        if not capacity(ray, sweep.resources):
            has = ", ".join(f"{node['Resources'].get('CPU', 0):g} CPUs and {node['Resources'].get('GPU', 0):g} GPUs"
                            for node in ray.nodes() if node["Alive"])  # fmt: skip
            wants = f"{sweep.resources['cpus']:g} CPUs and {sweep.resources['gpus']:g} GPUs"
            fail(f"a run asks for {wants}, no machine has that ({has}); --cpus and --gpus set what it asks for")
        schedule(ray, sweep, jobs)
    except KeyboardInterrupt:
        fail("stopped, and with it the runs; the same command goes on from their last checkpoints")
    finally:
        ray.shutdown()
    nodes = Counter(job.node for job in jobs if job.node)
    by_node = ", ".join(f"{node} {n}" for node, n in sorted(nodes.items()))
    print(f"processes by node: {by_node}" if nodes else "everything is finished already")
    if failed := [job for job in jobs if job.state == "failed"]:
        print("\n".join(f"failed: {job.folder}: {job.detail}" for job in failed))
        fail(f"{len(failed)} of {len(jobs)} failed, see error.txt and log.txt there; the same command tries again")


def stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def capacity(ray: Any, resources: dict[str, float]) -> int:
    """How many runs the machines of the cluster can hold at a time."""
    total = 0
    for node in ray.nodes():
        there = node.get("Resources", {}) if node["Alive"] else {}
        wanted = [(there.get(name, 0), resources[key]) for name, key in (("CPU", "cpus"), ("GPU", "gpus"))]
        rooms = [int(has / each + 1e-9) for has, each in wanted if each]
        total += min(rooms, default=os.cpu_count() * node["Alive"])
    return total


def gpu_environment(resources: dict[str, float]) -> dict[str, str]:
    """What runs that share a GPU need: memory only as it is used, no pool of compilers each, and MPS if it is on."""
    if not resources["gpus"]:
        return {"CUDA_VISIBLE_DEVICES": ""}
    shared = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if resources["gpus"] < 1 else {}
    usual = shared | {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, int(resources["cpus"])))}
    given = {name: value for name, value in os.environ.items() if name in usual or name.startswith("CUDA_MPS_")}
    return usual | given


def schedule(ray: Any, sweep: Sweep, jobs: list[Job]) -> None:
    """Start jobs in the plan's order as soon as there is room and their parents are done, until none is left."""
    needs = {"num_cpus": sweep.resources["cpus"], "num_gpus": sweep.resources["gpus"]}
    task = ray.remote(**needs, max_retries=0, scheduling_strategy="SPREAD")(attempt)
    progress, running, of = Progress(jobs), {}, sweep.retries + 1
    own = {name: value for name, value in os.environ.items() if name.startswith(("D4RL_", "MUJOCO_", "WANDB_"))}
    own |= {"TQDM_DISABLE": "1"} | gpu_environment(sweep.resources)
    while True:
        room = capacity(ray, sweep.resources)
        for job in [job for job in jobs if job.state == "waiting"]:
            if job.parent and job.parent.state == "failed":
                job.state, job.detail = "failed", f"not started, as {job.parent.label} failed"
            elif (not job.parent or job.parent.state == "done") and len(running) < room:
                job.state, job.attempts = "running", job.attempts + 1
                order = {"folder": str(job.folder), "script": str(job.algorithm.path), "words": job.words}
                order |= {"cwd": os.getcwd(), "environment": own}
                running[task.remote(order, job.attempts, of)] = job
        progress.show()
        if not running:
            return
        for ref in ray.wait(list(running), timeout=1)[0]:
            job = running.pop(ref)
            try:
                outcome = ray.get(ref)
            except ray.exceptions.RayError as error:
                reason = f"attempt {job.attempts} of {of}: Ray lost its worker ({type(error).__name__})"
                outcome = {"status": 1, "reason": reason, "node": ""}
                if job.folder.is_dir():
                    write_error(job.folder, reason + "\n")
            job.node = outcome["node"]
            if "busy" in outcome:
                job.state, job.attempts, job.detail = "waiting", job.attempts - 1, outcome["busy"]
            elif finished(job):
                job.state, job.detail = "done", ""
            else:
                job.detail = outcome.get("reason", "its configuration is not the planned one any more")
                job.state = "waiting" if job.attempts < of else "failed"


class Progress:
    """One table in a terminal, drawn anew in place; elsewhere a line for each change."""

    ORDER = {"running": 0, "failed": 1, "waiting": 2, "done": 3}

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs, self.height, self.terminal = jobs, 0, sys.stdout.isatty()
        self.said = {id(job): (job.state, 0) for job in jobs}
        self.seen: dict[int, tuple[str, str]] = {}  # progress of jobs that do not change any more

    def progress(self, job: Job) -> tuple[str, str]:
        if job.state in ("waiting", "failed"):
            return ("", "") if not job.attempts else read_progress(job)
        if job.state == "done":
            self.seen.setdefault(id(job), read_progress(job))
        return self.seen.get(id(job)) or read_progress(job)

    def show(self) -> None:
        counts = Counter(job.state for job in self.jobs)
        total = ", ".join(f"{counts[state]} {state}" for state in ("done", "running", "waiting", "failed"))
        if not self.terminal:
            for job in self.jobs:
                now = (job.state, job.attempts)
                if now != self.said[id(job)]:
                    score = self.progress(job)[1] if job.state == "done" else ""
                    what = job.detail or (f"score {score}" if score else "")
                    line = f"{time.strftime('%H:%M:%S')} {job.state:8}{job.label}  [{total}]  {what}"
                    print(line.rstrip(), flush=True)
                self.said[id(job)] = now
            return
        columns, height = shutil.get_terminal_size()
        jobs = sorted(self.jobs, key=lambda job: self.ORDER[job.state])
        shown, width = jobs[: max(1, height - 4)], max(len(job.label) for job in jobs)
        lines = [f"{'run':{width}}  {'state':8} {'step':>24} {'score':>7}"]
        for job in shown:
            step, score = self.progress(job)
            lines.append(f"{job.label:{width}}  {job.state:8} {step:>24} {score:>7}  {job.detail}")
        lines += [f"... and {len(jobs) - len(shown)} more"] * (len(jobs) > len(shown)) + [total]
        back = f"\x1b[{self.height}A\x1b[J" if self.height else ""
        print(back + "\n".join(line[: columns - 1] for line in lines), flush=True)
        self.height = len(lines)


# --- Main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="YAML file, such as sweeps/smoke.yaml")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument("--bench", type=Path, help="JSON or YAML of updates per second, for --dry_run's estimate")
    parser.add_argument("--runs_dir", help="folder of the runs, instead of the sweep's own")
    parser.add_argument("--address", help="of a Ray cluster: auto for the one of this machine; else Ray starts here")
    parser.add_argument("--num_cpus", type=int, help="CPU cores that Ray may use here (default: all)")
    parser.add_argument("--cpus", type=float, help="CPU cores of one run, instead of the sweep's own")
    parser.add_argument("--gpus", type=float, help="GPUs of one run, such as 0.2, instead of the sweep's own")
    for name in ("algorithms", "tasks", "arms", "seeds"):
        parser.add_argument(f"--{name}", nargs="+", help=f"run only these of the sweep's {name}")
    args = parser.parse_args()
    sweep = read_sweep(args.sweep)
    sweep.runs_dir = args.runs_dir or sweep.runs_dir
    if args.num_cpus is not None and args.num_cpus < 1:
        fail(f"--num_cpus must be at least 1, it is {args.num_cpus}")
    for name in ("cpus", "gpus"):
        value = getattr(args, name)
        if value is not None:
            sweep.resources[name] = value if 0 <= value < math.inf else fail(f"--{name} must not be negative: {value}")
    for name in ("algorithms", "tasks", "arms", "seeds"):
        there, wanted = getattr(sweep, name), getattr(args, name) or []
        there = {arm: None for own in sweep.algorithms for arm in sweep.arms_of(own)} if name == "arms" else there
        if unknown := [one for one in wanted if one not in map(str, there)]:
            fail(f"{args.sweep} has {name} {', '.join(map(str, there))}, and no {unknown[0]}")
        if wanted and name == "seeds":
            sweep.seeds = [seed for seed in there if str(seed) in wanted]
        elif wanted and name == "arms":
            every = {own: sweep.arms_of(own) for own in sweep.algorithms}
            sweep.own_arms = {own: {arm: arms[arm] for arm in arms if arm in wanted} for own, arms in every.items()}
        elif wanted:
            setattr(sweep, name, {key: there[key] for key in there if key in wanted})
    jobs = plan(sweep)
    for job in jobs:
        if found := differences(job):
            fail(f"{job.folder} holds a run with other values ({'; '.join(found[:3])}): choose another --runs_dir, "
                 "or move that folder away")  # fmt: skip
    left = unfinished(jobs)
    missing = missing_for(left, download=not args.dry_run)
    if args.dry_run:
        print_plan(sweep, jobs, left, args)
        print("\n".join(f"missing: {line}" for line in missing.values()), end="\n" if missing else "")
    elif missing:
        more = f" (and {len(missing) - 1} more such faults, see --dry_run)" if len(missing) > 1 else ""
        fail(f"{next(iter(missing.values()))}{more}")
    else:
        for job in jobs:
            job.state = "waiting" if job in left else "done"
        run_sweep(sweep, jobs, args)


if __name__ == "__main__":
    main()
