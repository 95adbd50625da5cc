"""SPOT: the VAE's density by hand, an update against the formulas in numpy, its phases, and whole runs."""

import functools
import math
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
TINY = PLAIN | {"vae_hidden_dim": 16, "vae_iterations": 60, "actor_dropout": 0.1}


def make_agent(spot, **values):
    settings = {"hidden_dim": 8, "vae_hidden_dim": 8, "actor_lr": 0.01, "critic_lr": 0.02, "tau": 0.1} | values
    return scattered_agent(spot.SPOT, spot.TrainConfig(**settings), 0.3)


@pytest.fixture
def run(spot):
    return functools.partial(run_main, spot.SPOT, spot.SPOTRun)


# --- The density by hand
MEAN, STD, ERRORS = [[1.0, 0, 0, 0]], [[1.0, 1, 1, 0.5]], [[0.2, 0.4]]


def test_elbo_loss_by_hand(spot):
    errors, mean, log_std = torch.tensor(ERRORS), torch.tensor(MEAN), torch.tensor(STD).log()
    assert spot.elbo_loss(errors, mean, log_std, beta=0.5).tolist() == pytest.approx([0.202268], abs=1e-6)
    two = spot.elbo_loss(*(torch.cat([x, 0 * x]) for x in (errors, mean, log_std)), beta=0.5)
    assert two.tolist() == pytest.approx([0.202268, 0.0], abs=1e-6)  # a row each


def test_elbo_loss_is_the_scaled_elbo(spot):
    error, mean, std = np.array(ERRORS), np.array(MEAN), np.array(STD)
    kl = 0.5 * (mean**2 + std**2 - 1 - np.log(std**2))
    constant = math.log(2 * math.pi * 0.125)
    minus_elbo = (error**2 / (2 * 0.125) + 0.5 * constant).sum() + kl.sum()
    assert minus_elbo == pytest.approx(1.376583, abs=1e-6)
    loss = spot.elbo_loss(torch.tensor(error), torch.tensor(mean), torch.tensor(std).log(), beta=0.5)
    assert loss.item() == pytest.approx(0.5 / 4 * (minus_elbo - constant), abs=1e-12)


def reference_density(values, s, a, noise, beta):
    """L_VAE(s, a), (n,), and its gradient by a, (n, act_dim), through the encoder and through the error."""
    encoder = forward(values, "vae.encoder", np.hstack([s, a]))
    mean, raw = np.split(encoder[-1], 2, axis=1)
    log_std = np.clip(raw, -4, 15)
    std = np.exp(log_std)
    decoder = forward(values, "vae.decoder", np.hstack([s, mean + std * noise]))
    u = np.tanh(decoder[-1])
    kl = 0.5 * (mean**2 + std**2 - 1) - log_std
    loss = ((u - a) ** 2).mean(1) + beta * kl.mean(1)
    by_u = 2 * (u - a) / a.shape[1]
    by_z = backward(values, "vae.decoder", decoder, by_u * (1 - u**2))[1][:, s.shape[1] :]
    by_mean = by_z + beta * mean / mean.shape[1]
    by_log_std = (by_z * noise * std + beta * (std**2 - 1) / mean.shape[1]) * ((raw > -4) & (raw < 15))
    by_input = backward(values, "vae.encoder", encoder, np.hstack([by_mean, by_log_std]))[1]
    return loss, by_input[:, s.shape[1] :] - by_u


def test_the_vaes_loss_and_its_gradient_by_the_action(spot, monkeypatch):
    agent, random = make_agent(spot), np.random.default_rng(3)
    s, a, noise = random.normal(size=(ROWS, 3)), random.uniform(-1, 1, (ROWS, 2)), random.normal(size=(ROWS, 4))
    agent.vae.encoder[-1].bias.data[-1] = -9.0  # a log std at its bound
    expected, along = reference_density(values_of(agent), s, a, noise, 0.5)
    actions = torch.from_numpy(a).requires_grad_()
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.from_numpy(noise))
    losses = agent.vae.losses(torch.from_numpy(s), actions, 0.5)
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-11)
    np.testing.assert_allclose(actions.grad, along, rtol=1e-9, atol=1e-12)
    assert (np.abs(along) > 1e-6).all()


