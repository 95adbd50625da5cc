"""Data sets other than one HDF5 file: a folder of files, Minari's, and Cal-QL's files of the binary Adroit tasks."""

import io
import json
import pickle
import sys
import warnings
from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
from runs import TINY, check_resumes, numbers, only_folder

OBS, ACT = 3, 1  # Pendulum's
ENV = SimpleNamespace(name="pen-binary-v0", obs_dim=OBS, act_dim=ACT, action_low=-np.ones(1), action_high=np.ones(1))


def assert_one_line(stop, *words):
    message = stop.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert str(word) in message, f"{word!r} is not named in: {message}"


# --- A folder
@pytest.mark.parametrize(
    ("env", "names"),
    [
        ("hopper-medium-replay-v2", ["hopper_medium_replay-v2.hdf5", "hopper-medium-replay-v2.hdf5"]),
        ("antmaze-umaze-v2", ["Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"]),
        ("door-cloned-v1", ["door-cloned-v1.hdf5"]),
        ("Hopper-v4", ["Hopper-v4.hdf5"]),
        ("pen-binary-v0", ["pen-binary-v0.hdf5"]),
    ],
)
def test_a_folder_holds_an_environments_file_by_its_name(awac, tmp_path, monkeypatch, env, names):
    monkeypatch.setattr(awac, "DATASET_HOST", "nowhere:")
    (tmp_path / "walker2d_medium-v2.hdf5").touch()
    with pytest.raises(SystemExit) as stop:
        awac.find_dataset(env, str(tmp_path))
    assert_one_line(stop, tmp_path, "--dataset", *(names if "binary" not in env else ["pen2_sparse.npy"]))
    for name in reversed(names):  # with both, D4RL's own name
        (tmp_path / name).touch()
        assert awac.find_dataset(env, str(tmp_path)) == tmp_path / name


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


@pytest.fixture(scope="session")
def minari_folder(tmp_path_factory):
    """Local data sets test/hopper-v0, test/pendulum-v0 and test/dict-v0; what they were made of, by name."""
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
        space = gymnasium.spaces.Dict({"state": gymnasium.spaces.Box(-9, 9, (3,))})
        states, *rest = made["pendulum"][0]
        states = {"state": np.array(states, np.float32)}
        store("dict", None, [(states, *rest)], observation_space=space, action_space=gymnasium.spaces.Box(-2, 2, (1,)))
    return folder, made


@pytest.fixture
def minari_sets(minari_folder, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(minari_folder[0]))
    return minari_folder[1]


SHORT = TINY | {"offline_iterations": 60, "vae_iterations": 20, "online_iterations": 80, "warmup_steps": 20}
SHORT |= {"coefficient_frequency": 40, "checkpoint_frequency": 20, "eval_frequency": 40}
HOPPER, PENDULUM, DICT = "minari:test/hopper-v0", "minari:test/pendulum-v0", "minari:test/dict-v0"


@pytest.mark.parametrize("name", [HOPPER, PENDULUM])
def test_rows_of_a_minari_data_set_equal_a_slow_loops(awac, minari_sets, name):
    env, expected, returns = awac.Environment(name), [], []
    for states, actions, rewards, terminals in minari_sets[name[12:-3]]:
        for i, (action, reward, terminal) in enumerate(zip(actions, rewards, terminals)):
            end = i == len(rewards) - 1
            expected.append(np.concatenate((states[i], action, [reward], states[i + 1], [terminal, 0, end])))
        returns.append(sum(rewards))
    rows, found_returns = awac.load_dataset(awac.find_dataset(name, name), env)
    np.testing.assert_array_equal(rows, np.array(expected, np.float32))
    np.testing.assert_allclose(found_returns, returns, rtol=1e-5)  # an episode that nothing ended is one all the same
    terminals = sum(any(episode[3]) for episode in minari_sets[name[12:-3]])
    assert rows[:, -3].sum() == terminals and (0 < terminals < 40 or name == PENDULUM)


def test_the_environment_of_a_minari_data_set_is_recovered(awac, minari_sets):
    hopper, pendulum = awac.Environment(HOPPER), awac.Environment(PENDULUM)
    assert (hopper.env.spec.id, hopper.env.spec.max_episode_steps) == ("Hopper-v5", 37)
    assert hopper.family == "hopper" and hopper.normalized  # D4RL's reference returns
    hopper.episode_return = 3234.3
    assert hopper.score() == 100
    assert not pendulum.normalized and not pendulum.old_api
    pendulum.reset(0)
    steps = [pendulum.step(np.zeros(1)) for _ in range(11)]
    assert [truncated for *_, truncated in steps] == [False] * 10 + [True]
    assert pendulum.score() == pytest.approx(sum(reward for _, reward, _, _ in steps))


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


@pytest.mark.parametrize("env", ["", "Pendulum-v1"])
def test_no_flat_observations(awac, call, minari_sets, tmp_path, env):
    with pytest.raises(SystemExit) as stop:
        call(env=env, dataset=DICT, runs_dir=tmp_path, **SHORT)
    assert_one_line(stop, DICT, "cannot be recovered" if env == "" else "flat observations")


def test_no_such_minari_data_set(call, minari_sets, tmp_path):
    for name in ("minari:test/nothing-v0", "minari:nothing", "minari:../../x"):
        with pytest.raises(SystemExit) as stop:
            call(dataset=name, runs_dir=tmp_path, **SHORT)
        assert_one_line(stop, name)


def test_a_damaged_minari_data_set(awac, minari_sets, tmp_path, monkeypatch):
    name, path = PENDULUM, tmp_path / "test" / "pendulum-v0" / "data"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    path.mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        awac.load_dataset(name, ENV)
    assert_one_line(stop, name)


