"""What the tests of the updates share: a tiny task, agents and batches on it, and the pieces of the numpy references.

`values` is an agent's state_dict as float64 arrays.
"""

from types import SimpleNamespace

import numpy as np
import torch

torch.set_num_threads(1)
LOW, HIGH = np.array([-1.0, -0.5]), np.array([1.0, 0.75])
ENV = SimpleNamespace(obs_dim=3, act_dim=2, action_low=LOW.astype(np.float32), action_high=HIGH.astype(np.float32))
ROWS = 8
MIXED_P = [0.0, 0.6, 1.0, 0.75, 0.0, 0.9, 0.61, 0.0]
SOME_DONE = [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
CASES = {  # p, dones, guided, guidance weight
    "unguided": (MIXED_P, SOME_DONE, False, 1.0),
    "p=0": (0.0, SOME_DONE, True, 1.0),
    "p=1": (1.0, 0.0, True, 1.0),
    "mixed p": (MIXED_P, SOME_DONE, True, 1.0),
    "mixed p, faded": (MIXED_P, 0.0, True, 0.25),
}
WITHOUT_WEIGHT = {"p=0": (0.0, 1.0), "guidance weight 0": (MIXED_P, 0.0)}  # p, guidance weight
CRITICS_OF_P = [(0.0, True, False), (1.0, False, True), (MIXED_P, True, True)]  # p, uses its own, uses the frozen one


def scattered_agent(algorithm, config, scale):
    """An agent in float64, with observation statistics, whose networks all differ."""
    torch.manual_seed(0)
    agent = algorithm(config, ENV, "cpu").double()
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
        agent.obs_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
        agent.obs_std.copy_(torch.tensor([0.5, 2.0, 1.5]))
    return agent


def make_batch(module, p=0.0, dones=0.0, extra=0.0):
    random, ones = np.random.default_rng(1), np.ones(ROWS)
    states, next_states = random.normal(size=(2, ROWS, 3))
    actions, rewards = random.uniform(LOW, HIGH, (ROWS, 2)), random.normal(size=ROWS)
    columns = (states, actions, rewards, next_states, dones * ones, p * ones, extra * ones)
    return module.Batch(*map(torch.from_numpy, columns))


def single(batch):
    return type(batch)(*(column.float() for column in batch))


def same(module, other):
    return all(map(torch.equal, module.state_dict().values(), other.state_dict().values()))


# --- The reference
def values_of(agent):
    return {name: tensor.numpy().copy() for name, tensor in agent.state_dict().items()}


def normalized(values, *states):
    return ((x - values["obs_mean"]) / values["obs_std"] for x in states)


def layers(values, network):
    """The places of the linear layers; a LayerNorm, which has a vector for a weight, stands right behind its own."""
    found = [name for name in values if name.startswith(network + ".") and values[name].ndim == 2]
    return sorted(int(name.split(".")[-2]) for name in found)


def linear(values, network, i, x):
    return x @ values[f"{network}.{i}.weight"].T + values[f"{network}.{i}.bias"]


def standardised(z):
    """Rows of z at mean 0 and variance 1, as LayerNorm makes them, and the deviations that they had."""
    apart = z - z.mean(1, keepdims=True)
    std = np.sqrt((apart**2).mean(1, keepdims=True) + 1e-5)
    return apart / std, std


def forward(values, network, x):
    """The inputs of the linear layers, then the output."""
    path, numbers = [x], layers(values, network)
    for i in numbers:
        x, norm = linear(values, network, i, x), f"{network}.{i + 1}"
        if f"{norm}.weight" in values:
            x = standardised(x)[0] * values[f"{norm}.weight"] + values[f"{norm}.bias"]
        path.append(x := np.maximum(x, 0) if i < numbers[-1] else x)
    return path


def backward(values, network, path, gradient):
    """Gradients of weights and biases, and of the input, from the gradient of the output."""
    gradients = {}
    for i, x in zip(layers(values, network)[::-1], path[-2::-1]):
        norm = f"{network}.{i + 1}"
        if f"{norm}.weight" in values:
            unit, std = standardised(linear(values, network, i, x))
            gradients |= {f"{norm}.weight": (gradient * unit).sum(0), f"{norm}.bias": gradient.sum(0)}
            g = gradient * values[f"{norm}.weight"]
            gradient = (g - g.mean(1, keepdims=True) - unit * (g * unit).mean(1, keepdims=True)) / std
        gradients |= {f"{network}.{i}.weight": gradient.T @ x, f"{network}.{i}.bias": gradient.sum(0)}
        gradient = gradient @ values[f"{network}.{i}.weight"] * ((x > 0) if i else 1)
    return gradients, gradient


def min_q(values, critic, states, actions):
    inputs = np.hstack([states, actions])
    return np.minimum(*(forward(values, f"{critic}.heads.{k}", inputs)[-1][:, 0] for k in (0, 1)))


def adam(values, memory, gradients, step, rate):
    for name, g in gradients.items():
        m, v = memory.get(name, (0.0, 0.0))
        m, v = memory[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        values[name] = values[name] - rate * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)


def polyak(values, rate):
    for name in [name for name in values if name.startswith("target_critic")]:
        values[name] += rate * (values[name.removeprefix("target_")] - values[name])


def guidance_metrics(r_in, p, discount):
    metrics = {"r_in_mean": r_in.mean(), "r_in_std": r_in.std(ddof=1), "guidance_size": np.abs(r_in).mean()}
    return metrics | {"horizon": np.mean([1 / (1 - discount * (1 - x)) for x in p])}


def assert_gradients(agent, gradients, rtol, atol):
    parameters = dict(agent.named_parameters())
    for name, gradient in gradients.items():
        np.testing.assert_allclose(parameters[name].grad.numpy(), gradient, rtol=rtol, atol=atol, err_msg=name)


# --- What several algorithms are asked
def after_updates(agent, batch, guided, guidance=1.0):
    """Everything that three updates in float32 leave behind."""
    agent, batch = agent.float(), single(batch)
    agent.guidance_weight.fill_(guidance)
    torch.manual_seed(5)
    losses = [agent.update(batch, guided=guided)["critic_loss"] for _ in range(3)]
    adam_states = [state for optimizer in agent.optimizers.values() for state in optimizer.state.values()]
    kept = {name: value for name, value in agent.state_dict().items() if name != "guidance_weight"}
    return [*losses, *kept.values(), *(value for state in adam_states for value in state.values())]


def equal(tensors, others):
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def loss_with_moved(agent, batch, critic=None):
    """The critics' loss of a guided update, where the outputs of the critic of this name have moved by 1."""
    if critic:
        for head in getattr(agent, critic).heads:
            head[-1].bias.data.add_(1.0)
    torch.manual_seed(0)
    return agent.update(batch, guided=True)["critic_loss"]


def make_constant(network, value):
    """A network whose output is this, whatever its input."""
    for parameter in network.parameters():
        parameter.data.zero_()
    network[-1].bias.data.fill_(value)


def check_bellman_errors_by_hand(agent, batch):
    """For a discount of 0.5, Q of 3 and 5, and a value of 2 in s'."""
    make_constant(agent.critic.heads[0], 3.0)
    make_constant(agent.critic.heads[1], 5.0)
    batch.rewards[:] = torch.tensor([1.0, 2.0, 1.0, 9.0, 5.0, 2.5, 0.0, 4.0])
    expected = [1.0, 0.0, 2.0, 7.0, 2.0, 0.5, 2.0, 2.0]  # |3 - r - 0.5 * 2|, in rows 2 and 4 |3 - r|
    assert agent.bellman_errors(batch).tolist() == expected


def update_in_period(agent, batch):
    """Values at a period's start and after an update in it, and the batch's s, a, r, s', done, s and s' normalised."""
    agent.start_period(refresh=False)
    start = values_of(agent)
    agent.update(batch, guided=True)
    now = values_of(agent)
    s, a, r, s_next, d, _, _ = (column.numpy() for column in batch)
    s, s_next = normalized(now, s, s_next)
    return start, now, (s, a, r, s_next, d)


def check_sampled_actions_reach_both_borders(agent):
    agent = agent.float()
    agent.actor.log_std.data.fill_(2.0)
    actions = np.stack([agent.act(np.zeros(3, np.float32), deterministic=False) for _ in range(100)])
    assert actions.dtype == np.float32
    assert (actions.min(0) == LOW).all() and (actions.max(0) == HIGH).all()


def on_the_border(agent, batch, log_std):
    """Agent and batch in float32, with this log_std, and with actions at the action space's border."""
    agent, batch = agent.float(), single(batch)
    agent.actor.log_std.data.fill_(log_std)
    batch.actions[::2], batch.actions[1::2] = agent.action_low, agent.action_high
    return agent, batch


def check_update_is_finite(agent, batch):
    agent.update(batch, guided=True)
    assert all(value.isfinite().all() for value in agent.state_dict().values())
