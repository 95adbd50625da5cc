"""EDIS on Cal-QL: offline pre-training, then online fine-tuning on online and on generated rows, in one file.

EDIS (Liu et al., "Energy-Guided Diffusion Sampling for Offline-to-Online Reinforcement Learning", arXiv:2407.12448)
trains a diffusion model of transitions, and three energies that steer its samples to what the present policy does:
to states that it visits, to actions that it takes, to next states that the task has. Such rows stand in the online
batches where Cal-QL (Nakamoto et al., 2023, arXiv:2303.05479) has offline ones. No guidance by SAMG here.

    python algorithms/edis.py --config configs/edis/quickstart.yaml
    python algorithms/edis.py --env Hopper-v4 --dataset my.hdf5 --offline_iterations 100000
    python algorithms/edis.py --resume runs/hopper-medium-v2/edis-seed0

"[ours]" marks a choice where the paper and its code differ, are silent or are at fault; docs/edis.md lists them all.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==4.0.0", "h5py==3.16.0",
#     "pyrallis==0.3.1", "pyyaml==6.0.4", "tqdm==4.70.1", "wandb==0.31.0",
# ]
# ///

import contextlib
import copy
import csv
import difflib
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import h5py
import numpy as np
import pyrallis
import torch
import torch.nn as nn
import yaml
from torch.optim.adam import adam as adam_step
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


# --- Configuration
@dataclass
class TrainConfig:
    # --- Task
    env: str = ""  # D4RL name, or Gymnasium id with a Box action space; empty: a Minari set's own, or hopper-medium-v2
    dataset: str = ""  # HDF5 file in D4RL's layout, folder, or minari:<id>; empty: D4RL's own, found or downloaded
    clip_actions: bool = False  # clip the data's actions to the action space, instead of refusing those outside
    max_episode_steps: int = 0  # episodes end there; 0: at the task's own limit (without one, evaluations at 1,000)
    seed: int = 0  # seeds networks, batches, exploration, generation and every training episode's reset
    eval_seed: int = 0  # seeds the evaluation episodes: the same start states for every evaluation and every run
    device: str = "auto"  # auto (cuda where there is one), cpu, cuda, cuda:1, ...
    threads: int = 1  # CPU threads; more than one pays for the diffusion model of full size, not for the rest
    compile: str = "auto"  # torch.compile Cal-QL's update: true, false, or auto: in runs of 20,000 updates and more
    graphs: str = "auto"  # replay updates as CUDA graphs: true, false, or auto: on CUDA, if that works
    # --- Run
    runs_dir: str = "runs"  # the run's folder is <runs_dir>/<env>/<name>-seed<seed>
    name: str = ""  # empty: edis, or edis-not-generated
    resume: str = ""  # folder of an interrupted run, continued with its own configuration
    offline_checkpoint: str = ""  # start online from this finished offline phase (offline_checkpoint.pt of a run)
    eval_only: str = ""  # score this checkpoint and exit
    checkpoint_frequency: int = 10_000  # steps between checkpoints (online: the next episode's start after them)
    log_frequency: int = 1_000  # steps between rows of metrics.csv
    eval_frequency: int = 5_000  # steps between evaluations
    n_test_episodes: int = 10  # episodes an evaluation
    evaluate_beside: bool = False  # in another process, while training goes on, with the same scores [ours]
    wandb: bool = False  # send the same numbers to Weights & Biases
    project: str = "SAMG"  # wandb project
    group: str = ""  # wandb group; empty: <algorithm>-<env>
    # --- Phases
    offline_iterations: int = 1_000_000  # offline updates; EDIS: 300,000
    online_iterations: int = 200_000  # online environment steps, one update each; no row of them is ever dropped
    overlap: bool = False  # on a GPU: step the environment while it updates; a row can be drawn one update later [ours]
    # --- Generated rows
    generated: bool = True  # false: offline rows in their place, in the same share: Cal-QL as CORL fine-tunes it
    retrain_frequency: int = 10_000  # online steps between retrainings of model and energies; first at the switch
    n_generated: int = 100_000  # rows that a retraining leaves, in the place of the former ones
    generation_batch: int = 10_000  # of them that are drawn at once
    sample_steps: int = 128  # noise levels of the sampler
    model_terminals: bool = True  # generate terminals, too; false: generated rows have none, as EDIS's [ours]
    # --- Diffusion model
    diffusion_iterations: int = 10_000  # updates of a retraining, from new weights
    diffusion_lr: float = 3e-4  # Adam's at its start, falling to 0 by a cosine
    denoiser_width: int = 1024  # of its residual blocks
    denoiser_layers: int = 6  # these blocks
    embed_dim: int = 256  # width of the embedding of the noise level
    # --- Energies
    state_weight: float = 1.0  # w1, of E1(s): towards states that the policy visits
    action_weight: float = 0.2  # w2, of E2(s, a): towards its actions
    next_state_weight: float = 0.2  # w3, of E3(s, a, s'): towards next states that the task has
    max_guidance: float = 10.0  # limit of a row's guidance, a component's root mean square
    guidance_form: str = "published"  # w grad E beside the score's slope; exact: times sigma, as the score itself is
    energy_updates: int = 20  # of a retraining; the energies go on from the former one
    energy_hidden_dim: int = 256  # width of their three hidden layers
    energy_lr: float = 1e-3  # Adam's
    n_negatives: int = 10  # K, generated samples against each real one
    energy_pool: int = 1_000  # online rows that the negatives of E2 and E3 are generated for [ours]
    pool_steps: int = 32  # noise levels of that sampling [ours]
    positive_rows: int = 10_000  # the online rows that count as the present policy's: the last ones [ours]
    # --- Cal-QL (CORL's names; EDIS's values for locomotion)
    batch_size: int = 256  # rows an update
    hidden_dim: int = 256  # width of the hidden layers: three of the policy, q_n_hidden_layers of each critic
    q_n_hidden_layers: int = 2  # of the critics
    critic_layer_norm: bool = True  # LayerNorm before each ReLU of the critics; EDIS has none [ours]
    orthogonal_init: bool = True  # orthogonal weights (gain sqrt 2) and zero biases; false: last layers near zero
    policy_lr: float = 1e-4  # Adam, policy and temperature
    qf_lr: float = 3e-4  # Adam, critics and log_alpha_prime
    discount: float = 0.99  # gamma
    soft_target_update_rate: float = 5e-3  # Polyak step of the target critics
    target_update_period: int = 1  # updates between Polyak steps
    alpha_multiplier: float = 1.0  # factor of the temperature
    use_automatic_entropy_tuning: bool = True  # learn the temperature: entropy towards -act_dim; false: it stays 1
    backup_entropy: bool = True  # subtract the temperature's term in the TD target, too
    bc_steps: int = 0  # first updates, in which the policy imitates the data
    cql_alpha: float = 10.0  # weight of the conservative penalty offline
    cql_alpha_online: float = 10.0  # and from the switch on
    cql_n_actions: int = 10  # actions a row of each kind in the penalty: random, policy in s', policy in s
    cql_importance_sample: bool = True  # divide by the densities that drew these actions
    cql_lagrange: bool = True  # learn the penalty's weight, so that its gap stays near cql_target_action_gap
    cql_target_action_gap: float = 10.0  # only with cql_lagrange
    cql_temp: float = 1.0  # temperature of the log-sum-exp
    cql_max_target_backup: bool = False  # TD target at the best of cql_n_actions actions in s'
    cql_clip_diff_min: float = -math.inf  # lower bound of a row's penalty
    cql_clip_diff_max: float = math.inf  # its upper bound
    normalize: bool = True  # observations to zero mean and unit variance of the offline data
    normalize_reward: bool = True  # locomotion: scale to the range of returns; antmaze: minus 1
    reward_scale: float = 1.0  # rewards enter the buffers as reward_scale * r + reward_bias, r normalised or not
    reward_bias: float = 0.0  # on antmaze it replaces normalize_reward's minus 1
    mixing_ratio: float = 0.2  # share of generated (generated false: offline) rows of each online batch
    is_sparse_reward: bool = False  # an episode without success has the return of failing for ever; two rewards

    # What check_config allows: at least 1 (as every frequency), at most 1, negative and infinite values too
    COUNTS = ("threads", "n_test_episodes", "hidden_dim", "cql_n_actions", "target_update_period", "q_n_hidden_layers")
    COUNTS += ("n_generated", "generation_batch", "diffusion_iterations", "denoiser_width", "embed_dim")
    COUNTS += ("energy_updates", "energy_hidden_dim", "n_negatives", "energy_pool", "positive_rows")
    SHARES = ("discount", "soft_target_update_rate", "mixing_ratio")
    SIGNED = ("reward_bias", "cql_target_action_gap", "cql_clip_diff_min", "cql_clip_diff_max")
    buffer_size = math.inf  # no field: online rows stay

    def __post_init__(self) -> None:
        self.name = self.name or "edis" + ("" if self.generated else "-not-generated")
        check_config(self, guidance_form=("published", "exact"))
        check_cql(self)
        if self.is_sparse_reward and self.discount == 1:
            raise ValueError("is_sparse_reward needs a discount below 1: the return of failing for ever is infinite")
        for name in ("sample_steps", "pool_steps"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, it is {getattr(self, name)}")


def check_cql(config: Any) -> None:
    """check_config's part for the fields of CQL and Cal-QL."""
    if not config.cql_temp:
        raise ValueError("cql_temp must be above 0")
    if config.cql_clip_diff_min > config.cql_clip_diff_max:
        raise ValueError("cql_clip_diff_min must not be above cql_clip_diff_max")


def check_config(config: Any, **words: Any) -> None:
    """Name the environment where none is given; raise ValueError for a value that no run can use.

    `words`: of each field that has a choice of words, beside `compile`, these.
    """
    for name in ("dataset", "runs_dir", "resume", "offline_checkpoint", "eval_only"):
        setattr(config, name, os.path.expanduser(getattr(config, name)))
    config.env = config.env or (config.dataset if re.match("minari:|ogbench:", config.dataset) else "hopper-medium-v2")
    config.compile, config.graphs = config.compile.lower(), config.graphs.lower()
    words["compile"] = words["graphs"] = ("auto", "true", "false")
    for name, value in asdict(config).items():
        if isinstance(value, str):
            if value not in words.get(name, (value,)):
                raise ValueError(f"{name} must be one of {', '.join(words[name])}, not {value!r}")
        elif name in config.SIGNED:
            if math.isnan(value):
                raise ValueError(f"{name} must be a number, it is nan")
        else:
            low, high = int(name in config.COUNTS or "_frequency" in name), 1 if name in config.SHARES else math.inf
            if not low <= value <= high or value == math.inf:
                bound = f"at most {high}" if value > high else f"finite and at least {low}"
                raise ValueError(f"{name} must be {bound}, it is {value}")
    if not 2 <= config.batch_size <= config.buffer_size:
        raise ValueError(f"batch_size {config.batch_size} must lie between 2 and buffer_size {config.buffer_size}")
    if "/" in config.name:
        raise ValueError(f"name must not hold a slash, it is {config.name!r}")


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit("error: " + " ".join(message.split()))


def reason(error: BaseException) -> str:
    """What an exception says, in a line; its kind, if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_bool(text: str) -> bool:
    if text.lower() not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "on")


def read_int(text: str) -> int:
    """A whole number, also as 1e6."""
    return int(float(text)) if re.search("[.e]", text, re.I) and float(text).is_integer() else int(text)


def read_text(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"a plain value is needed, not {text!r}")
    return text


class ConfigParser(pyrallis.argparsing.ArgumentParser):
    """pyrallis's, but values stay the text that they are written as, which YAML would turn from 007 into 7."""

    def _postprocessing(self, parsed: Any) -> Any:
        values = vars(parsed)
        if path := values.pop("config_path", ""):
            with open(Path(path).expanduser(), encoding="utf-8") as file:
                content = yaml.load(file, yaml.BaseLoader)
            if not isinstance(content, dict):
                raise ValueError(f"no 'field: value' lines in the YAML file {path}")
            values = content | values
        self.given = set(values)
        return pyrallis.decode(self.config_class, values)


def parse_config(config_class: type, argv: list[str], given: set[str] | None = None) -> Any:
    """Read the command line and the YAML file that it names; any fault ends the program with one line.

    `given` gets the names of the fields that one of both gives.
    """
    readers = {bool: read_bool, int: read_int, str: read_text}
    readers[float] = lambda text: float(text.lower().replace(".inf", "inf"))  # YAML writes -.inf
    for kind, reader in readers.items():
        pyrallis.decode.register(kind, reader)
    if not hasattr(inspect.getsource, "cache_info"):  # pyrallis calls it for each field: seconds, in a file this long
        inspect.getsource = cache(inspect.getsource)
    words = []
    for word in argv:  # argparse takes -1e-1 and -inf for options
        joins = re.match("-[^-]", word) and word != "-h" and words and re.fullmatch(r"--\w+", words[-1])
        words = [*words[:-1], f"{words[-1]}={word}"] if joins else [*words, word]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            config = (parser := ConfigParser(config_class)).parse_args(words)
            (set() if given is None else given).update(parser.given)
            return config
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        text = stderr.getvalue().split("error: ")[-1]
    except Exception as error:  # pyrallis raises bare Exceptions for unknown keys; yaml and the file system their own
        text = reason(error)
    if "unrecognized" in text or "do not belong" in text:
        names, unknown = [field.name for field in fields(config_class)], re.findall(r"--(\w+)|'(\w+)':", text)
        near = [match for word in unknown for match in difflib.get_close_matches("".join(word), names, n=1)]
        text += f" (did you mean {' or '.join(near)}?)" if near else " (--help lists the fields)"
    fail(f"configuration: {text}")


# --- Environment and data
COLUMN_ORDER = ("rewards", "terminals", "timeouts", "observations", "actions", "next_observations")  # as they are read


LARGEST = 1e15  # of states, actions, rewards: sums of squares still fit float32


def seed_global_streams(seed: int) -> None:
    """Of Python and numpy: nothing here draws from them, but a simulator may."""
    random.seed(seed)
    np.random.seed(seed)


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """The 32-bit seed of one use of randomness, so that no phase depends on what ran before it."""
    streams = ("networks", "offline", "coefficient", "online", "episode", "evaluation", "vae", "generation")
    return int(np.random.SeedSequence((seed, streams.index(stream), index)).generate_state(1)[0])


