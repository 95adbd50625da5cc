"""d4rl_envs.make and d4rl_envs.scoring: names, wrappers, and gym 0.23.1 behind Gymnasium's API."""

import random
import subprocess
import sys
import warnings
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

environments = pytest.importorskip("d4rl_envs.environments", reason="needs d4rl_envs: pip install ./d4rl_envs")
import d4rl_envs  # noqa: E402
from d4rl_envs import spaces  # noqa: E402

# --- Names
SCORING = {
    "hopper-medium-replay-v2": (-20.272305, 3234.3),
    "halfcheetah-full-replay-v2": (-280.178953, 12135.0),
    "Walker2d-v4": (1.629008, 4592.3),
    "Hopper-v5": (-20.272305, 3234.3),
    "pen-human-v1": (96.262799, 3076.8331017826877),
    "door-cloned-v1": (-56.512833, 2880.5693087298737),
    "relocate-human-v1": (-6.425911, 4233.877797728884),
    **dict.fromkeys(("antmaze-large-play-v2", "antmaze-umaze-v0", "pen-binary-v0", "door-binary-v0"), "success"),
    **dict.fromkeys(("ogbench:cube-single-play-singletask-v0", "antmaze-medium-singletask-task3-v0"), "success"),
    **dict.fromkeys(("AntMaze_UMaze-v4", "gymnasium_robotics:PointMaze_Medium_Diverse_G-v3"), "success"),
    **dict.fromkeys(("Pendulum-v1", "Pen-v0", "Hopper-custom-v0", "hopper-v0", "pen-custom-v0", "Hopper", "")),
    **dict.fromkeys(("antmaze-mine-v2", "my-binary-v0", "AdroitHandPen-v1", "hopper-medium-v9")),
}


@pytest.mark.parametrize("name", SCORING)
def test_d4rls_scores_are_for_its_exact_names(name):
    assert d4rl_envs.scoring(name) == SCORING[name]


def test_the_package_imports_simulators_and_files_only_when_they_are_used():
    heavy = "{'mujoco', 'gymnasium_robotics', 'h5py', 'minari', 'ogbench', 'gym', 'd4rl'}"
    code = f"import sys, d4rl_envs, d4rl_envs.sources; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "like"),
    [
        *(("hopper-full-replay-v2", "hopper-medium-v2"), ("walker2d-medium-v0", "walker2d-medium-v2")),
        *(("antmaze-umaze-diverse-v0", "antmaze-umaze-diverse-v2"), ("door-human-v0", "door-human-v1")),
    ],
)
def test_d4rls_other_names_run_on_the_same_simulators(name, like):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env, other = d4rl_envs.make(name), d4rl_envs.make(like)
    assert env.spec.id == name and env.spec.max_episode_steps == other.spec.max_episode_steps
    action = np.full(env.action_space.shape, 0.1, np.float32)
    assert np.array_equal(env.reset(seed=1)[0], other.reset(seed=1)[0])
    assert np.array_equal(env.step(action)[0], other.step(action)[0])


def test_gymnasiums_ids_are_made_without_a_warning_and_take_options():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = d4rl_envs.make("Hopper-v4", max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(3))[3] for _ in range(3)] == [False, False, True]
    with pytest.raises(gymnasium.error.Error, match="Nope"):
        d4rl_envs.make("Nope-v0")
    with pytest.raises(gymnasium.error.Error, match="antmaze-large"):
        d4rl_envs.make("antmaze-large-v2")  # no such maze


@pytest.mark.parametrize("ends_at_goal", [True, False])
def test_binary_adroit_by_name(ends_at_goal):
    env = d4rl_envs.make("door-binary-v0", ends_at_goal=ends_at_goal)
    env.reset(seed=0)
    assert env.unwrapped.binary and env.unwrapped.ends_at_goal == ends_at_goal
    reward, terminated, _, info = env.step(np.zeros(28, np.float32))[1:]
    assert (reward, terminated, info["goal_achieved"]) == (-1, False, False) and info["dense_reward"] != -1


