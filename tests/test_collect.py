"""tools/data/collect.py and policies.py: what is in the files, and that nothing but the arguments decides it."""

import hashlib
import os
import pickle
import resource
import signal
import subprocess
import sys

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, load_module
from d4rl_recordings import load_recording
from scipy.sparse.csgraph import shortest_path

from d4rl_envs import sources

antmaze = pytest.importorskip("d4rl_envs.antmaze", reason="needs d4rl_envs: pip install ./d4rl_envs")
SIZES = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (29, 8)}
KILLED = """
import os, signal, sys
sys.path.insert(0, "tools/data")
import collect
import numpy as np
collect.BLOCK, savez, calls = 100, np.savez, []
def dying_savez(file, **columns):
    calls.append(savez(file, **columns))
    if len(calls) == 3:
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
np.savez = dying_savez
collect.main()
"""


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools/data")
        yield load_module("tools/data/collect.py")


def write_policies(path, observation, action, means, seed=0):
    """Policies with the given mean actions (if None, random ones), which hardly vary."""
    rng, n, width = np.random.default_rng(seed), len(means), 8
    shapes = {"w0": (observation, width), "b0": width, "w1": (width, width), "b1": width}
    shapes |= {"w2": (width, 2 * action), "b2": 2 * action}
    layers = {name: rng.normal(size=(n, *np.atleast_1d(shape))) for name, shape in shapes.items()}
    for i, mean in enumerate(means):
        if mean is not None:
            layers["w2"][i], layers["b2"][i, :action], layers["b2"][i, action:] = 0, np.arctanh(mean), -20
    layers = {name: layer.astype(np.float32) for name, layer in layers.items()}
    np.savez(path, steps=np.arange(n), scores=10.0 * np.arange(n), **layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Policies: on the way 0.1, 0.2; medium 0.3, expert 0.4 in each action. The halfcheetah's and the ant's: random."""
    folder = tmp_path_factory.mktemp("policies")
    for robot, sizes in SIZES.items():
        write_policies(
            folder / f"{robot}.npz", *sizes, [None] * 3 if robot in ("halfcheetah", "ant") else [0.1, 0.2, 0.3, 0.4]
        )
    return folder


@pytest.fixture
def collect(tool, folder, tmp_path, monkeypatch, capsys):
    """collect("hopper-medium", "--rows 100", output="a.hdf5"): error line, facts and columns of the command line."""
    monkeypatch.chdir(tmp_path)

    def collect(task, words="", output="out.hdf5"):
        words = [task, *words.split(), "--output", output]
        if "--policies" not in words:
            words += ["--policies", str(folder)]
        if "--workers" not in words:
            words += ["--workers", "1"]
        monkeypatch.setattr(sys, "argv", ["collect.py", *words])
        handler, message = signal.getsignal(signal.SIGTERM), ""
        try:
            tool.main()
        except SystemExit as stop:
            message = str(stop)
        finally:
            signal.signal(signal.SIGTERM, handler)
        lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
        return message, dict(lines), read(output) if not message else {}

    return collect


def read(path):
    columns = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: columns.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
    return columns


def short(tool, monkeypatch, task, limit):
    """Episodes of limit + 1 rows in an antmaze task."""
    entry, _, arguments = tool.d4rl_envs.TASKS[task]
    monkeypatch.setitem(tool.d4rl_envs.TASKS, task, (entry, limit, arguments))


def episodes_of(columns):
    """Slices."""
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"]) + 1
    return [slice(first, last) for first, last in zip([0, *ends], ends)]


# --- Locomotion
@pytest.mark.parametrize("task", ["hopper-random", "hopper-medium-v2", "walker2d-expert", "halfcheetah-medium"])
def test_locomotion_file(task, collect):
    message, facts, columns = collect(task, "--rows 150 --seed 3")
    assert not message and os.listdir() == ["out.hdf5"]
    robot, n = task.split("-")[0], len(columns["rewards"])
    (obs, act), half = SIZES[robot], (SIZES[robot][0] + 1) // 2
    shapes = {"observations": (n, obs), "actions": (n, act), "next_observations": (n, obs), "rewards": (n,)}
    shapes |= {"terminals": (n,), "timeouts": (n,), "infos/qpos": (n, half), "infos/qvel": (n, half)}
    assert {name: column.shape for name, column in columns.items()} == shapes
    kinds = {name: column.dtype for name, column in columns.items()}
    assert kinds == {name: bool if name in ("terminals", "timeouts") else np.float32 for name in shapes}
    episodes = episodes_of(columns)
    assert episodes[-1].stop == n and 150 <= n < 150 + episodes[-1].stop - episodes[-1].start
    assert not (columns["terminals"] & columns["timeouts"]).any()
    assert columns["timeouts"].sum() == (robot == "halfcheetah")  # 1,000 rows; the others fall soon
    for rows in episodes:
        later, earlier = columns["observations"][rows][1:], columns["next_observations"][rows][:-1]
        assert np.array_equal(later, earlier)
    returns = [columns["rewards"][rows].sum(dtype=np.float64) for rows in episodes]
    assert int(facts["rows"]) == n and int(facts["episodes"]) == len(episodes)
    assert int(facts["terminals"]) == columns["terminals"].sum() and int(facts["timeouts"]) == columns["timeouts"].sum()
    assert abs(float(facts["mean_return"]) - np.mean(returns)) < 1e-3

    env = gymnasium.make(f"{robot}-medium-v2").unwrapped  # qpos and qvel are of before the step
    env.reset(seed=0)
    for t in range(0, n, 29):
        env.set_state(columns["infos/qpos"][t], columns["infos/qvel"][t])
        assert np.allclose(env._get_obs(), columns["observations"][t], atol=1e-6)
        successor, reward, terminated, *_ = env.step(columns["actions"][t])
        assert np.allclose(successor, columns["next_observations"][t], atol=1e-3, rtol=1e-3)
        assert abs(reward - columns["rewards"][t]) < 1e-3 and terminated == columns["terminals"][t]


def test_a_fall_in_the_last_step_is_no_timeout(tool):
    def ends(**limit):
        rows = tool.run(gymnasium.make("hopper-random-v2", **limit), "", None, np.random.default_rng(0))
        return len(rows), rows[-1][4:6]

    length, flags = ends()
    assert flags == (True, False) == ends(max_episode_steps=length)[1]
    assert ends(max_episode_steps=length - 1) == (length - 1, (False, True))


def test_random_actions_are_uniform(collect):
    actions = collect("hopper-random", "--rows 1500")[2]["actions"]
    histogram = np.histogram(actions, bins=4, range=(-1, 1))[0] / actions.size
    assert abs(histogram - 0.25).max() < 0.03 and abs(actions).max() <= 1


@pytest.mark.parametrize(
    "level, parts",
    [("medium", [0.3]), ("expert", [0.4]), ("medium-expert", [0.3, 0.4]), ("medium-replay", [0.1, 0.2, 0.3])],
)
def test_each_policy_has_its_share_of_the_rows_in_order(level, parts, collect):
    columns = collect(f"walker2d-{level}", "--rows 600")[2]
    first = columns["actions"][:, 0].round(4)
    assert np.allclose(columns["actions"], first[:, None], atol=1e-4)
    assert np.array_equal(list(dict.fromkeys(first.tolist())), np.float32(parts)) and (np.diff(first) >= 0).all()
    longest = max(rows.stop - rows.start for rows in episodes_of(columns))
    for part in parts:
        assert abs((first == np.float32(part)).sum() - 600 / len(parts)) < longest


def test_content_sha256_is_of_names_types_and_bytes(collect):
    facts, columns = collect("hopper-medium", "--rows 100")[1:]
    digest = hashlib.sha256()
    for name in ("observations", "actions", "next_observations", "rewards", "terminals", "timeouts"):
        column = columns[name]
        digest.update(f"{name} {column.dtype.str} {column.shape[1:]}".encode() + column.tobytes())
    for name in ("infos/qpos", "infos/qvel"):
        digest.update(f"{name} <f4 (6,)".encode() + columns[name].tobytes())
    with h5py.File("out.hdf5") as file:
        attributes = dict(file.attrs)
    assert digest.hexdigest() == facts["content_sha256"] == attributes["content_sha256"]
    assert attributes["task"] == "hopper-medium-v2" and attributes["seed"] == 0
    assert list(attributes["policy_scores"]) == [20.0] and "not a D4RL data set" in attributes["note"]


def test_algorithms_load_the_file(collect, awac):
    columns = collect("hopper-medium", "--rows 100", "hopper-medium-v2.hdf5")[2]
    path = sources.find(".", "hopper-medium-v2")
    rows, returns = awac.load_dataset(path, awac.Environment("hopper-medium-v2"))
    assert np.array_equal(rows[:, :14], np.hstack((columns["observations"], columns["actions"])))
    assert len(rows) == len(columns["rewards"]) and len(returns) == len(episodes_of(columns))


def test_default_sizes_and_names_are_d4rls(tool, monkeypatch):
    expected = {"hopper-random": 1_000_000, "hopper-medium": 1_000_000, "walker2d-medium-expert": 2_000_000}
    expected |= {f"{robot}-medium-replay": rows for robot, rows in tool.REPLAY_ROWS.items()}
    expected |= {"antmaze-umaze": 1_000_000, "antmaze-large-diverse": 1_000_000}
    for task, rows in expected.items():
        monkeypatch.setattr(sys, "argv", ["collect.py", task])
        args = tool.parse_args()
        assert (args.rows, str(args.output), args.seed) == (rows, f"{task}-v2.hdf5", 0)


# --- AntMaze
def relabel_by_hand(observations, goal):
    rewards = []
    for following in [*observations[1:], None]:
        rewards.append(following is not None and (following[0] - goal[0]) ** 2 + (following[1] - goal[1]) ** 2 <= 0.25)
    return np.array(rewards)


def test_antmaze_umaze_file(collect):
    message, facts, columns = collect("antmaze-umaze", "--rows 1")
    assert not message and "next_observations" not in columns
    widths = {"observations": (29,), "actions": (8,), "rewards": (), "terminals": (), "timeouts": ()}
    widths |= {"infos/goal": (2,), "infos/qpos": (15,), "infos/qvel": (14,)}
    assert {name: column.shape for name, column in columns.items()} == {key: (701, *w) for key, w in widths.items()}
    assert np.flatnonzero(columns["timeouts"]).tolist() == [700] and int(facts["episodes"]) == 1
    state = np.hstack((columns["infos/qpos"], columns["infos/qvel"]))
    assert np.array_equal(state, columns["observations"]) and abs(columns["actions"]).max() == 1

    env = antmaze.AntMazeEnv("umaze")
    env.reset(seed=0)
    for t in range(0, 700, 50):
        env.set_state(columns["infos/qpos"][t], columns["infos/qvel"][t])
        assert np.allclose(env.step(columns["actions"][t])[0], columns["observations"][t + 1], atol=1e-3, rtol=1e-3)


# Starts and goals: metres from the start cell's centre, at most
@pytest.mark.parametrize("task", ["antmaze-umaze-v2", "antmaze-umaze-diverse-v2", "antmaze-medium-play-v2"])
def test_antmaze_starts_goals_and_rewards(task, collect, tool, monkeypatch):
    short(tool, monkeypatch, task, 2)
    columns = collect(task, "--rows 180")[2]
    assert np.flatnonzero(columns["timeouts"]).tolist() == list(range(2, 180, 3))
    starts, goals = columns["observations"][::3, :2], columns["infos/goal"].reshape(60, 3, 2)
    assert (goals == goals[:, :1]).all() and len(np.unique(goals[:, 0], axis=0)) == 60
    env = antmaze.AntMazeEnv(tool.d4rl_envs.TASKS[task][2]["maze"])
    free = {tuple(antmaze.cell_to_xy(env.maze, cell)) for cell in antmaze.cells(env.maze, ".SG")}
    last = tuple(antmaze.cell_to_xy(env.maze, antmaze.cells(env.maze, "G")[0]))
    for points, fixed, low, high in (
        (starts, (0, 0) if task == "antmaze-umaze-v2" else None, -0.1, 1),
        (goals[:, 0], None if "diverse" in task else last, 0, 1.5),
    ):
        cells = (points + 0.5).astype(int) // 4 * 4.0
        assert (points - cells).min() >= low and (points - cells).max() <= high
        found = set(map(tuple, cells))
        assert found == ({fixed} if fixed else found) and found <= free and (fixed or len(found) > len(free) / 2)
    with h5py.File("out.hdf5") as file:
        target = file.attrs["target_goal"]
    assert 0 <= (target - last).min() and (target - last).max() <= 1.5
    expected = relabel_by_hand(columns["observations"], target)
    assert np.array_equal(columns["terminals"], expected) and np.array_equal(columns["rewards"], expected)


def test_relabelling_is_by_the_next_row(tool):
    xy, goal = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32), np.array((0.3, -0.2))
    near = tool.relabel(xy, goal)
    assert 20 < near.sum() < 200 and np.array_equal(near, relabel_by_hand(xy, goal))


def test_next_waypoints(tool):
    goal = np.array((1.2, 8.7))
    on_the_way = {
        (0, 0): (4, 0),
        (1.9, 1): (4, 0),
        (5, 1): (8, 0),
        (8, 1.9): (8, 4),
        (8.5, 2.5): (8, 8),
        (7, 9): (4, 8),
    }
    for xy, expected in on_the_way.items():
        assert np.array_equal(tool.waypoint("umaze", np.array(xy), goal), expected)
    for xy in ((4, 8), (1.5, 7), (0, 4)):  # the cell before the goal's, the goal's own, inside the wall
        assert np.array_equal(tool.waypoint("umaze", np.array(xy), goal), goal)


@pytest.mark.parametrize("maze", antmaze.MAZES)
def test_ways_are_shortest(maze, tool):
    free = antmaze.cells(maze, ".SG")
    beside = [[abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1 for b in free] for a in free]
    distances = shortest_path(np.array(beside, float), unweighted=True)
    for j, goal in enumerate(free):
        following = tool.shortest_paths(maze, goal)
        assert set(following) == set(free)
        for i, cell in enumerate(free):
            steps = 0
            while cell != goal:
                assert beside[free.index(cell)][free.index(following[cell])]
                cell, steps = following[cell], steps + 1
            assert steps == distances[i, j]


# --- Nothing but the arguments decides the data
def test_workers_do_not_matter(collect):
    one, two, other = (
        collect("hopper-medium-expert", f"--rows 300 {words}", output)[1]["content_sha256"]
        for words, output in (("", "one.hdf5"), ("--workers 2", "two.hdf5"), ("--seed 1", "other.hdf5"))
    )
    assert one == two != other


def test_an_episode_depends_on_seed_and_number(collect, tool, folder):
    columns = collect("walker2d-expert", "--rows 200 --seed 4")[2]
    for number, rows in enumerate(episodes_of(columns)):
        episode = tool.run_episode("walker2d-expert-v2", folder / "walker2d.npz", 3, 4, number)
        assert all(np.array_equal(episode[name], columns[name][rows]) for name in columns)


def test_interruption_does_not_matter(collect, tool, monkeypatch):
    monkeypatch.setattr(tool, "BLOCK", 100)
    whole = collect("hopper-medium-replay", "--rows 800", "whole.hdf5")[1]
    run_episode, calls = tool.run_episode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return run_episode(*arguments)

    monkeypatch.setattr(tool, "run_episode", interrupted)
    message = collect("hopper-medium-replay", "--rows 800")[0]
    assert "interrupted" in message and not os.path.exists("out.hdf5") and os.path.isdir("out.hdf5.part")
    done = len(calls)
    facts = collect("hopper-medium-replay", "--rows 800")[1]
    assert facts == whole and len(calls) - done == int(whole["episodes"]) - 19  # none of them a second time
    assert sorted(os.listdir()) == ["out.hdf5", "whole.hdf5"]


def test_kill_in_the_middle_of_a_write_does_not_matter(collect, folder, tmp_path):
    whole = collect("hopper-medium", "--rows 800", "whole.hdf5")[1]
    words = [
        "hopper-medium",
        "--rows",
        "800",
        "--workers",
        "1",
        "--policies",
        folder,
        "--output",
        tmp_path / "out.hdf5",
    ]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], cwd=ROOT, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    blocks = sorted(name for name in os.listdir("out.hdf5.part") if name.endswith(".npz"))
    assert len(blocks) == 2 and len(os.listdir("out.hdf5.part")) == 4  # beside them the arguments, and half a block
    assert collect("hopper-medium", "--rows 800")[1] == whole and not os.path.exists("out.hdf5.part")


def test_rows_of_other_arguments_are_not_mixed(collect, tool, monkeypatch):
    monkeypatch.setattr(tool, "collect", lambda *arguments: tool.fail("stopped"))
    assert collect("hopper-medium", "--rows 100")[0] == "error: stopped"
    for words, name in (("--rows 100 --seed 1", "seed 0, not 1"), ("--rows 200", "rows 100, not 200")):
        message = collect("hopper-medium", words)[0]
        assert name in message and "out.hdf5.part" in message and message.startswith("error: ")


def test_full_disk_loses_nothing(collect, tool, monkeypatch):
    """The limit on a file's size stands for the disk's."""
    whole = collect("hopper-medium", "--rows 1000", "whole.hdf5")[1]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for block, words in ((20_000, "cannot keep rows in out.hdf5.part"), (100, "cannot write out.hdf5")):
        monkeypatch.setattr(tool, "BLOCK", block)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        try:
            message = collect("hopper-medium", "--rows 1000")[0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert words in message and "File too large" in message and "\n" not in message
        assert sorted(os.listdir()) == ["out.hdf5.part", "whole.hdf5"]
    assert collect("hopper-medium", "--rows 1000")[1] == whole


# --- Adroit
@pytest.fixture(params=["pen", "door", "relocate"])
def demonstrations(request, tmp_path):
    """hand_dapg's layout: two of random actions, some of them beyond the bounds, with what the simulator returned."""
    env, rng, demos = gymnasium.make(f"{request.param}-human-v1").unwrapped, np.random.default_rng(0), []
    for seed, length in enumerate((9, 5)):
        observation, _ = env.reset(seed=seed)
        state, actions, rewards, observations = (
            env.get_env_state(),
            rng.uniform(-1.2, 1.2, (length, env.model.nu)),
            [],
            [],
        )
        for action in np.float32(actions):
            observations.append(observation)
            observation, reward, *_ = env.step(action)
            rewards.append(reward)
        demos.append({"actions": actions, "observations": np.array(observations), "rewards": np.array(rewards)})
        demos[-1] |= {"init_state_dict": state | {"evaluated": True}}
    (tmp_path / "demos.pickle").write_bytes(pickle.dumps(demos))
    return request.param, demos


def test_adroit_replay(demonstrations, collect):
    hand, demos = demonstrations
    message, facts, columns = collect(f"{hand}-human", "--demonstrations demos.pickle")
    assert not message and int(facts["rows"]) == 14 and int(facts["episodes"]) == 2
    for name in ("observations", "rewards"):
        assert np.allclose(columns[name], np.concatenate([demo[name] for demo in demos]), atol=1e-5)
    assert np.array_equal(
        columns["actions"], np.float32(np.concatenate([demo["actions"] for demo in demos])).clip(-1, 1)
    )
    assert np.flatnonzero(columns["timeouts"]).tolist() == [8, 13] and not columns["terminals"].any()
    assert columns["metadata/initial_state/episode_start"].tolist() == [0, 9]
    for t, demo in zip((0, 9), demos):
        assert np.allclose(columns["infos/qpos"][t], demo["init_state_dict"]["qpos"], atol=1e-6)
    again = collect(f"{hand}-human", "--demonstrations out.hdf5", "again.hdf5")[1]  # its own file has all that it takes
    assert again["content_sha256"] == facts["content_sha256"]


def test_a_dropped_pen_ends_its_demonstration(collect, tmp_path):
    recording = load_recording("pen")
    last = np.flatnonzero(recording["terminal"])[0]
    state = {"qpos": recording["qpos"], "qvel": recording["qvel"], "desired_orien": recording["body_quat"]}
    state = {name: column[last] for name, column in state.items()}
    demo = {"actions": np.tile(recording["action"][last], (6, 1)), "init_state_dict": state}
    (tmp_path / "demos.pickle").write_bytes(pickle.dumps([demo]))
    columns = collect("pen-human", "--demonstrations demos.pickle")[2]
    assert columns["terminals"].tolist() == [True] and columns["timeouts"].tolist() == [False]


# --- Policies
def test_actor_is_the_network(tool):
    from policies import GRID, Actor

    torch.manual_seed(0)
    layers = [torch.nn.Linear(*shape) for shape in ((11, 16), (16, 16), (16, 6))]
    actor = Actor([part for layer in layers for part in (layer.weight.detach().numpy().T, layer.bias.detach().numpy())])
    network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    for _ in range(20):
        observation, noise = torch.randn(11), torch.randn(3)
        mean, log_std = network(observation).chunk(2)
        expected = torch.tanh(mean + log_std.exp() * noise).detach().numpy()
        action = actor(observation.numpy(), noise.numpy())
        assert action.dtype == np.float32 and np.abs(action - expected).max() < 1e-5 + 0.5 / GRID
        assert np.array_equal(action * GRID, np.round(action * GRID))


@pytest.fixture
def open_ground(monkeypatch):
    """(environment, random states): an ant without walls, on its feet and moving."""
    monkeypatch.setitem(antmaze.MAZES, "open", ("SG",))
    env, rng, states = antmaze.AntMazeEnv("open", ends_at_goal=False), np.random.default_rng(0), []
    for seed in range(6):
        env.reset(seed=seed)
        for _ in range(6):
            env.step(rng.uniform(-1, 1, 8).astype(np.float32))
        states.append((env.data.qpos.copy(), env.data.qvel.copy()))
        yaw = rng.uniform(-np.pi, np.pi)
        states[-1][0][3:7] = multiply((np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)), states[-1][0][3:7])
    return env, states


