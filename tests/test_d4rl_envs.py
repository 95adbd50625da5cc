"""d4rl_envs: names, scores, and Hopper, HalfCheetah and Walker2d against recordings of D4RL's own simulators."""

import warnings

import gymnasium
import numpy as np
import pytest
from d4rl_recordings import errors_against, load_recording

pytest.importorskip("d4rl_envs.scores", reason="needs d4rl_envs: pip install ./d4rl_envs")
import d4rl_envs  # noqa: E402

V4 = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
PAPER = [
    *(f"{robot}-{level}-v2" for robot in V4 for level in ("medium", "medium-replay", "medium-expert")),
    *(f"antmaze-{maze}-v2" for maze in ("umaze", "umaze-diverse")),
    *(f"antmaze-{size}-{kind}-v2" for size in ("medium", "large") for kind in ("play", "diverse")),
    *(f"{hand}-binary-v0" for hand in ("pen", "door", "relocate")),
]


def simulator(robot):
    """The environment without its wrappers, made without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gymnasium.make(f"{robot}-medium-v2").unwrapped


# --- Names and scores
def test_names_and_time_limits():
    assert len(PAPER) == 18 and set(PAPER) <= d4rl_envs.TASKS.keys()
    assert len(d4rl_envs.TASKS) == 3 * 5 + 6 + 3 * 4
    for name in d4rl_envs.TASKS:
        if name.startswith("antmaze"):
            limit = 700 if "umaze" in name else 1000
        else:
            limit = {"pen": 100, "door": 200, "relocate": 200}.get(name.split("-")[0], 1000)
        assert gymnasium.spec(name).max_episode_steps == limit


@pytest.mark.parametrize(
    ("name", "episode_return", "score"),
    [
        *(("hopper-medium-v2", 3234.3, 100.0), ("hopper-medium-v2", -20.272305, 0.0)),
        *(("antmaze-umaze-v2", 1.0, 100.0), ("halfcheetah", 5927.4105235, 50.0)),
        *(("door-binary-v0", 2880.5693087298737, 100.0), ("pen-human-v1", 96.262799, 0.0)),
    ],
)
def test_scores(name, episode_return, score):
    assert d4rl_envs.normalized_score(name, episode_return) == pytest.approx(score)


def test_unknown_name_has_no_score():
    with pytest.raises(ValueError, match="no reference scores for 'ant-medium-v2'.*hopper, halfcheetah"):
        d4rl_envs.normalized_score("ant-medium-v2", 0.0)


# --- Locomotion
@pytest.mark.parametrize("robot", V4)
def test_recorded_steps(robot):
    """Measured maxima: state 9.6e-7, reward 6.2e-8, observation 1.0e-13 (HalfCheetah; less for the others)."""
    errors = errors_against(robot, simulator(robot))
    assert len(errors["state"]) == 1000
    assert errors["state"].max() < 1e-5 and errors["reward"].max() < 1e-5 and not errors["terminated"].any()
    assert errors["observation"].max() < 1e-9


@pytest.mark.parametrize("robot", V4)
def test_recordings_tell_stock_v4_from_d4rl(robot):
    """Otherwise test_recorded_steps would hold nothing."""
    recording = load_recording(robot)
    assert recording["terminal"].any() == (robot != "halfcheetah") and (np.abs(recording["action"]) > 1).any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "out of date"
        errors = errors_against(robot, gymnasium.make(V4[robot]).unwrapped)
    assert np.median(errors["state"]) > 1e-3 and errors["reward"].max() > 1e-3


@pytest.mark.parametrize("robot", V4)
def test_reset_draws_from_the_seed_within_d4rls_noise(robot):
    env = simulator(robot)
    (first, _), (second, _), (again, _) = (env.reset(seed=seed) for seed in (0, 1, 0))
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    scale = 0.1 if robot == "halfcheetah" else 0.005
    assert np.abs(env.data.qpos - env.init_qpos).max() <= scale
    assert np.abs(env.data.qvel).max() <= scale * (5 if robot == "halfcheetah" else 1)


@pytest.mark.parametrize("robot", V4)
def test_levels_and_time_limit(robot):
    returns = []
    for level in ("random", "medium-replay"):
        env = gymnasium.make(f"{robot}-{level}-v2", max_episode_steps=5)
        env.reset(seed=3)
        steps = [env.step(np.full(env.action_space.shape, 0.1, np.float32)) for _ in range(5)]
        assert [truncated for *_, truncated, _ in steps] == [False] * 4 + [True]
        returns.append(sum(reward for _, reward, *_ in steps))
    assert returns[0] == returns[1]
