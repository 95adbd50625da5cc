"""TD3+BC: its losses by hand, an update against the formulas in numpy, its phases, and whole runs."""

import functools
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main
from reference import (
    ENV,
    HIGH,
    LOW,
    ROWS,
    SOME_DONE,
    adam,
    assert_gradients,
    backward,
    forward,
    make_batch,
    make_constant,
    min_q,
    normalized,
    scattered_agent,
    values_of,
)
from runs import PLAIN, assert_equal, check_resumes, checkpoint, numbers, only_folder, rows, run_script

CENTER, SCALE = (LOW + HIGH) / 2, (HIGH - LOW) / 2


def make_agent(td3_bc, **values):
    settings = {"hidden_dim": 8, "actor_lr": 0.01, "critic_lr": 0.02, "tau": 0.1} | values
    return scattered_agent(td3_bc.TD3BC, td3_bc.TrainConfig(**settings), 0.3)


@pytest.fixture
def run(td3_bc):
    return functools.partial(run_main, td3_bc.TD3BC, td3_bc.TD3BCRun)


# --- By hand
@pytest.mark.parametrize(("weight", "loss"), [(1.0, 1.875), (0.5, 1.5625)])
def test_policy_loss_by_hand(td3_bc, weight, loss):
    q = torch.tensor([1.0, -3.0])
    bc_loss = (torch.tensor([0.5, 0.0]) - torch.tensor([0.0, 1.0])).square().mean()
    assert td3_bc.td3_bc_loss(q, bc_loss, alpha=2.5, bc_weight=weight).item() == loss


def test_lambda_is_detached(td3_bc):
    q = torch.tensor([1.0, -3.0], requires_grad=True)
    td3_bc.td3_bc_loss(q, torch.zeros(()), alpha=2.5, bc_weight=1.0).backward()
    assert q.grad.tolist() == [-0.625, -0.625]  # lambda / n, and nothing of mean |Q|


def test_where_q_is_constant_the_actor_is_driven_by_the_data_alone(td3_bc):
    agent, batch = make_agent(td3_bc), make_batch(td3_bc)
    agent.bc_weight.fill_(0.5)
    make_constant(agent.critic.heads[0], 3.0)
    agent.optimizers["critic"].param_groups[0]["lr"] = 0.0
    values = values_of(agent)
    agent.update(batch)
    (s,) = normalized(values, batch.states.numpy())
    path = forward(values, "actor.layers", s)
    pi = np.tanh(path[-1])
    along = 0.5 * 2 * (pi - (batch.actions.numpy() - CENTER) / SCALE) / (ROWS * 2)
    assert_gradients(agent, backward(values, "actor.layers", path, along * (1 - pi**2))[0], rtol=1e-10, atol=1e-13)


def test_the_squared_error_is_a_mean_over_dimensions(td3_bc):
    agent, batch = make_agent(td3_bc), make_batch(td3_bc)
    for parameter in agent.actor.parameters():
        parameter.data.zero_()
    batch.actions.copy_(torch.from_numpy(CENTER - SCALE))  # pi - a = (1, 1)
    assert agent.update(batch)["bc_loss"].item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("done", "target"), [(0.0, 2.98), (1.0, 1.0)])
def test_target_by_hand(td3_bc, done, target):
    agent, batch = make_agent(td3_bc), make_batch(td3_bc, dones=done)
    for k, value in enumerate((2.0, 5.0)):
        make_constant(agent.target_critic.heads[k], value)
        make_constant(agent.critic.heads[k], 0.0)
    batch.rewards.fill_(1.0)
    metrics = agent.update(batch, moves_policy=False)
    assert metrics["critic_loss"].item() == pytest.approx(2 * target**2)  # the heads' means are added
    assert metrics["td_error"].item() == pytest.approx(target)


def test_target_smoothing_by_hand(td3_bc, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.tensor([[1.5, -4.5]]))  # times 0.2: 0.3, -0.9
    assert td3_bc.smoothed(torch.tensor([[0.8, 0.8]]), 0.2, 0.5).tolist() == [[1.0, pytest.approx(0.3)]]