def multiply(p, q):
    """Product of quaternions (w, x, y, z)."""
    (a, *u), (b, *v) = p, q
    return np.array((a * b - np.dot(u, v), *(a * np.array(v) + b * np.array(u) + np.cross(u, v))))


QUARTER = np.array((0.5**0.5, 0, 0, 0.5**0.5))
TURN = np.array(((0, -1, 0), (1, 0, 0), (0, 0, 1.0)))


def turn_world(qpos, qvel):
    """The same ant on ground turned by 90 degrees; MuJoCo has the angular velocity in the body's frame."""
    xyz, quaternion, linear = TURN @ qpos[:3], multiply(QUARTER, qpos[3:7]), TURN @ qvel[:3]
    return np.concatenate((xyz, quaternion, qpos[7:])), np.concatenate((linear, qvel[3:]))


def turn_body(qpos, qvel):
    """The same ant, but its legs are called otherwise: its frame is turned by 90 degrees, and its first leg the second.

    Two ankles bend the other way: those of the legs at -x.
    """
    signs = np.array(((1, 1), (1, -1), (1, -1), (1, 1)))
    legs = [(np.roll(joints.reshape(4, 2) * signs, -1, axis=0) * signs).ravel() for joints in (qpos[7:], qvel[6:])]
    quaternion, angular = multiply(qpos[3:7], QUARTER), TURN.T @ qvel[3:6]
    return np.concatenate((qpos[:3], quaternion, legs[0])), np.concatenate((qvel[:3], angular, legs[1]))


