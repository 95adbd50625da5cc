"""d4rl_envs.sources: D4RL's files by name, downloads, Minari, OGBench, robomimic, and Cal-QL's binary Adroit files.

Runs of the algorithm files on such data are here, too.
"""

import contextlib
import http.server
import io
import json
import pickle
import sys
import threading
import warnings
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
from conftest import write_dataset
from runs import TINY, check_resumes, numbers, only_folder

pytest.importorskip("d4rl_envs.sources", reason="needs d4rl_envs 0.2: pip install ./d4rl_envs")
import d4rl_envs  # noqa: E402
from d4rl_envs import downloads, sources, spaces  # noqa: E402

OBS, ACT = 3, 1  # Pendulum's


@contextlib.contextmanager
def refused(*words, error=sources.SourceError):
    """What is called in this context must end in one line that names the words."""
    with pytest.raises(error) as stop:
        yield
    message = str(stop.value)
    assert message and "\n" not in message, message
    for word in words:
        assert str(word) in message, f"{word!r} is not named in: {message}"


def read(source, env=""):
    """All columns, which must come in their order."""
    columns = dict(sources.read(source, env))
    assert list(columns) == [name for name in sources.COLUMNS if name in columns]
    return columns


def stacked(columns):
    """Rows [s | a | r | s' | d | end], (n, width) float64."""
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    parts = [np.asarray(columns[name], float) for name in names]
    return np.concatenate([part if part.ndim == 2 else part[:, None] for part in parts], axis=1)


# --- Paths
@pytest.mark.parametrize(
    ("env", "names"),
    [
        ("hopper-medium-replay-v2", ["hopper_medium_replay-v2.hdf5", "hopper-medium-replay-v2.hdf5"]),
        ("antmaze-umaze-v2", ["Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"]),
        ("door-cloned-v1", ["door-cloned-v1.hdf5"]),
        ("Hopper-v4", ["Hopper-v4.hdf5"]),
        ("pen-binary-v0", ["pen-binary-v0.hdf5"]),
        ("ogbench:cube-single-play-singletask-task2-v0", ["cube-single-play-v0.npz"]),
    ],
)
def test_a_folder_holds_an_environments_file_by_its_name(tmp_path, env, names):
    (tmp_path / "walker2d_medium-v2.hdf5").touch()
    with refused(tmp_path, "--dataset", *(names if "binary" not in env else ["pen2_sparse.npy"])):
        sources.find(tmp_path, env)
    for name in reversed(names):  # with both, D4RL's own name
        (tmp_path / name).touch()
        assert sources.find(str(tmp_path), env) == tmp_path / name


def test_a_path_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "download", None)
    with refused("no data set at", tmp_path / "missing.hdf5", "--dataset", "collect.py"):
        sources.find(tmp_path / "missing.hdf5", "hopper-medium-v2")


def test_a_file_in_d4rls_layout_is_read_as_it_is(hopper_file, hopper_columns):
    columns = read(hopper_file, "Hopper-v4")
    assert columns.keys() == hopper_columns.keys()
    for name, column in columns.items():
        assert np.array_equal(column, hopper_columns[name]) and column.dtype == hopper_columns[name].dtype


def test_files_of_another_kind(tmp_path, hopper_file, hopper_columns):
    for share in (0.0, 0.01, 0.5, 0.99):
        (tmp_path / "cut.hdf5").write_bytes(hopper_file.read_bytes()[: int(share * hopper_file.stat().st_size)])
        with refused("cut.hdf5", "cut off"):
            read(tmp_path / "cut.hdf5")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with refused("table.csv", "HDF5"):
        read(tmp_path / "table.csv")
    with refused("D4RL's layout", "no actions, terminals, but next_observations, observations, rewards, timeouts"):
        lacks = {name: hopper_columns[name] for name in hopper_columns.keys() - {"actions", "terminals"}}
        read(write_dataset(tmp_path / "lacks.hdf5", lacks))
    for wrong in (np.array([b"x"] * 9), 3.0):
        with refused("rewards", "not an array of numbers"):
            read(write_dataset(tmp_path / "wrong.hdf5", hopper_columns | {"rewards": wrong}))


# --- D4RL's own files
B = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
ADDRESSES = {
    "hopper-medium-v2": B + "gym_mujoco_v2/hopper_medium-v2.hdf5",
    "hopper-medium-replay-v2": B + "gym_mujoco_v2/hopper_medium_replay-v2.hdf5",
    "hopper-medium-expert-v2": B + "gym_mujoco_v2/hopper_medium_expert-v2.hdf5",
    "halfcheetah-medium-v2": B + "gym_mujoco_v2/halfcheetah_medium-v2.hdf5",
    "halfcheetah-medium-replay-v2": B + "gym_mujoco_v2/halfcheetah_medium_replay-v2.hdf5",
    "halfcheetah-medium-expert-v2": B + "gym_mujoco_v2/halfcheetah_medium_expert-v2.hdf5",
    "walker2d-medium-v2": B + "gym_mujoco_v2/walker2d_medium-v2.hdf5",
    "walker2d-medium-replay-v2": B + "gym_mujoco_v2/walker2d_medium_replay-v2.hdf5",
    "walker2d-medium-expert-v2": B + "gym_mujoco_v2/walker2d_medium_expert-v2.hdf5",
    "antmaze-umaze-v2": B + "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
    "antmaze-umaze-diverse-v2": B
    + "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "antmaze-medium-play-v2": B
    + "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "antmaze-medium-diverse-v2": B
    + "ant_maze_v2/Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "antmaze-large-play-v2": B
    + "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "antmaze-large-diverse-v2": B
    + "ant_maze_v2/Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "walker2d-full-replay-v2": B + "gym_mujoco_v2/walker2d_full_replay-v2.hdf5",
    "pen-human-v1": B + "hand_dapg_v1/pen-human-v1.hdf5",
    "relocate-expert-v1": B + "hand_dapg_v1/relocate-expert-v1.hdf5",
}


