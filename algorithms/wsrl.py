"""WSRL: offline pre-training, then online fine-tuning that retains no offline data, in one file.

WSRL (Zhou et al., "Efficient Online Reinforcement Learning Fine-Tuning Need Not Retain Offline Data", arXiv:2412.07762)
pre-trains ten critics by Cal-QL or CQL, drops all offline data, lets the frozen policy act for 5,000 steps into an
empty buffer, and from then on is SAC with four updates of the critics a step. SAMG's concurrent work: no guidance here.

    python algorithms/wsrl.py --config configs/wsrl/quickstart.yaml
    python algorithms/wsrl.py --env Hopper-v4 --dataset my.hdf5 --offline_iterations 100000
    python algorithms/wsrl.py --resume runs/hopper-medium-v2/wsrl-seed0

"[ours]" marks a choice where the paper and its code differ or are silent; docs/wsrl.md lists them all.
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
    seed: int = 0  # seeds networks, batches, exploration and every training episode's reset
    eval_seed: int = 0  # seeds the evaluation episodes: the same start states for every evaluation and every run
    device: str = "auto"  # auto (cuda where there is one), cpu, cuda, cuda:1, ...
    threads: int = 1  # CPU threads; more than one does not pay for networks of this size
    compile: str = "auto"  # torch.compile the updates: true, false, or auto: in runs of 20,000 updates and more
    graphs: str = "auto"  # replay updates as CUDA graphs: true, false, or auto: on CUDA, if that works
    # --- Run
    runs_dir: str = "runs"  # the run's folder is <runs_dir>/<env>/<name>-seed<seed>
    name: str = ""  # empty: wsrl
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
    offline_iterations: int = (
        1_000_000  # offline updates; WSRL: 250,000 (locomotion), 1,000,000 (antmaze), 20,000 (adroit)
    )
    online_iterations: int = 200_000  # online environment steps; WSRL: 500,000; 0: offline only
    warmup_steps: int = 5_000  # first online steps, with the offline policy and without updates
    buffer_size: int = 1_000_000  # online ring buffer, rows: no online row is ever dropped
    overlap: bool = False  # on a GPU: step the environment while it updates; a row can be drawn one update later [ours]
    # --- WSRL, locomotion's values (CORL's names where it has one)
    batch_size: int = 256  # rows of an update of the critics
    hidden_dim: int = 256  # width of the hidden layers: two of the policy, q_n_hidden_layers of each critic
    q_n_hidden_layers: int = 2  # of the critics
    log_std: str = "head"  # of the policy: head, of its network, or parameter, one learned vector for all states
    ensemble: int = 10  # critics
    subset: int = 2  # of them, drawn anew for each update: their minimum is the TD target's, others' mean the penalty
    utd: int = 4  # online updates of the critics a step; the policy has one, on the rows of all of them
    policy_q: str = "min"  # of all critics, what the policy ascends: min, or mean as in REDQ and RLPD
    policy_lr: float = 1e-4  # Adam, policy
    alpha_lr: float = 1e-4  # Adam, temperature
    qf_lr: float = 3e-4  # Adam, critics and alpha_prime
    discount: float = 0.99  # gamma
    soft_target_update_rate: float = 5e-3  # Polyak step of the target critics after each of the critics' updates
    calibrate: bool = False  # Cal-QL: no penalty below the data's returns; false: CQL, WSRL's choice for locomotion
    cql_alpha: float = 5.0  # weight of the conservative penalty; with cql_lagrange it is not read
    cql_n_actions: int = 10  # actions a row of each kind in the penalty: random, policy in s', policy in s
    cql_importance_sample: bool = True  # divide by the densities that drew these actions
    cql_lagrange: bool = False  # learn the penalty's weight, so that its gap stays near cql_target_action_gap
    cql_target_action_gap: float = 0.8  # only with cql_lagrange
    cql_temp: float = 1.0  # temperature of the log-sum-exp
    cql_clip_diff_min: float = -math.inf  # lower bound of a row's penalty
    cql_clip_diff_max: float = math.inf  # its upper bound
    cql_max_target_backup: bool = True  # offline TD target at the best of cql_n_actions actions in s'
    online_max_target_backup: bool = False  # and the online one, as WSRL has it on antmaze
    normalize: bool = False  # observations to zero mean and unit variance of the offline data
    normalize_reward: bool = False  # locomotion: scale to the range of returns; antmaze: minus 1
    reward_scale: float = 1.0  # rewards enter the buffers as reward_scale * r + reward_bias, r normalised or not
    reward_bias: float = 0.0  # on antmaze it replaces normalize_reward's minus 1
    is_sparse_reward: bool = False  # an episode without success has the return of failing for ever

    # What check_config allows: at least 1 (as every frequency), at most 1, negative and infinite values too
    COUNTS = ("threads", "n_test_episodes", "hidden_dim", "q_n_hidden_layers", "ensemble", "subset", "utd")
    COUNTS += ("cql_n_actions",)
    SHARES = ("discount", "soft_target_update_rate")
    SIGNED = ("reward_bias", "cql_target_action_gap", "cql_clip_diff_min", "cql_clip_diff_max")

    def __post_init__(self) -> None:
        self.name = self.name or "wsrl"
        check_config(self, log_std=("head", "parameter"), policy_q=("min", "mean"))
        check_cql(self)
        if self.subset > self.ensemble:
            raise ValueError(f"subset {self.subset} must not be above ensemble {self.ensemble}")
        if self.is_sparse_reward and self.discount == 1:
            raise ValueError("is_sparse_reward needs a discount below 1: the return of failing for ever is infinite")


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


LAYER_NORM_EPS = 1e-6  # as in JAX, where WSRL was written; PyTorch's own is 1e-5


def orthogonal_gains(n_hidden: int) -> list[float]:
    """WSRL's start, layer by layer: sqrt 2, but the last hidden layer near zero."""
    return [math.sqrt(2)] * (n_hidden - 1) + [0.01, math.sqrt(2)]


