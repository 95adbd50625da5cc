"""torch.compile of the updates, Adam's step without its surroundings, and acting on the live weights."""

import copy

import numpy as np
import pytest
import torch
from reference import ENV, MIXED_P, SOME_DONE, make_batch, scattered_agent
from runs import TINY, check_resumes

CLASSES = {"awac": "AWAC", "iql": "IQL", "cql": "CQL", "calql": "CalQL"}
CLASSES |= {"td3_bc": "TD3BC", "spot": "SPOT", "edis": "EDIS"}
OBSERVATION = np.array([0.5, 0.25, -2.0])


@pytest.fixture(params=CLASSES)
def algorithm(request):
    """An algorithm's module and class."""
    module = request.getfixturevalue(request.param)
    return module, getattr(module, CLASSES[request.param])


@pytest.fixture
def agent(algorithm):
    module, cls = algorithm
    return scattered_agent(cls, module.TrainConfig(hidden_dim=8), 0.1)


# --- Compilation
@torch._dynamo.config.patch(trace_autograd_ops=True)  # as compiles() sets them
@torch._inductor.config.patch(fallback_random=True, compile_threads=1)
def test_compiled_update_equals_the_eager_one(algorithm, agent):
    start, compiled, batch = copy.deepcopy(agent.state_dict()), copy.deepcopy(agent), make_batch(algorithm[0], MIXED_P)
    compiled.compile_update()
    flag = {"td3_bc": "moves_policy", "spot": "moves_policy", "edis": None}.get(algorithm[0].__name__, "guided")
    for step, told in enumerate((False, False, True, True)):
        results = []
        for one in (agent, compiled):
            torch.manual_seed(step)
            results.append(one.update(batch, **({flag: told} if flag else {})))
        assert results[0].keys() == results[1].keys()
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-11, atol=1e-11, msg=name)
    for name, value in agent.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-11, atol=1e-11, msg=name)
    learned = [name for name, value in compiled.named_parameters() if value.grad is not None]
    assert learned and not any(torch.equal(compiled.state_dict()[name], start[name]) for name in learned)


@torch._dynamo.config.patch(trace_autograd_ops=True)
@torch._inductor.config.patch(fallback_random=True, compile_threads=1)
def test_compiled_updates_of_wsrl_equal_the_eager_ones(wsrl):
    config = wsrl.TrainConfig(hidden_dim=8, cql_n_actions=3, batch_size=2, calibrate=True, cql_lagrange=True)
    agent, batch = scattered_agent(wsrl.WSRL, config, 0.1), make_batch(wsrl, dones=SOME_DONE, extra=0.1)
    compiled = copy.deepcopy(agent)
    compiled.compile_update()
    for step, kind in enumerate(("update", "update", "update_online")):  # 4 updates of the critics on 2 rows each
        results = []
        for one in (agent, compiled):
            torch.manual_seed(step)
            results.append(getattr(one, kind)(batch))
        assert results[0].keys() == results[1].keys()
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=1e-10, atol=1e-10, msg=name)
    for name, value in agent.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_compiled_run_resumes_as_if_it_had_not_stopped(awac, call, hopper_file, tmp_path):
    settings = TINY | {"offline_iterations": 60, "vae_iterations": 20, "online_iterations": 300, "compile": "true"}
    check_resumes(call, [("online", 250)], awac.GuidedRun, tmp_path, env="Hopper-v4", dataset=hopper_file, **settings)


def test_auto_compiles_long_runs_only(awac, monkeypatch):
    def choice(**settings):
        return awac.compiles(awac.TrainConfig(**settings), "cpu")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert choice(offline_iterations=15_000, online_iterations=5_000)
    assert not choice(offline_iterations=14_999, online_iterations=5_000)
    assert not choice(offline_iterations=20_000, online_iterations=5_000, offline_checkpoint="offline_checkpoint.pt")
    assert choice(offline_iterations=0, online_iterations=5, compile="True")  # as YAML's true comes through
    assert not choice(compile="false")


