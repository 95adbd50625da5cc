"""The C-VAE, the coefficient p(s, a) and its adaptive update, against hand-computed numbers and numpy."""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats

torch.set_num_threads(1)
OBS, ACT = 3, 1
ERFC = {0: 1.0, 1: 0.317310507863, 2: 0.045500263896, 3: 0.002699796063}  # erfc(k / sqrt(2)): k sigmas away
TWO_ROWS = torch.tensor([[1.0, -2.0], [0.5, 2.0]], dtype=torch.float64)  # moments (2, d): of z_m, of z_s
TWO_VARS = torch.tensor([[4.0, 0.25], [0.01, 1.0]], dtype=torch.float64)


def make_coefficient(awac, **values):
    torch.manual_seed(0)
    config = awac.TrainConfig(**{"vae_hidden_dim": 12, "batch_size": 16, "p_share": 0, "p_threshold": 0.3} | values)
    return awac.VAECoefficient(config, OBS, ACT, "cpu")


def make_dataset(awac, batch):
    """A data set of these rows that always draws all of them, in order."""
    n = len(batch.p)
    dataset = awac.ReplayBuffer(n, OBS, ACT, "cpu")
    dataset.load(torch.hstack([column.reshape(n, -1) for column in batch]).numpy())
    dataset.sample = lambda batch_size: dataset.stored()
    return dataset


def make_batch(awac, n, seed=0, shift=0.0):
    random = np.random.default_rng(seed)
    states, actions, next_states = (random.normal(size=(n, d)) + shift for d in (OBS, ACT, OBS))
    columns = states, actions, random.normal(size=n), next_states, *np.zeros((3, n))
    return awac.Batch(*(torch.from_numpy(column.astype(np.float32)) for column in columns))


# --- p(s, a)
def degree(awac, sigmas_m, sigmas_s, w=0.5, tail="mean"):
    """p of one row that lies so many standard deviations from the means of z_m and of z_s, in either direction."""
    std, direction = TWO_VARS.sqrt(), torch.tensor([1.0, -1.0])
    rows = [TWO_ROWS[i] + direction * std[i] * torch.tensor(s) for i, s in enumerate((sigmas_m, sigmas_s))]
    cov = torch.diag_embed(TWO_VARS)
    return awac.offline_degree(torch.stack(rows)[:, None], TWO_ROWS, cov, awac.whiten(cov), w, tail).item()


@pytest.mark.parametrize("sigmas", ERFC)
def test_p_is_the_two_sided_tail_probability(awac, sigmas):
    assert degree(awac, [sigmas] * 2, [sigmas] * 2) == pytest.approx(ERFC[sigmas], abs=1e-11)


def test_p_averages_dimensions_and_mixes_means_and_deviations_by_w(awac):
    assert degree(awac, [0, 1], [0, 0], w=1.0) == pytest.approx((1 + ERFC[1]) / 2, abs=1e-11)
    assert degree(awac, [0, 0], [2, 3], w=0.0) == pytest.approx((ERFC[2] + ERFC[3]) / 2, abs=1e-11)
    assert degree(awac, [1, 1], [2, 2], w=0.25) == pytest.approx(0.25 * ERFC[1] + 0.75 * ERFC[2], abs=1e-11)
    assert degree(awac, [0, 1], [2, 0], w=0.5) == pytest.approx(0.590702692940, abs=1e-11)


def test_p_is_kept_at_the_threshold_and_0_below_it(awac, monkeypatch):
    coefficient, row = make_coefficient(awac, p_threshold=0.5), make_batch(awac, 1).triple()
    p = torch.tensor([0.5, math.nextafter(0.5, 0)], dtype=torch.float64)
    monkeypatch.setattr(coefficient, "degree", lambda *triple: p)
    assert coefficient(*row).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("d", [1, 6, 56])
def test_the_joint_tail_is_chi_squared_of_the_mahalanobis_distance_in_scipy(awac, d):
    random = np.random.default_rng(d)
    mixing, mean = random.normal(size=(2, d, d)), random.normal(size=(2, d))
    cov = mixing @ mixing.transpose(0, 2, 1) + 0.1 * np.eye(d)
    outputs = mean[:, None] + random.normal(size=(2, 9, d)) @ mixing.transpose(0, 2, 1)
    apart = outputs - mean[:, None]
    squared = np.einsum("kni,kij,knj->kn", apart, np.linalg.inv(cov), apart)
    expected = stats.chi2.sf(squared, d)
    tensors = [torch.from_numpy(x) for x in (outputs, mean, cov)]
    whitening = awac.whiten(tensors[2])
    found = awac.offline_degree(*tensors, whitening, 0.3, "joint").numpy()
    np.testing.assert_allclose(found, 0.3 * expected[0] + 0.7 * expected[1], atol=1e-4)
    if d == 1:
        averaged = awac.offline_degree(*tensors, whitening, 0.3, "mean").numpy()
        np.testing.assert_allclose(found, averaged, atol=1e-6)


