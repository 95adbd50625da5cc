"""WSRL: its updates by hand and against a slow reference, its switch, its configurations, and whole runs."""

import copy
import functools
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import yaml
from conftest import ROOT, run_main, write_dataset
from reference import ENV, HIGH, LOW, ROWS, SOME_DONE, make_batch, scattered_agent
from runs import assert_equal, check_resumes, checkpoint, numbers, only_folder, rows, run_script

SCRIPT = ROOT / "algorithms" / "wsrl.py"
SIZES = {"hidden_dim": 8, "cql_n_actions": 3, "batch_size": ROWS, "policy_lr": 0.01, "alpha_lr": 0.01, "qf_lr": 0.02}
TINY = {
    "hidden_dim": 16,
    "batch_size": 16,
    "warmup_steps": 41,
    "buffer_size": 300,
    "env": "Hopper-v4",
    "offline_iterations": 60,
    "online_iterations": 120,
    "eval_frequency": 60,
    "log_frequency": 10,
    "checkpoint_frequency": 15,
    "n_test_episodes": 1,
    "device": "cpu",
    "cql_n_actions": 2,
    "ensemble": 3,
}
ANTMAZE = {"calibrate": True, "cql_lagrange": True, "online_max_target_backup": True, "log_std": "parameter"}


def make_agent(module, **values):
    return scattered_agent(module.WSRL, module.TrainConfig(**SIZES | values), 0.1)


def constant_critics(critic, values):
    """Critics whose outputs are these, whatever their inputs."""
    for parameter in critic.parameters():
        parameter.data.zero_()
    critic.biases[-1].data.copy_(torch.tensor(values, dtype=torch.float64).view(-1, 1, 1))


class FixedCritic(nn.Module):
    """Q of each critic (rows) and each of the passes' rows (columns), as listed."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table, dtype=torch.float64)

    def forward(self, states, actions, members=None):
        return self.table if members is None else self.table[members]


def one_row_batch(module, reward=1.0, done=0.0, extra=0.0):
    batch = make_batch(module)
    row = module.Batch(*(column[:1].clone() for column in batch))
    return row._replace(rewards=torch.full((1,), reward).double(), dones=torch.full((1,), done).double())


def double_rows(module, n, seed=0):
    """A batch of n random rows in float64."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((n, 3), (n, 2), (n,), (n, 3), (n,), (n,), (n,))
    return module.Batch(*(torch.rand(shape, generator=random, dtype=torch.float64) - 0.5 for shape in shapes))


# --- Networks
def separate_networks(critic):
    """The ensemble as the field usually writes it: a list of nn.Sequential."""
    networks = []
    for i in range(len(critic.weights[0])):
        layers = []
        for weight, bias, gain, shift in zip(critic.weights, critic.biases, critic.gains, critic.shifts):
            layers += [nn.Linear(*weight.shape[1:]), nn.LayerNorm(weight.shape[2], eps=1e-6), nn.ReLU()]
            layers[-3].weight.data, layers[-3].bias.data = weight[i].detach().T.clone(), bias[i, 0].detach().clone()
            layers[-2].weight.data, layers[-2].bias.data = gain[i, 0].detach().clone(), shift[i, 0].detach().clone()
        layers.append(nn.Linear(critic.weights[-1].shape[1], 1))
        layers[-1].weight.data = critic.weights[-1][i].detach().T.clone()
        layers[-1].bias.data = critic.biases[-1][i, 0].detach().clone()
        networks.append(nn.Sequential(*layers).double())
    return networks


