"""Whole runs of the command line: files, log, equality of resumed runs, offline checkpoints and arms."""

import ast
import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT, roll_out, write_dataset
from runs import (
    TINY,
    assert_equal,
    assert_plain_fine_tuning,
    assert_same_run,
    check_resumes,
    checkpoint,
    command,
    copies_at,
    numbers,
    only_folder,
    rows,
)

SCRIPT = ROOT / "algorithms" / "awac_samg.py"
SWITCH = TINY["offline_iterations"] + TINY["vae_iterations"]
SHORT = {"online_iterations": 160, "warmup_steps": 40, "coefficient_frequency": 80, "eval_frequency": 80}


# --- Runs that several tests look at
@pytest.fixture(scope="module")
def finished(hopper_file, tmp_path_factory):
    """A whole run in a process of its own, from a YAML file with one setting overridden on the command line."""
    tmp = tmp_path_factory.mktemp("finished")
    settings = TINY | {"env": "Hopper-v4", "dataset": str(hopper_file), "seed": 5}
    (tmp / "tiny.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    words = command(SCRIPT, "--config", tmp / "tiny.yaml", seed=0, runs_dir=tmp / "runs")
    process = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(process=process, folder=tmp / "runs" / "Hopper-v4" / "awac-samg-seed0", tmp=tmp)


MOMENTS = {("offline", 130), ("coefficient", 130), ("online", 70), ("online", 430)}  # none is that of a checkpoint


@pytest.fixture(scope="module")
def snapshots(awac, call, hopper_file, tmp_path_factory):
    """The same run in this process, with copies of its folder as a kill at each of MOMENTS would have left it."""
    tmp = tmp_path_factory.mktemp("snapshots")
    with copies_at(MOMENTS, awac.GuidedRun, tmp):
        call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp / "runs", **TINY)
    return tmp


@pytest.fixture(scope="module")
def stopped(hopper_file, tmp_path_factory):
    """Three runs, each stopped online after the coefficient's first update by a signal of its own."""
    tmp, processes, outputs = tmp_path_factory.mktemp("stopped"), {}, {}
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        words = command(SCRIPT, env="Hopper-v4", dataset=hopper_file, runs_dir=tmp / number.name, **TINY)
        processes[number] = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    waiting, end = dict(processes), time.monotonic() + 120
    while waiting and time.monotonic() < end:
        for number, process in list(waiting.items()):
            log = list((tmp / number.name).rglob("metrics.csv"))
            if log and "\n260,online" in log[0].read_text():
                process.send_signal(number)
                del waiting[number]
        time.sleep(0.02)
    for number, process in processes.items():
        outputs[number] = process.communicate(timeout=60)[1]
    folders = {number: only_folder(tmp / number.name) for number in processes}
    codes = {number: process.returncode for number, process in processes.items()}
    return SimpleNamespace(folders=folders, codes=codes, stderr=outputs)


def start_online(call, source, runs_dir, **settings):
    """An online phase from an offline checkpoint; returns its folder."""
    call(env="Hopper-v4", offline_checkpoint=source, runs_dir=runs_dir, **(TINY | settings))
    return only_folder(runs_dir)


# --- One run from end to end
def test_run_ends_with_a_table(finished):
    assert finished.process.returncode == 0, finished.process.stderr
    assert "Traceback" not in finished.process.stderr and "Warning" not in finished.process.stderr
    for name in ("offline_score", "final_score", "regret"):
        assert re.search(rf"^ +{name} +-?\d+\.\d+$", finished.process.stdout, re.MULTILINE), finished.process.stdout


def test_config_gives_the_same_configuration(finished, awac, hopper_file):
    config = awac.parse_config(awac.TrainConfig, ["--config", str(finished.folder / "config.yaml")])
    settings = TINY | {"env": "Hopper-v4", "dataset": str(hopper_file), "seed": 0, "name": "awac-samg"}
    assert config == awac.TrainConfig(**settings, runs_dir=str(finished.tmp / "runs"))