@pytest.mark.parametrize("env", ADDRESSES)
def test_addresses_of_d4rls_files(env):
    first, second = sources.addresses(env)
    assert first == ADDRESSES[env]
    assert second == "https://huggingface.co/datasets/imone/D4RL/resolve/main/" + first.rpartition("/")[2]


@pytest.mark.parametrize("env", ["Hopper-v4", "antmaze-huge-play-v2", "hopper-medium-v0", "hopper-mine-v2", ""])
def test_without_a_d4rl_file_it_is_said_what_else_there_is(env):
    assert sources.addresses(env) == []
    with refused("no single data file", "--dataset"):
        sources.find("", env)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folder that D4RL_DATASET_DIR names, not there yet, and ~/.d4rl/datasets."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "shared" / "datasets"))
    return tmp_path / "shared" / "datasets", tmp_path / "home" / ".d4rl" / "datasets"


@pytest.fixture
def hosts(monkeypatch):
    """Two local hosts in the place of D4RL's and its mirror, the requests in `paths`, and how to set their answers.

    answer((kind, body), (kind, body)): one that sends it, sends a part ("cut off", "stalls"), is "silent" or "down".
    """
    made = SimpleNamespace(paths=[], over=threading.Event())

    def handler(number):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                kind, body = made.answers[number]
                made.paths.append((number, self.path))
                if kind == "silent":
                    made.over.wait(20)
                    return
                self.send_response(404 if kind == "missing" else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if kind == "sends" else body[: len(body) // 2])
                if kind == "stalls":
                    self.wfile.flush()
                    made.over.wait(20)

            def log_message(self, *args):
                pass

        return Handler

    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(number)) for number in range(2)]
    threads = [threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01}) for host in servers]
    for thread in threads:
        thread.start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloads, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(downloads, "STALL_SECONDS", 0.3)
    spaces.say.cache_clear()

    def answer(*answers):
        made.answers = answers
        ports = [9 if kind == "down" else host.server_port for (kind, _), host in zip(answers, servers)]  # 9: closed
        monkeypatch.setattr(sources, "DATASET_HOST", f"http://127.0.0.1:{ports[0]}/first")
        monkeypatch.setattr(sources, "MIRROR", f"http://127.0.0.1:{ports[1]}/second")

    made.answer = answer
    yield made
    made.over.set()
    for host, thread in zip(servers, threads):
        host.shutdown()
        thread.join()
        host.server_close()


NAME = "hopper_medium-v2.hdf5"


@pytest.fixture(scope="session")
def d4rl_file(hopper_file):
    """What a host sends: Hopper's rows of random actions."""
    return hopper_file.read_bytes()


def test_a_data_set_is_looked_for_in_d4rls_folders_before_it_is_downloaded(hosts, folders, tmp_path):
    given_path = tmp_path / "mine.hdf5"
    for path in (given_path, folders[1] / NAME):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert sources.find(given_path, "hopper-medium-v2") == given_path
    assert sources.find("", "hopper-medium-v2") == folders[1] / NAME
    folders[0].mkdir(parents=True)
    (folders[0] / NAME).write_bytes(b"")
    assert sources.find("", "hopper-medium-v2") == folders[0] / NAME
    assert hosts.paths == []


@pytest.mark.parametrize("named", [True, False])
def test_a_download_lands_in_the_first_folder_and_is_used_from_then_on(
    hosts, folders, d4rl_file, hopper_columns, monkeypatch, capsys, named
):
    if not named:
        monkeypatch.delenv("D4RL_DATASET_DIR")
    hosts.answer(("sends", d4rl_file), ("down", b""))
    target = folders[0 if named else 1]
    for _ in range(2):
        columns = read("", "hopper-medium-v2")
        assert np.array_equal(columns["rewards"], hopper_columns["rewards"])
    assert (target / NAME).read_bytes() == d4rl_file
    assert [path.name for path in target.iterdir()] == [NAME]
    assert hosts.paths == [(0, f"/first/gym_mujoco_v2/{NAME}")]
    assert NAME in (said := capsys.readouterr().err) and "100%" in said


def test_two_silent_addresses_take_less_than_ten_seconds():
    assert 2 * downloads.ANSWER_SECONDS < 10


FAILURES = ("down", "silent", "missing", "stalls", "cut off", "another file", "no file")


def failing(kind, d4rl_file, folder):
    """An answer that fails so."""
    if kind == "another file":
        walker = {"observations": np.zeros((9, 17)), "actions": np.zeros((9, 6)), "rewards": np.zeros(9)}
        path = write_dataset(folder / "walker.hdf5", walker | {"terminals": np.zeros(9, bool)})
        return "sends", path.read_bytes()
    return ("sends", b"<html>moved</html>") if kind == "no file" else (kind, d4rl_file)


@pytest.mark.parametrize("kind", FAILURES)
def test_the_second_address_is_tried_where_the_first_fails(hosts, folders, d4rl_file, tmp_path, capsys, kind):
    hosts.answer(failing(kind, d4rl_file, tmp_path), ("sends", d4rl_file))
    assert sources.find("", "hopper-medium-v2") == folders[0] / NAME
    assert (folders[0] / NAME).read_bytes() == d4rl_file and len(list(folders[0].iterdir())) == 1
    assert hosts.paths[-1] == (1, f"/second/{NAME}")
    said = capsys.readouterr().err
    assert f"{NAME} comes from {sources.MIRROR}/{NAME}, not {sources.DATASET_HOST}/gym_mujoco_v2/{NAME} (" in said


@pytest.mark.parametrize("kind", FAILURES)
def test_where_both_fail_nothing_is_left_and_one_line_names_both(hosts, folders, d4rl_file, tmp_path, capsys, kind):
    hosts.answer(*[failing(kind, d4rl_file, tmp_path)] * 2)
    first, second = f"{sources.DATASET_HOST}/gym_mujoco_v2/{NAME}", f"{sources.MIRROR}/{NAME}"
    with refused(first, second, folders[0], "--dataset", "tools/data/collect.py"):
        sources.find("", "hopper-medium-v2")
    assert list(folders[0].iterdir()) == []
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    assert all(line.startswith(NAME) and "%|" in line for line in lines)  # progress alone