def test_target_smoothing_draws_for_each_entry(td3_bc):
    torch.manual_seed(0)
    noise = td3_bc.smoothed(torch.zeros(20_000, 2), 0.2, 0.5)
    assert noise.abs().max() == 0.5 and noise.std(0) == pytest.approx([0.197, 0.197], abs=0.003)
    assert abs(torch.corrcoef(noise.T)[0, 1]) < 0.03 and len(noise[:, 0].unique()) > 15_000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 0.70711, 0.5, 0.5]),
        ({"bc_decay": "linear"}, [1, 0.5, 0.5, 0.5]),
        ({"bc_decay": "none"}, [1, 1, 1, 1]),
        ({"bc_decay_steps": 100_000}, [1, 0.5, 0.5, 0.5]),
        ({"bc_decay": "linear", "bc_decay_end": 0.0}, [1, 0.5, 0, 0]),
    ],
)
def test_bc_weight_falls_and_is_held(td3_bc, settings, expected):
    config = td3_bc.TrainConfig(**settings)
    found = [td3_bc.bc_weight(config, updates) for updates in (0, 100_000, 200_000, 300_000)]
    assert found == pytest.approx(expected, abs=5e-6)
    if not settings:
        assert td3_bc.bc_weight(config, 1) == pytest.approx(0.99999653, abs=5e-9)


# --- Updates
def reference_update(values, memory, steps, batch, noise, config, moves_policy):
    """One update of `values` and of Adam's `memory` in place; `steps`: of critic and actor so far. Returns losses."""
    s, a, r, s_next, d, *_ = (column.numpy() for column in batch)
    s, s_next = normalized(values, s, s_next)
    a, n = (a - CENTER) / SCALE, len(r)
    a_next = np.tanh(forward(values, "target_actor.layers", s_next)[-1])
    a_next = np.clip(a_next + np.clip(config.policy_noise * noise, -config.noise_clip, config.noise_clip), -1, 1)
    y = r + config.discount * (1 - d) * min_q(values, "target_critic", s_next, a_next)
    critic_loss, gradients = 0.0, {}
    for head in ("critic.heads.0", "critic.heads.1"):
        path = forward(values, head, np.hstack([s, a]))
        error = path[-1][:, 0] - y
        critic_loss += np.mean(error**2)
        gradients |= backward(values, head, path, 2 * error[:, None] / n)[0]
    steps["critic"] += 1
    adam(values, memory, gradients, steps["critic"], config.critic_lr)
    if not moves_policy:
        return {"critic_loss": critic_loss}

    path = forward(values, "actor.layers", s)
    pi = np.tanh(path[-1])
    q_path = forward(values, "critic.heads.0", np.hstack([s, pi]))
    q = q_path[-1][:, 0]
    scale, weight = config.alpha / np.abs(q).mean(), values["bc_weight"]
    actor_loss = -scale * q.mean() + weight * np.mean((pi - a) ** 2)
    _, along = backward(values, "critic.heads.0", q_path, np.full((n, 1), -scale / n))
    along = along[:, -2:] + weight * 2 * (pi - a) / a.size
    steps["actor"] += 1
    gradients, _ = backward(values, "actor.layers", path, along * (1 - pi**2))
    adam(values, memory, gradients, steps["actor"], config.actor_lr)
    for name in [name for name in values if name.startswith("target_")]:
        values[name] += config.tau * (values[name.removeprefix("target_")] - values[name])
    return {"critic_loss": critic_loss, "actor_loss": actor_loss}


@pytest.mark.parametrize("layer_norm", [False, True])
def test_updates_equal_the_formulas_in_numpy(td3_bc, monkeypatch, layer_norm):
    agent, batch = make_agent(td3_bc, critic_layer_norm=layer_norm), make_batch(td3_bc, dones=SOME_DONE)
    agent.bc_weight.fill_(0.75)
    noise = 3 * np.random.default_rng(2).normal(size=(ROWS, 2))  # some of it beyond the clip
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.from_numpy(noise))
    values, memory, steps = values_of(agent), {}, {"critic": 0, "actor": 0}
    for moves_policy in (False, True, False, True):
        metrics = agent.update(batch, moves_policy=moves_policy)
        expected = reference_update(values, memory, steps, batch, noise, agent.config, moves_policy)
        assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-10)
        assert ("actor_loss" in metrics) == moves_policy
        for name, value in values_of(agent).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-8, atol=1e-9, err_msg=name)


