"""AWAC with SAMG's target, Eq. (1), against a numpy implementation that is written from the formulas."""

import itertools

import numpy as np
import pytest
import torch
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
    loss_with_moved,
    make_batch,
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


def make_agent(awac, **values):
    return scattered_agent(awac.AWAC, awac.TrainConfig(**{"hidden_dim": 8, "learning_rate": 0.01} | values), 0.5)


@pytest.fixture
def noise(monkeypatch):
    """The policy's noise in place of random numbers: draw by turns for the actions in s' and for those in s."""
    draws = np.random.default_rng(2).normal(size=(2, ROWS, 2))
    turns = itertools.cycle(torch.from_numpy(draws))
    monkeypatch.setattr(
        torch.distributions.Normal, "rsample", lambda self: self.loc + self.scale * next(turns)[: len(self.loc)]
    )
    return draws


# --- The reference
def reference_update(values, memory, step, batch, noise, config, guided):
    """One update of `values` and of Adam's `memory` in place; returns metrics, gradients and the actor's weights."""
    s, a, r, s_next, d, p, _ = (column.numpy() for column in batch)
    s, s_next = normalized(values, s, s_next)
    std, n = np.exp(np.clip(values["actor.log_std"], -20, 2)), len(r)

    a_next = np.clip(forward(values, "actor.mean", s_next)[-1] + std * noise[0], LOW, HIGH)
    q_target, q_off = (min_q(values, name, s_next, a_next) for name in ("target_critic", "offline_critic"))
    p = p * values["guidance_weight"] if guided else 0 * p
    y = r + config.gamma * (1 - d) * ((1 - p) * q_target + p * q_off)

    critic_loss, q_mean, td_error, gradients = 0.0, 0.0, 0.0, {}
    for head in ("critic.heads.0", "critic.heads.1"):
        path = forward(values, head, np.hstack([s, a]))
        error = path[-1][:, 0] - y
        critic_loss, q_mean = critic_loss + np.mean(error**2), q_mean + path[-1].mean() / 2
        td_error += np.abs(error).mean() / 2
        gradients |= backward(values, head, path, 2 * error[:, None] / n)[0]
    adam(values, memory, gradients, step, config.learning_rate)

    path = forward(values, "actor.mean", s)
    a_policy = np.clip(path[-1] + std * noise[1], LOW, HIGH)
    advantage = min_q(values, "critic", s, a) - min_q(values, "critic", s, a_policy)
    weights = np.minimum(np.exp(advantage / config.awac_lambda), config.exp_adv_max)
    z = (a - path[-1]) / std
    actor_loss = -np.mean(weights * (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1))
    actor_gradients, _ = backward(values, "actor.mean", path, -weights[:, None] * z / std / n)
    actor_gradients["actor.log_std"] = -(weights[:, None] * (z**2 - 1)).sum(0) / n
    adam(values, memory, actor_gradients, step, config.learning_rate)

    polyak(values, config.tau)
    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q_mean": q_mean, "td_error": td_error}
    if guided:
        metrics |= guidance_metrics(config.gamma * (1 - d) * p * (q_off - q_target), p, config.gamma)
    return metrics, gradients | actor_gradients, weights


# --- One update
@pytest.mark.parametrize(("layer_norm", "awac_lambda"), [(False, 0.5), (True, 0.02)])
@pytest.mark.parametrize(("p", "dones", "guided", "guidance"), CASES.values(), ids=CASES)
def test_two_updates_equal_the_formulas_in_numpy(awac, noise, p, dones, guided, guidance, layer_norm, awac_lambda):
    settings = {"awac_lambda": awac_lambda, "exp_adv_max": 1.5, "tau": 0.1, "critic_layer_norm": layer_norm}
    agent, batch = make_agent(awac, **settings), make_batch(awac, p, dones)
    agent.guidance_weight.fill_(guidance)
    values, memory = values_of(agent), {}
    for step in (1, 2):
        metrics = agent.update(batch, guided=guided)
        expected, gradients, weights = reference_update(values, memory, step, batch, noise, agent.config, guided)
        assert weights.min() < 1.5 == weights.max()
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert_gradients(agent, gradients, rtol=1e-9, atol=1e-12)
        for name, value in values_of(agent).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-8, atol=1e-9, err_msg=name)


