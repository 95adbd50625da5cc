"""Measure speed and memory: updates, the online loop, fitting p, loading, start-up; on a CPU and on CUDA where it is.

    python tools/diagnostics/bench.py                                        # every part, a Markdown table each
    python tools/diagnostics/bench.py --only update --algorithms awac,cql --json bench.json
    python tools/diagnostics/bench.py --only online,loading --clock cpu      # on a machine that does other work, too
    python tools/diagnostics/bench.py --device cuda --variants eager,compiled,graphs --json cuda.json    # on a GPU

What is compared is measured in turns, a round of each after a round of the other, and the minimum and the median are
given: absolute times depend on the machine and on what else it does, ratios within one run hardly. Updates stand
against plain_reference.py, the same algorithm as the field usually writes it, and against the limit: the
floating-point operations (FLOP) that the update cannot do without, counted from the layers' sizes, at the rate at
which this device multiplies matrices in float32 here and now (256 x 256 on a CPU, 4,096 x 4,096 on CUDA).

Sizes are hopper's (11 observations, 3 actions) with the networks and batches of the dataclass defaults, but without
LayerNorm, whose cost --variants compiled,layer_norm shows. The rows are random; p is 0 in half of them and between 0.6
and 1 in the others.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch

FOLDER = Path(__file__).resolve().parent
FILES = {name: FOLDER.parents[1] / "algorithms" / f"{name}_samg.py" for name in ("awac", "iql", "cql", "calql")}
EDIS, WSRL = (FOLDER.parents[1] / "algorithms" / name for name in ("edis.py", "wsrl.py"))
OBS_DIM, ACT_DIM = 11, 3
ENV = "Hopper-v4"
PLAIN = "plain reference"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"measured_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # pyrallis looks for the config's source
    spec.loader.exec_module(module)
    return module


def load_algorithm(name: str) -> tuple[Any, type, type]:
    """The module of an algorithm's file, its class and its Run."""
    module = load_module(FILES[name])
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    algorithm = next(value for value in classes if hasattr(value, "ALGORITHM"))
    runs = [value for value in classes if issubclass(value, module.Run)]
    return module, algorithm, max(runs, key=lambda run: len(run.mro()))


def make_config(module: Any, args: argparse.Namespace, **values: Any) -> Any:
    sizes = {"batch_size": args.batch_size, "hidden_dim": args.hidden_dim, "vae_hidden_dim": args.vae_hidden_dim}
    sizes |= {"denoiser_width": getattr(args, "denoiser_width", None)}
    sizes = {key: value for key, value in sizes.items() if value and hasattr(module.TrainConfig, key)}
    return module.TrainConfig(**sizes, threads=args.threads, critic_layer_norm=False, **values)


def random_rows(widths: tuple[int, ...], n: int, p_share: float, device: str) -> torch.Tensor:
    """Rows of a ReplayBuffer: normal states and rewards, actions within the bounds, no terminals."""
    generator = torch.Generator(device).manual_seed(0)
    columns = [torch.randn(n, width, device=device, generator=generator) for width in widths]
    columns[1].clamp_(-1, 1)
    columns[4].zero_()
    share, p = torch.rand(2, n, 1, device=device, generator=generator)
    columns[5] = torch.where(share < p_share, 0.6 + 0.4 * p, torch.zeros_like(p))
    return torch.cat(columns, dim=1)


# --- Timing
def synchronize(device: str) -> None:
    if "cuda" in device:
        torch.cuda.synchronize()


def measure(function: Callable, n: int, args: argparse.Namespace) -> list[float]:
    """Seconds of each of n calls. On CUDA between events on the stream, so that the host is never waited for inside."""
    if "cuda" not in args.device:
        clock, seconds = CLOCKS[args.clock], []
        for _ in range(n):
            start = clock()
            function()
            seconds.append(clock() - start)
        return seconds
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in zip(events, events[1:])]


