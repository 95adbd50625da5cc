"""Train SAC on any Gymnasium task and roll it out into a data set in D4RL's raw HDF5 layout.

    python tools/data/collect_sac.py Hopper-v4 --score 33 --rows 40000 --seed 0 --output data/hopper-medium-mini.hdf5
    python tools/data/collect_sac.py Pendulum-v1 --return -400 --rows 10000 --output pendulum.hdf5
    python tools/data/collect_sac.py Hopper-v4 --policy hopper.zip --rows 40000 --output hopper.hdf5

Stable-Baselines3's SAC (MlpPolicy, default settings) is trained up to the first evaluation whose mean return reaches
--score (D4RL-normalised; hopper, halfcheetah and walker2d only) or --return. That policy, or a saved one (--policy;
loading it unpickles the file, so give only files you trust), is rolled out with sampled actions, as in D4RL's medium
data.

The file has one row a step, in time order: `observations`, `actions`, `rewards`, `next_observations` (the true next
observation also on an episode's last row), `terminals` (the environment terminated) and `timeouts` (the time limit was
reached without terminating). Episodes are always whole: the one during which --rows is reached is still finished, so
the file has --rows rows or slightly more. The file's attributes tell how it was made. The same command gives the same
rows again with the same library versions on the same kind of CPU. collect.py makes data for D4RL's own tasks, without
training.
"""

import argparse
import hashlib
import itertools
import math
import os
import pickle
import shlex
import sys
import warnings
import zipfile
from pathlib import Path

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import stable_baselines3
import torch
from collect import NOTE, fail, write
from stable_baselines3 import SAC
from tqdm import tqdm

from d4rl_envs import REFERENCE_SCORES

COLUMNS = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "next_observations": np.float32,
    "terminals": bool,
    "timeouts": bool,
}
EVAL_EPISODES = 10


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="?", default="Hopper-v4", help="Gymnasium id (default: %(default)s)")
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--score", type=float, help="train until this D4RL-normalised score")
    policy.add_argument("--return", type=float, dest="target_return", help="train until this mean return")
    policy.add_argument("--policy", type=Path, help="roll out this saved Stable-Baselines3 SAC policy (.zip)")
    parser.add_argument("--output", type=Path, required=True, help="HDF5 file to write; must not exist")
    parser.add_argument("--save_policy", type=Path, help="save the trained policy to this .zip file; must not exist")
    parser.add_argument("--rows", type=int, default=40_000, help="steps to collect (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--max_train_steps", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--eval_every", type=int, default=1000, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads (default: %(default)s)")
    args = parser.parse_args()

    for name in ("rows", "max_train_steps", "eval_every", "threads"):
        if getattr(args, name) < 1:
            fail(f"--{name} must be at least 1")
    if not 0 <= args.seed < 2**31:
        fail("--seed must be from 0 to 2**31 - 1")
    if args.score is not None:
        if task_name(args.env) not in REFERENCE_SCORES:
            fail(f"no D4RL reference returns for {args.env}: use --return instead of --score")
        low, high = REFERENCE_SCORES[task_name(args.env)]
        args.target_return = low + args.score / 100 * (high - low)
    if args.policy is None and not math.isfinite(args.target_return):
        fail("--score or --return must be finite")
    if args.policy is not None and not args.policy.is_file():
        fail(f"no such file: {args.policy}")
    if args.policy is not None and args.save_policy is not None:
        fail("--save_policy has no use with --policy: nothing is trained")
    if args.save_policy is not None and args.save_policy.suffix != ".zip":
        fail("--save_policy must end in .zip")
    for path in filter(None, (args.output, args.save_policy)):
        if path.exists():
            fail(f"{path} exists already")
        if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            fail(f"no such writable directory: {path.parent}")
    return args


def task_name(env_id):
    """Hopper-v4 -> hopper"""
    return env_id.split("-")[0].lower()


def normalised_score(env_id, mean_return):
    """100 * (return - random) / (expert - random), or NaN for a task without D4RL reference returns."""
    low, high = REFERENCE_SCORES.get(task_name(env_id), (math.nan, math.nan))
    return 100 * (mean_return - low) / (high - low)


def make_env(env_id):
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError) as error:
        fail(f"cannot make {env_id}: {error}")
    if not (isinstance(env.observation_space, gym.spaces.Box) and isinstance(env.action_space, gym.spaces.Box)):
        fail(f"{env_id} has no continuous observations and actions")
    if env.spec.max_episode_steps is None:
        fail(f"{env_id} has no time limit")
    return env


