"""CQL with SAMG's target and penalty, against a numpy implementation that is written from the formulas."""

import copy
import functools
import inspect
import json
import math
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_algorithm, options
from test_run import assert_same_run, checkpoint, command, numbers, only_folder, rows

torch.set_num_threads(1)
LOW, HIGH = np.array([-1.0, -0.5]), np.array([1.0, 0.75])
ENV = SimpleNamespace(obs_dim=3, act_dim=2, action_low=LOW.astype(np.float32), action_high=HIGH.astype(np.float32))
ROWS, K = 8, 4
MIXED_P = [0.0, 0.6, 1.0, 0.75, 0.0, 0.9, 0.61, 0.0]
SOME_DONE = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
SIZES = {"hidden_dim": 8, "q_n_hidden_layers": 2, "cql_n_actions": K, "policy_lr": 0.01, "qf_lr": 0.02}


@pytest.fixture(scope="session")
def cql():
    return load_algorithm("cql_samg")


def make_agent(module, name="CQL", **values):
    """An agent in float64, with observation statistics, whose four critics all differ."""
    torch.manual_seed(0)
    agent = getattr(module, name)(module.TrainConfig(**SIZES | values), ENV, "cpu").double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        agent.obs_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        agent.obs_std.copy_(torch.tensor([0.5, 2.0, 1.5]))
    return agent


def make_batch(module, p=0.0, dones=0.0, extra=0.0):
    random, ones = np.random.default_rng(1), np.ones(ROWS)
    states, next_states = random.normal(size=(2, ROWS, 3))
    actions, rewards = random.uniform(LOW, HIGH, (ROWS, 2)), random.normal(size=ROWS)
    columns = (states, actions, rewards, next_states, dones * ones, p * ones, extra * ones)
    return module.Batch(*map(torch.from_numpy, columns))


def draws(config, seed):
    """Seeds torch, and returns what an update will draw, in its order."""
    sizes = (1, K if config.cql_max_target_backup else 1, K, K, K)
    torch.manual_seed(seed)
    tensors = [torch.empty(ROWS, k, 2, dtype=torch.float64).normal_() for k in sizes[:2]]
    tensors.append(torch.empty(ROWS, K, 2, dtype=torch.float64).uniform_(-1, 1))
    tensors += [torch.empty(ROWS, k, 2, dtype=torch.float64).normal_() for k in sizes[3:]]
    torch.manual_seed(seed)
    return [tensor.numpy() for tensor in tensors]


# --- The reference: `values` is the agent's state_dict as float64 arrays
def values_of(agent):
    return {name: tensor.numpy().copy() for name, tensor in agent.state_dict().items()}


def layers(values, network):
    return sorted({int(name.split(".")[-2]) for name in values if name.startswith(network + ".")})


def forward(values, network, x):
    """The inputs of the linear layers, then the output."""
    path, numbers = [x], layers(values, network)
    for i in numbers:
        x = x @ values[f"{network}.{i}.weight"].T + values[f"{network}.{i}.bias"]
        path.append(x := np.maximum(x, 0) if i < numbers[-1] else x)
    return path


def backward(values, network, path, gradient):
    """Gradients of weights and biases, and of the input, from the gradient of the output."""
    gradients = {}
    for i, x in zip(layers(values, network)[::-1], path[-2::-1]):
        gradients |= {f"{network}.{i}.weight": gradient.T @ x, f"{network}.{i}.bias": gradient.sum(0)}
        gradient = gradient @ values[f"{network}.{i}.weight"] * ((x > 0) if i else 1)
    return gradients, gradient


def policy(values, s):
    """mean, log_std, where the latter is inside its bounds, and the network's path."""
    path = forward(values, "actor.network", s)
    mean, raw = np.split(path[-1], 2, axis=1)
    log_std = values["actor.log_std_multiplier"] * raw + values["actor.log_std_offset"]
    return mean, np.clip(log_std, -20, 2), (log_std > -20) & (log_std < 2), path


def sample(mean, log_std, noise):
    """Actions (n, k, 2) and log-probabilities (n, k) for noise (n, k, 2)."""
    u = mean[:, None] + np.exp(log_std)[:, None] * noise
    densities = np.exp(-(noise**2) / 2) / np.sqrt(2 * np.pi) / np.exp(log_std)[:, None] * np.cosh(u) ** 2
    return np.tanh(u), np.log(densities).sum(2)


def heads(values, critic, s, a):
    """Q of both heads, (2, n, k), for actions (n, k, 2), one action at a time."""
    q = [
        [forward(values, f"{critic}.heads.{h}", np.hstack([s, a[:, j]]))[-1][:, 0] for j in range(a.shape[1])]
        for h in (0, 1)
    ]
    return np.array(q).transpose(0, 2, 1)