def test_iwae_is_the_log_likelihood_where_the_latent_tells_nothing(spot):
    vae = spot.BehaviorVAE(3, 2, 8).double()
    for parameter in vae.parameters():
        parameter.data.zero_()  # q = p = N(0, 1), u = 0
    actions = torch.tensor([[0.2, 0.4], [0.0, -1.0]]).double()
    expected = -torch.distributions.Normal(0.0, math.sqrt(0.5 / 4)).log_prob(actions).sum(1)
    found = vae.iwae_losses(torch.zeros(2, 3).double(), actions, 0.5, 7)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-6)


def test_iwae_of_one_sample_is_minus_elbo_and_more_samples_are_tighter(spot):
    torch.manual_seed(0)
    vae, s, a = spot.BehaviorVAE(3, 2, 8), torch.randn(1, 3), torch.tensor([[0.5, -0.5]])
    with torch.no_grad():
        vae.encoder[-1].bias.copy_(torch.tensor([0.5, 0, 0, 0, 0, 0, 0, -0.5]))
        many = s.expand(100_000, -1), a.expand(100_000, -1), 0.5
        minus_elbo = 4 / 0.5 * vae.losses(*many).mean() + math.log(2 * math.pi * 0.125)
        one, ten = (vae.iwae_losses(*many, samples).mean() for samples in (1, 10))
    assert one.item() == pytest.approx(minus_elbo.item(), abs=0.02)
    assert ten < one - 0.01


def test_the_vae_learns_which_actions_are_likely(spot):
    torch.manual_seed(0)
    vae = spot.BehaviorVAE(1, 1, 32)
    adam_ = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(2000):
        s = 1.6 * torch.rand(64, 1) - 0.8
        adam_.zero_grad()
        vae.losses(s, s, 0.5).mean().backward()
        adam_.step()
    grid = torch.linspace(-0.7, 0.4, 12)[:, None].repeat_interleave(500, 0)
    near, far = (vae.losses(grid, grid + shift, 0.5).view(12, 500).mean(1) for shift in (0.0, 0.5))
    assert (near + 0.05 < far).all()


# --- Updates by hand
def test_policy_loss_by_hand(spot):
    q = torch.tensor([1.0, -3.0], requires_grad=True)
    loss = spot.spot_loss(q, torch.tensor(0.8), lambd=0.0)
    assert loss.item() == 0.5 and spot.spot_loss(q, torch.tensor(0.8), lambd=0.25).item() == pytest.approx(0.7)
    loss.backward()
    assert q.grad.tolist() == [-0.25, -0.25]  # the divisor is detached


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.25, 0.1875, 0.125, 0.05, 0.05]),
        ({"online_iterations": 1_000_000}, [0.25, 0.2375, 0.225, 0.21, 0.2]),
        ({"lambd_cool": False}, [0.25] * 5),
        ({"lambd_end": 0.5}, [0.25, 0.1875, 0.125, 0.125, 0.125]),
    ],
)
def test_lambda_cools_online(spot, settings, expected):
    config = spot.TrainConfig(lambd=0.25, **settings)
    found = [spot.cooled_lambd(config, updates) for updates in (0, 50_000, 100_000, 160_000, 200_000)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("discount", "done", "target"), [(0.99, 0.0, 2.98), (0.995, 0.0, 2.99), (0.995, 1.0, 1.0)])
def test_target_by_hand_before_and_after_the_switch(spot, discount, done, target):
    agent, batch = make_agent(spot, online_discount=0.995), make_batch(spot, dones=done)
    if discount == 0.995:
        agent.start_online()
    for k, value in enumerate((2.0, 5.0)):
        make_constant(agent.target_critic.heads[k], value)
        make_constant(agent.critic.heads[k], 0.0)
    batch.rewards.fill_(1.0)
    assert agent.update(batch, moves_policy=False)["critic_loss"].item() == pytest.approx(2 * target**2)