def test_metrics_have_every_phase_and_column(finished):
    folder = finished.folder
    steps = [(row["phase"], int(row["step"])) for row in rows(folder)]
    ends = (("offline", 200), ("coefficient", 150), ("online", 500))
    log = {(phase, step) for phase, end in ends for step in {*range(20, end + 1, 20), end}}
    assert set(steps) == log and len(steps) == len(log)
    assert [phase for phase, _ in steps] == ["offline"] * 10 + ["coefficient"] * 8 + ["online"] * 25
    assert len(numbers(folder, "offline", "score")) == 1 and len(numbers(folder, "online", "score")) == 3
    for column in ("p_mean", "p_share", "p_q10", "p_q50", "p_q90", "guidance_weight"):
        values = numbers(folder, "online", column)
        assert len(values) == 25 and all(0 <= value <= 1 for value in values), column
    assert 0 < numbers(folder, "online", "p_mean")[-1] < numbers(folder, "online", "p_share")[-1] < 1
    assert len(numbers(folder, "online", "r_in_mean")) == 20  # from the warm-up's end on
    assert any(numbers(folder, "online", "r_in_mean"))
    reconstruction = numbers(folder, "coefficient", "vae_reconstruction")
    assert reconstruction[-1] < reconstruction[0]
    assert all(value > 0 for value in numbers(folder, "coefficient", "vae_kl"))
    with open(folder / "metrics.csv", newline="") as file:
        assert all(float(row["steps_per_second"]) > 0 for row in csv.DictReader(file))
    assert not any(value in ("nan", "inf", "-inf") for row in rows(folder) for value in row.values())


def test_summary_follows_from_the_metrics(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    offline, online = (numbers(finished.folder, phase, "score") for phase in ("offline", "online"))
    assert summary["offline_score"] == offline[-1]
    assert summary["final_score"] == pytest.approx(np.mean(online[-5:])) and summary["last_score"] == online[-1]
    assert math.isfinite(summary["train_score"])
    assert summary["best_score"] == max(online)
    assert summary["switch_drop"] == pytest.approx(offline[-1] - min(online))
    assert summary["regret"] == pytest.approx(1 - np.mean(online) / 100)
    low, high = min(numbers(finished.folder, "online", "train_return")), summary["best_score"] * 33 + 100
    assert low <= summary["train_return"] <= high
    parts = {"offline", "coefficient", "act", "environment", "insert", "update", "evaluation"}
    assert summary["seconds"].keys() == parts
    assert all(value > 0 for value in summary["seconds"].values())
    assert 50 < summary["peak_memory_mb"] < 20_000
    assert summary["seed"] == 0 and summary["device"] == "cpu"


def test_checkpoints_hold_tensors_and_plain_values(finished):
    last, offline = checkpoint(finished.folder), checkpoint(finished.folder, "offline_checkpoint.pt")
    assert last["progress"]["step"] == SWITCH + TINY["online_iterations"] and len(last["buffer"]["rows"]) == 500
    assert offline["progress"]["step"] == SWITCH and offline["buffer"] is None
    assert last["algorithm"] == offline["algorithm"] == "awac_samg"


def test_eval_only_repeats_the_last_evaluation(finished, call, capsys):
    call(eval_only=finished.folder / "checkpoint.pt", n_test_episodes=TINY["n_test_episodes"])
    result = json.loads(re.search(r"\{.*\}", capsys.readouterr().out)[0])
    last = rows(finished.folder, "online")[-1]
    assert result == {"score": float(last["score"]), "return": float(last["return"])}


# --- Seeds, stops and resumes
def test_same_seed_gives_the_same_run(finished, snapshots):
    assert_same_run(only_folder(snapshots / "runs"), finished.folder)


def test_another_seed_gives_another_run(finished, call, hopper_file, tmp_path):
    short = {"offline_iterations": 20, "vae_iterations": 20, "online_iterations": 20, "seed": 1}
    call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path, **(TINY | short))
    for phase in ("offline", "coefficient", "online"):
        assert rows(only_folder(tmp_path), phase)[0] != rows(finished.folder, phase)[0]


