import functools
import importlib.util
import inspect
import signal
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_algorithm(name):
    """Import algorithms/<name>.py as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "algorithms" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def awac():
    return load_algorithm("awac_samg")


# --- Whole runs (test_run.py, test_bad_inputs.py)
def write_dataset(path, columns):
    """Write the arrays of a data set in D4RL's layout."""
    with h5py.File(path, "w") as file:
        for name, array in columns.items():
            file[name] = array
    return path


def roll_out(env_id, n_rows):
    """The columns of a data set of random actions in a Gymnasium environment."""
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Hopper-v4 is "out of date"
        env = gymnasium.make(env_id)
    env.action_space.seed(0)
    rows, (observation, _) = [], env.reset(seed=0)
    while len(rows) < n_rows:
        action = env.action_space.sample()
        successor, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, successor, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else successor
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    kinds = [np.float32] * 4 + [bool] * 2
    return {name: np.array(column, kind) for name, column, kind in zip(names, zip(*rows), kinds)}


def options(settings):
    """{"seed": 1} as ["--seed", "1"]."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def hopper_columns():
    return roll_out("Hopper-v4", 1500)


@pytest.fixture(scope="session")
def hopper_file(hopper_columns, tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "hopper.hdf5", hopper_columns)


@pytest.fixture(scope="session")
def call(awac):
    """call("--resume", folder, seed=1): the command line in this process, which saves the imports of a new one."""

    def call(*words, **settings):
        argv, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        sys.argv = ["awac_samg.py", *map(str, words), *options(settings)]
        try:
            awac.main(awac.AWAC, awac.TrainConfig, awac.Run)
        finally:
            sys.argv = argv
            for number, handler in handlers.items():
                signal.signal(number, handler)

    with pytest.MonkeyPatch.context() as patch:  # pyrallis parses the whole file once for every field's help text
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield call
