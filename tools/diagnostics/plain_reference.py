"""The plain reference of bench.py: the project's own baseline, not anyone's published code.

AWAC, IQL, CQL and Cal-QL without SAMG, as the field's single files usually write them: eager PyTorch, batches by one
gather from each of five or six tensors, torch.optim.Adam with its defaults (on a CPU a loop over the parameters) and
one optimiser a network, Polyak averaging parameter by parameter, `.item()` of every logged number each step, the policy
run once for each of CQL's repeated states, gradients of the critics' weights in the policy's loss. The mathematics,
the networks' sizes and the order of the random draws are those of algorithms/*_samg.py with `samg: false`, so that both
give the same losses for the same batch and seed (tests/test_bench.py). Observations count as normalised already, and
actions as lying between -1 and 1.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal, TanhTransform, TransformedDistribution


class PlainBuffer:
    """Every column in a tensor of its own."""

    def __init__(self, columns: list[torch.Tensor]) -> None:
        self.columns = [column.clone() for column in columns]

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        indices = np.random.randint(0, len(self.columns[0]), size=batch_size)
        return [column[indices] for column in self.columns]


# --- Networks
class MLP(nn.Module):
    def __init__(self, sizes: list[int], tanh: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
            layers += [nn.ReLU()] if i else []
            layers.append(nn.Linear(n_in, n_out))
        self.net = nn.Sequential(*layers, *([nn.Tanh()] if tanh else []))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat(inputs, dim=-1))


class GaussianPolicy(nn.Module):
    """A Gaussian of state-independent log-std; IQL's mean passes a tanh."""

    def __init__(self, sizes: list[int], tanh: bool) -> None:
        super().__init__()
        self.mean, self.log_std = MLP(sizes, tanh), nn.Parameter(torch.zeros(sizes[-1]))

    def forward(self, states: torch.Tensor) -> Normal:
        return Normal(self.mean(states), self.log_std.clamp(-20, 2).exp())


class TanhGaussianPolicy(nn.Module):
    """CQL's: mean and log-std from one network, samples squashed."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.net = MLP([*sizes[:-1], 2 * sizes[-1]])
        self.log_std_multiplier, self.log_std_offset = nn.Parameter(torch.ones(())), nn.Parameter(-torch.ones(()))

    def forward(self, states: torch.Tensor, repeat: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """An action and its log-probability for each state, or `repeat` of them along a new dimension."""
        if repeat:
            states = states.unsqueeze(1).repeat(1, repeat, 1)
        mean, log_std = self.net(states).chunk(2, dim=-1)
        log_std = (self.log_std_multiplier * log_std + self.log_std_offset).clamp(-20, 2)
        policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        actions = policy.rsample()
        return actions, policy.log_prob(actions).sum(-1)


# --- Pieces of the updates
def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=rate)


def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    for target_parameter, parameter in zip(target.parameters(), source.parameters()):
        target_parameter.data.copy_((1 - tau) * target_parameter.data + tau * parameter.data)


class Plain:
    """The networks: an actor and two critics with their targets, all of one form in the four algorithms."""

    def make_critics(self, obs_dim: int, act_dim: int, config: Any, n_hidden: int, device: str) -> None:
        sizes = [obs_dim + act_dim, *[config.hidden_dim] * n_hidden, 1]
        self.critic_1, self.critic_2 = MLP(sizes).to(device), MLP(sizes).to(device)
        self.target_1, self.target_2 = copy.deepcopy(self.critic_1), copy.deepcopy(self.critic_2)

    def copy_from(self, agent: nn.Module) -> None:
        """Take the parameters of an algorithm's agent, and their type."""
        pairs = [(self.actor, agent.actor), (self.critic_1, agent.critic.heads[0])]
        pairs += [(self.critic_2, agent.critic.heads[1]), (self.target_1, agent.target_critic.heads[0])]
        pairs += [(self.target_2, agent.target_critic.heads[1])]
        pairs += [(self.value, agent.value)] if hasattr(self, "value") else []
        for own, other in pairs:
            own.to(next(agent.parameters()).dtype)
            for parameter, value in zip(own.parameters(), other.parameters(), strict=True):
                parameter.data.copy_(value.data)