@pytest.mark.parametrize("moment", ["offline130", "coefficient130", "online70", "online430"])
def test_resumed_run_equals_the_uninterrupted_one(moment, finished, snapshots, call, tmp_path):
    folder = shutil.copytree(snapshots / moment, tmp_path / "moved")  # so this is a moved folder, too
    assert len(rows(folder)) < len(rows(finished.folder)) and not (folder / "summary.json").exists()
    call("--resume", folder)
    assert_same_run(folder, finished.folder)
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_run_resumes(number, stopped, finished, call):
    folder, lines = stopped.folders[number], stopped.stderr[number].splitlines()
    assert stopped.codes[number] == (-number if number == signal.SIGKILL else 128 + number), lines
    assert "Traceback" not in stopped.stderr[number]
    if number != signal.SIGKILL:
        assert [line for line in lines if line.startswith("saved; to go on") and f"--resume {folder}" in line]
        assert checkpoint(folder)["progress"]["step"] > SWITCH + 260
    assert not list(folder.glob("*.part")) and len(rows(folder, "online")) < 25
    call("--resume", folder)
    assert_same_run(folder, finished.folder)


def signalled(call, awac, moment, *numbers, **settings):
    """What a run ends with, or None, that gets signals at a (phase, step)."""
    report = awac.GuidedRun.report

    def report_and_signal(run, phase, step, *rest):
        report(run, phase, step, *rest)
        if (phase, step) == moment:
            for number in numbers:
                os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(awac.GuidedRun, "report", report_and_signal)
        try:
            call(**settings)
        except SystemExit as stop:
            return stop.code


QUICK = TINY | SHORT | {"env": "Pendulum-v1", "coefficient": "none", "offline_iterations": 40, "eval_frequency": 1000}


@pytest.fixture(scope="module")
def pendulum_file(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pendulum") / "pendulum.hdf5", roll_out("Pendulum-v1", 600))


def test_three_signals_at_once_are_one(call, awac, pendulum_file, capsys, tmp_path):
    settings = QUICK | {"dataset": pendulum_file, "runs_dir": tmp_path / "a b", "online_iterations": 0}
    assert signalled(call, awac, ("offline", 11), *[signal.SIGTERM] * 3, **settings) == 128 + signal.SIGTERM
    folder = only_folder(tmp_path)
    assert checkpoint(folder)["progress"]["step"] == 11
    words = shlex.split([line for line in capsys.readouterr().err.splitlines() if "to go on: " in line][-1])
    assert words[-3:] == [str(SCRIPT), "--resume", str(folder)]


def test_a_signal_saves_and_the_run_goes_on(call, awac, pendulum_file, tmp_path):
    settings = QUICK | {"dataset": pendulum_file, "runs_dir": tmp_path, "checkpoint_frequency": 10**6}
    with copies_at([("offline", 13)], awac.GuidedRun, tmp_path):
        assert signalled(call, awac, ("offline", 11), signal.SIGUSR1, **settings) is None
    assert checkpoint(tmp_path / "offline13")["progress"]["step"] == 11
    assert checkpoint(only_folder(tmp_path / "Pendulum-v1"))["progress"]["step"] == 200


@pytest.mark.parametrize("limit", [None, 10**6])
def test_stop_where_no_episode_ends(limit, call, awac, pendulum_file, monkeypatch, tmp_path):
    task = f"Endless{limit}-v0"
    place = "gymnasium.envs.classic_control.pendulum:PendulumEnv"
    monkeypatch.setitem(gymnasium.registry, task, gymnasium.envs.registration.EnvSpec(task, place))
    gymnasium.registry[task].max_episode_steps = limit
    monkeypatch.setattr(awac, "evaluate", lambda *arguments: {"score": 0.0, "return": 0.0})
    monkeypatch.setattr(awac, "PATIENCE", 0)  # which counts only where there is a limit
    settings = QUICK | {"env": task, "dataset": pendulum_file, "runs_dir": tmp_path, "checkpoint_frequency": 30}
    with copies_at([("online", 70)], awac.GuidedRun, tmp_path):
        assert signalled(call, awac, ("online", 73), signal.SIGTERM, **settings) == 128 + signal.SIGTERM
    folder = only_folder(tmp_path / task)
    assert checkpoint(folder)["progress"]["step"] == 40 + 73  # within a step
    assert len(checkpoint(folder)["buffer"]["rows"]) == 73
    assert checkpoint(tmp_path / "online70")["progress"]["step"] == (40 if limit else 100)  # each second time
    call("--resume", folder)
    assert checkpoint(folder)["progress"] | {"step": 200, "episode": 2} == checkpoint(folder)["progress"]
    assert len(rows(folder, "online")) == 8


def test_signals_are_given_back(awac, pendulum_file, tmp_path):
    """train() as a library's: in the main thread it takes the signals for its time, in others none."""
    values = QUICK | {"dataset": str(pendulum_file), "runs_dir": str(tmp_path), "online_iterations": 0}
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    awac.train(awac.GuidedRun(awac.TrainConfig(**values, name="main"), awac.AWAC))
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: awac.train(awac.GuidedRun(awac.TrainConfig(**values, name="thread"), awac.AWAC))).result()
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    main, thread = (tmp_path / "Pendulum-v1" / f"{name}-seed0" for name in ("main", "thread"))
    assert rows(main) == rows(thread)


