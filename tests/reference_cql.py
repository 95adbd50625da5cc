"""CQL's update with SAMG, with and without Cal-QL's bound, in numpy, and what else the tests of both share."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    ENV,
    HIGH,
    LOW,
    MIXED_P,
    ROWS,
    SOME_DONE,
    adam,
    after_updates,
    assert_gradients,
    backward,
    forward,
    guidance_metrics,
    make_batch,
    normalized,
    polyak,
    scattered_agent,
    values_of,
)

K = 4
SIZES = {"hidden_dim": 8, "q_n_hidden_layers": 2, "cql_n_actions": K, "policy_lr": 0.01, "qf_lr": 0.02}
PLAIN = {"cql_alpha": 0.7, "soft_target_update_rate": 0.1, "critic_layer_norm": False}
VARIANTS = {
    "plain": {},
    "layer norm": {"critic_layer_norm": True},
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
TINY = {
    "hidden_dim": 16,
    "vae_hidden_dim": 16,
    "batch_size": 16,
    "warmup_steps": 40,
    "buffer_size": 300,
    "offline_iterations": 60,
    "vae_iterations": 40,
    "online_iterations": 320,
    "adapt_iterations": 5,
    "coefficient_frequency": 150,
    "eval_frequency": 160,
    "log_frequency": 10,
    "checkpoint_frequency": 30,
    "n_test_episodes": 1,
    "device": "cpu",
    "cql_n_actions": 2,
    "q_n_hidden_layers": 2,
    "env": "Hopper-v4",
    "cql_alpha": 5.0,
    "cql_alpha_online": 2.0,
    "bc_steps": 30,
    "target_update_period": 3,
    "guidance_steps": 250,
    "p_share": 0,  # p_threshold: enough rows pass for adaptive updates
}


def make_agent(module, name="CQL", **values):
    return scattered_agent(getattr(module, name), module.TrainConfig(**SIZES | values), 0.3)


def updated(module, name, p, guided, guidance=1.0, **values):
    """Everything that three updates in float32 leave behind."""
    batch = make_batch(module, p, SOME_DONE, extra=1.0)
    return after_updates(make_agent(module, name, **values), batch, guided, guidance)


def draws(config, seed):
    """Seeds torch, and returns what an update will draw, in its order."""
    sizes = (1, K if config.cql_max_target_backup else 1, K, K, K)
    torch.manual_seed(seed)
    tensors = [torch.empty(ROWS, k, 2, dtype=torch.float64).normal_() for k in sizes[:2]]
    tensors.append(torch.empty(ROWS, K, 2, dtype=torch.float64).uniform_(-1, 1))
    tensors += [torch.empty(ROWS, k, 2, dtype=torch.float64).normal_() for k in sizes[3:]]
    torch.manual_seed(seed)
    return [tensor.numpy() for tensor in tensors]


# --- The reference
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


def reference_update(values, memory, step, batch, noise, config, guided, calibrated=False):
    """One update of `values` and of Adam's `memory` in place; returns metrics, gradients and the rows' penalties."""
    s, a, r, s_next, d, p, bound = (column.numpy() for column in batch)
    s, s_next = normalized(values, s, s_next)
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
    metrics |= {"cql_gap": gap.mean(), "entropy": -log_pi.mean(), "td_error": np.abs(q[:, :, 0] - y).mean()}
    if config.cql_lagrange:
        metrics["alpha_prime"] = np.exp(values["log_alpha_prime"])
    if guided:
        metrics |= guidance_metrics(config.discount * (1 - d) * p * (q_off - q_target), p, config.discount)
    for name, gradient in gradients.items():
        of_critics = name.startswith(("critic", "log_alpha_prime"))
        adam(values, memory, {name: gradient}, step, config.qf_lr if of_critics else config.policy_lr)
    if step % config.target_update_period == 0:
        polyak(values, config.soft_target_update_rate)
    values["_extra_state"] = step
    return metrics, gradients, SimpleNamespace(inside=inside, gradient=penalty_gradient, moves=moves)


# --- What both are asked
def check_two_updates(agent, batch, case, calibrated=False):
    """Compares metrics, gradients and everything that the updates leave behind; returns the reference's penalties."""
    _, _, guided, guidance = CASES[case]
    agent.guidance_weight.fill_(guidance)
    values, memory = values_of(agent), {}
    for step in (1, 2):
        noise = draws(agent.config, step)
        metrics = {name: value.item() for name, value in agent.update(batch, guided=guided).items()}
        if calibrated:
            metrics.pop("bound_rate")
        expected, gradients, penalty = reference_update(
            values, memory, step, batch, noise, agent.config, guided, calibrated
        )
        assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-11)
        assert {name for name, x in agent.named_parameters() if x.grad is not None} == gradients.keys()
        assert_gradients(agent, gradients, rtol=1e-8, atol=1e-11)
        for name, value in values_of(agent).items():
            np.testing.assert_allclose(value, values[name], rtol=1e-7, atol=1e-8, err_msg=name)
    return penalty


def check_no_synchronisation(module, name):
    """Updates on the GPU under PyTorch's check, which raises where the host would wait for the device."""
    agent = getattr(module, name)(
        module.TrainConfig(**SIZES, cql_max_target_backup=True, cql_lagrange=True), ENV, "cuda"
    )
    batch = module.Batch(*(column.float().cuda() for column in make_batch(module, MIXED_P, SOME_DONE, extra=1.0)))
    agent.update(batch, guided=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = [agent.update(batch, guided=guided) for guided in (True, False)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for row in metrics for value in row.values())