def test_the_joint_tail_of_latents_that_are_copies_of_each_other_is_finite(awac):
    cov = torch.ones(2, 3, 3)
    p = awac.offline_degree(torch.ones(2, 4, 3), torch.zeros(2, 3), cov, awac.whiten(cov), 0.5, "joint")
    assert p.tolist() == pytest.approx([stats.chi2.sf(1, 3)] * 4, abs=1e-3)


def test_p_of_rows_does_not_depend_on_the_other_rows(awac):
    coefficient, batch = make_coefficient(awac), make_batch(awac, 50)
    coefficient.fit(make_dataset(awac, make_batch(awac, 500, seed=1)))
    p = coefficient(*batch.triple())
    one_by_one = [coefficient(*(x[None] for x in row)).item() for row in zip(*batch.triple())]
    assert p.tolist() == pytest.approx(one_by_one, abs=1e-5) and not p.requires_grad
    assert ((p == 0) | ((p >= 0.3) & (p <= 1))).all() and 0 < (p > 0).sum() < 50


def test_a_dimension_without_variance_gives_1_on_its_mean_and_0_off_it(awac):
    mean, cov = torch.zeros(2, 1), torch.zeros(2, 1, 1)
    x = torch.tensor([[0.0], [1e-3]]).repeat(2, 1, 1)
    for tail in ("mean", "joint"):
        assert awac.offline_degree(x, mean, cov, awac.whiten(cov), 0.5, tail).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("kind", "low", "high"), [("even", 0.5, 0.5), ("none", 0.0, 0.0), ("random", 0.0, 1.0)])
def test_constant_coefficients_look_at_no_sample(awac, kind, low, high):
    torch.manual_seed(0)
    coefficient = awac.COEFFICIENTS[kind](awac.TrainConfig(coefficient=kind), OBS, ACT, "cpu")
    p = coefficient(*(torch.randn(2000, width) for width in (OBS, ACT, OBS)))
    assert p.shape == (2000,) and p.min() >= low and p.max() <= high and coefficient.fit_iterations == 0
    if kind == "random":
        assert torch.histc(p, 4, 0, 1).tolist() == pytest.approx([500] * 4, abs=80)
    assert not coefficient.adaptive and not make_coefficient(awac, coefficient="static").adaptive
    assert make_coefficient(awac).adaptive


# --- Moments and selection
@pytest.mark.parametrize(("n_1", "n_2"), [(7, 5), (1, 1), (1, 100), (100_000, 3)])
def test_merged_moments_are_those_of_all_samples_together(awac, n_1, n_2):
    random = np.random.default_rng(0)
    first, second = random.normal(3.0, 2.0, (n_1, 2, 4)), random.normal(-1.0, 0.1, (n_2, 2, 4))
    second[..., 1] += 2 * second[..., 0]  # correlated
    n, mean, cov = awac.merge_moments(*moments(first), *moments(second))
    expected = moments(np.concatenate([first, second]))
    assert n == n_1 + n_2
    np.testing.assert_allclose(mean, expected[1], rtol=1e-10)
    np.testing.assert_allclose(cov, expected[2], rtol=1e-9, atol=1e-12)


def moments(x):
    """Count, means (k, d) and population covariances (k, d, d) of samples (n, k, d), in numpy."""
    each = [np.atleast_2d(np.cov(x[:, k], rowvar=False, bias=True)) for k in range(x.shape[1])]
    return len(x), x.mean(0), np.nan_to_num(np.stack(each))


def test_merging_into_no_rows_gives_the_new_rows_moments(awac):
    new = 4, torch.tensor([2.5]), torch.tensor([[0.75]])
    assert awac.merge_moments(0, torch.tensor([5.0]), torch.tensor([[1.0]]), *new) == new