def test_a_minari_episode_of_another_length_is_named(awac, monkeypatch):
    def episode(i, n):
        flags = {"actions": np.zeros((9, 1)), "rewards": np.zeros(9), "terminations": np.zeros(9)}
        return SimpleNamespace(id=i, observations=np.zeros((n, OBS)), **flags)

    episodes = [episode(0, 10), episode(7, 9)]
    fake = SimpleNamespace(observation_space=gymnasium.spaces.Box(-1, 1, (OBS,)), total_episodes=2)
    fake.iterate_episodes = lambda: iter(episodes)
    monkeypatch.setattr(awac, "open_minari", lambda name: fake)
    with pytest.raises(SystemExit) as stop:
        awac.load_dataset("minari:fake", ENV)
    assert_one_line(stop, "minari:fake", "episode 7 has 9 observations, 9 actions")


def test_without_minari_one_line_says_what_to_install(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    for env in ("", "Pendulum-v1"):
        with pytest.raises(SystemExit) as stop:
            call(env=env, dataset=HOPPER, runs_dir=tmp_path, **SHORT)
        assert_one_line(stop, HOPPER, 'pip install "minari[hf]"')


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


def test_binary_adroit_rows_equal_a_slow_loops(awac, binary_folder):
    folder = awac.find_dataset("pen-binary-v0", str(binary_folder))
    assert folder == binary_folder
    rows, _ = awac.load_dataset(folder, ENV)
    np.testing.assert_array_equal(rows, cal_ql_loop(binary_folder, 0.99, 1, 0)[0])
    assert len(rows) == 6 + 1 + 3 + 3  # of successes only, up to the last solved row
    assert rows[:, OBS + ACT].tolist() == [-1, -1, 0, 0, -1, 0, 0, -1, 0, 0, -1, -1, 0]


def test_binary_adroit_returns_to_go_are_cal_qls(calql, binary_folder, monkeypatch):
    monkeypatch.setattr(calql, "make_simulator", lambda *_: (gymnasium.make("Pendulum-v1"), False))
    settings = {"is_sparse_reward": True, "reward_scale": 10.0, "reward_bias": 5.0, "discount": 0.9}
    settings |= {"env": "pen-binary-v0", "dataset": str(binary_folder), "device": "cpu", "p_share": 0}
    run = calql.CalQLRun(calql.TrainConfig(**settings), calql.CalQL)
    run.load_dataset()
    expected = cal_ql_loop(binary_folder, 0.9, 10, 5)[1]
    np.testing.assert_allclose(run.dataset.stored().extra, expected, rtol=1e-5)


def test_the_folder_of_the_binary_files_is_also_found_where_d4rls_are(awac, binary_folder, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(binary_folder))
    assert awac.find_dataset("pen-binary-v0", "") == binary_folder


@pytest.mark.parametrize("missing", ["pen2_sparse.npy", "pen_bc_sparse4.npy"])
def test_a_missing_binary_file_is_named(awac, binary_folder, missing):
    (binary_folder / missing).unlink()
    with pytest.raises(SystemExit) as stop:
        awac.find_dataset("pen-binary-v0", str(binary_folder))
    assert_one_line(stop, "pen-binary-v0", binary_folder / missing, "--dataset")
    other = {"pen2_sparse.npy", "pen_bc_sparse4.npy"} - {missing}
    assert not any(name in stop.value.code for name in other)


class Unsafe:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


def test_a_pickle_that_would_run_code_is_not_opened(awac, binary_folder, monkeypatch):
    monkeypatch.chdir(binary_folder)
    for payload in (Unsafe(), np.random.default_rng(0)):
        write_trajectories(binary_folder / "pen2_sparse.npy", [{"observations": payload}])
        with pytest.raises(SystemExit) as stop:
            awac.load_dataset(binary_folder, ENV)
        assert_one_line(stop, "pen2_sparse.npy", "it holds", "not only arrays")
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
def test_a_forged_array_is_not_built(awac, binary_folder, payload):
    write_trajectories(binary_folder / "pen2_sparse.npy", [{"observations": payload}])
    with pytest.raises(SystemExit) as stop:
        awac.load_dataset(binary_folder, ENV)
    assert_one_line(stop, "pen2_sparse.npy", "not as Cal-QL's")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_as_numpy_1_and_2_pickle_them(awac, module, protocol):
    arrays = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.array([True]),
    ]
    arrays += [np.float32(2.5), np.bool_(True), np.array(7), np.empty((0, 3)), np.array([{"a": np.ones(2)}, None])]
    content = pickle.dumps(arrays, protocol)
    if protocol < 4:  # 4 writes the length of each name
        content = content.replace(b"numpy._core.multiarray", module)
    found = awac.ArrayUnpickler(io.BytesIO(content)).load()
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
def test_a_file_of_another_kind_is_named(awac, binary_folder, damage):
    path = binary_folder / "pen_bc_sparse4.npy"
    damage(path)
    with pytest.raises(SystemExit) as stop:
        awac.load_dataset(binary_folder, ENV)
    assert_one_line(stop, path)


def test_files_without_a_success(awac, binary_folder):
    for name in ("pen2_sparse.npy", "pen_bc_sparse4.npy"):
        write_trajectories(binary_folder / name, [trajectory(np.random.default_rng(0), [-1, -1], False)])
    with pytest.raises(SystemExit) as stop:
        awac.load_dataset(binary_folder, ENV)
    assert_one_line(stop, binary_folder, "pen-binary-v0")