def test_a_folder_that_cannot_be_made_is_named(hosts, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "file" / "datasets"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with refused("cannot keep hopper_medium-v2.hdf5 in", tmp_path / "file", "Not a directory"):
        sources.find("", "hopper-medium-v2")


def edit(**changes):
    return lambda columns: columns | {name: change(columns[name]) for name, change in changes.items()}


UNLIKELY = {
    "rewards are not finite": edit(rewards=lambda r: np.append(np.nan, r[1:])),
    "actions has shape (1400, 3), not (1500, 3)": edit(actions=lambda a: a[:1400]),
    "observations has shape (1500, 10), not (1500, 11)": edit(observations=lambda s: s[:, 1:]),
    "timeouts has shape (3,)": edit(timeouts=lambda t: t[:3]),
    "rewards has shape (0,)": lambda columns: {name: column[:0] for name, column in columns.items()},
    "its episodes score": edit(rewards=lambda r: r * 10_000),
    "it has no terminals": lambda columns: {name: columns[name] for name in columns.keys() - {"terminals"}},
}


@pytest.mark.parametrize("words", UNLIKELY)
def test_what_cannot_be_the_tasks_file_is_not_kept(tmp_path, hopper_columns, words):
    path = write_dataset(tmp_path / NAME, hopper_columns)
    sources.check_d4rl(path, NAME, "hopper-medium-v2")
    write_dataset(path, UNLIKELY[words](hopper_columns))
    with refused(words, error=ValueError):
        sources.check_d4rl(path, NAME, "hopper-medium-v2")


def test_a_file_of_known_sha256_is_that_file(tmp_path, hopper_columns, monkeypatch):
    path = write_dataset(tmp_path / NAME, hopper_columns)
    monkeypatch.setitem(sources.SHA256, NAME, "0" * 64)
    with refused("SHA-256", error=ValueError):
        sources.check_d4rl(path, NAME, "hopper-medium-v2")


def test_antmazes_rewards_are_0_and_1(tmp_path):
    n, name = 6, "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"
    columns = {"observations": np.zeros((n, 29)), "actions": np.zeros((n, 8)), "terminals": np.zeros(n, bool)}
    for rewards, allowed in (([0, 0, 1, 1, 1, 0], True), ([0, 0, 2, 0, 0, 0], False)):
        path = write_dataset(tmp_path / name, columns | {"rewards": np.array(rewards, np.float32)})
        with contextlib.nullcontext() if allowed else refused("not 0 and 1", error=ValueError):
            sources.check_d4rl(path, name, "antmaze-umaze-v2")


# --- Minari
def collect(env, n_episodes, length, seed=0):
    """Random episodes as (states, actions, rewards, terminals), the last two of which end by nothing of their own."""
    env.action_space.seed(seed)
    episodes = []
    for episode in range(n_episodes):
        states, actions, rewards, terminals = [env.reset(seed=seed + episode)[0]], [], [], []
        while len(rewards) < length and not any(terminals):
            actions.append(env.action_space.sample())
            state, reward, terminated, _, _ = env.step(actions[-1])
            states.append(state)
            rewards.append(reward)
            terminals.append(terminated)
        episodes.append((states, actions, rewards, terminals))
    return episodes


def rows_of_parts(states):
    """Dict observations as Minari stores them: an array for each key."""
    return {key: np.array([state[key] for state in states]) for key in states[0]}


@pytest.fixture(scope="session")
def minari_folder(tmp_path_factory):
    """Local data sets test/hopper-v0, test/pendulum-v0, test/maze-v0 and test/images-v0; what they were made of."""
    reason = 'minari, which reads such data sets, is not installed: pip install "minari[hf]"'
    minari = pytest.importorskip("minari", reason=reason)
    from minari.data_collector import EpisodeBuffer

    def store(name, env, episodes, **spaces):
        buffers = []
        for states, actions, rewards, terminals in episodes:
            flags = {"terminations": terminals, "truncations": [False] * len(rewards)}
            buffers.append(EpisodeBuffer(observations=states, actions=actions, rewards=rewards, infos={}, **flags))
        minari.create_dataset_from_buffers(f"test/{name}-v0", buffers, env=env, **spaces)

    folder, made = tmp_path_factory.mktemp("minari"), {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        warnings.simplefilter("ignore")  # of a data set without author and description
        for name, env_id, limit in (("hopper", "Hopper-v5", 37), ("pendulum", "Pendulum-v1", 11)):
            env = gymnasium.make(env_id, max_episode_steps=limit)
            made[name] = collect(env, 40 if name == "hopper" else 5, limit)
            store(name, env, made[name])
        env = gymnasium.make("gymnasium_robotics:PointMaze_UMaze-v3", max_episode_steps=7)
        made["maze"] = collect(env, 4, 7)
        store("maze", env, [(rows_of_parts(states), *rest) for states, *rest in made["maze"]])
        box, (states, *rest) = gymnasium.spaces.Box, made["pendulum"][0]
        kinds = {"observation_space": box(0, 255, (2, 2, 3), np.uint8), "action_space": box(-2, 2, (1,))}
        store("images", None, [(np.zeros((len(states), 2, 2, 3), np.uint8), *rest)], **kinds)
    return folder, made


@pytest.fixture
def minari_sets(minari_folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_folder[0]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a set that is not here is looked for nowhere
    return minari_folder[1]


SHORT = TINY | {"offline_iterations": 60, "vae_iterations": 20, "online_iterations": 80, "warmup_steps": 20}
SHORT |= {"coefficient_frequency": 40, "checkpoint_frequency": 20, "eval_frequency": 40}
HOPPER, PENDULUM, MAZE = "minari:test/hopper-v0", "minari:test/pendulum-v0", "minari:test/maze-v0"


def flat(state):
    """A state of the maze as an array, by the order that is promised."""
    return np.concatenate([state[key] for key in ("achieved_goal", "desired_goal", "observation")])


@pytest.mark.parametrize("name", [HOPPER, PENDULUM, MAZE])
def test_rows_of_a_minari_data_set_equal_a_slow_loops(minari_sets, name):
    expected = []
    for states, actions, rewards, terminals in minari_sets[name[12:-3]]:
        states = [flat(state) for state in states] if name == MAZE else states
        for i, (action, reward, terminal) in enumerate(zip(actions, rewards, terminals)):
            end = i == len(rewards) - 1  # an episode that nothing ended is one all the same
            expected.append(np.concatenate((states[i], action, [reward], states[i + 1], [terminal, end])))
    columns = read(name, name)
    np.testing.assert_array_equal(stacked(columns), np.array(expected, np.float32))
    assert all(column.dtype == np.float32 for column in columns.values())
    assert np.array_equal(read("", name)["rewards"], columns["rewards"])
    if name == HOPPER:
        assert 0 < columns["terminals"].sum() < 40


def test_the_environment_of_a_minari_data_set_is_recovered(minari_sets):
    hopper, pendulum = d4rl_envs.make(HOPPER), d4rl_envs.make(PENDULUM)
    assert (hopper.spec.id, hopper.spec.max_episode_steps) == ("Hopper-v5", 37)
    assert d4rl_envs.scoring(HOPPER) == d4rl_envs.scoring("hopper-medium-v2")
    assert d4rl_envs.scoring(PENDULUM) is None and d4rl_envs.scoring(MAZE) == "success"
    pendulum.reset(seed=0)
    assert [pendulum.step(np.zeros(1))[3] for _ in range(11)] == [False] * 10 + [True]


def test_data_and_environment_of_a_goal_task_have_the_same_order_which_is_said_once(minari_sets, capsys):
    spaces.say.cache_clear()
    env = d4rl_envs.make(MAZE)
    columns = read(MAZE, MAZE)
    assert env.observation_space.shape == columns["observations"].shape[1:] == (8,)
    assert np.array_equal(env.reset(seed=0)[0].astype(np.float32), columns["observations"][0])  # the first was seed 0's
    observation, *_, info = env.step(columns["actions"][0])
    assert np.allclose(observation, columns["next_observations"][0]) and info["goal_achieved"] is False
    said = capsys.readouterr().err
    assert said.count("flattened") == 1 and "achieved_goal (2), desired_goal (2), observation (4)" in said


def test_minaris_antmaze_is_said_to_be_another_task(monkeypatch, capsys):
    minari = pytest.importorskip("minari")
    spaces.say.cache_clear()
    fake = SimpleNamespace(env_spec=SimpleNamespace(id="AntMaze_UMaze-v4"))
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: fake)
    assert d4rl_envs.scoring("minari:D4RL/antmaze/umaze-v1") == "success"
    sources.open_minari("minari:D4RL/antmaze/umaze-v1")
    assert capsys.readouterr().err.count("another robot and task than D4RL's AntMaze") == 1


def test_images_are_no_flat_observations(minari_sets):
    with refused("minari:test/images-v0", "no flat observations"):
        read("minari:test/images-v0")


@pytest.mark.parametrize("file", ["awac", "iql", "cql", "calql"])
def test_a_minari_data_set_brings_its_environment_unless_one_is_given(file, request):
    config_class = request.getfixturevalue(file).TrainConfig
    assert config_class(dataset=HOPPER).env == config_class(dataset=HOPPER, env="").env == HOPPER
    assert config_class(dataset=HOPPER, env="Hopper-v5").env == "Hopper-v5"
    assert config_class(dataset="my.hdf5").env == config_class().env == "hopper-medium-v2"
    assert config_class(dataset=HOPPER, env="hopper-medium-v2").env == "hopper-medium-v2"


def test_a_run_on_a_minari_data_set_resumes_and_is_scored_on_the_same_environment(
    call, awac, minari_sets, tmp_path, capsys
):
    moments = [("offline", 40), ("online", 60)]
    whole = check_resumes(call, moments, awac.GuidedRun, tmp_path, dataset=PENDULUM, **SHORT)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["env"] == PENDULUM and whole == only_folder(tmp_path / "runs")
    capsys.readouterr()
    call(eval_only=whole / "checkpoint.pt", n_test_episodes=2)
    result = json.loads(capsys.readouterr().out.split("episodes: ")[1])
    assert result["score"] == result["return"] == pytest.approx(numbers(whole, "online", "score")[-1])
    assert -16.3 * 11 < result["return"] < 0  # of 11 steps, the recorded limit, and not of Pendulum's 200


def test_a_given_environment_is_used_with_a_minari_data_set(call, minari_sets, tmp_path):
    call(env="Pendulum-v1", dataset=PENDULUM, runs_dir=tmp_path, **SHORT | {"online_iterations": 0})
    assert only_folder(tmp_path).parent == tmp_path / "Pendulum-v1"


@pytest.mark.parametrize("name", ["minari:test/nothing-v0", "minari:nothing", "minari:../../x"])
def test_no_such_minari_data_set(call, minari_sets, tmp_path, name):
    with refused(name):
        read(name, name)
    with refused(name, error=SystemExit):
        call(dataset=name, runs_dir=tmp_path, **SHORT)


def test_a_damaged_minari_data_set(minari_sets, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "test" / "pendulum-v0" / "data").mkdir(parents=True)
    with refused(PENDULUM):
        read(PENDULUM)


def test_a_minari_episode_of_another_length_is_named(monkeypatch):
    def episode(i, n):
        flags = {"actions": np.zeros((9, 1)), "rewards": np.zeros(9), "terminations": np.zeros(9)}
        return SimpleNamespace(id=i, observations=np.zeros((n, OBS)), **flags)

    episodes = [episode(0, 10), episode(7, 9)]
    fake = SimpleNamespace(observation_space=gymnasium.spaces.Box(-1, 1, (OBS,)), total_episodes=2)
    fake.iterate_episodes = lambda: iter(episodes)
    monkeypatch.setattr(sources, "open_minari", lambda name: fake)
    with refused("minari:fake", "episode 7 has 9 observations, 9 actions"):
        read("minari:fake")


def test_without_minari_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for opening in (read, d4rl_envs.make, d4rl_envs.scoring):
        with refused(HOPPER, 'pip install "minari[hf]"'):
            opening(HOPPER)


# --- OGBench
TASK = "ogbench:cube-single-play-singletask-task3-v0"


def ogbench_arrays(lengths=(5, 3, 1, 4), width=3, seed=0):
    """Arrays of a file: trajectories whose last row has terminals 1 and an action that leads nowhere."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    ends = np.isin(np.arange(n), np.cumsum(lengths) - 1)
    arrays = {"observations": rng.normal(size=(n, width)), "actions": rng.uniform(-1, 1, (n, 2)), "terminals": ends}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def ogbench_loop(arrays, rewards, masks):
    """Rows [s | a | r | s' | d | end], a row at a time."""
    n, rows = len(rewards), []
    for i in range(n - 1):
        if not arrays["terminals"][i]:
            end = bool(arrays["terminals"][i + 1]) or i == n - 2
            s, a, s_next = arrays["observations"][i], arrays["actions"][i], arrays["observations"][i + 1]
            rows.append([*s, *a, rewards[i], *s_next, masks[i] == 0, end])
    return np.array(rows)


@pytest.mark.parametrize("last", [1, 0])
def test_an_ogbench_file_with_rewards(tmp_path, last):
    arrays = ogbench_arrays()
    arrays["terminals"][-1] = last  # 0: the file breaks off
    masks = np.ones(13, np.float32)
    masks[[2, 6]] = 0
    rewards = np.arange(13, dtype=np.float32)
    np.savez(tmp_path / "file.npz", **arrays, rewards=rewards, masks=masks)
    columns = read(tmp_path / "file.npz", "Mine-v0")
    np.testing.assert_array_equal(stacked(columns), ogbench_loop(arrays, rewards, masks).astype(np.float32))
    assert len(columns["rewards"]) == 4 + 2 + 0 + 3 and columns["terminals"].sum() == 2
    kept = {"observations": "observations", "actions": "actions", "next_observations": "next_observations"}
    regular = {name: columns[name] for name in kept} | {"terminals": columns["timeouts"], "rewards": columns["rewards"]}
    np.savez(tmp_path / "regular.npz", **regular, masks=~columns["terminals"])
    np.testing.assert_array_equal(stacked(read(tmp_path / "regular.npz")), stacked(columns))


def test_an_ogbench_file_without_rewards_needs_its_task(tmp_path):
    np.savez(tmp_path / "file.npz", **ogbench_arrays())
    with refused("file.npz", "no rewards and masks", "ogbench:cube-single-play-singletask-v0"):
        read(tmp_path / "file.npz", "Mine-v0")
    for task in ("ogbench:cube-single-play-v0", "ogbench:singletask", "ogbench:"):
        with refused(task, "no single-task id"):
            read(task, task)


@pytest.mark.parametrize("content", [b"", b"no zip", "actions"])
def test_no_ogbench_file(tmp_path, content):
    path = tmp_path / "file.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, actions=np.zeros((3, 2)))
    with refused(path, "not as OGBench's"):
        read(path, TASK)


def test_without_ogbench_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    for opening in (read, d4rl_envs.make):
        with refused("pip install ogbench"):
            opening(TASK)


@pytest.fixture
def ogbench():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a machine without a screen
        return pytest.importorskip("ogbench", reason="OGBench is not installed: pip install ogbench")


SOLVED = {"cube": [3, 6], "antmaze": [0, 1, 9]}  # rows whose state reaches the goal


@pytest.fixture(params=[TASK, "ogbench:antmaze-medium-navigate-singletask-v0"])
def ogbench_task(ogbench, request, tmp_path, monkeypatch):
    """A task, and in OGBENCH_DATASET_DIR a file of it with states at the goal."""
    env, words = d4rl_envs.make(request.param), request.param.removeprefix("ogbench:").split("-")
    env.reset(seed=0)
    arrays, inner = ogbench_arrays(width=env.observation_space.shape[0]), env.unwrapped
    arrays["qpos"], solved = np.full((13, inner.model.nq if words[0] == "cube" else 15), 9.0), SOLVED[words[0]]
    if words[0] == "cube":
        arrays["qpos"][solved, 14:17] = inner.data.mocap_pos[0]
    else:
        arrays["qpos"][solved, :2] = inner.cur_goal_xy
    name = f"{'-'.join(words[: words.index('singletask')])}-v0"
    for end in ("", "-val"):
        np.savez(tmp_path / f"{name}{end}.npz", **arrays)
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    return request.param, tmp_path / f"{name}.npz", arrays


def test_ogbench_rows_are_those_of_the_package_and_of_a_slow_loop(ogbench, ogbench_task):
    task, path, arrays = ogbench_task
    _, theirs, _ = ogbench.make_env_and_datasets(task.removeprefix("ogbench:"), dataset_path=str(path))
    columns = read(task, task)
    for name in ("observations", "actions", "next_observations", "rewards"):
        np.testing.assert_array_equal(columns[name], theirs[name])
    np.testing.assert_array_equal(columns["terminals"], theirs["masks"] == 0)
    np.testing.assert_array_equal(columns["timeouts"], theirs["terminals"] == 1)
    solved = np.isin(np.arange(13), SOLVED[task[8:].split("-")[0]])
    expected = ogbench_loop(arrays, solved - 1.0, 1.0 - solved)
    np.testing.assert_array_equal(stacked(columns), expected.astype(np.float32))
    if "antmaze" in task:  # the others take seconds to make
        for source, env in ((path, task), (path.parent, task), ("", task), (task, "Mine-v0")):
            assert all(map(np.array_equal, read(source, env).values(), columns.values()))


def test_an_ogbench_environment_pays_by_the_same_rule(ogbench):
    env = d4rl_envs.make("ogbench:antmaze-medium-navigate-singletask-v0")
    assert d4rl_envs.scoring("ogbench:antmaze-medium-navigate-singletask-v0") == "success"
    env.reset(seed=0)
    inner = env.unwrapped
    first = env.step(np.zeros(8, np.float32))
    inner.set_xy(inner.cur_goal_xy)
    at_goal = env.step(np.zeros(8, np.float32))
    assert (first[1], first[2], first[4]["goal_achieved"]) == (-1.0, False, False)
    assert (at_goal[1], at_goal[2], at_goal[4]["goal_achieved"]) == (0.0, True, True)


@pytest.mark.parametrize("ogbench_task", ["ogbench:antmaze-medium-navigate-singletask-v0"], indirect=True)
def test_an_ogbench_file_is_downloaded_once_from_ogbenchs_server(ogbench, ogbench_task, hosts, tmp_path, monkeypatch):
    task, path, _ = ogbench_task
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "new"))
    hosts.answer(("sends", path.read_bytes()), ("down", b""))
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", sources.DATASET_HOST)
    for _ in range(2):
        read(task, task)
    assert hosts.paths == [(0, f"/first/{path.name}")] and [f.name for f in (tmp_path / "new").iterdir()] == [path.name]


# --- robomimic
KEYS = {"robot0_eef_pos": 3, "object": 2, "robot0_gripper_qpos": 1}


def write_robomimic(path, lengths=(4, 3, 2), done_mode=2, successors=True, images=False, **changes):
    """Demonstrations as robomimic's dataset_states_to_obs.py stores them; all but the last succeed, in the last step.

    Returns their rows [s | a | r | s' | d | end], where d is 1 only at a success.
    """
    rng, rows = np.random.default_rng(0), []
    with h5py.File(path, "w") as file:
        for number, n in enumerate(lengths):
            demo, success = file.create_group(f"data/demo_{number}"), np.zeros(n)
            success[-1] = number < len(lengths) - 1 or len(lengths) == 1
            end = np.arange(n) == n - 1
            states = {key: rng.normal(size=(n + 1, width)) for key, width in KEYS.items()}
            columns = {"actions": rng.uniform(-1, 1, (n, 2)), "rewards": success, "states": rng.normal(size=(n, 9))}
            columns["dones"] = ((success > 0) | (end & (done_mode > 0))).astype(int)
            for key, state in states.items():
                columns[f"obs/{key}"] = state[:-1, 0] if KEYS[key] == 1 else state[:-1]
                if successors:
                    columns[f"next_obs/{key}"] = state[1:]
            if images:
                columns["obs/agentview_image"] = np.zeros((n, 8, 8, 3), np.uint8)
            for key, column in columns.items():
                demo[key] = changes.get(key, np.asarray)(column)
            demo.attrs["num_samples"] = n
            state = np.concatenate([states[key] for key in ("object", "robot0_eef_pos", "robot0_gripper_qpos")], axis=1)
            parts = (state[:-1], columns["actions"], success[:, None], state[1:], success[:, None], end[:, None])
            rows.append(np.concatenate(parts, axis=1))
        file.create_group("mask")
        file["data"].attrs["total"] = sum(lengths)
    return rows


@pytest.mark.parametrize("done_mode", [0, 2])
def test_robomimic_rows_equal_the_demonstrations(tmp_path, capsys, done_mode):
    spaces.say.cache_clear()
    lengths = [4, 3, 2] * 4  # demo_10 comes after demo_9
    rows = write_robomimic(tmp_path / "low_dim.hdf5", lengths, done_mode, images=True)
    for _ in range(2):
        columns = read(tmp_path / "low_dim.hdf5", "Lift-v0")
        np.testing.assert_array_equal(stacked(columns), np.concatenate(rows))
    assert columns["terminals"].sum() == 11  # the failure's last done is none
    said = capsys.readouterr().err
    assert said.count("object (2), robot0_eef_pos (3), robot0_gripper_qpos (1)") == 1
    assert said.count("images: agentview_image") == 1 and ("true end in 11 of 12" in said) == (done_mode == 2)


def test_robomimic_without_successors_and_with_dense_rewards(tmp_path):
    dense = {"rewards": lambda r: r + 0.1, "successors": False}
    write_robomimic(tmp_path / "dense.hdf5", (3, 5, 5), **dense)
    columns = read(tmp_path / "dense.hdf5")
    assert "next_observations" not in columns
    assert np.flatnonzero(columns["terminals"]).tolist() == [2]  # the longest may have ended at a time limit
    assert np.flatnonzero(columns["timeouts"]).tolist() == [2, 7, 12]
    write_robomimic(tmp_path / "some.hdf5", (3, 5, 5), done_mode=0, **dense)
    assert np.flatnonzero(read(tmp_path / "some.hdf5")["terminals"]).tolist() == [2, 7]  # as the file says


def test_what_robomimic_needs(tmp_path):
    path = tmp_path / "demo.hdf5"
    write_robomimic(path, actions=lambda a: a[1:])
    with refused(path, "demo_0", "lengths [3, 4]"):
        read(path)
    for key in ("actions", "rewards", "dones"):
        write_robomimic(path)
        with h5py.File(path, "a") as file:
            del file[f"data/demo_1/{key}"]
        with refused(path, "demo_1", f"no {key}", "dataset_states_to_obs"):
            read(path)
    with h5py.File(path, "w") as file:
        file["data/demo_0/states"] = np.zeros((3, 9))
    with refused(path, "demo_0", "actions, rewards, dones"):
        read(path)
    with h5py.File(path, "w") as file:
        file.create_group("data")
    with refused(path, "no demonstrations"):
        read(path)
    write_robomimic(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_2/next_obs/object"]
    with refused(path, "demo_2", "no next_obs/object"):
        read(path)


# --- Command line
def convert(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["d4rl_envs.sources", *map(str, words)])
    sources.main()


def test_a_source_is_written_in_d4rls_layout(minari_sets, tmp_path, monkeypatch):
    convert(monkeypatch, HOPPER, tmp_path / "out.hdf5")
    before, after = read(HOPPER, HOPPER), read(tmp_path / "out.hdf5")
    assert list(before) == list(after) and all(map(np.array_equal, before.values(), after.values()))
    kinds = {name: column.dtype for name, column in after.items()}
    assert kinds == {name: bool if name in ("terminals", "timeouts") else np.float32 for name in after}


def test_a_source_is_written_whole_or_not_at_all(tmp_path, monkeypatch, hopper_columns):
    out = tmp_path / "out.hdf5"
    out.write_bytes(b"older")
    bad = write_dataset(tmp_path / "bad.hdf5", hopper_columns | {"next_observations": np.array([b"x"])})
    for source in (bad, tmp_path / "missing.hdf5"):
        with refused("error: ", source, error=SystemExit):
            convert(monkeypatch, source, out)
    with refused("error: ", "no single data file for 'Mine-v0'", error=SystemExit):
        convert(monkeypatch, "", out, "--env", "Mine-v0")
    with refused("error: cannot write", "nowhere", error=SystemExit):
        convert(monkeypatch, write_dataset(tmp_path / "good.hdf5", hopper_columns), tmp_path / "nowhere" / "out.hdf5")
    assert out.read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir()} == {"out.hdf5", "bad.hdf5", "good.hdf5"}


# --- Binary Adroit
def trajectory(rng, rewards, demonstration):
    """A trajectory as Cal-QL's files hold it: demonstrations as lists, with dict states and a reward too many."""
    n = len(rewards)
    states, actions = rng.normal(size=(n + 1, OBS)), rng.normal(size=(n, ACT))
    if demonstration:
        wrapped = [{"observation": state, "state_observation": state} for state in states]
        made = {"observations": wrapped[:-1], "next_observations": wrapped[1:], "actions": list(actions)}
        made |= {"rewards": np.array([*rewards, 0]), "terminals": np.zeros(n, bool), "env_infos": [{}] * n}
    else:
        made = {"observations": states[:-1], "next_observations": states[1:], "actions": actions.astype(np.float32)}
        made |= {"rewards": np.array(rewards, float)[:, None], "terminals": np.zeros((n, 1), bool)}
        made["env_infos"] = [{"goal_achieved": np.bool_(r == 0), "env_reward": np.float64(r)} for r in rewards]
    return made | {"agent_infos": [{}] * n}


def write_trajectories(path, trajectories, protocol=4):
    """np.save, which is np.load's way for arrays of objects; old numpy wrote an older protocol."""
    array = np.empty(len(trajectories), object)
    array[:] = trajectories
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, file, protocol=protocol)


