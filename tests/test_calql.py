"""Cal-QL: its calibrated penalty, the returns-to-go behind it, and the batches of CORL's fine-tuning."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main, write_dataset
from reference import CASES, MIXED_P, WITHOUT_WEIGHT, equal, make_batch
from reference_cql import PLAIN, SIZES, TINY, VARIANTS, check_no_synchronisation, check_two_updates, make_agent, updated
from runs import check_resumes, checkpoint, numbers, only_folder, rows, run_script

# Returns of the rows in the update's tests: no bound, one that none of the policy's actions reaches, and some between
BOUNDS = [-math.inf, 20.0, 0.0, 0.3, -0.5, 0.1, -1.0, 0.5]


# --- The update
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", ["plain", "layer norm", "lagrange", "max target backup", "temperature"])
def test_two_updates_equal_the_formulas_in_numpy(calql, variant, case):
    p, dones, _, _ = CASES[case]
    agent = make_agent(calql, "CalQL", **PLAIN | VARIANTS[variant])
    batch = make_batch(calql, p, dones, np.array(BOUNDS))
    penalty = check_two_updates(agent, batch, case, calibrated=True)
    policy_moves = penalty.moves[:, :, 5:]
    assert policy_moves[:, 0].all() and 0 < policy_moves.mean() < 1 and penalty.moves[:, :, :5].all()
    assert (penalty.gradient == 0) == (case == "p=1")


def first_gradients(module, name, extra, p=0.0, guided=False):
    agent = make_agent(module, name, cql_alpha=3.0)
    torch.manual_seed(0)
    metrics = agent.update(make_batch(module, p, extra=extra), guided=guided)
    return metrics, [parameter.grad for parameter in agent.parameters() if parameter.grad is not None]


def test_without_bounds_it_is_cql(calql, cql):
    for p, guided in ((0.0, False), (MIXED_P, True)):
        metrics, gradients = first_gradients(calql, "CalQL", -math.inf, p, guided)
        plain_metrics, plain = first_gradients(cql, "CQL", 7.0, p, guided)
        assert all(map(torch.equal, gradients, plain)) and len(gradients) == len(plain)
        assert metrics.pop("bound_rate") == 0 and metrics == plain_metrics


def test_a_high_bound_stops_pushing_down_the_policys_actions_but_not_the_others(calql):
    agent = make_agent(calql, "CalQL")
    for head in agent.critic.heads:  # constant Q, so that only the biases tell
        for parameter in head.parameters():
            parameter.data.zero_()

    def penalty_on_the_last_bias(extra):
        agent.cql_alpha.fill_(0.0)
        torch.manual_seed(0)
        states, moments = agent.state_dict(), {}
        moments = {name: value.clone() for name, value in states.items()}
        agent.update(make_batch(calql, extra=extra), guided=False)
        without = agent.critic.heads[0][-1].bias.grad.item()
        agent.load_state_dict(moments)
        agent.cql_alpha.fill_(1.0)
        torch.manual_seed(0)
        metrics = agent.update(make_batch(calql, extra=extra), guided=False)
        gradient = agent.critic.heads[0][-1].bias.grad.item() - without
        agent.load_state_dict(moments)
        return gradient, metrics["bound_rate"].item()

    gradient, rate = penalty_on_the_last_bias(-math.inf)
    assert gradient == pytest.approx(0, abs=1e-12) and rate == 0  # up at the data, down at the samples, by the same
    gradient, rate = penalty_on_the_last_bias(100.0)
    assert gradient == pytest.approx(-1, abs=1e-9) and rate == 1  # up at the data alone: the bounds hold the rest


def test_guided_without_weight_is_bit_for_bit_unguided(calql):
    for p, guidance in WITHOUT_WEIGHT.values():
        assert equal(updated(calql, "CalQL", p, True, guidance), updated(calql, "CalQL", MIXED_P, False))


def test_calibration_stays_on_after_the_switch(calql):
    agent = make_agent(calql, "CalQL", cql_alpha_online=2.0)
    agent.start_online()
    assert agent.cql_alpha == 2
    assert agent.update(make_batch(calql, extra=100.0), guided=True)["bound_rate"] == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_update_on_the_gpu_does_not_wait(calql):
    check_no_synchronisation(calql, "CalQL")


# --- Returns-to-go
def returns(module, rewards, ends, discount=0.5, failure=None):
    return module.returns_to_go(np.array(rewards, np.float32), np.array(ends, bool), discount, failure).tolist()


def test_returns_by_hand(calql):
    assert returns(calql, [1, 2, 4], [0, 0, 1]) == [3, 4, 4]
    assert returns(calql, [1, 2, 4, 8, 16], [0, 1, 0, 0, 1]) == [2, 2, 12, 16, 16]
    assert returns(calql, [1, 2, 4], [0, 1, 0]) == [2, 2, 4]  # the data's end ends the last episode


def test_returns_of_sparse_episodes_by_hand(calql):
    # failed; success at its end; success early, then failing steps to the time limit; failed at the data's end
    rewards, ends = [-5, -5, -5, 5, 5, -5, -5], [0, 1, 0, 1, 0, 1, 0]
    expected = [-10, -10, -2.5, 5, 2.5, -5, -10]
    assert returns(calql, rewards, ends, failure=-5.0) == expected
    assert returns(calql, rewards, ends) == [-7.5, -5, -2.5, 5, 2.5, -5, -5]
    scaled = (0.3 * np.array([-1.0, -1.0], np.float32) + 0.1).astype(np.float32)  # rounding is no success
    assert returns(calql, scaled, [0, 1], failure=0.3 * -1 + 0.1) == pytest.approx([-0.4, -0.4])


def slow_returns(rewards, ends, discount, failure):
    result, start = [], 0
    for i in range(len(rewards)):
        if ends[i] or i == len(rewards) - 1:
            episode = rewards[start : i + 1]
            for t in range(len(episode)):
                if failure is not None and max(episode) <= failure:
                    result.append(failure / (1 - discount))
                else:
                    result.append(sum(discount**j * r for j, r in enumerate(episode[t:])))
            start = i + 1
    return result


@pytest.mark.parametrize("seed", range(20))
def test_returns_equal_a_slow_loops(calql, seed):
    random = np.random.default_rng(seed)
    n, failure = random.integers(1, 60), (None, -1.0)[seed % 2]
    rewards = random.choice([-1.0, 0.0], n, p=[0.9, 0.1]) if seed % 2 else random.normal(size=n)
    ends, discount = random.random(n) < 0.2, random.uniform(0.5, 0.999)
    rewards = rewards.astype(np.float32)
    expected = slow_returns(rewards.astype(float), ends, discount, failure)
    np.testing.assert_allclose(calql.returns_to_go(rewards, ends, discount, failure), expected, rtol=1e-5, atol=1e-6)


def make_run(module, n_offline=0, capacity=10, **values):
    """A CalQLRun without environment and folder, with offline rows in its online buffer, if any."""
    run = object.__new__(module.CalQLRun)
    settings = {"samg": not n_offline, "discount": 0.5, "reward_scale": 1.0, "reward_bias": 0.0}
    run.config, run.device = module.TrainConfig(**SIZES | settings | values), "cpu"
    run.keeps_offline_data = lambda: bool(n_offline)
    run.env = SimpleNamespace(name="Odd-v0", obs_dim=1, act_dim=1, scoring=None, score=lambda: 0.0, episode_return=0.0)
    run.reward_scale, run.reward_bias = run.config.reward_scale, run.config.reward_bias
    run.coefficient, run.episode_rewards, run.train_episodes, run.step = lambda s, a, s_next: torch.zeros(1), [], [], 0
    run.coefficient.fit_iterations, run.coefficient.fit_step = 0, None
    run.buffer = run.new_buffer(capacity)
    if n_offline:
        run.buffer.load(np.full((n_offline, 7), -9.0, np.float32))
    return run


def play(run, rewards, ends=True):
    for reward in rewards:
        run.remember(np.zeros(1), np.zeros(1), reward, np.zeros(1), False)
    if ends:
        run.end_episode()


def test_online_rows_get_their_returns_when_their_episode_ends(calql):
    run = make_run(calql)
    play(run, [1, 2], ends=False)
    assert run.buffer.stored().extra.tolist() == [-math.inf] * 2
    play(run, [4])
    assert run.buffer.stored().extra.tolist() == [3, 4, 4] and run.episode_rewards == []
    play(run, [8], ends=False)
    assert run.buffer.stored().extra.tolist() == [3, 4, 4, -math.inf]


def test_returns_of_an_episode_that_wraps_around_the_ring(calql):
    run = make_run(calql, capacity=5)
    play(run, [1, 1, 1])
    play(run, [1, 2, 4, 8])
    assert run.buffer.rows[:, -1].tolist() == [8, 8, 1, 4, 6]
    play(run, [16] * 3)  # ends on the ring's last row
    assert run.buffer.rows[:, -1].tolist() == [8, 8, 28, 24, 16] and run.buffer.pointer == 0
    play(run, [1] * 5)  # exactly the ring
    assert run.buffer.rows[:, -1].tolist() == [1.9375, 1.875, 1.75, 1.5, 1]


def test_returns_of_an_episode_longer_than_the_ring_count_what_has_left_it(calql):
    run = make_run(calql, capacity=3, is_sparse_reward=True)
    play(run, [1, 0, 0, 0, 0])  # a success, whose row has left the ring
    assert run.buffer.rows[:, -1].tolist() == [0, 0, 0]
    run = make_run(calql, capacity=3, is_sparse_reward=True, reward_scale=10.0, reward_bias=-5.0)
    play(run, [0, 0, 0, 0])
    assert run.buffer.rows[:, -1].tolist() == [-10] * 3
    play(run, [0, 0, 1, 0])
    assert run.buffer.rows[[2, 0, 1], -1].tolist() == [-5 + 0.5 * 2.5, 2.5, -5]


def test_returns_in_the_ring_beside_kept_offline_rows(calql):
    run = make_run(calql, n_offline=4, capacity=7)
    play(run, [1, 1])
    play(run, [2, 4])
    assert run.buffer.rows[:, -1].tolist() == [-9, -9, -9, -9, 4, 1, 4]


def test_failing_reward_of_binary_tasks(calql):
    run = make_run(calql, is_sparse_reward=True, reward_scale=10.0, reward_bias=5.0)
    run.env.name, run.env.scoring = "pen-binary-v0", "success"
    play(run, [-1, -1])
    play(run, [-1, 0])
    assert run.buffer.stored().extra.tolist() == [-10, -10, -2.5, 5]


# --- The offline rows' returns
def load_columns(module, tmp_path, columns, **values):
    """The offline rows of a run on this data set, on Pendulum-v1."""
    path = write_dataset(tmp_path / "data.hdf5", columns)
    settings = SIZES | {"env": "Pendulum-v1", "dataset": str(path), "runs_dir": str(tmp_path), "device": "cpu"}
    run = module.CalQLRun(module.TrainConfig(**settings | {"discount": 0.5, "p_share": 0} | values), module.CalQL)
    run.load_dataset()
    return run.dataset.stored()


def chain(rewards, terminals, timeouts, successors):
    """Columns of Pendulum's widths whose states count the rows; after an end the count leaves a gap."""
    n = len(rewards)
    jumps = np.cumsum([0, *(10 * np.logical_or(terminals, timeouts))[:-1]])
    states = np.repeat((np.arange(n) + jumps)[:, None], 3, 1).astype(np.float32)
    columns = {"observations": states, "actions": np.zeros((n, 1), np.float32), "rewards": np.float32(rewards)}
    columns |= {"terminals": np.array(terminals, bool), "timeouts": np.array(timeouts, bool)}
    return columns | ({"next_observations": states + 1} if successors else {})


