"""Steps that D4RL's own simulators took, and ours held to them; tools/maintenance/record_d4rl.py tells the format."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "data"


def load_recording(name):
    """The columns of tests/data/d4rl_<name>.npz, with next_qpos and next_qvel; states as float64."""
    with np.load(FOLDER / f"d4rl_{name}.npz") as file:
        columns = {key: file[key] for key in file.files}
    ends = np.append(np.flatnonzero(columns["starts"])[1:], len(columns["starts"])) - 1
    for key in ("qpos", "qvel"):
        columns[key] = columns[key].astype(np.float64)
        columns[f"next_{key}"] = np.roll(columns[key], -1, axis=0)
        columns[f"next_{key}"][ends] = columns.pop(f"last_{key}")
    return columns


def errors_against(name, env, place=None):
    """Repeat every recorded step in env, a Gymnasium MuJoCo environment without wrappers, from the recorded state.

    `place(env, row)` puts goals and bodies where row["goal"], row["body_pos"], ... say, before the state is set.
    Returns the absolute errors: state (n,) the largest of each step, reward (n,), observation (m,); and terminated
    and goal_achieved, (n,) bool, true where ours differs. A recorded next state is rounded to float32, so ours is too:
    a state error below 1e-7 of the value may be lost; observations and rewards are compared unrounded.
    """
    recording = load_recording(name)
    observed = dict(zip(recording.pop("observation_rows"), recording.pop("next_observation")))
    rows = [dict(zip(recording, row)) for row in zip(*recording.values(), strict=True)]
    env.reset(seed=0)
    errors = {key: [] for key in ("state", "reward", "terminated", "goal_achieved", "observation")}
    for t, row in enumerate(rows):
        if place:
            place(env, row)
        env.set_state(row["qpos"], row["qvel"])
        observation, reward, terminated, _, info = env.step(row["action"].astype(np.float32))
        state, expected = np.float32(env.state_vector()), np.concatenate((row["next_qpos"], row["next_qvel"]))
        errors["state"].append(np.abs(state - expected).max())
        errors["reward"].append(abs(reward - row["reward"]))
        errors["terminated"].append(terminated != row["terminal"])
        if "goal_achieved" in row:
            errors["goal_achieved"].append(info["goal_achieved"] != row["goal_achieved"])
        if t in observed:
            errors["observation"].append(np.abs(observation - observed[t]).max())
    return {key: np.array(column) for key, column in errors.items()}