def view(state, direction):
    from policies import face

    return face(np.concatenate(state), direction)


def test_the_view_turns_with_the_world(tool, open_ground):
    rng = np.random.default_rng(1)
    for state in open_ground[1]:
        angle = rng.uniform(-np.pi, np.pi)
        direction = np.array((np.cos(angle), np.sin(angle)))
        seen, quarter = view(state, direction)
        turned, turned_quarter = view(turn_world(*state), TURN[:2, :2] @ direction)
        assert np.abs(seen - turned).max() < 1e-12 and quarter == turned_quarter
        assert seen.shape == (29,) and seen[1] > 0.5**0.5 * np.hypot(seen[1], seen[2]) - 1e-9  # within 45 degrees


def test_legs_can_change_names(tool, open_ground):
    """The view is the same, and the same action of the policy leads to the same ant under the other names."""
    from policies import act

    (env, states), rng, direction, quarters = open_ground, np.random.default_rng(2), np.array((0.6, 0.8)), set()
    for state in states:
        action, results = rng.uniform(-1, 1, 8), []
        for case in (state, turn_body(*state)):
            seen, quarter = view(case, direction)
            env.set_state(*case)
            feet = env.data.geom_xpos[env.model.geom_bodyid > 0]
            results.append((seen, feet[np.lexsort(feet.round(6).T)]))
            env.step(act(action, quarter))
            results[-1] += ((env.data.qpos.copy(), env.data.qvel.copy()), quarter)
        (seen, feet, after, quarter), (other_seen, other_feet, other_after, other_quarter) = results
        assert np.abs(seen - other_seen).max() < 1e-12 and np.abs(feet - other_feet).max() < 1e-12
        assert (other_quarter - quarter) % 4 in (1, 3)
        expected = turn_body(*after)
        expected[0][3:7] *= np.sign(expected[0][3:7] @ other_after[0][3:7])
        assert np.abs(np.concatenate(expected) - np.concatenate(other_after)).max() < 1e-6
        quarters |= {quarter, other_quarter}
    assert quarters == {0, 1, 2, 3}


