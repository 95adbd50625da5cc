"""tools/experiments/sweep.py: what a plan holds, what it shares and skips, and what survives kills."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, load_module, run_main
from runs import TINY, rows

ARMS = {
    "vae": {},
    "static": {"coefficient": "static"},
    "low": {"p_threshold": 0.2, "warmup_steps": 50},
    "even": {"coefficient": "even"},
    "vanilla": {"samg": False},
}


@pytest.fixture(scope="module")
def sweep():
    return load_module("tools/experiments/sweep.py")


@pytest.fixture
def make_plan(sweep, tmp_path):
    """make_plan(entry=...): the jobs of a sweep of AWAC on the shipped data, by folder name."""

    def make_plan(**entries):
        content = {"runs_dir": str(tmp_path / "runs"), "algorithms": ["awac"], "tasks": ["quickstart"], "seeds": [0]}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(content | entries))
        return {job.folder.name: job for job in sweep.plan(sweep.read_sweep(path))}

    return make_plan


@pytest.fixture
def run_tool(sweep, tmp_path, monkeypatch, capsys):
    """run_tool(sweep's entries, words): exit message and output of the command line, in this process."""

    def run_tool(content, *words):
        path = tmp_path / "sweep.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        monkeypatch.setattr(sys, "argv", ["sweep.py", str(path), *map(str, words)])
        try:
            sweep.main()
        except SystemExit as stop:
            return str(stop), capsys.readouterr().out
        return "", capsys.readouterr().out

    return run_tool


def kinds(jobs):
    counts = Counter(job.kind for job in jobs.values())
    return counts["offline"], counts["fit"], counts["online"]


def finish(job):
    """What a finished process leaves behind, as far as the tool looks at it."""
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "config.yaml").write_text(yaml.safe_dump(vars(job.config)))
    for name in ("summary.json", "offline_checkpoint.pt"):
        (job.folder / name).write_text("{}")


# --- What a plan holds
def test_arms_share_the_offline_phase_and_the_fit_of_their_coefficient(make_plan):
    jobs = make_plan(arms=ARMS, seeds=[0, 1])
    assert kinds(jobs) == (2, 2, 10)
    for seed in (0, 1):
        of = {arm: jobs[f"awac-{arm}-seed{seed}"].parent for arm in ARMS}
        assert of["vae"] is of["static"] is of["low"] and of["vae"].kind == "fit"
        assert of["even"] is of["vanilla"] is of["vae"].parent and of["even"].kind == "offline"
        assert {job.config.seed for job in of.values()} == {seed}
        assert of["even"].config.online_iterations == of["vae"].config.online_iterations == 0


def test_another_offline_value_has_another_phase_and_another_fit_value_only_another_fit(make_plan):
    arms = {"a": {}, "wide": {"hidden_dim": 128}, "kl": {"vae_kl_target": 0.1}, "long": {"online_iterations": 9}}
    jobs = make_plan(arms=arms)
    assert kinds(jobs) == (2, 3, 4)
    a, wide, kl, long = (jobs[f"awac-{arm}-seed0"].parent for arm in arms)
    assert a is long and a.parent is kl.parent and a is not kl
    assert wide.parent is not a.parent and wide.parent.config.hidden_dim == 128


def test_a_phase_keeps_its_folder_whatever_arms_there_are(make_plan):
    few, many = make_plan(arms={"even": ARMS["even"]}), make_plan(arms={"other": {"samg": False, "tau": 0.1}} | ARMS)
    (phase,) = (name for name, job in few.items() if job.kind == "offline")
    assert many["awac-even-seed0"].parent.folder.name == phase != many["awac-other-seed0"].parent.folder.name


def test_a_coefficient_of_its_own_kind_has_its_own_fit(make_plan, awac):
    own = next((kind for kind in awac.COEFFICIENTS if kind not in ("vae", "static", "even", "random", "none")), None)
    if not own:
        pytest.skip("there is no other coefficient yet")
    jobs = make_plan(arms={"vae": {}, "own": {"coefficient": own}})
    assert kinds(jobs) == (1, 2, 2)
    assert jobs["awac-own-seed0"].parent.steps == jobs["awac-own-seed0"].config.fit_iterations


def test_a_seed_is_planned_for_all_arms_before_the_next_one(make_plan):
    seeds = [job.config.seed for job in make_plan(arms=ARMS, seeds=[1, 0]).values()]
    assert seeds == sorted(seeds, reverse=True)


