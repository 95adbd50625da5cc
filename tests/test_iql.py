"""IQL with SAMG's target on values, against a numpy implementation that is written from the formulas; whole runs."""

import copy
import functools
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main
from reference import (
    CASES,
    CRITICS_OF_P,
    ENV,
    HIGH,
    LOW,
    MIXED_P,
    ROWS,
    SOME_DONE,
    WITHOUT_WEIGHT,
    adam,
    after_updates,
    assert_gradients,
    backward,
    check_bellman_errors_by_hand,
    check_sampled_actions_reach_both_borders,
    check_update_is_finite,
    equal,
    forward,
    guidance_metrics,
    make_constant,
    min_q,
    normalized,
    on_the_border,
    polyak,
    same,
    scattered_agent,
    update_in_period,
    values_of,
)
from reference import make_batch as make_plain_batch
from runs import (
    TINY,
    assert_equal,
    assert_plain_fine_tuning,
    assert_same_run,
    checkpoint,
    copies_at,
    numbers,
    only_folder,
    rows,
    run_script,
)

CENTER, SCALE = (HIGH + LOW) / 2, (HIGH - LOW) / 2
NETWORKS = ("actor", "critic", "value")


def make_agent(iql, **values):
    given = {"hidden_dim": 8, "actor_lr": 0.01, "qf_lr": 0.02, "vf_lr": 0.03, "offline_iterations": 6} | values
    agent = scattered_agent(iql.IQL, iql.TrainConfig(**given), 0.5)
    shift = 2.0 if agent.config.critic_layer_norm else 1.4  # so that there are advantages of both signs
    agent.value.v[-1].bias.data.sub_(shift)
    return agent


def make_batch(iql, agent, p=0.0, dones=0.0):
    """Random rows with V_off(s') beside them."""
    batch = make_plain_batch(iql, p, dones)
    batch.extra.copy_(agent.offline_values(batch.next_states))
    return batch


# --- The reference
def v_of(values, network, states):
    return forward(values, f"{network}.v", states)[-1][:, 0]


