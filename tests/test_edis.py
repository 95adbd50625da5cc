"""EDIS: its diffusion model, energies and sampler by hand, what becomes of generated rows, and whole runs."""

import copy
import functools
import math
import random
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_module, run_main, write_dataset
from reference import ENV, HIGH, LOW, make_batch, scattered_agent
from reference_cql import PLAIN, SIZES, VARIANTS
from runs import assert_equal, assert_same_run, check_resumes, checkpoint, numbers, only_folder, rows, run_script

SCRIPT = ROOT / "algorithms" / "edis.py"
SMALL = {
    **{"sample_steps": 4, "pool_steps": 3, "n_generated": 100, "generation_batch": 40, "diffusion_iterations": 40},
    **{"denoiser_width": 16, "denoiser_layers": 2, "embed_dim": 8, "energy_updates": 10, "energy_hidden_dim": 8},
    **{"n_negatives": 3, "energy_pool": 12, "positive_rows": 30, "hidden_dim": 16, "batch_size": 16},
    **{"cql_n_actions": 2, "retrain_frequency": 60},
}
UNITS = {"diffusion": 40, "negatives": 2, "energies": 10, "generation": 3}  # of a retraining
RUN = SMALL | {
    **{"env": "Hopper-v4", "offline_iterations": 60, "online_iterations": 150, "eval_frequency": 75},
    **{"log_frequency": 10, "checkpoint_frequency": 15, "n_test_episodes": 1, "device": "cpu"},
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- Diffusion model
@pytest.mark.parametrize(
    ("sigma", "expected"), [(0.5, (0.8, 0.447214, 0.894427, -0.173287)), (2.0, (0.2, 0.894427, 0.447214, 0.173287))]
)
def test_preconditioning_by_hand(edis, sigma, expected):
    assert [x.item() for x in edis.scalings(double(sigma))] == pytest.approx(expected, abs=1e-6)


def test_noise_levels_by_hand(edis):
    assert edis.noise_levels(3) == pytest.approx([80, 2.515219, 0.002, 0], abs=1e-6)
    assert edis.noise_levels(5) == pytest.approx([80, 17.527832, 2.515219, 0.169753, 0.002, 0], abs=1e-6)
    assert edis.noise_levels(128)[16] == pytest.approx(38.784972, abs=1e-6)
    assert edis.noise_levels(32)[16] == pytest.approx(2.173860, abs=1e-6)
    added = [edis.added_noise(sigma, 128) for sigma in edis.noise_levels(128)]
    assert [i for i, gamma in enumerate(added) if gamma] == [*range(11, 107)]
    assert added[50] == pytest.approx(0.414214, abs=1e-6)


def test_decay_of_the_average_by_hand(edis):
    assert [edis.ema_decay(step) for step in (1, 100, 101)] == [0, 0, 0]
    expected = [0.37004, 0.95358, 0.98927, 0.995]
    assert [edis.ema_decay(step) for step in (102, 200, 1000, 2929)] == pytest.approx(expected, abs=5e-6)
    assert edis.ema_decay(10**6) == 0.995


def test_denoiser_is_the_formulas_in_numpy(edis):
    network = edis.Denoiser(3, 6, 2, 5).double()
    network.restart(generator())
    x, sigma = torch.randn(7, 3).double(), torch.rand(7, 1).double() + 0.1
    values = {name: value.numpy() for name, value in network.state_dict().items()}

    def linear(name, x):
        return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]

    c = np.log(sigma.numpy()) / 4
    waves = 2 * np.pi * values["frequencies"] * c
    z = linear("embedding.0", np.hstack([c, np.sin(waves), np.cos(waves)]))
    h = linear("inner", x.numpy() / np.sqrt(sigma.numpy() ** 2 + 1)) + linear("embedding.2", z / (1 + np.exp(-z)))
    h = linear("first", h)
    for i in range(2):
        h = h + linear(f"blocks.{i}", np.maximum(h, 0))
    f, s = linear("last", np.maximum(h, 0)), sigma.numpy()
    expected = x.numpy() / (s**2 + 1) + s / np.sqrt(s**2 + 1) * f
    np.testing.assert_allclose(network(x, sigma).detach().numpy(), expected, rtol=1e-10)
    assert (values["frequencies"] != 0).all() and len(values["frequencies"]) == 8


def test_restarted_weights_are_drawn_as_pytorch_draws_them_and_touch_no_other_stream(edis):
    network, before = edis.Denoiser(4, 64, 1, 32), torch.get_rng_state()
    network.restart(generator(3))
    assert torch.equal(torch.get_rng_state(), before)
    weight = network.blocks[0].weight.detach()
    assert weight.abs().max() <= 1 / 8 and weight.std() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    again = edis.Denoiser(4, 64, 1, 32)
    again.restart(generator(3))
    assert_equal(again.state_dict(), network.state_dict())


def test_diffusion_loss_by_hand(edis):
    """A denoiser that returns the clean rows but for 0.1 in one of two dimensions, and 0 in the other."""
    x, seen = torch.randn(50_000, 2).double(), []

    def denoise(noisy, sigma):
        seen.append((noisy - x, sigma))
        return x + double(0.1, 0.0)

    loss = edis.diffusion_loss(denoise, x, generator())
    (noise, sigma), *_ = seen
    weights = (sigma**2 + 1) / sigma**2
    assert weights.shape == (50_000, 1)
    assert loss.item() == pytest.approx((weights * 0.01 / 2).mean().item(), rel=1e-9)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.02)
    assert (noise / sigma).std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("sigma", "weight"), [(0.5, 5.0), (2.0, 1.25)])
def test_weight_of_the_loss_by_hand(edis, sigma, weight, monkeypatch):
    draws = iter([double([(math.log(sigma) + 1.2) / 1.2]), double([0.7])])  # the level's, then the row's
    monkeypatch.setattr(edis, "normal", lambda like, generator: next(draws))
    loss = edis.diffusion_loss(lambda noisy, level: noisy * 0 + 1, double([0.0]), None)
    assert loss.item() == pytest.approx(weight, rel=1e-6)  # of a squared error of 1