DEMONSTRATIONS = [[-1, -1, 0, 0, -1, 0, -1, -1], [-1, -1, -1], [0, -1]]  # the second fails: Cal-QL leaves it out
CLONED = [[-1, -1], [-1, 0, 0], [-1] * 5, [-1, -1, 0]]


@pytest.fixture
def binary_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, kind in (("pen2_sparse.npy", DEMONSTRATIONS), ("pen_bc_sparse4.npy", CLONED)):
        trajectories = [trajectory(rng, rewards, kind is DEMONSTRATIONS) for rewards in kind]
        write_trajectories(tmp_path / name, trajectories, protocol=2 if kind is CLONED else 4)
    return tmp_path


def cal_ql_loop(folder, discount, scale, bias):
    """Transitions and returns-to-go, a row at a time, by the description of Cal-QL's loader."""
    rows, returns = [], []
    for name in ("pen2_sparse.npy", "pen_bc_sparse4.npy"):
        for made in np.load(folder / name, allow_pickle=True):
            rewards = [float(np.squeeze(reward)) for reward in made["rewards"]][: len(made["actions"])]
            if 0 not in rewards:
                continue
            length = max(i for i, reward in enumerate(rewards) if reward == 0) + 1
            to_go, ahead = [], 0.0
            for reward in reversed(rewards[:length]):
                ahead = scale * reward + bias + (0 if reward == 0 else discount * ahead)
                to_go.insert(0, ahead)
            returns += to_go
            for i in range(length):
                s, s_next = made["observations"][i], made["next_observations"][i]
                s, s_next = (x["state_observation"] if isinstance(x, dict) else x for x in (s, s_next))
                a = np.clip(made["actions"][i], -1, 1)
                end = i == length - 1 or rewards[i] == 0
                rows.append(np.concatenate((s, a, [rewards[i]], s_next, [rewards[i] == 0, 0, end])))
    return np.array(rows, np.float32), returns


