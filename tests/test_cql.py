"""CQL with SAMG's target and penalty, against a numpy implementation that is written from the formulas."""

import copy
import functools
import json
import math
from types import SimpleNamespace

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
    SOME_DONE,
    WITHOUT_WEIGHT,
    equal,
    loss_with_moved,
    make_batch,
    same,
    update_in_period,
    values_of,
)
from reference_cql import (
    PLAIN,
    SIZES,
    TINY,
    VARIANTS,
    check_no_synchronisation,
    check_two_updates,
    heads,
    make_agent,
    policy,
    updated,
)
from runs import check_resumes, checkpoint, numbers, rows, run_script


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


@pytest.mark.parametrize(("p", "guidance"), WITHOUT_WEIGHT.values(), ids=WITHOUT_WEIGHT)
@pytest.mark.parametrize("variant", ["plain", "lagrange", "max target backup"])
def test_guided_without_weight_is_bit_for_bit_unguided(cql, variant, p, guidance):
    guided = updated(cql, "CQL", p, True, guidance, **VARIANTS[variant])
    assert equal(guided, updated(cql, "CQL", MIXED_P, False, **VARIANTS[variant]))
    assert guided[0] != updated(cql, "CQL", MIXED_P, True, **VARIANTS[variant])[0]


def test_unguided_the_frozen_critic_is_not_evaluated(cql):
    agent = make_agent(cql)
    agent.offline_critic.forward = None
    agent.update(make_batch(cql, MIXED_P), guided=False)
    with pytest.raises(TypeError):
        agent.update(make_batch(cql, MIXED_P), guided=True)


@pytest.mark.parametrize(("p", "uses_target", "uses_offline"), CRITICS_OF_P)
def test_p_decides_which_critic_the_target_uses(cql, p, uses_target, uses_offline):
    def loss(moved=None):
        return loss_with_moved(make_agent(cql, cql_alpha=0.0), make_batch(cql, p), moved)

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
        for layer in [layer for layer in network if isinstance(layer, torch.nn.Linear)]:
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
    assert same(agent.offline_critic, agent.critic)
    agent.updates = 7
    other = make_agent(cql, cql_alpha=5.0, cql_alpha_online=2.0)
    other.load_state_dict(agent.state_dict())
    assert other.cql_alpha == 2 and other.updates == 7
    frozen = values_of(agent.offline_critic)
    agent.update(make_batch(cql, MIXED_P), guided=True)
    assert all(np.array_equal(value, frozen[name]) for name, value in values_of(agent.offline_critic).items())
    agent.start_period(refresh=True)
    for critic in (agent.offline_critic, agent.period_critic):
        assert same(critic, agent.target_critic)
        assert not critic.training and not any(x.requires_grad for x in critic.parameters())
    assert all(x.requires_grad for x in agent.critic.parameters())


def test_bellman_errors_use_the_period_critic_at_the_mean_action(cql):
    agent, batch = make_agent(cql), make_batch(cql, MIXED_P, SOME_DONE)
    start, now, (s, a, r, s_next, d) = update_in_period(agent, batch)
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


# --- Whole runs
@pytest.mark.slow
@pytest.mark.parametrize("samg", ["true", "false"])
def test_resumed_run_equals_the_uninterrupted_one(cql, samg, hopper_file, tmp_path):
    moments = [("offline", 20), ("offline", 50), ("online", 90), ("online", 290)]
    settings = TINY | {"dataset": hopper_file, "samg": samg, "cql_lagrange": "true"}
    call = functools.partial(run_main, cql.CQL, cql.GuidedRun)
    whole = check_resumes(call, moments, cql.GuidedRun, tmp_path, **settings)
    state = checkpoint(whole)["agent"]
    assert state["cql_alpha"] == 2 and checkpoint(whole, "offline_checkpoint.pt")["agent"]["cql_alpha"] == 5
    assert state["_extra_state"] == 60 + 320 - (40 if samg == "true" else 0)


def test_run_from_end_to_end(hopper_file, tmp_path):
    run_script(ROOT / "algorithms" / "cql_samg.py", dataset=hopper_file, runs_dir=tmp_path, **TINY)
    folder = tmp_path / "Hopper-v4" / "cql-samg-seed0"
    assert json.loads((folder / "summary.json").read_text())["algorithm"] == "cql_samg"
    assert [len(rows(folder, phase)) for phase in ("offline", "coefficient", "online")] == [6, 4, 32]
    for column in ("critic_loss", "actor_loss", "q_mean", "cql_gap", "entropy", "alpha"):
        assert len(numbers(folder, "offline", column)) == 6 and len(numbers(folder, "online", column)) == 28, column
    assert any(numbers(folder, "online", "r_in_mean"))
    weights = numbers(folder, "online", "guidance_weight")
    assert weights[-1] == 0 and weights[20] == 1