# --- Sampler
def ode(edis, denoise, start, n, **guidance):
    x = torch.full((1, 1), float(start), dtype=torch.float64)
    return edis.denoise_rows(denoise, x, edis.noise_levels(n), generator(), churn=False, **guidance).item()


def test_a_constant_denoiser_is_where_the_sampler_ends(edis):
    for start in (-300.0, 0.0, 80.0):
        assert ode(edis, lambda x, sigma: 0 * x + 1.25, start, 128) == pytest.approx(1.25, abs=1e-12)


def test_the_sampler_solves_the_normals_ode_by_hand(edis):
    def denoise(x, sigma):
        return x / (1 + sigma**2)

    assert ode(edis, denoise, 10, 5) == pytest.approx(0.238407, abs=1e-6)
    assert ode(edis, denoise, 10, 128) == pytest.approx(0.125081, abs=1e-6)
    assert 10 / math.sqrt(1 + 80**2) == pytest.approx(0.124990, abs=1e-6)  # the exact solution, which it nears


def test_guidance_goes_down_the_energy_by_hand(edis):
    def guide(slope, weight, exact):
        return lambda x, sigma: edis.guidance_slope(lambda x, s: weight * slope * x[:, 0], x, sigma, 10.0, exact)

    def score_free(x, sigma):
        return x

    assert ode(edis, score_free, 5, 128, guide=guide(1, 0.01, False)) == pytest.approx(5 - 0.8, abs=1e-9)
    assert ode(edis, score_free, 5, 128, guide=guide(20, 1, False)) == pytest.approx(5 - 800, abs=1e-6)  # clipped
    assert ode(edis, score_free, 5, 128, guide=guide(1, 1, True)) == pytest.approx(5 - 3200, abs=0.01)


def test_the_limit_is_a_rows_norm_over_the_root_of_its_width(edis):
    x = torch.zeros(3, 4, dtype=torch.float64)
    rise = double([3.0, 4.0, 0, 0], [30.0, 40.0, 0, 0], [0, 0, 0, 0])
    slope = edis.guidance_slope(lambda x, sigma: (rise * x).sum(1), x, double(2.0), 10.0, False)
    assert slope.norm(dim=1).tolist() == pytest.approx([5, 20, 0])
    exact = edis.guidance_slope(lambda x, sigma: (rise * x).sum(1), x, double(2.0), 10.0, True)
    assert torch.allclose(exact, 2 * slope)


def test_guidance_is_taken_where_the_slope_is(edis):
    """At the raised level and there at the noised rows, and at the next level at the rows ahead: fault 7."""
    places, levels = [], edis.noise_levels(128)[40:43]

    def denoise(x, sigma):
        places.append(("slope", x.clone(), sigma.item()))
        return 0 * x

    def guide(x, sigma):
        places.append(("guidance", x.clone(), sigma.item()))
        return 0 * x

    edis.denoise_rows(denoise, torch.ones(2, 1).double(), [*levels, 0.0], generator(), guide)
    assert [place[0] for place in places] == ["slope", "guidance"] * 5
    for slope, guidance in zip(places[::2], places[1::2]):
        assert torch.equal(slope[1], guidance[1]) and slope[2] == guidance[2]
    gamma = math.sqrt(2) - 1
    expected = [levels[0] * (1 + gamma), levels[1], levels[1] * (1 + gamma), levels[2], levels[2] * (1 + gamma)]
    assert [place[2] for place in places[::2]] == pytest.approx(expected)
    assert not torch.equal(places[0][1], torch.ones(2, 1).double())


def test_samples_of_a_two_point_distribution(edis):
    x = 80 * torch.randn(2000, 1, generator=generator(1)).double()
    drawn = edis.denoise_rows(lambda x, sigma: (x / sigma**2).tanh(), x, edis.noise_levels(64), generator())
    assert ((drawn.abs() - 1).abs() < 1e-6).float().mean() > 0.99
    assert drawn.mean().item() == pytest.approx(0, abs=0.1)


def test_exact_guidance_of_an_exact_energy_tilts_the_normal(edis):
    """e^-E = e^a moves N(0, 1) to N(1, 1); at level sigma E(a) = -a / (1 + sigma^2) up to a constant."""
    x = 80 * torch.randn(4000, 1, generator=generator(1)).double()

    def guide(x, sigma):
        return edis.guidance_slope(lambda x, sigma: (-x / (1 + sigma**2))[:, 0], x, sigma, 10.0, True)

    drawn = edis.denoise_rows(lambda x, s: x / (1 + s**2), x, edis.noise_levels(64), generator(), guide)
    assert drawn.mean().item() == pytest.approx(1, abs=0.08) and drawn.std().item() == pytest.approx(1, abs=0.08)


def test_in_painting_returns_the_condition_and_draws_the_rest(edis):
    network, known = edis.Denoiser(4, 16, 1, 8), torch.tensor([[0.3, -0.2]]).repeat(5, 1)
    network.restart(generator())
    seen = []

    def denoise(x, sigma):
        seen.append((x[:, :2].clone(), sigma.item()))
        return network(x, sigma)

    drawn = edis.denoise_rows(denoise, 80 * torch.randn(5, 4), edis.noise_levels(8), generator(1), None, known)
    assert torch.equal(drawn[:, :2], known)
    assert (drawn[:, 2:].std(0) > 1e-3).all()
    away = torch.stack([(x - known) / sigma for x, sigma in seen])  # before each pass: its level's noise, not clean
    assert len(seen) == 15 and away.std().item() == pytest.approx(1, abs=0.2)


# --- Energies
def test_info_nce_by_hand(edis):
    assert edis.info_nce(double(0), double([1, 2])).item() == pytest.approx(0.407606, abs=1e-6)
    assert edis.info_nce(torch.ones(4), torch.ones(4, 10)).item() == pytest.approx(2.397895, abs=1e-6)
    two = edis.info_nce(double(0, 3), double([1, 2], [3, 3]))  # each row against its own, and the mean: fault 6
    assert two.item() == pytest.approx((0.407606 + math.log(3)) / 2, abs=1e-6)