# --- AWAC
class PlainAWAC(Plain):
    def __init__(self, config: Any, obs_dim: int, act_dim: int, device: str) -> None:
        self.config = config
        self.actor = GaussianPolicy([obs_dim, *[config.hidden_dim] * 3, act_dim], tanh=False).to(device)
        self.make_critics(obs_dim, act_dim, config, 3, device)
        self.actor_optimizer = adam(self.actor, config.learning_rate)
        self.critic_1_optimizer = adam(self.critic_1, config.learning_rate)
        self.critic_2_optimizer = adam(self.critic_2, config.learning_rate)

    def update(self, batch: list[torch.Tensor]) -> dict[str, float]:
        states, actions, rewards, next_states, dones = batch
        config = self.config

        with torch.no_grad():
            next_actions = self.actor(next_states).rsample().clamp(-1, 1)
            q_next = torch.min(self.target_1(next_states, next_actions), self.target_2(next_states, next_actions))
            target = rewards + config.gamma * (1.0 - dones) * q_next
        critic_1_loss = F.mse_loss(self.critic_1(states, actions), target)
        critic_2_loss = F.mse_loss(self.critic_2(states, actions), target)
        critic_loss = critic_1_loss + critic_2_loss
        self.critic_1_optimizer.zero_grad()
        self.critic_2_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_1_optimizer.step()
        self.critic_2_optimizer.step()

        with torch.no_grad():
            pi_actions = self.actor(states).rsample().clamp(-1, 1)
            v = torch.min(self.critic_1(states, pi_actions), self.critic_2(states, pi_actions))
            q = torch.min(self.critic_1(states, actions), self.critic_2(states, actions))
            weights = torch.clamp_max(torch.exp((q - v).squeeze(-1) / config.awac_lambda), config.exp_adv_max)
        log_prob = self.actor(states).log_prob(actions).sum(-1)
        actor_loss = (-log_prob * weights).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        polyak(self.target_1, self.critic_1, config.tau)
        polyak(self.target_2, self.critic_2, config.tau)
        return {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item()}


# --- IQL
class PlainIQL(Plain):
    def __init__(self, config: Any, obs_dim: int, act_dim: int, device: str) -> None:
        self.config, hidden = config, [config.hidden_dim] * 2
        self.actor = GaussianPolicy([obs_dim, *hidden, act_dim], tanh=True).to(device)
        self.make_critics(obs_dim, act_dim, config, 2, device)
        self.value = MLP([obs_dim, *hidden, 1]).to(device)
        self.actor_optimizer = adam(self.actor, config.actor_lr)
        self.critic_optimizer = adam(nn.ModuleList([self.critic_1, self.critic_2]), config.qf_lr)
        self.value_optimizer = adam(self.value, config.vf_lr)
        steps = max(1, config.offline_iterations)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.actor_optimizer, steps)

    def update(self, batch: list[torch.Tensor]) -> dict[str, float]:
        states, actions, rewards, next_states, dones = batch
        config = self.config

        with torch.no_grad():
            v_next = self.value(next_states)
            q_target = torch.min(self.target_1(states, actions), self.target_2(states, actions))
        v = self.value(states)
        advantage = q_target - v
        value_loss = torch.mean(torch.abs(config.iql_tau - (advantage < 0).to(v.dtype)) * advantage**2)
        self.value_optimizer.zero_grad()
        value_loss.backward()
        self.value_optimizer.step()

        target = rewards + (1.0 - dones) * config.discount * v_next.detach()
        q_1, q_2 = self.critic_1(states, actions), self.critic_2(states, actions)
        critic_loss = (F.mse_loss(q_1, target) + F.mse_loss(q_2, target)) / 2
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        polyak(self.target_1, self.critic_1, config.tau)
        polyak(self.target_2, self.critic_2, config.tau)

        weights = torch.exp(config.beta * advantage.detach()).clamp(max=config.exp_adv_max).squeeze(-1)
        errors = -self.actor(states).log_prob(actions).sum(-1)
        actor_loss = torch.mean(weights * errors)
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.schedule.step()
        return {"value_loss": value_loss.item(), "critic_loss": critic_loss.item(), "actor_loss": actor_loss.item()}


