"""Reading data sets, finding and downloading them, reward normalisation, scores, and ends of episodes."""

import http.server
import threading
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
OBS, ACT = 2, 1
ENV = SimpleNamespace(name="fake-v0", obs_dim=OBS, act_dim=ACT, action_low=np.full(1, -1.0), action_high=np.ones(1))


# --- load_dataset
def write(path, ends, next_observations):
    """A file whose rows are told apart by their numbers; ends: a (terminal, timeout) pair a row."""
    n = len(ends)
    columns = {"observations": np.arange(2.0 * n).reshape(n, OBS), "actions": np.linspace(-1, 1, n)[:, None]}
    columns |= {"rewards": (np.arange(n) * 7 % 11).astype(np.float32), "terminals": [t for t, _ in ends]}
    columns["timeouts"] = [t for _, t in ends]
    if next_observations:
        columns["next_observations"] = columns["observations"] + 1000
    with h5py.File(path, "w") as file:
        for name, column in columns.items():
            file[name] = column
    return path


def slow_load(path):
    """The same as load_dataset, a row at a time. Successors after a terminal are never used: here they are None."""
    with h5py.File(path) as file:
        columns = {name: file[name][()].tolist() for name in file}
    n, rows, returns, total = len(columns["rewards"]), [], [], 0.0
    for i in range(n):
        terminal, timeout = columns["terminals"][i], columns["timeouts"][i]
        total += columns["rewards"][i]
        if terminal or timeout:
            returns.append(total)
            total = 0.0
        if "next_observations" in columns:
            successor = columns["next_observations"][i]
        elif timeout or (i == n - 1 and not terminal):
            continue
        else:
            successor = None if terminal else columns["observations"][i + 1]
        rows.append((columns["observations"][i], columns["actions"][i], columns["rewards"][i], successor, terminal))
    return rows, returns


def check_against_the_loop(awac, path):
    expected, expected_returns = slow_load(path)
    if not expected:
        with pytest.raises(SystemExit, match="no transition"):
            awac.load_dataset(path, ENV)
        return None
    rows, returns = awac.load_dataset(path, ENV)
    assert rows.dtype == np.float32 and rows.shape == (len(expected), 2 * OBS + ACT + 4) and rows.flags["C_CONTIGUOUS"]
    for row, (state, action, reward, successor, terminal) in zip(rows.tolist(), expected):
        s, a, r, s_next, d, rest = row[:2], row[2:3], row[3], row[4:6], row[6], row[7:]
        assert (s, a, r, d, rest) == (state, [np.float32(action[0])], reward, float(terminal), [0.0, 0.0])
        assert successor is None or s_next == successor
    assert returns.tolist() == expected_returns
    return rows


end = st.sampled_from([(False, False)] * 3 + [(True, False), (False, True), (True, True)])


@given(ends=st.lists(end, min_size=1, max_size=25), next_observations=st.booleans())
def test_rows_successors_terminals_and_returns_equal_a_slow_loops(awac, tmp_path_factory, ends, next_observations):
    path = tmp_path_factory.getbasetemp() / "random.hdf5"
    check_against_the_loop(awac, write(path, ends, next_observations))


def ends_of(text):
    """A row a letter: . goes on, D terminal, T timeout, B both."""
    return [(letter in "DB", letter in "TB") for letter in text]


