"""Whatever goes wrong ends in one line that begins with "error: " and names the fault, and a non-zero exit status."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import warnings

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, options, write_dataset
from runs import copies_at

import d4rl_envs
from d4rl_envs import sources

SCRIPT = ROOT / "algorithms" / "awac_samg.py"
TINY = {
    "env": "Hopper-v4",
    "hidden_dim": 16,
    "vae_hidden_dim": 16,
    "batch_size": 16,
    "warmup_steps": 10,
    "offline_iterations": 40,
    "vae_iterations": 20,
    "online_iterations": 60,
    "eval_frequency": 20,
    "log_frequency": 20,
    "checkpoint_frequency": 15,
    "n_test_episodes": 1,
    "device": "cpu",
}


# --- Helpers
def is_progress(line):
    """Whether a piece of stderr is (part of) a progress bar."""
    return re.search(r"\d+%\|| it/s|\?it/s", line) or not line.strip()


def assert_one_line(message, words):
    """The line that a user sees, naming each of `words`."""
    assert message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert str(word).lower() in message.lower(), f"{word!r} is not named in: {message}"


@pytest.fixture
def refused(call, awac, capsys, monkeypatch, tmp_path):
    """refused(words_to_name, *command_line, **settings): run it here, and check the one line it ends with."""
    for address in ("DATASET_HOST", "MIRROR"):  # a closed port: nothing is downloaded
        monkeypatch.setattr(sources, address, "http://127.0.0.1:9/offline_rl")

    def refused(names, *words, **settings):
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            for kind in (UserWarning, RuntimeWarning, FutureWarning):  # a warning is one more line on stderr
                warnings.simplefilter("error", kind)
            call(*words, **({"runs_dir": tmp_path / "runs"} if "--resume" not in words else {}) | settings)
        assert isinstance(stop.value.code, str), f"exit status {stop.value.code} without a message"
        assert_one_line(stop.value.code, names)
        pieces = re.split(r"[\r\n]", capsys.readouterr().err)
        assert not [piece for piece in pieces if not is_progress(piece)], "more than one line on stderr"

    return refused


def refused_in_a_process(names, words, tmp_path, **environment):
    """The same for a process of its own: exit status, one line, no traceback. Returns its stdout."""
    environment = {**{name: value for name, value in os.environ.items() if "WANDB" not in name}, **environment}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    lines = [piece for piece in re.split(r"[\r\n]", done.stderr) if not is_progress(piece)]
    assert done.returncode not in (0, -9) and len(lines) == 1, done.stderr
    assert_one_line(lines[0], names)
    return done.stdout


@pytest.fixture(scope="module")
def run(call, awac, hopper_file, tmp_path_factory):
    """Folders of a finished run, and of the same run stopped in the offline phase ("halted", step 25, saved at 15)."""
    tmp = tmp_path_factory.mktemp("run")
    with copies_at([("offline", 25)], awac.GuidedRun, tmp):
        call(dataset=hopper_file, runs_dir=tmp, **TINY)
    (tmp / "offline25").rename(tmp / "halted")
    (tmp / "Hopper-v4" / "awac-samg-seed0").rename(tmp / "finished")
    return tmp


# --- Configuration
BAD_CONFIGURATION = {
    "unknown field": ("--learning_rats 1", ["learning_rats", "did you mean learning_rate?"]),
    "no value": ("--samg", ["--samg"]),
    "stray word": ("hopper", ["hopper"]),
    "fraction for int": ("--offline_iterations 1.5", ["offline_iterations", "1.5"]),
    "word for int": ("--batch_size x", ["batch_size", "'x'", "int"]),
    "word for float": ("--gamma x", ["gamma", "'x'", "float"]),
    "bad boolean": ("--samg maybe", ["samg", "maybe", "true", "false"]),
    "home folder": ("--dataset ~/no/such.hdf5", [os.path.expanduser("~/no/such.hdf5")]),
    "negative number": ("--batch_size -1", ["batch_size", "at least 0", "-1"]),
    "zero": ("--log_frequency 0", ["log_frequency", "at least 1"]),
    "nan": ("--learning_rate nan", ["learning_rate", "finite", "nan"]),
    "inf": ("--awac_lambda inf", ["awac_lambda", "finite", "inf"]),
    "unknown coefficient": (
        "--coefficient vea",
        ["coefficient", "vea", "vae, static, likelihood, rnd"],
    ),
    "share above 1": ("--p_threshold 1.5", ["p_threshold", "at most 1", "1.5"]),
    "discount above 1": ("--gamma 1.01", ["gamma", "at most 1"]),
    "batch larger than buffer": ("--buffer_size 100", ["buffer_size 100", "batch_size", "256"]),
    "batch of one": ("--batch_size 1", ["batch_size", "2"]),
    "no C-VAE updates": ("--vae_iterations 0", ["vae_iterations", "at least 1"]),
    "fade without an end": ("--guidance_fade true", ["guidance_fade", "guidance_steps"]),
    "no such GPU": ("--device cuda:99", ["cuda:99", "--device auto"]),
    "no such device": ("--device banana", ["banana", "--device auto"]),
    "device without memory": ("--device meta", ["meta", "--device auto"]),
    "minus infinity": ("--learning_rate -inf", ["learning_rate", "-inf"]),
    "resume of nothing": ("--resume nowhere", ["nowhere"]),
    "score of nothing": ("--eval_only nowhere.pt", ["nowhere.pt", "no such file"]),
    "no offline checkpoint": ("--offline_checkpoint nowhere.pt", ["nowhere.pt", "no such file"]),
    "no configuration": ("--config nowhere.yaml", ["nowhere.yaml", "no such file"]),
}


@pytest.mark.parametrize("words, names", BAD_CONFIGURATION.values(), ids=BAD_CONFIGURATION)
def test_configuration(words, names, refused):
    refused(names, *words.split())


def test_hint_is_for_unknown_names_only(call):
    with pytest.raises(SystemExit) as stop:
        call(guidance_fade="true")
    assert "did you mean" not in stop.value.code


BAD_YAML = {
    "unknown key": ("learning_rats: 1\n", ["learning_rats", "did you mean learning_rate?"]),
    "malformed": ("env: [Hopper-v4\nseed: 1\n", ["bad.yaml", "line 2"]),
    "empty": ("", ["no 'field: value' lines", "YAML"]),
    "words": ("just words\n", ["no 'field: value' lines", "YAML"]),
    "list": ("- 1\n- 2\n", ["no 'field: value' lines", "YAML"]),
    "home folder": ("dataset: ~/no/such.hdf5\n", [os.path.expanduser("~/no/such.hdf5")]),
    "list for text": ("name: [a, b]\n", ["name", "plain value"]),
    "fraction for int": ("offline_iterations: 1.5\n", ["offline_iterations", "1.5"]),
    "null": ("learning_rate:\n", ["learning_rate", "float"]),
    "bad boolean": ("samg: 3\n", ["samg", "3", "true", "false"]),
    "negative": ("buffer_size: -5\n", ["buffer_size", "at least 0"]),
}


@pytest.mark.parametrize("text, names", BAD_YAML.values(), ids=BAD_YAML)
def test_yaml(text, names, refused, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    refused(names, "--config", tmp_path / "bad.yaml")


# --- Environments
BAD_ENVIRONMENTS = {
    "Nope-v0": ["Nope", "environment"],
    "CartPole-v1": ["CartPole-v1", "continuous actions", "Discrete(2)"],
    "FrozenLake-v1": ["FrozenLake-v1", "flat observations", "Discrete(16)"],
    "antmaze-umaze-v2": ["antmaze-umaze-v2", "need d4rl_envs", "pip install"],
    "pen-binary-v0": ["pen-binary-v0", "need d4rl_envs", "pip install"],
}


@pytest.mark.parametrize("env, names", BAD_ENVIRONMENTS.items(), ids=BAD_ENVIRONMENTS)
def test_environment(env, names, refused, awac, monkeypatch):
    monkeypatch.setattr(awac, "import_package", lambda: None)
    for name in d4rl_envs.TASKS:
        monkeypatch.delitem(gymnasium.registry, name)
    refused(names, env=env)


def test_observation_that_is_not_finite(run, refused, awac, monkeypatch, hopper_file):
    class Broken(awac.Environment):
        def __init__(self, name, **options):
            super().__init__(name, **options)
            step = self.env.step
            self.env.step = lambda action: (np.full(self.obs_dim, np.nan), *step(action)[1:])

    monkeypatch.setattr(awac, "Environment", Broken)
    source = run / "finished" / "offline_checkpoint.pt"
    refused(["Hopper-v4", "not finite"], offline_checkpoint=source, dataset=hopper_file, **TINY)


# --- Data sets
def edited(columns, **changes):
    """The columns with some replaced (functions of the old array) or removed (None)."""
    result = dict(columns)
    for name, change in changes.items():
        if change is None:
            del result[name]
        else:
            result[name] = change(result[name].copy())
    return result


def put(row, value):
    """A change that sets one row."""

    def change(array):
        array[row] = value
        return array

    return change


BAD_DATA = {
    "missing key": ({"terminals": None}, ["D4RL's layout", "no terminals, but actions, next_observations"]),
    "huge": ({"rewards": put(5, 1e20)}, ["rewards", "beyond 1e+15", "row 5"]),
    "missing keys": ({"rewards": None, "actions": None}, ["D4RL's layout", "actions, rewards"]),
    "unequal lengths": ({"actions": lambda a: a[:-5]}, ["actions", "(1495, 3)", "(1500, 3)"]),
    "observation width": ({"observations": lambda a: a[:, :-1]}, ["observations", "(1500, 10)", "(1500, 11)"]),
    "action width": ({"actions": lambda a: a[:, :2]}, ["actions", "(1500, 2)", "(1500, 3)"]),
    "flat actions": ({"actions": lambda a: a[:, 0]}, ["actions", "(1500,)", "(1500, 3)"]),
    "scalar rewards": ({"rewards": lambda a: a[0]}, ["rewards", "not an array of numbers"]),
    "nan in observations": ({"observations": put(123, np.nan)}, ["observations", "not finite", "row 123"]),
    "inf in rewards": ({"rewards": put(77, np.inf)}, ["rewards", "not finite", "row 77"]),
    "nan in successors": ({"next_observations": put(1499, np.nan)}, ["next_observations", "row 1499"]),
    "action out of range": ({"actions": put(9, 1.5)}, ["actions", "0.5", "action space", "Hopper-v4"]),
    "words for numbers": ({"rewards": lambda a: np.array([b"x"] * len(a))}, ["rewards", "number"]),
    "beyond float32": ({"observations": lambda a: a.astype(np.float64) * 1e300}, ["observations", "not finite"]),
}


@pytest.mark.parametrize("changes, names", BAD_DATA.values(), ids=BAD_DATA)
def test_dataset(changes, names, refused, hopper_columns, tmp_path):
    data = write_dataset(tmp_path / "bad.hdf5", edited(hopper_columns, **changes))
    refused([data, *names], dataset=data, **TINY)


def test_empty_dataset(refused, hopper_columns, tmp_path):
    data = write_dataset(tmp_path / "bad.hdf5", {name: array[:0] for name, array in hopper_columns.items()})
    refused([data, "empty"], dataset=data, **TINY)


def test_dataset_without_a_usable_row(refused, hopper_columns, tmp_path):
    columns = edited(hopper_columns, next_observations=None, timeouts=np.ones_like, terminals=np.zeros_like)
    data = write_dataset(tmp_path / "bad.hdf5", columns)
    refused([data, "no transition", "next observation"], dataset=data, **TINY)


def test_dataset_with_a_group_in_place_of_an_array(refused, hopper_columns, tmp_path):
    data = write_dataset(tmp_path / "bad.hdf5", edited(hopper_columns, rewards=None))
    with h5py.File(data, "a") as file:
        file.create_group("rewards")
    refused([data, "rewards"], dataset=data, **TINY)


def test_missing_dataset(refused):
    refused(["no data set at nowhere.hdf5", "--dataset", "collect.py"], dataset="nowhere.hdf5", **TINY)


def test_dataset_of_another_kind(refused, tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    refused(["table.csv", "HDF5"], dataset=tmp_path / "table.csv", **TINY)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_dataset(share, refused, hopper_file, tmp_path):
    content = hopper_file.read_bytes()
    (tmp_path / "cut.hdf5").write_bytes(content[: int(share * len(content))])
    refused(["cut.hdf5", "cut off"], dataset=tmp_path / "cut.hdf5", **TINY)


def test_task_without_a_data_file(refused):
    refused(["no single data file", "Hopper-v4", "--dataset"], **TINY)


def test_reward_range_of_another_task(refused, tmp_path, hopper_columns):
    columns = edited(hopper_columns, terminals=np.zeros_like, timeouts=np.zeros_like)  # no complete episode
    data = write_dataset(tmp_path / "endless.hdf5", columns)
    refused(["normalize_reward", "complete episodes"], dataset=data, normalize_reward="true", **TINY)


def test_too_few_rows_for_the_coefficient_are_found_before_the_offline_phase(refused, hopper_columns, tmp_path):
    data = write_dataset(tmp_path / "few.hdf5", {name: array[:99] for name, array in hopper_columns.items()})
    for settings in ({"coefficient": "likelihood"}, {"p_share": 0.5}):
        refused(["at least 100 transitions", "99"], dataset=data, **TINY | settings)
    assert not (tmp_path / "runs").exists()


def test_failed_download(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "datasets"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    address = "http://127.0.0.1:9/offline_rl/gym_mujoco_v2/hopper_medium-v2.hdf5"
    refused([address, "refused", tmp_path / "datasets", "--dataset", "collect.py"], env="hopper-medium-v2")
    assert not list((tmp_path / "datasets").iterdir())


# --- Runs and checkpoints
def test_run_exists_already(run, refused, hopper_file, tmp_path):
    shutil.copytree(run / "finished", tmp_path / "runs" / "Hopper-v4" / "awac-samg-seed0")
    before = (run / "finished" / "metrics.csv").read_bytes()
    refused(["holds a run already", "--resume", "--name"], dataset=hopper_file, **TINY)
    assert (tmp_path / "runs" / "Hopper-v4" / "awac-samg-seed0" / "metrics.csv").read_bytes() == before


def test_resume_of_a_folder_without_a_run(refused, tmp_path):
    refused([tmp_path, "config.yaml"], "--resume", tmp_path)


def test_resume_with_a_changed_setting(run, refused):
    refused(["seed", "cannot change"], "--resume", run / "halted", seed=3)
    refused(["batch_size, tau", "cannot change"], "--resume", run / "halted", batch_size=8, tau=0.1)


def test_resume_on_another_dataset(run, refused, hopper_columns, hopper_file, tmp_path):
    folder = shutil.copytree(run / "halted", tmp_path / "halted")
    config = (folder / "config.yaml").read_text()
    other = write_dataset(tmp_path / "other.hdf5", edited(hopper_columns, rewards=put(0, 5.0)))
    (folder / "config.yaml").write_text(config.replace(str(hopper_file), str(other)))
    refused([other, "not the data set"], "--resume", folder)
    (folder / "config.yaml").write_text(config.replace(str(hopper_file), "gone.hdf5"))
    refused(["no data set at gone.hdf5"], "--resume", folder)


def test_offline_checkpoint_and_dataset_disagree(run, refused, hopper_columns, tmp_path):
    other = write_dataset(tmp_path / "other.hdf5", edited(hopper_columns, rewards=put(0, 5.0)))
    corl, source = {"samg": "false", "dataset": other}, run / "finished" / "offline_checkpoint.pt"
    refused([other, "not the data set"], offline_checkpoint=source, **(TINY | corl))


def test_resume_with_an_edited_configuration(run, refused, tmp_path):
    folder = shutil.copytree(run / "halted", tmp_path / "halted")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("gamma: 0.99", "gamma: 0.9"))
    refused(["gamma", "0.99", "cannot change"], "--resume", folder)


def test_resume_of_less_than_was_done(run, refused):
    refused(["online_iterations", "59", "60"], "--resume", run / "finished", online_iterations=59)


LOGS = {
    "shortened": lambda content: content[:-9],
    "emptied": lambda content: b"",
    "deleted": None,
    "edited": lambda content: content.replace(b"offline", b"0ffline"),
}


@pytest.mark.parametrize("damage", LOGS.values(), ids=LOGS)
def test_log_that_is_not_as_it_was(damage, run, refused, tmp_path):
    folder = shutil.copytree(run / "finished", tmp_path / "finished")
    path = folder / "metrics.csv"
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}
    refused([path, "copy", "--name"], "--resume", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"} == before


def test_folder_in_use(run, refused, tmp_path):
    folder = shutil.copytree(run / "halted", tmp_path / "halted")
    with open(folder / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 12345 on host\n")
        lock.flush()
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        refused([folder, "in use by process 12345"], "--resume", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def put_in(*keys):
    """A change of a checkpoint: the last of these at the place that the others lead to."""
    *place, name, value = keys

    def change(state):
        for key in place:
            state = state[key]
        state[name] = value

    return change


FORGED = {  # of the finished run's checkpoint: what is changed, what is named
    "older format": (lambda state: state.pop("format"), ["format 1"]),
    "other format": (put_in("format", 99), ["format 99"]),
    "no progress": (lambda state: state.pop("progress"), ["check sum"]),
    "another step": (put_in("progress", "step", 41), ["check sum"]),
    "another seed": (put_in("config", "seed", 1), ["check sum"]),
    "another row": (lambda state: state["buffer"]["rows"][7].zero_(), ["check sum"]),
    "another moment": (lambda state: state["actor"]["state"][0]["exp_avg"].zero_(), ["check sum"]),
    "a bit of the random state": (lambda state: state["random_cpu"][20].add_(1), ["check sum"]),
    "a check sum of its own": (put_in("check_sum", 1), ["check sum"]),
    "none": (lambda state: state.pop("check_sum"), ["check sum"]),
}


@pytest.mark.parametrize("change, names", FORGED.values(), ids=FORGED)
def test_forged_checkpoint(change, names, run, refused, tmp_path):
    folder = shutil.copytree(run / "finished", tmp_path / "finished")
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}
    refused([path, *names], "--resume", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"} == before


def test_flipped_bit_in_a_checkpoint(run, refused, tmp_path):
    folder = shutil.copytree(run / "finished", tmp_path / "finished")
    path = folder / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    values = torch.load(path, weights_only=True)["agent"]["actor.mean.0.weight"].numpy().tobytes()
    content[content.index(values) + 5] ^= 1
    path.write_bytes(content)
    refused([path, "damaged"], "--resume", folder)
    refused([path, "damaged"], eval_only=path)


DAMAGE = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not a checkpoint",
    "one byte": lambda content: content[:1],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint(damage, run, refused, tmp_path):
    folder = shutil.copytree(run / "halted", tmp_path / "halted")
    path = folder / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    refused([path, "cannot read"], "--resume", folder)
    refused([path, "cannot read"], offline_checkpoint=path, **TINY)
    refused([path, "cannot read"], eval_only=path)


class Unsafe:
    def __reduce__(self):
        return os.system, ("false",)


FOREIGN = {"tensor": torch.zeros(3), "dict": {"model": 1}, "other algorithm": {"algorithm": "iql"}, "code": Unsafe()}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_checkpoint(content, refused, tmp_path):
    torch.save(content, tmp_path / "foreign.pt")
    refused(["foreign.pt"], offline_checkpoint=tmp_path / "foreign.pt", **TINY)
    refused(["foreign.pt"], eval_only=tmp_path / "foreign.pt")


@pytest.mark.parametrize("change", [{"hidden_dim": 24}, {"env": "HalfCheetah-v4"}], ids=str)
def test_offline_checkpoint_of_other_networks(change, run, refused, hopper_file):
    source = run / "finished" / "offline_checkpoint.pt"
    refused([source, "does not fit"], offline_checkpoint=source, **(TINY | change), dataset=hopper_file)


def test_offline_checkpoint_of_another_offline_phase(run, refused):
    source, other = run / "finished" / "offline_checkpoint.pt", {"reward_scale": 10, "normalize": "false"}
    refused([source, "normalize True", "reward_scale 1.0"], offline_checkpoint=source, **(TINY | other))


def test_score_in_another_task(run, refused):
    source = run / "finished" / "checkpoint.pt"
    refused([source, "env", "Hopper-v4", "HalfCheetah-v4"], eval_only=source, env="HalfCheetah-v4", n_test_episodes=1)


def test_offline_checkpoint_from_another_phase(run, refused, hopper_file):
    for source in (run / "finished" / "checkpoint.pt", run / "halted" / "checkpoint.pt"):
        refused([source, "not from the switch"], offline_checkpoint=source, dataset=hopper_file, **TINY)


# --- During a run
@pytest.mark.parametrize("part", ["actor.log_std", "critic.heads.0.0.bias"])
def test_diverging_run_keeps_the_checkpoint_before(part, run, refused, awac, monkeypatch, tmp_path):
    learn, calls = awac.AWAC.learn, []

    def poisoned(agent, *arguments, **settings):
        metrics = learn(agent, *arguments, **settings)
        calls.append(1)
        if len(calls) == 12:  # in step 27: the next checkpoint is due in step 30, the next row of the log in step 40
            agent.get_parameter(part).data += torch.nan
        return metrics

    monkeypatch.setattr(awac.AWAC, "learn", poisoned)
    folder = shutil.copytree(run / "halted", tmp_path / "halted")
    before = (folder / "checkpoint.pt").read_bytes()
    refused(["diverged"], "--resume", folder)
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.part"))


def test_huge_learning_rate_stops_the_run(refused, hopper_file):
    settings = TINY | {"dataset": hopper_file, "offline_iterations": 400, "learning_rate": 1e10}
    refused(["diverged", "learning rate"], **settings)


def test_file_in_place_of_the_runs_folder(refused, hopper_file, tmp_path):
    (tmp_path / "runs").write_text("a file")
    refused([tmp_path / "runs"], dataset=hopper_file, **TINY)


def test_full_disk_keeps_the_checkpoint_before(run, tmp_path):
    """No file may grow past half a checkpoint's size: the one of step 15 stays, that of step 30 cannot be written."""
    folder = shutil.copytree(run / "halted", tmp_path / "halted")
    limit = (folder / "checkpoint.pt").stat().st_size // 2
    program = f"import resource, runpy, sys; sys.argv = ['awac_samg.py', '--resume', {str(folder)!r}]; "
    program += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    program += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    refused_in_a_process(["too large", "make room", "--resume"], ["-c", program], tmp_path)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["progress"]["step"] == 15
    assert not list(folder.glob("*.part"))


# --- In processes of their own
def test_missing_dataset_in_a_process(tmp_path):
    words = [SCRIPT, *options(TINY | {"dataset": "nowhere.hdf5"})]
    refused_in_a_process(["no data set at nowhere.hdf5"], words, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_unknown_field_in_a_process(tmp_path):
    refused_in_a_process(["learning_rats", "did you mean learning_rate?"], [SCRIPT, "--learning_rats", "1"], tmp_path)


def test_wandb_without_a_key(tmp_path, hopper_file):
    words = [SCRIPT, *options(TINY | {"dataset": hopper_file, "wandb": "true"})]
    places = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "http_proxy": "http://127.0.0.1:9"}
    places["https_proxy"] = places["http_proxy"]
    refused_in_a_process(["wandb login", "WANDB_MODE=offline", "--wandb"], words, tmp_path, **places)
    assert not list(tmp_path.rglob("config.yaml"))  # so that the corrected command is not told of a run that exists