def test_every_positive_meets_only_its_own_negatives_condition_and_level(edis):
    tags, sigma = torch.arange(4.0).double(), double([0.0], [1.0], [0.0], [1.0]) * 1e-7 + 1e-7
    seen = []

    def energy(inputs):
        seen.append(inputs)
        return inputs[..., 1:2] * 0

    negatives = (10 * tags[:, None] + double(1, 2))[:, :, None]
    edis.contrast(energy, tags[:, None], (10 * tags)[:, None], negatives, sigma, generator())
    (inputs,) = seen
    assert inputs.shape == (4, 3, 3)
    assert torch.allclose(inputs[..., 1], (10 * tags)[:, None] + double(0, 1, 2), atol=1e-5)  # fault 3
    assert torch.allclose(inputs[..., 2], (sigma.log() / 4).expand(4, 3))
    assert torch.allclose(inputs[..., 0], tags[:, None].expand(4, 3), atol=1e-5)


def test_the_condition_is_noised_once_and_the_targets_each(edis):
    seen = []

    def energy(inputs):
        seen.append(inputs[..., :2] / edis.scalings(double(2.0))[2])
        return inputs[..., :1]

    n = 4000
    zeros = torch.zeros(n, 1).double()
    edis.contrast(energy, zeros, zeros, torch.zeros(n, 2, 1).double(), zeros + 2, generator())
    conditions, targets = seen[0].unbind(2)
    assert (conditions == conditions[:, :1]).all() and conditions.std().item() == pytest.approx(2, rel=0.05)
    assert targets.std().item() == pytest.approx(2, rel=0.05)
    assert torch.corrcoef(targets.T).fill_diagonal_(0).abs().max() < 0.05


def test_energy_of_actions_learns_the_ratio_of_two_normals(edis):
    """p(a) = N(0, 1) and pi = N(1, 1): E2 = log p / pi = 1/2 - a up to a constant."""
    torch.manual_seed(0)
    random, network = generator(), edis.mlp(2, 32, 32, 32, 1)
    optimizers = {"action": torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)}
    for _ in range(3000):
        positives, negatives = torch.randn(64, 1, generator=random) + 1, torch.randn(64, 10, 1, generator=random)
        sigma = torch.full((64, 1), 0.002)
        loss = edis.contrast(network, torch.zeros(64, 0), positives, negatives, sigma, random)
        edis.descend(optimizers, edis.gradients(optimizers, {"action": loss}))
    a = torch.linspace(-1, 2, 31)
    with torch.no_grad():
        energy = network(edis.energy_inputs(a[:, None], torch.full((31, 1), 0.002)))[:, 0]
    slope = np.polyfit(a.numpy(), energy.numpy(), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)


# --- Generation
def make_generation(module, **values):
    config = module.TrainConfig(**SMALL | values)
    torch.manual_seed(0)
    agent = module.EDIS(config, ENV, "cpu")
    return module.Generation(config, ENV, agent, "cpu")


def make_buffer(module, offline=50, online=40, sparse=False):
    """Rows of which the states tell where they come from: offline around 0, online around 3."""
    random = np.random.default_rng(0)
    buffer = module.MixingBuffer(offline + 60, 3, 2, "cpu", 0.5)
    table = random.normal(size=(offline + online, sum(buffer.widths))).astype(np.float32)
    table[:, 3:5] = random.uniform(LOW, HIGH, (len(table), 2))
    table[:, 9] = random.random(len(table)) < 0.2
    table[offline:, :3] += 3
    if sparse:
        table[:, 5] = np.where(table[:, 9] > 0, 5.0, -5.0)
    buffer.load(table[:offline].copy())
    buffer.rows[offline : offline + online] = torch.from_numpy(table[offline:])
    buffer.size = buffer.pointer = offline + online
    return buffer


def retrain(generation, buffer):
    first = 0
    for _, length, work in generation.stages(buffer.size - buffer.kept):
        for i in range(length):
            generation.do_unit(work, buffer, i)
        first += length
    assert generation.unit == first
    return generation.finish(buffer)


def test_a_retraining_has_these_units(edis):
    generation = make_generation(edis)
    assert {name: length for name, length, _ in generation.stages(40)} == UNITS
    assert [name for name, *_ in generation.stages(0)] == ["diffusion", "generation"]