@pytest.mark.parametrize(("n", "share", "expected"), [(40, 0.1, 4), (39, 0.1, 3), (9, 0.1, 1), (1, 0.1, 1), (5, 1, 5)])
def test_mastered_rows_are_the_share_with_the_smallest_errors_and_at_least_one(awac, n, share, expected):
    errors = np.random.default_rng(n).permutation(n) * 0.5
    index = awac.select_mastered(torch.from_numpy(errors), share)
    assert sorted(errors[index.numpy()]) == [0.5 * i for i in range(expected)]


# --- C-VAE
def numpy_mlp(network, x):
    layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        x = np.maximum(x, 0) if i + 1 < len(layers) else x
    return x


def numpy_encode(vae, batch):
    outputs = numpy_mlp(vae.encoder, np.hstack([batch.states, batch.actions]).astype(np.float64))
    return outputs[:, : 2 * ACT], np.exp(np.clip(outputs[:, 2 * ACT :], -4, 15))


def constant_encoder(vae, mean, std):
    for parameter in vae.encoder.parameters():
        parameter.data.zero_()
    vae.encoder[-1].bias.data.copy_(torch.tensor([mean] * (2 * ACT) + [math.log(std)] * (2 * ACT)))


@pytest.mark.parametrize("simple", [False, True])
def test_the_losses_are_the_means_of_squared_error_and_kl_in_numpy(awac, monkeypatch, simple):
    torch.manual_seed(0)
    vae, batch = awac.ConditionalVAE(OBS, ACT, 12, simple).double(), make_batch(awac, 6)
    batch = awac.Batch(*(column.double() for column in batch))
    vae.encoder[-1].bias.data[2 * ACT] = -9.0  # one log-std below its bound
    noise = np.random.default_rng(3).normal(size=(6, 2 * ACT))
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.from_numpy(noise))
    reconstruction, kl = vae.losses(batch)

    mean, std = numpy_encode(vae, batch)
    assert (std[:, 0] == np.exp(-4)).all()
    decoded = numpy_mlp(vae.decoder, np.hstack([mean + std * noise, batch.states, batch.actions]))
    assert reconstruction.item() == pytest.approx(np.mean((decoded - batch.next_states.numpy()) ** 2), rel=1e-10)
    terms = [(v**2 + m**2 - 1 - np.log(v**2)) / 2 for m, v in zip(mean.ravel(), std.ravel())]
    assert kl.item() == pytest.approx(sum(terms) / len(terms), rel=1e-10)


@pytest.mark.parametrize(("mean", "std", "expected"), [(0.0, 1.0, 0.0), (1.0, 2.0, 2 - math.log(2)), (-2.0, 1.0, 2.0)])
def test_kl_by_hand(awac, mean, std, expected):
    vae = awac.ConditionalVAE(OBS, ACT, 12, False)
    constant_encoder(vae, mean, std)
    assert vae.losses(make_batch(awac, 6))[1].item() == pytest.approx(expected, abs=1e-6)


def test_sizes_of_the_networks(awac):
    def widths(network):
        return [layer.in_features for layer in network if isinstance(layer, torch.nn.Linear)] + [
            network[-1].out_features
        ]

    full, simple = (awac.ConditionalVAE(11, 3, 750, simple) for simple in (False, True))
    assert widths(full.encoder) == widths(simple.encoder) == [14, 750, 750, 12]
    assert widths(full.decoder) == [20, 750, 750, 11] and widths(simple.decoder) == [20, 250, 11]


