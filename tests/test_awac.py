"""AWAC with SAMG's target, Eq. (1), against a numpy implementation that is written from the formulas."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
LOW, HIGH = np.array([-1.0, -0.5]), np.array([1.0, 0.75])
ENV = SimpleNamespace(obs_dim=3, act_dim=2, action_low=LOW.astype(np.float32), action_high=HIGH.astype(np.float32))
ROWS = 8
MIXED_P = [0.0, 0.6, 1.0, 0.75, 0.0, 0.9, 0.61, 0.0]
SOME_DONE = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def make_agent(awac, **values):
    """An agent in float64, with observation statistics, whose four critics all differ."""
    torch.manual_seed(0)
    agent = awac.AWAC(awac.TrainConfig(**{"hidden_dim": 8, "learning_rate": 0.01} | values), ENV, "cpu").double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        agent.obs_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        agent.obs_std.copy_(torch.tensor([0.5, 2.0, 1.5]))
    return agent


def make_batch(awac, p=0.0, dones=0.0):
    random, ones = np.random.default_rng(1), np.ones(ROWS)
    states, next_states = random.normal(size=(2, ROWS, 3))
    actions, rewards = random.uniform(LOW, HIGH, (ROWS, 2)), random.normal(size=ROWS)
    columns = (states, actions, rewards, next_states, dones * ones, p * ones, 0 * ones)
    return awac.Batch(*map(torch.from_numpy, columns))


@pytest.fixture
def noise(monkeypatch):
    """The policy's noise in place of random numbers: draw by turns for the actions in s' and for those in s."""
    draws = np.random.default_rng(2).normal(size=(2, ROWS, 2))
    turns = itertools.cycle(torch.from_numpy(draws))
    monkeypatch.setattr(
        torch.distributions.Normal, "rsample", lambda self: self.loc + self.scale * next(turns)[: len(self.loc)]
    )
    return draws


# --- The reference: `values` is the agent's state_dict as float64 arrays
def values_of(agent):
    return {name: tensor.numpy().copy() for name, tensor in agent.state_dict().items()}


def forward(values, network, x):
    """The inputs of the four linear layers, then the output."""
    path = [x]
    for i in (0, 2, 4, 6):
        x = x @ values[f"{network}.{i}.weight"].T + values[f"{network}.{i}.bias"]
        path.append(x := np.maximum(x, 0) if i < 6 else x)
    return path


def backward(values, network, path, gradient):
    """Gradients of weights and biases from the gradient of the output."""
    gradients = {}
    for i, x in zip((6, 4, 2, 0), path[-2::-1]):
        gradients |= {f"{network}.{i}.weight": gradient.T @ x, f"{network}.{i}.bias": gradient.sum(0)}
        gradient = gradient @ values[f"{network}.{i}.weight"] * (x > 0)
    return gradients


def min_q(values, critic, states, actions):
    inputs = np.hstack([states, actions])
    return np.minimum(*(forward(values, f"{critic}.heads.{k}", inputs)[-1][:, 0] for k in (0, 1)))


def adam(values, memory, gradients, step, rate):
    for name, g in gradients.items():
        m, v = memory.get(name, (0.0, 0.0))
        m, v = memory[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        values[name] = values[name] - rate * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)


def reference_update(values, memory, step, batch, noise, config, guided):
    """One update of `values` and of Adam's `memory` in place; returns metrics, gradients and the actor's weights."""
    s, a, r, s_next, d, p, _ = (column.numpy() for column in batch)
    s, s_next = ((x - values["obs_mean"]) / values["obs_std"] for x in (s, s_next))
    std, n = np.exp(np.clip(values["actor.log_std"], -20, 2)), len(r)

    a_next = np.clip(forward(values, "actor.mean", s_next)[-1] + std * noise[0], LOW, HIGH)
    q_target, q_off = (min_q(values, name, s_next, a_next) for name in ("target_critic", "offline_critic"))
    p = p * values["guidance_weight"] if guided else 0 * p
    y = r + config.gamma * (1 - d) * ((1 - p) * q_target + p * q_off)

    critic_loss, q_mean, gradients = 0.0, 0.0, {}
    for head in ("critic.heads.0", "critic.heads.1"):
        path = forward(values, head, np.hstack([s, a]))
        error = path[-1][:, 0] - y
        critic_loss, q_mean = critic_loss + np.mean(error**2), q_mean + path[-1].mean() / 2
        gradients |= backward(values, head, path, 2 * error[:, None] / n)
    adam(values, memory, gradients, step, config.learning_rate)

    path = forward(values, "actor.mean", s)
    a_policy = np.clip(path[-1] + std * noise[1], LOW, HIGH)
    advantage = min_q(values, "critic", s, a) - min_q(values, "critic", s, a_policy)
    weights = np.minimum(np.exp(advantage / config.awac_lambda), config.exp_adv_max)
    z = (a - path[-1]) / std
    actor_loss = -np.mean(weights * (-0.5 * z**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1))
    actor_gradients = backward(values, "actor.mean", path, -weights[:, None] * z / std / n)
    actor_gradients["actor.log_std"] = -(weights[:, None] * (z**2 - 1)).sum(0) / n
    adam(values, memory, actor_gradients, step, config.learning_rate)

    for name in [name for name in values if name.startswith("target_critic")]:
        values[name] += config.tau * (values[name.removeprefix("target_")] - values[name])
    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q_mean": q_mean}
    if guided:
        r_in = config.gamma * (1 - d) * p * (q_off - q_target)
        metrics |= {"r_in_mean": r_in.mean(), "r_in_std": r_in.std(ddof=1)}
    return metrics, gradients | actor_gradients, weights


# --- One update
@pytest.mark.parametrize(
    ("p", "dones", "guided", "guidance"),
    [
        (MIXED_P, SOME_DONE, False, 1.0),
        (0.0, SOME_DONE, True, 1.0),
        (1.0, 0.0, True, 1.0),
        (MIXED_P, 0.0, True, 1.0),
        (MIXED_P, 0.0, True, 0.25),
    ],
    ids=["unguided", "p=0", "p=1", "mixed p", "mixed p, faded"],
)
def test_two_updates_equal_the_formulas_in_numpy(awac, noise, p, dones, guided, guidance):
    agent, batch = make_agent(awac, awac_lambda=0.5, exp_adv_max=1.5, tau=0.1), make_batch(awac, p, dones)
    agent.guidance_weight.fill_(guidance)
    values, memory = values_of(agent), {}
    for step in (1, 2):
        metrics = agent.update(batch, guided)
        expected, gradients, weights = reference_update(values, memory, step, batch, noise, agent.config, guided)
        assert weights.min() < 1.5 == weights.max()
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-10, abs=1e-12)
        parameters = dict(agent.named_parameters())
        for name, gradient in gradients.items():
            np.testing.assert_allclose(parameters[name].grad.numpy(), gradient, rtol=1e-9, atol=1e-12, err_msg=name)
        for name, value in values_of(agent).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-8, atol=1e-9, err_msg=name)


def test_done_rows_do_not_bootstrap_under_guidance(awac, noise):
    agent, batch = make_agent(awac), make_batch(awac, MIXED_P, SOME_DONE)
    values = values_of(agent)
    s, a, r, s_next, d, p, _ = (column.numpy() for column in batch)
    s, s_next = ((x - values["obs_mean"]) / values["obs_std"] for x in (s, s_next))
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


def after_updates(awac, p, guided, guidance=1.0):
    """Everything that three updates in float32 leave behind."""
    agent, batch = make_agent(awac).float(), awac.Batch(*(x.float() for x in make_batch(awac, p, SOME_DONE)))
    agent.guidance_weight.fill_(guidance)
    torch.manual_seed(5)
    losses = [agent.update(batch, guided)["critic_loss"] for _ in range(3)]
    adam_states = [state for optimizer in agent.optimizers.values() for state in optimizer.state.values()]
    kept = {name: value for name, value in agent.state_dict().items() if name != "guidance_weight"}
    return [*losses, *kept.values(), *(value for state in adam_states for value in state.values())]


@pytest.mark.parametrize(("p", "guidance"), [(0.0, 1.0), (MIXED_P, 0.0)], ids=["p=0", "guidance weight 0"])
def test_guided_without_weight_is_bit_for_bit_unguided(awac, p, guidance):
    guided, plain = after_updates(awac, p, True, guidance), after_updates(awac, MIXED_P, False)
    assert len(guided) == len(plain) and all(map(torch.equal, guided, plain))


def test_guidance_with_p_above_0_is_not_plain_awac(awac):
    assert after_updates(awac, MIXED_P, True)[0] != after_updates(awac, MIXED_P, False)[0]


@pytest.mark.parametrize(
    ("p", "uses_target", "uses_offline"), [(0.0, True, False), (1.0, False, True), (MIXED_P, True, True)]
)
def test_p_decides_which_critic_the_target_uses(awac, noise, p, uses_target, uses_offline):
    def loss(moved=""):
        agent = make_agent(awac)
        if moved:
            for head in getattr(agent, moved).heads:
                head[-1].bias.add_(1.0)
        return agent.update(make_batch(awac, p), guided=True)["critic_loss"]

    assert (loss("target_critic") != loss()) == uses_target
    assert (loss("offline_critic") != loss()) == uses_offline


# --- The frozen critic
def same(module, other):
    return all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))


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
    agent = make_agent(awac).float()
    agent.actor.log_std.data.fill_(2.0)
    actions = np.stack([agent.act(np.zeros(3, np.float32), deterministic=False) for _ in range(100)])
    assert actions.dtype == np.float32
    assert (actions.min(0) == LOW).all() and (actions.max(0) == HIGH).all()


@pytest.mark.parametrize("log_std", [-20.0, 0.0, 2.0, -99.0, 99.0])
def test_log_probabilities_on_the_border_of_the_action_space_are_finite(awac, log_std):
    agent = make_agent(awac).float()
    agent.actor.log_std.data.fill_(log_std)
    batch = awac.Batch(*(column.float() for column in make_batch(awac, MIXED_P)))
    batch.actions[::2], batch.actions[1::2] = agent.action_low, agent.action_high
    assert agent.actor(batch.states).log_prob(batch.actions).isfinite().all()
    agent.update(batch, guided=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())


# --- Bellman errors and guidance weight
def constant_critic(critic, *q):
    for head, value in zip(critic.heads, q):
        for parameter in head.parameters():
            parameter.data.zero_()
        head[-1].bias.data.fill_(value)


def test_bellman_errors_by_hand(awac):
    agent, batch = make_agent(awac, gamma=0.5), make_batch(awac, dones=SOME_DONE)
    constant_critic(agent.critic, 3.0, 5.0)
    constant_critic(agent.period_critic, 4.0, 2.0)
    batch.rewards[:] = torch.tensor([1.0, 2.0, 1.0, 9.0, 5.0, 2.5, 0.0, 4.0])
    expected = [1.0, 0.0, 2.0, 7.0, 2.0, 0.5, 2.0, 2.0]  # |3 - r - 0.5 * 2|, in rows 2 and 4 |3 - r|
    assert agent.bellman_errors(batch).tolist() == expected


def test_bellman_errors_use_the_critic_now_and_the_target_critic_of_the_periods_start_at_the_mean_action(awac):
    agent, batch = make_agent(awac), make_batch(awac, MIXED_P, SOME_DONE)
    agent.start_period(refresh=False)
    start = values_of(agent)
    agent.update(batch, guided=True)
    now = values_of(agent)
    s, a, r, s_next, d, _, _ = (column.numpy() for column in batch)
    s, s_next = ((x - now["obs_mean"]) / now["obs_std"] for x in (s, s_next))
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