def test_offline_returns_end_at_terminals_and_at_jumps(calql, tmp_path):
    terminals, timeouts = [0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0]
    rewards = [1, 2, 4, 8, 16, 32, 64, 128]
    batch = load_columns(calql, tmp_path, chain(rewards, terminals, timeouts, successors=True))
    assert batch.extra.tolist() == [2, 2, 8, 8, 48, 64, 64, 128]
    assert batch.dones.tolist() == terminals


def test_offline_returns_without_next_observations(calql, tmp_path):
    terminals, timeouts = [0, 1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0]
    batch = load_columns(calql, tmp_path, chain([1, 2, 4, 8, 99, 32, 64], terminals, timeouts, successors=False))
    assert batch.rewards.tolist() == [1, 2, 4, 8, 32, 64]  # the timeout's row is dropped: its successor is unknown
    assert batch.extra.tolist() == [2, 2, 8, 8, 64, 64]


@pytest.mark.parametrize("successor", ["as recorded", "of the next episode", "rounded", "noisy"])
def test_offline_returns_end_where_the_file_says(calql, tmp_path, successor):
    columns = chain([1, 2, 4, 8, 16, 32], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], successors=True)
    states, after = columns["observations"], columns["next_observations"]
    kinds = {"of the next episode": np.roll(states, -1, 0), "rounded": after.astype(np.float16) + np.float16(0.01)}
    columns["next_observations"] = (kinds | {"noisy": after + 1e-3}).get(successor, after)
    assert load_columns(calql, tmp_path, columns).extra.tolist() == [2, 2, 8, 8, 32, 32]