def test_a_system_without_posix(pendulum_file, tmp_path):
    """As on Windows: no flock, no resource, no SIGUSR1."""
    program = "import runpy, signal, sys; sys.modules |= {'fcntl': None, 'resource': None}; del signal.SIGUSR1; "
    program += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    settings = QUICK | {"dataset": pendulum_file, "runs_dir": tmp_path, "online_iterations": 0}
    process = subprocess.run(command("-c", program, SCRIPT, **settings), capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    assert (process.stdout + process.stderr).count("cannot be locked") == 1
    assert json.loads((only_folder(tmp_path) / "summary.json").read_text())["peak_memory_mb"] is None


def test_memory_in_megabytes(awac, monkeypatch):
    used = SimpleNamespace(ru_maxrss=300 * 2**20)
    monkeypatch.setattr(awac, "resource", SimpleNamespace(getrusage=lambda who: used, RUSAGE_SELF=0))
    for platform, megabytes in (("darwin", 300), ("linux", 300 * 2**10)):
        monkeypatch.setattr(awac, "sys", SimpleNamespace(platform=platform))
        assert awac.peak_memory_mb() == megabytes


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_two_processes_at_once_are_one_run(resumed, snapshots, pendulum_file, finished, tmp_path):
    words = command(SCRIPT, **QUICK | {"dataset": pendulum_file, "runs_dir": tmp_path / "runs"})
    if resumed:
        words = command(SCRIPT, "--resume", shutil.copytree(snapshots / "offline130", tmp_path / "runs"))
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(words, **pipes) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], errors
    last = errors[processes[0].returncode == 0].splitlines()[-1]
    other = processes[processes[1].returncode == 0].pid
    assert last.startswith("error: ") and (f"in use by process {other}" in last or "holds a run already" in last)
    if resumed:
        assert_same_run(tmp_path / "runs", finished.folder)


@pytest.mark.parametrize("arm", [{}, {"samg": "false"}], ids=str)
def test_extending_a_finished_run(arm, call, pendulum_file, tmp_path):
    settings = QUICK | arm | {"dataset": pendulum_file, "runs_dir": tmp_path, "checkpoint_frequency": 10**6}
    call(**settings | {"online_iterations": 40})
    folder = only_folder(tmp_path)
    short = rows(folder)
    moved = shutil.move(pendulum_file, tmp_path / "moved.hdf5")  # and its data set may have another place
    call("--resume", folder, online_iterations=160, dataset=moved)
    shutil.move(moved, pendulum_file)
    assert rows(folder)[: len(short)] == short and len(rows(folder, "online")) == 8
    buffer, summary = checkpoint(folder)["buffer"], json.loads((folder / "summary.json").read_text())
    assert len(buffer["rows"]) == 160 == summary["online_iterations"] and summary["dataset"] == str(moved)
    rewards = buffer["rows"][:, 4]
    assert len(rewards.unique()) > 150  # no row was written over another
    assert f"dataset: {moved}" in (folder / "config.yaml").read_text()