def test_updates_of_the_denoiser_equal_a_plain_reference(edis, monkeypatch):
    """PyTorch's AdamW, cosine and clipping; the average as ema-pytorch has it."""
    generation, buffer = make_generation(edis, diffusion_iterations=130, batch_size=4), make_buffer(edis)
    losses, plain_loss = [], edis.diffusion_loss
    scale = 300.0  # gradients of which many are clipped, and not all
    monkeypatch.setattr(edis, "diffusion_loss", lambda *args: losses.append(args) or scale * plain_loss(*args))
    norms, network, average = [], None, None
    for i in range(130):
        seeds = edis.derive_seed(0, "generation", i)
        generation.do_unit(generation.train_denoiser, buffer, i)
        if i == 0:
            network = copy.deepcopy(generation.denoiser)
            network.restart(stream := generator(seeds))
            optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.99), weight_decay=0)
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 130)
        else:
            stream = generator(seeds)
        torch.randint(buffer.size, (4,), generator=stream)
        optimizer.zero_grad()
        (scale * plain_loss(network, losses[-1][1], stream)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).item())
        optimizer.step()
        cosine.step()
        if i % 10 == 0:
            decay, weights = edis.ema_decay(i + 1), [value.clone() for value in network.parameters()]
            pairs = zip(average or weights, weights)
            average = [decay * old + (1 - decay) * new for old, new in pairs]
    for one, other in zip(generation.denoiser.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(generation.average.parameters(), average, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert 0 < np.mean(np.array(norms) > 1) <= 1 and not torch.equal(average[0], network.frequencies)


def test_the_model_sees_all_rows_standardised_but_not_their_terminals(edis):
    generation, buffer = make_generation(edis), make_buffer(edis)
    generation.do_unit(generation.train_denoiser, buffer, 0)
    x = generation.standardise(buffer.rows[: buffer.size, : generation.dim])
    assert generation.dim == 2 * 3 + 2 + 1 + 1
    assert torch.allclose(x[:, :9].mean(0), torch.zeros(9), atol=1e-5)
    assert torch.allclose(x[:, :9].std(0, correction=0), torch.ones(9), atol=1e-4)
    assert set((x[:, 9] * (1 + 1e-5)).round(decimals=4).tolist()) == {0, 1}
    assert make_generation(edis, model_terminals=False).dim == 9
    assert make_generation(edis, is_sparse_reward=True).dim == 9  # there the reward tells


def test_negatives_are_samples_of_their_rows(edis):
    generation, buffer = make_generation(edis), make_buffer(edis)
    generation.do_unit(generation.train_denoiser, buffer, 0)
    known = []
    monkey = generation.sample

    def sample(n, steps, guide=None, known_columns=None, **given):
        known.append(given["known"])
        assert guide is None and steps == 3 and n == len(given["known"])
        return monkey(n, steps, **given)

    generation.sample = sample
    for i in (0, 1):
        generation.do_unit(generation.draw_negatives, buffer, i)
    pool = generation.work["pool"]
    assert pool.shape == (12, 10) and generation.work["actions"].shape == (12, 3, 2)
    assert generation.work["next_states"].shape == (12, 3, 3)
    assert torch.equal(torch.cat(known[:1]), pool[:, :3].repeat_interleave(3, 0))
    assert torch.equal(torch.cat(known[1:]), pool[:, :5].repeat_interleave(3, 0))
    raw = pool[:, :3] * generation.work["std"][:3] + generation.work["mean"][:3]
    latest = buffer.rows[buffer.size - 30 : buffer.size, :3]  # positive_rows
    assert (raw[:, None] - latest).abs().amax(2).amin(1).max() < 1e-4


def test_recent_rows_wrap_around_the_ring(edis):
    generation, buffer = make_generation(edis, positive_rows=5), make_buffer(edis, online=60)
    buffer.rows[:, 0] = torch.arange(110.0)
    buffer.pointer = 52
    drawn = {int(row) for row in generation.draw_recent(buffer, 400)[:, 0]}
    assert drawn == {51, 50, 109, 108, 107}


def test_each_energy_is_trained_on_what_it_is_of(edis, monkeypatch):
    generation, buffer = make_generation(edis), make_buffer(edis)
    generation.do_unit(generation.train_denoiser, buffer, 0)
    for i in (0, 1):
        generation.do_unit(generation.draw_negatives, buffer, i)
    calls, contrast = [], edis.contrast
    monkeypatch.setattr(
        edis, "contrast", lambda *args, **given: calls.append((args, given)) or contrast(*args, **given)
    )
    before = copy.deepcopy(generation.energies)
    generation.do_unit(generation.train_energies, buffer, 0)
    (of_state, given), (of_action, _), (of_next, _) = calls
    levels = torch.tensor(edis.noise_levels(4)[:-1])
    assert set(given["sigma"].flatten().tolist()) <= set(levels.tolist())
    mean, std = generation.work["mean"], generation.work["std"]
    visited = of_state[2] * std[:3] + mean[:3]
    assert of_state[1].shape == (16, 0) and visited.mean() > 2.5  # online rows
    assert 0.5 < (of_state[3] * std[:3] + mean[:3]).mean() < 2.5 and of_state[3].shape == (16, 3, 3)  # of both
    rows_of = (of_action[3][:, None] - generation.work["actions"]).abs().amax((2, 3)).argmin(1)
    assert torch.equal(of_action[1], generation.work["pool"][rows_of, :3])
    assert torch.equal(of_action[3], generation.work["actions"][rows_of])
    actions = generation.agent.to_unit(of_action[2] * std[3:5] + mean[3:5])
    assert actions.abs().max() <= 1 + 1e-5 and not torch.equal(of_action[2], generation.work["pool"][rows_of, 3:5])
    assert torch.equal(of_next[1], generation.work["pool"][rows_of, :5])
    assert torch.equal(of_next[2], generation.work["pool"][rows_of, 6:9])
    assert torch.equal(of_next[3], generation.work["next_states"][rows_of])
    for name, network in generation.energies.items():
        assert not torch.equal(network[0].weight, before[name][0].weight)


def test_each_energys_gradient_is_on_its_own_slice(edis):
    generation, x = make_generation(edis), torch.randn(5, 10)
    places = {(1, 0, 0): {0, 1, 2}, (0, 1, 0): {3, 4}, (0, 0, 1): {6, 7, 8}, (0, 0, 0): set()}
    total = 0
    for weights, columns in places.items():
        energy = functools.partial(generation.energy, weights=weights)
        slope = edis.guidance_slope(energy, x, torch.ones(1, 1), 1e9, False)
        assert {*slope.abs().sum(0).nonzero().squeeze(1).tolist()} == columns
        total = total + slope * (2.0 if weights[0] else 1.0)
    energy = functools.partial(generation.energy, weights=(2.0, 1.0, 1.0))
    torch.testing.assert_close(edis.guidance_slope(energy, x, torch.ones(1, 1), 1e9, False), total)


def test_what_becomes_of_the_models_samples(edis):
    generation, buffer = make_generation(edis), make_buffer(edis)
    raw = torch.zeros(5, 10)
    raw[:, 3:5] = torch.tensor([0.0, 0.125])
    raw[1, 2], raw[2, 8] = math.nan, math.inf
    raw[3, 3], raw[4, 4] = 7.0, -0.5
    raw[:, 9] = torch.tensor([0.4, 1, 1, 0.6, 1.3])
    raw[:, 5] = torch.arange(5.0)
    found, clipped = generation.to_rows(raw, buffer)
    assert found[:, 5].tolist() == [0, 3, 4] and clipped == 2  # what is not finite is gone
    unit = generation.agent.to_unit(found[:, 3:5])
    assert unit.abs().max() < 1 and unit[1, 0].item() == pytest.approx(1 - 1e-5, abs=1e-6)
    assert unit[2, 1].item() == pytest.approx(-1 + 1e-5, abs=1e-6)
    assert found[:, 9].tolist() == [0, 1, 1] and found[:, 10].tolist() == [0, 0, 0]
    assert found[:, 11].tolist() == [-math.inf] * 3
    off = make_generation(edis, model_terminals=False)
    assert off.to_rows(raw[:, :9], buffer)[0][:, 9].tolist() == [0, 0, 0]


@pytest.mark.parametrize("model_terminals", [True, False])
def test_sparse_rewards_are_one_of_two_and_terminals_follow(edis, model_terminals):
    generation = make_generation(edis, is_sparse_reward=True, model_terminals=model_terminals)
    buffer = make_buffer(edis, sparse=True)
    raw = torch.zeros(4, 9)
    raw[:, 5] = torch.tensor([-7.0, -0.1, 0.2, 9.0])
    found, _ = generation.to_rows(raw, buffer)
    assert found[:, 5].tolist() == [-5, -5, 5, 5]
    assert found[:, 9].tolist() == ([0, 0, 1, 1] if model_terminals else [0] * 4)
    buffer.rows[:, 9] = 0  # a task that goes on at its goal
    assert generation.to_rows(raw, buffer)[0][:, 9].tolist() == [0] * 4


def test_a_model_that_has_diverged_ends_the_run(edis, monkeypatch):
    generation, buffer = make_generation(edis, diffusion_iterations=2), make_buffer(edis)
    monkeypatch.setattr(
        edis, "diffusion_loss", lambda denoise, x, random: denoise(x, x[:, :1] * 0 + 1).sum() * math.inf
    )
    with pytest.raises(SystemExit, match="the diffusion's loss is not finite"):
        retrain(generation, buffer)
    generation = make_generation(edis)
    monkeypatch.undo()
    monkeypatch.setattr(edis, "denoise_rows", lambda denoise, x, *rest: x * math.nan)
    with pytest.raises(SystemExit, match="no generated row is finite"):
        retrain(generation, make_buffer(edis, online=0))


def test_a_retraining_replaces_the_rows_restarts_the_model_and_keeps_the_energies(edis):
    generation, buffer = make_generation(edis), make_buffer(edis)
    energies = copy.deepcopy(generation.energies)
    first = retrain(generation, make_buffer(edis, online=0))
    assert_equal(*({n: e.state_dict() for n, e in x.items()} for x in (energies, generation.energies)))
    assert "state_energy_loss" not in first and "state_guidance" not in first
    old = generation.rows.clone()
    second = retrain(generation, buffer)
    assert generation.rows.shape == (100, 12) == old.shape and not torch.equal(generation.rows, old)
    assert second.keys() == {*generation.COLUMNS} and all(math.isfinite(value) for value in second.values())
    assert generation.retrainings == 2 and not generation.work
    alone = make_generation(edis)  # the same second retraining, without the first but with its energies
    alone.retrainings = 1
    assert_equal(retrain(alone, buffer), second)
    assert second["data_reward"] == pytest.approx(buffer.stored().rewards.mean().item())
    assert second["generated_reward"] == pytest.approx(generation.rows[:, 5].mean().item())
    assert second["generated_done"] == pytest.approx(generation.rows[:, 9].mean().item())
    assert 0 < second["data_distance"] < 3 and second["state_energy_loss"] != math.log(4)


def test_distance_to_the_data_tells_copies_from_strangers(edis):
    generation, buffer = make_generation(edis, diffusion_iterations=1), make_buffer(edis)
    generation.do_unit(generation.train_denoiser, buffer, 0)
    generation.work |= {"dropped": torch.tensor(0), "clipped": torch.tensor(0)}
    reports = []
    for shift in (0.0, 30.0):
        generation.work["rows"] = buffer.rows[: buffer.size].clone()
        generation.work["rows"][:, 6] += shift
        reports.append(generation.measure(buffer))
    near, far = reports
    assert near["generated_distance"] < near["data_distance"] and near["generated_mean_shift"] < 1e-4
    assert near["generated_std"] == pytest.approx(1, abs=1e-3)
    apart = 30 / buffer.rows[: buffer.size, 6].std().item() / math.sqrt(10)
    assert far["generated_distance"] == pytest.approx(apart, rel=0.2)


# --- Cal-QL
@pytest.mark.parametrize("variant", ["plain", "layer norm", "lagrange", "max target backup", "backup entropy", "bc"])
def test_updates_are_those_of_calql_samg_without_guidance(edis, calql, variant):
    values = SIZES | PLAIN | VARIANTS[variant]
    plain = {"backup_entropy": False, "cql_lagrange": False, "policy_lr": 0.01, "cql_target_action_gap": -1.0}
    agents = []
    for module, algorithm in ((edis, edis.EDIS), (calql, calql.CalQL)):
        agent = scattered_agent(algorithm, module.TrainConfig(**plain | values), 0.0)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in (*agent.actor.parameters(), *agent.critic.parameters(), *agent.target_critic.parameters()):
                parameter.add_(0.3 * torch.randn_like(parameter))
        batch = make_batch(module, extra=np.array([-math.inf, 20, 0, 0.3, -0.5, 0.1, -1, 0.5]))
        torch.manual_seed(5)
        metrics = [{name: value.item() for name, value in agent.update(batch).items()} for _ in range(3)]
        agents.append((agent, metrics))
    (agent, metrics), (reference, expected) = agents
    assert metrics == expected
    there = reference.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in agent.state_dict().items())


def test_from_unit_is_to_units_inverse(edis):
    agent = make_generation(edis).agent
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5]])
    assert torch.allclose(agent.to_unit(agent.from_unit(corners)), corners, atol=1e-6)
    assert torch.equal(agent.from_unit(corners[:2] * 2), torch.tensor(np.array([LOW, HIGH], np.float32)))