def policy_gradients(values, policy_of_s, g_mean, g_log_std):
    _, _, inside, path = policy_of_s
    g_log_std = g_log_std * inside
    raw = np.split(path[-1], 2, axis=1)[1]
    gradient = np.hstack([g_mean, values["actor.log_std_multiplier"] * g_log_std])
    gradients, _ = backward(values, "actor.network", path, gradient)
    gradients["actor.log_std_multiplier"] = (g_log_std * raw).sum()
    return gradients | {"actor.log_std_offset": g_log_std.sum()}


def adam(values, memory, gradients, step, rates):
    for name, g in gradients.items():
        rate = rates["critic" if name.startswith("critic") or name == "log_alpha_prime" else "policy"]
        m, v = memory.get(name, (0.0, 0.0))
        m, v = memory[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        values[name] = values[name] - rate * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)


def reference_update(values, memory, step, batch, noise, config, guided, calibrated=False):
    """One update of `values` and of Adam's `memory` in place; returns metrics, gradients and the rows' penalties."""
    s, a, r, s_next, d, p, bound = (column.numpy() for column in batch)
    s, s_next = ((x - values["obs_mean"]) / values["obs_std"] for x in (s, s_next))
    a = 2 * (a - LOW) / (HIGH - LOW) - 1
    n, p = len(r), (p * values["guidance_weight"] if guided else 0 * p)
    gradients = {}

    # Policy and temperature
    of_s = mean, log_std, *_ = policy(values, s)
    a_pi, log_pi = (x[:, 0] for x in sample(mean, log_std, noise[0]))
    alpha = config.alpha_multiplier * np.exp(values["log_alpha"])
    g_u, std = alpha * 2 * a_pi / n, np.exp(log_std)  # d log pi / du = 2 tanh(u)
    if step <= config.bc_steps:
        z = (np.arctanh(a) - mean) / std
        log_prob = (-(z**2) / 2 - np.log(2 * np.pi) / 2 - log_std - np.log(1 - a**2)).sum(1)
        actor_loss = (alpha * log_pi - log_prob).mean()
        g_mean, g_log_std = g_u - z / std / n, g_u * std * noise[0][:, 0] - alpha / n - (z**2 - 1) / n
    else:
        paths = [forward(values, f"critic.heads.{h}", np.hstack([s, a_pi])) for h in (0, 1)]
        q_pi = np.array([path[-1][:, 0] for path in paths])
        actor_loss = (alpha * log_pi - q_pi.min(0)).mean()
        for h, path in enumerate(paths):
            smallest = (q_pi.argmin(0) == h)[:, None]
            _, g_input = backward(values, f"critic.heads.{h}", path, -1.0 * smallest / n)
            g_u = g_u + g_input[:, 3:] * (1 - a_pi**2)
        g_mean, g_log_std = g_u, g_u * std * noise[0][:, 0] - alpha / n
    gradients |= policy_gradients(values, of_s, g_mean, g_log_std)
    if config.use_automatic_entropy_tuning:
        gradients["log_alpha"] = -(log_pi - 2).mean()

    # Target
    of_next = policy(values, s_next)[:2]
    a_next, log_pi_next = sample(*of_next, noise[1])
    q_target = heads(values, "target_critic", s_next, a_next).min(0)
    best = q_target.argmax(1)
    q_off = heads(values, "offline_critic", s_next, a_next).min(0)
    q_target, q_off, log_pi_next = (x[np.arange(n), best] for x in (q_target, q_off, log_pi_next))
    y = (1 - p) * q_target + p * q_off - (alpha * log_pi_next if config.backup_entropy else 0)
    y = r + config.discount * (1 - d) * y

    # Conservative penalty
    a_1, log_pi_1 = sample(*of_next, noise[3])
    a_2, log_pi_2 = sample(mean, log_std, noise[4])
    actions = np.concatenate([a[:, None], noise[2], a_1, a_2], axis=1)
    q = heads(values, "critic", s, actions)
    q_mix = (1 - p)[:, None] * q + p[:, None] * heads(values, "offline_critic", s, actions)
    moves = np.ones_like(q_mix)  # d q_mix / d its unbounded value
    if calibrated:
        moves[:, :, 1 + K :] = q_mix[:, :, 1 + K :] > bound[:, None]
        q_mix[:, :, 1 + K :] = np.maximum(q_mix[:, :, 1 + K :], bound[:, None])
    if config.cql_importance_sample:
        density = np.hstack([np.full((n, K), 0.25), np.exp(log_pi_1), np.exp(log_pi_2)])  # 1/4: uniform on the square
        terms = np.exp(q_mix[:, :, 1:] / config.cql_temp) * density ** (-1 / config.cql_temp)
        terms = np.concatenate([np.zeros((2, n, 1)), terms], axis=2)
    else:
        terms = np.exp(q_mix / config.cql_temp)
    penalty = config.cql_temp * np.log(terms.sum(2)) - q_mix[:, :, 0]
    inside = (penalty > config.cql_clip_diff_min) & (penalty < config.cql_clip_diff_max)
    gap = np.clip(penalty, config.cql_clip_diff_min, config.cql_clip_diff_max).mean(1)
    g_mix = terms / terms.sum(2, keepdims=True)
    g_mix[:, :, 0] -= 1
    g_q = g_mix * moves * inside[:, :, None] * (1 - p)[:, None] / n * values["cql_alpha"]

    # Critics
    critic_loss = ((q[:, :, 0] - y) ** 2).mean(1).sum()
    if config.cql_lagrange:
        alpha_prime = np.exp(values["log_alpha_prime"])
        excess = values["cql_alpha"] * (gap - config.cql_target_action_gap).sum()
        critic_loss, g_q = critic_loss + alpha_prime * excess, g_q * alpha_prime
        gradients["log_alpha_prime"] = -alpha_prime * excess / 2
    else:
        critic_loss = critic_loss + values["cql_alpha"] * gap.sum()
    penalty_gradient = np.abs(g_q).max()
    g_q[:, :, 0] += 2 * (q[:, :, 0] - y) / n
    for h in (0, 1):
        inputs = np.concatenate([np.hstack([s, actions[:, j]]) for j in range(1 + 3 * K)])
        path = forward(values, f"critic.heads.{h}", inputs)
        gradients |= backward(values, f"critic.heads.{h}", path, g_q[h].T.reshape(-1, 1))[0]

    metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q_mean": q[:, :, 0].mean(), "alpha": alpha}
    metrics |= {"cql_gap": gap.mean(), "entropy": -log_pi.mean()}
    if config.cql_lagrange:
        metrics["alpha_prime"] = np.exp(values["log_alpha_prime"])
    if guided:
        r_in = config.discount * (1 - d) * p * (q_off - q_target)
        metrics |= {"r_in_mean": r_in.mean(), "r_in_std": r_in.std(ddof=1)}
    adam(values, memory, gradients, step, {"policy": config.policy_lr, "critic": config.qf_lr})
    if step % config.target_update_period == 0:
        for name in [name for name in values if name.startswith("target_critic")]:
            values[name] += config.soft_target_update_rate * (values[name.removeprefix("target_")] - values[name])
    values["_extra_state"] = step
    return metrics, gradients, SimpleNamespace(inside=inside, gradient=penalty_gradient, moves=moves)


