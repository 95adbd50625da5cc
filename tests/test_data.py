"""Reading data sets, finding and downloading them, reward normalisation, scores, and ends of episodes."""

import random
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT
from d4rl_envs.episodes import guess_timeouts
from hypothesis import given, settings
from hypothesis import strategies as st

import d4rl_envs

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
OBS, ACT = 2, 1
BOUNDS = {"action_low": np.full(1, -1.0), "action_high": np.ones(1)}
ENV = SimpleNamespace(name="fake-v0", obs_dim=OBS, act_dim=ACT, time_limit=0, **BOUNDS)


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
        elif not terminal and (timeout or i == n - 1):
            if rows and rows[-1][0] == columns["observations"][i - 1]:
                rows[-1][-1] = True  # the last of its episode that is kept
            continue
        else:
            successor = None if terminal else columns["observations"][i + 1]
        known = columns["observations"][i], columns["actions"][i], columns["rewards"][i], successor, terminal
        rows.append([*known, terminal or timeout or i == n - 1])
    return rows, returns


def check_against_the_loop(awac, path):
    expected, expected_returns = slow_load(path)
    if not expected:
        with pytest.raises(SystemExit, match="no transition"):
            awac.load_dataset(path, ENV)
        return None
    rows, returns = awac.load_dataset(path, ENV)
    assert rows.dtype == np.float32 and rows.shape == (len(expected), 2 * OBS + ACT + 4) and rows.flags["C_CONTIGUOUS"]
    for row, (state, action, reward, successor, terminal, last) in zip(rows.tolist(), expected):
        s, a, r, s_next, d, rest = row[:2], row[2:3], row[3], row[4:6], row[6], row[7:]
        assert (s, a, r, d, rest) == (state, [np.float32(action[0])], reward, float(terminal), [0.0, last])
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
        (".B..B", False, [0, 1, 2, 3, 4]),  # a terminal needs no successor
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