# --- Batches and when there are new rows
def make_run(module, online, **values):
    run = object.__new__(module.EDISRun)
    run.config = module.TrainConfig(**values)
    run.buffer = module.MixingBuffer(1000, 1, 1, "cpu", run.config.mixing_ratio)
    run.buffer.load(np.full((300, 7), -9.0, np.float32))
    for _ in range(online):
        run.buffer.add([1], [1], 1.0, [1], False, 0.0, 1.0)
    run.generation = SimpleNamespace(rows=torch.full((500, 7), 2.0))
    run.generation_report = {}
    return run


@pytest.mark.parametrize(("online", "generated"), [(0, 256), (179, 256), (180, 76), (400, 76)])
def test_a_batch_has_a_share_of_generated_rows_and_none_of_the_data(edis, online, generated):
    run = make_run(edis, online, mixing_ratio=0.3)
    batch = run.online_batch()
    assert (batch.rewards == 2).sum() == generated and (batch.rewards == 1).sum() == 256 - generated
    assert run.describe("online", {})["generated_share"] == generated / 256 and run.describe("offline", {}) == {}


def test_the_arm_without_generation_mixes_the_data(edis):
    run = make_run(edis, 400, mixing_ratio=0.3, generated=False)
    batch = run.online_batch()
    assert (batch.rewards == -9).sum() == 76 and (batch.rewards == 1).sum() == 180
    assert run.describe("online", {}) == {}