def reference_update(values, memory, step, batch, config, guided, actor_lr):
    """One update of `values` and of Adam's `memory` in place; returns metrics, gradients, advantages and weights."""
    s, a, r, s_next, d, p, v_off = (column.numpy() for column in batch)
    (s, s_next), n = normalized(values, s, s_next), len(r)

    v_next, q_target = v_of(values, "value", s_next), min_q(values, "target_critic", s, a)
    p = p * values["guidance_weight"] if guided else 0 * p
    y = r + config.discount * (1 - d) * ((1 - p) * v_next + p * v_off)

    path = forward(values, "value.v", s)
    advantage, v_mean = q_target - path[-1][:, 0], path[-1].mean()
    sides = np.where(advantage < 0, 1 - config.iql_tau, config.iql_tau)
    value_loss = np.mean(sides * advantage**2)
    gradients, _ = backward(values, "value.v", path, -2 * (sides * advantage)[:, None] / n)
    adam(values, memory, gradients, step, config.vf_lr)

    critic_loss, q_mean, td_error, critic_gradients = 0.0, 0.0, 0.0, {}
    for head in ("critic.heads.0", "critic.heads.1"):
        path = forward(values, head, np.hstack([s, a]))
        error = path[-1][:, 0] - y
        critic_loss, q_mean = critic_loss + np.mean(error**2) / 2, q_mean + path[-1].mean() / 2
        td_error += np.abs(error).mean() / 2
        critic_gradients |= backward(values, head, path, error[:, None] / n)[0]
    adam(values, memory, critic_gradients, step, config.qf_lr)
    polyak(values, config.tau)

    weights = np.minimum(np.exp(config.beta * advantage), config.exp_adv_max)
    path, actor_gradients = forward(values, "actor.mean", s), {}
    mean, actions = np.tanh(path[-1]), (a - CENTER) / SCALE
    if config.iql_deterministic:
        actor_loss = np.mean(weights * ((mean - actions) ** 2).sum(1))
        slope = 2 * weights[:, None] * (mean - actions) / n
    else:
        std = np.exp(np.clip(values["actor.log_std"], -20, 2))
        z = (actions - mean) / std
        actor_loss = -np.mean(weights * (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1))
        slope = -weights[:, None] * z / std / n
        actor_gradients["actor.log_std"] = -(weights[:, None] * (z**2 - 1)).sum(0) / n
    actor_gradients |= backward(values, "actor.mean", path, slope * (1 - mean**2))[0]
    adam(values, memory, actor_gradients, step, actor_lr)

    metrics = {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
    metrics |= {"v_mean": v_mean, "q_mean": q_mean, "td_error": td_error, "actor_lr": actor_lr}
    if guided:
        metrics |= guidance_metrics(config.discount * (1 - d) * p * (v_off - v_next), p, config.discount)
    return metrics, gradients | critic_gradients | actor_gradients, advantage, weights


# --- One update
PLAIN = {"beta": 2.0, "critic_layer_norm": False}
VARIANTS = {"gaussian": PLAIN, "deterministic": PLAIN | {"iql_deterministic": True}, "layer norm": {"beta": 20.0}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("p", "dones", "guided", "guidance"), CASES.values(), ids=CASES)
def test_two_updates_equal_the_formulas_in_numpy(iql, p, dones, guided, guidance, variant):
    agent = make_agent(iql, exp_adv_max=1.5, tau=0.1, **VARIANTS[variant])
    batch = make_batch(iql, agent, p, dones)
    agent.guidance_weight.fill_(guidance)
    values, memory = values_of(agent), {}
    for step in (1, 2):
        metrics = agent.update(batch, guided=guided)
        actor_lr = metrics["actor_lr"].item()  # float32 arithmetic; its own test is below
        assert actor_lr == pytest.approx(0.005 * (1 + np.cos(np.pi * (step - 1) / 6)), rel=1e-6)
        arguments = (values, memory, step, batch, agent.config, guided, actor_lr)
        expected, gradients, advantage, weights = reference_update(*arguments)
        assert advantage.min() < 0 < advantage.max() and weights.min() < 1.5 == weights.max()
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert {name for name, _ in agent.named_parameters() if name.split(".")[0] in NETWORKS} == gradients.keys()
        assert_gradients(agent, gradients, rtol=1e-9, atol=1e-12)
        for name, value in values_of(agent).items():
            if name.split(".")[0] in (*NETWORKS, "target_critic", "offline_value", "period_value"):
                np.testing.assert_allclose(value, values[name], rtol=1e-8, atol=1e-9, err_msg=name)


def test_expectile_loss_by_hand(iql):
    errors = torch.tensor([2.0, -1.0, 0.0, -3.0])
    assert iql.expectile_loss(errors, 0.75).item() == pytest.approx((0.75 * 4 + 0.25 * 1 + 0.25 * 9) / 4)
    assert iql.expectile_loss(errors, 0.5).item() == pytest.approx(0.5 * errors.square().mean().item())


def test_terminal_rows_use_neither_v_nor_v_off(iql):
    losses = []
    for shift in (0.0, 7.0):
        agent = make_agent(iql)
        batch = make_batch(iql, agent, MIXED_P, 1.0)
        batch.next_states.add_(shift), batch.extra.add_(shift)
        losses.append(agent.update(batch, guided=True)["critic_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("p", "uses_v", "uses_v_off"), CRITICS_OF_P)
def test_p_decides_which_value_the_target_uses(iql, p, uses_v, uses_v_off):
    def loss(v=0.0, v_off=0.0):
        agent = make_agent(iql)
        batch = make_batch(iql, agent, p)
        batch.extra.add_(v_off)
        agent.value.v[-1].bias.data.add_(v)
        return agent.update(batch, guided=True)["critic_loss"]

    assert (loss(v=1.0) != loss()) == uses_v
    assert (loss(v_off=1.0) != loss()) == uses_v_off


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("p", "guidance"), WITHOUT_WEIGHT.values(), ids=WITHOUT_WEIGHT)
def test_guided_without_weight_is_bit_for_bit_unguided(iql, p, guidance, deterministic):
    def updated(p, *guided):
        agent = make_agent(iql, iql_deterministic=deterministic, actor_dropout=0.2)
        return after_updates(agent, make_batch(iql, agent, p, SOME_DONE), *guided)

    plain = updated(MIXED_P, False)
    assert equal(updated(p, True, guidance), plain)
    assert not equal(updated(MIXED_P, True), plain)


# --- V_off
def test_the_switch_and_a_refresh_freeze_v_as_it_is_then(iql):
    agent = make_agent(iql)
    batch = make_batch(iql, agent, MIXED_P)
    agent.start_online()
    agent.start_period(refresh=False)
    assert same(agent.offline_value, agent.value) and same(agent.period_value, agent.value)
    frozen = values_of(agent.offline_value)
    for _ in range(3):
        agent.update(batch, guided=True)
    for value in (agent.offline_value, agent.period_value):
        assert not value.training and not same(value, agent.value)
        assert all(np.array_equal(x, frozen[name]) for name, x in values_of(value).items())
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in value.parameters())
    agent.start_period(refresh=False)
    assert same(agent.period_value, agent.value) and not same(agent.offline_value, agent.value)
    agent.start_period(refresh=True)
    assert same(agent.offline_value, agent.value)


def online_run(iql, **values):
    """A run at its switch, with a buffer of 40 rows, its networks not fresh."""
    given = {"env": "Hopper-v4", "hidden_dim": 8, "coefficient": "even", "buffer_size": 40, "batch_size": 16}
    run = iql.IQLRun(iql.TrainConfig(**(given | {"device": "cpu"} | values)), iql.IQL)
    run.agent.obs_mean.fill_(0.5)
    run.agent.start_online()
    run.agent.start_period(refresh=False)
    run.make_buffer()
    return run


def remember(run, n):
    for state, next_state in np.random.default_rng(n).normal(size=(n, 2, run.env.obs_dim)).astype(np.float32):
        run.remember(state, np.zeros(run.env.act_dim, np.float32), 1.0, next_state, False)


def test_the_stored_v_off_is_the_evaluated_one_and_rewritten_at_a_refresh(iql):
    run = online_run(iql)
    remember(run, 50)  # so that the ring has wrapped
    stored = run.buffer.stored()
    fresh = run.agent.offline_value((stored.next_states - 0.5) / 1.0)
    torch.testing.assert_close(stored.extra, fresh, rtol=1e-5, atol=1e-6)
    assert stored.extra.std() > 0.01
    before = stored.extra.clone()
    for parameter in run.agent.value.parameters():
        parameter.data.add_(0.1)
    remember(run, 3)  # V has moved, V_off has not
    torch.testing.assert_close(stored.extra, run.agent.offline_values(stored.next_states), rtol=1e-5, atol=1e-6)
    run.update_coefficient()
    stored = run.buffer.stored()
    assert torch.equal(stored.extra, run.agent.value(run.agent.normalize(stored.next_states)))
    assert (stored.extra - before).abs().min() > 1e-4


def test_without_a_refresh_the_stored_v_off_stays(iql):
    run = online_run(iql, refresh_offline_critic=False)
    remember(run, 20)
    before = run.buffer.rows.clone()
    for parameter in run.agent.value.parameters():
        parameter.data.add_(0.1)
    run.update_coefficient()
    assert torch.equal(run.buffer.rows, before)


def test_without_samg_no_v_off_is_stored(iql):
    run = online_run(iql, samg=False, keep_offline_data=False)
    remember(run, 20)
    assert not run.buffer.stored().extra.any()


# --- Actor
def test_actions_are_a_tanh_mean_over_the_whole_action_space(iql):
    agent, observations = make_agent(iql), np.random.default_rng(0).normal(size=(20, 3))
    values = values_of(agent)
    means = CENTER + SCALE * np.tanh(forward(values, "actor.mean", *normalized(values, observations))[-1])
    actions = [agent.act(observation, deterministic=True) for observation in observations]
    np.testing.assert_allclose(actions, means, rtol=0, atol=1e-12)


@pytest.mark.parametrize("deterministic", [False, True], ids=["gaussian", "deterministic"])
def test_exploration_noise_is_added_to_the_mean_and_clamped(iql, monkeypatch, deterministic):
    agent = make_agent(iql, iql_deterministic=deterministic, expl_noise=0.3, noise_clip=0.2)
    values, observation = values_of(agent), np.array([0.5, 0.25, -2.0])
    mean = np.tanh(forward(values, "actor.mean", *normalized(values, observation[None]))[-1])[0]
    for draw in itertools.product((-3.0, 0.1, 0.5), (-0.2, 2.0)):
        monkeypatch.setattr(torch, "randn", lambda n, dtype, draw=draw: torch.tensor(draw, dtype=dtype))
        if deterministic:
            noise = np.clip(0.3 * np.array(draw), -0.2, 0.2)
        else:
            noise = np.exp(values["actor.log_std"]) * draw
        expected = np.clip(CENTER + SCALE * (mean + noise), LOW, HIGH)
        np.testing.assert_allclose(agent.act(observation, deterministic=False), expected, rtol=0, atol=1e-7)


def test_sampled_actions_reach_both_borders_and_never_pass_them(iql):
    check_sampled_actions_reach_both_borders(make_agent(iql))


@pytest.mark.parametrize("log_std", [-20.0, 0.0, 2.0, -99.0, 99.0])
def test_an_update_on_actions_at_the_border_is_finite(iql, log_std):
    agent = make_agent(iql)
    check_update_is_finite(*on_the_border(agent, make_batch(iql, agent, MIXED_P), log_std))


@pytest.mark.parametrize("deterministic", [False, True], ids=["gaussian", "deterministic"])
def test_dropout_acts_in_the_actors_loss_alone(iql, deterministic, monkeypatch):
    agent, plain = (make_agent(iql, actor_dropout=x, iql_deterministic=deterministic) for x in (0.5, 0.0))
    batch, observation = make_batch(iql, agent, MIXED_P), np.array([0.5, 0.25, -2.0])
    assert agent.training  # and yet:
    calls = []
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p: calls.append((tuple(x.shape), p)) or 0 * x)
    for mean in (True, False):
        actions = []
        for one in (agent, plain):
            torch.manual_seed(0)
            actions.append(one.act(observation, deterministic=mean))
        assert np.array_equal(*actions)
    assert torch.equal(agent.bellman_errors(batch), plain.bellman_errors(batch)) and not calls
    bias = agent.actor.mean[-1].bias.detach().clone()
    loss = agent.update(batch, guided=True)["actor_loss"]
    assert calls == [((ROWS, 8), 0.5)] * 2  # after each hidden layer
    for parameter in plain.actor.mean[:-1].parameters():
        parameter.data.zero_()
    plain.actor.mean[-1].bias.data.copy_(bias)
    assert loss == plain.update(batch, guided=True)["actor_loss"]  # the hidden layers counted for nothing