def test_a_fit_step_descends_on_reconstruction_plus_beta_kl(awac, monkeypatch):
    coefficient, batch = make_coefficient(awac, vae_kl_target=0.0, vae_beta=0.7), make_batch(awac, 6)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    before = [parameter.detach().clone() for parameter in coefficient.vae.parameters()]
    reconstruction, kl = coefficient.vae.losses(batch)
    gradients = torch.autograd.grad(reconstruction + 0.7 * kl, [*coefficient.vae.parameters()])
    metrics = coefficient.fit_step(make_dataset(awac, batch), 0)
    assert (metrics["vae_reconstruction"], metrics["vae_kl"]) == (reconstruction, kl)
    for parameter, old, gradient in zip(coefficient.vae.parameters(), before, gradients):
        torch.testing.assert_close(parameter, old - 1e-3 * gradient / (gradient.abs() + 1e-8), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kl", "shift"), [(0.0, -0.01), (0.01, -0.005), (0.02, 0.0), (0.03, 0.005), (40.0, 0.01)])
def test_beta_rises_while_kl_is_above_its_target_and_falls_below(awac, kl, shift):
    coefficient = make_coefficient(awac, vae_kl_target=0.02, vae_beta=0.5, vae_learning_rate=0.0)
    constant_encoder(coefficient.vae, mean=math.sqrt(2 * kl), std=1.0)
    assert coefficient.fit_step(make_dataset(awac, make_batch(awac, 6)), 0)["vae_beta"].item() == 0.5
    assert coefficient.beta.item() == pytest.approx(0.5 * math.exp(shift), rel=1e-6)


def test_the_controller_brings_the_kl_to_its_target(awac):
    coefficient, batch = make_coefficient(awac, vae_kl_target=0.05, vae_learning_rate=3e-3), make_batch(awac, 256)
    batch.next_states[:, 0] = torch.randn(256)
    dataset = make_dataset(awac, batch)
    kl = [coefficient.fit_step(dataset, step)["vae_kl"].item() for step in range(1500)]
    assert np.mean(kl[-200:]) == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize(
    ("annealing", "schedule"), [(4, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]), (0, [0.5] * 6), (1, [0.5] * 6)]
)
def test_without_a_target_beta_rises_linearly_and_stays(awac, annealing, schedule):
    coefficient = make_coefficient(awac, vae_kl_target=0.0, vae_beta=0.5, vae_kl_annealing=annealing)
    dataset = make_dataset(awac, make_batch(awac, 6))
    betas = [coefficient.fit_step(dataset, step)["vae_beta"].item() for step in range(6)]
    assert betas == schedule


def test_a_posterior_that_stays_collapsed_is_reported_once(awac, capsys):
    run = awac.GuidedRun.__new__(awac.GuidedRun)
    run.config, run.metrics = awac.TrainConfig(log_frequency=1), SimpleNamespace(writerow=lambda row: None)
    run.metrics_file, run.wandb, run.adapt_report, run.held = io.StringIO(), None, {}, []
    run.evaluator = SimpleNamespace(connection=None)
    run.collapsed = run.step = run.clock = run.clock_step = 0
    bar, warnings = SimpleNamespace(total=99, update=lambda: None), []
    for step, kl in enumerate([1e-6, 1e-6, 0.03, *[1e-6] * 9], start=1):
        run.report("coefficient", step, {"vae_kl": torch.tensor(kl)}, bar)
        if "collapsed" in "".join(capsys.readouterr()):
            warnings.append(step)
    assert warnings == [6]


# --- Fit
@pytest.mark.parametrize("n", [300, 8192, 20_000])
def test_fit_takes_the_moments_of_all_rows_and_keeps_a_probe_of_them(awac, n):
    coefficient, batch = make_coefficient(awac), make_batch(awac, n)
    coefficient.fit(make_dataset(awac, batch))
    assert coefficient.count.item() == n
    for i, outputs in enumerate(numpy_encode(coefficient.vae, batch)):
        np.testing.assert_allclose(coefficient.mean[i], outputs.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(coefficient.cov[i], np.cov(outputs.T, bias=True), rtol=1e-4, atol=1e-7)
    rows, probe = ({row.tobytes() for row in np.hstack(triple)} for triple in (batch.triple(), coefficient.probe()))
    assert probe <= rows and len(probe) == min(n, 1000)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["vae", "static", "likelihood", "rnd", "embedding"])
def test_with_p_share_that_share_of_the_held_out_rows_passes(awac, kind, share):
    torch.manual_seed(0)
    sizes = {"vae_hidden_dim": 12, "fit_hidden_dim": 12, "fit_iterations": 100, "batch_size": 16}
    config = awac.TrainConfig(coefficient=kind, p_share=share, p_threshold=0.999, **sizes)
    coefficient = awac.COEFFICIENTS[kind](config, OBS, ACT, "cpu")
    dataset = awac.ReplayBuffer(4000, OBS, ACT, "cpu")
    dataset.load(torch.hstack([column.reshape(4000, -1) for column in make_batch(awac, 4000)]).numpy())
    for step in range(30):
        coefficient.fit_step(dataset, step)
    coefficient.fit(dataset)
    held = awac.held_out(4000)
    assert torch.equal(coefficient.training_rows, (~held).nonzero().squeeze(1))
    n = int(held.sum())
    p = coefficient(*dataset.batch(dataset.rows[held]).triple())
    assert abs((p > 0).float().mean().item() - share) <= 1 / n
    other = awac.COEFFICIENTS[kind](config, OBS, ACT, "cpu")  # from a checkpoint
    other.load_state_dict(coefficient.state_dict())
    assert torch.equal(other(*dataset.batch(dataset.rows[held]).triple()), p)