def test_a_late_evaluation_is_preceded_by_one(awac, monkeypatch):
    """switch_drop needs a score from the first 10,000 online steps; the other figures are as without it."""
    monkeypatch.setattr(awac, "evaluate", lambda *arguments: {"score": 1.0, "return": 1.0})
    bar = SimpleNamespace(update=lambda: None, set_postfix=lambda **fields: None, total=40_000)
    for frequency, steps in ((20_000, [10_000, 20_000, 40_000]), (8_000, [8_000 * i for i in range(1, 6)])):
        run = awac.GuidedRun(awac.TrainConfig(env="Pendulum-v1", eval_frequency=frequency, samg=False), awac.AWAC)
        run.buffer, run.clock, run.clock_step = run.new_buffer(10), 0.0, 0
        run.metrics, run.metrics_file = SimpleNamespace(writerow=lambda row: None), SimpleNamespace(flush=lambda: None)
        run.buffer.add(np.zeros(3), np.zeros(1), 0.0, np.zeros(3), False, 0.0)
        for step in range(2_000, 40_001, 2_000):
            run.report("online", step, {}, bar)
        assert [row[1] for row in run.evaluations] == steps


def test_resuming_a_finished_run_does_no_harm(finished, call, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "again")
    call("--resume", folder)
    assert (folder / "metrics.csv").read_bytes() == (finished.folder / "metrics.csv").read_bytes()
    assert_same_run(folder, finished.folder)
    before, after = (json.loads((path / "summary.json").read_text()) for path in (finished.folder, folder))
    assert {name: after[name] for name in before if "score" in name or "train" in name} == {
        name: before[name] for name in before if "score" in name or "train" in name
    }


def test_run_stopped_before_its_first_checkpoint_starts_again(call, awac, finished, hopper_file, tmp_path):
    def stop(run, phase, step, *rest):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(awac.GuidedRun, "report", stop)
        call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path, **TINY)
    call("--resume", only_folder(tmp_path))
    assert_same_run(only_folder(tmp_path), finished.folder)


def test_a_threshold_that_the_fit_has_set_survives_a_resume(call, awac, hopper_file, tmp_path):
    settings = TINY | {"env": "Hopper-v4", "dataset": hopper_file, "p_share": 0.3}
    folder = check_resumes(call, [("coefficient", 130), ("online", 270)], awac.GuidedRun, tmp_path, **settings)
    threshold = checkpoint(folder)["coefficient"]["share_threshold"].item()
    assert 0 < threshold < 1 and threshold not in (0.3, 0.6)
    p = checkpoint(folder)["buffer"]["rows"][:, -2]
    assert p[p > 0].min() >= threshold and 0 < (p > 0).float().mean() < 1


# --- The online phase from an offline checkpoint
def test_online_phase_from_the_offline_checkpoint_is_the_same(finished, call, tmp_path):
    folder = start_online(call, finished.folder / "offline_checkpoint.pt", tmp_path, dataset="gone.hdf5")
    assert rows(folder) == rows(finished.folder, "online")  # and SAMG's needs no data set
    states = [checkpoint(path) for path in (folder, finished.folder)]
    for name in ("agent", "coefficient", "buffer", "random_cpu"):
        assert_equal(states[0][name], states[1][name], name)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, finished.folder)]
    for name in ("offline_score", "final_score", "switch_drop", "regret", "train_return"):
        assert summaries[0][name] == summaries[1][name]


def test_online_phase_from_an_offline_checkpoint_has_its_own_step_sizes(finished, call, tmp_path):
    source = finished.folder / "offline_checkpoint.pt"
    states = checkpoint(start_online(call, source, tmp_path, online_iterations=120, learning_rate=1e-5))
    for name in ("actor", "critic"):
        assert states[name]["param_groups"][0]["lr"] == 1e-5
        offline = checkpoint(finished.folder, "offline_checkpoint.pt")[name]["state"][0]["step"]
        assert states[name]["state"][0]["step"] == offline + 20  # with the moments from before the switch


@pytest.fixture(scope="module")
def arms(finished, hopper_file, call, tmp_path_factory):
    """One short online phase for each arm, all from one offline checkpoint."""
    settings = {coefficient: {"coefficient": coefficient} for coefficient in ("static", "even", "random", "none")}
    settings["corl"] = {"samg": "false", "keep_offline_data": "true", "dataset": hopper_file}
    settings["online only"] = {"samg": "false", "keep_offline_data": "false"}
    tmp, source = tmp_path_factory.mktemp("arms"), finished.folder / "offline_checkpoint.pt"
    return {arm: start_online(call, source, tmp / arm, **(SHORT | given)) for arm, given in settings.items()}