def test_an_algorithm_without_guidance_has_arms_of_its_own_and_one_offline_phase(make_plan, sweep):
    own = {
        "td3_bc": {"vanilla": {}, "slow": {"bc_decay_steps": 9}, "published": {"online_iterations": 0}},
        "spot": {"vanilla": {}},
    }
    jobs = make_plan(algorithms=["awac", "td3_bc", "spot"], arms={"samg": {}}, own_arms=own)
    assert kinds(jobs) == (3, 1, 5)
    parents = {jobs[f"td3_bc-{arm}-seed0"].parent for arm in own["td3_bc"]}
    assert len(parents) == 1 and parents.pop().steps == 15_000
    assert jobs["td3_bc-published-seed0"].steps == 0 and jobs["spot-vanilla-seed0"].algorithm.path.name == "spot.py"
    for job in jobs.values():
        assert vars(job.algorithm.parse(job.words)) == vars(job.config)


def test_a_field_that_one_algorithm_uses_online_only_and_another_offline_splits_only_the_others_phase(make_plan):
    arms = {"a": {}, "b": {"noise_clip": 0.3}}
    assert kinds(make_plan(algorithms=["td3_bc"], arms=arms))[0] == 2
    assert kinds(make_plan(algorithms=["iql"], arms=arms))[0] == 1


def test_arms_of_an_algorithm_can_be_chosen_and_their_faults_are_named(sweep, run_tool, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "missing_for", lambda *arguments, **options: {})
    content = {
        "algorithms": ["awac", "td3_bc"],
        "tasks": ["quickstart"],
        "seeds": [0],
        "runs_dir": str(tmp_path / "runs"),
    }
    content |= {"own_arms": {"td3_bc": {"published": {"online_iterations": 0}}}}
    message, out = run_tool(content, "--dry_run", "--arms", "published")
    assert not message and "1 offline phases, 1 online runs\n" in out
    for own_arms, named in (({"iql": {"a": {}}}, "own_arms must be"), ({"td3_bc": {"a b": {}}}, "an arm's name")):
        assert named in run_tool(content | {"own_arms": own_arms}, "--dry_run")[0]


@pytest.mark.parametrize("algorithm", ["awac", "iql", "cql", "calql"])
def test_the_words_of_every_job_give_its_configuration_to_the_algorithms_file(make_plan, algorithm):
    for job in make_plan(algorithms=[algorithm], tasks=["quickstart", "antmaze_umaze"], arms=ARMS).values():
        assert vars(job.algorithm.parse(job.words)) == vars(job.config)


@pytest.mark.parametrize(
    ("name", "counts"),
    {
        "paper": (630, 360, 1080),  # the seven of Table 1; TD3+BC has two arms, SPOT and EDIS one
        "smoke": (8, 8, 16),
        "ablation_coefficient": (5, 5, 25),
        "ablation_threshold": (30, 30, 150),
    }.items(),
)
def test_the_sweeps_that_ship(sweep, name, counts):
    jobs = sweep.plan(sweep.read_sweep(ROOT / "sweeps" / f"{name}.yaml"))
    assert kinds({job.folder: job for job in jobs}) == counts


@pytest.mark.parametrize("algorithm", ["awac", "calql"])
def test_a_run_of_a_sweep_is_the_run_that_its_configuration_gives_in_one_go(
    make_plan, request, hopper_file, tmp_path, algorithm
):
    module = request.getfixturevalue(algorithm)
    classes = {"awac": ("AWAC", "GuidedRun"), "calql": ("CalQL", "CalQLRun")}[algorithm]
    agent, run = (getattr(module, name) for name in classes)
    overrides = TINY | {"env": "Hopper-v4", "dataset": str(hopper_file), "p_share": 0.3, "online_iterations": 300}
    jobs = make_plan(algorithms=[algorithm], arms=["samg"], overrides=overrides)
    assert kinds(jobs) == (1, 1, 1)
    for job in jobs.values():
        run_main(agent, run, *job.words)
    online = job
    whole = [*(word for word in online.words if "offline_checkpoint" not in word), f"--runs_dir={tmp_path / 'whole'}"]
    run_main(agent, run, *whole)
    (there,) = (tmp_path / "whole").rglob("metrics.csv")
    assert rows(online.folder, "online") == rows(there.parent, "online")
    for job in (online.parent, online.parent.parent):
        (phase,) = {row["phase"] for row in rows(job.folder)}
        assert rows(job.folder) == rows(there.parent, phase)


# --- What is there already
def test_what_is_finished_and_what_nothing_needs_is_left_out(sweep, make_plan):
    jobs = make_plan(arms=["vae", "low"])
    offline, fit, vae, low = jobs.values()
    assert sweep.unfinished([*jobs.values()]) == [offline, fit, vae, low]
    finish(vae)
    assert sweep.unfinished([*jobs.values()]) == [offline, fit, low]
    finish(fit)
    assert sweep.unfinished([*jobs.values()]) == [low]  # it starts from the fit: the phase before may be gone
    finish(low)
    assert sweep.unfinished([*jobs.values()]) == []


