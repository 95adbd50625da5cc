"""Measure how well the coefficients p(s, a) of an algorithm file tell offline pairs from others.

    python tools/diagnostics/coefficient.py data/hopper-medium-mini.hdf5 --set vae_iterations=5000
    python tools/diagnostics/coefficient.py hopper.hdf5 --other hopper-replay.hdf5 --json p.json --pictures pictures
    python tools/diagnostics/coefficient.py hopper.hdf5 --variants vae:vae_kl_target=0,vae_beta=0.5 vae:vae_tail=mean
    python tools/diagnostics/coefficient.py runs/Hopper-v4/awac-samg-seed0/checkpoint.pt --dataset hopper.hdf5

Of a data set (D4RL's HDF5 layout, actions in [-1, 1]; no simulator is needed), contiguous stretches with a tenth of the
rows are held out, each coefficient is fitted to the rest, and p of held-out rows is set against p of
  random_action   the same states with actions drawn uniformly
  shuffled_action the same states with one another's actions
  shifted_state   each dimension of the state one standard deviation up or down
  other_level     the rows of another data set of the task (--other)
  mastered        after one adaptive update, the rows that it has learned
by AUROC: 1 tells the two apart, 0.5 does not. `embedding`, which looks at s' too, sees the successor of the data's own
action in the first three: that flatters it. For `mastered`, low is good: what is learned shall look known. This
update takes mastered_share of the other_level rows with p = 0 (random_action where these do not suffice, with the
successors of the held-out rows), drawn at random, for no critic is here to choose them.

AUROC, mean of p and its distance from uniform (Kolmogorov-Smirnov) are of p without threshold. A checkpoint's
coefficient is measured as it is; if it was fitted to this same data set, it has seen the held-out rows too.
Needs requirements-dev.txt.
"""

import argparse
import copy
import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import h5py
import matplotlib
import numpy as np
import torch
from bench import load_module
from scipy.stats import kstest
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score, roc_curve
from threadpoolctl import threadpool_limits
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

ALGORITHMS = Path(__file__).resolve().parents[2] / "algorithms"
KINDS = ("random_action", "shuffled_action", "shifted_state", "other_level")
LEVELS = (0.2, 0.5, 0.6, 0.7, 0.8)  # at which the share of held-out rows is counted, beside the threshold
STRETCHES = 50  # of consecutive rows; one of each ten is held out
MEASURED_ROWS = 10_000  # of each kind at most
LATENT_ROWS = (600, 150)  # in a t-SNE: held out, and of each other kind


class Data(NamedTuple):
    name: str
    obs_dim: int
    act_dim: int
    training: Any  # ReplayBuffer
    held_out: Any  # ReplayBuffer
    others: dict[str, Any]  # kind: Batch


class Entry(NamedTuple):
    """One row of the table."""

    label: str
    config: Any  # TrainConfig
    state: dict[str, Any] | None = None  # of a fitted coefficient, from a checkpoint


class Measured(NamedTuple):
    result: dict[str, Any]  # for the JSON file
    p: dict[str, np.ndarray]  # without threshold: held_out and the other kinds
    latents: dict[str, np.ndarray] | None


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit("error: " + " ".join(message.split()))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the options)")


# --- Input
def load_algorithm(path: Path) -> ModuleType:
    """An algorithm file as a module."""
    try:
        module = load_module(path)
        module.COEFFICIENTS, module.TrainConfig, module.load_dataset  # noqa: B018  (are they there?)
    except Exception as error:
        fail(f"{path} is no algorithm file with coefficients ({error})")
    return module


def load_rows(module: ModuleType, path: Path, env: Any = None) -> tuple[np.ndarray, Any]:
    """Rows of a data set as the algorithm's load_dataset gives them, and what that needs to know of a simulator."""
    if env is None:
        try:
            with h5py.File(path) as file:
                obs_dim, act_dim = (int(file[key].shape[1]) for key in ("observations", "actions"))
        except (OSError, KeyError, IndexError, AttributeError):
            fail(f"{path} is not a data set in D4RL's HDF5 layout, or cannot be read")
        bounds = {"action_low": -1.0, "action_high": 1.0}
        env = SimpleNamespace(name=path.stem, obs_dim=obs_dim, act_dim=act_dim, time_limit=0, **bounds)
    return module.load_dataset(path, env)[0], env