# --- CQL and Cal-QL
class PlainCQL(Plain):
    calibrated = False

    def __init__(self, config: Any, obs_dim: int, act_dim: int, device: str) -> None:
        self.config, self.act_dim = config, act_dim
        self.actor = TanhGaussianPolicy([obs_dim, *[config.hidden_dim] * 3, act_dim]).to(device)
        self.make_critics(obs_dim, act_dim, config, config.q_n_hidden_layers, device)
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self.actor_optimizer = adam(self.actor, config.policy_lr)
        self.critic_optimizer = adam(nn.ModuleList([self.critic_1, self.critic_2]), config.qf_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=config.policy_lr)

    def copy_from(self, agent: nn.Module) -> None:
        super().copy_from(agent)
        self.log_alpha.data = agent.log_alpha.data.clone()

    def update(self, batch: list[torch.Tensor]) -> dict[str, float]:
        states, actions, rewards, next_states, dones, *returns = batch
        config, n = self.config, self.config.cql_n_actions

        new_actions, log_pi = self.actor(states)
        alpha_loss = -(self.log_alpha * (log_pi - self.act_dim).detach()).mean()
        alpha = self.log_alpha.exp().detach() * config.alpha_multiplier
        q_new = torch.min(self.critic_1(states, new_actions), self.critic_2(states, new_actions)).squeeze(-1)
        actor_loss = (alpha * log_pi - q_new).mean()

        q_1, q_2 = self.critic_1(states, actions), self.critic_2(states, actions)
        with torch.no_grad():
            next_actions, _ = self.actor(next_states)
            q_next = torch.min(self.target_1(next_states, next_actions), self.target_2(next_states, next_actions))
            target = rewards + (1.0 - dones) * config.discount * q_next
        loss_1, loss_2 = F.mse_loss(q_1, target), F.mse_loss(q_2, target)

        random_actions = actions.new_empty((len(actions), n, self.act_dim)).uniform_(-1, 1)
        next_actions, next_log_pi = self.actor(next_states, repeat=n)
        current_actions, current_log_pi = self.actor(states, repeat=n)
        next_actions, next_log_pi = next_actions.detach(), next_log_pi.detach()
        current_actions, current_log_pi = current_actions.detach(), current_log_pi.detach()
        repeated = states.unsqueeze(1).repeat(1, n, 1)
        gaps, log = [], {}
        for number, (critic, q) in enumerate(((self.critic_1, q_1), (self.critic_2, q_2)), start=1):
            q_random = critic(repeated, random_actions).squeeze(-1)
            q_current = critic(repeated, current_actions).squeeze(-1)
            q_next = critic(repeated, next_actions).squeeze(-1)
            if self.calibrated:
                bound = returns[0].repeat(1, n)
                log[f"bound_rate_{number}"] = (torch.sum(q_current < bound) / q_current.numel()).item()
                q_current, q_next = torch.maximum(q_current, bound), torch.maximum(q_next, bound)
            log[f"std_{number}"] = torch.std(torch.cat([q_random, q.detach(), q_next, q_current], dim=1), dim=1)
            log[f"std_{number}"] = log[f"std_{number}"].mean().item()
            uniform = self.act_dim * math.log(0.5)
            terms = [q_random - uniform, q_next - next_log_pi, q_current - current_log_pi]
            soft_maximum = torch.logsumexp(torch.cat(terms, dim=1) / config.cql_temp, dim=1) * config.cql_temp
            gap = torch.clamp(soft_maximum - q.squeeze(-1), config.cql_clip_diff_min, config.cql_clip_diff_max)
            gaps.append(gap.mean())
        critic_loss = loss_1 + loss_2 + config.cql_alpha * gaps[0] + config.cql_alpha * gaps[1]

        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        polyak(self.target_1, self.critic_1, config.soft_target_update_rate)
        polyak(self.target_2, self.critic_2, config.soft_target_update_rate)
        log |= {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item(), "alpha_loss": alpha_loss.item()}
        log |= {"alpha": alpha.item(), "log_pi": log_pi.mean().item(), "loss_1": loss_1.item(), "loss_2": loss_2.item()}
        log |= {"q_1": q_1.mean().item(), "q_2": q_2.mean().item(), "target": target.mean().item()}
        return log | {"gap_1": gaps[0].item(), "gap_2": gaps[1].item()}


class PlainCalQL(PlainCQL):
    calibrated = True


PLAIN = {"awac": PlainAWAC, "iql": PlainIQL, "cql": PlainCQL, "calql": PlainCalQL}