@pytest.mark.parametrize("time_limit", [0, 1000])
def test_a_retraining_waits_for_the_end_of_an_episode_where_there_is_one(edis, monkeypatch, time_limit):
    run, made = make_run(edis, 5), []
    monkeypatch.setattr(edis.Run, "save_if_due", lambda self, within_episode=False: None)
    monkeypatch.setattr(edis.EDISRun, "switch", 100)
    run.retrain = lambda: made.append(run.step)
    run.env, run.step, run.next_retraining = SimpleNamespace(time_limit=time_limit), 160, 60
    run.save_if_due(within_episode=True)
    assert made == ([] if time_limit else [160])
    run.save_if_due()
    assert made[-1] == 160
    run.step, made[:] = 159, []
    run.save_if_due()
    assert not made


# --- Whole runs
@pytest.fixture(scope="module")
def call(edis):
    return functools.partial(run_main, edis.EDIS, edis.EDISRun)


@pytest.fixture(scope="module")
def whole(edis, call, hopper_file, tmp_path_factory):
    """The folder of a whole run; copies of it as kills at these units of its second retraining would have left it."""
    tmp, seen = tmp_path_factory.mktemp("edis"), []
    do_unit, retrain = edis.Generation.do_unit, edis.EDISRun.retrain

    def do_unit_and_copy(self, *args):
        do_unit(self, *args)
        if self.retrainings == 1 and self.unit in (37, 41, 48, 54):
            shutil.copytree(only_folder(tmp / "runs"), tmp / f"unit{self.unit}")

    def streams(run):
        simulator = run.env.env.unwrapped.data
        found = {
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        }
        found |= {"qpos": simulator.qpos.tolist(), "agent": copy.deepcopy(run.agent.state_dict())}
        return found | {
            "buffer": run.buffer.rows.clone(),
            "adam": copy.deepcopy(run.agent.optimizers["critic"].state_dict()),
        }

    def retrain_and_compare(run):
        before = streams(run)
        retrain(run)
        seen.append((run.step - run.switch, len(run.train_episodes), before, streams(run)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edis.Generation, "do_unit", do_unit_and_copy)
        patch.setattr(edis.EDISRun, "retrain", retrain_and_compare)
        call(runs_dir=tmp / "runs", dataset=hopper_file, **RUN)
    return only_folder(tmp / "runs"), tmp, seen


def test_generation_leaves_the_environment_and_the_training_untouched(whole):
    _, _, seen = whole
    assert len(seen) == 3
    for _, _, before, after in seen:
        assert_equal({**before, "python": list(before["python"])}, {**after, "python": list(after["python"])})


def test_retrainings_come_at_the_switch_and_at_the_first_ends_of_episodes_from_their_steps_on(whole):
    folder, _, seen = whole
    ends = [int(step) for step, _, _ in checkpoint(folder)["progress"]["train_episodes"]]
    steps = [step for step, *_ in seen]
    assert steps == [0, *(min(end for end in ends if end >= due) for due in (60, 120))]


@pytest.mark.parametrize("unit", [37, 41, 48, 54])
def test_a_run_killed_within_a_retraining_goes_on_as_if_it_had_not(call, whole, unit):
    folder, tmp, _ = whole
    saved = checkpoint(tmp / f"unit{unit}")["generation"]
    assert saved["unit"] == unit // 15 * 15 and saved["retrainings"] == 1
    call("--resume", tmp / f"unit{unit}")
    assert_same_run(tmp / f"unit{unit}", folder)


def test_a_run_stopped_within_every_stage_goes_on_as_if_it_had_not(edis, call, whole, hopper_file, tmp_path):
    """By SIGTERM, which saves: within the first retraining, and each stage of the second."""
    moments, do_unit, running = [(0, 7), (1, 5), (1, 40), (1, 41), (1, 47), (1, 53)], edis.Generation.do_unit, []

    def do_unit_and_stop(self, *args):
        do_unit(self, *args)
        if moments and (self.retrainings, self.unit) == moments[0]:
            moments.pop(0)
            running[-1].request(signal.SIGTERM, None)

    init = edis.EDISRun.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edis.EDISRun, "__init__", lambda run, *args: running.append(run) or init(run, *args))
        patch.setattr(edis.Generation, "do_unit", do_unit_and_stop)
        with pytest.raises(SystemExit):
            call(runs_dir=tmp_path, dataset=hopper_file, **RUN)
        folder = only_folder(tmp_path)
        while moments:
            retraining, unit = moments[0]
            with pytest.raises(SystemExit) as stopped:
                call("--resume", folder)
            assert stopped.value.code == 128 + signal.SIGTERM
            saved = checkpoint(folder)["generation"]
            assert (saved["retrainings"], saved["unit"]) == (retraining, unit)
        call("--resume", folder)
    assert_same_run(folder, whole[0])