PLAIN = {"cql_alpha": 0.7, "soft_target_update_rate": 0.1}
VARIANTS = {
    "plain": {},
    "lagrange": {"cql_lagrange": True, "cql_target_action_gap": 0.8},
    "max target backup": {"cql_max_target_backup": True},
    "backup entropy": {"backup_entropy": True, "cql_max_target_backup": True, "alpha_multiplier": 0.5},
    "no importance sampling": {"cql_importance_sample": False, "cql_temp": 2.0},
    "temperature": {"cql_temp": 0.5},
    "clipped": {"cql_clip_diff_min": 2.2, "cql_clip_diff_max": 3.0},
    "fixed entropy": {"use_automatic_entropy_tuning": False, "alpha_multiplier": 0.3},
    "bc": {"bc_steps": 1},
    "slow target": {"target_update_period": 2},
}
CASES = {
    "unguided": (MIXED_P, SOME_DONE, False, 1.0),
    "p=0": (0.0, SOME_DONE, True, 1.0),
    "p=1": (1.0, 0.0, True, 1.0),
    "mixed p": (MIXED_P, SOME_DONE, True, 1.0),
    "mixed p, faded": (MIXED_P, 0.0, True, 0.25),
}


def check_two_updates(agent, batch, case, calibrated=False):
    """Compares metrics, gradients and everything that the updates leave behind; returns the reference's penalties."""
    _, _, guided, guidance = CASES[case]
    agent.guidance_weight.fill_(guidance)
    values, memory = values_of(agent), {}
    for step in (1, 2):
        noise = draws(agent.config, step)
        metrics = {name: value.item() for name, value in agent.update(batch, guided).items()}
        if calibrated:
            metrics.pop("bound_rate")
        expected, gradients, penalty = reference_update(
            values, memory, step, batch, noise, agent.config, guided, calibrated
        )
        assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-11)
        parameters = {name: x for name, x in agent.named_parameters() if x.grad is not None}
        assert parameters.keys() == gradients.keys()
        for name, gradient in gradients.items():
            np.testing.assert_allclose(parameters[name].grad.numpy(), gradient, rtol=1e-8, atol=1e-11, err_msg=name)
        for name, value in values_of(agent).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-7, atol=1e-8, err_msg=name)
    return penalty