@pytest.mark.parametrize("arm", ["static", "even", "random", "none", "corl", "online only"])
def test_arms_run_from_one_offline_checkpoint(arm, arms):
    assert len(rows(arms[arm])) == len(rows(arms[arm], "online")) == 8
    assert json.loads((arms[arm] / "summary.json").read_text())["final_score"] is not None
    p_mean = numbers(arms[arm], "online", "p_mean")[-1]
    low, high = {"static": (0.01, 0.5), "even": (0.5, 0.5), "random": (0.4, 0.6)}.get(arm, (0, 0))
    assert low <= p_mean <= high
    assert not numbers(arms[arm], "online", "mastered_rows")
    n_rows, width = checkpoint(arms[arm])["buffer"]["rows"].shape
    assert (n_rows, width) == (160, 2 * 11 + 3 + 4)  # the online rows alone: offline ones are not stored twice
    if arm == "corl":
        assert numbers(arms[arm], "online", "critic_loss")[0]  # no warm-up


def test_no_guidance_is_plain_fine_tuning_on_online_data(arms):
    assert_plain_fine_tuning(arms["none"], arms["online only"])
    assert not any(numbers(arms["none"], "online", "r_in_mean"))


@pytest.fixture(scope="module")
def without_coefficient(call, hopper_file, tmp_path_factory):
    """The offline checkpoint of a run without a C-VAE."""
    tmp = tmp_path_factory.mktemp("plain")
    short = {"offline_iterations": 60, "online_iterations": 0, "samg": "false"}
    call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp, **(TINY | short))
    return only_folder(tmp) / "offline_checkpoint.pt"


def test_checkpoint_without_coefficient_gets_one_fitted_first(without_coefficient, call, hopper_file, tmp_path):
    folder = start_online(
        call, without_coefficient, tmp_path, offline_iterations=60, **(SHORT | {"dataset": hopper_file})
    )
    assert [row["phase"] for row in rows(folder)] == ["coefficient"] * 8 + ["online"] * 8
    assert numbers(folder, "online", "p_mean")[-1] > 0
    assert checkpoint(folder)["coefficient"]["count"] >= 1500