def test_binary_adroit_rows_equal_a_slow_loops(binary_folder):
    assert sources.find(str(binary_folder), "pen-binary-v0") == binary_folder
    columns = read(binary_folder, "pen-binary-v0")
    expected = np.delete(cal_ql_loop(binary_folder, 0.99, 1, 0)[0], -2, axis=1)
    expected[:, -1] = [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1]  # timeouts end an episode, as solved rows do
    np.testing.assert_array_equal(stacked(columns), expected)
    assert len(expected) == 6 + 1 + 3 + 3  # of successes only, up to the last solved row
    assert columns["rewards"].tolist() == [-1, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, -1, 0]


def test_binary_adroit_returns_to_go_are_cal_qls(calql, binary_folder, monkeypatch):
    monkeypatch.setattr(calql, "make_simulator", lambda *_: (gymnasium.make("Pendulum-v1"), False))
    settings = {"is_sparse_reward": True, "reward_scale": 10.0, "reward_bias": 5.0, "discount": 0.9}
    settings |= {"env": "pen-binary-v0", "dataset": str(binary_folder), "device": "cpu", "p_share": 0}
    run = calql.CalQLRun(calql.TrainConfig(**settings), calql.CalQL)
    run.load_dataset()
    expected = cal_ql_loop(binary_folder, 0.9, 10, 5)[1]
    np.testing.assert_allclose(run.dataset.stored().extra, expected, rtol=1e-5)