@pytest.mark.parametrize("n_hidden", [1, 2, 4])
def test_the_ensemble_is_ten_separate_networks(wsrl, n_hidden):
    agent = make_agent(wsrl, q_n_hidden_layers=n_hidden)
    networks, (states, actions, *_) = separate_networks(agent.critic), make_batch(wsrl)
    q = agent.critic(states, actions)
    inputs = torch.cat([states, actions], dim=1)
    expected = torch.stack([network(inputs).squeeze(1) for network in networks])
    assert q.shape == (10, ROWS) and len(networks) == 10
    torch.testing.assert_close(q, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(10, ROWS, dtype=torch.float64)
    (q * weights).sum().backward()
    (expected * weights).sum().backward()
    for i, network in enumerate(networks):
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        for layer, weight, bias in zip(linear, agent.critic.weights, agent.critic.biases, strict=True):
            torch.testing.assert_close(weight.grad[i].T, layer.weight.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(bias.grad[i, 0], layer.bias.grad, rtol=1e-9, atol=1e-12)


def test_members_are_those_critics_and_no_other_gets_a_gradient(wsrl):
    agent, (states, actions, *_) = make_agent(wsrl), make_batch(wsrl)
    q = agent.critic(states, actions, torch.tensor([7, 2]))
    torch.testing.assert_close(q, agent.critic(states, actions)[[7, 2]], rtol=1e-12, atol=1e-12)
    q.sum().backward()
    touched = agent.critic.weights[0].grad.abs().sum((1, 2)) > 0
    assert touched.nonzero().squeeze(1).tolist() == [2, 7]


def test_layer_norm_takes_a_shift_of_all_units_away(wsrl):
    agent, (states, actions, *_) = make_agent(wsrl), make_batch(wsrl)
    before = agent.critic(states, actions)
    for biases in agent.critic.biases[:-1]:
        biases.data.add_(3.0)
    torch.testing.assert_close(agent.critic(states, actions), before, rtol=1e-10, atol=1e-10)
    agent.critic.biases[0].data[:, :, 0].add_(3.0)  # of one unit alone
    assert (agent.critic(states, actions) - before).abs().min() > 1e-6


@pytest.mark.parametrize("log_std", ["head", "parameter"])
def test_networks_start_orthogonal_with_the_last_hidden_layer_near_zero(wsrl, log_std):
    config = wsrl.TrainConfig(hidden_dim=8, q_n_hidden_layers=3, log_std=log_std)
    agent = wsrl.WSRL(config, ENV, "cpu")
    for weights, gain in zip(agent.critic.weights, (math.sqrt(2), math.sqrt(2), 0.01, math.sqrt(2)), strict=True):
        for weight in weights:
            torch.testing.assert_close(torch.linalg.svdvals(weight), torch.full((min(weight.shape),), gain))
        assert not torch.equal(weights[0], weights[1])
    linear = [layer for layer in agent.actor.network if isinstance(layer, nn.Linear)]
    for layer, gain in zip(linear, (math.sqrt(2), 0.01, math.sqrt(2)), strict=True):
        part = layer.weight[:2] if layer is linear[-1] else layer.weight  # the mean's
        torch.testing.assert_close(torch.linalg.svdvals(part), torch.full((min(part.shape),), gain))
    assert not any(bias.any() for bias in agent.critic.biases) and not any(layer.bias.any() for layer in linear)
    assert linear[-1].out_features == (4 if log_std == "head" else 2)
    assert log_std == "head" or not agent.actor.log_std.any()
    assert nn.functional.softplus(agent.raw_alpha).item() == pytest.approx(1)
    assert agent.raw_alpha_prime.item() == pytest.approx(0.541325, abs=1e-6)


@pytest.mark.parametrize("log_std", ["head", "parameter"])
def test_acting_is_the_policys_network(wsrl, log_std, monkeypatch):
    agent, observation = make_agent(wsrl, log_std=log_std), np.array([0.5, 0.25, -2.0])
    policy = agent.actor(agent.normalize(torch.from_numpy(observation))[None])
    middle, half = (LOW + HIGH) / 2, (HIGH - LOW) / 2
    mean, std = policy.mean[0].detach().numpy(), policy.log_std[0].exp().detach().numpy()
    np.testing.assert_allclose(agent.act(observation, True), middle + half * np.tanh(mean), rtol=1e-9)
    monkeypatch.setattr(torch, "randn", lambda n, dtype: torch.full((n,), 0.7, dtype=dtype))
    np.testing.assert_allclose(agent.act(observation, False), middle + half * np.tanh(mean + 0.7 * std), rtol=1e-9)


@pytest.mark.parametrize(("log_std", "std"), [(-99.0, 1e-5), (0.0, 1.0), (99.0, 10.0)])
def test_the_policys_standard_deviation_has_bounds(wsrl, log_std, std):
    agent = make_agent(wsrl, log_std="parameter")
    agent.actor.log_std.data.fill_(log_std)
    assert agent.actor(torch.zeros(1, 3).double()).log_std.exp().tolist() == [pytest.approx([std, std])]


def test_actions_of_the_data_lie_a_little_inside(wsrl):
    agent = make_agent(wsrl)
    units = agent.to_unit(torch.from_numpy(np.array([LOW, HIGH, (LOW + HIGH) / 2])))
    expected = [[-0.99999] * 2, [0.99999] * 2, [0, 0]]
    np.testing.assert_allclose(units, expected, atol=1e-12)


# --- The target
@pytest.mark.parametrize(("done", "y"), [(0.0, 3.97), (1.0, 1.0)])
def test_the_target_is_the_minimum_over_the_subset_without_entropy(wsrl, done, y, monkeypatch):
    agent = make_agent(wsrl)
    constant_critics(agent.target_critic, range(10))
    constant_critics(agent.critic, [0.0] * 10)
    monkeypatch.setattr(agent, "subset", lambda: torch.tensor([7, 3]))
    for temperature in (0.5, 0.9):
        agent.raw_alpha.data.fill_(math.log(math.expm1(temperature)))
        for max_backup in (False, True):
            loss, metrics, _ = agent.td_loss(one_row_batch(wsrl, 1.0, done), max_backup)
            assert metrics["td_error"].item() == pytest.approx(y) and loss.item() == pytest.approx(y**2)


def test_the_td_loss_is_the_mean_over_all_critics_and_rows(wsrl):
    agent, batch = make_agent(wsrl), make_batch(wsrl, dones=1.0)
    constant_critics(agent.critic, range(10))
    loss, *_ = agent.td_loss(batch, False)
    assert loss.item() == pytest.approx(np.mean((np.arange(10)[:, None] - batch.rewards.numpy()) ** 2))


def test_subsets_are_of_two_different_critics_each_as_often(wsrl):
    agent = make_agent(wsrl)
    torch.manual_seed(0)
    pairs = torch.stack([agent.subset() for _ in range(10_000)])
    assert pairs.shape == (10_000, 2) and (pairs[:, 0] != pairs[:, 1]).all()
    shares = torch.bincount(pairs.flatten(), minlength=10) / 10_000
    assert (shares - 0.2).abs().max() < 0.015


def test_the_max_backup_is_the_maximum_of_the_minima(wsrl):
    agent = make_agent(wsrl, ensemble=2, cql_n_actions=2, discount=1.0)
    agent.target_critic = FixedCritic([[5.0, 1.0], [2.0, 4.0]])  # two critics, two actions
    constant_critics(agent.critic, [0.0, 0.0])
    _, metrics, _ = agent.td_loss(one_row_batch(wsrl, 0.0), True)
    assert metrics["td_error"] == 2


@pytest.mark.parametrize("field", ["cql_max_target_backup", "online_max_target_backup"])
def test_each_phase_has_its_own_max_backup(wsrl, field, monkeypatch):
    drawn, sample = [], wsrl.TanhGaussian.sample
    monkeypatch.setattr(wsrl.TanhGaussian, "sample", lambda policy, k: drawn.append(k) or sample(policy, k))
    values = {"cql_max_target_backup": False, "online_max_target_backup": False} | {field: True}
    agent, batch = make_agent(wsrl, **values), make_batch(wsrl)
    agent.learn_critics(batch)
    assert drawn == [3 if field == "online_max_target_backup" else 1]
    agent.update(batch)
    assert drawn[1] == (3 if field == "cql_max_target_backup" else 1)


def test_polyak_after_four_updates(wsrl):
    """The critic has moved from 0 to 1 and stays there: one step of the target for each of its updates."""
    agent = make_agent(wsrl, soft_target_update_rate=0.5, qf_lr=0.0, policy_lr=0.0)
    for critic, value in ((agent.critic, 1.0), (agent.target_critic, 0.0)):
        for parameter in critic.parameters():
            parameter.data.fill_(value)
    agent.update_online(double_rows(wsrl, 4 * ROWS))
    assert {value for x in agent.target_critic.parameters() for value in x.unique().tolist()} == {0.9375}
    assert {value for x in agent.critic.parameters() for value in x.unique().tolist()} == {1.0}


# --- Offline
def reference_losses(wsrl, agent, networks, targets, actor, batch, config):
    """Losses of the critics, the policy and the temperature, critic by critic and action by action."""
    s, a, r, s_next, d, _, bound = batch
    k, act_dim, n = config.cql_n_actions, 2, len(r)
    middle, half = torch.from_numpy((LOW + HIGH) / 2), torch.from_numpy((HIGH - LOW) / 2)
    a = ((a - middle) / half).clamp(-0.99999, 0.99999)
    s, s_next = ((x - agent.obs_mean) / agent.obs_std for x in (s, s_next))

    def policy(states, k):
        outputs = actor.network(states)
        mean, std = outputs[:, :act_dim], outputs[:, act_dim:].exp()
        normal = torch.distributions.Normal(mean[:, None], std[:, None])
        u = mean[:, None] + std[:, None] * torch.empty(n, k, act_dim, dtype=torch.float64).normal_()
        return u.tanh(), (normal.log_prob(u) - torch.log1p(-(u.tanh() ** 2))).sum(2)

    def q(networks, states, actions):
        """(critics, n, k)"""
        columns = [[net(torch.cat([states, x], 1))[:, 0] for x in actions.unbind(1)] for net in networks]
        return torch.stack([torch.stack(column, 1) for column in columns])

    a_next, _ = policy(s_next, k)
    subset = torch.rand(10).topk(2).indices.tolist()
    y = r + config.discount * (1 - d) * q([targets[i] for i in subset], s_next, a_next).min(0)[0].max(1)[0]
    td = sum(((q([net], s, a[:, None])[0, :, 0] - y.detach()) ** 2).mean() for net in networks) / 10

    a_pi, log_pi = policy(s, 1)
    entropy = -policy(s_next, 1)[1].mean()
    actor_loss = (agent_alpha(agent) * log_pi[:, 0] - q(networks, s, a_pi).min(0)[0][:, 0]).mean()

    random = torch.empty(n, k, act_dim, dtype=torch.float64).uniform_(-1, 1)
    a_1, log_1 = policy(s_next, k)
    a_2, log_2 = policy(s, k)
    penalty = 0.0
    for i in torch.rand(10).topk(2).indices.tolist():
        bounded = [q([networks[i]], s, x.detach())[0] for x in (a_1, a_2)]
        if config.calibrate:
            bounded = [torch.maximum(x, bound[:, None]) for x in bounded]
        terms = [q([networks[i]], s, random)[0] + act_dim * math.log(2)]
        terms += [x - log.detach() for x, log in zip(bounded, (log_1, log_2))]
        soft_maximum = torch.cat(terms, 1).exp().sum(1).log()
        penalty = penalty + (soft_maximum - q([networks[i]], s, a[:, None])[0, :, 0]).mean() / 2
    return td, penalty, actor_loss, entropy


def agent_alpha(agent):
    return math.log1p(math.exp(agent.raw_alpha.item()))


@pytest.mark.parametrize("lagrange", [False, True])
@pytest.mark.parametrize("calibrate", [False, True])
def test_an_offline_update_equals_a_slow_reference(wsrl, calibrate, lagrange):
    agent = make_agent(wsrl, calibrate=calibrate, cql_lagrange=lagrange)
    batch = make_batch(wsrl, dones=SOME_DONE, extra=[-math.inf, 9.0, 0.0, 0.1, -0.1, 0.2, -0.2, 0.05])
    networks, targets = separate_networks(agent.critic), separate_networks(agent.target_critic)
    actor, alpha, alpha_prime = copy.deepcopy(agent.actor), agent_alpha(agent), 0.0
    alpha_prime = math.log1p(math.exp(agent.raw_alpha_prime.item()))
    torch.manual_seed(3)
    td, penalty, actor_loss, entropy = reference_losses(wsrl, agent, networks, targets, actor, batch, agent.config)
    loss = td + (alpha_prime * (penalty - 0.8) if lagrange else 5 * penalty)
    of_critics = [parameter for network in networks for parameter in network.parameters()]
    critic_gradients = torch.autograd.grad(loss, of_critics, retain_graph=True)
    actor_gradients = torch.autograd.grad(actor_loss, list(actor.parameters()))

    torch.manual_seed(3)
    metrics = {name: value.item() for name, value in agent.update(batch).items()}
    expected = {"critic_loss": loss.item(), "cql_gap": penalty.item(), "actor_loss": actor_loss.item(), "alpha": alpha}
    expected |= {"entropy": entropy.item()} | ({"alpha_prime": alpha_prime} if lagrange else {})
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert ("bound_rate" in metrics) == calibrate and (not calibrate or 0 < metrics["bound_rate"] < 1)
    for parameter, gradient in zip(agent.actor.parameters(), actor_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)
    per_network = len(critic_gradients) // 10
    heads = torch.stack([critic_gradients[per_network * (i + 1) - 2].T for i in range(10)])
    torch.testing.assert_close(agent.critic.weights[-1].grad, heads, rtol=1e-8, atol=1e-12)
    first = torch.stack([critic_gradients[per_network * i].T for i in range(10)])
    torch.testing.assert_close(agent.critic.weights[0].grad, first, rtol=1e-8, atol=1e-12)
    slope = 1 / (1 + math.exp(-math.log(math.expm1(alpha))))  # of softplus
    assert agent.raw_alpha.grad.item() == pytest.approx(slope * (entropy.item() + 2), rel=1e-9)
    if lagrange:
        slope = 1 / (1 + math.exp(-math.log(math.expm1(alpha_prime))))
        assert agent.raw_alpha_prime.grad.item() == pytest.approx(-slope * (penalty.item() - 0.8), rel=1e-9)


def update_with_gap(wsrl, monkeypatch, gap):
    """An offline update with Lagrange's weight where the conservative gap of both critics is this."""
    monkeypatch.setattr(wsrl, "conservative_gap", lambda q, density, config: 0 * q.sum((1, 2)) + gap)
    agent = make_agent(wsrl, **ANTMAZE)
    agent.raw_alpha_prime.data.fill_(0.541325)
    torch.manual_seed(0)
    metrics, batch = {}, make_batch(wsrl)
    loss, *_ = agent.td_loss(batch, True)
    torch.manual_seed(0)
    metrics = agent.update(batch)
    term = (metrics["critic_loss"] - loss).item()
    return metrics["alpha_prime"].item(), term, agent.raw_alpha_prime.item() - 0.541325, agent


def test_lagranges_weight_rises_above_its_gap_and_falls_below(wsrl, monkeypatch):
    weight, term, move, agent = update_with_gap(wsrl, monkeypatch, 2.0)
    assert (weight, term) == (pytest.approx(1, abs=1e-6), pytest.approx(1.2, abs=1e-5)) and move > 0
    _, low_term, low_move, low = update_with_gap(wsrl, monkeypatch, 0.5)
    assert low_term == pytest.approx(-0.3, abs=1e-5) and low_move < 0
    for parameter, other in zip(agent.actor.parameters(), low.actor.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad) and parameter.grad.any()


def offline_loss(wsrl, extra, **values):
    agent = make_agent(wsrl, **values)
    torch.manual_seed(0)
    return agent.update(make_batch(wsrl, extra=extra))["critic_loss"].item()


def test_returns_count_only_where_the_penalty_is_calibrated(wsrl):
    assert offline_loss(wsrl, 1e6) == offline_loss(wsrl, -math.inf)
    assert offline_loss(wsrl, 1e6, calibrate=True) > 1e6
    assert offline_loss(wsrl, -math.inf, calibrate=True) == offline_loss(wsrl, -math.inf)


# --- Online
def test_an_online_update_is_four_of_the_critics_and_one_of_the_policy_on_all_rows(wsrl, monkeypatch):
    agent, batch, calls, subsets = make_agent(wsrl), double_rows(wsrl, 4 * ROWS), [], []
    for name in ("learn_critics", "learn_policy"):
        learn = getattr(agent, name)

        def record(rows, name=name, learn=learn):
            calls.append((name, rows))
            return learn(rows)

        monkeypatch.setattr(agent, name, record)
    subset = agent.subset
    monkeypatch.setattr(agent, "subset", lambda: subsets.append(subset()) or subsets[-1])
    metrics = agent.update_online(batch)
    assert [name for name, _ in calls] == ["learn_critics"] * 4 + ["learn_policy"]
    for i, (_, part) in enumerate(calls[:4]):
        assert torch.equal(part.states, batch.states[ROWS * i : ROWS * (i + 1)])
    assert torch.equal(calls[4][1].states, batch.states)
    assert len(subsets) == 4 and len({tuple(pair.tolist()) for pair in subsets}) > 1
    assert {"critic_loss", "actor_loss", "alpha", "entropy", "q_mean", "td_error"} == metrics.keys()
    steps = {name: {int(s["step"]) for s in agent.optimizers[name].state.values()} for name in agent.optimizers}
    assert steps == {"actor": {1}, "critic": {4}, "alpha": {1}, "alpha_prime": set()}


@pytest.mark.parametrize("policy_q", ["min", "mean"])
def test_the_policys_update_on_all_rows_has_the_mean_of_the_parts_gradients(wsrl, policy_q, monkeypatch):
    sample = lambda policy, k: (  # noqa: E731
        policy.mean[:, None].tanh().expand(-1, k, -1),
        policy.log_std.sum(1, keepdim=True).expand(-1, k),
    )
    monkeypatch.setattr(wsrl.TanhGaussian, "sample", sample)  # no noise
    agent = make_agent(wsrl, policy_q=policy_q, policy_lr=0.0, alpha_lr=0.0)
    batch, parts = double_rows(wsrl, 4 * ROWS), []

    def gradient(rows):
        agent.learn_policy(rows)
        return [parameter.grad.clone() for parameter in (*agent.actor.parameters(), agent.raw_alpha)]

    for i in range(4):
        parts.append(gradient(wsrl.Batch(*(column[ROWS * i : ROWS * (i + 1)] for column in batch))))
    for whole, *of_parts in zip(gradient(batch), *parts, strict=True):
        torch.testing.assert_close(whole, sum(of_parts) / 4, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("policy_q", ["min", "mean"])
def test_the_policy_ascends_the_minimum_or_the_mean_of_all_critics(wsrl, policy_q):
    agent = make_agent(wsrl, policy_q=policy_q)
    constant_critics(agent.critic, range(3, 13))
    agent.raw_alpha.data.fill_(-99.0)  # no weight of the entropy
    assert agent.learn_policy(make_batch(wsrl))["actor_loss"].item() == pytest.approx(
        {"min": -3, "mean": -7.5}[policy_q]
    )


@pytest.mark.parametrize("raised", [False, True])
def test_the_temperature_falls_while_the_entropy_is_above_minus_the_number_of_actions(wsrl, raised):
    agent = make_agent(wsrl, log_std="parameter")
    agent.actor.log_std.data.fill_(0.0 if raised else -4.0)
    before = agent.raw_alpha.item()
    entropy = agent.learn_policy(make_batch(wsrl))["entropy"].item()
    assert (entropy > -2) == raised == (agent.raw_alpha.item() < before)


def test_updates_of_200_000_steps(wsrl):
    calls, run = [], object.__new__(wsrl.WSRLRun)
    run.config = wsrl.TrainConfig()
    agent = run.agent = SimpleNamespace(config=run.config, begin=lambda: None)
    agent.update_online = lambda n: calls.append((step, n)) or {}
    agent.learn_online_from, run.replay = (
        functools.partial(wsrl.WSRL.learn_online_from, agent),
        wsrl.Replay("cpu", "auto"),
    )
    run.buffer = SimpleNamespace(size=1, sample=lambda n: n)
    for step in range(1, run.config.online_iterations + 1):
        run.update_online(step)
    assert calls[0] == (5_001, 1_024) and len(calls) == 195_000 and 4 * len(calls) == 780_000
    assert {n for _, n in calls} == {1_024}
    assert run.config.buffer_size >= run.config.online_iterations


# --- The switch
def test_no_online_batch_holds_an_offline_row(wsrl, hopper_file, tmp_path):
    config = wsrl.TrainConfig(
        **TINY | {"dataset": str(hopper_file), "runs_dir": str(tmp_path), "offline_iterations": 1}
    )
    run = wsrl.WSRLRun(config, wsrl.WSRL)
    run.load_dataset()
    run.dataset.stored().p.fill_(9.0)
    assert (run.dataset.sample(100).p == 9).all()
    before = copy.deepcopy(run.agent.state_dict())
    run.start_online()
    assert run.dataset is None and run.buffer.size == 0 and run.buffer.kept == 0
    assert_equal(dict(before), dict(run.agent.state_dict()))
    for _ in range(20):
        run.remember(np.ones(11), np.zeros(3), 1.0, np.ones(11), False)
    batch = run.buffer.sample(10_000)
    assert not batch.p.any() and (batch.states == 1).all()


def offline_rows(module, tmp_path, **values):
    """The offline rows of a run on five rows of a sparse task on Pendulum-v1: one success, one failure."""
    states = np.repeat(np.array([0, 1, 2, 13, 14], np.float32)[:, None], 3, 1)
    columns = {"observations": states, "next_observations": states + 1, "actions": np.zeros((5, 1), np.float32)}
    columns |= {"rewards": np.array([0, 0, 1, 0, 0], np.float32)}
    columns |= {"terminals": np.array([0, 0, 1, 0, 0], bool), "timeouts": np.array([0, 0, 0, 0, 1], bool)}
    path = write_dataset(tmp_path / "data.hdf5", columns)
    settings = {"env": "Pendulum-v1", "dataset": str(path), "runs_dir": str(tmp_path), "device": "cpu", "hidden_dim": 8}
    run = module.WSRLRun(module.TrainConfig(**settings | values), module.WSRL)
    run.load_dataset()
    return run.dataset.stored()


def test_offline_rows_carry_their_returns(wsrl, tmp_path):
    rewards = {"reward_scale": 10.0, "reward_bias": -5.0}
    plain = offline_rows(wsrl, tmp_path, **rewards, calibrate=True)
    assert plain.rewards.tolist() == [-5, -5, 5, -5, -5]
    assert plain.extra.tolist() == pytest.approx([-5 - 0.99 * 5 + 0.99**2 * 5, -0.05, 5, -9.95, -5])
    sparse = offline_rows(wsrl, tmp_path, **rewards, calibrate=True, is_sparse_reward=True)
    assert sparse.extra.tolist() == pytest.approx([-5 - 0.99 * 5 + 0.99**2 * 5, -0.05, 5, -500, -500])
    assert not offline_rows(wsrl, tmp_path, **rewards).extra.any()


# --- Configuration
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"subset": 11}, "subset 11 must not be above ensemble 10"),
        ({"log_std": "heads"}, "log_std must be one of head, parameter, not 'heads'"),
        ({"policy_q": "max"}, "policy_q must be one of min, mean"),
        ({"utd": 0}, "utd must be finite and at least 1"),
        ({"is_sparse_reward": True, "discount": 1.0}, "is_sparse_reward needs a discount below 1"),
    ],
)
def test_values_that_no_run_can_use_are_refused(wsrl, values, message):
    with pytest.raises(ValueError, match=message):
        wsrl.TrainConfig(**values)