# --- Observations of several parts
class Goal(gymnasium.Env):
    """Dict observations whose space has its keys in another order than the alphabet's."""

    shapes = {"b": (2,), "a": (1,), "c": ()}
    boxes = {key: gymnasium.spaces.Box(-np.inf, np.inf, shape) for key, shape in shapes.items()}
    nested = gymnasium.spaces.Tuple((gymnasium.spaces.Box(-1, 1, (2, 2)), gymnasium.spaces.Discrete(3)))
    observation_space = gymnasium.spaces.Dict(list((boxes | {"aa": nested}).items()))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    state = {"b": np.array([2.0, 3.0]), "a": np.array([1.0]), "aa": (np.eye(2), 1), "c": np.array(4.0)}

    def reset(self, seed=None, options=None):
        return self.state, {}

    def step(self, action):
        return self.state, 1.0, False, False, {"success": 1.0}


def test_observations_of_several_parts_come_flat_in_alphabetical_order_which_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(gymnasium, "make", lambda name, **options: Goal())
    spaces.say.cache_clear()
    envs = [d4rl_envs.make("Goal-v0") for _ in range(2)]
    expected = [1, 1, 0, 0, 1, 0, 1, 0, 2, 3, 4]  # a | aa: 2 x 2 and one of three | b | c
    assert envs[0].observation_space.shape == (11,) and envs[0].reset()[0].tolist() == expected
    observation, *_, info = envs[1].step(np.zeros(1))
    assert observation.tolist() == expected and info == {"success": 1.0}  # no name that counts success
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Goal-v0" in said and "a (1), aa/0 (4), aa/1 (3), b (2), c (1)" in said


def test_rows_of_several_parts_are_flattened_as_the_environments_observations_are():
    state, n = Goal.state, 3
    rows = {key: np.stack([state[key]] * n) for key in "abc"} | {"aa": (np.stack([np.eye(2)] * n), np.ones(n, int))}
    flat = spaces.flat_rows(Goal.observation_space, rows)
    assert flat.tolist() == [spaces.FlatObservations(Goal()).observation(state).tolist()] * n


def test_a_maze_of_gymnasium_robotics_tells_when_the_goal_is_achieved():
    env = d4rl_envs.make("gymnasium_robotics:PointMaze_UMaze-v3")
    env.reset(seed=0)
    inner = env.unwrapped
    for there in (False, True):
        if there:
            inner.point_env.set_state(inner.goal.copy(), np.zeros(2))
        observation, *_, info = env.step(np.zeros(2, np.float32))
        assert observation.shape == (8,) and info["goal_achieved"] is there


# --- gym 0.23.1
class OldSimulator:
    """Plays given (reward, done, at the time limit, info) steps in gym 0.23's interface."""

    observation_space = SimpleNamespace(low=np.full(2, -np.inf), high=np.full(2, np.inf), dtype=np.dtype(float))
    action_space = SimpleNamespace(
        low=-np.ones(1, np.float32), high=np.ones(1, np.float32), dtype=np.dtype(np.float32), shape=(1,)
    )
    spec = SimpleNamespace(max_episode_steps=100)

    def __init__(self, *steps):
        self.steps, self.unwrapped, self.seeds = iter(steps), self, []
        self._wrapped_env = SimpleNamespace(seed=lambda seed: self.seeds.append(("wrapped", seed)))

    def seed(self, seed):
        self.seeds.append(seed)

    def reset(self):
        return np.array([random.random(), np.random.rand()])

    def step(self, action):
        reward, done, limit, info = next(self.steps)
        return np.zeros(2), reward, done or limit, info | ({"TimeLimit.truncated": not done} if limit else {})


def old_stack(name, *steps, ends_at_goal=True):
    return environments.OldStack(OldSimulator(*steps), name, ends_at_goal)