@pytest.mark.parametrize("given", [True, False])
def test_without_timeouts_the_ends_of_returns_are_guessed_and_that_is_said(calql, tmp_path, capsys, given):
    columns = chain([1, 2, 4, 8, 16, 32], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], successors=True)
    columns["timeouts"][:] = False
    columns = columns if given else {name: column for name, column in columns.items() if name != "timeouts"}
    assert load_columns(calql, tmp_path, columns).extra.tolist() == [2, 2, 8, 8, 32, 32]
    assert ("episodes end there" if given else "no timeouts: guessed 1") in capsys.readouterr().out


def test_the_failing_steps_reward_is_the_datas(calql, tmp_path):
    """-1 a step and 0 at the goal; the first episode reaches it, the second fails."""
    columns = chain([-1, 0, -1, -1], [0, 1, 0, 0], [0, 0, 0, 1], successors=True)
    batch = load_columns(calql, tmp_path, columns, is_sparse_reward=True)
    assert batch.extra.tolist() == [-1, 0, -2, -2]
    batch = load_columns(calql, tmp_path, columns, is_sparse_reward=True, reward_scale=10.0, reward_bias=5.0)
    assert batch.extra.tolist() == [-2.5, 5, -10, -10]


@pytest.mark.parametrize("rewards", [[-1, -1, -1, -1], [-5, 0, -1, -1]])
def test_rewards_of_no_sparse_task_are_refused_when_they_are_loaded(calql, tmp_path, rewards):
    columns = chain(rewards, [0, 1, 0, 0], [0, 0, 0, 1], successors=True)
    with pytest.raises(SystemExit, match="is_sparse_reward needs data of two rewards"):
        load_columns(calql, tmp_path, columns, is_sparse_reward=True)