def test_a_run_goes_on_between_retrainings(edis, call, whole, hopper_file, tmp_path):
    moments = [("offline", 33), ("online", 45), ("online", 110)]
    again = check_resumes(call, moments, edis.EDISRun, tmp_path, dataset=hopper_file, **RUN)
    assert_same_run(again, whole[0])


def test_the_log_and_the_checkpoint_of_a_run(whole):
    folder, _, _ = whole
    assert [len(rows(folder, phase)) for phase in ("offline", "online")] == [6, 16]
    assert len(numbers(folder, "online", "diffusion_loss")) == 3
    assert len(numbers(folder, "online", "action_energy_loss")) == 2  # not at the switch
    assert numbers(folder, "online", "generated_rows") == [100] * 3
    shares = numbers(folder, "online", "generated_share")
    assert shares[0] == 1 and shares[-1] == 3 / 16  # 0.2 of 16
    saved = checkpoint(folder)
    assert saved["generation"]["rows"].shape == (100, 29) and "denoiser" not in saved["generation"]
    assert len(saved["buffer"]["rows"]) == 150  # the data are not in it
    assert 0 < saved["progress"]["seconds"]["generation"]


def test_another_run_from_the_offline_checkpoint_is_the_same_run(call, whole, hopper_file, tmp_path):
    folder, _, _ = whole
    call(runs_dir=tmp_path, offline_checkpoint=folder / "offline_checkpoint.pt", dataset=hopper_file, **RUN)
    again = only_folder(tmp_path)
    assert rows(again, "online") == rows(folder, "online")
    assert_equal(checkpoint(again)["agent"], checkpoint(folder)["agent"])


def test_both_arms_start_from_one_checkpoint_and_without_generation_it_is_calql_samg_py(
    edis, calql, call, whole, hopper_file, tmp_path
):
    """Cal-QL's values make both offline phases equal, bit for bit, and the arm without generation its vanilla arm."""
    folder, _, _ = whole
    arm = {"generated": "false", "offline_checkpoint": folder / "offline_checkpoint.pt", "dataset": hopper_file}
    call(runs_dir=tmp_path / "arm", **RUN | arm)
    plain = {name: value for name, value in RUN.items() if name in calql.TrainConfig().__dict__}
    default = edis.TrainConfig()
    names = ("q_n_hidden_layers", "policy_lr", "backup_entropy", "cql_lagrange", "cql_target_action_gap")
    plain |= {name: getattr(default, name) for name in (*names, "normalize_reward", "mixing_ratio")}
    other = {"samg": "false", "coefficient": "none", "dataset": hopper_file, "runs_dir": tmp_path / "calql"}
    run_main(calql.CalQL, calql.CalQLRun, **plain | other)
    arm, other = only_folder(tmp_path / "arm"), only_folder(tmp_path / "calql")
    assert arm.name == "edis-not-generated-seed0"
    for mine, phase in ((folder, "offline"), (arm, "online")):
        for row, its in zip(rows(mine, phase), rows(other, phase), strict=True):
            common = row.keys() & its.keys()
            assert {name: row[name] for name in common} == {name: its[name] for name in common}
            assert {"critic_loss", "score", "q_mean"} < common
    assert not numbers(arm, "online", "generated_share")


def test_a_sparse_task_from_end_to_end(edis, call, hopper_columns, tmp_path):
    columns = dict(hopper_columns)
    columns["rewards"] = np.where(columns["terminals"], 0.0, -1.0).astype(np.float32)
    data, buffers = write_dataset(tmp_path / "sparse.hdf5", columns), []
    with pytest.MonkeyPatch.context() as patch:
        # the simulator's rewards are hopper's own: here those of the data
        patch.setattr(edis.Environment, "step", functools.partialmethod(sparse_step, edis.Environment.step))
        patch.setattr(edis.EDISRun, "finish", lambda run: buffers.append((run.buffer, run.generation.rows)))
        sparse = {"is_sparse_reward": "true", "reward_scale": 10.0, "reward_bias": 5.0, "normalize_reward": "false"}
        call(runs_dir=tmp_path / "runs", dataset=data, **RUN | sparse)
    ((buffer, generated),) = buffers
    assert {*generated[:, 14].tolist()} <= {-5.0, 5.0} and {*buffer.stored().rewards.tolist()} == {-5.0, 5.0}
    assert torch.equal(generated[:, -3], (generated[:, 14] == 5).float())


def sparse_step(env, step, action):
    observation, _, terminated, truncated = step(env, action)
    return observation, 0.0 if terminated else -1.0, terminated, truncated


def test_the_file_runs_alone(hopper_file, tmp_path):
    script = shutil.copy(SCRIPT, tmp_path)
    settings = RUN | {"offline_iterations": 20, "online_iterations": 30, "dataset": hopper_file}
    run_script(script, runs_dir=tmp_path / "runs", **settings)
    assert (only_folder(tmp_path / "runs") / "summary.json").is_file()


# --- The picture of generated rows
@pytest.mark.parametrize("words", [[], ["--generate"]])
def test_the_tool_that_looks_at_generated_rows(whole, words, tmp_path, monkeypatch, capsys):
    tool, picture = load_module("tools/diagnostics/generated.py"), tmp_path / "rows.png"
    path = str(whole[0] / "checkpoint.pt")
    monkeypatch.setattr("sys.argv", ["generated.py", path, "--rows", "40", "--output", str(picture), *words])
    before = sorted(whole[0].iterdir())
    tool.main()
    table = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[3:]}
    errors = {name: float(cells[2]) for name, cells in table.items()}
    assert errors.keys() == {"offline", "online", *(["guided", "unguided"] if words else ["generated"])}
    assert errors["offline"] < 1e-5 and min(errors.values()) >= 0  # the data obey the physics that made them
    assert all(error > 0.01 for name, error in errors.items() if name not in ("offline", "online"))
    assert picture.stat().st_size > 1000 and sorted(whole[0].iterdir()) == before