def interleave(functions: dict[str, Callable], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each call of each function: in each round n updates of all, and each round starts with another."""
    seconds, names = {name: [] for name in functions}, list(functions)
    for number in range(args.rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            seconds[name] += measure(functions[name], args.updates, args)
    return seconds


def measure_limit(args: argparse.Namespace) -> float:
    """The most GFLOP/s of float32 products of square matrices on this device, with this number of threads."""
    size = 4096 if "cuda" in args.device else 256
    a, b, out = torch.randn(3, size, size, device=args.device)

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, b, out=out)

    return 10 * 2 * size**3 / min(measure(multiply, 50, args)) / 1e9


def memory(key: str) -> float:
    """Of this process, MB: VmRSS, held now, or VmHWM, the most so far (ru_maxrss begins with that of the parent)."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def run_child(args: argparse.Namespace, part: str, *words: Any, **environment: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    sizes = ("threads", "device", "clock", "batch_size", "hidden_dim", "vae_hidden_dim", "rows", "updates")
    options = [f"--{name}={getattr(args, name)}" for name in sizes if getattr(args, name) is not None]
    command = [sys.executable, __file__, "--child", part, *map(str, words), *options]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if process.returncode:
        raise SystemExit(f"error: {part} failed: {(process.stderr.strip().splitlines() or ['no message'])[-1][:300]}")
    return json.loads(process.stdout.splitlines()[-1])


# --- Floating-point operations
def mlp_flop(sizes: list[int], rows: int, use: str) -> int:
    """Of one pass of `rows` rows through linear layers of these sizes; 2 for each multiplication with its addition.

    `forward`; `train`: and the gradients of the weights, and those of each layer's inputs but the first's; `through`:
    and the gradients of all inputs, but none of the weights.
    """
    layers = [2 * rows * n_in * n_out for n_in, n_out in zip(sizes, sizes[1:])]
    return sum(layers) + {"forward": 0, "train": 2 * sum(layers) - layers[0], "through": sum(layers)}[use]


def update_flop(name: str, config: Any, obs_dim: int, act_dim: int, guided: bool) -> int:
    """Of the products that an update needs, each done once: the policy once a state, p and V_off kept with the rows."""
    n, hidden = config.batch_size, config.hidden_dim

    def critics(rows: int, use: str) -> int:
        layers = {"awac": 3, "iql": 2}.get(name) or config.q_n_hidden_layers
        return 2 * mlp_flop([obs_dim + act_dim, *[hidden] * layers, 1], rows, use)

    def actor(use: str) -> int:
        layers, outputs = 2 if name == "iql" else 3, act_dim if name in ("awac", "iql") else 2 * act_dim
        return mlp_flop([obs_dim, *[hidden] * layers, outputs], n, use)

    if name == "awac":  # a' and its target; critics; log-likelihood; both advantages
        flop = actor("forward") + critics(n, "forward") + critics(n, "train")
        return flop + actor("train") + critics(2 * n, "forward") + guided * critics(n, "forward")
    if name == "iql":  # V(s'), target critics, V(s), critics, actor
        value = [obs_dim, hidden, hidden, 1]
        flop = mlp_flop(value, n, "forward") + mlp_flop(value, n, "train")
        return flop + critics(n, "forward") + critics(n, "train") + actor("train")
    k = config.cql_n_actions
    penalty, targets = n * (1 + 3 * k), n * (k if config.cql_max_target_backup else 1)
    flop = actor("train") + critics(n, "through") + actor("forward") + critics(targets, "forward")
    flop += critics(penalty, "train")
    return flop + guided * (critics(n, "forward") + critics(penalty, "forward"))  # Q_off at a' and in the penalty


# --- Updates
class Case(NamedTuple):
    """What a variant is made from."""

    name: str
    module: Any
    algorithm: type
    config: Any
    args: argparse.Namespace

    def agent(self) -> Any:
        """An agent at the start of its online phase."""
        low, high = -np.ones(ACT_DIM, np.float32), np.ones(ACT_DIM, np.float32)
        env = SimpleNamespace(obs_dim=OBS_DIM, act_dim=ACT_DIM, action_low=low, action_high=high)
        torch.manual_seed(0)
        agent = self.algorithm(self.config, env, self.args.device)
        agent.start_online()
        agent.start_period(False)
        return agent

    def buffer(self) -> Any:
        buffer = self.module.ReplayBuffer(self.args.rows, OBS_DIM, ACT_DIM, self.args.device)
        buffer.rows.copy_(random_rows(buffer.widths, self.args.rows, self.args.p_share, self.args.device))
        buffer.resize(self.args.rows)
        return buffer


def make_case(name: str, args: argparse.Namespace) -> Case:
    module, algorithm, _ = load_algorithm(name)
    return Case(name, module, algorithm, make_config(module, args), args)


def plain_update(case: Case) -> Callable:
    plain = load_module(FOLDER / "plain_reference.py")
    torch.manual_seed(0)
    reference = plain.PLAIN[case.name](case.config, OBS_DIM, ACT_DIM, case.args.device)
    s, a, r, s_next, d, _, extra = case.buffer().stored()
    columns = [s, a, r[:, None], s_next, d[:, None]] + ([extra[:, None]] if case.name == "calql" else [])
    buffer = plain.PlainBuffer(columns)
    return lambda: reference.update(buffer.sample(case.config.batch_size))


def eager_update(case: Case, guided: bool) -> Callable:
    agent, buffer = case.agent(), case.buffer()
    return lambda: agent.update(buffer.sample(case.config.batch_size), guided=guided)


def compiled_update(case: Case, guided: bool, **options: str) -> Callable:
    """As --compile true runs it."""
    agent, buffer = case.agent(), case.buffer()
    case.module.compiles(make_config(case.module, case.args, compile="true"), case.args.device)
    agent.compile_update(**options)
    return lambda: agent.update(buffer.sample(case.config.batch_size), guided=guided)


def layer_norm_update(case: Case, guided: bool) -> Callable:
    """Compiled, with LayerNorm in the critics, which the other variants and the plain reference have not."""
    config = dataclasses.replace(case.config, critic_layer_norm=True)
    return compiled_update(case._replace(config=config), guided)


def graphs_update(case: Case, guided: bool) -> Callable:
    """Compiled and, on CUDA, replayed from a CUDA graph with its sampling, as --graphs true runs it."""
    agent, buffer = case.agent(), case.buffer()
    case.module.compiles(make_config(case.module, case.args, compile="true"), case.args.device)
    agent.compile_update()
    replay = case.module.Replay(case.args.device, "auto")
    return lambda: replay(agent.learn_from, buffer, *agent.begin(guided=guided))


# A variant makes, from a case and whether it is guided, a function that samples a batch and makes one update.
VARIANTS = {"eager": eager_update, "compiled": compiled_update, "layer_norm": layer_norm_update}
VARIANTS |= {"graphs": graphs_update}


def bench_update(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Each variant, without and with guidance, in turns with the plain reference."""
    rows, overheads = [], []
    for name in args.algorithms:
        case = make_case(name, args)
        functions = {(PLAIN, False): plain_update(case)}
        for variant in args.variants:
            functions |= {(variant, guided): VARIANTS[variant](case, guided) for guided in (False, True)}
        flop = [update_flop(name, case.config, OBS_DIM, ACT_DIM, guided) for guided in (False, True)]
        first = {}
        for key, function in functions.items():
            progress(f"{name}, {key[0]}{', guided' * key[1]}: first updates")
            start = time.perf_counter()
            for _ in range(3):
                function()
            synchronize(args.device)
            first[key] = time.perf_counter() - start
        progress(f"{name}: {args.rounds} rounds of {args.updates} updates")
        limit = measure_limit(args)
        seconds = interleave(functions, args)
        limit = max(limit, measure_limit(args))
        plain = seconds[PLAIN, False]
        for (variant, guided), times in seconds.items():
            gflop = flop[guided] / 1e9
            row = {"algorithm": name, "update": variant, "samg": "on" if guided else "off"}
            row |= {"min_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times)}
            row |= {"ratio": min(plain) / min(times), "ratio_of_medians": median_ratio(plain, times)}
            row |= {"gflop": gflop, "limit_ms": 1e3 * gflop / limit, "share_of_limit": gflop / limit / min(times)}
            rows.append(row | {"first_3_s": first[variant, guided]})
        for variant in args.variants:
            off, on = seconds[variant, False], seconds[variant, True]
            row = {"algorithm": name, "update": variant, "overhead": min(on) / min(off) - 1}
            overheads.append(row | {"of_medians": median_ratio(on, off) - 1, "in_flop": flop[1] / flop[0] - 1})
    return {"Updates, against the plain reference": rows, "SAMG's overhead over the same update without it": overheads}


def median_ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(slow) / statistics.median(fast)


# --- The online loop
def bench_online(args: argparse.Namespace) -> dict[str, list[dict]]:
    """The parts of an online step in the loop, where they share the caches, and an action alone, hot."""
    rows, hot, clock = [], [], CLOCKS[args.clock]
    for name in args.algorithms:
        module, algorithm, run_class = load_algorithm(name)
        with tempfile.TemporaryDirectory() as folder:
            run = run_class(make_config(module, args, env=ENV, device=args.device, runs_dir=folder), algorithm)
        progress(f"{name}: {args.steps} online steps")
        config, agent, env = run.config, run.agent, run.env
        agent.start_online()
        agent.start_period(False)
        run.make_buffer()
        run.buffer.rows.copy_(random_rows(run.buffer.widths, len(run.buffer.rows), args.p_share, args.device))
        run.buffer.resize(len(run.buffer.rows))
        observation, splits, parts = env.reset(0), [], ("act", "environment", "insert", "sample", "update")
        for step in range(args.steps + 5):
            times = [clock()]
            action = agent.act(observation, deterministic=False)
            times.append(clock())
            next_observation, reward, terminated, truncated = env.step(action)
            times.append(clock())
            run.remember(observation, action, reward, next_observation, terminated)
            times.append(clock())
            batch = run.buffer.sample(config.batch_size)
            times.append(clock())
            agent.update(batch, guided=True)
            synchronize(args.device)
            times.append(clock())
            splits.append(np.diff(times))
            observation = next_observation
            if terminated or truncated:
                run.end_episode()
                observation = env.reset(step)
        medians, lowest = np.median(splits[5:], 0), np.min(splits[5:], 0)
        total = sum(medians)
        for part, median, low in zip(parts, medians, lowest):
            row = {"algorithm": name, "part": part, "min_us": 1e6 * low, "median_us": 1e6 * median}
            rows.append(row | {"share": median / total})
        seconds = [clock_of(lambda: agent.act(observation, deterministic=False), clock) for _ in range(1000)]  # noqa: B023
        hot.append({"algorithm": name, "min_us": 1e6 * min(seconds), "median_us": 1e6 * statistics.median(seconds)})
    return {"An online step, guided": rows, "An action, hot": hot}


def clock_of(function: Callable, clock: Callable) -> float:
    start = clock()
    function()
    return clock() - start


# --- Fitting the coefficients
def bench_fitting(args: argparse.Namespace) -> dict[str, list[dict]]:
    """One update of each coefficient that is fitted, on batches of the offline data."""
    case = make_case(args.algorithms[0], args)
    buffer, functions, kinds = case.buffer(), {}, set()
    for name, kind in case.module.COEFFICIENTS.items():
        coefficient = kind(make_config(case.module, args, coefficient=name), OBS_DIM, ACT_DIM, args.device)
        if coefficient.fit_iterations and kind not in kinds:  # static is fitted as vae is
            kinds.add(kind)
            functions[name, coefficient.fit_iterations] = fit_update(coefficient, buffer)
    for function in functions.values():
        function()
    progress(f"fitting: {args.rounds} rounds of {args.updates} updates")
    seconds = interleave(functions, args)
    rows = []
    for (name, n), times in seconds.items():
        row = {"coefficient": name, "min_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times)}
        rows.append(row | {"updates_of_a_run": n, "minutes_of_a_run": n * statistics.median(times) / 60})
    return {"Fitting the coefficient": rows}


def fit_update(coefficient: Any, buffer: Any) -> Callable:
    return lambda: coefficient.fit_step(buffer, 0)


# --- EDIS's retrainings
def bench_generation(args: argparse.Namespace) -> dict[str, list[dict]]:
    """What a retraining of EDIS is made of, and from that what one of them takes, and those of a run."""
    module = load_module(EDIS)
    config, bounds = make_config(module, args), np.ones(ACT_DIM, np.float32)
    env = SimpleNamespace(obs_dim=OBS_DIM, act_dim=ACT_DIM, action_low=-bounds, action_high=bounds)
    generation = module.Generation(config, env, module.EDIS(config, env, args.device).to(args.device), args.device)
    buffer = module.MixingBuffer(args.rows, OBS_DIM, ACT_DIM, args.device, config.mixing_ratio)
    buffer.rows.copy_(random_rows(buffer.widths, args.rows, 0, args.device))
    buffer.kept, buffer.size = args.rows // 2, args.rows
    generation.do_unit(generation.train_denoiser, buffer, 0)  # the first unit makes the statistics
    sizes, work = (config.energy_pool, config.n_negatives), generation.work
    for name, *shape in (("actions", *sizes, ACT_DIM), ("next_states", *sizes, OBS_DIM)):
        work[name] = torch.randn(shape, device=args.device)
    work["pool"] = torch.randn(sizes[0], generation.dim, device=args.device)
    steps, n = 4, args.generation_rows
    passes, negatives = 2 * steps - 1, 2 * config.energy_pool * config.n_negatives
    functions = {  # with their number in a retraining; the sampler's are passes of `generation_rows` rows
        "update of the denoiser": (
            lambda: generation.do_unit(generation.train_denoiser, buffer, 1),
            config.diffusion_iterations,
        ),
        "update of the energies": (
            lambda: generation.do_unit(generation.train_energies, buffer, 0),
            config.energy_updates,
        ),
        f"{n:,} rows through the denoiser": (
            lambda: generation.sample(n, steps),
            negatives / n * (2 * config.pool_steps - 1) / passes,
        ),
        f"{n:,} rows through denoiser and energies": (
            lambda: generation.sample(n, steps, generation.guide),
            config.n_generated / n * (2 * config.sample_steps - 1) / passes,
        ),
    }
    progress(f"edis: {args.rounds} rounds")
    seconds = {name: [] for name in functions}
    for function, _ in functions.values():
        function()
    for _ in range(args.rounds):
        for name, (function, _) in functions.items():
            seconds[name] += measure(function, 1, args)
    parts, minutes = [], 0.0
    for name, (_, count) in functions.items():
        per = passes if "rows" in name else 1  # a sample of 4 levels is 7 passes
        row = {"work": name, "min_ms": 1e3 * min(seconds[name]) / per}
        row |= {"median_ms": 1e3 * statistics.median(seconds[name]) / per, "of_a_retraining": count * per}
        row["minutes"] = row["median_ms"] * row["of_a_retraining"] / 60_000
        minutes += row["minutes"]
        parts.append(row)
    rate = config.n_generated / parts[-1]["minutes"] / 60
    number = math.ceil(config.online_iterations / config.retrain_frequency)
    total = {"rows_per_s": rate, "updates_per_s": 1e3 / parts[0]["median_ms"], "minutes_of_a_retraining": minutes}
    total |= {"retrainings_of_a_run": number, "hours_of_a_run": number * minutes / 60}
    return {"EDIS: the work of a retraining": parts, "EDIS: retrainings": [total]}


# --- WSRL's ensemble
class SeparateCritics(torch.nn.Module):
    """CriticEnsemble as a list of networks, one after the other, of the same weights."""

    def __init__(self, module: Any, ensemble: torch.nn.Module) -> None:
        super().__init__()
        sizes = [*(weight.shape[1] for weight in ensemble.weights), 1]
        networks = (module.mlp(*sizes, layer_norm=True) for _ in ensemble.weights[0])
        self.networks = torch.nn.ModuleList(networks).to(ensemble.weights[0])
        for i, network in enumerate(self.networks):
            linear = (layer for layer in network if isinstance(layer, torch.nn.Linear))
            for layer, weight, bias in zip(linear, ensemble.weights, ensemble.biases):
                layer.weight.data.copy_(weight[i].T), layer.bias.data.copy_(bias[i, 0])
            for layer in (layer for layer in network if isinstance(layer, torch.nn.LayerNorm)):
                layer.eps = module.LAYER_NORM_EPS

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([states, actions], dim=1)
        return torch.stack([network(inputs).squeeze(1) for network in self.networks])


def critics_update(module: Any, critic: torch.nn.Module, batch: Any, rate: float, compiled: bool) -> Callable:
    """One step of all critics towards the batch's rewards; returns the loss."""
    optimizers = {"critic": torch.optim.Adam(critic.parameters(), lr=rate, fused=True)}

    def update() -> torch.Tensor:
        loss = (critic(batch.states, batch.actions) - batch.rewards).square().mean()
        module.descend(optimizers, module.gradients(optimizers, {"critic": loss}))
        return loss.detach()

    return torch.compile(update) if compiled else update


def bench_ensemble(args: argparse.Namespace) -> dict[str, list[dict]]:
    """An update of WSRL's critics as batched products, in turns with that of as many separate networks."""
    module = load_module(WSRL)
    sizes = {"batch_size": args.batch_size, "hidden_dim": args.hidden_dim}
    config = module.TrainConfig(**{key: value for key, value in sizes.items() if value}, compile="true")
    rows = random_rows((OBS_DIM, ACT_DIM, 1, OBS_DIM, 1, 1, 1), config.batch_size, 0, args.device)
    batch = module.ReplayBuffer(1, OBS_DIM, ACT_DIM, args.device).batch(rows)
    torch.manual_seed(0)
    hidden = (config.hidden_dim, config.q_n_hidden_layers)
    ensemble = module.CriticEnsemble(config.ensemble, OBS_DIM + ACT_DIM, *hidden).to(args.device)
    functions, names = {}, ("separate", "batched")
    for kind in ("eager", "compiled"):
        if kind in args.variants and (kind == "eager" or module.compiles(config, args.device)):
            critics = SeparateCritics(module, ensemble), copy.deepcopy(ensemble)
            for name, critic in zip(names, critics):
                functions[kind, name] = critics_update(module, critic, batch, config.qf_lr, kind == "compiled")
    for (kind, name), function in functions.items():
        progress(f"ensemble, {name}, {kind}: first updates")
        for _ in range(3):
            function()
    progress(f"ensemble: {args.rounds} rounds of {args.updates} updates")
    seconds, table = interleave(functions, args), []
    for (kind, name), times in seconds.items():
        row = {"critics": name, "update": kind, "min_ms": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times)}
        separate = seconds[kind, "separate"]
        table.append(row | {"ratio": min(separate) / min(times), "ratio_of_medians": median_ratio(separate, times)})
    return {f"WSRL: an update of its {config.ensemble} critics": table}


# --- Loading
def write_dataset(path: Path, n: int) -> None:
    """Random rows in D4RL's layout, float32, uncompressed, in episodes of 1,000."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key in ("observations", "next_observations"):
            file[key] = random.standard_normal((n, OBS_DIM), dtype=np.float32)
        file["actions"] = random.random((n, ACT_DIM), dtype=np.float32) * 2 - 1
        file["rewards"] = random.random(n, dtype=np.float32)
        file["terminals"], file["timeouts"] = np.zeros(n, bool), np.arange(1, n + 1) % 1000 == 0


def bench_loading(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Run.load_dataset, with its checks and statistics, against reading the arrays; in new processes, by turns."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.hdf5"
        progress(f"loading: {args.loading_rows:,} rows")
        write_dataset(path, args.loading_rows)
        for name in args.algorithms:
            pairs = [[run_child(args, part, name, path) for part in ("read", "load")] for _ in range(args.starts)]
            read, load = (min(result["seconds"] for result in results) for results in zip(*pairs))
            peak, packed = (min(load[key] for _, load in pairs) for key in ("peak_mb", "packed_mb"))
            row = {"algorithm": name, "rows": args.loading_rows, "read_s": read, "load_s": load}
            row |= {"beyond_reading_s": load - read, "packed_mb": packed, "peak_mb": peak}
            rows.append(row | {"peak_of_packed": peak / packed})
    return {"Loading a data set, the file in the page cache": rows}


def child_read(args: argparse.Namespace, name: str, path: str) -> dict[str, float]:
    start = CLOCKS[args.clock]()
    with h5py.File(path) as file:
        data = {key: file[key][()] for key in file}
    return {"seconds": CLOCKS[args.clock]() - start, "arrays": len(data)}


def child_load(args: argparse.Namespace, name: str, path: str) -> dict[str, float]:
    module, algorithm, run_class = load_algorithm(name)
    run = run_class(make_config(module, args, env=ENV, dataset=path, device=args.device), algorithm)
    before, start = memory("VmRSS"), CLOCKS[args.clock]()
    run.load_dataset()
    synchronize(args.device)
    seconds, rows = CLOCKS[args.clock]() - start, run.dataset.rows
    return {"seconds": seconds, "peak_mb": memory("VmHWM") - before, "packed_mb": rows.nbytes / 2**20}


# --- Start-up and memory
def bench_start(args: argparse.Namespace) -> dict[str, list[dict]]:
    """New processes: --help, imports, the first updates, eager and compiled (inductor's cache empty, then full)."""
    rows = []
    for name in args.algorithms:
        progress(f"{name}: start-up, memory{' and compilation' * ('compiled' in args.variants)}")
        command = [sys.executable, FILES[name], "--help"]
        seconds = [
            clock_of(lambda: subprocess.run(command, capture_output=True, check=True), time.perf_counter)  # noqa: B023
            for _ in range(args.starts)
        ]
        imports = [run_child(args, "import", name) for _ in range(args.starts)]
        row = {"algorithm": name, "help_s": min(seconds), "import_torch_s": min(i["torch_s"] for i in imports)}
        row |= {"import_rest_s": min(i["rest_s"] for i in imports)}
        for variant in args.variants:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm")[: 1 + (variant != "eager")]:
                    result = run_child(args, "memory", name, variant, TORCHINDUCTOR_CACHE_DIR=cache)
                    label = variant if variant == "eager" else f"{variant}_{state}"
                    row |= {f"{label}_first_s": result["first_s"], f"{label}_peak_mb": result["peak_mb"]}
                    row |= {f"{label}_{key}": result[key] for key in ("peak_gpu_mb",) if key in result}
        rows.append(row)
    return {"Start-up (s) and peak memory (MB) of a process": rows}


def child_import(args: argparse.Namespace, name: str) -> dict[str, float]:
    """In a process that has imported torch already, so torch is timed in yet another one."""
    code = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"torch_s": float(process.stdout), "rest_s": clock_of(lambda: load_module(FILES[name]), time.perf_counter)}


def child_memory(args: argparse.Namespace, name: str, variant: str) -> dict[str, float]:
    """The first guided update and some more, with the buffer of an online phase."""
    case = make_case(name, args)
    args.rows = min(args.rows, case.config.buffer_size)
    function = VARIANTS[variant](case, True)
    first = clock_of(lambda: (function(), synchronize(args.device)), time.perf_counter)
    for _ in range(args.updates):
        function()
    result = {"first_s": first, "peak_mb": memory("VmHWM")}
    return result | ({"peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20} if "cuda" in args.device else {})


# --- Main
PARTS = {"update": bench_update, "online": bench_online, "fitting": bench_fitting}
PARTS |= {"loading": bench_loading, "start": bench_start, "generation": bench_generation}
PARTS |= {"ensemble": bench_ensemble}
CHILDREN = {"read": child_read, "load": child_load, "import": child_import, "memory": child_memory}


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def as_markdown(title: str, rows: list[dict]) -> str:
    """A table of rows that have the same keys."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value)

    lines = [[*rows[0]], ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def updates_per_second(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each algorithm and phase, from the medians of the fastest variant: for the estimate of a sweep."""
    rates: dict[str, dict[str, float]] = {}
    for row in next(iter(results.get("update", {}).values()), []):
        phase, rate = "online" if row["samg"] == "on" else "offline", 1000 / row["median_ms"]
        if row["update"] != PLAIN:
            phases = rates.setdefault(row["algorithm"], {})
            phases[phase] = max(rate, phases.get(phase, 0.0))
    for row in next(iter(results.get("fitting", {}).values()), [])[:1]:
        for phases in rates.values():
            phases["coefficient"] = 1000 / row["median_ms"]
    return rates


def names(text: str, known: dict, option: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise SystemExit(f"error: --{option} knows {', '.join(known)}, not {unknown[0]!r}")
    return chosen


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: %(default)s)")
    parser.add_argument("--algorithms", default=",".join(FILES), help="(default: %(default)s)")
    parser.add_argument("--variants", default="eager,compiled", help=f"{', '.join(VARIANTS)} (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="of each variant, in turns (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=10, help="a round (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="online steps (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="of each process timed as a whole (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=200_000, help="in the buffers (default: %(default)s)")
    parser.add_argument("--loading_rows", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--p_share", type=float, default=0.5, help="of the rows with p above 0 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(here: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: the process's own (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, help="(default: the algorithm's)")
    parser.add_argument("--hidden_dim", type=int, help="(default: the algorithm's)")
    parser.add_argument("--vae_hidden_dim", type=int, help="(default: the algorithm's)")
    parser.add_argument("--denoiser_width", type=int, help="of EDIS (default: the algorithm's)")
    parser.add_argument("--generation_rows", type=int, default=1000, help="EDIS's, at once (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything to this file, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.only, args.algorithms = names(args.only, PARTS, "only"), names(args.algorithms, FILES, "algorithms")
    args.variants = names(args.variants, VARIANTS, "variants")
    for name in ("rounds", "updates", "steps", "starts", "rows", "loading_rows", "threads", "generation_rows"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name} must be at least 1, it is {getattr(args, name)}")
    if args.clock == "cpu" and (args.threads > 1 or args.device != "cpu"):
        raise SystemExit("error: --clock cpu adds up all threads and sees no GPU: it needs --threads 1 --device cpu")
    return args


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    torch.set_num_threads(args.threads)
    if args.child:
        part, *rest = args.child
        print(json.dumps(CHILDREN[part](args, *rest)))
        return
    if args.json and not args.json.parent.is_dir():
        raise SystemExit(f"error: no folder {args.json.parent} to write {args.json.name} into")
    machine = torch.cuda.get_device_name() if "cuda" in args.device else "CPU"
    limit = measure_limit(args)
    head = {"device": args.device, "machine": machine, "threads": args.threads, "torch": torch.__version__}
    head |= {"clock": args.clock, "load_average": os.getloadavg()[0], "limit_gflop_per_s": limit}
    settings = {name: getattr(args, name) for name in ("rounds", "updates", "steps", "starts", "rows", "p_share")}
    results = {"machine": head, "settings": settings}
    print(", ".join(f"{key} {round(value, 1) if isinstance(value, float) else value}" for key, value in head.items()))
    for part in args.only:
        tables = PARTS[part](args)
        results[part] = tables
        print("\n" + "\n".join(as_markdown(title, rows) for title, rows in tables.items()), flush=True)
    results["updates_per_second"] = updates_per_second(results)
    results["peak_memory_mb"] = memory("VmHWM")
    if args.json:
        aside = args.json.with_name(args.json.name + ".part")
        aside.write_text(json.dumps(results, indent=2) + "\n")
        aside.replace(args.json)


if __name__ == "__main__":
    main()