def columns_of(n, episode):
    """Columns of n steps of a clock and a slow drift, which begin anew after every `episode` rows."""
    states = np.stack([np.arange(n) % episode / 10, np.arange(n) // episode + np.arange(n) / 1000], axis=1)
    last = np.arange(n) % episode == episode - 1
    columns = {"observations": states, "actions": np.zeros((n, 1)), "rewards": np.ones(n)}
    return columns | {"terminals": np.zeros(n, bool), "timeouts": last, "next_observations": states + (0.1, 0.001)}


def load(awac, tmp_path, columns, env=ENV, **options):
    with h5py.File(tmp_path / "file.hdf5", "w") as file:
        for name, column in columns.items():
            file[name] = column
    return awac.load_dataset(tmp_path / "file.hdf5", env, **options)


def without(columns, *names):
    return {name: column for name, column in columns.items() if name not in names}


@pytest.mark.parametrize("kind", [np.uint8(255), np.int64(-1), np.float32(0.5)], ids=str)
@pytest.mark.parametrize("flag", ["terminals", "timeouts"])
def test_flags_are_truth_values(awac, tmp_path, flag, kind):
    columns = columns_of(40, 10)
    truth = columns["timeouts"]
    rows, returns = load(awac, tmp_path, columns | {"timeouts": np.zeros(40, bool), flag: truth * kind})
    assert rows[:, -3].tolist() == (truth if flag == "terminals" else np.zeros(40)).tolist()
    assert rows[:, -1].tolist() == truth.tolist() and returns.tolist() == [10.0] * 4


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize(
    ("shift", "kept", "words"),
    [
        (0, True, None),
        (1, True, "after 4 rows inside episodes, first row 9,"),  # timeouts a row late; row 49 is the file's last
        (-1, True, "after 4 rows inside episodes, first row 9,"),
        (0, False, "after 4 rows inside episodes, first row 9,"),  # none set
    ],
)
def test_transitions_across_episodes_are_counted_and_the_first_is_named(
    awac, tmp_path, capsys, shift, kept, words, successors
):
    columns = columns_of(50, 10)
    columns["timeouts"] = np.roll(columns["timeouts"], shift) & kept
    rows, _ = load(awac, tmp_path, columns if successors else without(columns, "next_observations"))
    said = capsys.readouterr().out
    assert (words in said and "warning" in said) if words else not said
    if successors:
        assert len(rows) == 50
        if not kept:  # the file says nothing of ends: they are guessed, and that is said
            assert "episodes end there" in said and np.flatnonzero(rows[:, -1]).tolist() == [9, 19, 29, 39, 49]


def test_steps_of_random_walks_and_constant_columns_are_no_breaks(awac, tmp_path, capsys):
    walk = np.random.default_rng(0).normal(size=(3000, OBS)).cumsum(0)
    walk[:, 1] = 7
    load(awac, tmp_path, without(columns_of(3000, 3000), "next_observations") | {"observations": walk})
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("limit", "ends"), [(0, [9, 19, 29]), (5, [4, 9, 14, 19, 24, 29]), (20, [9, 19, 29])])
def test_without_timeouts_episodes_end_where_the_states_break_off_or_at_the_time_limit(
    awac, tmp_path, capsys, limit, ends
):
    columns = without(columns_of(30, 10), "timeouts")
    env = SimpleNamespace(**vars(ENV) | {"time_limit": limit})
    rows, returns = load(awac, tmp_path, columns, env)
    assert np.flatnonzero(rows[:, -1]).tolist() == ends and "no timeouts: guessed" in capsys.readouterr().out
    rows, _ = load(awac, tmp_path, without(columns, "next_observations"), env)
    assert len(rows) == 30 - len(ends) and rows[:, -1].sum() == len(ends)


def test_the_time_limit_counts_from_each_episodes_start(awac):
    terminals, breaks = np.zeros(12, bool), np.zeros(12, bool)
    terminals[1] = breaks[6] = True
    assert np.flatnonzero(guess_timeouts(terminals, breaks, 4)).tolist() == [5, 6, 10]
    terminals[5] = True
    assert np.flatnonzero(guess_timeouts(terminals, breaks, 4)).tolist() == [6, 10]


def test_columns_of_one_number_are_squeezed(awac, tmp_path):
    columns = columns_of(20, 10)
    expected = load(awac, tmp_path, columns)
    found = load(awac, tmp_path, columns | {key: columns[key][:, None] for key in ("rewards", "terminals", "timeouts")})
    assert all(map(np.array_equal, found, expected))


def test_actions_are_clipped_on_request_only(awac, tmp_path):
    columns = columns_of(20, 10)
    columns["actions"] = np.linspace(-2, 2, 20)[:, None]
    with pytest.raises(SystemExit, match="1 beyond the action space of fake-v0; clip_actions"):
        load(awac, tmp_path, columns)
    rows, _ = load(awac, tmp_path, columns, clip_actions=True)
    assert rows[:, OBS].tolist() == np.linspace(-2, 2, 20).clip(-1, 1).astype(np.float32).tolist()


def test_what_numbers_of_rows_float32_cannot_hold(awac):
    n = 2**24 + 5
    every = awac.evenly_spaced(n, 1000)
    assert every[0] == 0 and every[-1] == n - 1 and every[500] == (n - 1) * 500 // 999
    assert torch.equal(awac.evenly_spaced(1000, 10), torch.linspace(0, 999, 10).long())
    values = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    assert awac.quantiles(values, (0.0, 0.5, 1.0)) == [0, 2**23, 2**24]
    assert awac.quantiles(values[:5] - values[4], (0.125, 0.5)) == [0.5, 2]


# --- reward_transform
def reward_env(name, limit=1000):
    return SimpleNamespace(name=name, time_limit=limit)


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
    ("name", "returns"), [("hopper-medium-v2", [5.0]), ("hopper-medium-v2", [5.0, 5.0]), ("Pendulum-v1", [])]
)
def test_reward_normalisation_without_a_range_ends_the_program(awac, name, returns):
    with pytest.raises(SystemExit, match="normalize_reward"):
        transform(awac, name, returns, normalize_reward=True)