@pytest.mark.parametrize("robot", SIZES)
def test_shipped_policies(robot, tool):
    if not (path := ROOT / f"data/policies/{robot}.npz").is_file():
        pytest.skip(f"no {path.name}")
    actors, scores = tool.load_policies(path)
    observation, action = SIZES[robot]
    assert actors[0](np.zeros(observation), np.zeros(action)).shape == (action,)
    assert len(scores) == len(actors) and len(actors) >= (1 if robot == "ant" else 3) and scores[-1] == scores.max()


def test_shipped_ant_reaches_the_goal(collect):
    if not (ROOT / "data/policies/ant.npz").is_file():
        pytest.skip("no ant.npz")
    assert float(collect("antmaze-umaze", f"--rows 1 --policies {ROOT / 'data/policies'}")[1]["reached_own_goal"]) == 1


# --- Errors
@pytest.mark.parametrize(
    "task, words, names",
    [
        ("hoper-medium", "", ["hoper-medium", "did you mean hopper-medium"]),
        ("door-binary-v0", "", ["door-binary-v0"]),
        ("hopper-medium", "--rows 0", ["--rows", "at least 1"]),
        ("hopper-medium", "--workers 0", ["--workers", "at least 1"]),
        ("hopper-medium", "--seed -1", ["--seed"]),
        ("hopper-medium", "--policies nowhere", ["no policy file nowhere/hopper.npz", "--policies"]),
        ("hopper-medium", "--demonstrations x", ["--demonstrations", "no use"]),
        ("door-human", "", ["--demonstrations", "hand_dapg"]),
        ("door-human", "--rows 5 --demonstrations x", ["--rows", "no use"]),
        ("door-human", "--demonstrations nowhere.pickle", ["no such file", "nowhere.pickle"]),
        ("pen-cloned", "", ["pen-human"]),
    ],
)
def test_bad_arguments(task, words, names, collect):
    message = collect(task, words)[0]
    assert message.startswith("error: ") and "\n" not in message and not os.listdir()
    assert all(name in message for name in names), message


