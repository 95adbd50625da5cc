"""tools/maintenance/all_tasks.py: what it plans, the data it makes, and a cell that runs beside one that fails."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, load_module

from d4rl_envs import sources

TINY = {
    "hidden_dim": 8,
    "vae_hidden_dim": 8,
    "batch_size": 8,
    "offline_iterations": 5,
    "vae_iterations": 5,
    "online_iterations": 20,
    "warmup_steps": 5,
    "eval_frequency": 20,
    "log_frequency": 5,
}
FAILING = "error: cannot read {} as HDF5, it may be cut off or of another kind"


@pytest.fixture
def tool():
    return load_module("tools/maintenance/all_tasks.py")


@pytest.fixture
def run_tool(tool, awac, monkeypatch, capsys):
    """run_tool(words): exit message, stdout and stderr of the command line, in this process."""
    monkeypatch.setattr(tool, "load_algorithm", lambda path: awac)  # saves loading the file again
    monkeypatch.setattr(tool.signal, "signal", lambda *pair: None)

    def run_tool(*words):
        monkeypatch.setattr(sys, "argv", ["all_tasks.py", *map(str, words)])
        message = ""
        try:
            tool.main()
        except SystemExit as stop:
            message = str(stop)
        return message, *capsys.readouterr()

    return run_tool


# --- Planning
def test_the_plan_is_every_algorithm_on_every_task_by_its_own_configuration(tool):
    cells = tool.plan(tool.ALGORITHMS, tool.TASKS)
    assert len(cells) == 18 * len(tool.ALGORITHMS) == len({(cell.algorithm, cell.task) for cell in cells})
    assert tool.ALGORITHMS[:4] == ("awac", "iql", "cql", "calql") and {"td3_bc", "spot"} <= {*tool.ALGORITHMS}
    files = {tool.config_file(cell.algorithm, cell.task) for cell in cells}
    assert files == {path for path in ROOT.glob("configs/*/*.yaml") if "quickstart" not in path.name}
    for cell in cells:
        assert cell.env.rsplit("-", 1)[0] == cell.task.replace("_", "-") and cell.script.is_file()
    assert len({cell.env for cell in cells}) == 18


def test_the_plan_has_what_was_asked_for_in_the_tables_order(tool):
    cells = tool.plan(["calql", "awac"], ["door_binary", "hopper_medium"])
    assert [(cell.task, cell.algorithm) for cell in cells] == [
        *(("hopper_medium", "awac"), ("hopper_medium", "calql")),
        *(("door_binary", "awac"), ("door_binary", "calql")),
    ]


def test_updates_happen_online_and_the_networks_are_full_size(tool, awac):
    config = awac.TrainConfig(**tool.SETTINGS)
    assert config.warmup_steps < config.online_iterations and config.coefficient_frequency < config.online_iterations
    assert (config.hidden_dim, config.vae_hidden_dim, config.batch_size) == (256, 750, 256)


@pytest.mark.parametrize("algorithm", ["calql", "spot", "td3_bc"])
def test_a_cell_gets_the_settings_that_its_file_has(tool, tmp_path, monkeypatch, request, algorithm):
    commands = []
    monkeypatch.setattr(
        tool.subprocess,
        "run",
        lambda command, **options: commands.append(command) or SimpleNamespace(returncode=1, stderr=""),
    )
    (cell,) = tool.plan([algorithm], ["antmaze_umaze"])
    tool.run(cell, "data.hdf5", tmp_path, "cpu", 60)
    ((_, script, *words),) = commands
    module = request.getfixturevalue(algorithm)
    config = module.parse_config(module.TrainConfig, list(map(str, words)))
    assert script.is_file() and (config.env, config.offline_iterations) == ("antmaze-umaze-v2", 200)
    assert getattr(config, "vae_iterations", 50) == 50


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "hopper_medum"], "did you mean hopper_medium?"),
        (["--algorithms", "sac"], "there is no 'sac'; there are awac, iql, cql, calql, "),
        (["--data", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json"),
        (["--limit", "0"], "--limit must be positive"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(run_tool, words, named):
    message, out, err = run_tool(*words)
    assert message.startswith("error: ") and named in message and "\n" not in message and not out + err


# --- Data
@pytest.mark.parametrize("env", ["halfcheetah-medium-v2", "antmaze-umaze-v2", "pen-binary-v0"])
def test_random_data_is_whole_episodes_that_the_algorithms_take(tool, awac, tmp_path, env):
    pytest.importorskip("d4rl_envs")
    path = tool.collect(awac, env, 150, tmp_path / f"{env}.hdf5")
    columns, environment = dict(sources.read_hdf5(path)), awac.Environment(env)
    rows, returns = awac.load_dataset(sources.find(tmp_path, env), environment)
    limit = {"halfcheetah": 1000, "antmaze": 700, "pen": 100}[env.split("-")[0]]
    assert len(rows) == len(columns["rewards"]) == limit * len(returns) >= 150
    assert np.flatnonzero(columns["timeouts"]).tolist() == list(range(limit - 1, len(rows), limit))
    inside = columns["timeouts"][:-1] == 0
    assert np.array_equal(columns["next_observations"][:-1][inside], columns["observations"][1:][inside])
    assert np.ptp(columns["actions"], axis=0).min() > 0.8 * np.ptp([environment.action_low, environment.action_high])
    if environment.scoring == "success":
        assert set(columns["rewards"]) == {-1.0 if "binary" in env else 0.0} and not columns["terminals"].any()


# --- Cells
def test_a_cell_that_runs_and_one_that_fails(tool, awac, run_tool, tmp_path, monkeypatch):
    pytest.importorskip("d4rl_envs")
    monkeypatch.setattr(tool, "SETTINGS", tool.SETTINGS | TINY)
    data, folder = tmp_path / "data", tmp_path / "temporary"
    data.mkdir(), folder.mkdir()
    monkeypatch.setattr(tool.tempfile, "tempdir", str(folder))
    tool.collect(awac, "hopper-medium-v2", 100, data / "hopper-medium-v2.hdf5")
    broken = data / "hopper_medium_replay-v2.hdf5"
    broken.write_text("not HDF5")
    words = ["--data", data, "--device", "cpu", "--algorithms", "awac", "--json", tmp_path / "cells.json", "--tasks"]
    message, out, err = run_tool(*words, "hopper_medium", "hopper_medium_replay", "hopper_medium_expert")
    assert message == "error: 2 of 3 failed" and "Traceback" not in err
    head, rule, good, bad, missing, blank, total = out.splitlines()
    assert (head, rule) == ("| seconds | awac |", "| --- | ---: |")
    result = json.loads((tmp_path / "cells.json").read_text())
    first, second, _ = result["cells"]
    assert good == f"| hopper_medium | {first['seconds']:.0f} |" and first["seconds"] > first["cpu_seconds"] / 2 > 0
    assert bad.startswith("| hopper_medium_replay | failed: " + FAILING.format(broken)) and bad.endswith(" |")
    assert missing.startswith("| hopper_medium_expert | failed: error: no ") and str(data) in missing
    assert "hopper_medium_replay awac failed: " + FAILING.format(broken) in err
    assert second["seconds"] is None and second["failed"].startswith(FAILING.format(broken))
    assert not blank and total.startswith("1 of 3 ran to their end, in ")
    assert result["settings"]["data"] == str(data) and result["settings"]["device"] == "cpu"
    assert not list(folder.iterdir()), "a temporary folder is left"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("body", "limit", "failed"),
    [
        ("import sys; print('first\\nlast | word\\n', file=sys.stderr); sys.exit(3)", 60, "failed: last / word"),
        ("raise SystemExit(3)", 60, "failed: exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", 60, "failed: killed by SIGKILL"),
        ("import time; time.sleep(60)", 0.5, "failed: not at its end after 0.5 s"),
        ("", 60, "failed: it ended without a summary.json"),
    ],
)
def test_how_a_failure_is_shown(tool, tmp_path, monkeypatch, body, limit, failed):
    script = tmp_path / "algorithm.py"
    script.write_text(body)
    monkeypatch.setattr(tool.Cell, "script", script)
    (cell,) = tool.plan(["iql"], ["hopper_medium"])
    tool.run(cell, tmp_path / "data.hdf5", tmp_path, "cpu", limit)
    assert cell.show() == failed and cell.seconds is None


def test_a_simulator_that_fails_is_a_failed_cell(tool, run_tool, monkeypatch):
    pytest.importorskip("d4rl_envs")

    def collect(*arguments):
        raise ValueError("no such\nwall")

    monkeypatch.setattr(tool, "collect", collect)
    message, out, _ = run_tool("--tasks", "antmaze_umaze", "--algorithms", "awac", "iql")
    assert message == "error: 2 of 2 failed"
    assert "| antmaze_umaze | failed: ValueError: no such wall | failed: ValueError: no such wall |" in out


def test_stopping_prints_what_is_there(tool, run_tool, monkeypatch):
    pytest.importorskip("d4rl_envs")

    def run(cell, *rest):
        if cell.algorithm == "iql":
            raise KeyboardInterrupt
        cell.seconds = 7.4

    monkeypatch.setattr(tool, "find_data", lambda *arguments: "")
    monkeypatch.setattr(tool, "run", run)
    message, out, _ = run_tool("--tasks", "pen_binary", "--algorithms", "awac", "iql")
    assert message == "error: stopped" and "| pen_binary | 7 |  |" in out