def fitted_on(awac, scale, offset, **values):
    """A C-VAE's coefficient after a fit to 2,000 rows of linear dynamics whose states are scaled and moved."""
    torch.manual_seed(0)
    batch = make_batch(awac, 2000)
    successors = batch.states + 0.1 * torch.tanh(batch.actions @ torch.ones(ACT, OBS))
    batch = batch._replace(states=scale * batch.states + offset, next_states=scale * successors + offset)
    sizes = {"vae_hidden_dim": 32, "batch_size": 128, "vae_iterations": 1500, "vae_learning_rate": 3e-3}
    coefficient = awac.VAECoefficient(awac.TrainConfig(**sizes | values), OBS, ACT, "cpu")
    dataset = make_dataset(awac, batch)
    del dataset.sample  # random rows, as in a run
    for step in range(coefficient.fit_iterations):
        coefficient.fit_step(dataset, step)
    coefficient.fit(dataset)


def test_a_fit_that_missed_its_kl_is_reported_in_words(awac, capsys):
    fitted_on(awac, 1.0, 0.0)
    assert "warning" not in capsys.readouterr().out
    fitted_on(awac, 1000.0, 1e6)
    said = capsys.readouterr().out
    assert "the C-VAE's KL is" in said and "0.03 is its target" in said and "the order of 1" in said


@pytest.mark.parametrize(("share", "settings"), [(0.1, {}), (0.3, {}), (0.04, {"p_share": 0.09})])
def test_a_threshold_that_few_rows_pass_is_reported_in_words(awac, capsys, monkeypatch, share, settings):
    coefficient, dataset = (
        make_coefficient(awac, p_threshold=0.6, **settings),
        make_dataset(awac, make_batch(awac, 1000)),
    )
    monkeypatch.setattr(coefficient, "forward", lambda states, *_: (torch.arange(len(states)) < share * 1000).float())
    coefficient.fit(dataset)
    said = capsys.readouterr().out
    assert (f"p > 0 on {share:.1%} of the data, {settings.get('p_share', 0.4):.0%} were intended" in said) == (
        share < 0.2
    )


# --- Adaptive update
REPORT = {"mastered_rows", "adapt_accepted"} | {
    f"p_{rows}_{when}" for rows in ("mastered", "known", "probe") for when in ("before", "after")
}


def adapted(awac, **values):
    """Fit a coefficient, adapt it to rows that it did not know; returns it, both sets of rows, state before, report."""
    coefficient, offline = make_coefficient(awac, **values), make_batch(awac, 600)
    dataset = make_dataset(awac, offline)
    for step in range(50):
        coefficient.fit_step(dataset, step)
    coefficient.fit(dataset)
    known = offline.select(coefficient(*offline.triple()) > 0)
    strange = make_batch(awac, 300, seed=1, shift=1.5)
    mastered = strange.select(coefficient(*strange.triple()) == 0)
    assert min(len(known.p), len(mastered.p)) > 50
    before = {name: value.clone() for name, value in coefficient.state_dict().items()}
    torch.manual_seed(3)
    stored = awac.Batch(*map(torch.cat, zip(offline, strange)))
    return coefficient, mastered, known, before, coefficient.adapt(mastered, known, stored)


def test_an_update_that_makes_it_forget_is_undone_bit_for_bit(awac):
    coefficient, mastered, _, before, report = adapted(awac, adapt_learning_rate=0.3, adapt_hold=0.0)
    assert report["adapt_accepted"] == 0 and report["p_known_after"] < report["p_known_before"] - 0.02
    assert report.keys() == REPORT and report["mastered_rows"] == len(mastered.p)
    assert all(torch.equal(value, before[name]) for name, value in coefficient.state_dict().items())