# --- The actor's learning rate
def rates(agent, batch, n):
    found = []
    for _ in range(n):
        found.append(agent.update(batch, guided=False)["actor_lr"].item())
        assert agent.optimizers["actor"].param_groups[0]["lr"].item() == found[-1]
    return found


def reload(iql, agent):
    """What a new process makes of the agent's part of a checkpoint."""
    new = iql.IQL(agent.config, ENV, "cpu").double()
    new.load_state_dict(agent.state_dict())
    for name, optimizer in agent.optimizers.items():
        new.optimizers[name].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return new


def test_the_actors_learning_rate_is_corls_cosine_offline_and_constant_online(iql):
    agent = make_agent(iql)
    batch = make_batch(iql, agent)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule, corl = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6), []
    for _ in range(6):
        corl.append(schedule.get_last_lr()[0])
        optimizer.step(), schedule.step()
    found = rates(agent, batch, 2)
    agent = reload(iql, agent)  # a resume
    found += rates(agent, batch, 4)
    assert found == pytest.approx(corl, rel=1e-6)
    assert [agent.optimizers[name].param_groups[0]["lr"] for name in ("critic", "value")] == [0.02, 0.03]
    agent = reload(iql, agent)  # --offline_checkpoint
    agent.start_online()
    found = rates(agent, batch, 4)
    agent = reload(iql, agent)  # a resume online
    assert found + rates(agent, batch, 4) == pytest.approx([0.01] * 8, rel=1e-6)


