"""Settle on a GPU, in a quarter of an hour, what no other machine can tell: does it agree, does it wait, is it fast?

    python tools/diagnostics/gpu_check.py --json gpu_check.json              # on CUDA, if it is there
    python tools/diagnostics/gpu_check.py --only syncs,agreement --algorithms awac,iql
    python tools/diagnostics/gpu_check.py --device cpu     # the same path with small numbers, graphs emulated: a test

| phase | minutes | what it does | accepted if |
| --- | --- | --- | --- |
| syncs | 0.75 | updates and fits, torch.cuda.set_sync_debug_mode("error") | nothing raises |
| agreement | 3 | 20 updates in float64: CPU, GPU, recorded, compiled, both | parameters within 1e-9, streams equal |
| speed | 4 | updates a second of each variant, off and on; fits; kernels | AWAC 6 x plain and 2,500/s; guidance 5 % |
| online | 1 | parts of an online step, waits of an insert and of an action | an action 60 us, an insert no wait |
| resume | 2 | runs that are killed in each phase and resumed; other devices | metrics.csv equal |
| whole | 2.5 | AWAC on hopper, shortened, extrapolated to 1M + 50k + 200k | 10 minutes, evaluation 20 % of it |
| five | 1.5 | five processes at once, with and without NVIDIA's MPS | the slowest 1.6 x one alone |

A line a figure: PASS, FAIL or INFO. A phase that is over its time is cut, and says so; --json is written after each
line. On a CPU no speed is judged.
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench import ACT_DIM, ENV, FILES, OBS_DIM, load_algorithm, make_case, names, plain_update, synchronize
from pretended_cuda import RANDOM, emulated_graphs, tensors_in
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[2]
GUIDED = {False: "off", True: "on"}
NUMBERS = {  # of updates and the like
    "cuda": {
        **{"updates": 50, "seconds": 2.0, "rows": 50_000, "sizes": {}, "processes": 5, "five": 20_000},
        **{"variants": ("eager", "graph", "compiled", "both"), "kills": ("offline", "coefficient", "online")},
        **{"whole": (30_000, 3_000, 6_000, 5_000), "tiny": (3_000, 1_500, 2_000)},
    },
    "cpu": {
        **{"updates": 6, "seconds": 0.05, "rows": 200, "sizes": {"hidden_dim": 16, "vae_hidden_dim": 16}},
        **{"processes": 2, "five": 200, "variants": ("eager", "graph"), "kills": ("online",)},
        **{"whole": (200, 100, 200, 100), "tiny": (200, 100, 300)},
    },
}
FULL = (1_000_000, 50_000, 200_000)  # updates offline and of the fit, and steps online, of the paper's AWAC run


class TimeUp(BaseException):
    """No Exception, which the files would take for a graph that cannot be recorded."""


class Report:
    """The lines, and the JSON of them."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines = path, {}

    def say(self, what: str, fine: bool | None, **figures: Any) -> None:
        """`fine` None: a figure that is not judged."""
        verdict = {True: "PASS", False: "FAIL", None: "INFO"}[fine]
        self.lines[what] = {"verdict": verdict} | figures
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in figures.items()}
        print(f"{verdict} {what}: {', '.join(f'{key} {value}' for key, value in shown.items())}", flush=True)
        if self.path:
            self.path.write_text(json.dumps(self.lines, indent=2) + "\n")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeUp(f"cut after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- Updates in this process
def agent_and_buffer(name: str, args: argparse.Namespace, double: bool = False, device: str = "") -> tuple:
    """The same on every device."""
    module, algorithm, _ = load_algorithm(name)
    sizes = args.sizes | ({"hidden_dim": 64, "batch_size": 64} if double and not args.sizes else {})
    config, device = module.TrainConfig(**sizes), device or args.device
    bounds = {"action_low": -np.ones(ACT_DIM, np.float32), "action_high": np.ones(ACT_DIM, np.float32)}
    env = SimpleNamespace(obs_dim=OBS_DIM, act_dim=ACT_DIM, **bounds)
    torch.manual_seed(0)
    agent = algorithm(config, env, "cpu")
    agent.start_online(), agent.start_period(False)
    moved = algorithm(config, env, device)
    moved.load_state_dict(agent.state_dict())
    buffer = module.ReplayBuffer(args.rows, OBS_DIM, ACT_DIM, device)
    buffer.load(np.random.default_rng(0).random((args.rows, 2 * OBS_DIM + ACT_DIM + 4), dtype=np.float32))
    if double:
        moved.double()
        buffer.rows = buffer.rows.double()
        if name == "iql":  # a step size that is a tensor is float32 for Adam on CUDA
            moved.actor_lr = moved.actor_lr.float()
    return module, moved, buffer


def replay_of(module: Any, args: argparse.Namespace) -> Any:
    """Graphs, on a CPU emulated ones."""
    return module.Replay(args.device if "cuda" in args.device else "cuda", "true")


def variants(name: str, args: argparse.Namespace, double: bool = False) -> Iterator[tuple[str, Any, Callable]]:
    """What --graphs and --compile make of an update: its name, the agent, update(guided)."""
    for variant in args.variants:
        module, agent, buffer = agent_and_buffer(name, args, double)
        if variant in ("compiled", "both"):
            module.compiles(module.TrainConfig(compile="true"), args.device)
            agent.compile_update()
        replay = replay_of(module, args) if variant in ("graph", "both") else lambda function, *rest: function(*rest)

        def update(guided: bool, agent: Any = agent, buffer: Any = buffer, replay: Callable = replay) -> dict:
            return replay(agent.learn_from, buffer, *agent.begin(guided=guided))

        yield variant, agent, update


def coefficients(args: argparse.Namespace) -> Iterator[tuple[str, Any, Any, Any]]:
    module, _, buffer = agent_and_buffer("awac", args)
    for kind in ("vae", "likelihood", "rnd", "embedding"):
        config = module.TrainConfig(coefficient=kind, **args.sizes)
        yield kind, module, module.COEFFICIENTS[kind](config, OBS_DIM, ACT_DIM, args.device), buffer


def rate(function: Callable, args: argparse.Namespace) -> float:
    """Calls a second: the best of blocks of `updates`, the device waited for after each."""
    best, end = 0.0, time.perf_counter() + args.seconds
    while not best or time.perf_counter() < end:
        synchronize(args.device)
        start = time.perf_counter()
        for _ in range(args.updates):
            function()
        synchronize(args.device)
        best = max(best, args.updates / (time.perf_counter() - start))
    return best


@contextlib.contextmanager
def watching_syncs(args: argparse.Namespace, how: str) -> Iterator[list]:
    """`how`: error, or warn, which lists them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if "cuda" in args.device:
            torch.cuda.set_sync_debug_mode(how)
        try:
            yield found
        finally:
            if "cuda" in args.device:
                torch.cuda.set_sync_debug_mode("default")


def syncs(args: argparse.Namespace, report: Report) -> None:
    for name in args.algorithms:
        _, agent, update = next(variants(name, args))
        for guided in (False, True):
            update(guided)
        with watching_syncs(args, "error"):
            for i in range(args.updates):
                metrics = update(i % 2 == 0)
        finite = all(value.isfinite().all().item() for value in metrics.values())
        report.say(f"{name} syncs", finite, updates=args.updates)
    for kind, _, coefficient, buffer in coefficients(args):
        coefficient.fit_step(buffer, 0)
        with watching_syncs(args, "error"):
            for step in range(args.updates):
                loss = coefficient.fit_step(buffer, step)
        report.say(f"{kind} syncs", all(value.isfinite().item() for value in loss.values()), updates=args.updates)


class HostDraws(TorchFunctionMode):
    """Random numbers of the CPU's generator on every device, so that two devices can agree."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if not RANDOM.fullmatch(name):
            return func(*args, **kwargs)
        given = [*tensors_in(args)]
        device = kwargs.pop("device", given[0].device if given else "cpu")
        drawn = func(*(arg.detach().cpu() if torch.is_tensor(arg) else arg for arg in args), **kwargs)
        return given[0].copy_(drawn) if name.endswith("_") else drawn.to(device)


def parameters(agent: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten().cpu() for value in agent.parameters()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative above 1 and absolute below."""
    return ((one - other).abs() / (1 + other.abs())).max().item()


def stream_of(device: str) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if "cuda" in device else torch.get_rng_state()


def agreement(args: argparse.Namespace, report: Report) -> None:
    for name in args.algorithms:
        results = []
        for device in ("cpu", args.device):  # the same rows and the same noise
            _, agent, buffer = agent_and_buffer(name, args, True, device)
            torch.manual_seed(1)
            with HostDraws():
                for i in range(20):
                    rows = buffer.rows[i : i + agent.config.batch_size]
                    agent.update(buffer.batch(rows), guided=i % 2 == 0)
            results.append(parameters(agent))
        report.say(f"{name} agreement of devices", (error := apart(*results)) < 1e-9, error=error)
    for name in args.algorithms:
        eager = None
        for variant, agent, update in variants(name, args, double=True):
            torch.manual_seed(1)
            for i in range(20):
                update(i % 2 == 0)
            found = parameters(agent), stream_of(args.device)
            eager = eager or found
            error, same = apart(found[0], eager[0]), torch.equal(found[1], eager[1])
            report.say(f"{name} agreement of {variant}", error < 1e-9 and same, error=error, same_stream=same)


def kernels(function: Callable) -> int:
    """That a call launches, or that its graph holds."""
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def speed(args: argparse.Namespace, report: Report) -> None:
    judged = "cuda" in args.device
    for name in args.algorithms:
        case = make_case(name, SimpleNamespace(**vars(args), batch_size=None, threads=1, p_share=0.5, **args.widths))
        plain = rate(plain_update(case), args)
        report.say(f"{name} speed of the plain reference", None, per_second=plain)
        best = {}
        for variant, _, update in variants(name, args):
            for guided in (False, True):
                call, start = partial(update, guided), time.perf_counter()
                for _ in range(4):  # a graph is recorded in the fourth
                    call()
                synchronize(args.device)
                figures = {"first_4_s": time.perf_counter() - start, "per_second": rate(call, args)}
                best[guided] = max(best.get(guided, 0.0), figures["per_second"])
                figures |= {"of_plain": figures["per_second"] / plain}
                figures |= {"kernels": kernels(call)} if judged else {}
                report.say(f"{name} speed of {variant}, guidance {GUIDED[guided]}", None, **figures)
        fine = {"awac": best[False] >= max(2500, 6 * plain)}.get(name) if judged else None
        report.say(f"{name} speed, the best", fine, per_second=best[False], of_plain=best[False] / plain)
        cost = best[False] / best[True] - 1
        report.say(f"{name} guidance", cost <= 0.05 if judged else None, cost=cost)
    for kind, module, coefficient, buffer in coefficients(args):
        replay = replay_of(module, args)
        figures = {"per_second": rate(partial(coefficient.fit_step, buffer, 0), args)}
        figures |= {"graph_per_second": rate(partial(coefficient.fit_step, buffer, 0, replay), args)}
        report.say(f"{kind} speed", None, **figures)


def online(args: argparse.Namespace, report: Report) -> None:
    for name in args.algorithms:
        module, algorithm, run_class = load_algorithm(name)
        with tempfile.TemporaryDirectory() as folder:
            config = module.TrainConfig(env=ENV, device=args.device, runs_dir=folder, **args.sizes)
            run = run_class(config, algorithm)
        run.start_online()
        if "cuda" not in args.device:
            run.replay = replay_of(module, args)
        observation, seconds, waits = run.env.reset(0), [], {}
        parts = {
            "act": lambda: run.agent.act(observation, deterministic=False),  # noqa: B023
            "environment": lambda: run.env.step(action),  # noqa: B023
            "insert": lambda: run.remember(observation, action, 1.0, observation, False),  # noqa: B023
            "update": lambda: run.update(run.buffer, guided=True),  # noqa: B023
        }
        for i in range(args.updates + 8):
            action, times = np.zeros(ACT_DIM, np.float32), []
            for part, function in parts.items():
                with watching_syncs(args, "warn") as found:
                    start = time.perf_counter()
                    result = function()
                    times.append(time.perf_counter() - start)
                if i > 8:
                    waits[part] = max(waits.get(part, 0), len(found))
                if part == "environment" and (result[2] or result[3]):
                    run.env.reset(i)
            seconds.append(times)
        medians = dict(zip((f"{part}_us" for part in parts), (1e6 * np.median(seconds[8:], 0)).tolist()))
        report.say(f"{name} online step, the action waits for the update", None, **medians)
        fine = not waits["insert"] and not waits["update"] if "cuda" in args.device else None
        report.say(f"{name} online waits, without the action's event", fine, **waits)
        idle = 1e6 / rate(parts["act"], args)
        report.say(f"{name} action", idle <= 60 if "cuda" in args.device else None, us=idle)


# --- Whole runs, in processes of their own
def command(name: str, folder: Path, args: argparse.Namespace, **fields: Any) -> list[str]:
    fields = {"env": ENV, "dataset": ROOT / "data/hopper-medium-mini.hdf5", "device": args.device} | args.sizes | fields
    return [sys.executable, str(FILES[name]), f"--runs_dir={folder}", *(f"--{k}={v}" for k, v in fields.items())]


def finish(words: list[str], **more: Any) -> None:
    """Run to the end; RuntimeError with its last line if that is a bad one."""
    done = subprocess.run(words, capture_output=True, text=True, **more)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:200])


def log_of(folder: Path) -> list[dict[str, str]]:
    """metrics.csv, without its timings."""
    with open(next(folder.rglob("metrics.csv")), newline="") as file:
        return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in csv.DictReader(file)]


def kill_in(words: list[str], folder: Path, phase: str) -> None:
    """Start a run, and kill it when it has written a row of this phase."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        log = next(folder.rglob("metrics.csv"), None)
        if log and f",{phase}," in log.read_text():
            process.kill()
        time.sleep(0.02)


def resume(args: argparse.Namespace, report: Report) -> None:
    offline, fit, steps = args.tiny
    tiny = {"offline_iterations": offline, "vae_iterations": fit, "online_iterations": steps, "hidden_dim": 64}
    tiny |= {"vae_hidden_dim": 64, "warmup_steps": 100, "eval_frequency": 1000, "n_test_episodes": 1}
    tiny |= {"log_frequency": 100, "checkpoint_frequency": 100, "coefficient_frequency": 500, "compile": "false"}

    def check(name: str) -> None:
        with tempfile.TemporaryDirectory() as root:
            whole = Path(root) / "whole"
            finish(command(name, whole, args, **tiny))
            for phase in args.kills:
                cut = Path(root) / phase
                kill_in(command(name, cut, args, **tiny), cut, phase)
                folder, n = next(cut.rglob("metrics.csv")).parent, len(log_of(cut))
                moved = shutil.copytree(folder, Path(root) / f"{phase}-moved") if phase == "online" else None
                finish([sys.executable, str(FILES[name]), "--resume", str(folder)])
                same = log_of(cut) == log_of(whole)
                report.say(f"{name} killed in {phase} after {n} rows, resumed", same, rows=len(log_of(whole)))
                if moved and "cuda" in args.device and name == "awac":
                    finish([sys.executable, str(FILES[name]), "--resume", str(moved), "--device=cpu"])
                    report.say("begun on CUDA, resumed on the CPU", True)
            if name == "awac" and args.device == "cuda":
                numbered = Path(root) / "numbered"
                finish(command(name, numbered, args, **tiny | {"device": "cuda:0"}))
                report.say("cuda:0 as cuda", log_of(numbered) == log_of(whole))

    with ThreadPoolExecutor() as pool:
        for result in [pool.submit(check, name) for name in args.algorithms]:
            result.result()


def whole(args: argparse.Namespace, report: Report) -> None:
    *lengths, frequency = args.whole
    fields = dict(zip(("offline_iterations", "vae_iterations", "online_iterations"), lengths))
    fields |= {"eval_frequency": frequency, "log_frequency": frequency, "warmup_steps": 0, "overlap": True}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        finish(command("awac", Path(folder), args, **fields))
        wall = time.perf_counter() - start
        summary = json.loads(next(Path(folder).rglob("summary.json")).read_text())
    seconds, (offline, fit, steps) = summary["seconds"], lengths
    report.say("whole run, seconds by part", None, wall=wall, **seconds)
    scale = {"offline": FULL[0] / offline, "coefficient": FULL[1] / fit}
    scale["evaluation"] = (FULL[0] + FULL[2]) / (offline + steps) * frequency / 5000
    parts = {part: value * scale.get(part, FULL[2] / steps) for part, value in seconds.items()}
    minutes, share = sum(parts.values()) / 60, parts["evaluation"] / sum(parts.values())
    fine = minutes <= 10 and share <= 0.2 if "cuda" in args.device else None
    memory = {"peak_gpu_memory_mb": summary.get("peak_gpu_memory_mb", 0.0)}
    report.say("whole run, 1M + 50k + 200k extrapolated", fine, minutes=minutes, evaluation_share=share, **memory)


def rates_of(n: int, args: argparse.Namespace, **environment: str) -> list[float]:
    """Updates a second of each of n processes at once, from their last rows."""
    fields = {"offline_iterations": args.five, "online_iterations": 0, "coefficient": "none", "compile": "false"}
    fields |= {"eval_frequency": args.five, "n_test_episodes": 1, "log_frequency": args.five // 4}
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(n) as pool:
        folders = [Path(root) / str(i) for i in range(n)]
        begin = partial(finish, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        list(pool.map(lambda folder: begin(command("awac", folder, args, **fields)), folders))
        logs = [csv.DictReader(open(next(folder.rglob("metrics.csv")), newline="")) for folder in folders]  # noqa: SIM115
        return [float([*log][1]["steps_per_second"]) for log in logs]  # the second row: the first one has the start


def five(args: argparse.Namespace, report: Report) -> None:
    alone = rates_of(1, args)[0]
    report.say("one process", None, per_second=alone)

    def check(how: str, **environment: str) -> None:
        slowest = min(rates_of(args.processes, args, **environment))
        fine = alone <= 1.6 * slowest if "cuda" in args.device else None
        report.say(f"{args.processes} processes {how}", fine, slowest_per_second=slowest, slower=alone / slowest)

    check("without MPS")
    if "cuda" in args.device and shutil.which("nvidia-cuda-mps-control"):
        with tempfile.TemporaryDirectory() as folder:
            environment = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
            subprocess.run(["nvidia-cuda-mps-control", "-d"], env=os.environ | environment, check=True)
            try:
                check("with MPS", **environment)
            finally:
                stop = {"input": "quit\n", "text": True, "env": os.environ | environment}
                subprocess.run(["nvidia-cuda-mps-control"], **stop)
    else:
        report.say("MPS", None, found=False)


PHASES = {"syncs": (syncs, 0.75), "agreement": (agreement, 3), "speed": (speed, 4), "online": (online, 1)}
PHASES |= {"resume": (resume, 2), "whole": (whole, 2.5), "five": (five, 1.5)}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    parser.add_argument("--only", default=",".join(PHASES), help="phases, with commas (default: %(default)s)")
    parser.add_argument("--algorithms", default=",".join(FILES), help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    args = parser.parse_args(words)
    args.only, args.algorithms = names(args.only, PHASES, "only"), names(args.algorithms, FILES, "algorithms")
    if "cuda" in args.device and not torch.cuda.is_available():
        raise SystemExit(f"error: no CUDA here, --device {args.device} cannot be checked")
    vars(args).update(NUMBERS["cuda" if "cuda" in args.device else "cpu"])
    args.widths = {"hidden_dim": None, "vae_hidden_dim": None} | args.sizes
    torch.set_num_threads(1)
    report, start = Report(args.json), time.perf_counter()
    machine = torch.cuda.get_device_name(args.device) if "cuda" in args.device else "CPU, graphs emulated"
    report.say("machine", None, name=machine, torch=torch.__version__, cuda=str(torch.version.cuda))
    for phase in args.only:
        function, minutes = PHASES[phase]
        emulated = contextlib.nullcontext() if "cuda" in args.device else emulated_graphs()
        begun = time.perf_counter()
        try:
            with time_limit(60 * minutes), emulated:
                function(args, report)
        except (Exception, SystemExit, TimeUp) as error:
            report.say(f"{phase} to its end", False, error=f"{type(error).__name__}: {error}"[:300])
        report.say(f"{phase}, time", None, seconds=time.perf_counter() - begun)
    failed = [what for what, line in report.lines.items() if line["verdict"] == "FAIL"]
    report.say("all", not failed, failed=failed, seconds=time.perf_counter() - start)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