def test_an_accepted_update_changes_encoder_and_moments_and_reports_p_before_and_after(awac):
    coefficient, mastered, known, before, report = adapted(awac, adapt_iterations=20)
    assert report["adapt_accepted"] == 1 and report.keys() == REPORT
    changed = {name for name, value in coefficient.state_dict().items() if not torch.equal(value, before[name])}
    assert {"count", "mean", "cov", "whitening", "vae.encoder.0.weight"} <= changed and not changed & {
        "beta",
        "probe_states",
        "probe_actions",
    }
    assert coefficient.count.item() == 600 + len(mastered.p)
    after = {"mastered": mastered, "known": known}
    for name, rows in after.items():
        p = coefficient(*rows.triple()).mean().item()
        assert report[f"p_{name}_after"] == pytest.approx(p, abs=1e-6)
    assert report["p_mastered_before"] == 0 and report["p_known_before"] >= 0.3
    assert report["p_probe_after"] == pytest.approx(coefficient(*coefficient.probe()).mean().item())


def test_without_a_gradient_step_the_mastered_rows_join_the_moments_with_the_offline_rows(awac):
    coefficient, mastered, _, _, _ = adapted(awac, adapt_iterations=0, adapt_max_drop=1.0)
    outputs = zip(*(numpy_encode(coefficient.vae, rows) for rows in (make_batch(awac, 600), mastered)))
    for i, parts in enumerate(outputs):
        np.testing.assert_allclose(coefficient.mean[i], np.concatenate(parts).mean(0), rtol=1e-4, atol=1e-5)
        expected = np.cov(np.concatenate(parts).T, bias=True)
        np.testing.assert_allclose(coefficient.cov[i], expected, rtol=1e-4, atol=1e-7)


def test_an_update_is_accepted_only_if_the_known_rows_lose_less_than_the_bound(awac):
    _, _, _, _, report = adapted(awac, adapt_learning_rate=3e-3, adapt_hold=0.0, adapt_max_drop=1.0)
    drop = report["p_known_before"] - report["p_known_after"]
    assert report["adapt_accepted"] == 1 and drop > 0
    for bound, accepted in ((drop * 1.0001, 1), (drop, 0), (drop * 0.9999, 0)):
        again = adapted(awac, adapt_learning_rate=3e-3, adapt_hold=0.0, adapt_max_drop=bound)[-1]
        assert again == report | {"adapt_accepted": accepted}


def test_the_hold_keeps_what_is_known(awac):
    def drop(hold):
        report = adapted(awac, adapt_learning_rate=3e-3, adapt_hold=hold, adapt_max_drop=1.0)[-1]
        return report["p_known_before"] - report["p_known_after"]

    assert drop(1000.0) < drop(0.0)


def test_with_p_share_the_threshold_moves_so_that_known_and_mastered_rows_are_counted_in(awac):
    coefficient, mastered, known, before, report = adapted(awac, p_share=0.5, adapt_hold=1000.0, adapt_max_drop=1.0)
    stored = awac.Batch(*map(torch.cat, zip(make_batch(awac, 600), make_batch(awac, 300, seed=1, shift=1.5))))
    assert report["adapt_accepted"] and coefficient.share_threshold != before["share_threshold"]
    assert (coefficient(*stored.triple()) > 0).sum() == len(known.p) + len(mastered.p)


# --- Calibrated coefficients
CALIBRATED = ("likelihood", "rnd", "embedding")


def make_calibrated(awac, kind, **values):
    torch.manual_seed(0)
    config = awac.TrainConfig(**{"coefficient": kind, "fit_hidden_dim": 12, "p_share": 0, "p_threshold": 0.0} | values)
    return awac.COEFFICIENTS[kind](config, OBS, ACT, "cpu")


def fitted(awac, kind, **values):
    """A coefficient that knows actions near the sum of a state's dimensions; its data set."""
    coefficient = make_calibrated(awac, kind, **{"fit_iterations": 400, "batch_size": 64} | values)
    batch = make_batch(awac, 3000)
    batch.actions.copy_(batch.states.sum(1, keepdim=True) + 0.1 * batch.actions)
    batch.next_states.copy_(batch.states + batch.actions)
    dataset = awac.ReplayBuffer(3000, OBS, ACT, "cpu")
    dataset.load(torch.hstack([column.reshape(3000, -1) for column in batch]).numpy())
    for step in range(coefficient.fit_iterations):
        coefficient.fit_step(dataset, step)
    coefficient.fit(dataset)
    return coefficient, dataset


@pytest.mark.parametrize("n", [100, 1000, 1234])
def test_every_tenth_of_a_hundred_stretches_is_held_out(awac, n):
    mask = awac.held_out(n)
    assert mask.shape == (n,) and abs(mask.sum().item() - n / 10) <= 10
    assert (mask[1:] & ~mask[:-1]).sum() == 10  # ten stretches, none at the start


