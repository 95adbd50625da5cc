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

pytest.register_assert_rewrite("reference", "reference_cql", "runs")
ROOT = Path(__file__).resolve().parents[1]


def load_module(path):
    """Import a file of the repository as a module of its own, which finds what lies beside it."""
    path = ROOT / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def awac():
    return load_module("algorithms/awac_samg.py")


@pytest.fixture(scope="session")
def iql():
    return load_module("algorithms/iql_samg.py")


@pytest.fixture(scope="session")
def cql():
    return load_module("algorithms/cql_samg.py")


@pytest.fixture(scope="session")
def calql():
    return load_module("algorithms/calql_samg.py")


@pytest.fixture(scope="session")
def td3_bc():
    return load_module("algorithms/td3_bc.py")


@pytest.fixture(scope="session")
def spot():
    return load_module("algorithms/spot.py")


@pytest.fixture(scope="session")
def wsrl():
    return load_module("algorithms/wsrl.py")


@pytest.fixture(scope="session")
def edis():
    return load_module("algorithms/edis.py")


@pytest.fixture(scope="session", autouse=True)
def sources():
    """pyrallis parses a whole file once for every field's help text: here, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


# --- Whole runs
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


def run_main(algorithm, run_class, *words, **settings):
    """The command line of an algorithm's file in this process, which saves the imports of a new one."""
    module = sys.modules[algorithm.__module__]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words), *options(settings)])
        try:
            module.main(algorithm, module.TrainConfig, run_class)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope="session")
def hopper_columns():
    return roll_out("Hopper-v4", 1500)


@pytest.fixture(scope="session")
def hopper_file(hopper_columns, tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "hopper.hdf5", hopper_columns)


@pytest.fixture(scope="session")
def call(awac):
    """call("--resume", folder, seed=1): AWAC's command line in this process."""
    return functools.partial(run_main, awac.AWAC, awac.GuidedRun)