def test_done_rows_do_not_bootstrap_under_guidance(awac, noise):
    agent, batch = make_agent(awac), make_batch(awac, MIXED_P, SOME_DONE)
    values = values_of(agent)
    s, a, r, s_next, d, p, _ = (column.numpy() for column in batch)
    s, s_next = normalized(values, s, s_next)
    a_next = forward(values, "actor.mean", s_next)[-1] + np.exp(values["actor.log_std"]) * noise[0]
    q_target, q_off = (
        min_q(values, name, s_next, np.clip(a_next, LOW, HIGH)) for name in ("target_critic", "offline_critic")
    )
    targets = [r[i] if d[i] else r[i] + 0.99 * ((1 - p[i]) * q_target[i] + p[i] * q_off[i]) for i in range(ROWS)]
    heads = [forward(values, f"critic.heads.{k}", np.hstack([s, a]))[-1][:, 0] for k in (0, 1)]
    loss = sum(np.mean((head - targets) ** 2) for head in heads)
    assert agent.update(batch, guided=True)["critic_loss"].item() == pytest.approx(loss, rel=1e-10)


def test_where_all_rows_are_terminal_the_next_states_and_target_critics_are_not_looked_at(awac):
    losses = []
    for shift in (0.0, 7.0):
        agent, batch = make_agent(awac), make_batch(awac, MIXED_P, 1.0)
        batch.next_states.add_(shift)
        for critic in (agent.target_critic, agent.offline_critic):
            critic.heads[0][-1].bias.add_(shift), critic.heads[1][-1].bias.add_(shift)
        losses.append(agent.update(batch, guided=True)["critic_loss"])
    assert losses[0] == losses[1]


def updated(awac, p, guided, guidance=1.0):
    return after_updates(make_agent(awac), make_batch(awac, p, SOME_DONE), guided, guidance)


@pytest.mark.parametrize(("p", "guidance"), WITHOUT_WEIGHT.values(), ids=WITHOUT_WEIGHT)
def test_guided_without_weight_is_bit_for_bit_unguided(awac, p, guidance):
    assert equal(updated(awac, p, True, guidance), updated(awac, MIXED_P, False))


def test_guidance_with_p_above_0_is_not_plain_awac(awac):
    assert updated(awac, MIXED_P, True)[0] != updated(awac, MIXED_P, False)[0]


@pytest.mark.parametrize(("p", "uses_target", "uses_offline"), CRITICS_OF_P)
def test_p_decides_which_critic_the_target_uses(awac, p, uses_target, uses_offline):
    plain, target, offline = (
        loss_with_moved(make_agent(awac), make_batch(awac, p), moved)
        for moved in (None, "target_critic", "offline_critic")
    )
    assert (target != plain) == uses_target
    assert (offline != plain) == uses_offline


# --- The frozen critic
def test_the_switch_freezes_the_critic_itself_and_a_refresh_takes_the_target_critic(awac):
    agent = make_agent(awac)
    assert not same(agent.critic, agent.target_critic)
    agent.start_online()
    assert same(agent.offline_critic, agent.critic)
    agent.start_period(refresh=False)
    assert same(agent.offline_critic, agent.critic)
    agent.start_period(refresh=True)
    assert same(agent.offline_critic, agent.target_critic)


def test_the_frozen_critic_is_a_copy_in_eval_mode_that_no_update_moves(awac):
    agent = make_agent(awac)
    agent.start_online()
    agent.start_period(refresh=False)
    frozen, period = values_of(agent.offline_critic), values_of(agent.period_critic)
    for _ in range(3):
        agent.update(make_batch(awac, MIXED_P), guided=True)
    assert all(np.array_equal(value, frozen[name]) for name, value in values_of(agent.offline_critic).items())
    assert all(np.array_equal(value, period[name]) for name, value in values_of(agent.period_critic).items())
    assert not same(agent.offline_critic, agent.critic) and not same(agent.period_critic, agent.target_critic)
    for critic in (agent.offline_critic, agent.period_critic, agent.target_critic):
        assert not critic.training
        assert all(not parameter.requires_grad and parameter.grad is None for parameter in critic.parameters())