# --- Configurations
# EDIS's share of generated rows, w1, w2, w3, cql_alpha, cql_alpha_online (its configs/cal_ql_edis)
PUBLISHED = {
    "halfcheetah_medium_replay": (0.2, 1, 0.2, 0.2, 10, 10),
    "halfcheetah_medium": (0.2, 1, 0.2, 0.2, 10, 10),
    "halfcheetah_medium_expert": (0.5, 1, 0.2, 0.2, 10, 10),
    "hopper_medium_replay": (0.5, 1, 0.2, 0.2, 10, 10),
    "hopper_medium": (0.2, 2, 0.01, 0.01, 10, 0.1),
    "hopper_medium_expert": (0.5, 0.01, 0.01, 0.01, 10, 10),
    "walker2d_medium_replay": (0.2, 0.1, 0.2, 0.2, 10, 10),
    "walker2d_medium": (0.2, 0.01, 0.01, 0.01, 10, 0),
    "walker2d_medium_expert": (0.2, 0.01, 0.01, 0.01, 10, 10),
    **{f"antmaze_{maze}": (0.5, 0.01, 0.01, 0.01, 5, 5) for maze in ("umaze", "umaze_diverse")},
    **{f"antmaze_{maze}": (0.5, 0.01, 0.01, 0.01, 5, 5) for maze in ("large_play", "large_diverse")},
    **{f"antmaze_{maze}": (0.3, 0.01, 0.01, 0.01, 5, 5) for maze in ("medium_play", "medium_diverse")},
    "pen_binary": (0.3, 0.01, 0.01, 0.01, 1, 5),  # ours: human-v1's, with cql_alpha as configs/calql
    "door_binary": (0.5, 0.01, 0.01, 0.01, 1, 1),
    "relocate_binary": (0.2, 1, 0.01, 0.01, 1, 2.5),
}
COLUMNS = ("mixing_ratio", "state_weight", "action_weight", "next_state_weight", "cql_alpha", "cql_alpha_online")
EVERY = {"diffusion_iterations": 10_000, "sample_steps": 128, "n_generated": 100_000, "retrain_frequency": 10_000}
EVERY |= {"denoiser_width": 1024, "denoiser_layers": 6, "embed_dim": 256, "diffusion_lr": 3e-4, "energy_lr": 1e-3}
EVERY |= {"energy_hidden_dim": 256, "n_negatives": 10, "energy_updates": 20, "max_guidance": 10.0, "generated": True}
EVERY |= {"policy_lr": 1e-4, "qf_lr": 3e-4, "orthogonal_init": True, "critic_layer_norm": False}
EVERY |= {"offline_iterations": 1_000_000, "online_iterations": 200_000, "guidance_form": "published"}
FAMILIES = {  # of the rest; antmaze's rewards become r - 1
    "locomotion": {"q_n_hidden_layers": 2, "cql_target_action_gap": 10, "cql_max_target_backup": False}
    | {"normalize": True, "normalize_reward": True, "is_sparse_reward": False, "hidden_dim": 256}
    | {"backup_entropy": True, "cql_lagrange": True},
    "antmaze": {"q_n_hidden_layers": 5, "cql_target_action_gap": 0.8, "cql_max_target_backup": True}
    | {"cql_clip_diff_min": -200, "normalize": True, "reward_scale": 1, "reward_bias": -1, "is_sparse_reward": True}
    | {"hidden_dim": 256, "backup_entropy": True, "cql_lagrange": True, "n_test_episodes": 100}
    | {"eval_frequency": 20_000},
}
CONFIGS = sorted((ROOT / "configs" / "edis").glob("*.yaml"))


def load(module, path):
    return module.parse_config(module.TrainConfig, ["--config", str(path)])


def test_there_is_a_file_for_each_of_the_18_tasks_and_the_quickstart():
    others = {path.name for path in (ROOT / "configs" / "awac").glob("*.yaml")} - {"quickstart_likelihood.yaml"}
    assert {path.name for path in CONFIGS} == others and len(others) == 19


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_names_only_what_differs_from_the_defaults(edis, path):
    given, default, config = yaml.safe_load(path.read_text()), edis.TrainConfig(), load(edis, path)
    assert all(getattr(config, name) == value for name, value in given.items())
    assert not [name for name, value in given.items() if name != "env" and getattr(default, name) == value]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_ediss_or_listed_as_ours(edis, calql, name):
    config, (env, level) = load(edis, ROOT / "configs" / "edis" / f"{name}.yaml"), name.split("_", 1)
    assert config.env == f"{env}-{level.replace('_', '-')}-{'v0' if level == 'binary' else 'v2'}"
    assert tuple(getattr(config, column) for column in COLUMNS) == PUBLISHED[name]
    assert {key: getattr(config, key) for key in EVERY} == EVERY
    if level == "binary":  # all else is calql_samg.py's
        its = load(calql, ROOT / "configs" / "calql" / f"{name}.yaml")
        own = {*COLUMNS, "name", "samg"} - {"cql_alpha"}
        common = (config.__dict__.keys() & its.__dict__.keys()) - own
        assert {key: getattr(config, key) for key in common} == {key: getattr(its, key) for key in common}
    else:
        family = FAMILIES["antmaze" if env == "antmaze" else "locomotion"]
        assert {key: getattr(config, key) for key in family} == family


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance_form": "none"}, "guidance_form must be one of published, exact, not 'none'"),
        ({"sample_steps": 1}, "sample_steps must be at least 2, it is 1"),
        ({"pool_steps": 0}, "pool_steps must be at least 2, it is 0"),
        ({"n_generated": 0}, "n_generated must be finite and at least 1"),
        ({"retrain_frequency": 0}, "retrain_frequency must be finite and at least 1"),
        ({"mixing_ratio": 1.5}, "mixing_ratio must be at most 1"),
        ({"is_sparse_reward": True, "discount": 1.0}, "discount below 1"),
    ],
)
def test_values_that_no_run_can_use_are_refused(edis, values, message):
    with pytest.raises(ValueError, match=message):
        edis.TrainConfig(**values)


def test_there_is_no_samg(edis):
    names = edis.TrainConfig().__dict__
    assert not [name for name in names if "samg" in name or "coefficient" in name or "vae" in name]
    assert not hasattr(edis, "GuidedRun") and not hasattr(edis, "COEFFICIENTS")