def test_updates_equal_the_formulas_in_numpy(spot, monkeypatch):
    agent, batch = make_agent(spot, lambd=0.4), make_batch(spot, dones=SOME_DONE)
    config, random = agent.config, np.random.default_rng(2)
    noises = {width: 3 * random.normal(size=(ROWS, width)) for width in (2, 4)}  # of a', and of the latent
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.from_numpy(noises[like.shape[1]]))
    values, memory, actor_step = values_of(agent), {}, 0
    for step, moves_policy in enumerate((False, True, False, True), start=1):
        metrics = agent.update(batch, moves_policy=moves_policy)
        s, a, r, s_next, d, *_ = (column.numpy() for column in batch)
        s, s_next = normalized(values, s, s_next)
        a_next = np.tanh(forward(values, "target_actor.layers", s_next)[-1])
        a_next = np.clip(a_next + np.clip(0.2 * noises[2], -0.5, 0.5), -1, 1)
        y = r + values["discount"] * (1 - d) * min_q(values, "target_critic", s_next, a_next)
        critic_loss, gradients = 0.0, {}
        for head in ("critic.heads.0", "critic.heads.1"):
            path = forward(values, head, np.hstack([s, (a - CENTER) / SCALE]))
            error = path[-1][:, 0] - y
            critic_loss += np.mean(error**2)
            gradients |= backward(values, head, path, 2 * error[:, None] / ROWS)[0]
        adam(values, memory, gradients, step, config.critic_lr)
        assert metrics["critic_loss"].item() == pytest.approx(critic_loss, rel=1e-10)
        if moves_policy:
            path = forward(values, "actor.layers", s)
            pi = np.tanh(path[-1])
            q_path = forward(values, "critic.heads.0", np.hstack([s, pi]))
            q = q_path[-1][:, 0]
            density, by_action = reference_density(values, s, pi, noises[4], config.beta)
            loss = -q.mean() / np.abs(q).mean() + values["lambd"] * density.mean()
            by_q = np.full((ROWS, 1), -1 / np.abs(q).mean() / ROWS)
            along = backward(values, "critic.heads.0", q_path, by_q)[1][:, 3:] + values["lambd"] * by_action / ROWS
            actor_step += 1
            gradients, _ = backward(values, "actor.layers", path, along * (1 - pi**2))
            adam(values, memory, gradients, actor_step, config.actor_lr)
            for name in [name for name in values if name.startswith("target_")]:
                values[name] += config.tau * (values[name.removeprefix("target_")] - values[name])
            assert metrics["actor_loss"].item() == pytest.approx(loss, rel=1e-9)
        for name, value in values_of(agent).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("iwae", [False, True])
def test_an_actor_step_moves_the_actor_and_neither_vae_nor_moments_of_it(spot, iwae):
    agent, batch = make_agent(spot, iwae=iwae, num_samples=3, lambd=5.0), make_batch(spot)
    agent.optimizers["critic"].param_groups[0]["lr"] = 0.0
    before = values_of(agent)
    agent.update(batch)
    after = values_of(agent)
    for name, value in before.items():
        if not name.startswith("target_"):
            assert np.array_equal(value, after[name]) != name.startswith("actor."), name
    assert all(parameter.grad is None for parameter in agent.vae.parameters()) and not agent.optimizers["vae"].state


def test_dropout_is_on_in_target_policy_and_loss_and_off_when_acting(spot, monkeypatch):
    agent, batch, calls = make_agent(spot, actor_dropout=0.5), make_batch(spot), []
    plain = torch.nn.functional.dropout
    monkeypatch.setattr(
        torch.nn.functional, "dropout", lambda x, p: calls.append((p, bool((x < 0).any()))) or plain(x, p)
    )
    agent.update(batch, moves_policy=False)
    assert calls == [(0.5, True)] * 2  # both hidden layers of the target policy, before the ReLU
    agent.update(batch)
    assert len(calls) == 6
    first, second = (agent.act(np.ones(3), deterministic=True) for _ in range(2))
    with torch.no_grad():
        expected = agent.actor(agent.normalize(torch.ones(1, 3).double()))[0].numpy()
    assert np.array_equal(first, second) and len(calls) == 6
    np.testing.assert_allclose(first, CENTER + SCALE * expected, atol=1e-7)


def test_last_layers_begin_small_where_that_is_set(spot):
    torch.manual_seed(0)
    agent = spot.SPOT(spot.TrainConfig(actor_init_w=1e-3, critic_init_w=3e-3), ENV, "cpu")
    for layers, width in ((agent.actor.layers, 1e-3), *((head, 3e-3) for head in agent.critic.heads)):
        for parameter in layers[-1].parameters():
            assert parameter.abs().max() <= width
        assert 0.9 * width < layers[-1].weight.abs().max() and layers[0].weight.abs().max() > 0.2
    assert torch.equal(agent.target_actor.layers[-1].weight, agent.actor.layers[-1].weight)
    agent = spot.SPOT(spot.TrainConfig(), ENV, "cpu")
    assert agent.actor.layers[-1].weight.abs().max() > 0.05  # 1 / sqrt(256)


