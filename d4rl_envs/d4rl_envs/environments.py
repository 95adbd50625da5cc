"""make(): environments by name, whichever package has them, all in Gymnasium's API."""

import importlib.util
import os
import random
import re
import warnings
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from d4rl_envs.scores import LOCOMOTION, is_binary, is_d4rl, scoring
from d4rl_envs.spaces import FlatObservations, leaves, say, say_order


def make(name: str, ends_at_goal: bool = True, **options: Any) -> gymnasium.Env:
    """The environment of that name: D4RL's, a Gymnasium id, `minari:<id>` or `ogbench:<single-task id>`.

    D4RL's names run on gym 0.23.1 with d4rl where these are installed, else on d4rl_envs' own simulators. A Minari data
    set brings its own environment. `ends_at_goal` is read by Cal-QL's binary Adroit tasks alone: False lets an episode
    go on after the goal. `options` go to gymnasium.make; the original stack takes none and ignores them.

    Observations of several parts (Dict, Tuple) come flat, their keys in alphabetical order, which is said once. Where
    scoring(name) is "success", info["goal_achieved"] tells whether the goal is reached in this step; binary Adroit has
    its dense reward in info["dense_reward"]. Raises what the simulators' packages do; SourceError, a ValueError, where
    Minari or OGBench is missing or does not have the data set or task.
    """
    binary, prefix = is_binary(name), name.partition(":")[0]
    if prefix == "minari":
        from d4rl_envs.sources import open_minari

        env = open_minari(name).recover_environment(**options)
    elif prefix == "ogbench":
        from d4rl_envs.sources import open_ogbench

        env = open_ogbench(name, **options)
    else:
        old_id = name.replace("-binary-v0", "-cloned-v1") if binary else name
        if (gym := import_old_stack()) and old_id in gym.envs.registry.env_specs:
            seed_global_streams(0)  # a simulator may draw from them while it is made
            return OldStack(gym.make(old_id), name, ends_at_goal)
        register_alias(name)
        options |= {"ends_at_goal": ends_at_goal} if binary else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "out of date": D4RL's tasks are the v4 ids
            env = gymnasium.make(name, **options)
    if isinstance(env.observation_space, (gymnasium.spaces.Dict, gymnasium.spaces.Tuple)):
        say_order(name, leaves(env.observation_space))
        env = FlatObservations(env)
    task = env.spec.id if prefix == "minari" else name
    return GoalAchieved(env) if not is_d4rl(name) and scoring(task) == "success" else env


def register_alias(name: str) -> None:
    """Register a D4RL name that TASKS lacks, such as hopper-full-replay-v2, with its robot's, maze's or hand's task."""
    from d4rl_envs import TASKS

    if not is_d4rl(name) or name in gymnasium.registry:
        return
    task = re.sub(f"^({LOCOMOTION})-.*", r"\1-medium-v2", re.sub("^antmaze-(.*)-v.$", r"antmaze-\1-v2", name))
    task = re.sub("^(pen|door|relocate)-.*", r"\1-human-v1", task)
    if task in TASKS:
        entry_point, limit, arguments = TASKS[task]
        gymnasium.register(name, entry_point, max_episode_steps=limit, kwargs=arguments)


class GoalAchieved(gymnasium.Wrapper):
    """Adds info["goal_achieved"], from info["success"] of OGBench and gymnasium-robotics."""

    def step(self, action: Any) -> tuple:
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = info | {"goal_achieved": bool(info.get("success", reward > 0))}
        return observation, reward, terminated, truncated, info


# --- gym 0.23.1 with d4rl
def seed_global_streams(seed: int) -> None:
    """Of Python and numpy, which the original simulators draw from: antmaze its goal."""
    random.seed(seed)
    np.random.seed(seed)


@cache
def import_old_stack() -> Any:
    """gym, where it and d4rl are installed and can be imported; None, said once, where they cannot."""
    try:
        if not all(importlib.util.find_spec(module) for module in ("gym", "d4rl")):
            return None
        os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
        import d4rl.gym_mujoco  # noqa: F401  by name: without mjrl, d4rl's own import stops before it
        import gym
        from d4rl.locomotion import maze_env

        maze_env.print = lambda *args, **kwargs: None  # it prints the goal at every reset
        return gym if gym.envs.registry.env_specs else None
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        say(f"warning: gym and d4rl cannot be imported, so Gymnasium is used ({why[:200]})")


class OldStack(gymnasium.Env):
    """An environment of gym 0.23.1 in Gymnasium's API. Only reset(seed=...) seeds; render() gives an image.

    A time limit truncates, it does not terminate, unless the task ended in the same step. The binary tasks are made of
    D4RL's dense ones: -1 a step, 0 at the goal, which alone ends an episode; a dropped pen does not.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, env: Any, name: str, ends_at_goal: bool) -> None:
        self.env, self.binary, self.ends_at_goal = env, is_binary(name), ends_at_goal
        self.counts_success = scoring(name) == "success"
        spaces = (env.observation_space, env.action_space)
        self.observation_space, self.action_space = (
            gymnasium.spaces.Box(space.low, space.high, dtype=space.dtype) for space in spaces
        )
        self.spec = EnvSpec(name, max_episode_steps=env.spec.max_episode_steps)
        self.dt = getattr(env.unwrapped, "dt", 1 / 30)  # seconds a step, for videos

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            seed_global_streams(seed)
            for simulator in (self.env, getattr(self.env.unwrapped, "_wrapped_env", self.env)):
                simulator.seed(seed)  # the seed stops at a wrapper of the simulator
        return self.env.reset(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        observation, reward, done, info = self.env.step(action)
        truncated = bool(info.get("TimeLimit.truncated", False))
        terminated = bool(done) and not truncated
        if self.counts_success:
            goal = bool(info["goal_achieved"]) if self.binary else reward > 0
            info = info | {"goal_achieved": bool(goal)}
        if self.binary:
            info["dense_reward"], reward = reward, goal - 1.0
            terminated, truncated = goal and self.ends_at_goal, "TimeLimit.truncated" in info
        return observation, reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        return self.env.render(mode="rgb_array")

    def close(self) -> None:
        self.env.close()