def test_online_episodes_fail_by_the_reward_that_the_data_showed(calql):
    run = make_run(calql, is_sparse_reward=True)
    run.failing_reward = -1.0  # loaded with the checkpoint, in the arm that has left the data behind
    play(run, [-1, -1])
    play(run, [-1, 0])
    assert run.buffer.stored().extra.tolist() == [-2, -2, -1, 0]
    assert "failing_reward" in run.PROGRESS and "failing_reward" in run.CARRIED


def test_offline_returns_use_the_scaled_rewards_and_the_sparse_rule(calql, tmp_path):
    columns = chain([0, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], successors=True)
    values = {"reward_scale": 10.0, "reward_bias": -5.0}
    batch = load_columns(calql, tmp_path, columns, **values, is_sparse_reward=True)
    assert batch.extra.tolist() == [-10, -10, -2.5, 5, -10]
    batch = load_columns(calql, tmp_path, columns, **values)
    assert batch.extra.tolist() == [-7.5, -5, -2.5, 5, -5]


# --- Batches of CORL's fine-tuning
def origin(buffer, batch_size):
    return (buffer.sample(batch_size).rewards == 1).float().mean().item()  # the share of online rows


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 0.5), (0.25, 0.75), (1.0, 0.0), (0.0, 1.0)])
def test_batches_mix_offline_and_online_rows(calql, ratio, share):
    buffer = calql.MixingBuffer(100, 1, 1, "cpu", ratio)
    buffer.load(np.zeros((50, 7), np.float32))
    n_online = int(20 * share)
    for row in range(40):
        assert origin(buffer, 20) == (share if row >= n_online else 0)  # not half a batch of one row
        buffer.add([0], [0], 1.0, [0], False, 0.0)
    seen, buffer.rows[:, 0] = set(), torch.arange(100)
    for _ in range(60):
        seen |= set(buffer.sample(20).states[:, 0].int().tolist())
    assert seen == {*(range(50) if ratio else ()), *(range(50, 90) if ratio < 1 else ())}


