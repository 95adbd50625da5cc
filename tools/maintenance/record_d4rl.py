"""Record single steps of D4RL's own simulators, for the tests that hold d4rl_envs to them.

    .venv-d4rl/bin/python tools/maintenance/record_d4rl.py             # in the D4RL stack (install_d4rl.sh): all nine
    .venv-d4rl/bin/python tools/maintenance/record_d4rl.py hopper door --out /tmp/recordings

writes tests/data/d4rl_<name>.npz, `name` one of hopper, halfcheetah, walker2d, antmaze-umaze, antmaze-medium,
antmaze-large, pen, door, relocate. tests/d4rl_recordings.py reads them back. A file has, for n steps:

    qpos, qvel          (n, nq), (n, nv) float32: the state before the step. It was rounded to float32 and set in the
                        simulator with set_state before every step, so what is written is exact.
    starts              (n,) bool: the row begins an episode. Otherwise its state is the previous row's result, rounded.
    last_qpos, last_qvel  (episodes, nq), (episodes, nv) float32: the result of each episode's last row
    action              (n, act_dim) float16, some beyond +-1: what was given to step()
    reward, terminal    (n,) float64, (n,) bool, of D4RL's own step(). There is no time limit in a recording.
    observation_rows    (m,): every 20th row and every terminal one ...
    next_observation    (m, obs_dim) float64: ... and what step() observed there, not rounded
    antmaze             goal (n, 2)
    door                body_pos of "frame" (n, 3), goal_achieved (n,)
    pen                 body_quat of "target" (n, 4), goal_achieved (n,)
    relocate            body_pos of "Object" and site_pos of "target" (n, 3) each, goal_achieved (n,)

The actions are a seeded mix of white noise, smooth noise and constants. Every other episode starts far from the usual
places: in the air, spinning, at a wall, beside the goal, with the door ajar or the ball at the hand.
"""

import argparse
import os
from pathlib import Path

import numpy as np

os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
import d4rl  # noqa: E402, F401
import d4rl.gym_mujoco  # noqa: E402, F401
import gym  # noqa: E402
from d4rl.locomotion import maze_env  # noqa: E402

maze_env.print = lambda *args: None  # it prints the goal at every reset
NAMES = {
    **{f"{robot}": f"{robot}-medium-v2" for robot in ("hopper", "halfcheetah", "walker2d")},
    "antmaze-umaze": "antmaze-umaze-v2",
    "antmaze-medium": "antmaze-medium-play-v2",
    "antmaze-large": "antmaze-large-play-v2",
    **{f"{task}": f"{task}-human-v1" for task in ("pen", "door", "relocate")},
}
# What a task's reset draws besides the state: column: (array of the model, kind of object, its name)
PLACES = {
    "door": {"body_pos": ("body", "frame")},
    "pen": {"body_quat": ("body", "target")},
    "relocate": {"body_pos": ("body", "Object"), "site_pos": ("site", "target")},
}


class Actions:
    """A stream of actions, one manner an episode; float16, so that they are written exactly."""

    def __init__(self, rng, size):
        self.rng, self.size = rng, size
        self.manner, self.action = rng.choice(["white", "smooth", "constant"], p=[0.4, 0.4, 0.2]), rng.normal(size=size)

    def next(self):
        if self.manner == "white":
            self.action = self.rng.uniform(-1.1, 1.1, self.size)
        elif self.manner == "smooth":
            self.action = 0.9 * self.action + 0.3 * self.rng.normal(size=self.size)
        return np.clip(self.action, -1.5, 1.5).astype(np.float16)