def test_reward_normalisation_needs_a_time_limit(awac):
    config = awac.TrainConfig(normalize_reward=True)
    with pytest.raises(SystemExit, match="max_episode_steps sets one"):
        awac.reward_transform(reward_env("hopper-medium-v2", limit=0), np.array([0.0, 5.0]), config)
    assert awac.reward_transform(reward_env("mine-v0", limit=50), np.array([0.0, 5.0]), config) == (10, 0)


# --- Environment
class FakeSimulator(gymnasium.Env):
    """Plays given (reward, terminated, truncated, info) steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,))
    action_space = gymnasium.spaces.Box(-1, 1, (ACT,))

    def __init__(self, steps):
        self.steps = iter(steps)

    def reset(self, seed=None):
        return np.zeros(OBS), {}

    def step(self, action):
        return np.zeros(OBS), *next(self.steps)


@pytest.fixture
def make_env(awac, monkeypatch):
    def make(name, *steps):
        monkeypatch.setattr(awac, "make_simulator", lambda *_: (FakeSimulator(steps), d4rl_envs.scoring(name)))
        env = awac.Environment(name)
        env.reset(0)
        return env

    return make


def play(env, n):
    return [env.step(np.zeros(ACT))[1:] for _ in range(n)]


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


def test_binary_adroit_scores_its_goal_and_sums_its_dense_reward(make_env):
    steps = [(goal - 1.0, goal, False, {"goal_achieved": goal, "dense_reward": 7.0}) for goal in (False, True)]
    env = make_env("pen-binary-v0", *steps)
    assert [(*play(env, 1)[0], env.score()) for _ in range(2)] == [(-1.0, False, False, 0.0), (0.0, True, False, 100.0)]
    assert env.episode_return == 14.0


def test_a_task_without_reference_returns_scores_its_return(make_env):
    env = make_env("Pendulum-v1", (-3.0, False, False, {}), (-4.5, False, True, {}))
    assert play(env, 2) == [(-3.0, False, False), (-4.5, False, True)]
    assert env.score() == -7.5 and env.scoring is None


def test_without_the_package_gymnasiums_tasks_score_their_return_and_the_run_says_so(awac, monkeypatch, capsys):
    monkeypatch.setattr(awac, "import_package", lambda: None)
    env = awac.Environment("Hopper-v5")
    assert env.scoring is None and "Hopper-v5: scores are returns" in capsys.readouterr().out
    for name in ("minari:mujoco/hopper/medium-v0", "ogbench:cube-single-play-singletask-v0"):
        with pytest.raises(SystemExit, match="need d4rl_envs: pip install ./d4rl_envs"):
            awac.Environment(name)
        with pytest.raises(SystemExit, match=f"error: {name} is no HDF5 file.*python -m d4rl_envs.sources {name} out"):
            next(awac.read_columns(name, name))


class Odd(gymnasium.Env):
    """Returns, as `kind` says, what simulators return that nobody has tested."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (ACT,))

    def __init__(self, kind="", space=None):
        self.kind, self.action_space, self.state = kind, space or self.action_space, np.zeros(OBS, np.float32)

    def reset(self, seed=None, options=None):
        self.state[:] = (np.random.rand(), random.random()) if self.kind == "global streams" else 0
        return self.state, {}

    def step(self, action):
        if self.kind in FAULTS:
            raise FAULTS[self.kind]
        self.state += np.random.rand() if self.kind == "global streams" else 1
        action *= 0
        state = {"column": self.state[:, None], "short": self.state[:1], "huge": self.state * 1e30}.get(
            self.kind, self.state
        )
        reward = {"reward": np.array([2.0]), "rewards": np.ones(2)}.get(self.kind, 2.0)
        return state, reward, False, False, {}


FAULTS = {"file": FileNotFoundError(2, "No such file or directory", "x.xml"), "silent": KeyError()}


@pytest.fixture
def odd(awac, monkeypatch):
    def make(kind="", space=None, **options):
        monkeypatch.setattr(awac, "make_simulator", lambda *_: (Odd(kind, space), None))
        return awac.Environment("Odd-v0", **options)

    return make


