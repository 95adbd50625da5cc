"""The algorithm files on D4RL's own simulators: pytest -m d4rl, once tools/maintenance/install_d4rl.sh has run."""

import csv
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, options
from d4rl_recordings import FOLDER

PYTHON = Path(os.environ.get("D4RL_PYTHON") or ROOT / ".venv-d4rl/bin/python")
pytestmark = [
    pytest.mark.d4rl,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no D4RL stack: tools/maintenance/install_d4rl.sh makes one in .venv-d4rl; D4RL_PYTHON names another's",
    ),
]
TASKS = ("hopper-medium-v2", "antmaze-umaze-v2", "door-binary-v0")
ALGORITHMS = ("awac", "iql", "cql", "calql")
SETTINGS = {
    "hidden_dim": 32,
    "vae_hidden_dim": 32,
    "batch_size": 32,
    "warmup_steps": 50,
    "buffer_size": 1000,
    "offline_iterations": 40,
    "vae_iterations": 40,
    "online_iterations": 120,
    "coefficient_frequency": 40,
    "eval_frequency": 60,
    "log_frequency": 20,
    "checkpoint_frequency": 100,
    "n_test_episodes": 1,
    "device": "cpu",
}
ROLL_OUT = """
import sys
import d4rl, d4rl.gym_mujoco, gym, h5py, numpy
path, name = sys.argv[1:]
env = gym.make(name.replace("binary-v0", "cloned-v1"))
rows, observation = [], env.reset()
for t in range(400):
    action = env.action_space.sample()
    successor, reward, done, info = env.step(action)
    timeout = info.get("TimeLimit.truncated", False)
    rows.append((observation, action, -1.0 if "binary" in name else reward, done and not timeout, timeout))
    observation = env.reset() if done else successor
with h5py.File(path, "w") as file:
    for key, column in zip(("observations", "actions", "rewards", "terminals", "timeouts"), zip(*rows)):
        file[key] = numpy.array(column, bool if key in ("terminals", "timeouts") else numpy.float32)
"""


def run(*words):
    """A command in the stack's Python, which must end well; returns what it wrote to standard error."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"D4RL_SUPPRESS_IMPORT_ERROR": "1", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert process.returncode == 0, process.stderr
    return process.stderr


@pytest.fixture(scope="module", params=TASKS)
def task(request, tmp_path_factory):
    """A task and the file of a small data set of random actions in it."""
    path = tmp_path_factory.mktemp("d4rl") / "data.hdf5"
    run("-c", ROLL_OUT, path, request.param)
    return request.param, path


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_from_end_to_end(algorithm, task, tmp_path):
    name, path = task
    settings = SETTINGS | {"env": name, "dataset": path, "runs_dir": tmp_path}
    messages = run(ROOT / f"algorithms/{algorithm}_samg.py", *options(settings))
    assert "Traceback" not in messages and "without d4rl" not in messages
    with open(next(tmp_path.rglob("metrics.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} >= {"offline", "online"}


@pytest.mark.parametrize("name", ["hopper", "antmaze-umaze", "door"])
def test_recordings_are_this_stacks(name, tmp_path):
    """tools/maintenance/record_d4rl.py takes the committed steps again (the first hundred of them)."""
    run(ROOT / "tools/maintenance/record_d4rl.py", name, "--rows", 100, "--out", tmp_path)
    with np.load(tmp_path / f"d4rl_{name}.npz") as again, np.load(FOLDER / f"d4rl_{name}.npz") as committed:
        assert again.keys() == committed.keys()
        for key in ("qpos", "qvel", "starts", "action", "reward", "terminal"):
            assert np.array_equal(again[key], committed[key][:100]), key
