"""The four statements of docs/theory.md, on tabular MDPs that are solved exactly."""

import numpy as np
import pytest
from conftest import load_module
from scipy import stats

EXACT = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(scope="module")
def theory():
    return load_module("tools/diagnostics/theory.py")


@pytest.fixture(params=[0, 1, 2])
def problem(theory, request):
    return theory.make_problem(gamma=(0.5, 0.9, 0.99)[request.param], seed=request.param)


def norm(x):
    return np.abs(x).max()


def parts(theory, problem, seed=3):
    """Q^pi, an offline critic that differs from it, and a p that differs from pair to pair."""
    random, n = np.random.default_rng(seed), len(problem.rewards)
    q_pi = theory.fixed_point(problem, np.zeros(n), np.zeros(n))
    return q_pi, q_pi + random.normal(size=n), random.uniform(0.1, 1.0, n)


# --- The operator
def test_the_operator_is_eq_1_by_hand(theory):
    transition = np.array([[0.25, 0.75], [1.0, 0.0]])
    problem = theory.Problem(transition, np.array([1.0, 2.0]), 0.5)
    q, q_off, p = np.array([4.0, 8.0]), np.array([0.0, 16.0]), np.array([0.5, 1.0])
    # 1 + 0.5 (0.5 * 7 + 0.5 * 12), 2 + 0.5 (0 * 4 + 1 * 0)
    np.testing.assert_allclose(theory.mixed_operator(problem, q, q_off, p), [5.75, 2.0], **EXACT)


def test_without_guidance_the_fixed_point_is_q_pi_whatever_q_off_is(theory, problem):
    q_pi, q_off, p = parts(theory, problem)
    np.testing.assert_allclose(theory.fixed_point(problem, q_off, 0 * p), q_pi, **EXACT)
    np.testing.assert_allclose(problem.rewards + problem.gamma * problem.transition @ q_pi, q_pi, **EXACT)


# --- 1. Contraction
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_it_contracts_by_gamma_1_minus_p_and_no_faster(theory, problem, share):
    _, q_off, p = parts(theory, problem)
    p = np.full_like(p, share)
    factor, random = problem.gamma * (1 - share), np.random.default_rng(0)
    for _ in range(20):
        q_1, q_2 = random.normal(size=(2, len(p)))
        distance = norm(theory.mixed_operator(problem, q_1, q_off, p) - theory.mixed_operator(problem, q_2, q_off, p))
        assert distance <= factor * norm(q_1 - q_2) + 1e-12
    moved = theory.mixed_operator(problem, q_1 + 1, q_off, p) - theory.mixed_operator(problem, q_1, q_off, p)
    np.testing.assert_allclose(moved, factor, **EXACT)  # a shift by a constant attains the factor


def test_where_p_varies_the_smallest_p_decides(theory, problem):
    _, q_off, p = parts(theory, problem)
    q = np.random.default_rng(0).normal(size=len(p))
    moved = theory.mixed_operator(problem, q + 1, q_off, p) - theory.mixed_operator(problem, q, q_off, p)
    np.testing.assert_allclose(norm(moved), problem.gamma * (1 - p.min()), **EXACT)


def test_iterating_it_leads_to_the_fixed_point_at_that_rate(theory, problem):
    _, q_off, p = parts(theory, problem)
    q, point = np.zeros(len(p)), theory.fixed_point(problem, q_off, p)
    start, factor = norm(point), problem.gamma * (1 - p.min())
    for k in range(1, 60):
        q = theory.mixed_operator(problem, q, q_off, p)
        assert norm(q - point) <= factor**k * start + 1e-8


# --- 2. Bias of the fixed point
def test_the_bias_is_what_p_times_the_offline_critics_error_feeds(theory, problem):
    q_pi, q_off, p = parts(theory, problem)
    bias = theory.fixed_point(problem, q_off, p) - q_pi
    source = problem.gamma * p * (problem.transition @ (q_off - q_pi))
    discounted, term = np.zeros(len(p)), source  # sum over k of (gamma (1 - p) P)^k source
    for _ in range(5000):
        discounted, term = discounted + term, problem.gamma * (1 - p) * (problem.transition @ term)
    np.testing.assert_allclose(bias, discounted, **EXACT)
    assert norm(bias) > 1e-3


def test_the_bias_keeps_its_bound_and_a_constant_error_attains_it(theory, problem):
    q_pi, q_off, p = parts(theory, problem)
    assert norm(theory.fixed_point(problem, q_off, p) - q_pi) <= theory.bias_bound(problem, p, norm(q_off - q_pi))
    share = np.full_like(p, 0.6)
    bias = theory.fixed_point(problem, q_pi + 2.0, share) - q_pi
    np.testing.assert_allclose(bias, theory.bias_bound(problem, share, 2.0), **EXACT)


def test_the_fixed_point_is_q_pi_only_if_the_offline_critic_is(theory, problem):
    q_pi, q_off, p = parts(theory, problem)
    np.testing.assert_allclose(theory.fixed_point(problem, q_pi, p), q_pi, **EXACT)
    assert norm(theory.fixed_point(problem, q_off, p) - q_pi) > 1e-3  # Theorem 4.1, as printed, says it is 0


# --- 3. Refreshing the offline critic
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_refreshes_remove_the_bias_geometrically(theory, problem, share):
    q_pi, q_off, p = parts(theory, problem)
    p = np.full_like(p, share)
    factor = problem.gamma * share / (1 - problem.gamma * (1 - share))
    assert factor < 1
    errors = [norm(critic - q_pi) for critic in theory.refreshed(problem, q_off, p, 40)]
    assert all(after <= factor * before + 1e-12 for before, after in zip(errors, errors[1:]))
    constant = theory.refreshed(problem, q_pi + 1.0, p, 8)
    np.testing.assert_allclose([norm(critic - q_pi) for critic in constant], factor ** np.arange(9), **EXACT)


# --- 4. Stochastic TD
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_td_from_sampled_transitions_converges_to_the_fixed_point(theory, share):
    problem = theory.make_problem(gamma=0.5)
    _, q_off, p = parts(theory, problem)
    p = np.full_like(p, share)
    point = theory.fixed_point(problem, q_off, p)
    errors = np.abs(theory.stochastic_td(problem, q_off, p, 20_000) - point).max(axis=1)
    means = [errors[start : 2 * start].mean() for start in (10, 100, 1000, 10_000)]
    assert all(later < 0.6 * earlier for earlier, later in zip(means, means[1:])) and means[-1] < 0.05


# --- The horizon (docs/learning.md)
@pytest.mark.parametrize("p", [0.0, 0.03, 0.44])
def test_of_a_change_k_steps_ahead_1_minus_p_to_the_k_arrives_and_with_refreshes_a_binomial_share(theory, p):
    k, found = np.arange(41), theory.arrival(40, p, 0.99, 12)
    np.testing.assert_allclose(found[0], (1 - p) ** k, **EXACT)
    for refreshes, shares in enumerate(found):  # of k steps, at most so many go through Q_off
        np.testing.assert_allclose(shares, stats.binom.cdf(refreshes, k, p), **EXACT)


def test_the_horizon_is_the_summed_weight_of_all_rewards_ahead(theory):
    found = theory.arrival(5000, 0.44, 0.99, 0)[0] * 0.99 ** np.arange(5001)
    assert found.sum() == pytest.approx(1 / (1 - 0.99 * 0.56)) == pytest.approx(2.244, abs=1e-3)
