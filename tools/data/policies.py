"""Behaviour policies in plain numpy: small SAC actors, and the frame in which one of them walks the ant.

A policy file (.npz) holds several actors of one task, oldest first, as stacked float32 arrays: w0 (n, observation,
width), b0 (n, width), w1, b1 of the second hidden layer, w2, b2 of the output (mean, log standard deviation), and what
they scored: `steps` (n,) of training, `scores` (n,). train_policies.py writes them, collect.py reads them.
"""

from pathlib import Path

import numpy as np

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
GRID = 2.0**16  # actions are rounded to this fraction of 1, so that the last bit of a matrix product never matters
LAYERS = ("w0", "b0", "w1", "b1", "w2", "b2")


class Actor:
    """A squashed Gaussian policy with two hidden ReLU layers, computed in float64."""

    def __init__(self, layers):
        self.layers = [np.asarray(layer, np.float64) for layer in layers]

    def __call__(self, observation, noise):
        """observation (dim,), noise (action_dim,) standard normal, 0 for the mode -> action (action_dim,) float32."""
        w0, b0, w1, b1, w2, b2 = self.layers
        hidden = np.maximum(np.maximum(observation @ w0 + b0, 0) @ w1 + b1, 0)
        mean, log_std = (hidden @ w2 + b2).reshape(2, -1)
        action = np.tanh(mean + np.exp(np.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)) * noise)
        return (np.round(action * GRID) / GRID).astype(np.float32)


def load_policies(path: Path):
    """(actors, scores) of a policy file, oldest first."""
    with np.load(path, allow_pickle=False) as file:
        if missing := {*LAYERS, "scores"} - set(file):
            raise ValueError(f"no array {missing.pop()!r}")
        return [Actor(layers) for layers in zip(*(file[name] for name in LAYERS))], file["scores"]


# AntMaze. Looked at from above, the ant is the same after a quarter turn, but for the names of its legs and for the
# sign of two ankles. So its policy is only ever asked to walk along +x with a body turned by at most 45 degrees.
ANKLE_SIGNS = np.array(((1.0, 1.0), (1.0, -1.0), (1.0, -1.0), (1.0, 1.0)))  # (hip, ankle) of each leg
QUARTERS = [np.array(((c, -s, 0), (s, c, 0), (0, 0, 1.0))) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
LEGS = [np.roll(range(4), quarter) for quarter in range(4)]  # x[LEGS[i]] is np.roll(x, i, axis=0), only faster


def rotation_matrix(quaternion):
    """(w, x, y, z) -> (3, 3)"""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
    )


def face(observation, direction):
    """The walking policy's view of AntMaze's observation (29,), to walk along `direction` (2,), a unit vector.

    (29,): height; goal direction and vertical in the body's frame, the body turned by quarters to within 45 degrees of
    the goal; joint angles; velocity along the goal, to its left, up; angular velocity; joint speeds. And the number of
    quarters, which act() takes.
    """
    c, s = direction
    to_goal = np.array(((c, s, 0), (-s, c, 0), (0, 0, 1.0)))
    body = to_goal @ rotation_matrix(observation[3:7])
    quarter = int(np.round(np.arctan2(body[1, 0], body[0, 0]) / (np.pi / 2))) % 4
    body = body @ QUARTERS[quarter].T
    angles, speeds = (
        (joints.reshape(4, 2) * ANKLE_SIGNS)[LEGS[quarter]].ravel()
        for joints in (observation[7:15], observation[21:29])
    )
    velocity, turning = to_goal @ observation[15:18], QUARTERS[quarter] @ observation[18:21]
    return np.concatenate((observation[2:3], body[0], body[2], angles, velocity, turning, speeds)), quarter


def act(action, quarter):
    """The walking policy's action (8,) -> the environment's (8,), whose order of legs is another."""
    legs = action.reshape(4, 2)[LEGS[-quarter]] * ANKLE_SIGNS
    return legs[LEGS[1]].ravel().astype(np.float32)