class Environment:
    """A simulator behind one interface: flat float32 observations, seeded episodes, and D4RL's scores."""

    def __init__(self, name: str, ends_at_goal: bool = True, max_steps: int = 0, **options: Any) -> None:
        """`ends_at_goal` false: binary Adroit's evaluations go on, for the whole dense return [ours]."""
        seed_global_streams(0)  # a simulator may draw from them while it is made
        self.name, (self.env, self.scoring) = name, make_simulator(name, ends_at_goal, options)
        self.check_spaces(self.env.observation_space, self.env.action_space)
        own_limit = getattr(getattr(self.env, "spec", None), "max_episode_steps", None) or 0
        if 0 < own_limit < max_steps:
            fail(f"max_episode_steps {max_steps} is above the time limit of {name}, {own_limit}")
        self.time_limit = self.max_steps = max_steps or own_limit  # 0: none
        if not self.time_limit and not ends_at_goal:
            self.max_steps = 1000
            limits = "an evaluation's episodes stop after 1,000 steps, training's only by themselves"
            tqdm.write(f"warning: {name} has no time limit: {limits}; max_episode_steps sets one for both")

    def check_spaces(self, states: Any, actions: Any) -> None:
        """Take the spaces' sizes and the actions' bounds, if a policy of these files can fill them."""
        low, high = (np.asarray(getattr(actions, side, np.nan), np.float32) for side in ("low", "high"))
        flat = all(len(space.shape or ()) == 1 and space.shape[0] for space in (states, actions))
        if not flat or not np.isfinite((low, high)).all() or not np.issubdtype(actions.dtype, np.floating):
            fail(f"{self.name} needs flat observations and bounded continuous actions, it has {states} and {actions}")
        if (bad := np.flatnonzero((low >= high) | (np.maximum(-low, high) > 1e9))).size:
            bounds = f"its action {bad[0]} lies between {low[bad[0]]:g} and {high[bad[0]]:g}"
            fail(f"{self.name}: {bounds}; bounds must differ and lie within 1e9: wrap the task so that they do")
        self.obs_dim, self.act_dim = states.shape[0], actions.shape[0]
        self.action_low, self.action_high = low, high

    def reset(self, seed: int) -> np.ndarray:
        """Start the episode that belongs to this seed. Returns the first observation, (obs_dim,) float32."""
        self.episode_return, self.solved, self.steps = 0.0, False, 0
        seed_global_streams(seed)
        try:
            return self.read(self.env.reset(seed=seed)[0])
        except Exception as error:
            fail(f"{self.name}: reset() failed, {type(error).__name__}: {error}")

    def read(self, observation: Any, reward: float = 0.0) -> np.ndarray:
        """A copy of the observation as (obs_dim,) float32, a column or not: simulators may write into theirs."""
        found = np.array(observation, np.float32).ravel()
        if len(found) != self.obs_dim:
            fail(f"{self.name} returned an observation of shape {np.shape(observation)}, not ({self.obs_dim},)")
        if not (abs(reward) <= LARGEST and np.abs(found).max() <= LARGEST):
            what = f"a reward or an observation that is not finite, or beyond {LARGEST:g}"
            fail(f"{self.name} returned {what}: the simulation is unstable")
        return found

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Returns (observation, reward, terminated, truncated); a time limit truncates, it does not terminate."""
        try:
            observation, reward, terminated, truncated, info = self.env.step(np.array(action))
            reward = np.asarray(reward, float).item()
            observation = self.read(observation, reward)
        except Exception as error:
            fail(f"{self.name}: step() failed, {type(error).__name__}: {error}")
        self.steps += 1
        self.episode_return += info.get("dense_reward", reward)
        self.solved |= bool(info.get("goal_achieved", reward > 0))
        return observation, reward, bool(terminated), bool(truncated) or self.steps == self.max_steps

    def score(self) -> float:
        """Of the episode so far: D4RL's normalised score; where success counts, 100 or 0; else the return itself."""
        if self.scoring is None or self.scoring == "success":
            return 100.0 * self.solved if self.scoring else self.episode_return
        low, high = self.scoring
        return 100.0 * (self.episode_return - low) / (high - low)


def import_package() -> Any:
    """d4rl_envs, which has D4RL's tasks and scores and reads other data sets than HDF5 files; None without it."""
    with contextlib.suppress(ImportError):
        import d4rl_envs

        return d4rl_envs if hasattr(d4rl_envs, "make") else None  # not a folder of that name, such as the checkout's


PACKAGE = "d4rl_envs: pip install ./d4rl_envs, in a checkout of the project"