def test_the_folder_of_the_binary_files_is_also_found_where_d4rls_are(binary_folder, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(binary_folder))
    assert sources.find("", "pen-binary-v0") == binary_folder


@pytest.mark.parametrize("missing", ["pen2_sparse.npy", "pen_bc_sparse4.npy"])
def test_a_missing_binary_file_is_named(binary_folder, missing):
    (binary_folder / missing).unlink()
    with refused("pen-binary-v0", binary_folder / missing, "--dataset"):
        sources.find(binary_folder, "pen-binary-v0")
    with pytest.raises(sources.SourceError) as stop:
        sources.find(binary_folder, "pen-binary-v0")
    other = {"pen2_sparse.npy", "pen_bc_sparse4.npy"} - {missing}
    assert not any(name in str(stop.value) for name in other)


class Unsafe:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def test_a_pickle_that_would_run_code_is_not_opened(binary_folder, monkeypatch):
    monkeypatch.chdir(binary_folder)
    for payload in (Unsafe(), np.random.default_rng(0)):
        write_trajectories(binary_folder / "pen2_sparse.npy", [{"observations": payload}])
        with refused("pen2_sparse.npy", "it holds", "not only arrays"):
            read(binary_folder, "pen-binary-v0")
    assert not (binary_folder / "ran").exists()