def test_the_switch_resets_moments_and_keeps_targets(spot):
    for reset in (True, False):
        agent = make_agent(spot, reset_optimizers=reset)
        agent.update(make_batch(spot))
        before = values_of(agent)
        agent.start_online()
        assert [bool(agent.optimizers[name].state) for name in ("actor", "critic")] == [not reset] * 2
        changed = [name for name, value in values_of(agent).items() if not np.array_equal(value, before[name])]
        assert not set(changed) - {"discount"}


# --- Whole runs
def test_a_run_resumes_as_if_it_had_not_stopped(spot, run, hopper_file, tmp_path):
    more = {"lambd": 0.25, "online_discount": 0.995, "actor_init_w": 0.001, "offline_iterations": 100}
    settings = TINY | {"env": "Hopper-v4", "dataset": hopper_file} | more
    moments = [("vae", 40), ("offline", 60), ("online", 240)]
    whole = check_resumes(run, moments, spot.SPOTRun, tmp_path, **settings)
    assert [row["phase"] for row in rows(whole)] == ["vae"] * 3 + ["offline"] * 5 + ["online"] * 25
    lambdas = numbers(whole, "online", "lambd")
    assert lambdas == pytest.approx([0.25 * max(0.2, 1 - (step - 1) / 500) for step in range(20, 501, 20)])
    assert set(numbers(whole, "offline", "lambd")) == {0.25}
    start, end = checkpoint(whole, "offline_checkpoint.pt"), checkpoint(whole)
    assert (start["agent"]["discount"].item(), end["agent"]["discount"].item()) == pytest.approx((0.99, 0.995))
    assert end["actor"]["state"][0]["step"] == 250 and end["critic"]["state"][0]["step"] == 500  # anew from the switch
    frozen = [name for name in end["agent"] if name.startswith("vae.")]
    assert len(frozen) == 12 and all(torch.equal(end["agent"][name], start["agent"][name]) for name in frozen)
    # another run from the offline checkpoint is the same run, bit for bit
    run(runs_dir=tmp_path / "again", offline_checkpoint=whole / "offline_checkpoint.pt", **settings)
    again = only_folder(tmp_path / "again")
    assert rows(again, "online") == rows(whole, "online")
    assert_equal(checkpoint(again)["agent"], end["agent"])
    # one from before the switch is refused, also where its steps, the VAE's among them, are as many as the policy's
    path = tmp_path / "early.pt"
    state = start | {"progress": start["progress"] | {"step": 130}}
    del state["check_sum"]
    torch.save(state | {"check_sum": spot.check_sum(state)}, path)
    with pytest.raises(SystemExit, match="early.pt is not from the switch"):
        run(runs_dir=tmp_path / "early", offline_checkpoint=path, **settings)


def test_without_offline_rows_updates_begin_after_the_warm_up(run, hopper_file, tmp_path):
    settings = TINY | {"offline_iterations": 10, "vae_iterations": 10, "online_iterations": 60, "log_frequency": 1}
    settings |= {"keep_offline_data": "false", "warmup_steps": 40}
    run(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path, **settings)
    folder = only_folder(tmp_path)
    assert folder.name == "spot-no-offline-data-seed0"
    assert [row["critic_loss"] != "" for row in rows(folder, "online")] == [False] * 40 + [True] * 20


def test_the_file_runs_alone(hopper_file, tmp_path):
    script = shutil.copy(ROOT / "algorithms" / "spot.py", tmp_path)
    settings = TINY | {"offline_iterations": 20, "online_iterations": 30, "env": "Hopper-v4", "dataset": hopper_file}
    run_script(script, runs_dir=tmp_path / "runs", **settings)
    assert (only_folder(tmp_path / "runs") / "summary.json").is_file()


# --- Bad input
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"actor_dropout": 1.5}, "actor_dropout must be at most 1"),
        ({"lambd": -1.0}, "lambd must be finite and at least 0"),
        ({"num_samples": 0}, "num_samples must be finite and at least 1"),
        ({"online_discount": 1.01}, "online_discount must be at most 1"),
    ],
)
def test_values_that_no_run_can_use_are_refused(spot, values, message):
    with pytest.raises(ValueError, match=message):
        spot.TrainConfig(**values)


def test_there_is_no_guidance(spot):
    names = spot.TrainConfig().__dict__
    assert not [name for name in names if "samg" in name or "coefficient" in name or "guidance" in name]