def hold_out(n: int, seed: int) -> np.ndarray:
    """Mask (n,) of the held-out rows: a random one of each ten stretches, as a row's neighbours are almost copies."""
    chosen = np.random.default_rng(seed).integers(10, size=STRETCHES // 10)
    held_out = np.zeros(n, bool)
    for i, stretch in enumerate(np.array_split(np.arange(n), STRETCHES)):
        held_out[stretch] = i % 10 == chosen[i // 10]
    return held_out


def evenly(n: int, most: int) -> np.ndarray:
    """Indices of at most `most` of n rows, evenly spaced."""
    return np.linspace(0, n - 1, min(n, most)).astype(int)


def make_data(module: ModuleType, path: Path, other: Path | None, n_rows: int, seed: int, device: str) -> Data:
    """Split a data set, and make the pairs that are not in distribution."""
    rows, env = load_rows(module, path)
    if len(rows := rows[: n_rows or None]) < 2 * STRETCHES:
        fail(f"{path}: {len(rows)} rows are too few to measure anything, {2 * STRETCHES} are the least")

    def buffer(rows: np.ndarray) -> Any:
        filled = module.ReplayBuffer(len(rows), env.obs_dim, env.act_dim, device)
        filled.load(rows)
        return filled

    held_out, random = hold_out(len(rows), seed), np.random.default_rng(seed)
    training, held_out = buffer(rows[~held_out]), rows[held_out]
    held_out = buffer(held_out[evenly(len(held_out), MEASURED_ROWS)])
    known = held_out.stored()
    n, state_std = len(known.p), training.stored().states.std(0)
    drawn = random.uniform(env.action_low, env.action_high, (n, env.act_dim)).astype(np.float32)
    signs = random.choice(np.array([-1, 1], np.float32), (n, env.obs_dim))
    others = {
        "random_action": known._replace(actions=torch.from_numpy(drawn).to(device)),
        "shuffled_action": known._replace(actions=known.actions[random.permutation(n)]),
        "shifted_state": known._replace(states=known.states + torch.from_numpy(signs).to(device) * state_std),
    }
    if other:
        rows, _ = load_rows(module, other, env)
        others["other_level"] = buffer(rows[evenly(len(rows), MEASURED_ROWS)]).stored()
    return Data(path.name, env.obs_dim, env.act_dim, training, held_out, others)


def read_settings(text: str) -> list[str]:
    """field=value,field=value as words of the algorithm's command line."""
    if bad := [word for word in text.split(",") if not word.partition("=")[0] or "=" not in word]:
        fail(f"{bad[0]!r} is not of the form field=value")
    return [f"--{word}" for word in text.split(",")]


def make_entries(module: ModuleType, args: argparse.Namespace) -> list[Entry]:
    """The table's rows: the coefficients asked for (without --variants: all that are fitted) and the variants."""
    given = ["--config", str(args.config)] if args.config else []
    given += [word for text in args.set for word in read_settings(text)]
    names, entries = args.coefficients, []
    if not names and not args.variants:  # `static` is fitted as `vae` is
        config = module.parse_config(module.TrainConfig, given)
        names = [name for name in module.COEFFICIENTS if name != "static" and fit_updates(module, config, name)]
    for label in [*names, *args.variants]:
        name, _, settings = label.partition(":")
        words = [*given, *(read_settings(settings) if settings else []), f"--seed={args.seed}", f"--coefficient={name}"]
        entries.append(Entry(label, module.parse_config(module.TrainConfig, words)))
    if len({entry.label for entry in entries}) < len(entries):
        fail("a coefficient or variant is named twice")
    return entries


def fit_updates(module: ModuleType, config: Any, name: str) -> int:
    """How many updates fit a coefficient; one of the smallest size tells."""
    return module.COEFFICIENTS[name](dataclasses.replace(config, coefficient=name), 1, 1, "cpu").fit_iterations


def load_checkpoint(args: argparse.Namespace) -> tuple[ModuleType, Entry]:
    """The algorithm's module and the fitted coefficient of a run's checkpoint."""
    path = args.source
    files = {file.stem: file for file in ALGORITHMS.glob("*_samg.py")}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        algorithm = args.algorithm or files[state["algorithm"]]
    except Exception:
        fail(f"{path} is neither a data set in HDF5 nor a checkpoint of a run")
    module = load_algorithm(algorithm)
    settings = module.parse_config(module.TrainConfig, [word for text in args.set for word in read_settings(text)])
    changed = {name.partition("=")[0] for text in args.set for name in text.split(",")}
    try:
        config = module.TrainConfig(**state["config"] | {name: getattr(settings, name) for name in changed})
        if not config.samg:
            fail(f"{path} is of a run without SAMG: it has no coefficient")
        if state["progress"]["step"] < config.offline_iterations + fit_updates(module, config, config.coefficient):
            fail(f"{path} was saved before its coefficient was fitted: name one from after the switch")
        return module, Entry(config.coefficient, config, state["coefficient"])
    except (TypeError, ValueError, KeyError) as error:
        fail(f"{path} does not fit {algorithm.name} ({error})")


def changed_fields(config: Any) -> dict[str, Any]:
    """What differs from the defaults."""
    defaults = dataclasses.asdict(type(config)()) | {"name": config.name}
    return {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}


# --- Measuring
@torch.no_grad()
def coefficient_of(coefficient: Any, batch: Any) -> np.ndarray:
    """p of a batch's rows, (n,)."""
    chunks = zip(*(columns.split(8192) for columns in batch.triple()))
    return torch.cat([coefficient(*chunk) for chunk in chunks]).cpu().numpy()


def auroc(p_known: np.ndarray, p_other: np.ndarray) -> float:
    """Chance that p of a known row is above that of another (a tie counts half)."""
    labels = np.repeat([1, 0], [len(p_known), len(p_other)])
    return float(roc_auc_score(labels, np.concatenate([p_known, p_other])))


def row_microseconds(coefficient: Any, batch: Any, n: int) -> float:
    """Median time that p of one row takes in batches of n rows."""
    triple, seconds = [columns[:n] for columns in batch.triple()], []
    for _ in range(60):
        start = time.perf_counter()
        coefficient(*triple).cpu()
        seconds.append(time.perf_counter() - start)
    return 1e6 * float(np.median(seconds[10:])) / len(triple[0])


def fit_metrics(coefficient: Any, held_out: Any, n_batches: int = 20) -> dict[str, float]:
    """A C-VAE's metrics on held-out rows: mean over batches, each of them on a copy, so that none is learned from."""
    if not hasattr(coefficient, "vae"):
        return {}
    found = [copy.deepcopy(coefficient).fit_step(held_out, coefficient.fit_iterations - 1) for _ in range(n_batches)]
    return {name: float(np.mean([metrics[name].item() for metrics in found])) for name in found[0]}


def build(module: ModuleType, config: Any, data: Data, state: dict[str, Any] | None = None) -> Any:
    """A coefficient, in the given state."""
    device = str(data.held_out.rows.device)
    coefficient = module.COEFFICIENTS[config.coefficient](config, data.obs_dim, data.act_dim, device)
    if state is not None:
        try:
            coefficient.load_state_dict(state)
        except RuntimeError as error:
            fail(f"the checkpoint does not fit {data.name}, which has other dimensions ({str(error)[:200]})")
    return coefficient


def fit(coefficient: Any, training: Any, label: str) -> float:
    """Fit a coefficient; returns the seconds that it took."""
    start = time.perf_counter()
    if coefficient.fit_iterations:
        for step in tqdm(range(coefficient.fit_iterations), desc=label, dynamic_ncols=True, mininterval=0.5):
            coefficient.fit_step(training, step)
        coefficient.fit(training)
    if training.rows.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_adaptation(
    module: ModuleType, config: Any, data: Data, coefficient: Any, p: dict, threshold: float
) -> tuple[dict, Any]:
    """One adaptive update, under the run's threshold: its report, and the mastered rows' AUROC after it."""
    held_out = data.held_out.stored()
    inside = {kind: torch.from_numpy(p[kind] >= threshold) & torch.from_numpy(p[kind] > 0) for kind in p}
    known = held_out._replace(p=torch.from_numpy(p["held_out"]).to(held_out.p)).select(inside["held_out"])
    for pool in [kind for kind in ("other_level", "random_action") if kind in data.others]:
        candidates = data.others[pool].select(~inside[pool])
        if len(candidates.p) >= config.batch_size:
            break
    counts = {"pool": pool, "candidates": len(candidates.p), "known": len(known.p)}
    if min(len(candidates.p), len(known.p)) < config.batch_size:
        return counts | {"skipped": "fewer than a batch of candidates or of known rows"}, None
    share = max(1, int(config.mastered_share * len(candidates.p)))
    mastered = candidates.select(torch.randperm(len(candidates.p))[:share])
    adapted = build(module, config, data, coefficient.state_dict())
    stored = module.Batch(*map(torch.cat, zip(held_out, data.others[pool])))
    report = adapted.adapt(mastered, known, stored)
    after = copy.deepcopy(coefficient)  # without threshold
    after.load_state_dict(adapted.state_dict())
    changes = {}
    for when, which in (("before", coefficient), ("after", after)):
        p_held_out, p_mastered = coefficient_of(which, held_out), coefficient_of(which, mastered)
        changes[f"auroc_{when}"] = auroc(p_held_out, p_mastered)
        for name, values in (("mastered", p_mastered), ("held_out", p_held_out)):
            changes[f"{name}_p_{when}"] = float(values.mean())
            changes[f"{name}_share_{when}"] = share_above(values, threshold)
    report = {name: float(value) if np.isfinite(value) else None for name, value in report.items()}
    return counts | report | changes, changes["auroc_after"]


def share_above(p: np.ndarray, threshold: float) -> float:
    return float(((p >= threshold) & (p > 0)).mean())


def pick_latents(coefficient: Any, data: Data) -> dict[str, np.ndarray] | None:
    """The C-VAE's latent means of some rows of each kind, (n, d); None of a coefficient without latents."""
    if not hasattr(coefficient, "vae"):
        return None
    found = {}
    for kind, batch in ({"held_out": data.held_out.stored()} | data.others).items():
        index = evenly(len(batch.p), LATENT_ROWS[kind != "held_out"])
        with torch.no_grad():
            found[kind] = coefficient.vae.encode(batch.states[index], batch.actions[index])[0].cpu().numpy()
    return found


def measure(module: ModuleType, entry: Entry, data: Data, seed: int) -> Measured:
    """Fit one coefficient, unless it is from a checkpoint, and measure it."""
    torch.manual_seed(seed)
    config = entry.config
    coefficient = build(module, config, data, entry.state)
    seconds = None if entry.state else fit(coefficient, data.training, entry.label)
    by_share = config.p_share and coefficient.fit_iterations
    threshold = coefficient.share_threshold.item() if by_share else config.p_threshold
    coefficient.config = dataclasses.replace(config, p_threshold=0.0, p_share=0.0)  # from here on without threshold
    held_out = data.held_out.stored()
    p = {kind: coefficient_of(coefficient, rows) for kind, rows in ({"held_out": held_out} | data.others).items()}
    metrics = fit_metrics(coefficient, data.held_out)
    if not all(np.isfinite(values).all() for values in (*p.values(), *metrics.values())):
        fail(f"{entry.label}: its losses or p are not finite, training has diverged; try a smaller learning rate")
    result = {
        "auroc": {kind: auroc(p["held_out"], p[kind]) if kind in p else None for kind in KINDS} | {"mastered": None},
        "p_threshold": threshold,
        "share_above_threshold": share_above(p["held_out"], threshold),
        "shares": {str(level): share_above(p["held_out"], level) for level in LEVELS},
        "ks_uniform": float(kstest(p["held_out"], "uniform").statistic),
        "p_mean": float(p["held_out"].mean()),
        "kl": metrics.get("vae_kl"),
        "reconstruction": metrics.get("vae_reconstruction"),
        "collapsed": metrics["vae_kl"] < 1e-3 if "vae_kl" in metrics else None,
        "fit_seconds": seconds,
        "row_microseconds": row_microseconds(coefficient, held_out, 1),
        "row_microseconds_batch": row_microseconds(coefficient, held_out, 256),
        "adapt": None,
    }
    if coefficient.adaptive:
        result["adapt"], result["auroc"]["mastered"] = measure_adaptation(
            module, config, data, coefficient, p, threshold
        )
    return Measured(result, p, pick_latents(coefficient, data))


# --- Output
def number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def tables(results: dict[str, dict]) -> str:
    """Markdown: one table of the coefficients, one of their adaptive updates, and what must be said in words."""
    head = "random action|shuffled action|shifted state|other level|mastered|share p ≥ p_m|KS|mean p|KL|reconstruction"
    head += f"|share p ≥ {', '.join(map(str, LEVELS))}"
    head = f"coefficient|{head}|fit s|µs/row|µs/row of 256"
    lines = ["AUROC of p against the pairs named, then p of held-out rows and costs:", ""]
    lines += [f"| {head.replace('|', ' | ')} |", "| --- " + "| ---: " * head.count("|") + "|"]
    for label, row in results.items():
        cells = [label, *(number(row["auroc"][kind]) for kind in (*KINDS, "mastered"))]
        cells += [number(row[name]) for name in ("share_above_threshold", "ks_uniform", "p_mean")]
        cells += [number(row["kl"], ".2g"), number(row["reconstruction"], ".3g")]
        cells += [" ".join(number(share, ".2f") for share in row["shares"].values()), number(row["fit_seconds"], ".1f")]
        cells += [number(row[name], ".1f") for name in ("row_microseconds", "row_microseconds_batch")]
        lines.append(f"| {' | '.join(cells)} |")
    updates = {label: row["adapt"] for label, row in results.items() if row["adapt"]}
    done = {label: row for label, row in updates.items() if "skipped" not in row}
    if done:
        lines += ["", "One adaptive update (p without threshold, before → after):", ""]
        head = "mastered rows|AUROC|mastered p|mastered share p ≥ p_m|held-out p|held-out share p ≥ p_m|accepted"
        lines += [f"| coefficient | {head.replace('|', ' | ')} |", "| --- " + "| ---: " * 6 + "| --- |"]
    for label, row in done.items():
        cells = [label, f"{row['mastered_rows']:.0f} of {row['candidates']}, {row['pool']}"]
        for name in ("auroc", "mastered_p", "mastered_share", "held_out_p", "held_out_share"):
            cells.append(f"{row[f'{name}_before']:.3f} → {row[f'{name}_after']:.3f}")
        lines.append(f"| {' | '.join([*cells, 'yes' if row['adapt_accepted'] else 'no, undone'])} |")
    notes = [f"`{label}`: no adaptive update, {row['skipped']} ({row['candidates']} and {row['known']})."
             for label, row in updates.items() if "skipped" in row]  # fmt: skip
    for label, row in results.items():
        if row["collapsed"]:
            notes.append(f"`{label}`: the posterior has collapsed (KL {row['kl']:.1e}, below 1e-3): z says nothing.")
        if not row["share_above_threshold"]:
            notes.append(f"`{label}`: no held-out row reaches p_m = {row['p_threshold']}: there would be no guidance.")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def draw(measured: dict[str, Measured], seed: int, threads: int) -> dict[str, bytes]:
    """The pictures as PNG files' contents, a panel a coefficient."""
    colours = {"held_out": "black"} | {kind: f"C{i}" for i, kind in enumerate(KINDS)}

    def picture(panels: list[str], draw_panel: Any) -> bytes:
        columns = min(3, len(panels))
        shape = (-(-len(panels) // columns), columns)
        figure, axes = plt.subplots(*shape, figsize=(4.5 * shape[1], 4 * shape[0]), squeeze=False, layout="constrained")
        for panel in axes.flat[len(panels) :]:
            panel.axis("off")
        for label, panel in zip(panels, axes.flat):
            panel.set_title(label.replace(",", ",\n"), fontsize=9)
            draw_panel(label, panel)
        axes.flat[0].legend(fontsize=8)
        figure.savefig(stream := io.BytesIO(), dpi=110, format="png")
        plt.close(figure)
        return stream.getvalue()

    def histogram(label: str, axes: Any) -> None:
        for kind, p in measured[label].p.items():
            weights = np.full(len(p), 1 / len(p))
            axes.hist(p, np.linspace(0, 1, 51), weights=weights, histtype="step", color=colours[kind], label=kind)
        axes.axvline(measured[label].result["p_threshold"], color="grey", linestyle=":", label="threshold")
        axes.set(xlabel="p, without threshold", ylabel="share of the rows")

    def roc(label: str, axes: Any) -> None:
        p = measured[label].p
        for kind in [kind for kind in p if kind != "held_out"]:
            labels = np.repeat([1, 0], [len(p["held_out"]), len(p[kind])])
            rates = roc_curve(labels, np.concatenate([p["held_out"], p[kind]]))[:2]
            axes.plot(*rates, color=colours[kind], label=f"{kind} {measured[label].result['auroc'][kind]:.3f}")
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
        axes.set(xlabel="share of the other rows above", ylabel="share of held-out rows above")
        axes.legend(fontsize=8, loc="lower right")

    def latents(label: str, axes: Any) -> None:
        found = measured[label].latents
        points = np.concatenate([*found.values()])
        points = (points - points.mean(0)) / (points.std(0) + 1e-12)
        tsne = TSNE(perplexity=min(30, len(points) // 4), init="random", random_state=seed)
        with threadpool_limits(threads):
            points = tsne.fit_transform(points)
        parts = np.split(points, np.cumsum([len(part) for part in found.values()])[:-1])
        for kind, part in zip(found, parts):
            axes.scatter(*part.T, s=4, color=colours[kind], label=kind, alpha=0.6)
        axes.set(xticks=[], yticks=[])

    with_latents = [label for label in measured if measured[label].latents]
    pictures = {"p_histograms.png": picture([*measured], histogram), "p_roc.png": picture([*measured], roc)}
    return pictures | ({"p_latents.png": picture(with_latents, latents)} if with_latents else {})


def main(words: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="data set (HDF5), or checkpoint.pt or offline_checkpoint.pt of a run")
    parser.add_argument("--dataset", type=Path, help="with a checkpoint: the data set whose rows are measured")
    parser.add_argument("--other", type=Path, help="data set of the same task at another policy level")
    parser.add_argument("--algorithm", type=Path, help="take the coefficients from this file (default: awac_samg.py)")
    parser.add_argument("--coefficients", nargs="+", default=[], help="names (default: all that are fitted)")
    parser.add_argument("--variants", nargs="+", default=[], help="name:field=value,field=value, each a row of its own")
    parser.add_argument("--config", type=Path, help="YAML file with fields of TrainConfig")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of TrainConfig")
    parser.add_argument("--rows", type=int, default=0, help="use the first rows of the file only (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--pictures", type=Path, help="folder to write p_histograms, p_roc and p_latents.png to")
    args = parser.parse_args(words)
    for name, least in (("rows", 0), ("seed", 0), ("threads", 1)):
        if getattr(args, name) < least:
            fail(f"--{name} must be at least {least}")
    for path in filter(None, (args.source, args.dataset, args.other, args.algorithm, args.config)):
        if not path.is_file():
            fail(f"no such file: {path}")
    if args.json and (args.json.is_dir() or not os.access(args.json.parent, os.W_OK)):
        fail(f"{args.json} is a directory, or not in one that can be written to")
    torch.set_num_threads(args.threads)

    if h5py.is_hdf5(args.source):
        if args.dataset:
            fail("--dataset is for a checkpoint; here the data set itself is the first argument")
        module, path = load_algorithm(args.algorithm or ALGORITHMS / "awac_samg.py"), args.source
        entries = make_entries(module, args)
    else:
        if args.coefficients or args.variants or args.config:
            fail("a checkpoint has one coefficient, fitted already: --coefficients, --variants, --config do not apply")
        module, entry = load_checkpoint(args)
        path, entries = args.dataset, [entry]
        if not path:
            fail(f"{args.source} holds no data: name the data set whose rows are measured with --dataset FILE")
    device = module.choose_device(entries[0].config.device)
    data = make_data(module, path, args.other, args.rows, args.seed, device)
    rows = f"{data.held_out.size:,} rows to measure" + (
        f", {data.training.size:,} to fit" if path == args.source else ""
    )
    tqdm.write(f"{path}: {rows}; {', '.join(entry.label for entry in entries)}", file=sys.stderr)
    run = {"dataset": data.name, "other": args.other and args.other.name, "source": args.source.name}
    run |= {"algorithm": Path(module.__file__).stem, "seed": args.seed, "threads": args.threads, "device": device}
    run |= {"rows_fitted": data.training.size, "rows_held_out": data.held_out.size}
    run["settings"] = {entry.label: changed_fields(entry.config) for entry in entries}
    try:
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
        measured = {}
        for entry in entries:
            measured[entry.label] = measure(module, entry, data, args.seed)
            results = {label: row.result for label, row in measured.items()}
            if args.json:  # whole after each coefficient: they can take long
                text = json.dumps({"_run": run} | results, indent=2, allow_nan=False, default=str)
                module.write_whole(args.json, (text + "\n").encode())
        print(tables(results))
        if args.pictures:
            for name, content in draw(measured, args.seed, args.threads).items():
                module.write_whole(args.pictures / name, content)
    except OSError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