def unusual_state(name, env, rng):
    """Another start than reset's: it must bring contacts, rewards and ends that noise alone never reaches."""
    qpos, qvel = env.sim.data.qpos.copy(), env.sim.data.qvel.copy()
    if name in ("hopper", "halfcheetah", "walker2d"):
        qpos[1] += rng.uniform(0, 0.4)
        qpos[2:] += rng.uniform(-0.15, 0.15, len(qpos) - 2)
        qvel += rng.normal(size=len(qvel)) * rng.choice([0.5, 2.0])
    elif name.startswith("antmaze"):
        goal, scale = np.asarray(env.target_goal), 4.0
        free = [(j, i) for i, row in enumerate(env._maze_map) for j, cell in enumerate(row) if cell != 1]
        cell = np.array(free[rng.integers(len(free))]) * scale - (env._init_torso_x, env._init_torso_y)
        near = rng.random() < 0.5
        qpos[:2] = goal + rng.uniform(-0.6, 0.6, 2) if near else cell + rng.uniform(-1.6, 1.6, 2)
        qpos[2] += rng.uniform(-0.2, 0.5)
        qvel += rng.normal(size=len(qvel))
    elif name == "door":
        qpos[:-2] += rng.uniform(-0.2, 0.2, len(qpos) - 2)
        qpos[-2:] = rng.uniform(0, 1.5), rng.uniform(0, 1.0)
        qvel[-2] = rng.uniform(-2, 2)
    elif name == "pen":
        qpos[:24] += rng.uniform(-0.1, 0.1, 24)
        qpos[-3:] += rng.uniform(-0.3, 0.3, 3)
        env.sim.model.body_quat[env.sim.model.body_name2id("target")] = 1, 0, 0, 0  # as the pen lies, so near success
    else:
        palm = env.sim.data.get_site_xpos("S_grasp").copy()
        target = env.sim.data.get_site_xpos("target").copy()
        where = palm if rng.random() < 0.5 else target
        qpos[-6:-3] = where + rng.uniform(-0.06, 0.06, 3) - env.sim.data.get_body_xpos("Object") + qpos[-6:-3]
    return qpos, qvel


def record(name, rows, seed):
    """The columns of one task's file."""
    rng, env = np.random.default_rng(seed), gym.make(NAMES[name]).unwrapped
    stepper, env = env, getattr(env, "_wrapped_env", env)  # D4RL's wrapper scales and clips actions
    np.random.seed(seed)  # antmaze's goals come from it
    env.seed(seed)
    columns = {key: [] for key in ("qpos", "qvel", "starts", "action", "reward", "terminal", "last_qpos", "last_qvel")}
    columns |= {key: [] for key in ("observation_rows", "next_observation")}
    n_episodes, n, model, data = 0, 0, env.sim.model, env.sim.data

    def put(**values):
        for key, value in values.items():
            columns.setdefault(key, []).append(value)

    while n < rows:
        stepper.reset()
        state = unusual_state(name, env, rng) if n_episodes % 2 else (data.qpos.copy(), data.qvel.copy())
        actions, n_episodes = Actions(rng, stepper.action_space.shape[0]), n_episodes + 1
        for t in range(min(rng.choice([20, 50, 100]), rows - n)):
            qpos, qvel = (part.astype(np.float32) for part in state)
            env.set_state(qpos.astype(np.float64), qvel.astype(np.float64))
            places = {key: getattr(model, key)[getattr(model, f"{kind}_name2id")(body)].copy()
                      for key, (kind, body) in PLACES.get(name, {}).items()}  # fmt: skip
            action = actions.next()
            observation, reward, done, info = stepper.step(action.astype(np.float32))
            put(qpos=qpos, qvel=qvel, starts=t == 0, action=action, reward=reward, terminal=done, **places)
            if name.startswith("antmaze"):
                put(goal=np.array(env.target_goal))
            elif name in PLACES:
                put(goal_achieved=info["goal_achieved"])
            if n % 20 == 0 or done:
                put(observation_rows=n, next_observation=observation)
            state, n = (data.qpos.copy(), data.qvel.copy()), n + 1
            if done:
                break
        put(last_qpos=state[0].astype(np.float32), last_qvel=state[1].astype(np.float32))
    return {key: np.array(column) for key, column in columns.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; without one, all")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "tests/data")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.names) - NAMES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))} (choose from {', '.join(NAMES)})")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or NAMES:
        columns, path = record(name, args.rows, args.seed), args.out / f"d4rl_{name}.npz"
        with open(f"{path}.part", "wb") as file:
            np.savez_compressed(file, **columns)
        os.replace(f"{path}.part", path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {columns['starts'].sum()} episodes, "
              f"{columns['terminal'].sum()} terminal, reward {columns['reward'].min():.3f} to "
              f"{columns['reward'].max():.3f}, |qvel| to {np.abs(columns['qvel']).max():.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