RECONSTRUCT = np.empty(0).__reduce__()[0]


class Forged:
    """Pickles as a call, with a state or without."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def forged_array(*state):
    return Forged(RECONSTRUCT, (np.ndarray, (0,), b"b"), state)


FORGED = {
    "objects on a buffer": Forged(np.ndarray, ((1,), np.dtype("O"), bytes(8))),
    "objects in bytes": forged_array(1, (1,), np.dtype("O"), False, bytes(8)),
    "longer than its bytes": forged_array(1, (1000,), np.dtype("f8"), False, bytes(8)),
    "negative sizes": forged_array(1, (-1, -1), np.dtype("f8"), False, bytes(8)),
    "structures": forged_array(1, (1,), np.dtype([("x", "O")]), False, bytes(8)),
    "no dtype": forged_array(1, (1,), "O", False, bytes(8)),
    "text": np.array(["a"]),
}


@pytest.mark.parametrize("payload", FORGED.values(), ids=FORGED)
def test_a_forged_array_is_not_built(binary_folder, payload):
    write_trajectories(binary_folder / "pen2_sparse.npy", [{"observations": payload}])
    with refused("pen2_sparse.npy", "not as Cal-QL's"):
        read(binary_folder, "pen-binary-v0")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_as_numpy_1_and_2_pickle_them(module, protocol):
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.array([True]),
    ]
    arrays += [np.float32(2.5), np.bool_(True), np.array(7), np.empty((0, 3)), np.array([{"a": np.ones(2)}, None])]
    content = pickle.dumps(arrays, protocol)
    if protocol < 4:  # 4 writes the length of each name
        content = content.replace(b"numpy._core.multiarray", module)
    found = sources.ArrayUnpickler(io.BytesIO(content)).load()
    for array, expected in zip(found[:-1], arrays[:-1], strict=True):
        assert (
            np.array_equal(array, expected)
            and array.dtype == expected.dtype.newbyteorder("=")
            and array.shape == expected.shape
        )
    assert found[-1][0]["a"].tolist() == [1, 1] and found[-1][1] is None


def numbers_only(path):
    np.save(path, np.zeros(3))


def dense(path):
    write_trajectories(path, [trajectory(np.random.default_rng(0), [0.5, 3.0], False)])


def without_actions(path):
    made = trajectory(np.random.default_rng(0), [-1, 0], False)
    del made["actions"]
    write_trajectories(path, [made])


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-50])


def hdf5(path):
    h5py.File(path, "w").close()


@pytest.mark.parametrize("damage", [numbers_only, dense, without_actions, cut_off, hdf5], ids=lambda f: f.__name__)
def test_a_file_of_another_kind_is_named(binary_folder, damage):
    path = binary_folder / "pen_bc_sparse4.npy"
    damage(path)
    with refused(path):
        read(binary_folder, "pen-binary-v0")


def test_files_without_a_success(binary_folder):
    for name in ("pen2_sparse.npy", "pen_bc_sparse4.npy"):
        write_trajectories(binary_folder / name, [trajectory(np.random.default_rng(0), [-1, -1], False)])
    with refused(binary_folder, "pen-binary-v0"):
        read(binary_folder, "pen-binary-v0")


# --- Training on them
class Walk(gymnasium.Env):
    """A walk in six dimensions, two of which the action moves; -1 a step, 0 and solved near the origin."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (6,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=6).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[:2] += 0.1 * action
        solved = bool(np.linalg.norm(self.state[:2]) < 0.3)
        return self.state.copy(), solved - 1.0, solved, False, {}