def test_only_the_arm_that_keeps_offline_data_mixes(calql):
    assert type(make_run(calql).buffer) is calql.ReplayBuffer
    buffer = make_run(calql, n_offline=2, mixing_ratio=0.25).buffer
    assert type(buffer) is calql.MixingBuffer and buffer.mixing_ratio == 0.25


def test_offline_batches_of_both_arms_are_the_same(calql):
    batches = []
    for buffer in (calql.ReplayBuffer(50, 1, 1, "cpu"), calql.MixingBuffer(90, 1, 1, "cpu", 0.5)):
        buffer.load(np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32))
        torch.manual_seed(0)
        batches.append(buffer.sample(20))
    assert all(map(torch.equal, *batches))


# --- Configuration
@pytest.mark.parametrize("values", [{"mixing_ratio": 1.5}, {"is_sparse_reward": True, "discount": 1.0}])
def test_values_that_no_run_can_use_are_refused(calql, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        calql.TrainConfig(**values)


# --- Whole runs
@pytest.mark.slow
@pytest.mark.parametrize("samg", ["true", "false"])
def test_resumed_run_equals_the_uninterrupted_one(calql, samg, hopper_file, tmp_path):
    moments = [("offline", 50), ("online", 90), ("online", 190), ("online", 290)]  # 190: a report is unwritten
    settings = TINY | {"dataset": hopper_file, "samg": samg, "log_frequency": 50, "checkpoint_frequency": 10}
    call = functools.partial(run_main, calql.CalQL, calql.CalQLRun)
    whole = check_resumes(call, moments, calql.CalQLRun, tmp_path, **settings)
    stored = checkpoint(whole)["buffer"]["rows"]
    assert len(stored) == (300 if samg == "true" else 320)
    finished = stored[:, -1].isfinite()
    assert 0.5 < finished.float().mean() <= 1
    assert (stored[finished, -1] >= stored[finished, 14] - 1e-4).all()  # hopper's rewards here are positive


def test_run_from_end_to_end(hopper_file, tmp_path):
    settings = TINY | {"dataset": hopper_file, "critic_layer_norm": False}  # so that Q starts far below the returns
    run_script(ROOT / "algorithms" / "calql_samg.py", runs_dir=tmp_path, **settings)
    folder = only_folder(tmp_path)
    assert [len(rows(folder, phase)) for phase in ("offline", "coefficient", "online")] == [6, 4, 32]
    assert len(numbers(folder, "offline", "bound_rate")) == 6 and len(numbers(folder, "online", "bound_rate")) == 28
    assert numbers(folder, "offline", "bound_rate")[0] > 0.9 and any(numbers(folder, "online", "bound_rate"))
    assert any(numbers(folder, "online", "r_in_mean"))