def roll_out(model, env, seed):
    """Yield episodes without end, each a dict of COLUMNS' arrays, one row a step:
    (next_)observations (length, observation_dim), actions (length, action_dim), all others (length,).
    """
    torch.manual_seed(seed)
    reset_seeds = np.random.default_rng(seed)
    while True:
        rows = []
        observation, _ = env.reset(seed=int(reset_seeds.integers(2**31)))
        done = False
        while not done:
            action, _ = model.predict(observation, deterministic=False)
            next_observation, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            rows.append((observation, action, reward, next_observation, terminated, truncated and not terminated))
            observation = next_observation
        yield {name: np.array(column, dtype) for (name, dtype), column in zip(COLUMNS.items(), zip(*rows))}


def summarise(episodes):
    """Mean return and mean length (steps)."""
    returns = [episode["rewards"].sum(dtype=np.float64) for episode in episodes]
    return float(np.mean(returns)), float(np.mean([len(episode["rewards"]) for episode in episodes]))


def evaluate(model, env, seed):
    """Mean return and mean length (steps) of EVAL_EPISODES episodes with sampled actions."""
    # seed + 1: the data's episodes must not be those by which the policy was selected.
    with torch.random.fork_rng(devices=[]):
        return summarise(list(itertools.islice(roll_out(model, env, seed + 1), EVAL_EPISODES)))


def train(args):
    """SAC at its first evaluation with a mean return of at least args.target_return."""
    model = SAC("MlpPolicy", make_env(args.env), seed=args.seed, device="cpu")
    eval_env = make_env(args.env)
    with tqdm(total=args.max_train_steps, desc="train", unit="step") as bar:
        while model.num_timesteps < args.max_train_steps:
            steps = min(args.eval_every, args.max_train_steps - model.num_timesteps)
            model.learn(steps, reset_num_timesteps=False)
            mean_return, mean_length = evaluate(model, eval_env, args.seed)
            score = normalised_score(args.env, mean_return)
            bar.set_postfix_str(f"score {score:.1f}, return {mean_return:.0f}, length {mean_length:.0f}", refresh=False)
            bar.update(steps)
            if mean_return >= args.target_return:
                return model
    fail(f"mean return {args.target_return:.1f} not reached in {args.max_train_steps} training steps")


def load(args):
    try:
        return SAC.load(args.policy, env=make_env(args.env), device="cpu")
    except (OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        fail(f"cannot load {args.policy}: {error}")


def collect(model, args):
    """Whole episodes with at least args.rows rows in all, as a list of roll_out's dicts."""
    episodes, rows = [], 0
    with tqdm(total=args.rows, desc="roll out", unit="row") as bar:
        for episode in roll_out(model, make_env(args.env), args.seed):
            episodes.append(episode)
            rows += len(episode["rewards"])
            bar.update(min(rows, args.rows) - bar.n)
            if rows >= args.rows:
                return episodes


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*is out of date")  # v4: the v2 tasks of D4RL, maintained
    mujoco.set_mju_user_warning(lambda message: tqdm.write(f"MuJoCo: {message}"))  # else it writes MUJOCO_LOG.TXT

    model = train(args) if args.policy is None else load(args)
    if args.save_policy is not None:
        model.save(args.save_policy)
    policy_return, _ = evaluate(model, make_env(args.env), args.seed)
    episodes = collect(model, args)
    data = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
    mean_return, mean_length = summarise(episodes)
    attributes = {
        "note": NOTE,
        "env_id": args.env,
        "algorithm": "Stable-Baselines3 SAC, MlpPolicy, sampled actions",
        "training_steps": model.num_timesteps,
        "policy_mean_return": policy_return,
        "policy_normalised_score": normalised_score(args.env, policy_return),
        "policy_eval_episodes": EVAL_EPISODES,
        "data_mean_return": mean_return,
        "data_normalised_score": normalised_score(args.env, mean_return),
        "data_rows": len(data["rewards"]),
        "data_episodes": len(episodes),
        "data_mean_length": mean_length,
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "torch_version": str(torch.__version__),
        "gymnasium_version": gym.__version__,
        "mujoco_version": mujoco.__version__,
        "stable_baselines3_version": stable_baselines3.__version__,
        "h5py_version": h5py.__version__,
    }
    write(args.output, {name: [column] for name, column in data.items()}, attributes)
    attributes |= {
        "bytes": args.output.stat().st_size,
        "sha256": hashlib.sha256(args.output.read_bytes()).hexdigest(),
    }
    for name, value in attributes.items():
        print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