@pytest.fixture
def walk(monkeypatch):
    spec = gymnasium.envs.registration.EnvSpec("Walk-v0", entry_point=Walk, max_episode_steps=50)
    monkeypatch.setitem(gymnasium.registry, "Walk-v0", spec)
    return "Walk-v0"


BUDGET = TINY | {"offline_iterations": 200, "vae_iterations": 50, "online_iterations": 300, "vae_kl_target": 0}


def check_trains(call, tmp_path, **settings):
    call(runs_dir=tmp_path / "runs", **BUDGET | settings)
    folder = only_folder(tmp_path / "runs")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["last_score"] == numbers(folder, "online", "score")[-1] and numbers(folder, "online", "critic_loss")
    return summary


def test_awac_trains_on_a_goal_task_of_minari(call, minari_sets, tmp_path):
    summary = check_trains(call, tmp_path, dataset=MAZE)
    assert summary["env"] == MAZE and 0 <= summary["last_score"] <= 100  # the share of solved episodes


def test_awac_trains_on_a_robomimic_file(call, walk, tmp_path):
    write_robomimic(tmp_path / "low_dim.hdf5", [30] * 20)
    assert check_trains(call, tmp_path, env=walk, dataset=tmp_path / "low_dim.hdf5")["last_score"] < 0  # the return


def test_awac_trains_on_an_ogbench_file(call, walk, tmp_path):
    arrays = ogbench_arrays([30] * 20, width=6)
    ones = np.ones(600, np.float32)
    np.savez(tmp_path / "walk.npz", **arrays, rewards=-ones, masks=ones)
    assert check_trains(call, tmp_path, env=walk, dataset=tmp_path / "walk.npz")["last_score"] < 0