def test_the_actor_and_all_targets_move_at_updates_2_and_4_only(td3_bc):
    agent, moved = make_agent(td3_bc), []
    run = td3_bc.TD3BCRun.__new__(td3_bc.TD3BCRun)
    run.agent, run.config, run.replay = agent, td3_bc.TrainConfig(), td3_bc.Replay("cpu", "auto")
    buffer = td3_bc.ReplayBuffer(50, ENV.obs_dim, ENV.act_dim, "cpu")
    buffer.load(np.random.default_rng(0).random((50, buffer.rows.shape[1])).astype(np.float32))
    agent.float()
    ((_, _, update),) = run.phases()
    for step in range(4):
        before = values_of(agent)
        update(buffer, step)
        changed = [name for name, value in values_of(agent).items() if not np.array_equal(value, before[name])]
        moved.append({name.split(".")[0] for name in changed})
    every = {"critic", "actor", "target_critic", "target_actor"}
    assert moved == [{"critic"}, every, {"critic"}, every]


def test_optimizers_go_on_over_the_switch_unless_they_are_to_be_reset(td3_bc):
    for reset in (False, True):
        agent = make_agent(td3_bc, reset_optimizers=reset)
        agent.update(make_batch(td3_bc))
        before = values_of(agent)
        agent.start_online()
        assert [bool(optimizer.state) for optimizer in agent.optimizers.values()] == [not reset] * 2
        assert all(np.array_equal(value, before[name]) for name, value in values_of(agent).items())


# --- Acting
def test_exploration_noise_is_in_half_ranges_and_stays_inside(td3_bc):
    agent, observation = make_agent(td3_bc), np.array([0.5, -1.0, 2.0])  # the mean of the data
    for parameter in agent.actor.parameters():
        parameter.data.zero_()
    np.testing.assert_allclose(agent.act(observation, deterministic=True), CENTER, atol=1e-7)
    torch.manual_seed(0)
    acted = np.array([agent.act(observation, deterministic=False) for _ in range(4000)])
    np.testing.assert_allclose(acted.std(0), 0.1 * SCALE, rtol=0.05)
    agent.actor.layers[-1].bias.data.fill_(9.0)
    acted = np.array([agent.act(observation, deterministic=False) for _ in range(50)])
    assert (acted <= HIGH).all() and (acted.max(0) == HIGH).all() and (acted < HIGH).any()


# --- Whole runs
def test_a_run_resumes_as_if_it_had_not_stopped(td3_bc, run, hopper_file, tmp_path):
    settings = PLAIN | {"env": "Hopper-v4", "dataset": hopper_file, "offline_iterations": 201}  # the count goes on: odd
    whole = check_resumes(run, [("offline", 100), ("online", 240)], td3_bc.TD3BCRun, tmp_path, **settings)
    progress = checkpoint(whole)
    assert progress["actor"]["state"][0]["step"] == 350 and progress["critic"]["state"][0]["step"] == 701
    weights = numbers(whole, "online", "bc_weight")
    assert weights == pytest.approx([0.5 ** ((step - 1) / 500) for step in range(20, 501, 20)])
    assert set(numbers(whole, "offline", "bc_weight")) == {1.0}
    # another run from the offline checkpoint is the same run, bit for bit
    run(runs_dir=tmp_path / "again", offline_checkpoint=whole / "offline_checkpoint.pt", **settings)
    again = only_folder(tmp_path / "again")
    assert rows(again, "online") == rows(whole, "online")
    assert_equal(checkpoint(again)["agent"], checkpoint(whole)["agent"])