@pytest.mark.parametrize(
    ("ends", "next_observations", "kept"),
    [
        ("..T..D..", False, [0, 1, 3, 4, 5, 6]),  # neither the timeout's row nor the last has a successor
        ("..T..D..", True, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("..DDDDT.DDT", False, [0, 1, 2, 3, 4, 5, 7, 8, 9]),  # antmaze: a run of terminals at the goal
        (".B..B", False, [0, 2, 3]),
        (".B..B", True, [0, 1, 2, 3, 4]),
        ("..D", False, [0, 1, 2]),
        ("..T", False, [0, 1]),
        ("TT.", False, []),
    ],
)
def test_which_rows_are_kept(awac, tmp_path, ends, next_observations, kept):
    rows = check_against_the_loop(awac, write(tmp_path / "file.hdf5", ends_of(ends), next_observations))
    assert kept == ([] if rows is None else (rows[:, 0] / 2).tolist())
    if kept:
        assert rows[:, 6].tolist() == [float(ends[i] in "DB") for i in kept]


def test_returns_are_of_complete_episodes_by_hand(awac, tmp_path):
    path = write(tmp_path / "file.hdf5", ends_of("..T.D.."), False)  # rewards 0 7 3 | 10 6 | 2 9
    assert awac.load_dataset(path, ENV)[1].tolist() == [10.0, 16.0]


def test_returns_of_long_files_do_not_lose_precision(awac, tmp_path):
    n = 200_000
    path = write(tmp_path / "file.hdf5", [(False, i % 1000 == 999) for i in range(n)], True)
    with h5py.File(path, "r+") as file:
        file["rewards"][...] = np.float32(3.1)
    returns = awac.load_dataset(path, ENV)[1]
    np.testing.assert_allclose(returns, np.full(200, 1000 * float(np.float32(3.1))), rtol=1e-9)


# --- reward_transform
def reward_env(name, limit=1000):
    spec = SimpleNamespace(max_episode_steps=limit)
    return SimpleNamespace(name=name, family=name.split("-")[0].lower(), env=SimpleNamespace(spec=spec))


def transform(awac, name, returns, **values):
    return awac.reward_transform(reward_env(name), np.array(returns), awac.TrainConfig(**values))


def test_reward_normalisation_by_hand(awac):
    hopper, antmaze = ("hopper-medium-v2", [100.0, 2600.0, 300.0]), ("antmaze-umaze-v2", [0.0, 1.0])
    assert transform(awac, *hopper, normalize_reward=True) == (0.4, 0.0)  # 1000 / (2600 - 100)
    assert transform(awac, *antmaze, normalize_reward=True) == (1.0, -1.0)
    for name in ("hopper-medium-v2", "antmaze-umaze-v2", "pen-binary-v0"):
        assert transform(awac, name, [0.0, 1.0]) == (1.0, 0.0)
        assert transform(awac, name, [0.0, 1.0], reward_scale=10.0, reward_bias=5.0) == (10.0, 5.0)
    scaled = {"normalize_reward": True, "reward_scale": 10.0, "reward_bias": -5.0}
    assert transform(awac, *hopper, **scaled) == (4.0, -5.0)
    assert transform(awac, *antmaze, **scaled) == (10.0, -5.0)


@pytest.mark.parametrize(
    ("name", "returns"), [("hopper-medium-v2", [5.0]), ("hopper-medium-v2", [5.0, 5.0]), ("Pendulum-v1", [1.0, 2.0])]
)
def test_reward_normalisation_without_a_range_ends_the_program(awac, name, returns):
    with pytest.raises(SystemExit, match="normalize_reward"):
        transform(awac, name, returns, normalize_reward=True)


# --- Where a data set comes from
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
}


@pytest.mark.parametrize("env", ADDRESSES)
def test_addresses_of_d4rls_files(awac, env):
    assert awac.dataset_address(env) == ADDRESSES[env]


@pytest.mark.parametrize("env", ["Hopper-v4", "pen-binary-v0", "antmaze-huge-play-v2", "hopper-medium-v0", ""])
def test_without_a_d4rl_file_the_program_ends_and_says_what_else_there_is(awac, env):
    assert awac.dataset_address(env) == ""
    with pytest.raises(SystemExit, match="--dataset"):
        awac.find_dataset(env, "")