def test_guidance_is_no_field(wsrl, tmp_path):
    with pytest.raises(SystemExit, match="error: configuration: .*samg"):
        wsrl.parse_config(wsrl.TrainConfig, ["--samg", "true"])


COMMON = {
    "ensemble": 10,
    "subset": 2,
    "utd": 4,
    "batch_size": 256,
    "warmup_steps": 5000,
    "policy_lr": 1e-4,
    "qf_lr": 3e-4,
    "alpha_lr": 1e-4,
    "cql_n_actions": 10,
    "cql_importance_sample": True,
    "discount": 0.99,
    "cql_max_target_backup": True,
    "normalize": False,
    "policy_q": "min",
    "soft_target_update_rate": 0.005,
    "offline_iterations": 1_000_000,
    "online_iterations": 200_000,
    "normalize_reward": False,
    "cql_temp": 1.0,
    "cql_clip_diff_min": -math.inf,
    "cql_clip_diff_max": math.inf,
}
FAMILIES = {  # WSRL's values
    "antmaze": {"q_n_hidden_layers": 4, "hidden_dim": 256, "log_std": "parameter", "calibrate": True}
    | {"cql_lagrange": True, "cql_target_action_gap": 0.8, "reward_scale": 10.0, "reward_bias": -5.0}
    | {"online_max_target_backup": True, "is_sparse_reward": True, "eval_frequency": 20_000, "n_test_episodes": 100},
    "adroit": {"q_n_hidden_layers": 3, "hidden_dim": 512, "log_std": "head", "calibrate": True, "cql_lagrange": False}
    | {"cql_alpha": 1.0, "reward_scale": 10.0, "reward_bias": 5.0, "online_max_target_backup": False}
    | {"is_sparse_reward": True, "eval_frequency": 5_000, "n_test_episodes": 10},
    "locomotion": {"q_n_hidden_layers": 2, "hidden_dim": 256, "log_std": "head", "calibrate": False}
    | {"cql_alpha": 5.0, "cql_lagrange": False, "reward_scale": 1.0, "reward_bias": 0.0}
    | {"online_max_target_backup": False, "is_sparse_reward": False, "eval_frequency": 5_000, "n_test_episodes": 10},
}
CONFIGS = sorted((ROOT / "configs" / "wsrl").glob("*.yaml"))