def test_bad_places(collect, tmp_path):
    (tmp_path / "there.hdf5").write_text("precious")
    assert "there.hdf5 exists already" in collect("hopper-medium", "", "there.hdf5")[0]
    assert "no such writable folder: nowhere" in collect("hopper-medium", "", "nowhere/out.hdf5")[0]
    assert (tmp_path / "there.hdf5").read_text() == "precious" and os.listdir() == ["there.hdf5"]


def test_bad_policy_files(collect, folder, tmp_path):
    good = (folder / "hopper.npz").read_bytes()
    with np.load(folder / "hopper.npz") as file:
        arrays = dict(file)
    broken = arrays | {"w1": np.full_like(arrays["w1"], np.nan)}
    for content in (
        b"",
        b"no npz",
        good[: len(good) // 2],
        (folder / "ant.npz").read_bytes(),
        broken,
        {"scores": [1.0]},
    ):
        if isinstance(content, bytes):
            (tmp_path / "hopper.npz").write_bytes(content)
        else:
            np.savez(tmp_path / "hopper.npz", **content)
        message = collect("hopper-medium", "--policies .")[0]
        assert "hopper.npz is not a policy file for hopper-medium-v2" in message and "\n" not in message
    write_policies(tmp_path / "hopper.npz", 11, 3, [0.1])
    assert "1 policies, too few for medium" in collect("hopper-medium", "--policies .")[0]


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "content, name",
    [
        (b"no pickle", "UnpicklingError"),
        (pickle.dumps(Code()), "mkdir"),
        (pickle.dumps([]), "no demonstrations"),
        (pickle.dumps([{"actions": np.zeros((3, 28))}]), "init_state_dict"),
        (pickle.dumps([{"actions": np.zeros((3, 28)), "init_state_dict": {"qpos": np.zeros(30)}}]), "qvel"),
    ],
)
def test_bad_demonstrations(content, name, collect, tmp_path):
    (tmp_path / "demos.pickle").write_bytes(content)
    message = collect("door-human", "--demonstrations demos.pickle")[0]
    assert "demos.pickle holds no demonstrations of door" in message and name in message and "\n" not in message
    assert os.listdir() == ["demos.pickle"]


