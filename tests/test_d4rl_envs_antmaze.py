"""d4rl_envs.antmaze: single steps against recordings of D4RL's own simulator, and the rules of goal, start and end."""

import pickle

import gymnasium
import numpy as np
import pytest
from d4rl_recordings import errors_against, load_recording

antmaze = pytest.importorskip("d4rl_envs.antmaze", reason="needs d4rl_envs: pip install ./d4rl_envs")
# D4RL's goal cells seen from the start, in metres
GOAL_CORNERS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}


@pytest.fixture(params=antmaze.MAZES)
def env(request):
    return antmaze.AntMazeEnv(request.param)


# --- Physics
def place(env, row):
    env.target_goal = row["goal"]


def test_steps_like_d4rl(env):
    """1,000 recorded steps a maze, some inside walls and at the goal: measured at most 2.9e-7."""
    errors = errors_against(f"antmaze-{env.maze}", env, place)
    assert len(errors["state"]) == 1000
    assert errors["state"].max() < 1e-6 and errors["observation"].max() < 1e-6
    assert errors["reward"].max() == 0 and not errors["terminated"].any()
    recording = load_recording(f"antmaze-{env.maze}")
    assert recording["terminal"].sum() > 3 and (recording["reward"] == recording["terminal"]).all()


def test_walls_matter(env):
    """The recordings touch the walls: in another maze the same steps end elsewhere."""
    other = antmaze.AntMazeEnv("large" if env.maze == "medium" else "medium")
    assert errors_against(f"antmaze-{env.maze}", other, place)["state"].max() > 0.01


# --- Rules
def test_sizes_and_names(env):
    assert env.observation_space.shape == (29,) and env.dt == pytest.approx(0.1)
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (8,), np.float32)
    observation, info = env.reset(seed=0)
    assert observation.shape == (29,) and np.array_equal(info["goal"], env.target_goal)
    assert np.array_equal(observation, env.state_vector())


def test_goals_and_starts_follow_d4rl(env):
    draws = [env.reset(seed=seed) for seed in range(300)]
    goals = np.array([info["goal"] for _, info in draws])
    offsets = goals - GOAL_CORNERS[env.maze]  # the sum of a uniform draw up to 1 and one up to 0.5
    assert offsets.min() >= 0 and offsets.max() <= 1.5
    assert abs(offsets.mean() - 0.75) < 0.05 and abs(offsets.std() - np.hypot(1, 0.5) / 12**0.5) < 0.03
    states = np.array([observation for observation, _ in draws])
    assert np.allclose(np.linalg.norm(states[:, 3:7], axis=1), 1)
    assert abs(states[:, :2]).max() <= 0.1 and abs(states[:, 7:15]).max() <= 0.1
    assert abs(states[:, 2] - 0.75).max() <= 0.1 and abs(states[:, 15:].std() - 0.1) < 0.005


def test_seed_decides_everything(env):
    first, second = [], []
    for episode in (first, second):
        observation, info = env.reset(seed=5)
        np.random.random()  # the global generator has no say
        episode += [observation, info["goal"], env.step(np.full(8, 0.5, np.float32))[0], env.reset()[1]["goal"]]
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(first[1], first[3])  # a new goal at each reset


def test_goal_ends_the_episode(env):
    _, info = env.reset(seed=0, options={"start": (0.2, 0.1), "goal": (0.3, 0.2)})
    assert np.array_equal(info["goal"], (0.3, 0.2)) and np.array_equal(env.data.qpos[:2], (0.2, 0.1))
    _, reward, terminated, truncated, info = env.step(np.zeros(8, np.float32))
    assert (reward, terminated, truncated, info["goal_achieved"]) == (1.0, True, False, True)
    endless = antmaze.AntMazeEnv(env.maze, ends_at_goal=False)
    endless.reset(seed=0, options={"goal": (0, 0)})
    assert endless.step(np.zeros(8, np.float32))[1:3] == (1.0, False)
    env.reset(seed=0)
    assert env.step(np.zeros(8, np.float32))[1:3] == (0.0, False)


def test_actions_beyond_the_bounds_are_clipped(env):
    ends = []
    for scale in (1, 3):
        env.reset(seed=1)
        ends.append(env.step(scale * np.array([1, -1] * 4, np.float32))[0])
    assert np.array_equal(*ends)


def test_bad_arguments_say_what_there_is(env):
    with pytest.raises(ValueError, match="umaze, medium, large"):
        antmaze.AntMazeEnv("huge")
    with pytest.raises(ValueError, match="'target'.*start and goal"):
        env.reset(options={"target": (0, 0)})


def test_pickled_environment_is_the_same_task(env):
    other = pickle.loads(pickle.dumps(antmaze.AntMazeEnv(env.maze, ends_at_goal=False)))
    assert (other.maze, other.ends_at_goal) == (env.maze, False)
    assert np.array_equal(other.reset(seed=2)[0], env.reset(seed=2)[0])
