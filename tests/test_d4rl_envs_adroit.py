"""d4rl_envs.adroit: single steps against recordings of D4RL's own simulators, and the rules of the three tasks."""

import os
import pickle

import gymnasium
import h5py
import numpy as np
import pytest
from d4rl_recordings import errors_against, load_recording

adroit = pytest.importorskip("d4rl_envs.adroit", reason="needs d4rl_envs: pip install ./d4rl_envs")
HANDS = {"pen": adroit.PenEnv, "door": adroit.DoorEnv, "relocate": adroit.RelocateEnv}
SIZES = {"pen": (45, 24), "door": (39, 28), "relocate": (39, 30)}
# D4RL's own resets with the seeds 0 and 1 (gym 0.23.1): the target's direction, the handle, the ball from its target
RESETS = {
    "pen": (slice(36, 39), [[-0.4443303, -0.2423405, 0.8624626], [0.783903, -0.0146783, 0.6207097]]),
    "door": (slice(32, 35), [[0.0536962, 0.1269787, 0.2310154], [0.0411822, 0.1950464, 0.2411276]]),
    "relocate": (slice(36, 39), [[0.2246991, 0.164793, -0.277654], [0.1458826, 0.0982489, -0.1773663]]),
}


@pytest.fixture(params=HANDS)
def hand(request):
    return request.param


def place(env, row):
    if isinstance(env, adroit.PenEnv):
        env.model.body_quat[env.target_obj_body_id] = row["body_quat"]
    elif isinstance(env, adroit.DoorEnv):
        env.model.body_pos[env.door_body_id] = row["body_pos"]
    else:
        env.model.body_pos[env.obj_body_id] = row["body_pos"]
        env.model.site_pos[env.target_obj_site_id] = row["site_pos"]


def boxes_touch(env, row):
    """True if two boxes are in contact at any of the five simulation steps of a recorded row."""
    touched, restore = [], env.restore_depths

    def watch(model, data):
        touched.append(data.ncon and restore.is_box[data.contact.geom].all(1).any())
        return restore(model, data)

    env.restore_depths = watch
    place(env, row)
    env.set_state(row["qpos"], row["qvel"])
    env.step(row["action"].astype(np.float32))
    env.restore_depths = restore
    return any(touched)


# --- Physics
def test_steps_like_d4rl(hand):
    """1,000 recorded steps a task: measured at most 1.6e-6 (pen), 1e-6 (door), 4.8e-6 (relocate), but for two boxes.

    Where a box of the palm hits one of the table or the door, MuJoCo may take other corners for contacts than in 2.1.
    """
    env = HANDS[hand]()
    errors, recording = errors_against(hand, env, place), load_recording(hand)
    assert len(errors["state"]) == 1000
    off = (errors["state"] >= 1e-5) | (errors["reward"] >= 1e-5)
    assert off.sum() <= {"pen": 0, "door": 17, "relocate": 5}[hand]
    for t in np.flatnonzero(off):
        assert boxes_touch(env, {key: recording[key][t] for key in recording if len(recording[key]) == 1000})
    if not off.any():
        assert errors["observation"].max() < 1e-5
    assert not errors["terminated"].any() and not errors["goal_achieved"].any()
    assert recording["goal_achieved"].any() and recording["terminal"].any() == (hand == "pen")


def test_resets_like_d4rl(hand):
    env, (part, expected) = HANDS[hand](), RESETS[hand]
    for seed in (0, 1):
        observation, _ = env.reset(seed=seed)
        assert np.allclose(observation[part], expected[seed], atol=1e-7)
        assert not env.data.qvel.any()


def test_sizes(hand):
    env = HANDS[hand]()
    assert (env.observation_space.shape, env.action_space.shape) == tuple((size,) for size in SIZES[hand])
    assert env.action_space == gymnasium.spaces.Box(-1, 1, env.action_space.shape, np.float32)


@pytest.mark.skipif("SAMG_DOOR_HUMAN" not in os.environ, reason="SAMG_DOOR_HUMAN names no door-human file with states")
def test_human_demonstrations_return_what_they_did():
    """Actions of people, played again from the states they began in: the return is the recorded one."""
    with h5py.File(os.environ["SAMG_DOOR_HUMAN"]) as file:
        states = {key: column[:] for key, column in file["metadata/initial_state"].items()}
        actions, rewards = file["actions"][:], file["rewards"][:]
    env, starts, replayed = adroit.DoorEnv(), states.pop("episode_start"), []
    for episode, (first, last) in enumerate(zip(starts, [*starts[1:], len(actions)])):
        env.reset(options={"initial_state_dict": {key: column[episode] for key, column in states.items()}})
        replayed.append(sum(env.step(action)[1] for action in actions[first:last]))
    recorded = np.add.reduceat(rewards, starts)
    print(f"replayed {np.mean(replayed):.2f}, recorded {recorded.mean():.2f}")
    assert abs(np.mean(replayed) - recorded.mean()) < 5


# --- Rules
def hold(env, value):
    """Put the door's hinge where the goal is reached or not, and take one step."""
    qpos = env.init_qpos.copy()
    qpos[env.door_hinge_addrs] = value
    env.set_state(qpos, env.init_qvel)
    return env.step(np.zeros(28, np.float32))


def test_success_needs_more_than_25_steps_at_the_goal():
    env = adroit.DoorEnv()
    env.reset(seed=0)
    infos = [hold(env, 1.5)[4] for _ in range(26)]
    assert all(info["goal_achieved"] for info in infos)
    assert [info["success"] for info in infos] == [False] * 25 + [True]
    assert hold(env, 0.0)[4] == {"goal_achieved": False, "success": True}
    env.reset(seed=0)
    assert hold(env, 1.5)[4] == {"goal_achieved": True, "success": False}


@pytest.mark.parametrize("ends_at_goal", [True, False])
def test_binary_task_ends_at_the_goal_unless_told_not_to_and_tells_the_dense_reward(ends_at_goal):
    env, dense = adroit.DoorEnv("binary", ends_at_goal), adroit.DoorEnv()
    env.reset(seed=0)
    dense.reset(seed=0)
    for angle, goal in ((0.0, False), (1.5, True)):
        *step, info = hold(env, angle)[1:]
        assert step == [goal - 1.0, goal and ends_at_goal, False]
        assert info == {"goal_achieved": goal, "success": goal, "dense_reward": hold(dense, angle)[1]}


@pytest.mark.parametrize("reward_type", ["dense", "binary"])
def test_dropped_pen(reward_type):
    """It ends D4RL's episode; in Cal-QL's task, where every step costs, dropping the pen must not be a way out."""
    env, recording = adroit.PenEnv(reward_type), load_recording("pen")
    env.reset(seed=0)
    last = np.flatnonzero(recording["terminal"])[0]
    env.set_state(recording["qpos"][last], recording["qvel"][last])
    observation, reward, terminated, _, info = env.step(recording["action"][last].astype(np.float32))
    assert observation[26] < 0.075 and not info["goal_achieved"]
    assert terminated == (reward_type == "dense") and (reward == -1 if reward_type == "binary" else reward < -4)


def test_unknown_reward_type():
    with pytest.raises(ValueError, match="dense or binary, not 'sparse'"):
        adroit.PenEnv("sparse")


def test_pickled_environment_is_the_same_task(hand):
    env = pickle.loads(pickle.dumps(HANDS[hand]("binary", ends_at_goal=False)))
    assert env.binary and not env.ends_at_goal and np.array_equal(env.reset(seed=3)[0], HANDS[hand]().reset(seed=3)[0])
