"""Train the behaviour policies that collect.py rolls out: data/policies/*.npz. Nobody needs to run it again.

    pip install sbx-rl==0.28.0
    python tools/data/train_policies.py hopper --output hopper.npz
    python tools/data/train_policies.py ant --output ant.npz

SAC of SBX (JAX) on the task's simulator in d4rl_envs. After every 1/100 of the training the policy is evaluated, with
sampled actions, and the output is written anew: up to five policies from the way to the medium one, the medium one (the
first with D4RL's score of such data, or else the best of those before the best one) and the best one. For the ant it is
only the best one: an ant on open ground, told to walk in a direction that changes every ten seconds or so.
"""

import argparse
import sys
import time
from pathlib import Path

import d4rl_envs.antmaze
import gymnasium as gym
import mujoco
import numpy as np
from policies import LAYERS, Actor, act, face
from sbx import SAC
from stable_baselines3.common.vec_env import DummyVecEnv
from tqdm import tqdm

TASKS = {"hopper": 44.0, "walker2d": 60.0, "halfcheetah": 42.0, "ant": np.inf}  # the medium policy's score
EPISODES = 10


class AntWalk(gym.Env):
    """Walk in the direction asked for; an episode ends when the ant has rolled over. Reward: metres a second."""

    LIMIT, NEW_DIRECTION = 300, 100  # steps of 0.1 s

    def __init__(self):
        d4rl_envs.antmaze.MAZES["open"] = ("SG",)
        self.env = d4rl_envs.antmaze.AntMazeEnv("open", ends_at_goal=False)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float32)
        self.action_space = self.env.action_space

    def observe(self):
        observation, self.quarter = face(self.env._get_obs(), self.direction)
        return observation.astype(np.float32)

    def turn(self):
        angle = self.np_random.uniform(-np.pi, np.pi)
        self.direction = np.array((np.cos(angle), np.sin(angle)))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.env.reset(seed=int(self.np_random.integers(2**31)))
        self.steps = 0
        self.turn()
        return self.observe(), {}

    def step(self, action):
        before = self.env.data.qpos[:2].copy()
        torque = d4rl_envs.antmaze.TORQUE * act(action, self.quarter)
        self.env.data.ctrl[:] = torque
        # One call in C instead of AntMazeEnv's exact steps: for training the difference does not matter.
        mujoco.mj_step(self.env.model, self.env.data, nstep=5)
        velocity = (self.env.data.qpos[:2] - before) / self.env.dt
        forward = velocity @ self.direction
        sideways = abs(velocity[1] * self.direction[0] - velocity[0] * self.direction[1])
        self.steps += 1
        if self.np_random.random() < 1 / self.NEW_DIRECTION:
            self.turn()
        observation = self.observe()
        upright = observation[6] > 0.2 and np.isfinite(observation).all()
        return observation, float(forward - 0.3 * sideways + 0.3), not upright, self.steps >= self.LIMIT, {}


def make_env(task):
    if task == "ant":
        return AntWalk()
    return gym.make(f"{task}-medium-v2")


def layers_of(model):
    """The actor's weights, as policies.Actor takes them."""
    params = model.policy.actor_state.params["params"]
    layers = (params[f"Dense_{i}"] for i in range(4))
    (w0, b0), (w1, b1), mean, log_std = ((layer["kernel"], layer["bias"]) for layer in layers)
    head = (np.concatenate(both, axis=-1) for both in zip(mean, log_std))
    return [np.asarray(layer, np.float32) for layer in (w0, b0, w1, b1, *head)]


def score(task, env, actor):
    """Mean of EPISODES episodes: D4RL-normalised return, or the ant's return."""
    draw, returns = np.random.default_rng(1), []
    for episode in range(EPISODES):
        observation, _ = env.reset(seed=1000 + episode)
        total, done = 0.0, False
        while not done:
            action = actor(observation, draw.standard_normal(env.action_space.shape))
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + reward, terminated or truncated
        returns.append(total)
    mean = float(np.mean(returns))
    return mean if task == "ant" else d4rl_envs.normalized_score(task, mean)


def pick(history, medium_score):
    """Of [(steps, score, layers)]: five on the way to the medium policy, the medium one, the best one."""
    scores = [entry[1] for entry in history]
    best = int(np.argmax(scores))
    if np.isinf(medium_score) or not best:
        return [history[best]]
    medium = next((i for i, value in enumerate(scores[:best]) if value >= medium_score), int(np.argmax(scores[:best])))
    way = sorted(set(np.linspace(0, medium, 6).astype(int)))  # ends with the medium policy
    return [history[i] for i in way] + [history[best]]


def write(path, picked):
    steps, scores, layers = zip(*picked)
    stacked = {name: np.stack(layer) for name, layer in zip(LAYERS, zip(*layers))}
    aside = path.with_name(f".{path.name}")
    with aside.open("wb") as file:
        np.savez_compressed(file, steps=np.array(steps), scores=np.array(scores), **stacked)
    aside.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=np.inf, help="stop after this time (default: no limit)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        sys.exit(f"train_policies.py: error: no such directory: {args.output.parent}")

    model = SAC(
        "MlpPolicy",
        DummyVecEnv([lambda: make_env(args.task)] * 8),
        policy_kwargs={"net_arch": [128, 128]},
        learning_rate=7e-4,
        gamma=0.99,
        seed=args.seed,
        learning_starts=10_000,
        train_freq=8,
        gradient_steps=32,  # one update for two steps
    )
    env, history, begin = make_env(args.task), [], time.monotonic()
    with tqdm(total=args.steps, desc=args.task, unit="step") as bar:
        while model.num_timesteps < args.steps and time.monotonic() - begin < 60 * args.minutes:
            before = model.num_timesteps
            model.learn(args.steps // 100, reset_num_timesteps=False)
            layers = layers_of(model)
            history.append((model.num_timesteps, score(args.task, env, Actor(layers)), layers))
            write(args.output, pick(history, TASKS[args.task]))
            bar.set_postfix_str(f"score {history[-1][1]:.1f}", refresh=False)
            bar.update(model.num_timesteps - before)
            print(*history[-1][:2], round(time.monotonic() - begin), flush=True)


if __name__ == "__main__":
    main()
