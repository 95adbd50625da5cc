"""What the tests of whole runs share: settings, ways to start one, and what is in its folder."""

import contextlib
import csv
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import options

TINY = {
    "hidden_dim": 32,
    "vae_hidden_dim": 32,
    "batch_size": 32,
    "warmup_steps": 100,
    "buffer_size": 1000,
    "offline_iterations": 200,
    "vae_iterations": 150,
    "online_iterations": 500,
    "adapt_iterations": 20,
    "coefficient_frequency": 200,
    "eval_frequency": 200,
    "log_frequency": 20,
    "checkpoint_frequency": 50,
    "n_test_episodes": 2,
    "device": "cpu",
    "p_share": 0,  # p_threshold: enough rows pass for adaptive updates
}

# For files without guidance: not a field of a coefficient
PLAIN = {
    "hidden_dim": 32,
    "batch_size": 32,
    "offline_iterations": 200,
    "online_iterations": 500,
    "device": "cpu",
    "eval_frequency": 200,
    "log_frequency": 20,
    "checkpoint_frequency": 50,
    "n_test_episodes": 2,
}


# --- Starting
def command(*words, **settings):
    return [sys.executable, *map(str, words), *options(settings)]


def run_script(*words, **settings):
    """A command line in a process of its own, which must end well and without a warning."""
    process = subprocess.run(command(*words, **settings), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr


@contextlib.contextmanager
def copies_at(moments, run_class, tmp):
    """Copies a run's folder to tmp/<phase><step> at each of the (phase, step) moments, as a kill would have left it."""
    report = run_class.report

    def report_and_copy(run, phase, step, *rest):
        report(run, phase, step, *rest)
        if (phase, step) in moments:
            shutil.copytree(run.folder, tmp / f"{phase}{step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_class, "report", report_and_copy)
        yield


def check_resumes(call, moments, run_class, tmp, **settings):
    """A run goes on from each of the moments as if it had not stopped; returns its folder."""
    with copies_at(moments, run_class, tmp):
        call(runs_dir=tmp / "runs", **settings)
    whole = only_folder(tmp / "runs")
    for phase, step in moments:
        folder = tmp / f"{phase}{step}"
        assert len(rows(folder)) < len(rows(whole))
        call("--resume", folder)
        assert_same_run(folder, whole)
    return whole


# --- Looking
def only_folder(runs_dir):
    """The folder of the one run below runs_dir."""
    return next(runs_dir.rglob("metrics.csv")).parent


def rows(folder, phase=None):
    """metrics.csv without its one column of timings."""
    with open(folder / "metrics.csv", newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        del row["steps_per_second"]
    return [row for row in found if phase in (None, row["phase"])]


def numbers(folder, phase, column):
    return [float(row[column]) for row in rows(folder, phase) if row[column]]


def checkpoint(folder, name="checkpoint.pt"):
    return torch.load(folder / name, map_location="cpu", weights_only=True)


def assert_equal(a, b, where=""):
    """Of nested dicts and lists of tensors and numbers, to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(folder, other):
    """Two runs have the same log and the same last checkpoint, but for timings and places."""
    assert rows(folder) == rows(other)
    states = checkpoint(folder), checkpoint(other)
    for state in states:
        del state["config"], state["check_sum"]
        for name in ("seconds", "peak_memory_mb", "metrics_size"):
            del state["progress"][name]
    assert_equal(*states)


def assert_plain_fine_tuning(unguided, plain):
    """The log of an online phase with p = 0 everywhere is that of one without SAMG."""
    unguided, plain = rows(unguided), rows(plain)
    for column in unguided[0].keys() - {"r_in_mean", "r_in_std", "guidance_size", "horizon"}:
        assert [row[column] for row in unguided] == [row[column] for row in plain], column