@pytest.mark.parametrize("kind", ["reward", "column", ""])
def test_rewards_and_observations_in_other_shapes_and_in_reused_memory(odd, kind):
    env = odd(kind)
    first, action = env.reset(0), np.ones(ACT)
    second, reward, *ends = env.step(action)
    third, *_ = env.step(action)
    assert [x.tolist() for x in (first, second, third)] == [[0, 0], [1, 1], [2, 2]] and second.dtype == np.float32
    assert reward == 2.0 and ends == [False, False] and action == 1


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("short", r"shape \(1,\), not \(2,\)"),
        ("rewards", "step.. failed, ValueError"),
        ("huge", "beyond 1e.15"),
        ("file", "step.. failed, FileNotFoundError: .*x.xml"),
        ("silent", "step.. failed, KeyError"),
    ],
)
def test_a_fault_of_the_simulator_is_called_so(odd, kind, words):
    env = odd(kind)
    env.reset(0)
    with pytest.raises(SystemExit, match=f"error: Odd-v0.*{words}"):
        env.step(np.ones(ACT))


SPACES = {
    "MultiDiscrete": (gymnasium.spaces.MultiDiscrete([3, 3]), "bounded continuous actions"),
    "MultiBinary": (gymnasium.spaces.MultiBinary(2), "bounded continuous actions"),
    "integers": (gymnasium.spaces.Box(0, 5, (1,), np.int64), "bounded continuous actions"),
    "unbounded": (gymnasium.spaces.Box(-np.inf, np.inf, (1,)), "bounded continuous actions"),
    "fixed": (gymnasium.spaces.Box(np.float32([-1, 0]), np.float32([1, 0])), "its action 1 lies between 0 and 0"),
    "float32's largest": (gymnasium.spaces.Box(-3.4e38, 3.4e38, (1,)), "its action 0 lies between -3.4e.38"),
}


@pytest.mark.filterwarnings("ignore:.*A Box action space maximum and minimum")
@pytest.mark.parametrize(("space", "words"), SPACES.values(), ids=SPACES)
def test_spaces_that_no_policy_here_can_fill(odd, space, words):
    with pytest.raises(SystemExit, match=f"error: Odd-v0.*{words}"):
        odd(space=space)


def test_global_streams_are_seeded_with_each_episode(odd):
    def episode(env, seed):
        return [env.reset(seed).tolist(), *[env.step(np.ones(ACT))[0].tolist() for _ in range(3)]]

    env = odd("global streams")
    first = episode(env, 3)
    assert episode(env, 4) != first and episode(env, 3) == first and episode(odd("global streams"), 3) == first


def test_episodes_end_at_max_episode_steps_and_evaluations_end_in_any_case(odd, capsys):
    env = odd(max_steps=3)
    for _ in range(2):
        env.reset(0)
        assert [env.step(np.ones(ACT))[2:] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    env = odd()
    env.reset(0)
    assert (
        env.time_limit == 0 and not any(env.step(np.ones(ACT))[3] for _ in range(1500)) and not capsys.readouterr().out
    )
    env = odd(ends_at_goal=False)
    env.reset(0)
    assert [env.step(np.ones(ACT))[3] for _ in range(1000)] == [False] * 999 + [True]
    assert "warning: Odd-v0 has no time limit" in capsys.readouterr().out


def test_max_episode_steps_cannot_exceed_the_tasks_own_limit(awac):
    assert awac.Environment("Pendulum-v1", max_steps=150).time_limit == 150
    assert awac.Environment("Pendulum-v1").time_limit == 200
    with pytest.raises(SystemExit, match="max_episode_steps 201 is above the time limit of Pendulum-v1, 200"):
        awac.Environment("Pendulum-v1", max_steps=201)


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


SHIPPED = {"hopper-medium-mini": ("Hopper-v4", 100), "walker2d-medium-mini": ("Walker2d-v4", 42)}  # episodes


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_data_sets_load_without_a_warning(awac, capsys, name):
    env, episodes = SHIPPED[name]
    rows, returns = awac.load_dataset(ROOT / "data" / f"{name}.hdf5", awac.Environment(env))
    assert "warning" not in capsys.readouterr().out  # impacts make large steps, between recorded states
    assert rows[:, -1].sum() == len(returns) == episodes