def test_there_is_a_file_for_each_task_and_the_quickstart():
    others = {path.name for path in (ROOT / "configs" / "awac").glob("*.yaml")} - {"quickstart_likelihood.yaml"}
    assert {path.name for path in CONFIGS} == others and len(others) == 19


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_holds_wsrls_values_and_only_what_differs_from_the_defaults(wsrl, path):
    config, default = wsrl.parse_config(wsrl.TrainConfig, ["--config", str(path)]), wsrl.TrainConfig()
    given = yaml.safe_load(path.read_text())
    assert not [name for name, value in given.items() if name != "env" and getattr(default, name) == value]
    if path.stem == "quickstart":
        return
    env, level = path.stem.split("_", 1)
    assert config.env == f"{env}-{level.replace('_', '-')}-{'v0' if level == 'binary' else 'v2'}"
    family = "antmaze" if env == "antmaze" else "adroit" if level == "binary" else "locomotion"
    expected = COMMON | FAMILIES[family]
    assert {name: getattr(config, name) for name in expected} == expected


# --- Whole runs
@pytest.mark.parametrize("values", [{}, ANTMAZE], ids=["locomotion", "antmaze"])
def test_resumed_run_equals_the_uninterrupted_one(wsrl, values, hopper_file, tmp_path):
    """In the warm-up, from step 21, and after it, from step 105."""
    call = functools.partial(run_main, wsrl.WSRL, wsrl.WSRLRun)
    moments = [("offline", 50), ("online", 30), ("online", 118)]
    settings = TINY | values | {"dataset": hopper_file, "max_episode_steps": 7}
    whole = check_resumes(call, moments, wsrl.WSRLRun, tmp_path, **settings)
    ends = [end for end, *_ in checkpoint(whole)["progress"]["train_episodes"]]
    assert ends == list(range(7, 120, 7))  # so that it was saved after 21, 42, 63, 84 and 105 steps
    stored = checkpoint(whole)["buffer"]["rows"]
    assert len(stored) == 120 and not stored[:, -2:].any()
    assert not numbers(whole, "online", "critic_loss")[8:] and len(numbers(whole, "online", "critic_loss")) == 8