def test_without_a_compiler_auto_goes_on_and_true_fails(awac, monkeypatch, capsys):
    def refuse(function):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", refuse)
    assert not awac.compiles(awac.TrainConfig(), "cpu")
    said = "torch.compile needs a C++ compiler such as g++; it does not work here: no C++ compiler found"
    assert capsys.readouterr().out.strip() == said
    with pytest.raises(SystemExit, match=f"error: {said.replace('+', '.')}; --compile false does without"):
        awac.compiles(awac.TrainConfig(compile="true"), "cpu")


@pytest.mark.parametrize("word", ["true", "false", "auto"])
def test_compile_on_the_command_line(awac, word, tmp_path):
    (tmp_path / "config.yaml").write_text(f"compile: {word}\n")
    for words in (["--compile", word], ["--config", str(tmp_path / "config.yaml")]):
        assert awac.parse_config(awac.TrainConfig, words).compile == word


def test_compile_is_auto_true_or_false(awac):
    with pytest.raises(ValueError, match="compile must be one of auto, true, false, not 'yes'"):
        awac.TrainConfig(compile="yes")


# --- Adam
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)])
def test_descend_makes_adams_steps(awac, rate):
    sides = []
    for own in (True, False):
        torch.manual_seed(0)
        network = awac.mlp(3, 8, 2)
        optimizers = {"network": torch.optim.Adam(network.parameters(), lr=rate, fused=True)}
        for _ in range(5):
            loss = network(torch.randn(16, 3)).square().mean()
            if own:
                awac.descend(optimizers, awac.gradients(optimizers, {"network": loss}))
            else:
                optimizers["network"].zero_grad()
                loss.backward()
                optimizers["network"].step()
        moments = [value for state in optimizers["network"].state.values() for value in state.values()]
        sides.append([*network.parameters(), *(parameter.grad for parameter in network.parameters()), *moments])
    assert len(sides[0]) == 20 and all(map(torch.equal, *sides))


def test_gradients_are_of_the_optimisers_own_parameters(awac):
    ours, others = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(3.0))
    optimizers = {"ours": torch.optim.Adam([ours]), "others": torch.optim.Adam([others])}
    assert awac.gradients(optimizers, {"ours": ours**2 * others}) == {"ours": (torch.tensor(12.0),)}
    assert ours.grad is None and others.grad is None


# --- Acting
def test_acting_follows_the_live_weights(agent):
    before = agent.act(OBSERVATION, deterministic=True)
    with torch.no_grad():
        for parameter in agent.actor.parameters():
            parameter.mul_(-0.5)
    after = agent.act(OBSERVATION, deterministic=True)
    assert not np.allclose(after, before, atol=1e-3)
    other = copy.deepcopy(agent)
    with torch.no_grad():
        for parameter in other.actor.parameters():
            parameter.mul_(-2)
    np.testing.assert_allclose(other.act(OBSERVATION, deterministic=True), before, atol=1e-12)
    np.testing.assert_array_equal(agent.act(OBSERVATION, deterministic=True), after)
    moved = agent.float().act(OBSERVATION.astype(np.float32), deterministic=True)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, after, atol=1e-5)


def test_acting_equals_the_network(agent):
    states = agent.normalize(torch.from_numpy(OBSERVATION))[None]
    policy = agent.actor(states)
    if isinstance(policy, torch.distributions.Normal):
        expected = policy.mean
    else:
        expected = policy if isinstance(policy, torch.Tensor) else policy.mean.tanh()
    low, high = (torch.from_numpy(bound) for bound in (ENV.action_low, ENV.action_high))
    if not isinstance(policy, torch.distributions.Normal):
        expected = (low + high) / 2 + (high - low) / 2 * expected
    expected = expected.clamp(low, high)[0].detach().numpy()
    np.testing.assert_allclose(agent.act(OBSERVATION, deterministic=True), expected, atol=1e-12)


# --- The buffer of the offline data
def test_the_buffer_takes_the_loaded_rows_themselves(awac):
    rows = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    whole, roomy = awac.ReplayBuffer(5, 2, 1, "cpu"), awac.ReplayBuffer(8, 2, 1, "cpu")
    whole.load(rows), roomy.load(rows)
    assert np.shares_memory(whole.rows.numpy(), rows) and not np.shares_memory(roomy.rows.numpy(), rows)
    assert torch.equal(whole.stored().states, roomy.stored().states) and roomy.size == 5