def make_simulator(name: str, ends_at_goal: bool, options: dict[str, Any]) -> tuple[Any, Any]:
    """The simulator of that name and its d4rl_envs.scoring: without that package Gymnasium's own, without scores."""
    package = import_package()
    try:
        if package:
            return package.make(name, ends_at_goal=ends_at_goal, **options), package.scoring(name)
        import gymnasium

        if ends_at_goal:  # the training's; once is enough
            tqdm.write(f"{name}: scores are returns; D4RL's come with {PACKAGE}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "out of date": D4RL's tasks are the v4 ids
            return gymnasium.make(name, **options), None
    except Exception as error:
        more = "" if package else f" (D4RL's, Minari's and OGBench's tasks need {PACKAGE})"
        fail(f"cannot make the environment {name!r}: {reason(error)}{more}")


def read_columns(dataset: Path | str, task: str) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of an HDF5 file in D4RL's raw layout, one at a time; of whatever else, what d4rl_envs reads.

    timeouts and next_observations come only if the data have them.
    """
    try:
        if Path(dataset).is_file() and h5py.is_hdf5(dataset):
            with h5py.File(dataset) as file:
                if "data" not in file:  # robomimic's
                    return (yield from read_hdf5(dataset, file))
        package = import_package()
        if not package:
            convert = f"python -m d4rl_envs.sources {dataset or task} out.hdf5"
            fail(f"{dataset or task} is no HDF5 file; it is read by {PACKAGE}, or made one by `{convert}` elsewhere")
        from d4rl_envs import sources

        yield from sources.read(str(dataset), task)
    except OSError as error:
        fail(f"cannot read {dataset}, it may be cut off or of another kind ({reason(error)})")
    except ValueError as error:
        fail(str(error))


def read_hdf5(path: Path | str, file: h5py.File) -> Iterator[tuple[str, np.ndarray]]:
    if missing := sorted({*COLUMN_ORDER} - file.keys() - {"next_observations", "timeouts"}):
        fail(f"{path} is not in D4RL's layout: it has no {', '.join(missing)}, but {', '.join(file)}")
    for key in (key for key in COLUMN_ORDER if key in file):
        if not (getattr(file[key], "shape", ()) and file[key].dtype.kind in "biuf"):
            fail(f"{path}: {key} is not an array of numbers")
        yield key, file[key][()]


def load_dataset(path: Path | str, env: Environment, clip_actions: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read a data set (read_columns); what does not fit ends the program.

    Returns the transitions as rows [s | a | r | s' | d | 0 | end], (n, 2 obs_dim + act_dim + 4) float32, and the
    complete episodes' returns; `end` is 1 on the last row of an episode's. A timeout is no terminal. In a file without
    next_observations the next row is the successor; then a timeout's row has none and is dropped, as is a last row that
    ends no episode. Flags are truth values: whatever is not 0 is true.
    """
    s, a = env.obs_dim, env.act_dim
    places = {"observations": np.s_[:, :s], "actions": np.s_[:, s : s + a], "rewards": np.s_[:, s + a]}
    places |= {"next_observations": np.s_[:, s + a + 1 : -3], "terminals": np.s_[:, -3]}
    rows = timeouts = None
    columns, path = read_columns(path, env.name), path or env.name
    for key, array in columns:  # one after another, so that there is never a second copy of all
        if rows is None:
            rows = np.zeros((array.size, 2 * s + a + 4), np.float32)
            if not array.size:
                fail(f"{path} is empty")
        needed = rows[places.get(key, places["rewards"])].shape
        if array.shape == (*needed, 1):
            array = array[..., 0]
        if array.shape != needed:
            fail(f"{path}: {key} has shape {array.shape}; {env.name} needs {needed}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
            array = array.astype(np.float32, copy=False)
        if not (array.max() <= LARGEST and array.min() >= -LARGEST):
            row = np.argwhere(~(np.abs(array) <= LARGEST))[0][0]
            fail(f"{path}: {key} is not finite, or beyond {LARGEST:g}, in row {row}")
        if key == "actions" and (excess := max((array - env.action_high).max(), (env.action_low - array).max())) > 1e-3:
            if not clip_actions:
                fail(f"{path}: actions go {excess:.3g} beyond the action space of {env.name}; clip_actions clips them")
            array = array.clip(env.action_low, env.action_high)
        if key == "timeouts":
            timeouts = array.astype(bool)
        else:
            rows[places[key]] = array.astype(bool) if key == "terminals" else array
    terminals, knows_successors = rows[places["terminals"]].astype(bool), key == "next_observations"
    if not knows_successors:
        rows[places["next_observations"]] = np.roll(rows[places["observations"]], -1, axis=0)
    breaks = False
    if package := import_package():
        ends = (terminals, timeouts, knows_successors, env.time_limit)
        found = package.find_timeouts(rows[places["observations"]], rows[places["next_observations"]], *ends)
        timeouts, breaks, notes = found
        for note in notes:
            tqdm.write(f"{path}: {note}")
    elif timeouts is None:
        fail(f"{path} has no timeouts; they are guessed with {PACKAGE}")
    ends = terminals | timeouts
    returns = np.diff(np.append(0, rows[places["rewards"]].cumsum(dtype=np.float64)[np.flatnonzero(ends)]))
    keep = np.ones(len(rows), bool) if knows_successors else terminals | ~timeouts
    keep[-1] &= terminals[-1] or knows_successors
    ends |= breaks | np.append(~keep[1:], True)
    rows[:, -1] = ends
    if not keep.all():
        kept = np.flatnonzero(keep)
        for start in range(0, len(kept), 100_000):
            block = kept[start : start + 100_000]
            rows[start : start + len(block)] = rows[block]
        rows = rows[: len(kept)]
    return (rows, returns) if len(rows) else fail(f"{path} has no transition whose next observation is known")


def column_moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, summed in float64: the 7 digits of float32 are too few for it."""
    columns = [(column.mean(dtype=np.float64), column.std(dtype=np.float64)) for column in rows.T]
    return tuple(np.array(columns).T)


def reward_transform(env: Environment, episode_returns: np.ndarray, config: Any) -> tuple[float, float]:
    """CORL's reward normalisation as (scale, bias): rewards enter the buffers as scale * r + bias."""
    if not config.normalize_reward or env.name.startswith("antmaze"):
        return config.reward_scale, config.reward_bias or (-1.0 if config.normalize_reward else 0.0)
    if not env.time_limit or len(episode_returns) < 2 or np.ptp(episode_returns) == 0:
        needs = "a time limit (max_episode_steps sets one) and complete episodes of different returns"
        fail(f"{env.name}: normalize_reward needs antmaze, or {needs}")
    return env.time_limit / float(np.ptp(episode_returns)) * config.reward_scale, config.reward_bias


# --- Replay buffer
class Batch(NamedTuple):
    states: torch.Tensor  # (n, obs_dim), raw
    actions: torch.Tensor  # (n, act_dim)
    rewards: torch.Tensor  # (n,), like the following
    next_states: torch.Tensor  # (n, obs_dim)
    dones: torch.Tensor  # 1 only for true terminals, never for a time limit
    p: torch.Tensor  # the coefficient p(s, a), computed once, when the row enters
    extra: torch.Tensor  # what the algorithm keeps with a row: IQL V_off(s'), Cal-QL the return from here, others 0

    def select(self, index: torch.Tensor) -> "Batch":
        return Batch(*(column[index] for column in self))

    def triple(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """s, a and s': what a coefficient may look at."""
        return self.states, self.actions, self.next_states


class ReplayBuffer:
    """A ring of packed rows [s | a | r | s' | d | p | extra]: a batch is one gather. The first `kept` rows stay."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str) -> None:
        self.widths = (obs_dim, act_dim, 1, obs_dim, 1, 1, 1)
        self.rows = torch.from_numpy(np.zeros((capacity, sum(self.widths)), np.float32)).to(device)
        self.kept = self.size = self.pointer = 0
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # the size, for a graph to read anew

    def resize(self, size: int) -> None:
        self.size = size
        self.count.fill_(size)

    def load(self, rows: np.ndarray) -> None:
        """Keep load_dataset's rows as the first ones; where there is room for no more, themselves, not a copy."""
        if len(rows) == len(self.rows):
            self.rows = torch.from_numpy(rows).to(self.rows.device)
        else:
            self.rows[: len(rows)] = torch.from_numpy(rows)
        self.kept = self.pointer = len(rows)
        self.resize(len(rows))

    def add(self, state, action, reward: float, next_state, done: bool, p: float = 0.0, extra: float = 0.0) -> Batch:
        """Append one transition (numpy arrays and numbers), over the oldest one if the ring is full; returns its row.

        It goes up in one copy, which nothing waits for, and comes back as views, (1, ...), to be completed in place.
        """
        row = np.concatenate((state, action, (reward,), next_state, (done, p, extra)), dtype=np.float32)
        place, row = self.rows[self.pointer : self.pointer + 1], torch.from_numpy(row[None])
        place.copy_(row.pin_memory() if place.is_cuda else row, non_blocking=True)
        if self.pointer == self.size:
            self.resize(self.size + 1)
        self.pointer = self.pointer + 1 if self.pointer + 1 < len(self.rows) else self.kept
        return self.batch(place)

    def batch(self, rows: torch.Tensor) -> Batch:
        """Split packed rows (n, width) into a Batch of views."""
        s, a, r, s_next, d, p, extra = torch.split(rows, self.widths, dim=1)
        return Batch(s, a, r.squeeze(1), s_next, d.squeeze(1), p.squeeze(1), extra.squeeze(1))

    def sample(self, batch_size: int) -> Batch:
        """Rows drawn uniformly with replacement."""
        if self.rows.is_cuda:
            index = torch.randint(2**62, (batch_size,), device=self.rows.device) % self.count
        else:
            index = torch.randint(self.size, (batch_size,))
        return self.batch(self.rows[index])

    def stored(self) -> Batch:
        """All rows, as views, so that p can be rewritten in place."""
        return self.batch(self.rows[: self.size])

    def latest(self, n: int) -> Batch:
        """The last n rows that entered the ring, oldest first (fewer, if it holds fewer)."""
        n, ring = min(n, self.size - self.kept), len(self.rows) - self.kept
        index = self.kept + (self.pointer - self.kept - n + torch.arange(n, device=self.rows.device)) % ring
        return self.batch(self.rows[index])

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows[self.kept : self.size].clone(), "pointer": self.pointer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError if it is not of such a ring, or of a smaller one, as an extended run has."""
        rows, pointer, size = state["rows"], state["pointer"], self.kept + len(state["rows"])
        places = range(self.kept, size) if size == len(self.rows) else (size, self.kept)
        if rows.shape[1:] != self.rows.shape[1:] or size > len(self.rows) or pointer not in places:
            raise ValueError(f"a buffer of {tuple(rows.shape)} with its pointer at {pointer} does not fit")
        self.pointer = pointer if size == len(self.rows) else size
        self.resize(size)
        self.rows[self.kept : self.size] = rows.to(self.rows.device)


# --- Networks
def mlp(*sizes: int, layer_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, with `layer_norm` a LayerNorm before each of these."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(n_in, n_out), *([nn.LayerNorm(n_out)] if layer_norm else []), nn.ReLU()]
    return nn.Sequential(*layers[: -2 if layer_norm else -1])


class LiveArrays:
    """Tensors of an agent as numpy arrays, as for a single row torch is slow; on a CPU of the same memory.

    On a GPU they are copies, made all in one after `stale` was set: by an update or a load, the only ones that may
    change what is copied.
    """

    def __init__(self, agent: nn.Module, network: str, *names: str) -> None:
        layers = [name for name, _ in agent.named_parameters() if name.startswith(network)]
        self.agent, self.names, self.address, self.arrays = agent, (*names, *layers), 0, []
        self.stale, self.copied = True, None  # an event behind the copy that is under way
        agent.register_load_state_dict_post_hook(lambda agent, _: setattr(agent.live_arrays, "stale", True))

    def fetch(self) -> None:
        """Begin to copy what has changed; a GPU does so behind its update, and nothing here waits for it."""
        first = self.agent.obs_mean
        if first.data_ptr() != self.address:  # the agent has changed its place or type
            tensors = self.agent.state_dict()
            self.tensors = host = [tensors[name] for name in self.names]
            if first.is_cuda:
                self.flat = torch.empty(sum(t.numel() for t in host), dtype=first.dtype, pin_memory=True)
                parts = self.flat.split([t.numel() for t in host])
                host = [part.view(t.shape) for part, t in zip(parts, host)]
            self.address, self.arrays, self.stale = first.data_ptr(), [t.numpy() for t in host], True
        if self.stale and first.is_cuda:
            self.flat.copy_(torch.cat([t.flatten() for t in self.tensors]), non_blocking=True)
            self.copied, self.stale = torch.cuda.current_stream(first.device).record_event(), False

    def __call__(self) -> list[np.ndarray]:
        """Those of these names, then weight and bias of each layer of mlp()'s network."""
        self.fetch()
        if self.copied:
            self.copied.synchronize()
            self.copied = None
        return self.arrays


def one_row(layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """mlp() for a single row, (n_in,) -> (n_out,)."""
    *hidden, weight, bias = layers
    for hidden_weight, hidden_bias in zip(hidden[::2], hidden[1::2]):
        x = hidden_weight.dot(x)  # quicker than @
        x += hidden_bias
        np.maximum(x, 0, out=x)
    return weight.dot(x) + bias


class TanhGaussian(NamedTuple):
    """Policies for n states: tanh of diagonal Gaussians, so that actions lie in (-1, 1)."""

    mean: torch.Tensor  # (n, act_dim), before tanh
    log_std: torch.Tensor  # (n, act_dim)

    def sample(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k reparameterised actions for each state, (n, k, act_dim), and their log-probabilities, (n, k)."""
        n, act_dim = self.mean.shape
        noise = self.mean.new_empty(n, k, act_dim).normal_()
        before_tanh = self.mean[:, None] + self.log_std.exp()[:, None] * noise
        return before_tanh.tanh(), tanh_log_prob(noise, self.log_std[:, None], before_tanh)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """(n,), of given actions (n, act_dim); on the border, where it is infinite, of those just inside."""
        assert actions.shape == self.mean.shape, (actions.shape, self.mean.shape)
        before_tanh = actions.clamp(-1 + 1e-5, 1 - 1e-5).atanh()
        noise = (before_tanh - self.mean) * (-self.log_std).exp()
        return tanh_log_prob(noise, self.log_std, before_tanh)


def tanh_log_prob(noise: torch.Tensor, log_std: torch.Tensor, before_tanh: torch.Tensor) -> torch.Tensor:
    """Log-density of tanh(before_tanh), before_tanh = mean + std noise, summed over the last dimension.

    log(1 - tanh(u)^2) = 2 (log 2 - u + log sigmoid(2 u)) is exact where tanh(u) rounds to 1.
    """
    normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - before_tanh + nn.functional.logsigmoid(2 * before_tanh))
    return (normal - log_slope).sum(-1)


class TanhGaussianActor(nn.Module):
    """CORL's CQL policy: mean and log-std from one network; the log-std passes a learned scale and offset."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, orthogonal: bool) -> None:
        super().__init__()
        self.network = initialize(mlp(obs_dim, hidden_dim, hidden_dim, hidden_dim, 2 * act_dim), orthogonal)
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, states: torch.Tensor) -> TanhGaussian:
        """states: (n, obs_dim), normalised."""
        mean, log_std = self.network(states).chunk(2, dim=1)
        return TanhGaussian(mean, (self.log_std_multiplier * log_std + self.log_std_offset).clamp(-20, 2))


def initialize(network: nn.Sequential, orthogonal: bool) -> nn.Sequential:
    """CORL's start: orthogonal weights with gain sqrt 2 and zero biases in every layer, else a last layer near zero."""
    for layer in filter(lambda layer: orthogonal and isinstance(layer, nn.Linear), network):
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
        nn.init.zeros_(layer.bias)
    if not orthogonal:
        nn.init.xavier_uniform_(network[-1].weight, gain=1e-2)
    return network


class TwinCritic(nn.Module):
    """Two Q-functions of the same inputs."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, n_hidden: int, layer_norm: bool) -> None:
        super().__init__()
        sizes = (obs_dim + act_dim, *[hidden_dim] * n_hidden, 1)
        self.heads = nn.ModuleList(mlp(*sizes, layer_norm=layer_norm) for _ in range(2))

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """states: (n, obs_dim), normalised; actions: (n, act_dim). Returns Q, (2, n)."""
        inputs = torch.cat([states, actions], dim=1)
        return torch.stack([head(inputs).squeeze(1) for head in self.heads])


def q_values(critic: nn.Module, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Q of k actions for each state, (critics, n, k), in one pass; states: (n, obs_dim), actions: (n, k, act_dim)."""
    n, k, act_dim = actions.shape
    assert len(states) == n, (states.shape, actions.shape)
    return critic(states.repeat_interleave(k, dim=0), actions.reshape(n * k, act_dim)).view(-1, n, k)


def conservative_gap(q: torch.Tensor, log_density: torch.Tensor, config: Any) -> torch.Tensor:
    """Log-sum-exp of Q over the sampled actions minus Q of the data's action, clipped, mean over rows: (2,).

    q: (2, n, 1 + m), the data's action first; log_density: (n, m), of each sampled action under what drew it.
    """
    assert q.shape[1:] == (len(log_density), 1 + log_density.shape[1]), (q.shape, log_density.shape)
    terms = q[:, :, 1:] - log_density if config.cql_importance_sample else q  # without: the data's action, too, as CORL
    soft_maximum = config.cql_temp * (terms / config.cql_temp).logsumexp(2)
    return (soft_maximum - q[:, :, 0]).clamp(config.cql_clip_diff_min, config.cql_clip_diff_max).mean(1)


# --- Diffusion model (EDM: Karras et al., 2022, arXiv:2206.00364)
# Noise levels sigma of the sampler, the data's own deviation, log sigma in training, and the sampler's added noise
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA, RHO = 0.002, 80.0, 1.0, 7.0
P_MEAN, P_STD = -1.2, 1.2
S_CHURN, S_TMIN, S_TMAX, S_NOISE = 80.0, 0.05, 50.0, 1.003


def normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """N(0, 1) in the shape of `like`."""
    return torch.empty_like(like).normal_(generator=generator)


def scalings(sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """EDM's Table 1: c_skip, c_out, c_in and c_noise, each in the shape of sigma."""
    length = (sigma**2 + SIGMA_DATA**2).sqrt()
    return SIGMA_DATA**2 / length**2, sigma * SIGMA_DATA / length, 1 / length, sigma.log() / 4


class Denoiser(nn.Module):
    """D(x, sigma), EDM's Eq. (7), around SynthER's residual network (Lu et al., 2023, arXiv:2303.06614)."""

    def __init__(self, dim: int, width: int, layers: int, embed_dim: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(8))
        self.embedding = nn.Sequential(nn.Linear(17, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.inner, self.first = nn.Linear(dim, embed_dim), nn.Linear(embed_dim, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, dim)

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """Draw new frequencies, and weights as nn.Linear draws them."""
        self.frequencies.normal_(generator=generator)
        for layer in (module for module in self.modules() if isinstance(module, nn.Linear)):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The clean rows behind noisy ones x, (n, dim), standardised; sigma: (n, 1) or (1, 1)."""
        c_skip, c_out, c_in, c_noise = scalings(sigma)
        waves = 2 * math.pi * self.frequencies * c_noise
        h = self.inner(c_in * x) + self.embedding(torch.cat([c_noise, waves.sin(), waves.cos()], dim=1))
        h = self.first(h)
        for block in self.blocks:
            h = h + block(h.relu())
        return c_skip * x + c_out * self.last(h.relu())


def diffusion_loss(denoise: Callable, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """EDM's Eq. (2) with the weight of Table 1, of clean rows x, (n, dim); sigma is log-normal, one a row."""
    sigma = (P_MEAN + P_STD * normal(x[:, :1], generator)).exp()
    error = denoise(x + sigma * normal(x, generator), sigma) - x
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * error.square().mean(1, keepdim=True)).mean()


def ema_decay(step: int) -> float:
    """Of the average of the weights after update `step`, counted from 1: ema-pytorch's warm-up, a copy up to 101."""
    return min(max(0.0, 1 - max(1.0, step - 100) ** (-2 / 3)), 0.995)


def noise_levels(n: int) -> list[float]:
    """EDM's Eq. (5): n levels from SIGMA_MAX down to SIGMA_MIN, then 0."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [*((high + i / (n - 1) * (low - high)) ** RHO for i in range(n)), 0.0]


def added_noise(sigma: float, n: int) -> float:
    """gamma of EDM's Algorithm 2: the share by which a level is raised before its step."""
    return min(S_CHURN / n, math.sqrt(2) - 1) if S_TMIN <= sigma <= S_TMAX else 0.0


@torch.no_grad()
def denoise_rows(
    denoise: Callable,
    x: torch.Tensor,
    levels: list[float],
    generator: torch.Generator,
    guide: Callable | None = None,
    known: torch.Tensor | None = None,
    churn: bool = True,
) -> torch.Tensor:
    """EDM's Algorithm 2, Heun's method: rows x, (n, dim), of noise of the first level, become samples, (n, dim).

    `guide(x, sigma)`, (n, dim), is added to dx/dsigma wherever that is taken; sigma falls, so it is what x goes down.
    `known`, (n, k): the first k columns are in-painted: at each level they are these values with its noise.
    """

    def fill(x: torch.Tensor, sigma: float) -> torch.Tensor:
        if known is None:
            return x
        return torch.cat([known + sigma * normal(known, generator), x[:, known.shape[1] :]], dim=1)

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        level = x.new_full((1, 1), sigma)
        along = (x - denoise(x, level)) / sigma
        return along + guide(x, level) if guide else along

    for sigma, following in zip(levels, levels[1:]):
        raised = sigma * (1 + (added_noise(sigma, len(levels) - 1) if churn else 0))
        if raised > sigma:
            x = x + math.sqrt(raised**2 - sigma**2) * S_NOISE * normal(x, generator)
        x = fill(x, raised)
        first = slope(x, raised)
        ahead = x + (following - raised) * first
        if following:
            second = slope(fill(ahead, following), following)
            ahead = x + (following - raised) * (first + second) / 2
        x = ahead
    return x if known is None else torch.cat([known, x[:, known.shape[1] :]], dim=1)


# --- Energies
def info_nce(positive: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Mean of -log e^-E(x) / (e^-E(x) + sum_j e^-E(x_j)), of the energies of positives, (n,), and negatives, (n, K).

    At its minimum e^E is the negatives' density over the positives', up to a factor.
    """
    return (positive + (-torch.cat([positive[:, None], negatives], dim=1)).logsumexp(1)).mean()


def energy_inputs(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What an energy gets: noisy columns (..., d) at the scale that the denoiser gets them [ours], and their level."""
    _, _, c_in, c_noise = scalings(sigma)
    return torch.cat([c_in * noisy, c_noise.expand(*noisy.shape[:-1], 1)], dim=-1)


def contrast(
    energy: Callable,
    condition: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    sigma: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """InfoNCE loss of an energy, of n groups: a positive, (n, d), and its negatives, (n, K, d).

    A group shares its level, sigma (n, 1), and its condition, (n, c), noised once; each target has its own noise.
    """
    targets = torch.cat([positives[:, None], negatives], dim=1)
    targets = targets + sigma[:, :, None] * normal(targets, generator)
    condition = condition + sigma * normal(condition, generator)
    groups = torch.cat([condition[:, None].expand(-1, targets.shape[1], -1), targets], dim=2)
    energies = energy(energy_inputs(groups, sigma[:, :, None])).squeeze(2)
    return info_nce(energies[:, 0], energies[:, 1:])


def guidance_slope(energy: Callable, x: torch.Tensor, sigma: torch.Tensor, limit: float, exact: bool) -> torch.Tensor:
    """Gradient by x, (n, dim), of energy(x, sigma), (n,), a row's norm held below limit times sqrt(dim).

    The score's own slope is -sigma times the gradient of log p: `exact` multiplies by sigma, too, EDIS does not.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(x, sigma).sum(), x)
    bound = limit * math.sqrt(x.shape[1])
    slope = slope * (bound / slope.norm(dim=1, keepdim=True).clamp_min(bound))
    return sigma * slope if exact else slope


# --- Generated rows
class Generation:
    """The diffusion model of rows (s, a, r, s' and, if modelled, d), the energies, and what both have generated.

    A retraining is a chain of units of work, numbered by `unit`: between any two of them it can be saved. Each has a
    random stream of its own, seeded by its number, so that the training's streams do not notice, and a resumed
    retraining draws what an uninterrupted one draws.
    """

    COLUMNS = ("diffusion_loss", "state_energy_loss", "action_energy_loss", "next_state_energy_loss")
    COLUMNS += ("generated_rows", "generated_dropped", "generated_clipped", "generated_reward", "data_reward")
    COLUMNS += ("generated_done", "data_done", "generated_mean_shift", "generated_std", "generated_distance")
    COLUMNS += ("data_distance", "action_distance", "state_guidance", "action_guidance", "next_state_guidance")

    def __init__(self, config: Any, env: Environment, agent: nn.Module, device: str) -> None:
        self.config, self.agent, self.device = config, agent, device
        s, a = self.sizes = env.obs_dim, env.act_dim
        self.models_terminals = config.model_terminals and not config.is_sparse_reward  # there d follows from r
        self.dim = 2 * s + a + 1 + self.models_terminals
        sizes = (self.dim, config.denoiser_width, config.denoiser_layers, config.embed_dim)
        self.denoiser = Denoiser(*sizes).to(device)
        self.average = frozen_copy(self.denoiser)  # exponential moving average of the weights: what samples
        hidden = [config.energy_hidden_dim] * 3
        widths = {"state": s, "action": s + a, "next_state": 2 * s + a}
        self.energies = {name: mlp(width + 1, *hidden, 1).to(device) for name, width in widths.items()}
        adam = partial(torch.optim.Adam, fused=True)
        self.optimizers = {name: adam(net.parameters(), lr=config.energy_lr) for name, net in self.energies.items()}
        self.optimizers["denoiser"] = adam(self.denoiser.parameters(), lr=config.diffusion_lr, betas=(0.9, 0.99))
        self.generator = torch.Generator(device)
        self.retrainings = self.unit = 0  # finished ones; units of the present one that are done
        self.rows = torch.zeros(0, 2 * s + a + 4, device=device)  # generated, as a ReplayBuffer packs them
        self.work: dict[str, torch.Tensor] = {}  # what the present retraining has made so far

    # --- A retraining
    def stages(self, online_rows: int) -> list[tuple[str, int, Callable]]:
        """Of a retraining: the name of each, its number of units, and unit(buffer, i).

        Without online rows there is nothing to steer to: the first one, at the switch, only learns and draws [ours].
        """
        config = self.config
        diffusion = ("diffusion", config.diffusion_iterations, self.train_denoiser)
        energies = [("negatives", 2, self.draw_negatives), ("energies", config.energy_updates, self.train_energies)]
        drawing = ("generation", math.ceil(config.n_generated / config.generation_batch), self.generate)
        return [diffusion, *(energies if online_rows else []), drawing]

    def do_unit(self, work: Callable, buffer: "MixingBuffer", i: int) -> None:
        """One unit of a stage, its number i."""
        number = self.retrainings * 2**32 + self.unit
        self.generator.manual_seed(derive_seed(self.config.seed, "generation", number))
        work(buffer, i)
        self.unit += 1

    def finish(self, buffer: "MixingBuffer") -> dict[str, float]:
        """Put the new rows in the place of the former ones; returns the retraining's report."""
        report = self.measure(buffer)
        self.rows, self.work, self.unit = self.work["rows"], {}, 0
        self.retrainings += 1
        self.optimizers["denoiser"].state.clear()
        return report

    def choose(self, n: int, *shape: int) -> torch.Tensor:
        """Numbers below n, uniformly with replacement."""
        return torch.randint(n, shape, generator=self.generator, device=self.device)

    def standardise(self, columns: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Raw columns (n, k), the first of which is the model's column `first`."""
        place = slice(first, first + columns.shape[1])
        return (columns - self.work["mean"][place]) / self.work["std"][place]

    def note(self, stage: str, i: int, length: int, losses: dict[str, torch.Tensor]) -> None:
        """Sum up the losses of the second half of a stage for the report."""
        if i >= length // 2:
            for name, loss in losses.items():
                self.work[name] = self.work.get(name, 0) + loss.detach() / (length - length // 2)
        if i == length - 1 and not all(self.work[name].isfinite() for name in losses):
            fail(f"the {stage}'s loss is not finite: {DIVERGED}")

    def train_denoiser(self, buffer: "MixingBuffer", i: int) -> None:
        """One update, on rows drawn from all there are, offline and online."""
        config, length = self.config, self.config.diffusion_iterations
        if i == 0:  # new statistics and weights
            mean, std = column_moments(buffer.rows[: buffer.size, : self.dim].cpu().numpy())
            if self.models_terminals:  # these stay 0 and 1
                mean[-1], std[-1] = 0, 1
            columns = {"mean": mean, "std": std + 1e-5}
            self.work = {key: torch.from_numpy(value).float().to(self.device) for key, value in columns.items()}
            self.denoiser.restart(self.generator)
        optimizer = {"denoiser": self.optimizers["denoiser"]}
        x = self.standardise(buffer.rows[self.choose(buffer.size, config.batch_size), : self.dim])
        loss = diffusion_loss(self.denoiser, x, self.generator)
        along = gradients(optimizer, {"denoiser": loss})["denoiser"]
        scale = (1 / torch.stack(torch._foreach_norm(along)).norm()).clamp_max(1)  # to a norm of at most 1
        optimizer["denoiser"].param_groups[0]["lr"] = config.diffusion_lr * (1 + math.cos(math.pi * i / length)) / 2
        descend(optimizer, {"denoiser": [gradient * scale for gradient in along]})
        if i % 10 == 0:
            with torch.no_grad():
                averages, weights = [*self.average.parameters()], [*self.denoiser.parameters()]
                torch._foreach_lerp_(averages, weights, 1 - ema_decay(i + 1))
            self.average.frequencies.copy_(self.denoiser.frequencies)
        self.note("diffusion", i, length, {"diffusion_loss": loss})

    def sample(self, n: int, steps: int, guide: Callable | None = None, known=None) -> torch.Tensor:
        """n rows of the model, (n, dim), standardised."""
        levels = noise_levels(steps)
        x = levels[0] * torch.randn(n, self.dim, generator=self.generator, device=self.device)
        return denoise_rows(self.average, x, levels, self.generator, guide, known)

    def draw_recent(self, buffer: "MixingBuffer", n: int) -> torch.Tensor:
        """n of the last positive_rows online rows, packed."""
        recent, ring = min(self.config.positive_rows, buffer.size - buffer.kept), len(buffer.rows) - buffer.kept
        back = 1 + self.choose(recent, n)
        return buffer.rows[buffer.kept + (buffer.pointer - buffer.kept - back) % ring]

    def draw_negatives(self, buffer: "MixingBuffer", i: int) -> None:
        """K samples of a given s, for E2, and then of s' given (s, a), for E3, for each row of a pool: in-painted.

        A real s' would not do for E3: were negatives and positives alike, it would be constant.
        """
        (s, a), config, work = self.sizes, self.config, self.work
        if i == 0:
            work["pool"] = self.standardise(self.draw_recent(buffer, config.energy_pool)[:, : self.dim])
        known, targets = (s, np.s_[:, s : s + a]) if i == 0 else (s + a, np.s_[:, s + a + 1 : 2 * s + a + 1])
        known = work["pool"][:, :known].repeat_interleave(config.n_negatives, dim=0)
        parts = (self.sample(len(p), config.pool_steps, known=p)[targets] for p in known.split(config.generation_batch))
        work[("actions", "next_states")[i]] = torch.cat([*parts]).view(config.energy_pool, config.n_negatives, -1)

    def train_energies(self, buffer: "MixingBuffer", i: int) -> None:
        """One update of each energy, at levels of the sampler's own."""
        (s, a), config, work, n = self.sizes, self.config, self.work, self.config.batch_size
        levels = torch.tensor(noise_levels(config.sample_steps)[:-1], device=self.device)
        sigma = levels[self.choose(len(levels), n, 1)]
        draw = partial(contrast, sigma=sigma, generator=self.generator)
        visited = self.standardise(self.draw_recent(buffer, n)[:, :s])
        others = self.standardise(buffer.rows[self.choose(buffer.size, n * config.n_negatives), :s])
        picked = self.choose(config.energy_pool, n)
        x, states = work["pool"][picked], work["pool"][picked, :s]
        actions = self.standardise(self.policy_actions(states * work["std"][:s] + work["mean"][:s]), s)
        pair, next_states = x[:, : s + a], x[:, s + a + 1 : 2 * s + a + 1]
        e_1, e_2, e_3 = self.energies.values()
        losses = {"state": draw(e_1, states[:, :0], visited, others.view(n, config.n_negatives, s))}
        losses["action"] = draw(e_2, states, actions, work["actions"][picked])
        losses["next_state"] = draw(e_3, pair, next_states, work["next_states"][picked])
        optimizers = {name: self.optimizers[name] for name in losses}
        descend(optimizers, gradients(optimizers, losses))
        self.note("energies", i, config.energy_updates, {f"{name}_energy_loss": x for name, x in losses.items()})

    @torch.no_grad()
    def policy_actions(self, states: torch.Tensor) -> torch.Tensor:
        """One of the policy's for each raw state, (n, act_dim), in the environment's units."""
        mean, log_std = self.agent.actor(self.agent.normalize(states))
        return self.agent.from_unit((mean + log_std.exp() * normal(mean, self.generator)).tanh())

    def energy(self, x: torch.Tensor, sigma: torch.Tensor, weights: tuple[float, float, float]) -> torch.Tensor:
        """w1 E1(s) + w2 E2(s, a) + w3 E3(s, a, s'), (n,): by its gradient each E moves its last part alone."""
        s, a, _, s_next, _ = x.split([*self.sizes, 1, self.sizes[0], int(self.models_terminals)], dim=1)
        parts = ((s,), (s.detach(), a), (s.detach(), a.detach(), s_next))
        total = x[:, 0] * 0
        for weight, energy, columns in zip(weights, self.energies.values(), parts):
            if weight:
                total = total + weight * energy(energy_inputs(torch.cat(columns, dim=1), sigma)).squeeze(1)
        return total

    def weights(self) -> tuple[float, float, float]:
        config = self.config
        return config.state_weight, config.action_weight, config.next_state_weight

    def guide(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        config = self.config
        energy = partial(self.energy, weights=self.weights())
        return guidance_slope(energy, x, sigma, config.max_guidance, config.guidance_form == "exact")

    def generate(self, buffer: "MixingBuffer", i: int) -> None:
        """Draw generation_batch rows, or the rest."""
        config, work = self.config, self.work
        n = min(config.generation_batch, config.n_generated - i * config.generation_batch)
        guided = buffer.size > buffer.kept and any(self.weights())
        x = self.sample(n, config.sample_steps, self.guide if guided else None)
        rows, clipped = self.to_rows(x * work["std"] + work["mean"], buffer)
        parts = {"rows": rows, "clipped": clipped, "dropped": torch.tensor(n - len(rows))}
        if i == 0:
            work |= parts
        else:
            work["rows"] = torch.cat([work["rows"], rows])
            work["clipped"], work["dropped"] = work["clipped"] + clipped, work["dropped"] + parts["dropped"]
        if i * config.generation_batch + n == config.n_generated and not len(work["rows"]):
            fail(f"no generated row is finite: {DIVERGED}")

    def to_rows(self, raw: torch.Tensor, buffer: "MixingBuffer") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as a ReplayBuffer packs them of the model's raw samples, (n, dim), and the number of clipped ones.

        What is not finite is dropped; actions are clipped to just inside their bounds; of a sparse task's two rewards
        a row gets the nearer one, and d as most real rows of that reward have it. There is no return to bound Q by.
        """
        (s, a), columns = self.sizes, sum(buffer.widths)
        raw = raw[(raw.abs() <= LARGEST).all(1)]  # nan is not
        rows = raw.new_zeros(len(raw), columns)
        rows[:, : 2 * s + a + 1] = raw[:, : 2 * s + a + 1]
        unit = self.agent.to_unit(rows[:, s : s + a])
        limited = unit.clamp(-1 + 1e-5, 1 - 1e-5)
        rows[:, s : s + a] = self.agent.from_unit(limited)
        if self.models_terminals:
            rows[:, -3] = (raw[:, -1] > 0.5).float()
        elif self.config.is_sparse_reward:
            real = buffer.stored()
            low, high = real.rewards.min(), real.rewards.max()
            success, middle = rows[:, s + a] > (low + high) / 2, (low + high) / 2
            rows[:, s + a] = torch.where(success, high, low)
            if self.config.model_terminals:
                real_success = (real.rewards > middle).float()
                ends = [(real.dones * part).sum() * 2 > part.sum() for part in (1 - real_success, real_success)]
                rows[:, -3] = torch.where(success, ends[1], ends[0]).float()
        rows[:, -1] = -math.inf
        return rows, (limited != unit).any(1).sum()

    @torch.no_grad()
    def measure(self, buffer: "MixingBuffer") -> dict[str, float]:
        """The report of a retraining, COLUMNS: docs/edis.md explains them."""
        (s, a), work, rows = self.sizes, self.work, self.work["rows"]
        real, x, plain = buffer.stored(), self.standardise(rows[:, : self.dim]), 2 * s + a + 1  # without d
        report = {name: work[name].item() for name in self.COLUMNS[:4] if name in work}
        report |= {"generated_rows": len(rows), "generated_dropped": work["dropped"].item()}
        report |= {"generated_clipped": work["clipped"].item() / len(rows), "generated_done": rows[:, -3].mean().item()}
        report |= {"generated_reward": rows[:, s + a].mean().item(), "data_reward": real.rewards.mean().item()}
        report |= {"data_done": real.dones.mean().item()}
        report |= {"generated_mean_shift": x[:, :plain].mean(0).abs().max().item()}
        report |= {"generated_std": x[:, :plain].std(0, correction=0).mean().item()}
        order = torch.randperm(buffer.size, generator=self.generator, device=self.device)[:11_000]
        probe, others = order.split([n := min(1000, buffer.size // 2), len(order) - n])
        others = self.standardise(buffer.rows[others, : self.dim])
        for name, some in (("generated", x[:1000]), ("data", self.standardise(buffer.rows[probe, : self.dim]))):
            nearest = torch.cdist(some, others).amin(1) / math.sqrt(self.dim)
            report[f"{name}_distance"] = nearest.mean().item()
        policy = self.agent.actor(self.agent.normalize(rows[:1000, :s])).mean.tanh()
        apart = self.agent.to_unit(rows[:1000, s : s + a]) - policy
        report["action_distance"] = apart.abs().mean().item()
        if buffer.size > buffer.kept:
            sigma = x.new_full((1, 1), 0.5)
            noisy = x[:1000] + 0.5 * normal(x[:1000], self.generator)
            for i, name in enumerate(self.energies):
                weights = tuple(weight * (i == k) for k, weight in enumerate(self.weights()))
                slope = guidance_slope(partial(self.energy, weights=weights), noisy, sigma, 1e9, False)
                report[f"{name}_guidance"] = slope.norm(dim=1).mean().item()
        return report

    # --- Its part of a checkpoint
    def modules(self) -> dict[str, Any]:
        """What goes on between retrainings and, within one, what it trains."""
        energies = {f"energy_{name}": network for name, network in self.energies.items()}
        energies |= {f"adam_{name}": self.optimizers[name] for name in self.energies}
        within = {"denoiser": self.denoiser, "average": self.average, "adam_denoiser": self.optimizers["denoiser"]}
        return energies | (within if self.unit else {})

    def state_dict(self) -> dict[str, Any]:
        state = {"retrainings": self.retrainings, "unit": self.unit, "rows": self.rows, "work": dict(self.work)}
        return state | {name: part.state_dict() for name, part in self.modules().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.retrainings, self.unit, self.rows = state["retrainings"], state["unit"], state["rows"].to(self.device)
        self.work = {name: value.to(self.device) for name, value in state["work"].items()}
        for name, part in self.modules().items():
            part.load_state_dict(state[name])


# --- What every agent has
class Agent(nn.Module):
    """Beside this an agent has `config`, `optimizers`, `live_arrays`, act(), and learn(batch, *flags): one update.

    The flags say which operations the update has, so that it can be compiled and recorded (Replay).
    """

    def begin(self, **told: bool) -> tuple[bool, ...]:
        """The host's part of an update; what it is told becomes the flags that learn() takes."""
        self.live_arrays.stale = True
        return tuple(told.values())

    def update(self, batch: Batch, **told: bool) -> dict[str, torch.Tensor]:
        """Returns METRICS, on the device."""
        return self.learn(batch, *self.begin(**told))

    def learn_from(self, buffer: ReplayBuffer, *flags: bool) -> dict[str, torch.Tensor]:
        return self.learn(buffer.sample(self.config.batch_size), *flags)

    def compile_update(self, **options: Any) -> None:
        """With torch.compile's options."""
        self.learn = torch.compile(self.learn, **options)

    def normalize(self, states: torch.Tensor) -> torch.Tensor:
        return (states - self.obs_mean) / self.obs_std


class Replay:
    """Calls functions; on CUDA as graphs: one launch in the place of hundreds, which take longer than the work itself.

    Each function with its arguments, which are buffers and flags, is called three times, then recorded, then replayed:
    on the same memory, so that a result holds until the next call. What changes from call to call must be a tensor.
    """

    def __init__(self, device: str, graphs: str) -> None:
        """`graphs`: auto, true or false, as the field."""
        if graphs == "true" and "cuda" not in device:
            fail(f"graphs: true needs CUDA, this run is on {device}; --graphs auto does without")
        self.must, self.calls, self.recorded = graphs == "true", Counter(), {}
        self.stream = torch.cuda.Stream(device) if "cuda" in device and graphs != "false" else None

    def __call__(self, function: Callable, *args: Any) -> dict[str, torch.Tensor]:
        if self.stream is None:
            return function(*args)
        usual, key = torch.cuda.current_stream(self.stream.device), (function, *args)
        self.calls[key] += 1
        if self.calls[key] <= 3:  # on a stream of its own, as PyTorch asks for
            self.stream.wait_stream(usual)
            with torch.cuda.stream(self.stream):
                result = function(*args)
            usual.wait_stream(self.stream)
            return result
        if key not in self.recorded:
            try:
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=self.stream):  # carries nothing out
                    self.recorded[key] = graph, function(*args)
            except Exception as error:
                why = f"{function.__qualname__} cannot be recorded as a CUDA graph: {reason(error)}"
                if self.must:
                    fail(f"{why}; --graphs auto does without")
                tqdm.write(f"{why}; what follows runs without")
                self.stream = None
                return function(*args)
        graph, result = self.recorded[key]
        graph.replay()
        return result


# --- Cal-QL
class EDIS(Agent):
    """Cal-QL (Nakamoto et al., 2023), which EDIS fine-tunes: CORL's CQL with calibrated Q."""

    ALGORITHM = "edis"
    METRICS = ("critic_loss", "actor_loss", "q_mean", "cql_gap", "bound_rate", "entropy", "alpha", "alpha_prime")
    METRICS += ("td_error",)

    def __init__(self, config: TrainConfig, env: Environment, device: str) -> None:
        super().__init__()
        self.config, self.updates = config, 0
        dims = (env.obs_dim, env.act_dim, config.hidden_dim)
        self.actor = TanhGaussianActor(*dims, config.orthogonal_init)
        self.critic = TwinCritic(*dims, config.q_n_hidden_layers, config.critic_layer_norm)
        for head in self.critic.heads:
            initialize(head, config.orthogonal_init)
        self.target_critic = frozen_copy(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros(()), requires_grad=config.use_automatic_entropy_tuning)
        self.log_alpha_prime = nn.Parameter(torch.ones(()), requires_grad=config.cql_lagrange)
        self.register_buffer("cql_alpha", torch.tensor(float(config.cql_alpha)))  # a buffer: the switch changes it
        self.register_buffer("obs_mean", torch.zeros(env.obs_dim))
        self.register_buffer("obs_std", torch.ones(env.obs_dim))
        self.register_buffer("action_low", torch.from_numpy(env.action_low))
        self.register_buffer("action_high", torch.from_numpy(env.action_high))
        names = ("obs_mean", "obs_std", "action_low", "action_high", "actor.log_std_multiplier", "actor.log_std_offset")
        self.live_arrays = LiveArrays(self, "actor.network", *names)
        self.to(device)
        adam = partial(torch.optim.Adam, fused=True)
        self.optimizers = {"actor": adam(self.actor.parameters(), lr=config.policy_lr)}
        self.optimizers["critic"] = adam(self.critic.parameters(), lr=config.qf_lr)
        self.optimizers["alpha"] = adam([self.log_alpha], lr=config.policy_lr)
        self.optimizers["alpha_prime"] = adam([self.log_alpha_prime], lr=config.qf_lr)

    def get_extra_state(self) -> torch.Tensor:
        """The number of updates so far: part of the state_dict, and read without host synchronisation."""
        return torch.tensor(self.updates)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.updates = int(state)

    def to_unit(self, actions: torch.Tensor) -> torch.Tensor:
        """From the environment's bounds to -1 and 1, between which policy and critics work."""
        return (actions - (self.action_low + self.action_high) / 2) / ((self.action_high - self.action_low) / 2)

    def from_unit(self, actions: torch.Tensor) -> torch.Tensor:
        """And back, never beyond the bounds."""
        middle, half = (self.action_low + self.action_high) / 2, (self.action_high - self.action_low) / 2
        return torch.minimum(torch.maximum(middle + half * actions, self.action_low), self.action_high)

    def act(self, observation: np.ndarray, deterministic: bool) -> np.ndarray:
        """The policy's action, (act_dim,) in the environment's units, for a raw observation (obs_dim,)."""
        mean, std, low, high, multiplier, offset, *layers = self.live_arrays()
        action, log_std = np.split(one_row(layers, (observation - mean) / std), 2)
        if not deterministic:
            log_std = np.minimum(np.maximum(multiplier * log_std + offset, -20), 2)
            action += np.exp(log_std) * torch.randn(len(action), dtype=self.obs_mean.dtype).numpy()
        return np.minimum(np.maximum((low + high) / 2 + (high - low) / 2 * np.tanh(action), low), high)

    def begin(self) -> tuple[bool, ...]:
        """Counts the update, whose number a compiler would take for a constant, as a graph would."""
        self.updates += 1
        moves_target = self.updates % self.config.target_update_period == 0
        return super().begin(cloning=self.updates <= self.config.bc_steps, moves_target=moves_target)

    def learn(self, batch: Batch, cloning: bool, moves_target: bool) -> dict[str, torch.Tensor]:
        """One step of policy, temperature and critics, each from the same old parameters, as CORL."""
        config, k, act_dim = self.config, self.config.cql_n_actions, batch.actions.shape[1]
        states, next_states = self.normalize(batch.states), self.normalize(batch.next_states)
        actions, metrics = self.to_unit(batch.actions), {}

        # --- Policy and temperature
        policy = self.actor(states)
        pi_actions, log_pi = (x.squeeze(1) for x in policy.sample(1))
        alpha = config.alpha_multiplier * self.log_alpha.detach().exp()
        alpha_loss = -(self.log_alpha * (log_pi.detach() - act_dim)).mean()  # target entropy -act_dim
        if cloning:
            actor_loss = (alpha * log_pi - policy.log_prob(actions)).mean()
        else:
            actor_loss = (alpha * log_pi - self.critic(states, pi_actions).amin(0)).mean()

        # --- Target
        with torch.no_grad():
            next_policy = self.actor(next_states)
            next_actions, next_log_pi = next_policy.sample(k if config.cql_max_target_backup else 1)
            q_next, best = q_values(self.target_critic, next_states, next_actions).amin(0).max(1)
            if config.backup_entropy:
                q_next = q_next - alpha * next_log_pi.take_along_dim(best[:, None], dim=1).squeeze(1)
            target = batch.rewards + config.discount * (1 - batch.dones) * q_next

        # --- Conservative penalty: of sampled actions and of the data's in s, one pass of the critics
        with torch.no_grad():
            random_actions = actions.new_empty(len(actions), k, act_dim).uniform_(-1, 1)
            next_actions, next_log_pi = next_policy.sample(k)
            current_actions, current_log_pi = policy.sample(k)
            random_log_density = torch.full_like(next_log_pi, -act_dim * math.log(2))  # uniform on (-1, 1)
            log_density = torch.cat([random_log_density, next_log_pi, current_log_pi], dim=1)
            all_actions = torch.cat([actions[:, None], random_actions, next_actions, current_actions], dim=1)
        q = q_values(self.critic, states, all_actions)
        # Calibration: at the policy's actions Q counts as no less than the return from this row on, online, too
        bound, (q_others, q_policy) = batch.extra[:, None], q.split([1 + k, 2 * k], dim=2)
        metrics["bound_rate"] = (q_policy.detach() < bound).float().mean()
        calibrated = torch.cat([q_others, torch.maximum(q_policy, bound)], dim=2)
        gap = conservative_gap(calibrated, log_density, config)

        # --- Critics
        td_loss = (q[:, :, 0] - target).square().mean(1).sum()
        losses = {"actor": actor_loss}
        if config.use_automatic_entropy_tuning:
            losses["alpha"] = alpha_loss
        if config.cql_lagrange:  # the weight grows while the gap is above cql_target_action_gap
            alpha_prime = self.log_alpha_prime.exp().clamp(0, 1e6)
            excess = (self.cql_alpha * (gap - config.cql_target_action_gap)).sum()
            losses["critic"] = td_loss + alpha_prime.detach() * excess
            losses["alpha_prime"] = -0.5 * alpha_prime * excess.detach()
            metrics["alpha_prime"] = alpha_prime.detach()
        else:
            losses["critic"] = td_loss + self.cql_alpha * gap.sum()

        # --- One step of each optimiser
        metrics |= {"critic_loss": losses["critic"].detach(), "actor_loss": actor_loss.detach(), "alpha": alpha}
        metrics |= {"q_mean": q[:, :, 0].detach().mean(), "cql_gap": gap.detach().mean()}
        metrics |= {"entropy": -log_pi.detach().mean(), "td_error": (q[:, :, 0].detach() - target).abs().mean()}
        descend(self.optimizers, gradients(self.optimizers, losses))

        # --- Target critics
        if moves_target:
            with torch.no_grad():
                rate = config.soft_target_update_rate
                torch._foreach_lerp_([*self.target_critic.parameters()], [*self.critic.parameters()], rate)
        return metrics

    def start_online(self) -> None:
        """At the switch: change the penalty's weight; calibration stays on [ours: EDIS and CORL turn it off]."""
        self.cql_alpha.fill_(self.config.cql_alpha_online)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode without gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def gradients(optimizers: dict[str, torch.optim.Adam], losses: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """Of each loss by the parameters of the optimiser of its name: what else it depends on costs nothing."""
    parameters = {name: optimizers[name].param_groups[0]["params"] for name in losses}
    return {name: torch.autograd.grad(loss, parameters[name]) for name, loss in losses.items()}


@torch.compiler.disable  # nothing that a compiler could fuse
@torch.no_grad()
def descend(optimizers: dict[str, torch.optim.Adam], gradients: dict[str, tuple]) -> None:
    """One step of each optimiser named: PyTorch's, without what Adam.step() does beside it, which takes as long."""
    for name, along in gradients.items():
        group, state = optimizers[name].param_groups[0], optimizers[name].state
        for parameter, gradient in zip(group["params"], along, strict=True):
            parameter.grad = gradient
            if not state[parameter]:
                state[parameter] = {"step": torch.zeros((), device=parameter.device)}
                state[parameter] |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        rows = [state[parameter] for parameter in group["params"]]
        means, squares, steps = ([row[key] for row in rows] for key in ("exp_avg", "exp_avg_sq", "step"))
        constants = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
        constants |= dict(zip(("beta1", "beta2"), group["betas"]))
        adam_step(group["params"], list(along), means, squares, [], steps, fused=True, **constants)


# --- Evaluation
def evaluate(agent: nn.Module, env: Environment, n_episodes: int, seed: int) -> dict[str, float]:
    """Mean `score` (Environment.score) and undiscounted `return` of the deterministic policy over seeded episodes."""
    scores, returns = [], []
    for episode in tqdm(range(n_episodes), desc="evaluation", leave=False, delay=1):
        observation, over = env.reset(derive_seed(seed, "evaluation", episode)), False
        while not over:
            observation, _, terminated, truncated = env.step(agent.act(observation, deterministic=True))
            over = terminated or truncated
        scores.append(env.score())
        returns.append(env.episode_return)
    return {"score": float(np.mean(scores)), "return": float(np.mean(returns))}


def serve_evaluations(connection: Any, algorithm: type, config: Any) -> None:
    """The process of evaluate_beside: it evaluates what comes, until the connection's other end is closed, or dead."""
    on_signals(signal.SIG_IGN, *STOPS, *SAVES)  # they are for the run, which ends this process
    sys.stdout = sys.stderr = open(os.devnull, "w")  # the run says it all
    tqdm.set_lock(threading.RLock())  # tqdm's own would be left over, with a warning, where this process is killed
    env = Environment(config.env, ends_at_goal=False, max_steps=config.max_episode_steps)
    evaluator = Evaluator(algorithm(config, env, "cpu"), env, config)
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)  # ready
        while True:
            connection.send(evaluator.evaluate(connection.recv()))


class Evaluator:
    """Evaluates the policy of the moment of `ask`: when `answer` is called or, once started, in a process beside."""

    def __init__(self, agent: nn.Module, env: Environment, config: Any) -> None:
        self.agent, self.env, self.config = agent, env, config
        self.asked: list[list[np.ndarray]] = []  # copies of live_arrays() that wait for their answers
        self.process = self.connection = None
        self.free = False  # whether the process waits for work

    def evaluate(self, arrays: list[np.ndarray]) -> dict[str, float]:
        agent = copy.copy(self.agent)
        agent.live_arrays = lambda: arrays
        return evaluate(agent, self.env, self.config.n_test_episodes, self.config.eval_seed)

    def start(self) -> None:
        """Begin the process, which is ready seconds later."""
        if (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) < 2:
            return tqdm.write("evaluate_beside needs a second core; evaluations stay between the updates")
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, type(self.agent), self.config)
        self.process = context.Process(target=serve_evaluations, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self) -> None:
        self.asked.append([array.copy() for array in self.agent.live_arrays()])

    def answer(self, wait: bool) -> dict[str, float] | None:
        """The oldest question's; None if it is not to be waited for, and not there yet."""
        try:
            while self.connection:
                if self.free and self.asked:
                    self.connection.send(self.asked[0])
                    self.free = False
                if not wait and not self.connection.poll():
                    return None
                result, self.free = self.connection.recv(), True
                if result:
                    self.asked.pop(0)
                    return result
        except (EOFError, OSError):
            tqdm.write("the process of evaluate_beside is gone; evaluations go on between the updates")
            self.connection = None
        return self.evaluate(self.asked.pop(0))


# --- Checkpoint and log
FORMAT = 3  # of checkpoints: another number, another content


def write_whole(path: Path, content: Any) -> None:
    """Write bytes to a file whole or not at all: aside, under a name of this process, fsync, rename."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def check_sum(content: Any) -> int:
    """CRC-32 of nested dicts and lists of tensors and plain values."""
    if isinstance(content, dict):
        content = [*content.items()]
    if isinstance(content, (list, tuple)):
        content = [check_sum(part) for part in content]
    return zlib.crc32(content.cpu().numpy().tobytes() if torch.is_tensor(content) else repr(content).encode())


DIVERGED = "the run has diverged: try a smaller learning rate, or smaller states and rewards where these are large"


def load_checkpoint(path: Path, algorithm: type) -> dict[str, Any]:
    """Read a checkpoint of this algorithm, tensors and plain values only; "config" becomes a TrainConfig."""
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load looks at no check sum
                raise ValueError(f"{damaged} in it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["algorithm"] if isinstance(checkpoint, dict) else "something else"
    except Exception as error:
        fail(f"cannot read the checkpoint {path}: {reason(error)}")
    if found != algorithm.ALGORITHM:
        fail(f"{path} is of {found}, not of {algorithm.ALGORITHM}")
    if (number := checkpoint.get("format", 1)) != FORMAT:
        fail(f"{path} has format {number}, this file reads {FORMAT}: use the version that wrote it")
    if checkpoint.pop("check_sum", None) != check_sum(checkpoint):
        fail(f"{path} is not as a run wrote it: its check sum is another")
    if other := sorted(checkpoint["config"].keys() ^ asdict(TrainConfig()).keys()):
        fail(f"{path}: its configuration has other fields than this file's: {', '.join(other)}")
    checkpoint["config"] = TrainConfig(**checkpoint["config"])
    return checkpoint


def different(config: Any, other: Any) -> dict[str, str]:
    """The fields of two configurations that differ: {name: "this, not that"}."""
    pairs = {name: (value, getattr(other, name)) for name, value in asdict(config).items()}
    return {name: f"{name} {mine!r}, not {its!r}" for name, (mine, its) in pairs.items() if mine != its}


STOPS = (signal.SIGINT, signal.SIGTERM)
SAVES = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()  # not on Windows
PATIENCE = 20  # seconds that a stop waits for the end of an episode


def on_signals(handler: Any, *numbers: int) -> dict[int, Any]:
    """Take signals; returns who had them. Outside the main thread Python has none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers}


def end_quietly(number: int, frame: Any) -> NoReturn:
    """End without a traceback; if the signal comes again, at once."""
    on_signals(signal.SIG_DFL, *STOPS)
    raise SystemExit(128 + number)


def peak_memory_mb() -> float:
    """Of this process; 0 where the system does not tell. macOS counts in bytes, others in kilobytes."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit if resource else 0.0


def choose_device(name: str) -> str:
    """auto: cuda where there is one, else cpu."""
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        tensor = torch.zeros(1, device=name)
        return str(tensor.device) if tensor.tolist() else ""  # what keeps no numbers, such as meta, raises here
    except Exception as error:
        fail(f"no device {name!r} here ({reason(error)[:100]}); --device auto takes what there is")


class Run:
    """A run's state, folder and log. `step` counts updates before the switch, then online steps: it tells the phase.

    What it does with the data and with each online step stands in the methods below `# --- Phases`.
    """

    COLUMNS = ("score", "return", "train_return", "steps_per_second")
    PROGRESS = ("step", "episode", "metrics_size", "dataset_checksum", "reward_scale", "reward_bias", "evaluations")
    PROGRESS += ("train_episodes", "seconds", "peak_memory_mb")
    CARRIED = ("evaluations", "dataset_checksum", "reward_scale", "reward_bias")  # over the switch, to another run
    # What a resumed run may change, and what one from an offline checkpoint may not
    RESUMABLE = {"resume", "device", "threads", "graphs", "wandb", "checkpoint_frequency", "dataset"}
    RESUMABLE |= {"online_iterations", "evaluate_beside"}
    SETTLED = {"offline_iterations", "hidden_dim", "q_n_hidden_layers", "critic_layer_norm", "iql_deterministic"}
    SETTLED |= {"normalize", "normalize_reward", "reward_scale", "reward_bias", "cql_alpha"}

    def __init__(self, config: Any, algorithm: type) -> None:
        self.algorithm, self.device, self.lock, self.metrics_file = algorithm, choose_device(config.device), None, None
        self.evaluator = None
        self.taken: dict[int, Any] = {}  # signals that this run handles, and who had them before
        if config.resume:
            self.folder = Path(config.resume)
            self.lock_folder()
        try:
            self.config = config = self.read_source(config)
        except SystemExit:
            self.close()
            raise
        if not config.resume:
            place = Path(config.runs_dir) / config.env.replace("/", "-")
            self.folder = place / f"{config.name}-seed{config.seed}"
        limit = {"max_steps": config.max_episode_steps}
        self.env = Environment(config.env, **limit)
        self.eval_env = Environment(config.env, ends_at_goal=False, **limit)
        torch.manual_seed(derive_seed(config.seed, "networks"))
        self.parts = self.build()  # what checkpoints hold
        self.replay = Replay(self.device, config.graphs)
        self.dataset = self.buffer = self.wandb = None  # the ReplayBuffers before and after the switch; wandb's run
        self.evaluator = Evaluator(self.agent, self.eval_env, config)
        self.held: list[tuple] = []  # rows from that on whose evaluation is under way: step, row, bar, evaluates
        self.step = self.episode = self.dataset_checksum = 0
        self.stop_signal = self.stop_time = self.save_wanted = 0  # what signals have asked for, and when
        self.metrics_size = [0, 0]  # of metrics.csv: bytes, and their CRC-32
        self.reward_scale, self.reward_bias, self.peak_memory_mb = 1.0, 0.0, 0.0
        self.evaluations: list[list] = []  # [is online, step within its phase, score, return]
        self.train_episodes: list[list] = []  # [online step at its end, score, return]
        parts = (*(phase for phase, *_ in self.phases()), "act", "environment", "insert", "update", "evaluation")
        self.seconds = dict.fromkeys(parts, 0.0)

    # --- Phases
    def build(self) -> dict[str, Any]:
        """Make the networks; returns all parts of the run that have a state_dict."""
        self.agent = self.algorithm(self.config, self.env, self.device)
        return {"agent": self.agent} | self.agent.optimizers

    def phases(self) -> list[tuple[str, int, Callable]]:
        """What comes before the switch: the phase's name, its number of updates, and update(dataset, step)."""
        return [("offline", self.config.offline_iterations, lambda dataset, step: self.update(dataset))]

    def update(self, buffer: ReplayBuffer, **told: bool) -> dict[str, torch.Tensor]:
        """One update of the agent on rows drawn from a buffer."""
        return self.replay(self.agent.learn_from, buffer, *self.agent.begin(**told))

    @property
    def switch(self) -> int:
        """The step at which the online phase begins."""
        return sum(length for _, length, _ in self.phases())

    def end_phase(self, phase: str) -> None:
        """After the last update of a phase before the switch."""

    def keeps_offline_data(self) -> bool:
        """Whether the online phase learns from the offline rows, too, as CORL's does."""
        return self.config.keep_offline_data

    def warmup(self) -> int:
        """Online steps before the first update: none where the offline rows fill the buffer from the start."""
        return 0 if self.keeps_offline_data() else self.config.warmup_steps

    def start_online(self) -> None:
        self.agent.start_online()
        self.make_buffer()

    def update_online(self, step: int) -> dict[str, torch.Tensor]:
        """The update of online step `step`, counted from 1."""
        if step <= self.warmup() or not self.buffer.size:
            return {}
        return self.update(self.buffer)

    def end_step(self, step: int) -> None:
        """After an online step and its update."""

    def remember(self, state, action, reward: float, next_state, terminated: bool) -> Batch:
        """Put an online transition into the buffer; returns its row there."""
        return self.buffer.add(state, action, self.reward_scale * reward + self.reward_bias, next_state, terminated)

    def end_episode(self) -> None:
        """An online episode is over, by its own end or by the time limit."""
        self.train_episodes.append([self.step - self.switch, self.env.score(), self.env.episode_return])

    # --- Folder
    def lock_folder(self) -> None:
        """Keep other processes out of the folder; whatever becomes of this one, the kernel frees it then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "run.lock", "a+")
        try:
            if not fcntl:
                raise OSError("this system has no flock")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.5)  # by then the other one has written who it is
            self.lock.seek(0)
            fail(f"{self.folder} is in use by {self.lock.read().strip()}: stop it, or choose another --name or --seed")
        except OSError as error:
            tqdm.write(f"{self.folder} cannot be locked ({reason(error)}): see to it that no other process runs in it")
        else:
            for left in self.folder.glob("*.[0-9]*.part"):  # by a process that was killed
                left.unlink()
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()

    def refuse_old_run(self) -> None:
        if not self.config.resume and (self.folder / "config.yaml").exists():
            fail(f"{self.folder} holds a run already: --resume it, choose another --name or --seed, or remove it")

    def open_log(self) -> None:
        """Lock the folder, write config.yaml, and open metrics.csv, cut back to where the checkpoint saw it."""
        if not self.lock:
            self.lock_folder()
        self.refuse_old_run()
        path, (size, checksum) = self.folder / "metrics.csv", self.metrics_size
        if zlib.crc32(path.read_bytes()[:size] if size and path.is_file() else b"") != checksum:
            how = "put it back from a copy, or begin another --name (an offline_checkpoint.pt spares the offline phase)"
            fail(f"the first {size} bytes of {path} are not as this run wrote them; to go on, {how}")
        if self.config.wandb:
            self.wandb = start_wandb(self.config, self.folder, self.algorithm.ALGORITHM)
        pyrallis.dump(replace(self.config, resume=""), stream := io.StringIO())
        write_whole(self.folder / "config.yaml", stream.getvalue().encode())
        self.metrics_file = open(path, "a", newline="", encoding="ascii")
        self.metrics_file.truncate(size)
        self.metrics = csv.DictWriter(self, ("step", "phase", *self.algorithm.METRICS, *self.COLUMNS), restval="")
        if not size:
            self.metrics.writeheader()
        self.saved_step = self.step
        self.taken = on_signals(self.request, *STOPS, *SAVES)

    def write(self, text: str) -> None:
        """Append to metrics.csv."""
        size, checksum = self.metrics_size
        self.metrics_size = [size + len(text), zlib.crc32(text.encode(), checksum)]
        self.metrics_file.write(text)

    def close(self) -> None:
        """Give back signals, log and folder, and end the process of evaluate_beside."""
        if self.evaluator and self.evaluator.process:
            self.evaluator.process.kill()
        for number, handler in self.taken.items():
            signal.signal(number, handler)
        self.taken = {}
        for file in filter(None, (self.metrics_file, self.lock)):
            file.close()

    # --- Data
    def load_dataset(self) -> None:
        """Load the offline data if this run still needs them: before the switch, or in the arm that keeps them."""
        needed = self.step < self.switch or not self.switch or self.keeps_offline_data()
        if not needed and not self.moved:
            return
        config, agent, path = self.config, self.agent, self.config.dataset or self.config.env
        rows, returns = load_dataset(config.dataset, self.env, config.clip_actions)
        self.episode_ends, rows[:, -1] = rows[:, -1] > 0, 0
        tqdm.write(f"{path}: {len(rows):,} transitions, {len(returns):,} complete episodes")
        checksum = zlib.crc32(rows)
        if self.dataset_checksum not in (0, checksum):
            fail(f"{path} is not the data set that this run began with")
        if not needed:
            return
        if not self.dataset_checksum:
            self.dataset_checksum, states = checksum, rows[:, : self.env.obs_dim]
            self.reward_scale, self.reward_bias = reward_transform(self.env, returns, config)
            if config.normalize:
                mean, std = column_moments(states)
                agent.obs_mean.copy_(torch.from_numpy(mean))
                agent.obs_std.copy_(torch.from_numpy(std + 1e-3))
        rewards = rows[:, self.env.obs_dim + self.env.act_dim]
        rewards[:] = self.reward_scale * rewards + self.reward_bias
        self.dataset = self.new_buffer(len(rows) + (config.online_iterations if self.keeps_offline_data() else 0))
        self.dataset.load(rows)

    def make_buffer(self) -> None:
        """The online phase's: one free of offline data, or CORL's, the offline rows with room for online ones."""
        keeps, self.replay = self.keeps_offline_data(), Replay(self.device, self.config.graphs)
        self.buffer, self.dataset = self.dataset if keeps else self.new_buffer(self.config.buffer_size), None

    def new_buffer(self, capacity: int) -> ReplayBuffer:
        return ReplayBuffer(capacity, self.env.obs_dim, self.env.act_dim, self.device)

    # --- Checkpoints
    def read_source(self, config: Any) -> Any:
        """Read the checkpoint that the run starts from, if any, as `state`; returns the run's configuration.

        A resumed run has its checkpoint's. A run from an offline checkpoint takes what it was not given, of the task,
        the seed and the algorithm's own fields, from there.
        """
        last, self.state, self.moved = Path(config.resume) / "checkpoint.pt", None, False
        self.resumes = bool(config.resume) and last.is_file()  # a run stopped before its first checkpoint starts again
        self.source = path = last if self.resumes else Path(config.offline_checkpoint)
        if not self.resumes and not config.offline_checkpoint:
            return config
        self.state = load_checkpoint(path, self.algorithm)
        found = different(saved := self.state["config"], config)
        if self.resumes:
            if forbidden := [name for name in found if name not in self.RESUMABLE]:
                texts = "; ".join(found[name] for name in forbidden)
                fail(f"--resume: {', '.join(forbidden)} cannot change; {path} was saved with {texts}")
            self.moved = "dataset" in found
        else:
            given = getattr(config, "given", different(config, type(config)()).keys())
            if forbidden := [text for name, text in found.items() if name in self.SETTLED & given]:
                fail(f"{path} does not fit this run, it was trained with {'; '.join(forbidden)}: give that, or nothing")
            names = [field.name for field in fields(config)]
            taken = ({"env", "seed", *self.SETTLED, *names[names.index("batch_size") :]} - given) & found.keys()
            config = replace(config, **{name: getattr(saved, name) for name in taken})
            if config.seed != saved.seed:
                tqdm.write(f"{path}: offline phase of seed {saved.seed}; what follows is of seed {config.seed}")
        return config

    def state_dict(self) -> dict[str, Any]:
        state = {"algorithm": self.algorithm.ALGORITHM, "format": FORMAT, "config": asdict(self.config)}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"buffer": self.buffer and self.buffer.state_dict(), "random_cpu": torch.get_rng_state()}
        state["random_cuda"] = torch.cuda.get_rng_state(self.device) if "cuda" in self.device else None
        return state | {"progress": {name: getattr(self, name) for name in self.PROGRESS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was saved or, from an offline checkpoint, begin a new run at its switch."""
        progress, parts = state["progress"], self.parts
        if not self.resumes:
            if state["buffer"] or progress["step"] < state["config"].offline_iterations:
                fail(f"{self.source} is not from the switch: name a run's offline_checkpoint.pt")
            parts, step = self.carried(state)
            progress = {name: progress[name] for name in self.CARRIED if name in progress} | {"step": step}
        for name, part in parts.items():
            if not self.resumes and isinstance(part, torch.optim.Optimizer):  # with this run's own step sizes
                state[name]["param_groups"] = part.state_dict()["param_groups"]
            part.load_state_dict(state[name])
        for name, value in progress.items():
            setattr(self, name, value)
        if (online := self.step - self.switch) > self.config.online_iterations:
            given = self.config.online_iterations
            raise ValueError(f"online_iterations {given} is less than the {online} that it has done")
        self.load_dataset()
        if state["buffer"]:
            self.make_buffer()
            self.buffer.load_state_dict(state["buffer"])
        torch.set_rng_state(state["random_cpu"])
        if state["random_cuda"] is not None and "cuda" in self.device:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def carried(self, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """What a run from an offline checkpoint takes of `parts`, and the step at which it begins."""
        return self.parts, self.switch

    def save(self, name: str = "checkpoint.pt") -> None:
        for part in self.parts.values():
            for key, value in part.state_dict().items() if isinstance(part, nn.Module) else ():
                if not torch.isfinite(value).all():
                    fail(f"{key} is not finite at step {self.step}: {DIVERGED}")
        self.write_rows()
        self.saved_step = self.step
        self.metrics_file.flush()
        os.fsync(self.metrics_file.fileno())
        self.peak_memory_mb = max(self.peak_memory_mb, peak_memory_mb())
        state = self.state_dict()
        torch.save(state | {"check_sum": check_sum(state)}, stream := io.BytesIO())
        write_whole(self.folder / name, stream.getbuffer())

    def request(self, number: int, frame: Any) -> None:
        """A signal asks for a checkpoint, or for the end: soon, and if it comes again a second later, at once."""
        if number in SAVES:
            self.save_wanted = 1
        elif not self.stop_signal:
            self.stop_signal, self.stop_time = number, time.monotonic()
            with contextlib.suppress(OSError):  # a print may be what the signal has interrupted
                os.write(2, b"\nstopping when this update or training episode is over (again: at once)\n")
        elif time.monotonic() > self.stop_time + 1:
            on_signals(signal.SIG_DFL, *STOPS)
            raise SystemExit(f"stopped at once; to go on from the last checkpoint: {self.resume_command()}")

    def resume_command(self) -> str:
        return shlex.join(["python", __file__, "--resume", str(self.folder)])

    def save_if_due(self, within_episode: bool = False) -> None:
        """Called wherever a run can be continued from: between updates, online between episodes.

        Within one only where its end may be far: without a time limit, or long after the signal. From there a resumed
        run begins with a new episode: only the simulator's state is lost.
        """
        stop = self.stop_signal
        if within_episode and self.env.time_limit and not (stop and time.monotonic() > self.stop_time + PATIENCE):
            return
        due = self.step - self.saved_step >= self.config.checkpoint_frequency * (1 + within_episode)
        if self.save_wanted or stop or due:
            self.save_wanted = 0
            self.save()
        if stop:
            where = "within an episode, which is lost; " if within_episode else ""
            tqdm.write(f"saved; {where}to go on: {self.resume_command()}", file=sys.stderr)
            raise SystemExit(128 + stop)

    # --- Log
    def bar(self, phase: str, total: int, done: int) -> tqdm:
        self.clock, self.clock_step = time.perf_counter(), self.step
        score = {"score": f"{self.evaluations[-1][2]:.1f}"} if self.evaluations else None
        unit = {"unit": "step" if phase == "online" else "update", "mininterval": 0.5}
        return tqdm(total=total, initial=done, desc=phase, dynamic_ncols=True, postfix=score, **unit)

    def report(self, phase: str, step: int, metrics: dict[str, torch.Tensor], bar: tqdm) -> None:
        """After every step: move the bar, and evaluate and write a row of metrics.csv when due."""
        bar.update()
        due = step % self.config.eval_frequency == 0 or step == bar.total
        due |= phase == "online" and step == 10_000 < self.config.eval_frequency  # for switch_drop
        evaluates = due and phase in ("offline", "online")
        if not evaluates and step % self.config.log_frequency and step != bar.total:
            return
        row = {name: value.item() for name, value in metrics.items()}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            fail(f"{bad[0]} is {row[bad[0]]} in {phase} step {step}: {DIVERGED}")
        rate = (self.step - self.clock_step) / (time.perf_counter() - self.clock)
        row |= {"step": step, "phase": phase, "steps_per_second": round(rate, 1)} | self.describe(phase, row)
        if phase == "online":
            row["train_return"] = self.train_episodes[-1][2] if self.train_episodes else ""
        if evaluates:
            self.evaluator.ask()
        self.held.append((self.step, row, bar, evaluates))
        self.write_rows(wait=not self.evaluator.connection)
        self.clock, self.clock_step = time.perf_counter(), self.step

    def write_rows(self, wait: bool = True) -> None:
        """What is held of metrics.csv; unless told to `wait`, up to the first row whose evaluation is under way."""
        while self.held:
            step, row, bar, evaluates = self.held[0]
            start = time.perf_counter()
            if evaluates and not (result := self.evaluator.answer(wait)):
                break
            if evaluates:
                self.seconds["evaluation"] += time.perf_counter() - start
                self.evaluations.append([row["phase"] == "online", row["step"], result["score"], result["return"]])
                bar.set_postfix(score=f"{result['score']:.1f}", refresh=False)  # it may be closed by now
                row |= result
            self.metrics.writerow(row)
            self.metrics_file.flush()
            if self.wandb:
                self.wandb.log({f"{row['phase']}/{name}": row[name] for name in row if name != "phase"}, step=step)
            del self.held[0]

    def describe(self, phase: str, row: dict[str, Any]) -> dict[str, Any]:
        """More columns for a row of metrics.csv."""
        return {}

    def scores(self) -> dict[str, float]:
        """Of the whole run, fields in the README; nan where there is none."""
        offline = [score for online, _, score, _ in self.evaluations if not online] or [math.nan]
        every, total = [x[1:3] for x in self.evaluations if x[0]] or [[0, math.nan]], self.step - self.switch
        early = [score for step, score in every if step <= 10_000] or [math.nan]
        steps, online = zip(*(x for x in every if x[0] % self.config.eval_frequency == 0 or x[0] == total))
        train = np.array(self.train_episodes or [[0, math.nan, math.nan]])
        recent = min(np.searchsorted(train[:, 0], [0, *steps][-6:][0]), len(train) - 1)  # since before the last five
        unit = 100 if self.env.scoring else math.nan
        scores = {"offline_score": offline[-1], "final_score": np.mean(online[-5:]), "last_score": online[-1]}
        scores |= {"train_score": train[recent:, 1].mean(), "best_score": max(online)}
        scores |= {"switch_drop": offline[-1] - min(early), "regret": 1 - np.mean(online) / unit}
        return scores | {"train_return": train[:, 2].mean(), "train_regret": 1 - train[:, 1].mean() / unit}

    def finish(self) -> None:
        """Write the last checkpoint and summary.json (fields in the README), and print the closing table."""
        self.save()
        scores = self.scores()
        summary = {name: float(score) if math.isfinite(score) else None for name, score in scores.items()}
        summary |= {"seconds": self.seconds, "peak_memory_mb": self.peak_memory_mb or None}
        summary |= asdict(self.config) | {"algorithm": self.algorithm.ALGORITHM, "device": self.device}
        if "cuda" in self.device:
            summary["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        summary = {name: str(value) if value in (math.inf, -math.inf) else value for name, value in summary.items()}
        write_whole(self.folder / "summary.json", (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        print(f"\n{self.config.env}, {self.config.name}, seed {self.config.seed}: {self.folder}")
        print("\n".join(f"  {name:14}{score:9.3f}" for name, score in scores.items()))
        print("  seconds       " + ", ".join(f"{name} {value:.0f}" for name, value in self.seconds.items()))


def start_wandb(config: Any, folder: Path, algorithm: str) -> Any:
    """A wandb run, named and grouped as CORL's are; without a key, one line says what to do."""
    group, name = config.group or f"{algorithm}-{config.env}", f"{config.name}-{config.env}-seed{config.seed}"
    key = folder / "wandb_id"  # the run's own, so that a resumed one goes on
    if not key.exists():
        write_whole(key, uuid.uuid4().hex[:8].encode())
    try:
        import wandb

        names = {"project": config.project, "group": group, "name": name, "id": key.read_text()}
        return wandb.init(**names, resume="allow", dir=folder, config=asdict(config))
    except Exception as error:
        fail(f"wandb: {reason(error)[:200]}; run `wandb login`, or set WANDB_MODE=offline, or leave out --wandb true")


# --- Cal-QL's returns and batches
def returns_to_go(rewards, ends, discount: float, failure: float | None) -> np.ndarray:
    """The discounted sum of rewards from each row to its episode's last, (n,) float32; `ends`, (n,) bool, marks those.

    Nothing is added for what comes after the last row, be it a terminal, the time limit or the end of the data, as in
    Cal-QL. On sparse tasks, whose steps without success pay `failure`, an episode that never paid more has the return
    of failing for ever on every row: Cal-QL's rule, too.
    """
    ends = np.append(ends[:-1], True)
    returns, ahead = np.empty(len(rewards), np.float32), 0.0
    for i, (reward, end) in enumerate(zip(rewards[::-1].tolist(), ends[::-1].tolist()), start=1):
        returns[-i] = ahead = reward + (0.0 if end else discount * ahead)
    if failure is not None:
        lengths = np.diff(np.flatnonzero(ends), prepend=-1)
        best = np.maximum.reduceat(rewards, lengths.cumsum() - lengths)  # of each episode
        failed = best <= failure + 1e-5 * (1 + abs(failure))  # but for rounding
        returns[np.repeat(failed, lengths)] = failure / (1 - discount)
    return returns


def find_failing_reward(rewards: np.ndarray, env: Environment, scale: float, bias: float) -> float:
    """The lower of the two (scaled) rewards, (n,), that a sparse task pays; where the data hold one, the task's own."""
    values = np.unique(rewards).tolist()
    if len(values) > 2 or (len(values) == 1 and env.scoring != "success"):
        found = f"{len(values)} rewards, from {values[0]:g} to {values[-1]:g} (scaled)"
        fail(f"is_sparse_reward needs data of two rewards, of failing and of success, not {found}: set it false")
    return values[0] if values[1:] else failing_reward_of_task(env, scale, bias)


def failing_reward_of_task(env: Environment, scale: float, bias: float) -> float:
    return scale * (-1.0 if re.match(".*-binary-|ogbench:", env.name) else 0.0) + bias


class MixingBuffer(ReplayBuffer):
    """CORL's Cal-QL: a share of each online batch comes from the offline rows, the rest from the online ones."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int, device: str, mixing_ratio: float) -> None:
        super().__init__(capacity, obs_dim, act_dim, device)
        self.mixing_ratio = mixing_ratio

    def sample(self, batch_size: int) -> Batch:
        """With replacement; offline rows alone until there are as many online rows as a batch takes [ours]."""
        offline = int(self.mixing_ratio * batch_size)
        if self.rows.is_cuda:  # the same by the device's count
            drawn = torch.randint(2**62, (batch_size,), device=self.rows.device)
            online, place = self.count - self.kept, torch.arange(batch_size, device=self.rows.device)
            from_offline = (place < offline) | (online < batch_size - offline)
            index = torch.where(from_offline, drawn % self.kept, self.kept + drawn % online.clamp_min(1))
            return self.batch(self.rows[index])
        if self.size - self.kept < batch_size - offline:
            offline = batch_size
        index = torch.randint(self.kept, (offline,), device=self.rows.device)
        if offline < batch_size:
            online = torch.randint(self.kept, self.size, (batch_size - offline,), device=self.rows.device)
            index = torch.cat([index, online])
        return self.batch(self.rows[index])


# --- Run with generated rows
class ReturnsRun(Run):
    """A run whose rows carry their returns-to-go in Batch.extra; in an unfinished episode -inf, no bound yet.

    Where the offline data are kept, each online batch has its share of them.
    """

    PROGRESS, CARRIED = ((*names, "failing_reward") for names in (Run.PROGRESS, Run.CARRIED))
    failing_reward: float | None = None  # for is_sparse_reward: what a step without success enters the buffers with

    def __init__(self, config: Any, algorithm: type) -> None:
        super().__init__(config, algorithm)
        self.episode_rewards: list[float] = []  # of the open episode; there is none where a run is saved

    def returns(self, rewards: np.ndarray, ends: np.ndarray) -> np.ndarray:
        failure = self.failing_reward
        if failure is None:
            failure = failing_reward_of_task(self.env, self.reward_scale, self.reward_bias)
        return returns_to_go(rewards, ends, self.config.discount, failure if self.config.is_sparse_reward else None)

    def load_dataset(self) -> None:
        super().load_dataset()
        if self.dataset:
            rows = self.dataset.stored()
            rewards = rows.rewards.cpu().numpy()
            if self.config.is_sparse_reward and self.failing_reward is None:
                self.failing_reward = find_failing_reward(rewards, self.env, self.reward_scale, self.reward_bias)
            rows.extra.copy_(torch.from_numpy(self.returns(rewards, self.episode_ends)))

    def new_buffer(self, capacity: int) -> ReplayBuffer:
        sizes = (capacity, self.env.obs_dim, self.env.act_dim, self.device)
        return MixingBuffer(*sizes, self.config.mixing_ratio) if self.keeps_offline_data() else ReplayBuffer(*sizes)

    def remember(self, *transition: Any) -> Batch:
        row = super().remember(*transition)
        row.extra.fill_(-math.inf)
        self.episode_rewards.append(self.reward_scale * transition[2] + self.reward_bias)
        return row

    def end_episode(self) -> None:
        """Give the episode's rows, as far as the ring still holds them, their returns."""
        super().end_episode()
        rewards, buffer = np.array(self.episode_rewards, np.float32), self.buffer
        returns, self.episode_rewards = self.returns(rewards, np.zeros(len(rewards), bool)), []
        n, ring = min(len(returns), buffer.size - buffer.kept), len(buffer.rows) - buffer.kept
        index = buffer.kept + (buffer.pointer - buffer.kept - n + torch.arange(n)) % ring
        buffer.rows[index.to(self.device), -1] = torch.from_numpy(returns[-n:]).to(self.device)


class EDISRun(ReturnsRun):
    """Offline and online rows in one buffer, and generated ones beside it, whose Batch.extra is -inf, too: no bound."""

    COLUMNS = (*Run.COLUMNS, "generated_share", *Generation.COLUMNS)
    PROGRESS = (*ReturnsRun.PROGRESS, "next_retraining", "generation_report")

    def __init__(self, config: Any, algorithm: type) -> None:
        super().__init__(config, algorithm)
        self.next_retraining, self.generation_report = 0, {}  # online step at which it is due; for the log's next row
        self.seconds["generation"] = 0.0

    def build(self) -> dict[str, Any]:
        parts = super().build()
        self.generation = Generation(self.config, self.env, self.agent, self.device)
        return parts | {"generation": self.generation}

    def carried(self, state: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """All but the generation, which begins at the switch."""
        return {name: part for name, part in self.parts.items() if name != "generation"}, self.switch

    # --- Batches
    def keeps_offline_data(self) -> bool:
        """The diffusion model learns from them; without it, every batch has a share of them."""
        return True

    def online_batch(self) -> Batch:
        """A share of generated rows, the rest online ones, none of the data's.

        Generated rows alone until there are as many online rows as a batch takes [ours], as MixingBuffer does.
        """
        buffer, rows, n = self.buffer, self.generation.rows, self.config.batch_size
        if not self.config.generated:
            return buffer.sample(n)
        share = int(self.config.mixing_ratio * n)
        share = share if buffer.size - buffer.kept >= n - share else n
        drawn = rows[torch.randint(len(rows), (share,), device=rows.device)]
        if share < n:
            online = torch.randint(buffer.kept, buffer.size, (n - share,), device=rows.device)
            drawn = torch.cat([drawn, buffer.rows[online]])
        return buffer.batch(drawn)

    def update_online(self, step: int) -> dict[str, torch.Tensor]:
        return self.agent.update(self.online_batch())

    # --- Retraining
    def save_if_due(self, within_episode: bool = False) -> None:
        """Called between episodes, where a retraining that is due is made, as a run can be saved within it there.

        So it waits for the end of the running episode [ours]; in a task without a time limit it does not.
        """
        super().save_if_due(within_episode)
        waits = within_episode and self.env.time_limit
        if self.config.generated and self.buffer is not None and not waits:
            if self.step - self.switch >= self.next_retraining:
                self.retrain()

    def retrain(self) -> None:
        """Train model and energies, generate; each unit of work leaves a state from which it can be gone on with."""
        generation, buffer, begun, first = self.generation, self.buffer, time.perf_counter(), 0
        for stage, length, work in generation.stages(buffer.size - buffer.kept):
            done = min(length, max(0, generation.unit - first))
            bar = tqdm(total=length, initial=done, desc=stage, dynamic_ncols=True, mininterval=0.5, leave=False)
            with bar:
                while generation.unit < first + length:
                    super().save_if_due()
                    if generation.unit and generation.unit % self.config.checkpoint_frequency == 0:
                        self.save()
                    start = time.perf_counter()
                    generation.do_unit(work, buffer, generation.unit - first)
                    self.seconds["generation"] += time.perf_counter() - start
                    bar.update()
            first += length
        self.generation_report = generation.finish(buffer)
        frequency = self.config.retrain_frequency
        self.next_retraining = ((self.step - self.switch) // frequency + 1) * frequency
        self.clock += time.perf_counter() - begun  # steps_per_second is of the steps

    def describe(self, phase: str, row: dict[str, Any]) -> dict[str, Any]:
        """The share of generated rows in a batch, and the last retraining's report."""
        if phase != "online" or not self.config.generated:
            return {}
        report, self.generation_report = self.generation_report, {}
        n, share = self.config.batch_size, int(self.config.mixing_ratio * self.config.batch_size)
        alone = self.buffer.size - self.buffer.kept < n - share
        return report | {"generated_share": 1.0 if alone else share / n}


# --- Training loop
def train_on_dataset(run: Run, phase: str, first: int, length: int, update: Callable) -> None:
    """A phase before the switch, steps first to first + length: one `update(dataset, step)` each, which draws rows."""
    if run.step == first:
        torch.manual_seed(derive_seed(run.config.seed, phase))
    with run.bar(phase, length, run.step - first) as bar:
        while run.step < first + length:
            run.save_if_due()
            start = time.perf_counter()
            metrics = update(run.dataset, run.step - first)
            run.seconds[phase] += time.perf_counter() - start
            run.step += 1
            run.report(phase, run.step - first, metrics, bar)
    run.end_phase(phase)


def finetune_online(run: Run) -> None:
    """Algorithm 1: fine-tune on online samples, one update a step."""
    config, agent, env = run.config, run.agent, run.env
    if run.buffer is None:
        torch.manual_seed(derive_seed(config.seed, "online"))
        run.start_online()
    end = run.switch + config.online_iterations
    with run.bar("online", config.online_iterations, run.step - run.switch) as bar:
        while run.step < end:
            run.save_if_due()
            observation, over = env.reset(derive_seed(config.seed, "episode", run.episode)), False
            run.episode += 1
            while not over and run.step < end:
                run.save_if_due(within_episode=True)
                step, times = run.step - run.switch + 1, [time.perf_counter()]
                action = agent.act(observation, deterministic=False)
                times.append(time.perf_counter())
                if config.overlap:  # a GPU works through it, and copies the actor, while the environment steps
                    metrics = run.update_online(step)
                    agent.live_arrays.fetch()
                times.append(time.perf_counter())
                next_observation, reward, terminated, truncated = env.step(action)
                times.append(time.perf_counter())
                run.remember(observation, action, reward, next_observation, terminated)
                times.append(time.perf_counter())
                observation, over = next_observation, terminated or truncated
                if not config.overlap:
                    metrics = run.update_online(step)
                run.step += 1
                if over:
                    run.end_episode()
                run.end_step(step)
                times.append(time.perf_counter())
                parts = ("act", "update", "environment", "insert", "update")
                for part, start, stop in zip(parts, times, times[1:]):
                    run.seconds[part] += stop - start
                run.report("online", step, metrics, bar)


def compiles(config: Any, device: str) -> bool:
    """Whether the update is to be compiled: if asked for or, on auto, in a long run where a compiler works."""
    updates = config.online_iterations + (0 if config.offline_checkpoint else config.offline_iterations)
    if config.compile == "false" or (config.compile == "auto" and updates < 20_000):
        return False
    torch._dynamo.config.trace_autograd_ops = True  # the gradients belong to the graph
    torch._inductor.config.fallback_random = True  # the same draws as without compilation
    if "cuda" not in device:  # there Triton compiles, in processes of its own
        torch._inductor.config.compile_threads = config.threads
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
        return True
    except Exception as error:
        why = f"torch.compile needs a C++ compiler such as g++; it does not work here: {reason(error)[:200]}"
    if config.compile == "true":
        fail(f"{why}; --compile false does without")
    tqdm.write(why)
    return False


def train(run: Run) -> None:
    """A whole run, or the rest of one. `run` cannot be used again."""
    config, algorithm = run.config, run.algorithm
    try:
        run.refuse_old_run()  # here for a quick answer, again when the folder is locked
        if run.state:
            try:
                run.load_state_dict(run.state)
            except (RuntimeError, ValueError, KeyError) as error:
                fail(f"{run.source} does not fit this run: {reason(error)}")
            run.state = None
        else:
            run.load_dataset()
        run.open_log()
        if config.evaluate_beside:
            run.evaluator.start()
        if compiled := compiles(config, run.device):
            run.agent.compile_update()
        how = "compiled, which takes its time at the first update of each kind" if compiled else "not compiled"
        how += ", updates replayed as CUDA graphs" if run.replay.stream else ""
        tqdm.write(f"{run.folder}: {algorithm.ALGORITHM} on {run.device}, {config.threads} CPU thread(s), {how}")
        first = 0
        for phase, length, update in run.phases():
            if run.step < first + length:
                train_on_dataset(run, phase, first, length, update)
            first += length
        if run.buffer is None:
            run.save("offline_checkpoint.pt")
            run.save()
        finetune_online(run)
        run.finish()
    finally:
        run.close()


# --- Main
def main(algorithm: type, config_class: type, run_class: type) -> None:
    """Command line: train, --resume, or --eval_only."""
    on_signals(signal.SIG_IGN, *SAVES)  # until there is something to save
    on_signals(end_quietly, *STOPS)
    try:
        config = parse_config(config_class, sys.argv[1:], given := set())
        if config.eval_only:
            return print(score_checkpoint(config, given, algorithm))
        if config.resume:
            own = ["--config", str(Path(config.resume) / "config.yaml")]
            config = parse_config(config_class, [*own, *sys.argv[1:]], given)
        config.given = given
        torch.set_num_threads(config.threads)
        train(run_class(config, algorithm))
    except OSError as error:
        what = "what was saved before is whole: make room or give access, then --resume the run's folder"
        fail(f"{reason(error)}; {what}")
    finally:
        on_signals(signal.SIG_DFL, *STOPS)  # everything is saved


def score_checkpoint(config: Any, given: set[str], algorithm: type) -> str:
    """--eval_only: the policy's score, in its own task; what is given beside that must be as in the checkpoint."""
    path, own = Path(config.eval_only), {"eval_only", "device", "threads", "n_test_episodes", "eval_seed"}
    checkpoint = load_checkpoint(path, algorithm)
    found = different(checkpoint["config"], config)
    if forbidden := [text for name, text in found.items() if name in given - own]:
        fail(f"--eval_only scores {path} as it is, with {'; '.join(forbidden)}: leave that out")
    config = replace(checkpoint["config"], **{name: getattr(config, name) for name in own})
    torch.set_num_threads(config.threads)
    env = Environment(config.env, ends_at_goal=False, max_steps=config.max_episode_steps)
    agent = algorithm(config, env, choose_device(config.device))
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        fail(f"{path} does not fit {config.env}: {reason(error)}")
    result = evaluate(agent, env, config.n_test_episodes, config.eval_seed)
    return f"{config.env}, {config.n_test_episodes} episodes: {json.dumps(result)}"


if __name__ == "__main__":
    main(EDIS, TrainConfig, EDISRun)