def test_the_state_dict_holds_all_critics_and_statistics(awac):
    agent, other = make_agent(awac), awac.AWAC(awac.TrainConfig(hidden_dim=8), ENV, "cpu").double()
    agent.guidance_weight.fill_(0.5)
    other.load_state_dict(agent.state_dict())
    batch = make_batch(awac, MIXED_P)
    observation = np.array([1.0, 2.0, 3.0])
    assert torch.equal(other.bellman_errors(batch), agent.bellman_errors(batch))
    assert np.array_equal(other.act(observation, deterministic=True), agent.act(observation, deterministic=True))
    losses = []
    for one in (agent, other):
        torch.manual_seed(0)
        losses.append(one.update(batch, guided=True)["critic_loss"])
    assert losses[0] == losses[1]


# --- Acting
def test_the_deterministic_action_is_the_mean_at_the_normalised_observation_clamped_to_the_action_space(awac):
    agent = make_agent(awac)
    values, observations = values_of(agent), np.random.default_rng(0).normal(size=(20, 3))
    means = forward(values, "actor.mean", (observations - values["obs_mean"]) / values["obs_std"])[-1]
    assert (means > HIGH).any() and ((LOW < means) & (means < HIGH)).any()
    actions = [agent.act(observation, deterministic=True) for observation in observations]
    np.testing.assert_allclose(actions, np.clip(means, LOW, HIGH), rtol=0, atol=1e-12)


def test_a_sampled_action_is_the_mean_plus_noise_clamped_to_the_action_space(awac, noise):
    agent, observation = make_agent(awac), np.array([0.5, 0.25, -2.0])
    values = values_of(agent)
    mean = forward(values, "actor.mean", (observation - values["obs_mean"]) / values["obs_std"])[-1]
    expected = np.clip(mean + np.exp(values["actor.log_std"]) * noise[0, :1], LOW, HIGH)[0]
    np.testing.assert_allclose(agent.act(observation, deterministic=False), expected, rtol=0, atol=1e-12)


def test_sampled_actions_reach_both_borders_and_never_pass_them(awac):
    check_sampled_actions_reach_both_borders(make_agent(awac))


@pytest.mark.parametrize("log_std", [-20.0, 0.0, 2.0, -99.0, 99.0])
def test_log_probabilities_on_the_border_of_the_action_space_are_finite(awac, log_std):
    agent, batch = on_the_border(make_agent(awac), make_batch(awac, MIXED_P), log_std)
    assert agent.actor(batch.states).log_prob(batch.actions).isfinite().all()
    check_update_is_finite(agent, batch)


# --- Bellman errors and guidance weight
def test_bellman_errors_by_hand(awac):
    agent, batch = make_agent(awac, gamma=0.5), make_batch(awac, dones=SOME_DONE)
    make_constant(agent.period_critic.heads[0], 4.0)
    make_constant(agent.period_critic.heads[1], 2.0)
    check_bellman_errors_by_hand(agent, batch)


def test_bellman_errors_use_the_critic_now_and_the_target_critic_of_the_periods_start_at_the_mean_action(awac):
    agent, batch = make_agent(awac), make_batch(awac, MIXED_P, SOME_DONE)
    start, now, (s, a, r, s_next, d) = update_in_period(agent, batch)
    mean = forward(now, "actor.mean", s_next)[-1]
    assert (mean > HIGH).any()
    y = r + 0.99 * (1 - d) * min_q(start, "target_critic", s_next, np.clip(mean, LOW, HIGH))
    np.testing.assert_allclose(agent.bellman_errors(batch), np.abs(min_q(now, "critic", s, a) - y), rtol=0, atol=1e-12)


def test_guidance_weight_never_ends_or_is_cut_or_fades(awac):
    def weights(**values):
        return [awac.guidance_weight(awac.TrainConfig(**values), step) for step in (1, 25, 100, 101, 10**9)]

    assert weights() == [1, 1, 1, 1, 1]
    assert weights(guidance_steps=100) == [1, 1, 1, 0, 0]
    assert weights(guidance_steps=100, guidance_fade=True) == [0.99, 0.75, 0, 0, 0]