def test_demonstrations_of_another_size(collect, tmp_path):
    state = {"qpos": np.zeros(30), "qvel": np.zeros(30), "door_body_pos": np.zeros(3)}
    for change, actions in (({"qpos": np.zeros(7)}, 28), ({}, 24)):
        demo = {"actions": np.zeros((3, actions)), "init_state_dict": state | change}
        (tmp_path / "demos.pickle").write_bytes(pickle.dumps([demo]))
        message = collect("door-human", "--demonstrations demos.pickle")[0]
        assert "demonstration 0 does not fit door-human-v1" in message and "\n" not in message


def test_damaged_block(collect, tool, monkeypatch):
    monkeypatch.setattr(tool, "BLOCK", 100)
    run_collect = tool.collect
    monkeypatch.setattr(tool, "collect", lambda *arguments: run_collect(*arguments) or tool.fail("stopped"))
    assert collect("hopper-medium", "--rows 400")[0] == "error: stopped"
    blocks = sorted(name for name in os.listdir("out.hdf5.part") if name.endswith(".npz"))
    with open(f"out.hdf5.part/{blocks[1]}", "r+b") as file:
        file.truncate(100)
    message = collect("hopper-medium", "--rows 400")[0]
    assert f"{blocks[1]} is damaged" in message and "\n" not in message
    for name in blocks[1:]:
        os.remove(f"out.hdf5.part/{name}")
    monkeypatch.setattr(tool, "collect", run_collect)
    facts = collect("hopper-medium", "--rows 400")[1]
    assert facts == collect("hopper-medium", "--rows 400", "whole.hdf5")[1]


def test_without_the_simulators(collect, tool, monkeypatch):
    monkeypatch.setattr(tool, "d4rl_envs", None)
    assert "pip install ./d4rl_envs" in collect("hopper-medium")[0]