def test_run_from_a_checkpoint_stopped_at_once_resumes(without_coefficient, call, awac, hopper_file, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    settings = SHORT | {"dataset": hopper_file, "online_iterations": 20, "offline_iterations": 60}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(awac.GuidedRun, "report", stop)  # in the C-VAE's first step, before any checkpoint
        start_online(call, without_coefficient, tmp_path, **settings)
    call("--resume", only_folder(tmp_path))
    phases = {row["phase"] for row in rows(only_folder(tmp_path))}
    assert phases == {"coefficient", "online"}  # not the offline phase again


@pytest.mark.parametrize("overlap", [False, True])
def test_with_overlap_an_update_draws_before_its_step_enters(overlap, awac, call, finished, monkeypatch, tmp_path):
    sample, sizes = awac.ReplayBuffer.sample, []

    def sample_and_count(buffer, n):
        sizes.append(buffer.size)
        return sample(buffer, n)

    monkeypatch.setattr(awac.ReplayBuffer, "sample", sample_and_count)
    settings = SHORT | {"online_iterations": 40, "warmup_steps": 0, "overlap": overlap}
    start_online(call, finished.folder / "offline_checkpoint.pt", tmp_path, **settings)
    assert sizes == list(range(1, 40 if overlap else 41))


def test_a_run_with_overlap_resumes(awac, call, finished, tmp_path):
    source = finished.folder / "offline_checkpoint.pt"
    check_resumes(
        call, {("online", 60)}, awac.GuidedRun, tmp_path, offline_checkpoint=source, overlap=True, **TINY | SHORT
    )


@pytest.mark.parametrize("kind", ["likelihood", "rnd", "embedding"])
def test_another_coefficient_is_fitted_first_and_then_shared(kind, finished, call, hopper_file, tmp_path):
    settings = SHORT | {"coefficient": kind, "fit_iterations": 100, "p_threshold": 0.05, "buffer_size": 160}
    source = finished.folder / "offline_checkpoint.pt"  # with a C-VAE
    first = start_online(call, source, tmp_path / "first", dataset=hopper_file, **settings)
    assert [row["phase"] for row in rows(first)] == ["coefficient"] * 5 + ["online"] * 8
    assert numbers(first, "coefficient", "fit_loss") and 0 < numbers(first, "online", "p_mean")[-1] < 1
    second = start_online(call, first / "offline_checkpoint.pt", tmp_path / "second", dataset="gone.hdf5", **settings)
    assert rows(second) == rows(first, "online")


def test_a_run_stopped_while_it_fits_another_coefficient_resumes(awac, call, hopper_file, tmp_path):
    settings = TINY | {"coefficient": "likelihood", "fit_iterations": 150, "offline_iterations": 20, **SHORT}
    moments = {("coefficient", 130)}
    folder = check_resumes(call, moments, awac.GuidedRun, tmp_path, env="Hopper-v4", dataset=hopper_file, **settings)
    assert folder.name == "awac-samg-likelihood-seed0"


def test_what_is_not_given_comes_from_the_offline_checkpoint(finished, awac, call, hopper_file, tmp_path):
    source, short = finished.folder / "offline_checkpoint.pt", {"online_iterations": 0, "n_test_episodes": 1}
    call(offline_checkpoint=source, dataset=hopper_file, runs_dir=tmp_path, coefficient="none", tau=0.1, **short)
    config = checkpoint(only_folder(tmp_path))["config"]
    assert (config["env"], config["hidden_dim"], config["offline_iterations"]) == ("Hopper-v4", 32, 200)
    assert (config["batch_size"], config["tau"], config["log_frequency"]) == (32, 0.1, 1000)
    saved = awac.parse_config(awac.TrainConfig, ["--config", str(only_folder(tmp_path) / "config.yaml")])
    assert awac.asdict(saved) == config


# --- Other tasks and places
def test_text_stays_as_it_is_written(awac, tmp_path):
    names = ("007", "off", "12:30", "1_000", "~", "null", "1e3")
    for name in names:
        (tmp_path / "file.yaml").write_text(f"name: {name}\ngroup: {name}\n")
        from_file = awac.parse_config(awac.TrainConfig, ["--config", str(tmp_path / "file.yaml")])
        from_line = awac.parse_config(awac.TrainConfig, ["--name", name, f"--group={name}"])
        assert from_file == from_line and (from_file.name, from_file.group) == (name, name)
    words = ["--reward_bias", "-1e-1", "--offline_iterations", "1e6", "--dataset", "~/x", "--runs_dir", "~/y"]
    config = awac.parse_config(awac.TrainConfig, words)
    assert (config.reward_bias, config.offline_iterations) == (-0.1, 1_000_000)
    assert (config.dataset, config.runs_dir) == (os.path.expanduser("~/x"), os.path.expanduser("~/y"))


def test_wandb_id_belongs_to_the_run(awac, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: settings["id"]))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = awac.start_wandb(awac.TrainConfig(), tmp_path / "a", "awac_samg")
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "a").mkdir()
    again, other = (awac.start_wandb(awac.TrainConfig(), tmp_path / name, "awac_samg") for name in ("moved", "a"))
    assert first == again != other


def test_any_gymnasium_task(call, capsys, tmp_path):
    data = write_dataset(tmp_path / "pendulum.hdf5", roll_out("Pendulum-v1", 600))
    short = {"offline_iterations": 20, "vae_iterations": 20, "online_iterations": 80, "device": "auto"}
    call(env="Pendulum-v1", dataset=data, runs_dir=tmp_path, **(TINY | SHORT | short))
    folder = only_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["regret"] is None and summary["final_score"] < -100
    assert summary["device"] in ("cpu", "cuda:0")  # the one that auto took
    assert all(row["score"] == row["return"] for row in rows(folder))
    assert re.search(r"regret +nan", capsys.readouterr().out)