def test_too_few_rows_to_hold_any_out_end_in_one_line(awac):
    with pytest.raises(SystemExit, match="at least 100 transitions, this one has 99"):
        awac.held_out(99)


def test_p_is_the_share_of_held_out_rows_at_least_as_strange(awac):
    coefficient = make_calibrated(awac, "rnd")
    coefficient.scores.copy_(torch.arange(1.0, 1001.0))
    found = coefficient.rank(torch.tensor([0.0, 1.0, 1.5, 500.0, 1000.0, 1001.0])).tolist()
    assert found == pytest.approx([1.0, 1.0, 0.999, 0.501, 0.001, 0.0], abs=1e-6)


def test_strangeness_by_hand(awac):
    states, actions = torch.zeros(2, OBS), torch.tensor([[1.0], [-3.0]])
    likelihood = make_calibrated(awac, "likelihood")
    for parameter in likelihood.policy.parameters():
        parameter.data.zero_()
    weights, bias = [0.5, 0.25, 0.25, 0.0, 0.0], likelihood.policy[-1].bias.data
    bias[:5] = torch.tensor(weights).log().clamp_min(-1e4)
    bias[5::2] = torch.tensor([1.0, -3.0, 9.0, 0.0, 0.0])  # means
    bias[6::2] = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0]).log()  # deviations
    found = likelihood.strangeness(states, actions, states).tolist()
    first, second = 0.5 / 2 + 0.25 * math.exp(-8) + 0.25 * math.exp(-32), 0.5 / 2 * math.exp(-2) + 0.25
    assert found == pytest.approx([-math.log(first), -math.log(second)], abs=1e-6)

    rnd = make_calibrated(awac, "rnd")
    for parameter in [*rnd.predictor.parameters(), *rnd.target.parameters()]:
        parameter.data.zero_()
    rnd.predictor[-1].bias.data[:16] = 3.0  # half of the outputs are 3 off
    assert rnd.strangeness(states, actions, states).tolist() == pytest.approx([4.5, 4.5])
    assert not any(parameter.requires_grad for parameter in rnd.target.parameters())

    embedding = make_calibrated(awac, "embedding")
    for parameter in embedding.head.parameters():
        parameter.data.zero_()
    assert embedding.strangeness(states, actions, states).tolist() == pytest.approx([1.0, 9.0])
    embedding.scores.copy_(torch.tensor([1.0, 3.0]).repeat(500))  # mean 2, deviation 1
    p = embedding.rank(torch.tensor([2.0, 3.0, 0.0, 5.0])).tolist()
    assert p == pytest.approx([ERFC[0], ERFC[1], ERFC[2], ERFC[3]], abs=1e-6)


@pytest.mark.parametrize("kind", CALIBRATED)
def test_a_fit_never_sees_the_held_out_rows_and_calibrates_on_them(awac, kind):
    coefficient, dataset = fitted(awac, kind)
    mask = awac.held_out(dataset.size)
    assert torch.equal(coefficient.training_rows, (~mask).nonzero().squeeze(1))
    assert coefficient.count.item() == mask.sum().item()
    held = dataset.batch(dataset.rows[mask])
    p = coefficient(*held.triple())
    if kind != "embedding":  # whose p is a normal's tail
        assert [(p >= level).float().mean().item() for level in (0.1, 0.5, 0.9)] == pytest.approx(
            [0.9, 0.5, 0.1], abs=0.01
        )
    strange = held._replace(actions=held.actions + 5.0)
    assert coefficient(*strange.triple()).mean() < p.mean() / 2
    thresholded = make_calibrated(awac, kind, p_threshold=0.3)
    thresholded.load_state_dict(coefficient.state_dict())
    assert torch.equal(thresholded(*held.triple()), torch.where(p >= 0.3, p, 0.0))
    states = dataset.stored().states
    torch.testing.assert_close(coefficient.state_mean, states.mean(0))
    torch.testing.assert_close(coefficient.state_std, states.std(0, correction=0) + 1e-3)