def test_the_reloaded_agent_steps_at_the_scheduled_rate(iql):
    agent = make_agent(iql, iql_deterministic=True)
    batch = make_batch(iql, agent)
    rates(agent, batch, 3)
    other = reload(iql, agent)
    for one in (agent, other):
        rates(one, batch, 2)
    assert same(agent, other)
    agent.lr_step.fill_(6)  # the cosine's end: nothing moves
    before = values_of(agent.actor)
    rates(agent, batch, 1)
    for name, value in values_of(agent.actor).items():
        np.testing.assert_allclose(value, before[name], rtol=0, atol=1e-8)


# --- Bellman errors
def test_bellman_errors_by_hand(iql):
    agent = make_agent(iql, discount=0.5)
    batch = make_batch(iql, agent, dones=SOME_DONE)
    make_constant(agent.period_value.v, 2.0)
    check_bellman_errors_by_hand(agent, batch)


def test_bellman_errors_use_the_critic_now_and_v_of_the_periods_start(iql):
    agent = make_agent(iql)
    batch = make_batch(iql, agent, MIXED_P, SOME_DONE)
    start, now, (s, a, r, s_next, d) = update_in_period(agent, batch)
    y = r + 0.99 * (1 - d) * v_of(start, "value", s_next)
    np.testing.assert_allclose(agent.bellman_errors(batch), np.abs(min_q(now, "critic", s, a) - y), rtol=0, atol=1e-12)


# --- Whole runs
SETTINGS = TINY | {"actor_dropout": 0.1}
MOMENTS = {("offline", 130), ("coefficient", 130), ("online", 430)}  # none is that of a checkpoint
SCRIPT = ROOT / "algorithms" / "iql_samg.py"