def test_file_works_copied_alone_and_with_its_bars_switched_off(hopper_file, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    short = {"offline_iterations": 20, "vae_iterations": 20, "online_iterations": 40}
    words = command("-I", SCRIPT.name, env="Hopper-v4", dataset=hopper_file, **(TINY | SHORT | short))
    environment = os.environ | {"TQDM_DISABLE": "1"}
    process = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "it/s" not in process.stderr
    assert (tmp_path / "runs" / "Hopper-v4" / "awac-samg-seed0" / "summary.json").is_file()


def declared_pins():
    """The PEP 723 block's dependencies, such as "torch==2.13.0"."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)[1]
    return tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))["dependencies"]


def test_file_imports_only_what_it_declares():
    declared = {{"pyyaml": "yaml"}.get(name := re.match(r"[\w-]+", pin)[0], name) for pin in declared_pins()}
    optional = {"gym", "d4rl", "d4rl_envs", "minari"}
    tree = ast.parse(SCRIPT.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        assert not getattr(node, "level", 0), "a relative import"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in (name.split(".")[0] for name in names):
            allowed = declared | set(sys.stdlib_module_names) | (set() if node in tree.body else optional)
            assert name in allowed, name


def test_pins_equal_the_requirements():
    requirements = ROOT / "requirements.txt"
    if not requirements.exists():
        pytest.skip("no requirements.txt yet")
    lines = (line.split("#")[0].strip() for line in requirements.read_text().splitlines())
    assert set(declared_pins()) <= {line for line in lines if line}


@pytest.mark.parametrize("algorithm", ["awac", "iql", "cql", "calql"])
def test_wandb_offline(algorithm, hopper_file, tmp_path):
    short = {"offline_iterations": 20, "vae_iterations": 20, "online_iterations": 40, "wandb": "true"}
    script = SCRIPT.with_name(f"{algorithm}_samg.py")
    words = command(script, env="Hopper-v4", dataset=hopper_file, **(TINY | SHORT | short))
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    process = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    (record,) = tmp_path.glob(f"runs/Hopper-v4/{algorithm}-samg-seed0/wandb/offline-run-*/*.wandb")
    content = record.read_bytes()  # protocol buffers, with the names as plain text
    names = (f"{algorithm}_samg-Hopper-v4", f"{algorithm}-samg-Hopper-v4-seed0", "online/score", "final_score")
    assert not [name for name in names if name.encode() not in content]


# --- On a GPU
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_cuda = lambda test: cuda[0](cuda[1](test))  # noqa: E731


@on_cuda
def test_update_on_the_gpu_equals_that_on_the_cpu(awac, monkeypatch):
    monkeypatch.setattr(torch.distributions.Normal, "sample", lambda policy: policy.mean)  # no noise
    bound = np.ones(3, np.float32)
    env = SimpleNamespace(obs_dim=11, act_dim=3, action_low=-bound, action_high=bound)
    torch.manual_seed(0)
    on_cpu = awac.AWAC(awac.TrainConfig(hidden_dim=32), env, "cpu")
    on_gpu = awac.AWAC(awac.TrainConfig(hidden_dim=32), env, "cuda")
    on_gpu.load_state_dict(on_cpu.state_dict())
    for agent in (on_cpu, on_gpu):  # Adam's first step takes the sign of a gradient, however small: here, descent
        for optimizer in agent.optimizers.values():
            optimizer.param_groups[0] |= {"lr": 10.0, "eps": 1e3}
    batch = awac.Batch(*(torch.rand(shape) for shape in ((64, 11), (64, 3), (64,), (64, 11), (64,), (64,), (64,))))
    there = awac.Batch(*(column.cuda() for column in batch))
    results = on_cpu.update(batch, guided=True), on_gpu.update(there, guided=True)
    for name, value in results[0].items():
        assert results[1][name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, rtol=1e-4, atol=1e-6, msg=name)


@on_cuda
def test_resume_on_the_gpu(awac, call, hopper_file, tmp_path):
    with copies_at([("online", 120)], awac.GuidedRun, tmp_path):
        settings = TINY | SHORT | {"device": "auto"}
        call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path / "runs", **settings)
    call("--resume", tmp_path / "online120")
    assert_same_run(tmp_path / "online120", only_folder(tmp_path / "runs"))
    assert checkpoint(tmp_path / "online120")["random_cuda"] is not None


@on_cuda
def test_auto_takes_the_gpu(awac):
    assert awac.choose_device("auto").startswith("cuda")