@pytest.mark.parametrize(
    ("settings", "kept", "first"),
    [
        ({"online_data": "last", "keep_last": 60, "update_after": 100}, 60, 41),
        ({"online_data": "none", "warmup_steps": 50}, 0, 51),
        ({"mixing_ratio": 0.25}, 1500, 1),
    ],
    ids=["last", "none", "mixed"],
)
def test_which_rows_stay_and_when_updates_begin(td3_bc, run, hopper_file, tmp_path, monkeypatch, settings, kept, first):
    small = {"offline_iterations": 20, "online_iterations": 120, "buffer_size": 200, "log_frequency": 1}
    settings = PLAIN | {"env": "Hopper-v4", "dataset": hopper_file} | small | settings
    buffers = []
    monkeypatch.setattr(
        td3_bc.TD3BCRun, "end_step", lambda run, step: buffers.append(run.buffer) if step == 120 else None
    )
    whole = check_resumes(run, [("online", 110)], td3_bc.TD3BCRun, tmp_path, **settings)
    assert [row["critic_loss"] != "" for row in rows(whole, "online")] == [False] * (first - 1) + [True] * (121 - first)
    (buffer, resumed), offline = buffers, td3_bc.load_dataset(hopper_file, td3_bc.Environment("Hopper-v4"))[0]
    assert (buffer.kept, buffer.size) == (kept, kept + 120) and torch.equal(resumed.rows, buffer.rows)
    assert np.array_equal(buffer.rows[:kept, :14].numpy(), offline[len(offline) - kept :, :14])
    assert isinstance(buffer, td3_bc.MixingBuffer) == ("mixing_ratio" in settings)


def test_normalize_false_leaves_states_as_they_are(run, hopper_file, tmp_path):
    for word in ("false", "true"):
        settings = PLAIN | {"offline_iterations": 2, "online_iterations": 0, "normalize": word}
        run(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path / word, **settings)
        agent = checkpoint(only_folder(tmp_path / word))["agent"]
        plain = torch.equal(agent["obs_mean"], torch.zeros(11)) and torch.equal(agent["obs_std"], torch.ones(11))
        assert plain == (word == "false")


def test_the_file_runs_alone(hopper_file, tmp_path):
    script = shutil.copy(ROOT / "algorithms" / "td3_bc.py", tmp_path)
    settings = PLAIN | {"offline_iterations": 20, "online_iterations": 30, "env": "Hopper-v4", "dataset": hopper_file}
    run_script(script, runs_dir=tmp_path / "runs", **settings)
    assert (only_folder(tmp_path / "runs") / "summary.json").is_file()


# --- Bad input
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bc_decay": "cosine"}, "bc_decay must be one of exponential, linear, none, not 'cosine'"),
        ({"online_data": "some"}, "online_data must be one of all, last, none"),
        ({"policy_freq": 0}, "policy_freq must be finite and at least 1"),
        ({"mixing_ratio": 1.5}, "mixing_ratio must be at most 1"),
        ({"keep_last": 0}, "keep_last must be finite and at least 1"),
    ],
)
def test_values_that_no_run_can_use_are_refused(td3_bc, values, message):
    with pytest.raises(ValueError, match=message):
        td3_bc.TrainConfig(**values)


def test_there_is_no_guidance(td3_bc):
    names = td3_bc.TrainConfig().__dict__
    assert not [name for name in names if "samg" in name or "coefficient" in name or "guidance" in name]
    with pytest.raises(SystemExit, match="samg"):
        td3_bc.parse_config(td3_bc.TrainConfig, ["--samg", "true"])


def test_another_algorithms_checkpoint_is_refused(td3_bc, run, hopper_file, tmp_path):
    settings = PLAIN | {"offline_iterations": 2, "online_iterations": 0, "env": "Hopper-v4", "dataset": hopper_file}
    run(runs_dir=tmp_path, **settings)
    path = only_folder(tmp_path) / "offline_checkpoint.pt"
    with pytest.raises(SystemExit, match="of td3_bc, not of other"):
        td3_bc.load_checkpoint(path, type("Other", (), {"ALGORITHM": "other"}))
    with pytest.raises(SystemExit, match="hidden_dim 32, not 16"):
        run(runs_dir=tmp_path / "b", offline_checkpoint=path, **settings | {"hidden_dim": 16})