@pytest.fixture(scope="module")
def call(iql):
    """call("--resume", folder, seed=1): IQL's command line in this process."""
    return functools.partial(run_main, iql.IQL, iql.IQLRun)


@pytest.fixture(scope="module")
def finished(iql, call, hopper_file, tmp_path_factory):
    """A whole run's folder, and beside it copies as a kill at each of MOMENTS would have left it."""
    tmp = tmp_path_factory.mktemp("iql")
    with copies_at(MOMENTS, iql.GuidedRun, tmp):
        call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp / "runs", **SETTINGS)
    return only_folder(tmp / "runs")


@pytest.mark.slow
def test_the_command_line_runs_from_end_to_end(finished, hopper_file, tmp_path):
    run_script(SCRIPT, env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path, **SETTINGS)
    folder = tmp_path / "Hopper-v4" / "iql-samg-seed0"
    assert json.loads((folder / "summary.json").read_text())["algorithm"] == "iql_samg"
    assert_same_run(folder, finished)


def test_the_log_tells_losses_guidance_and_learning_rate(finished):
    for column in ("value_loss", "critic_loss", "actor_loss", "v_mean", "q_mean", "actor_lr"):
        assert len(numbers(finished, "offline", column)) == 10 and len(numbers(finished, "online", column)) == 20
    assert any(numbers(finished, "online", "r_in_mean")) and numbers(finished, "online", "mastered_rows")
    offline, online = (numbers(finished, phase, "actor_lr") for phase in ("offline", "online"))
    assert offline == sorted(offline, reverse=True) and offline[-1] < 1e-7
    assert online == pytest.approx([3e-4] * 20, rel=1e-6)


def test_the_checkpoint_holds_v_off_of_every_row(iql, finished):
    state = checkpoint(finished)
    agent = iql.IQL(iql.TrainConfig(**state["config"]), online_run(iql).env, "cpu")
    agent.load_state_dict(state["agent"])
    stored, next_states = state["buffer"]["rows"], state["buffer"]["rows"][:, 15:26]
    torch.testing.assert_close(stored[:, -1], agent.offline_values(next_states), rtol=1e-5, atol=1e-6)
    assert len(stored) == 500 and stored[:, -1].any()


@pytest.mark.parametrize("moment", ["offline130", "coefficient130", "online430"])
def test_resumed_run_equals_the_uninterrupted_one(moment, finished, call, tmp_path):
    folder = shutil.copytree(finished.parents[2] / moment, tmp_path / "moved")
    assert len(rows(folder)) < len(rows(finished))
    call("--resume", folder)
    assert_same_run(folder, finished)


@pytest.fixture(scope="module")
def arms(finished, call, tmp_path_factory, hopper_file):
    """Online phases from one offline checkpoint."""
    settings = {"samg": {}, "none": {"coefficient": "none"}, "online": {"samg": False, "keep_offline_data": False}}
    settings["corl"] = {"samg": False, "dataset": hopper_file}
    tmp = tmp_path_factory.mktemp("iql-arms")
    for arm, given in settings.items():
        source = finished / "offline_checkpoint.pt"
        call(env="Hopper-v4", offline_checkpoint=source, runs_dir=tmp / arm, **(SETTINGS | given))
    return {arm: only_folder(tmp / arm) for arm in settings}


def test_online_phase_from_the_offline_checkpoint_is_the_same(arms, finished):
    assert rows(arms["samg"]) == rows(finished, "online")
    for name in ("agent", "buffer", "actor", "critic", "value"):
        assert_equal(checkpoint(arms["samg"])[name], checkpoint(finished)[name], name)


def test_no_guidance_is_plain_fine_tuning_on_online_data(arms):
    assert_plain_fine_tuning(arms["none"], arms["online"])


def test_corls_arm_keeps_the_offline_rows_and_a_constant_learning_rate(arms):
    assert arms["corl"].name == "iql-seed0"
    rate = numbers(arms["corl"], "online", "actor_lr")
    assert rate == pytest.approx([3e-4] * 25, rel=1e-6)  # no warm-up
    assert len(checkpoint(arms["corl"])["buffer"]["rows"]) == 500


@pytest.mark.parametrize("word", ["discount", "iql_tau", "actor_dropout"])
def test_shares_above_1_are_refused(iql, word):
    with pytest.raises(ValueError, match=f"{word} must be at most 1"):
        iql.TrainConfig(**{word: 1.01})