def test_a_folder_with_other_values_stops_the_sweep_and_one_with_other_bookkeeping_does_not(run_tool, make_plan):
    content = {"algorithms": ["awac"], "tasks": ["quickstart"], "seeds": [0], "arms": ["vae"]}
    (job,) = (job for job in make_plan(arms=["vae"]).values() if job.kind == "online")
    content["runs_dir"] = job.config.runs_dir
    job.config.threads, job.config.runs_dir = 7, content["runs_dir"]
    finish(job)
    assert "0 of these 3 processes are left to run" in run_tool(content, "--dry_run")[1]
    job.config.p_threshold = 0.1
    finish(job)
    message, _ = run_tool(content, "--dry_run")
    assert "holds a run with other values (p_threshold 0.1 there, 0.6 in the sweep)" in message


# --- Dry run and bad input
SMALL = {"algorithms": ["awac", "iql"], "tasks": ["quickstart"], "seeds": [0, 1], "arms": ["vae", "vanilla"]}
SMALL["overrides"] = {"offline_iterations": 3600, "online_iterations": 7200, "vae_iterations": 1800}


def test_the_dry_run_counts_and_estimates(run_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = SMALL | {"runs_dir": str(tmp_path / "runs")}
    message, output = run_tool(content, "--dry_run")
    assert not message and "4 offline phases, 8 online runs, with 4 fits" in output and "no estimate" in output
    _, output = run_tool(content, "--dry_run", "--algorithms", "iql", "--arms", "vae", "--seeds", 1)
    assert "1 offline phases, 1 online runs, with 1 fits" in output
    bench = tmp_path / "bench.json"
    bench.write_text(
        json.dumps({"updates_per_second": {"awac_samg": {"offline": 1.0, "coefficient": 2.0}, "iql_samg": 0.5}})
    )
    _, output = run_tool(content, "--dry_run", "--bench", bench, "--num_cpus", 2)
    # awac, hours: 2 phases of 1, 2 fits of 1/4 and 4 runs of 2; iql at half the speed, its fit at a quarter of it
    assert "awac 10.5 h, iql 22 h" in output and "32.5 h one after another, 16.2 h with 2 at a time" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [0]}, "unknown entry 'sedes' (did you mean seeds?)"),
        ({"seeds": [0, "a"]}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, 0]}, "a seed stands twice"),
        ({"algorithms": []}, "algorithms must be a list of names"),
        ({"algorithms": ["sac"]}, "there is no algorithm 'sac'; there are awac, calql, cql, "),
        ({"tasks": ["quickstrat"]}, "(did you mean quickstart?)"),
        ({"arms": {"a b": {}}}, "an arm's name becomes part of a folder's"),
        ({"arms": {"a": {"seed": 1}}}, "seed is set by the sweep itself"),
        (
            {"arms": {"a": {"offline_iteration": 1}}},
            "a: there is no field 'offline_iteration' (did you mean offline_iterations?)",
        ),
        ({"overrides": {"samg": "perhaps"}}, "neither true nor false"),
        ({"overrides": {"dataset": "nowhere.hdf5"}}, "no data set at nowhere.hdf5"),
        ({"overrides": {"env": "Nothing-v0"}}, "cannot make the environment 'Nothing-v0'"),
        ({"overrides": {"hidden_dim": [1, 2]}}, "hidden_dim needs a plain value"),
        ({"resources": {"cpu": 1}}, "resources must look like"),
        ({"retries": -1}, "retries must be a whole number"),
        ({"tasks": ["quickstart", str(ROOT / "configs/awac/quickstart.yaml")]}, "two runs would have the folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(run_tool, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(ROOT)
    found, _ = run_tool(SMALL | {"algorithms": ["awac"], "runs_dir": str(tmp_path / "runs")} | change)
    assert found.startswith("error: ") and "\n" not in found and message in found
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", ["", "[1]", "a: [", "\x00"])
def test_a_file_that_holds_no_sweep(run_tool, content):
    message, _ = run_tool(content)
    assert message.startswith("error: ") and "\n" not in message


@pytest.mark.parametrize(
    "text", ["", "{}", '{"updates_per_second": {"awac": 0}}', '{"updates_per_second": {"iql": 1}}']
)
def test_a_bench_file_that_does_not_serve(run_tool, tmp_path, monkeypatch, text):
    monkeypatch.chdir(ROOT)
    (tmp_path / "bench.json").write_text(text)
    content = SMALL | {"algorithms": ["awac"], "runs_dir": str(tmp_path / "runs")}
    message, _ = run_tool(content, "--dry_run", "--bench", tmp_path / "bench.json")
    assert message.startswith("error: no updates per second of every algorithm")


# --- With Ray
# An algorithm's file as the tool sees one, without anything to learn: runs end well, fail, kill themselves, or hang.
PRETENDER = """
import argparse, dataclasses, json, os, signal, time
from pathlib import Path

import yaml

COEFFICIENTS = {"vae": object, "none": object}
Environment = lambda name: None


@dataclasses.dataclass
class TrainConfig:
    env: str = "pretended"
    dataset: str = __file__  # there
    seed: int = 0
    runs_dir: str = "runs"
    name: str = ""
    resume: str = ""
    offline_checkpoint: str = ""
    offline_iterations: int = 1
    online_iterations: int = 1
    vae_iterations: int = 1
    batch_size: int = 1
    buffer_size: int = 1
    samg: bool = True
    coefficient: str = "none"
    guidance_steps: int = 0


def parse_config(config_class, words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    for entry in dataclasses.fields(config_class):
        parser.add_argument(f"--{entry.name}", type=entry.type)
    given = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    return config_class(**(yaml.safe_load(Path(given.pop("config", os.devnull)).read_text()) or {}) | given)


if __name__ == "__main__":
    config = parse_config(TrainConfig)
    folder = Path(config.resume or f"{config.runs_dir}/{config.env}/{config.name}-seed{config.seed}")
    if not config.resume:
        assert not config.offline_checkpoint or Path(config.offline_checkpoint).is_file()
        (folder / "config.yaml").write_text(yaml.safe_dump(vars(config)))
    if "bad" in folder.name:
        raise SystemExit("error: nothing comes of it")
    if "flaky" in folder.name and not config.resume:
        os.kill(os.getpid(), signal.SIGKILL)
    if "slow" in folder.name and not config.resume:
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(600)
    (folder / "offline_checkpoint.pt").touch()
    (folder / "summary.json").write_text("{}")
"""


def lives(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills need Linux to reach a killed driver's processes")
def test_what_is_killed_goes_on_and_errors_are_kept(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "pretender.py").write_text(PRETENDER)
    (tmp_path / "task.yaml").write_text("vae_iterations: 2\n")
    arms = {"bad": {}, "flaky": {}, "slow": {}}
    content = {"algorithms": ["pretender.py"], "tasks": ["task.yaml"], "arms": arms, "seeds": [0], "retries": 1}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content | {"resources": {"cpus": 0.5}}))
    command = [sys.executable, ROOT / "tools/experiments/sweep.py", "sweep.yaml", "--num_cpus", "1"]
    folders = {arm: tmp_path / f"runs/sweep/pretended/pretender-{arm}-seed0" for arm in arms}

    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as driver:
        begun = folders["slow"] / "pid", folders["flaky"] / "summary.json"
        wait_for(lambda: all(file.exists() for file in begun) or driver.poll() is not None)
        pid = int((folders["slow"] / "pid").read_text())
        driver.kill()
    wait_for(lambda: not lives(pid), seconds=20)  # it dies with its driver
    assert (folders["flaky"] / "summary.json").exists() and not (folders["flaky"] / "error.txt").exists()
    assert (folders["flaky"] / "log.txt").read_text().count("--resume") == 1

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert again.returncode == 1 and again.stderr.splitlines()[-1].startswith("error: 1 of 4 failed")
    assert "done    pretended/pretender-slow-seed0" in again.stdout and "flaky" not in again.stdout
    assert (folders["slow"] / "log.txt").read_text().count("--- attempt 1 of 2") == 2
    last = (folders["bad"] / "error.txt").read_text().splitlines()[-1]
    assert last.startswith("attempt 2 of 2") and last.endswith("exit status 1: error: nothing comes of it")
    offline = next((tmp_path / "runs/sweep/offline/pretended").iterdir())
    assert (offline / "log.txt").read_text().count("--- attempt") == 1


def test_what_runs_that_share_a_gpu_are_given(sweep, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert sweep.gpu_environment({"cpus": 1, "gpus": 0}) == {"CUDA_VISIBLE_DEVICES": ""}
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    assert sweep.gpu_environment({"cpus": 2, "gpus": 1}) == threads
    shared = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert sweep.gpu_environment({"cpus": 2.5, "gpus": 0.2}) == threads | shared
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp/mps")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    given = {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps", "PYTORCH_ALLOC_CONF": "backend:native"}
    assert sweep.gpu_environment({"cpus": 0.5, "gpus": 0.2}) == {"TORCHINDUCTOR_COMPILE_THREADS": "1"} | given