def one_normed_row(layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """mlp() with LayerNorm for a single row, (n_in,) -> (n_out,)."""
    *hidden, weight, bias = layers
    for hidden_weight, hidden_bias, gain, shift in zip(*[iter(hidden)] * 4):
        x = hidden_weight.dot(x)
        x += hidden_bias
        x -= x.mean()
        x *= gain / np.sqrt(x.dot(x) / len(x) + LAYER_NORM_EPS)
        x += shift
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


class LayerNormActor(nn.Module):
    """WSRL's policy: tanh of a Gaussian, whose log-std is an output beside the mean or one learned vector."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_dim: int, log_std: str) -> None:
        super().__init__()
        outputs = act_dim if log_std == "parameter" else 2 * act_dim
        self.network = mlp(obs_dim, hidden_dim, hidden_dim, outputs, layer_norm=True)
        for layer, gain in zip((layer for layer in self.network if isinstance(layer, nn.Linear)), orthogonal_gains(2)):
            for part in layer.weight.data.split(act_dim if layer is self.network[-1] else hidden_dim):
                nn.init.orthogonal_(part, gain)
            nn.init.zeros_(layer.bias)
        for layer in self.network:
            if isinstance(layer, nn.LayerNorm):
                layer.eps = LAYER_NORM_EPS
        self.log_std = nn.Parameter(torch.zeros(act_dim)) if log_std == "parameter" else None

    def forward(self, states: torch.Tensor) -> TanhGaussian:
        """states: (n, obs_dim), normalised if `normalize`."""
        mean, log_std = self.network(states), self.log_std
        if log_std is None:
            mean, log_std = mean.chunk(2, dim=1)
        return TanhGaussian(mean, log_std.expand(mean.shape).clamp(*LOG_STD_RANGE))


LOG_STD_RANGE = (math.log(1e-5), math.log(10))


class CriticEnsemble(nn.Module):
    """Q-functions of the same inputs, each wholly its own; a layer of all of them is one batched matrix product.

    Dense, LayerNorm, ReLU for every hidden layer. Weights are (size, n_in, n_out), the rest (size, 1, n_out).
    """

    def __init__(self, size: int, n_in: int, hidden_dim: int, n_hidden: int) -> None:
        super().__init__()
        sizes = (n_in, *[hidden_dim] * n_hidden, 1)
        self.weights = nn.ParameterList(torch.empty(size, *pair) for pair in zip(sizes, sizes[1:]))
        self.biases = nn.ParameterList(torch.zeros(size, 1, n_out) for n_out in sizes[1:])
        self.gains = nn.ParameterList(torch.ones(size, 1, n_out) for n_out in sizes[1:-1])
        self.shifts = nn.ParameterList(torch.zeros(size, 1, n_out) for n_out in sizes[1:-1])
        for weights, gain in zip(self.weights, orthogonal_gains(n_hidden)):
            for weight in weights.data:
                nn.init.orthogonal_(weight, gain)

    def forward(self, states: torch.Tensor, actions: torch.Tensor, members: torch.Tensor | None = None) -> torch.Tensor:
        """Q of (n, obs_dim) and (n, act_dim): (size, n), or of those critics whose indices (m,) are given: (m, n)."""
        every = (self.weights, self.biases, self.gains, self.shifts)
        weights, biases, gains, shifts = ([x if members is None else x[members] for x in kind] for kind in every)
        x = torch.cat([states, actions], dim=1).expand(len(weights[0]), -1, -1)
        for weight, bias, gain, shift in zip(weights, biases, gains, shifts):
            x = torch.baddbmm(bias, x, weight)
            x = (nn.functional.layer_norm(x, x.shape[2:], eps=LAYER_NORM_EPS) * gain + shift).relu()
        return torch.baddbmm(biases[-1], x, weights[-1]).squeeze(2)


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


# --- WSRL
class WSRL(Agent):
    """Ten critics and a policy: by CQL or Cal-QL offline (Kumar et al., 2020; Nakamoto et al., 2023), by SAC online."""

    ALGORITHM = "wsrl"
    METRICS = ("critic_loss", "actor_loss", "q_mean", "cql_gap", "bound_rate", "entropy", "alpha", "alpha_prime")
    METRICS += ("td_error",)

    def __init__(self, config: TrainConfig, env: Environment, device: str) -> None:
        super().__init__()
        self.config = config
        self.actor = LayerNormActor(env.obs_dim, env.act_dim, config.hidden_dim, config.log_std)
        sizes = (env.obs_dim + env.act_dim, config.hidden_dim, config.q_n_hidden_layers)
        self.critic = CriticEnsemble(config.ensemble, *sizes)
        self.target_critic = frozen_copy(self.critic)
        one = torch.tensor(math.log(math.e - 1))  # softplus of it is 1, at which both weights start
        self.raw_alpha = nn.Parameter(one.clone())
        self.raw_alpha_prime = nn.Parameter(one.clone(), requires_grad=config.cql_lagrange)
        self.register_buffer("obs_mean", torch.zeros(env.obs_dim))
        self.register_buffer("obs_std", torch.ones(env.obs_dim))
        self.register_buffer("action_low", torch.from_numpy(env.action_low))
        self.register_buffer("action_high", torch.from_numpy(env.action_high))
        names = ("obs_mean", "obs_std", "action_low", "action_high")
        names += ("actor.log_std",) if config.log_std == "parameter" else ()
        self.live_arrays = LiveArrays(self, "actor.network", *names)
        self.to(device)
        adam = partial(torch.optim.Adam, fused=True)
        self.optimizers = {"actor": adam(self.actor.parameters(), lr=config.policy_lr)}
        self.optimizers["critic"] = adam(self.critic.parameters(), lr=config.qf_lr)
        self.optimizers["alpha"] = adam([self.raw_alpha], lr=config.alpha_lr)
        self.optimizers["alpha_prime"] = adam([self.raw_alpha_prime], lr=config.qf_lr)

    def to_unit(self, actions: torch.Tensor) -> torch.Tensor:
        """From the environment's bounds to -1 and 1, and a little inside, where the policy's lie, too."""
        middle, half = (self.action_low + self.action_high) / 2, (self.action_high - self.action_low) / 2
        return ((actions - middle) / half).clamp(-1 + 1e-5, 1 - 1e-5)

    def act(self, observation: np.ndarray, deterministic: bool) -> np.ndarray:
        """The policy's action, (act_dim,) in the environment's units, for a raw observation (obs_dim,)."""
        mean, std, low, high, *rest = self.live_arrays()
        log_std = rest.pop(0) if self.config.log_std == "parameter" else None
        action = one_normed_row(rest, (observation - mean) / std)
        if log_std is None:
            action, log_std = np.split(action, 2)
        if not deterministic:
            noise = torch.randn(len(action), dtype=self.obs_mean.dtype).numpy()
            action = action + np.exp(log_std.clip(*LOG_STD_RANGE)) * noise
        return np.minimum(np.maximum((low + high) / 2 + (high - low) / 2 * np.tanh(action), low), high)

    def subset(self) -> torch.Tensor:
        """M: indices of `subset` different critics, the same for all rows of an update."""
        return torch.rand(self.config.ensemble, device=self.obs_mean.device).topk(self.config.subset).indices

    def update_online(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One update of the critics on each `batch_size` rows in turn, then one of the policy on all of them."""
        for rows in zip(*(column.split(self.config.batch_size) for column in batch)):
            metrics = self.learn_critics(Batch(*rows))
        return metrics | self.learn_policy(batch)

    def learn_online_from(self, buffer: ReplayBuffer) -> dict[str, torch.Tensor]:
        return self.update_online(buffer.sample(self.config.utd * self.config.batch_size))

    def learn(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Offline: one step of critics, policy and temperature, each from the same old parameters."""
        config, k, act_dim = self.config, self.config.cql_n_actions, batch.actions.shape[1]
        states, actions = self.normalize(batch.states), self.to_unit(batch.actions)
        policy = self.actor(states)
        td_loss, metrics, next_policy = self.td_loss(batch, config.cql_max_target_backup)
        losses, more = self.policy_losses(states, policy, next_policy)

        # --- Conservative penalty, of another subset than the target's: of sampled actions and of the data's, one pass
        with torch.no_grad():
            random_actions = actions.new_empty(len(actions), k, act_dim).uniform_(-1, 1)
            next_actions, next_log_pi = next_policy.sample(k)
            current_actions, current_log_pi = policy.sample(k)
            random_log_density = torch.full_like(next_log_pi, -act_dim * math.log(2))  # uniform on (-1, 1)
            log_density = torch.cat([random_log_density, next_log_pi, current_log_pi], dim=1)
            all_actions = torch.cat([actions[:, None], random_actions, next_actions, current_actions], dim=1)
        q = q_values(partial(self.critic, members=self.subset()), states, all_actions)
        if config.calibrate:  # Cal-QL: at the policy's actions Q counts as no less than the return from this row on
            bound, (q_others, q_policy) = batch.extra[:, None], q.split([1 + k, 2 * k], dim=2)
            metrics["bound_rate"] = (q_policy.detach() < bound).float().mean()
            q = torch.cat([q_others, torch.maximum(q_policy, bound)], dim=2)
        gap = conservative_gap(q, log_density, config).mean()

        # --- One step of each optimiser
        if config.cql_lagrange:  # the weight grows while the gap is above cql_target_action_gap
            alpha_prime, excess = nn.functional.softplus(self.raw_alpha_prime), gap - config.cql_target_action_gap
            losses["critic"] = td_loss + alpha_prime.detach() * excess
            losses["alpha_prime"] = -alpha_prime * excess.detach()
            metrics["alpha_prime"] = alpha_prime.detach()
        else:
            losses["critic"] = td_loss + config.cql_alpha * gap
        metrics |= more | {"critic_loss": losses["critic"].detach(), "cql_gap": gap.detach()}
        descend(self.optimizers, gradients(self.optimizers, losses))
        self.move_targets()
        return metrics

    def learn_critics(self, batch: Batch) -> dict[str, torch.Tensor]:
        """SAC's: no penalty."""
        loss, metrics, _ = self.td_loss(batch, self.config.online_max_target_backup)
        descend(self.optimizers, gradients(self.optimizers, {"critic": loss}))
        self.move_targets()
        return metrics | {"critic_loss": loss.detach()}

    def learn_policy(self, batch: Batch) -> dict[str, torch.Tensor]:
        states = self.normalize(batch.states)
        with torch.no_grad():
            next_policy = self.actor(self.normalize(batch.next_states))
        losses, metrics = self.policy_losses(states, self.actor(states), next_policy)
        descend(self.optimizers, gradients(self.optimizers, losses))
        return metrics

    def td_loss(self, batch: Batch, max_backup: bool) -> tuple:
        """The critics' squared TD error, mean over all of them and rows; metrics; and the policy in s'.

        y = r + gamma (1 - d) max_a' min_{i in M} Q_target,i(s', a'), without an entropy term; a' ~ pi(.|s') is one
        action or, with `max_backup`, the best of cql_n_actions.
        """
        config, next_states = self.config, self.normalize(batch.next_states)
        with torch.no_grad():
            next_policy = self.actor(next_states)
            next_actions, _ = next_policy.sample(config.cql_n_actions if max_backup else 1)
            target_critics = partial(self.target_critic, members=self.subset())
            q_next = q_values(target_critics, next_states, next_actions).amin(0).amax(1)
            target = batch.rewards + config.discount * (1 - batch.dones) * q_next
        q = self.critic(self.normalize(batch.states), self.to_unit(batch.actions))
        error = q - target
        metrics = {"q_mean": q.detach().mean(), "td_error": error.detach().abs().mean()}
        return error.square().mean(), metrics, next_policy

    def policy_losses(self, states: torch.Tensor, policy: TanhGaussian, next_policy: TanhGaussian) -> tuple:
        """The losses of policy and temperature, whose entropy is measured in s', and metrics."""
        actions, log_pi = (x.squeeze(1) for x in policy.sample(1))
        with torch.no_grad():
            entropy = -next_policy.sample(1)[1].mean()
        q = self.critic(states, actions)
        q = q.amin(0) if self.config.policy_q == "min" else q.mean(0)
        alpha = nn.functional.softplus(self.raw_alpha)
        losses = {"actor": (alpha.detach() * log_pi - q).mean()}
        losses["alpha"] = alpha * (entropy + actions.shape[1])  # falls while the entropy is above -act_dim
        return losses, {"actor_loss": losses["actor"].detach(), "entropy": entropy, "alpha": alpha.detach()}

    @torch.no_grad()
    def move_targets(self) -> None:
        targets, critics = [*self.target_critic.parameters()], [*self.critic.parameters()]
        torch._foreach_lerp_(targets, critics, self.config.soft_target_update_rate)

    def compile_update(self, **options: Any) -> None:
        """With torch.compile's options."""
        for name in ("learn", "learn_critics", "learn_policy"):
            setattr(self, name, torch.compile(getattr(self, name), **options))


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


def quantiles(values: torch.Tensor, shares: tuple[float, ...]) -> list[float]:
    """Of (n,) values; of more than torch takes, the nearest value, not one between two."""
    if len(values) <= 2**24:
        return torch.quantile(values, torch.tensor(shares, device=values.device)).tolist()
    ordered = values.sort().values
    return [ordered[round(share * (len(values) - 1))].item() for share in shares]


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


# --- Cal-QL's returns
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


# --- WSRL's phases
class WSRLRun(Run):
    """Offline rows with their returns-to-go in Batch.extra; none of them in the online buffer."""

    SETTLED = Run.SETTLED | {"ensemble", "log_std", "calibrate", "is_sparse_reward"}

    def load_dataset(self) -> None:
        super().load_dataset()
        if self.dataset and self.config.calibrate:
            rows, failure = self.dataset.stored(), None
            rewards = rows.rewards.cpu().numpy()
            if self.config.is_sparse_reward:
                failure = find_failing_reward(rewards, self.env, self.reward_scale, self.reward_bias)
            returns = returns_to_go(rewards, self.episode_ends, self.config.discount, failure)
            rows.extra.copy_(torch.from_numpy(returns))

    def keeps_offline_data(self) -> bool:
        return False

    def start_online(self) -> None:
        """Nothing but the buffer is new: networks, target critics, temperature and Adam's moments go on."""
        self.make_buffer()

    def update_online(self, step: int) -> dict[str, torch.Tensor]:
        if step <= self.warmup() or not self.buffer.size:
            return {}
        self.agent.begin()
        return self.replay(self.agent.learn_online_from, self.buffer)


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
    main(WSRL, TrainConfig, WSRLRun)