# --- One update
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_updates_equal_the_formulas_in_numpy(cql, variant, case):
    p, dones, _, guidance = CASES[case]
    agent = make_agent(cql, **PLAIN | VARIANTS[variant])
    penalty = check_two_updates(agent, make_batch(cql, p, dones), case)
    assert (penalty.gradient == 0) == (case == "p=1")
    if variant == "clipped":
        assert 0 < penalty.inside.mean() < 1
    else:
        assert penalty.inside.all()


def after_updates(module, name, p, guided, guidance=1.0, **values):
    """Everything that three updates in float32 leave behind."""
    agent = make_agent(module, name, **values).float()
    batch = module.Batch(*(x.float() for x in make_batch(module, p, SOME_DONE, extra=1.0)))
    agent.guidance_weight.fill_(guidance)
    torch.manual_seed(5)
    losses = [agent.update(batch, guided)["critic_loss"] for _ in range(3)]
    adam_states = [state for optimizer in agent.optimizers.values() for state in optimizer.state.values()]
    kept = {key: value for key, value in agent.state_dict().items() if key != "guidance_weight"}
    return [*losses, *kept.values(), *(value for state in adam_states for value in state.values())]


@pytest.mark.parametrize(("p", "guidance"), [(0.0, 1.0), (MIXED_P, 0.0)], ids=["p=0", "guidance weight 0"])
@pytest.mark.parametrize("variant", ["plain", "lagrange", "max target backup"])
def test_guided_without_weight_is_bit_for_bit_unguided(cql, variant, p, guidance):
    guided = after_updates(cql, "CQL", p, True, guidance, **VARIANTS[variant])
    plain = after_updates(cql, "CQL", MIXED_P, False, **VARIANTS[variant])
    assert len(guided) == len(plain) and all(map(torch.equal, guided, plain))
    assert guided[0] != after_updates(cql, "CQL", MIXED_P, True, **VARIANTS[variant])[0]


def test_unguided_the_frozen_critic_is_not_evaluated(cql):
    agent = make_agent(cql)
    agent.offline_critic.forward = None
    agent.update(make_batch(cql, MIXED_P), guided=False)
    with pytest.raises(TypeError):
        agent.update(make_batch(cql, MIXED_P), guided=True)


@pytest.mark.parametrize(
    ("p", "uses_target", "uses_offline"), [(0.0, True, False), (1.0, False, True), (MIXED_P, True, True)]
)
def test_p_decides_which_critic_the_target_uses(cql, p, uses_target, uses_offline):
    def loss(moved=""):
        agent = make_agent(cql, cql_alpha=0.0)
        if moved:
            for head in getattr(agent, moved).heads:
                head[-1].bias.add_(1.0)
        torch.manual_seed(0)
        return agent.update(make_batch(cql, p), guided=True)["critic_loss"]

    assert (loss("target_critic") != loss()) == uses_target
    assert (loss("offline_critic") != loss()) == uses_offline


def test_where_p_is_1_the_penalty_moves_no_critic(cql):
    def after_one(cql_alpha, p):
        agent = make_agent(cql, cql_alpha=cql_alpha)
        torch.manual_seed(0)
        agent.update(make_batch(cql, p), guided=True)
        return [parameter.grad for parameter in agent.critic.parameters()]

    assert all(map(torch.equal, after_one(0.0, 1.0), after_one(50.0, 1.0)))
    assert not all(map(torch.equal, after_one(0.0, 0.9), after_one(50.0, 0.9)))


def test_importance_weighted_log_sum_exp_by_hand(cql):
    q = torch.tensor([[[1.0, 0.0, math.log(3.0)]], [[2.0, 1.0, 1.0]]])  # 2 heads, 1 row, the data's action and 2 others
    log_density = torch.tensor([[math.log(0.25), math.log(0.5)]])
    expected = [math.log(1 / 0.25 + 3 / 0.5) - 1, math.log(math.e / 0.25 + math.e / 0.5) - 2]
    assert cql.conservative_gap(q, log_density, cql.TrainConfig()).tolist() == pytest.approx(expected, rel=1e-6)
    plain = cql.TrainConfig(cql_importance_sample=False, cql_temp=2.0)
    expected = [2 * math.log(math.exp(0.5) + 1 + math.sqrt(3)) - 1, 2 * math.log(math.e + 2 * math.exp(0.5)) - 2]
    assert cql.conservative_gap(q, log_density, plain).tolist() == pytest.approx(expected, rel=1e-6)
    clipped = cql.TrainConfig(cql_clip_diff_min=-1.0, cql_clip_diff_max=0.5)
    assert cql.conservative_gap(q, log_density, clipped).tolist() == [0.5, 0.5]