@pytest.fixture
def server(awac, monkeypatch):
    """A local download host: `answer.body` of `answer.size` announced bytes (404 without a body); counts requests."""
    answer = SimpleNamespace(body=None, size=0, paths=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer.paths.append(self.path)
            self.send_response(200 if answer.body is not None else 404)
            self.send_header("Content-Length", str(answer.size))
            self.end_headers()
            self.wfile.write(answer.body or b"")

        def log_message(self, *args):
            pass

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=host.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(awac, "DATASET_HOST", f"http://127.0.0.1:{host.server_port}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield answer
    host.shutdown()
    thread.join()
    host.server_close()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The folder that D4RL_DATASET_DIR names, not there yet, and ~/.d4rl/datasets."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "shared" / "datasets"))
    return tmp_path / "shared" / "datasets", tmp_path / "home" / ".d4rl" / "datasets"


NAME = "hopper_medium-v2.hdf5"


def test_a_data_set_is_looked_for_in_d4rls_folders_before_it_is_downloaded(awac, server, folders, tmp_path):
    given_path = tmp_path / "mine.hdf5"
    for path in (given_path, folders[1] / NAME):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert awac.find_dataset("hopper-medium-v2", str(given_path)) == given_path
    assert awac.find_dataset("hopper-medium-v2", "") == folders[1] / NAME
    folders[0].mkdir(parents=True)
    (folders[0] / NAME).write_bytes(b"")
    assert awac.find_dataset("hopper-medium-v2", "") == folders[0] / NAME
    assert server.paths == []


@pytest.mark.parametrize("named", [True, False])
def test_a_download_lands_in_the_first_folder_and_is_used_from_then_on(
    awac, server, folders, tmp_path, monkeypatch, named
):
    if not named:
        monkeypatch.delenv("D4RL_DATASET_DIR")
    source = write(tmp_path / "source.hdf5", ends_of("..D..T"), True)
    server.body, server.size = source.read_bytes(), source.stat().st_size
    target = folders[0 if named else 1]
    for _ in range(2):
        assert awac.find_dataset("hopper-medium-v2", "") == target / NAME
    assert (target / NAME).read_bytes() == server.body
    assert [path.name for path in target.iterdir()] == [NAME]
    assert server.paths == [f"/gym_mujoco_v2/{NAME}"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999, None], ids=str)
def test_a_failed_or_cut_off_download_leaves_nothing_and_names_address_folder_and_alternatives(
    awac, server, folders, tmp_path, share
):
    source = write(tmp_path / "source.hdf5", ends_of("." * 500 + "D"), True).read_bytes()
    if share is not None:
        server.body, server.size = source[: int(share * len(source))], len(source)
    with pytest.raises(SystemExit) as stop:
        awac.find_dataset("hopper-medium-v2", "")
    assert list(folders[0].iterdir()) == []
    for text in (awac.DATASET_HOST + f"/gym_mujoco_v2/{NAME}", str(folders[0]), "--dataset", "tools/collect.py"):
        assert text in str(stop.value)


def test_a_given_path_without_a_file_is_not_replaced_by_a_download(awac, server, folders, tmp_path):
    with pytest.raises(SystemExit, match="no data set at"):
        awac.find_dataset("hopper-medium-v2", str(tmp_path / "missing.hdf5"))
    assert server.paths == []


# --- Environment
class FakeSimulator:
    """Plays given (reward, terminated, at the time limit, info) steps, in gym's old interface or in Gymnasium's."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,))
    action_space = gymnasium.spaces.Box(-1, 1, (ACT,))

    def __init__(self, steps, old_api):
        self.steps, self.old_api, self.unwrapped = iter(steps), old_api, self

    def seed(self, seed):
        pass

    def reset(self, seed=None):
        return np.zeros(OBS) if self.old_api else (np.zeros(OBS), {})

    def step(self, action):
        reward, terminated, limit, info = next(self.steps)
        if not self.old_api:
            return np.zeros(OBS), reward, terminated, limit, info
        info = info | ({"TimeLimit.truncated": not terminated} if limit else {})  # gym 0.23's TimeLimit
        return np.zeros(OBS), reward, terminated or limit, info


@pytest.fixture(params=[True, False], ids=["old interface", "gymnasium"])
def make_env(awac, monkeypatch, request):
    def make(name, *steps):
        simulator = FakeSimulator(steps, old_api=request.param)
        monkeypatch.setattr(awac, "make_simulator", lambda *_: (simulator, simulator.old_api))
        env = awac.Environment(name)
        env.reset(0)
        return env

    return make


def play(env, n):
    return [env.step(np.zeros(ACT))[1:] for _ in range(n)]


@pytest.mark.parametrize(
    ("terminated", "limit", "stored_as_terminal", "over"),
    [(False, False, False, False), (True, False, True, True), (False, True, False, True), (True, True, True, True)],
)
def test_an_end_on_the_time_limits_step_is_a_terminal_only_if_the_task_ended(
    make_env, terminated, limit, stored_as_terminal, over
):
    env = make_env("hopper-medium-v2", (1.0, terminated, limit, {}))
    [(reward, is_terminal, truncated)] = play(env, 1)
    assert (reward, is_terminal, is_terminal or truncated) == (1.0, stored_as_terminal, over)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("hopper-medium-v2", -20.272305, 3234.3),
        ("Hopper-v4", -20.272305, 3234.3),
        ("halfcheetah-medium-replay-v2", -280.178953, 12135.0),
        ("walker2d-medium-expert-v2", 1.629008, 4592.3),
        ("pen-human-v1", 96.262799, 3076.8331017826877),
        ("door-cloned-v1", -56.512833, 2880.5693087298737),
        ("relocate-human-v1", -6.425911, 4233.877797728884),
    ],
)
def test_d4rls_score_is_0_at_its_random_and_100_at_its_expert_return(make_env, name, low, high):
    env = make_env(name, (low, False, False, {}), (high - low, False, False, {}), (low, False, False, {}))
    play(env, 1)
    assert env.score() == pytest.approx(0, abs=1e-9)
    play(env, 1)
    assert env.score() == pytest.approx(100) and env.episode_return == pytest.approx(high)
    env.reset(1)
    play(env, 1)
    assert env.score() == pytest.approx(0, abs=1e-9)


def test_antmaze_scores_100_once_the_goal_was_reached(make_env):
    env = make_env("antmaze-umaze-v2", *[(reward, False, False, {}) for reward in (0.0, 1.0, 0.0)])
    scores = [play(env, 1) and env.score() for _ in range(3)]
    assert scores == [0.0, 100.0, 100.0]
    env.reset(1)
    assert env.score() == 0.0


@pytest.mark.parametrize("ends_at_goal", [True, False])
def test_binary_adroit_pays_0_at_the_goal_which_alone_ends_it_and_not_in_evaluations(make_env, ends_at_goal):
    infos = [(50.0, dropped, False, {"goal_achieved": goal}) for goal, dropped in ((False, True), (True, False))]
    env = make_env("pen-binary-v0", *infos)
    env.ends_at_goal = ends_at_goal
    steps = [(*play(env, 1)[0], env.score()) for _ in range(2)]
    assert steps == [(-1.0, False, False, 0.0), (0.0, ends_at_goal, False, 100.0)]


def test_a_task_without_reference_returns_scores_its_return(make_env):
    env = make_env("Pendulum-v1", (-3.0, False, False, {}), (-4.5, False, True, {}))
    play(env, 2)
    assert env.score() == -7.5 and not env.normalized


def test_a_seed_gives_the_same_hopper_episode_in_every_environment_object(awac):
    def episode(env, seed):
        states, actions = [env.reset(seed)], np.random.default_rng(0).uniform(-1, 1, (8, 3))
        return np.stack(states + [env.step(action)[0] for action in actions])

    first, second = awac.Environment("Hopper-v4"), awac.Environment("Hopper-v4")
    expected = episode(first, 3)
    assert expected.dtype == np.float32
    assert not np.array_equal(episode(first, 4)[0], expected[0])
    assert np.array_equal(episode(first, 3), expected) and np.array_equal(episode(second, 3), expected)
    config = awac.TrainConfig(normalize_reward=True)
    assert awac.reward_transform(first, np.array([0.0, 2000.0]), config) == (0.5, 0.0)


def test_statistics_of_a_million_rows_far_from_zero_are_right(awac):
    rows = np.random.default_rng(0).normal(1000, 1, (1_000_000, 2)).astype(np.float32)
    mean, std = awac.column_moments(rows)
    np.testing.assert_allclose(mean, 1000, atol=0.01)
    np.testing.assert_allclose(std, 1, atol=0.01)