def play(env, n):
    return [env.step(np.zeros(1))[1:] for _ in range(n)]


def test_the_old_stacks_spaces_seeds_and_time_limit():
    env = old_stack("antmaze-umaze-v2")
    assert env.observation_space == gymnasium.spaces.Box(-np.inf, np.inf, (2,), float)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    assert (env.spec.id, env.spec.max_episode_steps) == ("antmaze-umaze-v2", 100)
    starts = [env.reset(seed=seed)[0].tolist() for seed in (3, 4, 3)]
    assert starts[0] == starts[2] != starts[1]
    assert env.env.seeds == [3, ("wrapped", 3), 4, ("wrapped", 4), 3, ("wrapped", 3)]


@pytest.mark.parametrize(
    ("done", "limit", "expected"),
    [
        *((False, False, (False, False)), (True, False, (True, False))),
        *((False, True, (False, True)), (True, True, (True, False))),
    ],
)
def test_an_end_on_the_time_limits_step_is_a_terminal_only_if_the_task_ended(done, limit, expected):
    [(reward, terminated, truncated, _)] = play(old_stack("hopper-medium-v2", (1.0, done, limit, {})), 1)
    assert (reward, (terminated, truncated)) == (1.0, expected)


@pytest.mark.parametrize("ends_at_goal", [True, False])
def test_the_old_stacks_binary_adroit_ends_at_the_goal_or_the_limit_but_not_with_a_dropped_pen(ends_at_goal):
    steps = [(50.0, done, limit, {"goal_achieved": goal}) for done, limit, goal in ((1, 0, 0), (0, 0, 1), (1, 1, 0))]
    env = old_stack("pen-binary-v0", *steps, ends_at_goal=ends_at_goal)
    dropped, solved, late = play(env, 3)
    assert dropped[:3] == (-1.0, False, False) and dropped[3] == {"goal_achieved": False, "dense_reward": 50.0}
    assert solved[:3] == (0.0, ends_at_goal, False) and solved[3]["goal_achieved"]
    assert late[:3] == (-1.0, False, True)


def test_the_old_stacks_antmaze_has_achieved_its_goal_where_it_pays():
    infos = [info for *_, info in play(old_stack("antmaze-umaze-v2", (0.0, 0, 0, {}), (1.0, 1, 0, {})), 2)]
    assert infos == [{"goal_achieved": False}, {"goal_achieved": True}]


@pytest.fixture
def importing():
    environments.import_old_stack.cache_clear()
    yield
    environments.import_old_stack.cache_clear()


def test_the_old_stack_is_preferred_for_the_names_it_has(importing, monkeypatch):
    made = []
    registry = SimpleNamespace(env_specs={"hopper-medium-v2": 0, "pen-cloned-v1": 0})
    gym = SimpleNamespace(envs=SimpleNamespace(registry=registry))
    gym.make = lambda name: made.append(name) or OldSimulator()
    monkeypatch.setattr(environments, "import_old_stack", lambda: gym)
    for name in ("hopper-medium-v2", "pen-binary-v0"):
        assert isinstance(d4rl_envs.make(name), environments.OldStack)
    assert made == ["hopper-medium-v2", "pen-cloned-v1"]
    assert d4rl_envs.make("Pendulum-v1").spec.id == "Pendulum-v1" and len(made) == 2


def test_a_gym_or_d4rl_that_cannot_be_imported_leaves_gymnasium(importing, tmp_path, monkeypatch, capsys):
    for name, text in (("gym", ""), ("d4rl", "raise ImportError")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    spaces.say.cache_clear()
    assert [d4rl_envs.make("Pendulum-v1").spec.id for _ in range(2)] == ["Pendulum-v1"] * 2
    said = capsys.readouterr().err
    assert said.count("gym and d4rl cannot be imported") == 1 and "(ImportError)" in said
    for name in ("gym", "d4rl"):
        sys.modules.pop(name, None)