def test_q_values_belong_to_their_state_and_action(cql):
    critic = make_agent(cql).critic
    states, actions = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64)
    q = cql.q_values(critic, states, actions)
    assert q.shape == (2, 5, 4)
    for row in range(5):
        for j in range(4):
            one = critic(states[row : row + 1], actions[row : row + 1, j])[:, 0]
            torch.testing.assert_close(q[:, row, j], one, rtol=1e-12, atol=1e-12)
    with pytest.raises(AssertionError):
        cql.q_values(critic, states[:4], actions)
    with pytest.raises(AssertionError):
        cql.conservative_gap(q, torch.zeros(4, 4), cql.TrainConfig())
    with pytest.raises(AssertionError):
        cql.TanhGaussian(states, states).log_prob(actions[:, 0])


# --- The policy
def torch_policy(mean, log_std):
    normal = torch.distributions.Normal(mean, log_std.exp())
    return torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))


def test_log_probabilities_equal_torchs(cql):
    mean, log_std = torch.randn(2, 50, 3, dtype=torch.float64)
    policy = cql.TanhGaussian(mean, log_std)
    torch.manual_seed(1)
    actions, log_prob = policy.sample(7)
    torch.manual_seed(1)
    noise = torch.empty(50, 7, 3, dtype=torch.float64).normal_()
    torch.testing.assert_close(actions, (mean[:, None] + log_std.exp()[:, None] * noise).tanh())
    reference = torch_policy(mean[:, None], log_std[:, None]).log_prob(actions).sum(2)
    few = actions.abs().amax(2) < 0.999  # beyond, atanh loses digits in the reference
    torch.testing.assert_close(log_prob[few], reference[few], rtol=1e-8, atol=1e-8)
    given = 0.9 * torch.rand(50, 3, dtype=torch.float64)
    reference = torch_policy(mean, log_std).log_prob(given).sum(1)
    torch.testing.assert_close(policy.log_prob(given), reference, rtol=1e-9, atol=1e-9)