def test_the_warm_up_learns_nothing_and_acts_by_chance(wsrl, hopper_file, tmp_path):
    settings = TINY | {"online_iterations": 300, "warmup_steps": 300, "eval_frequency": 300, "dataset": hopper_file}
    run_main(wsrl.WSRL, wsrl.WSRLRun, runs_dir=tmp_path, **settings)
    folder = only_folder(tmp_path)
    before, after = checkpoint(folder, "offline_checkpoint.pt"), checkpoint(folder)
    for part in ("agent", "actor", "critic", "alpha", "alpha_prime"):
        assert_equal(before[part], after[part], part)
    assert before["critic"]["state"] and before["buffer"] is None and len(after["buffer"]["rows"]) == 300
    agent = wsrl.WSRL(wsrl.TrainConfig(**settings | {"dataset": ""}), wsrl.Environment("Hopper-v4"), "cpu")
    agent.load_state_dict(after["agent"])
    stored = after["buffer"]["rows"][:50].numpy()
    means = np.array([agent.act(row[:11], deterministic=True) for row in stored])
    assert 0.2 < np.abs(stored[:, 11:14] - means).mean() < 1.5


def test_an_online_phase_from_the_offline_checkpoint_is_that_of_the_run_in_one_go(wsrl, hopper_file, tmp_path):
    call = functools.partial(run_main, wsrl.WSRL, wsrl.WSRLRun)
    settings = TINY | {"dataset": hopper_file}
    call(runs_dir=tmp_path / "whole", **settings)
    call(runs_dir=tmp_path / "offline", **settings | {"online_iterations": 0})
    offline, whole = only_folder(tmp_path / "offline"), only_folder(tmp_path / "whole")
    call(runs_dir=tmp_path / "online", **settings, offline_checkpoint=offline / "offline_checkpoint.pt")
    online = only_folder(tmp_path / "online")
    assert rows(online, "online") == rows(whole, "online") and not rows(offline, "online")
    one, other = checkpoint(online), checkpoint(whole)
    for part in ("agent", "actor", "critic", "alpha", "buffer"):
        assert_equal(one[part], other[part], part)


def test_file_works_copied_alone_into_an_empty_folder(hopper_file, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    run_script(tmp_path / "wsrl.py", runs_dir=tmp_path / "runs", dataset=hopper_file, **TINY)
    folder = only_folder(tmp_path / "runs")
    assert [len(rows(folder, phase)) for phase in ("offline", "online")] == [6, 12]
    assert folder.name == "wsrl-seed0" and (folder / "summary.json").exists()


def test_data_that_fit_no_sparse_task_are_refused(wsrl, hopper_file, tmp_path):
    with pytest.raises(SystemExit, match="is_sparse_reward needs data of two rewards"):
        run_main(
            *(wsrl.WSRL, wsrl.WSRLRun),
            **TINY | {"dataset": hopper_file, "runs_dir": tmp_path, "calibrate": True, "is_sparse_reward": True},
        )


# --- On a GPU
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_updates_on_the_gpu_do_not_wait(wsrl):
    agent = wsrl.WSRL(wsrl.TrainConfig(**SIZES | ANTMAZE), ENV, "cuda")
    batch = wsrl.Batch(*(column.float().cuda() for column in double_rows(wsrl, 4 * ROWS)))
    agent.update(batch), agent.update_online(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = agent.update(batch) | agent.update_online(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in metrics.values())
