"""--evaluate_beside: the scores of evaluations in turn, from another process, whatever becomes of either."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import TINY, assert_same_run, command, copies_at, only_folder, rows, run_script

SCRIPT = ROOT / "algorithms" / "awac_samg.py"
SHORT = TINY | {"env": "Hopper-v4", "vae_iterations": 40, "online_iterations": 300, "eval_frequency": 100}
CLASSES = {"awac": "AWAC", "iql": "IQL", "cql": "CQL", "calql": "CalQL"}


@pytest.fixture(scope="module")
def in_turn(call, hopper_file, tmp_path_factory):
    """The folder of a run that evaluates between its updates."""
    call(dataset=hopper_file, runs_dir=tmp_path_factory.mktemp("turn"), **SHORT)
    return only_folder(Path(tmp_path_factory.getbasetemp()) / "turn0")


@pytest.fixture
def beside(call, hopper_file, tmp_path, monkeypatch):
    """beside(): such a run with evaluate_beside; its folder. The other process finds the module by its name."""
    monkeypatch.syspath_prepend(SCRIPT.parent)

    def run():
        call(dataset=hopper_file, runs_dir=tmp_path / "runs", evaluate_beside="true", **SHORT)
        return only_folder(tmp_path / "runs")

    return run


@pytest.mark.parametrize("name", CLASSES)
def test_an_answer_is_of_the_policy_that_was_asked_for(name, request, monkeypatch):
    module = request.getfixturevalue(name)
    config = module.TrainConfig(hidden_dim=8, n_test_episodes=2)
    env = module.Environment("Hopper-v4")
    agent = getattr(module, CLASSES[name])(config, env, "cpu")
    evaluator = module.Evaluator(agent, env, config)
    expected = module.evaluate(agent, env, 2, 0)
    evaluator.ask()
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.add_(1.0)
    assert evaluator.answer(wait=True) == expected != module.evaluate(agent, env, 2, 0)


@pytest.mark.slow
def test_a_run_with_it_equals_one_in_turn_and_resumes(awac, call, in_turn, beside, monkeypatch, tmp_path):
    def refuse(*_):
        raise AssertionError("evaluated in the run's own process")

    monkeypatch.setattr(awac, "evaluate", refuse)
    with copies_at({("offline", 150), ("online", 160)}, awac.GuidedRun, tmp_path):
        folder = beside()
    assert_same_run(folder, in_turn)
    for name in ("offline150", "online160"):
        call("--resume", tmp_path / name)
        assert_same_run(tmp_path / name, in_turn)


def test_rows_from_an_evaluation_on_wait_for_its_result(awac, in_turn, beside, monkeypatch):
    held, report = [], awac.Run.report

    def report_and_look(run, phase, step, *rest):
        report(run, phase, step, *rest)
        if phase == "offline":
            written = (run.folder / "metrics.csv").read_text().count("\n") - 1
            held.append(([row["step"] for _, row, *_ in run.held], written))

    monkeypatch.setattr(awac.Run, "report", report_and_look)
    monkeypatch.setattr(awac.Run, "save_if_due", lambda run, within_episode=False: None)  # which would wait
    assert rows(beside()) == rows(in_turn)
    assert all(not steps or (steps[0] % 100 == 0 and steps[0] == 20 * (written + 1)) for steps, written in held)
    assert any(len(steps) > 1 for steps, _ in held)  # the other process takes seconds to be ready


def test_without_its_process_a_run_goes_on_in_turn(awac, in_turn, beside, monkeypatch, capsys):
    report = awac.Run.report

    def report_and_kill(run, phase, step, *rest):
        if (phase, step) == ("online", 100):
            run.evaluator.process.kill()
        report(run, phase, step, *rest)

    monkeypatch.setattr(awac.Run, "report", report_and_kill)
    assert_same_run(beside(), in_turn)
    said = "the process of evaluate_beside is gone; evaluations go on between the updates"
    assert capsys.readouterr().out.count(said) == 1


def test_on_one_core_it_is_off(awac, in_turn, beside, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert_same_run(beside(), in_turn)
    assert "evaluate_beside needs a second core; evaluations stay between the updates" in capsys.readouterr().out


def children(pid):
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_with_a_killed_run_its_process_ends_and_nothing_is_lost(in_turn, hopper_file, tmp_path):
    settings = SHORT | {"dataset": hopper_file, "runs_dir": tmp_path, "evaluate_beside": "true"}
    process = subprocess.Popen(command(SCRIPT, **settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end, others = time.monotonic() + 120, []
    while time.monotonic() < end and process.poll() is None:
        log = next(tmp_path.rglob("metrics.csv"), None)
        if log and ",online," in log.read_text():
            others = children(process.pid)
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert others  # its tracker of resources and the one that evaluates
    while any(map(alive, others)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, others))
    folder = only_folder(tmp_path)
    assert len(rows(folder)) < len(rows(in_turn))
    run_script(SCRIPT, "--resume", folder)
    assert_same_run(folder, in_turn)