def test_log_probability_of_a_sample_is_that_of_the_same_action_given(cql):
    policy = cql.TanhGaussian(torch.randn(9, 2, dtype=torch.float64), torch.full((9, 2), -1.0, dtype=torch.float64))
    actions, log_prob = policy.sample(1)
    torch.testing.assert_close(policy.log_prob(actions[:, 0]), log_prob[:, 0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(policy.log_prob(actions[:, 0].flip(0)), log_prob[:, 0])


@pytest.mark.parametrize("mean", [-30.0, 0.0, 30.0])
@pytest.mark.parametrize("log_std", [-20.0, 0.0, 2.0])
def test_log_probabilities_far_out_and_on_the_border_are_finite(cql, mean, log_std):
    policy = cql.TanhGaussian(torch.full((4, 2), mean).requires_grad_(), torch.full((4, 2), log_std).requires_grad_())
    actions, log_prob = policy.sample(5)
    (log_prob.sum() + policy.log_prob(torch.ones(4, 2)).sum() + policy.log_prob(-torch.ones(4, 2)).sum()).backward()
    assert log_prob.isfinite().all() and actions.abs().max() <= 1
    assert policy.mean.grad.isfinite().all() and policy.log_std.grad.isfinite().all()


def test_density_integrates_to_1(cql):
    grid = torch.linspace(-1, 1, 20001, dtype=torch.float64)[1:-1, None]
    policy = cql.TanhGaussian(torch.full_like(grid, 0.3), torch.full_like(grid, -0.5))
    assert policy.log_prob(grid).exp().sum().item() * 1e-4 == pytest.approx(1, abs=1e-6)


def test_actions_are_scaled_to_the_environments_bounds_and_back(cql):
    agent, observation = make_agent(cql), np.array([1.0, 2.0, 3.0])
    mean = policy(values_of(agent), ((observation - [0.5, -1.0, 2.0]) / [0.5, 2.0, 1.5])[None])[0][0]
    action = agent.act(observation, deterministic=True)
    np.testing.assert_allclose(action, LOW + (HIGH - LOW) * (np.tanh(mean) + 1) / 2, rtol=0, atol=1e-12)
    np.testing.assert_allclose(agent.to_unit(torch.from_numpy(action)), np.tanh(mean), rtol=0, atol=1e-12)
    agent = agent.float()
    agent.actor.log_std_offset.data.fill_(2.0)
    actions = np.stack([agent.act(np.zeros(3, np.float32), deterministic=False) for _ in range(300)])
    assert actions.dtype == np.float32 and (actions >= LOW).all() and (actions <= HIGH).all()
    assert (actions.min(0) < LOW + 0.05).all() and (actions.max(0) > HIGH - 0.05).all()
    ones = SimpleNamespace(obs_dim=3, act_dim=2, action_low=-np.ones(2, np.float32), action_high=np.ones(2, np.float32))
    exact, actions = cql.CQL(cql.TrainConfig(**SIZES), ones, "cpu"), torch.rand(100, 2) * 2 - 1
    assert torch.equal(exact.to_unit(actions), actions)  # where the bounds are 1, nothing is rounded


def test_initialisation_is_corls(cql):
    agent = cql.CQL(cql.TrainConfig(**SIZES | {"hidden_dim": 16}), ENV, "cpu")
    for network in (agent.actor.network, *agent.critic.heads):
        for layer in network[::2]:
            narrow = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(narrow @ narrow.T, 2 * torch.eye(len(narrow)), atol=1e-5, rtol=0)
            assert not layer.bias.any()
    assert (agent.actor.log_std_multiplier, agent.actor.log_std_offset) == (1, -1)
    plain = cql.CQL(cql.TrainConfig(**SIZES | {"orthogonal_init": False}), ENV, "cpu")
    for network in (plain.actor.network, *plain.critic.heads):
        assert network[-1].weight.abs().max() < 0.02 < network[0].weight.abs().max()
        assert network[0].bias.any() and network[-1].bias.any()


def test_imitation_uses_the_given_actions_and_ends(cql):
    def first_gradient(bc_steps, shift):
        agent, batch = make_agent(cql, bc_steps=bc_steps), make_batch(cql)
        batch.actions[:, 0] = (batch.actions[:, 0] + shift).clamp(-1, 1)
        torch.manual_seed(0)
        agent.update(batch, guided=False)
        return agent.actor.network[0].weight.grad

    assert not torch.equal(first_gradient(1, 0.0), first_gradient(1, 0.3))
    assert torch.equal(first_gradient(0, 0.0), first_gradient(0, 0.3))  # the policy loss proper looks at states only


def test_imitation_raises_the_likelihood_of_the_data(cql):
    agent, batch = make_agent(cql, bc_steps=100), make_batch(cql)

    def likelihood():
        return agent.actor(agent.normalize(batch.states)).log_prob(agent.to_unit(batch.actions)).mean().item()

    before = likelihood()
    for _ in range(100):
        agent.update(batch, guided=False)
    assert likelihood() > before + 1


def check_no_synchronisation(module, name):
    """Updates on the GPU under PyTorch's check, which raises where the host would wait for the device."""
    agent = getattr(module, name)(
        module.TrainConfig(**SIZES, cql_max_target_backup=True, cql_lagrange=True), ENV, "cuda"
    )
    batch = module.Batch(*(column.float().cuda() for column in make_batch(module, MIXED_P, SOME_DONE, extra=1.0)))
    agent.update(batch, guided=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = [agent.update(batch, guided) for guided in (True, False)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for row in metrics for value in row.values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_update_on_the_gpu_does_not_wait(cql):
    check_no_synchronisation(cql, "CQL")


# --- What a checkpoint holds
def test_temperature_and_penalty_weight_still_learn_after_loading(cql):
    agent, other = make_agent(cql, cql_lagrange=True), make_agent(cql, cql_lagrange=True)
    for one in (agent, agent, agent):
        one.update(make_batch(cql), guided=False)
    other.load_state_dict(agent.state_dict())
    for name, optimizer in other.optimizers.items():
        optimizer.load_state_dict(copy.deepcopy(agent.optimizers[name].state_dict()))
    loaded = {name: getattr(other, name).item() for name in ("log_alpha", "log_alpha_prime")}
    for one in (agent, other):
        torch.manual_seed(9)
        one.update(make_batch(cql), guided=False)
    for name, value in loaded.items():
        assert getattr(other, name).item() == getattr(agent, name).item() != value


def test_switch_changes_cql_alpha_and_freezes_the_critic_itself(cql):
    agent = make_agent(cql, cql_alpha=5.0, cql_alpha_online=2.0)
    assert agent.cql_alpha == 5
    agent.start_online()
    assert agent.cql_alpha == 2
    assert all(map(torch.equal, agent.offline_critic.state_dict().values(), agent.critic.state_dict().values()))
    agent.updates = 7
    other = make_agent(cql, cql_alpha=5.0, cql_alpha_online=2.0)
    other.load_state_dict(agent.state_dict())
    assert other.cql_alpha == 2 and other.updates == 7
    frozen = values_of(agent.offline_critic)
    agent.update(make_batch(cql, MIXED_P), guided=True)
    assert all(np.array_equal(value, frozen[name]) for name, value in values_of(agent.offline_critic).items())
    agent.start_period(refresh=True)
    for critic in (agent.offline_critic, agent.period_critic):
        assert all(map(torch.equal, critic.state_dict().values(), agent.target_critic.state_dict().values()))
        assert not critic.training and not any(x.requires_grad for x in critic.parameters())
    assert all(x.requires_grad for x in agent.critic.parameters())


def test_bellman_errors_use_the_period_critic_at_the_mean_action(cql):
    agent, batch = make_agent(cql), make_batch(cql, MIXED_P, SOME_DONE)
    agent.start_period(refresh=False)
    start = values_of(agent)
    agent.update(batch, guided=True)
    now = values_of(agent)
    s, a, r, s_next, d, _, _ = (column.numpy() for column in batch)
    s, s_next = ((x - now["obs_mean"]) / now["obs_std"] for x in (s, s_next))
    mean = np.tanh(policy(now, s_next)[0])[:, None]
    y = r + 0.99 * (1 - d) * heads(start, "target_critic", s_next, mean).min(0)[:, 0]
    q = heads(now, "critic", s, (2 * (a - LOW) / (HIGH - LOW) - 1)[:, None]).min(0)[:, 0]
    np.testing.assert_allclose(agent.bellman_errors(batch), np.abs(q - y), rtol=0, atol=1e-12)


# --- Configuration
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("cql_n_actions", 0), ("q_n_hidden_layers", 0), ("target_update_period", 0), ("cql_temp", 0.0)),
        *(("discount", 1.5), ("soft_target_update_rate", 1.5), ("cql_alpha", -1.0), ("qf_lr", math.inf)),
        *(("cql_clip_diff_min", math.nan), ("cql_clip_diff_max", -math.inf)),
    ],
)
def test_values_that_no_run_can_use_are_refused(cql, field, value):
    with pytest.raises(ValueError, match=field):
        cql.TrainConfig(**{"cql_clip_diff_min": -200.0, field: value})


LOCOMOTION = {
    f"{env}_{level}": {} if (env, level) != ("hopper", "medium") else {"normalize_reward": True}
    for env in ("hopper", "halfcheetah", "walker2d")
    for level in ("medium", "medium_replay", "medium_expert")
}
ANTMAZE = ["umaze", "umaze_diverse", "medium_play", "medium_diverse", "large_play", "large_diverse"]
ADROIT = ["pen", "door", "relocate"]
CORL = {
    **{"alpha_multiplier": 1.0, "backup_entropy": False, "batch_size": 256, "bc_steps": 0, "cql_alpha": 10.0},
    **{"cql_alpha_online": 10.0, "cql_clip_diff_max": math.inf, "cql_clip_diff_min": -math.inf, "cql_temp": 1.0},
    **{"cql_importance_sample": True, "cql_lagrange": False, "cql_max_target_backup": False, "cql_n_actions": 10},
    **{"cql_target_action_gap": -1.0, "discount": 0.99, "n_test_episodes": 10, "normalize": True},
    **{"normalize_reward": False, "orthogonal_init": True, "policy_lr": 3e-5, "q_n_hidden_layers": 3, "qf_lr": 3e-4},
    **{"reward_bias": 0.0, "reward_scale": 1.0, "soft_target_update_rate": 0.005, "target_update_period": 1},
    **{"use_automatic_entropy_tuning": True, "hidden_dim": 256},
}
CORL_D4RL = {"policy_lr": 1e-4, "cql_clip_diff_min": -200.0, "cql_max_target_backup": True, "normalize": False}
CORL_D4RL |= {"cql_target_action_gap": 0.8}
CORL_ANTMAZE = CORL_D4RL | {"cql_alpha": 5.0, "cql_lagrange": True, "q_n_hidden_layers": 5, "n_test_episodes": 100}
CORL_ANTMAZE |= {"normalize_reward": True, "reward_scale": 10.0, "reward_bias": -5.0}
CORL_ADROIT = CORL_D4RL | {"cql_alpha": 1.0, "cql_alpha_online": 1.0}
PAPER = {
    **{"offline_iterations": 1_000_000, "online_iterations": 200_000, "warmup_steps": 2_000, "p_threshold": 0.6},
    **{"buffer_size": 20_000, "coefficient_frequency": 10_000, "guidance_steps": 100_000, "mastered_share": 0.1},
    **{"refresh_offline_critic": False},
}
PAPER_ANTMAZE = {"cql_alpha_online": 2.0, "buffer_size": 50_000}
TASKS = {name: LOCOMOTION[name] | {"vae_simple_decoder": not name.startswith("half")} for name in LOCOMOTION}
TASKS |= {f"antmaze_{maze}": CORL_ANTMAZE | PAPER_ANTMAZE | {"p_threshold": 0.7} for maze in ANTMAZE}
TASKS |= {f"{hand}_binary": CORL_ADROIT for hand in ADROIT}


def check_config(module, algorithm, name, expected):
    """A file loads, names its task and only what differs from the defaults, and holds the expected values."""
    path = ROOT / "configs" / algorithm / f"{name}.yaml"
    config, default = module.parse_config(module.TrainConfig, ["--config", str(path)]), module.TrainConfig()
    family, level = name.split("_", 1)
    assert config.env == f"{family}-{level.replace('_', '-')}-{'v0' if level == 'binary' else 'v2'}"
    assert {key: getattr(config, key) for key in expected} == expected
    given = yaml.safe_load(path.read_text())
    assert not [key for key, value in given.items() if key != "env" and getattr(default, key) == value]


@pytest.mark.parametrize("name", TASKS)
def test_configs_hold_corls_and_the_papers_values(cql, name):
    check_config(cql, "cql", name, CORL | PAPER | TASKS[name])


def test_there_is_a_config_for_each_of_the_18_tasks_and_a_quickstart():
    for algorithm in ("cql", "calql"):
        assert {path.stem for path in (ROOT / "configs" / algorithm).glob("*.yaml")} == {*TASKS, "quickstart"}


def test_antmaze_rewards_become_10_r_minus_5(cql):
    env = SimpleNamespace(family="antmaze")
    assert cql.reward_transform(env, np.array([]), SimpleNamespace(**CORL | CORL_ANTMAZE)) == (10, -5)


# --- Whole runs
TINY = {
    **{"hidden_dim": 16, "vae_hidden_dim": 16, "batch_size": 16, "warmup_steps": 40, "buffer_size": 300},
    **{"offline_iterations": 60, "vae_iterations": 40, "online_iterations": 320, "adapt_iterations": 5},
    **{"coefficient_frequency": 150, "eval_frequency": 160, "log_frequency": 10, "checkpoint_frequency": 30},
    **{"n_test_episodes": 1, "device": "cpu", "cql_n_actions": 2, "q_n_hidden_layers": 2, "env": "Hopper-v4"},
    **{"cql_alpha": 5.0, "cql_alpha_online": 2.0, "bc_steps": 30, "target_update_period": 3, "guidance_steps": 250},
}


def call(module, classes, *words, **settings):
    """The command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        patch.setattr(sys, "argv", ["algorithm.py", *map(str, words), *options(settings)])
        module.main(*(getattr(module, name) for name in classes))
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_with_snapshots(module, classes, tmp, moments, **settings):
    """A run whose folder is copied, as a kill would leave it, at (phase, step) moments, if these are given."""
    report, run_class = getattr(module, classes[2]).report, getattr(module, classes[2])

    def report_and_copy(run, phase, step, *rest):
        report(run, phase, step, *rest)
        if (phase, step) in moments:
            shutil.copytree(run.folder, tmp / f"{phase}{step}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_class, "report", report_and_copy)
        call(module, classes, runs_dir=tmp / "runs", **settings)
    return only_folder(tmp / "runs")


CLASSES = ("CQL", "TrainConfig", "Run")


@pytest.mark.parametrize("samg", ["true", "false"])
def test_resumed_run_equals_the_uninterrupted_one(cql, samg, hopper_file, tmp_path):
    moments = [("offline", 20), ("offline", 50), ("online", 90), ("online", 290)]
    settings = TINY | {"dataset": hopper_file, "samg": samg, "cql_lagrange": "true"}
    whole = run_with_snapshots(cql, CLASSES, tmp_path, moments, **settings)
    for phase, step in moments:
        folder = tmp_path / f"{phase}{step}"
        assert len(rows(folder)) < len(rows(whole))
        call(cql, CLASSES, "--resume", folder)
        assert_same_run(folder, whole)
    state = checkpoint(whole)["agent"]
    assert state["cql_alpha"] == 2 and checkpoint(whole, "offline_checkpoint.pt")["agent"]["cql_alpha"] == 5
    assert state["_extra_state"] == 60 + 320 - (40 if samg == "true" else 0)


def test_run_from_end_to_end(hopper_file, tmp_path):
    script = ROOT / "algorithms" / "cql_samg.py"
    words = command(script, dataset=hopper_file, runs_dir=tmp_path, **TINY)
    process = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr
    folder = tmp_path / "Hopper-v4" / "cql-samg-seed0"
    assert json.loads((folder / "summary.json").read_text())["algorithm"] == "cql_samg"
    assert [len(rows(folder, phase)) for phase in ("offline", "vae", "online")] == [6, 4, 32]
    for column in ("critic_loss", "actor_loss", "q_mean", "cql_gap", "entropy", "alpha"):
        assert len(numbers(folder, "offline", column)) == 6 and len(numbers(folder, "online", column)) == 28, column
    assert any(numbers(folder, "online", "r_in_mean"))
    weights = numbers(folder, "online", "guidance_weight")
    assert weights[-1] == 0 and weights[20] == 1