@pytest.mark.parametrize("kind", ["vae", "likelihood", "rnd"])
def test_adaptive_updates_raise_p_of_mastered_rows_and_keep_that_of_the_offline_probe(awac, kind):
    torch.manual_seed(0)
    env = SimpleNamespace(name="Hopper-v4", time_limit=1000, obs_dim=11, act_dim=3, action_low=-1.0, action_high=1.0)
    rows, _ = awac.load_dataset(ROOT / "data" / "hopper-medium-mini.hdf5", env)
    dataset = awac.ReplayBuffer(len(rows), 11, 3, "cpu")
    dataset.load(rows)
    sizes = {"vae_iterations": 600, "vae_hidden_dim": 64, "fit_iterations": 600, "fit_hidden_dim": 64}
    sizes |= {"p_share": 0, "vae_tail": "mean"}
    config = awac.TrainConfig(coefficient=kind, p_threshold=0.6 if kind == "vae" else 0.05, **sizes)
    coefficient = awac.COEFFICIENTS[kind](config, 11, 3, "cpu")
    for step in range(600):
        coefficient.fit_step(dataset, step)
    coefficient.fit(dataset)
    offline = dataset.stored().select(torch.arange(0, len(rows), 10))
    strange = offline._replace(actions=(offline.actions + 0.1 * torch.randn_like(offline.actions)).clamp(-1, 1))
    known = offline.select(coefficient(*offline.triple()) > 0)
    mastered = strange.select(coefficient(*strange.triple()) == 0)
    assert min(len(known.p), len(mastered.p)) > 100
    for report in (coefficient.adapt(mastered, known, offline) for _ in range(2)):
        assert report["adapt_accepted"] and report["p_mastered_after"] > report["p_mastered_before"]
        assert report["p_probe_after"] > report["p_probe_before"] - 0.02


# --- The update within a run
def fake_run(awac, period, n_rows, **values):
    """A run after `n_rows` steps, ring of 60 rows: p = 0 in every third, Bellman error the row's number."""
    config = awac.TrainConfig(coefficient_frequency=period, batch_size=5, buffer_size=60, **values)
    buffer = awac.ReplayBuffer(60, OBS, ACT, "cpu")
    for i in range(n_rows):
        buffer.add(np.full(OBS, i), np.zeros(ACT), 0.0, np.zeros(OBS), False, 0.0 if i % 3 == 0 else 0.7)
    calls = []
    agent = SimpleNamespace(
        bellman_errors=lambda batch: batch.states[:, 0],
        start_period=lambda refresh: calls.append(("period", refresh)),
    )

    class Coefficient:
        adaptive = config.coefficient == "vae"

        def adapt(self, mastered, known, stored):
            self.mastered, self.known = mastered.states[:, 0].tolist(), known.states[:, 0].tolist()
            return {"adapt_accepted": 1}

        def __call__(self, states, actions, next_states):
            return states[:, 0] / 1000

    parts = {"config": config, "agent": agent, "coefficient": Coefficient(), "buffer": buffer}
    return SimpleNamespace(**parts, adapt_report={}), calls


def test_the_update_learns_the_best_of_this_periods_unknown_rows_and_rewrites_p_of_the_whole_buffer(awac):
    run, calls = fake_run(awac, period=30, n_rows=90, mastered_share=0.2)
    awac.GuidedRun.update_coefficient(run)
    assert run.adapt_report == {"adapt_accepted": 1}
    assert sorted(run.coefficient.mastered) == [60, 63]  # of 60, 63, ..., 87
    assert sorted(run.coefficient.known) == [i for i in range(30, 90) if i % 3]
    rows = run.buffer.stored()
    torch.testing.assert_close(rows.p, rows.states[:, 0] / 1000)
    assert calls == [("period", True)]


@pytest.mark.parametrize(("period", "n_rows"), [(12, 60), (60, 6)])
def test_with_less_than_a_batch_of_rows_the_coefficient_stays_and_a_line_says_so(awac, capsys, period, n_rows):
    run, calls = fake_run(awac, period, n_rows)
    p = run.buffer.stored().p.clone()
    awac.GuidedRun.update_coefficient(run)
    assert run.adapt_report == {} and torch.equal(run.buffer.stored().p, p)
    assert "not updated" in "".join(capsys.readouterr()) and calls == [("period", True)]


@pytest.mark.parametrize("coefficient", ["static", "even", "none"])
def test_other_coefficients_are_not_updated_and_the_refresh_can_be_off(awac, coefficient):
    run, calls = fake_run(awac, 30, 90, coefficient=coefficient, refresh_offline_critic=False)
    p = run.buffer.stored().p.clone()
    awac.GuidedRun.update_coefficient(run)
    assert run.adapt_report == {} and torch.equal(run.buffer.stored().p, p)
    assert calls == [("period", False)]
