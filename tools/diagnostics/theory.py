"""SAMG's target on a tabular MDP that is solved exactly: docs/theory.md's statements, as functions and as a picture.

    python tools/diagnostics/theory.py --output docs/theory.png
    python tools/diagnostics/theory.py --horizon --output docs/horizon.png   # docs/learning.md: how far it looks ahead

tests/test_theory.py proves the statements with these functions. Needs requirements-dev.txt.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)


class Problem(NamedTuple):
    """Evaluation of one policy; n = states x actions, a pair's index is state * n_actions + action."""

    transition: np.ndarray  # P, (n, n): from (s, a) to (s', a'), a' ~ pi(.|s'); rows sum to 1
    rewards: np.ndarray  # (n,)
    gamma: float


def make_problem(n_states: int = 6, n_actions: int = 3, gamma: float = 0.9, seed: int = 0) -> Problem:
    """A random MDP and a random policy."""
    random = np.random.default_rng(seed)
    dynamics = random.dirichlet(np.ones(n_states), size=n_states * n_actions)  # (n, states)
    policy = random.dirichlet(np.ones(n_actions), size=n_states)  # (states, actions)
    transition = np.einsum("is,sa->isa", dynamics, policy).reshape(n_states * n_actions, -1)
    return Problem(transition, random.normal(size=n_states * n_actions), gamma)


def mixed_operator(problem: Problem, q: np.ndarray, q_off: np.ndarray, p: np.ndarray) -> np.ndarray:
    """SAMG's Bellman operator, Eq. (1), with p(s, a) and Q_off fixed; everything (n,)."""
    return problem.rewards + problem.gamma * ((1 - p) * (problem.transition @ q) + p * (problem.transition @ q_off))


def fixed_point(problem: Problem, q_off: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The one Q with mixed_operator(Q) = Q; for p = 0 it is Q^pi, whatever Q_off is."""
    matrix = np.eye(len(p)) - problem.gamma * (1 - p)[:, None] * problem.transition
    return np.linalg.solve(matrix, problem.rewards + problem.gamma * p * (problem.transition @ q_off))


def bias_bound(problem: Problem, p: np.ndarray, error: float) -> float:
    """Bound of |fixed point - Q^pi|, of Q_off with |Q_off - Q^pi| <= error, both in the maximum norm."""
    return float((problem.gamma * p / (1 - problem.gamma * (1 - p))).max() * error)


def refreshed(problem: Problem, q_off: np.ndarray, p: np.ndarray, n_refreshes: int) -> list[np.ndarray]:
    """Q_off, and what it becomes when it is set to the fixed point again and again (Algorithm 1, line 18)."""
    critics = [q_off]
    for _ in range(n_refreshes):
        critics.append(fixed_point(problem, critics[-1], p))
    return critics


def arrival(n_steps: int, p: float, gamma: float, n_refreshes: int) -> np.ndarray:
    """How much has arrived of a change of the reward k = 0, ..., n_steps steps ahead, after 0, ..., n_refreshes.

    Shares, (1 + n_refreshes, 1 + n_steps), of what arrives without guidance, gamma^k; Q is the fixed point each time.
    On a chain of n_steps + 1 states and one action: the last one's reward has risen from 0 to 1, and leads to an end.
    """
    n = n_steps + 1
    change = Problem(np.eye(n, k=1), np.append(np.zeros(n_steps), 1.0), gamma)
    critics = refreshed(change, np.zeros(n), np.full(n, p), n_refreshes + 1)[1:]
    return np.array(critics)[:, ::-1] / gamma ** np.arange(n)


def stochastic_td(problem: Problem, q_off: np.ndarray, p: np.ndarray, n_sweeps: int, seed: int = 0) -> np.ndarray:
    """TD learning of SAMG's target from sampled transitions, all pairs a sweep. Returns Q after each, (n_sweeps, n).

    Step sizes k^-0.75 meet Robbins' and Monro's conditions.
    """
    random, q, history = np.random.default_rng(seed), np.zeros(len(p)), []
    cumulative = problem.transition.cumsum(axis=1)
    for sweep in range(1, n_sweeps + 1):
        following = (random.random((len(p), 1)) > cumulative).sum(axis=1).clip(max=len(p) - 1)  # index of (s', a')
        target = problem.rewards + problem.gamma * ((1 - p) * q[following] + p * q_off[following])
        q = q + sweep**-0.75 * (target - q)
        history.append(q)
    return np.array(history)


def draw(path: Path) -> None:
    """Bias against p; the bias over refreshes; the error of stochastic TD."""
    problem = make_problem()
    n = len(problem.rewards)
    q_pi = fixed_point(problem, np.zeros(n), np.zeros(n))
    q_off = q_pi + np.random.default_rng(1).uniform(-1, 1, n)
    error = np.abs(q_off - q_pi).max()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")

    shares = np.linspace(0, 1, 41)
    biases = [np.abs(fixed_point(problem, q_off, np.full(n, share)) - q_pi).max() for share in shares]
    left.plot(shares, biases, label="bias of the fixed point")
    bounds = [bias_bound(problem, np.full(n, share), error) for share in shares]
    left.plot(shares, bounds, linestyle="--", label="bound γp / (1 − γ(1 − p)) · |Q_off − Q^π|")
    left.set_xlabel("p, the same everywhere")
    left.set_ylabel("maximum norm")
    for colour, share in enumerate((0.2, 0.6, 0.9)):
        p = np.full(n, share)
        errors = [np.abs(critic - q_pi).max() for critic in refreshed(problem, q_off, p, 10)]
        middle.semilogy(errors, marker=".", color=f"C{colour}", label=f"p = {share}")
        middle.semilogy([bias_bound(problem, p, 1.0) ** k * error for k in range(11)], "--", color=f"C{colour}")
        point = fixed_point(problem, q_off, p)
        distance = np.abs(stochastic_td(problem, q_off, p, 20_000) - point).max(axis=1)
        right.loglog(np.arange(1, 20_001), distance, color=f"C{colour}", label=f"p = {share}")
    middle.set_xlabel("refreshes of Q_off (dashed: bound)")
    middle.set_ylabel("|Q_off − Q^π|")
    right.set_xlabel("sweeps of stochastic TD")
    right.set_ylabel("|Q − fixed point|")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_horizon(path: Path, n_steps: int = 150, gamma: float = 0.99) -> None:
    """How much of a change arrives, over its distance and over the refreshes of Q_off."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for colour, p in enumerate((0.01, 0.03, 0.1, 0.44)):
        horizon = 1 / (1 - gamma * (1 - p))
        found = arrival(n_steps, p, gamma, 60)
        left.plot(found[0], color=f"C{colour}", label=f"p = {p}: horizon {horizon:.3g} steps")
        right.plot(found[:, 100], color=f"C{colour}", label=f"p = {p}")
    left.set_xlabel("steps between the row and the change of the reward")
    left.set_ylabel("share that arrives, Q_off as it was")
    right.set_xlabel("refreshes of Q_off")
    right.set_ylabel("share that has arrived over 100 steps")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="picture to write, such as theory.png")
    parser.add_argument("--horizon", action="store_true", help="draw how far ahead the target looks instead")
    args = parser.parse_args()
    (draw_horizon if args.horizon else draw)(args.output)


if __name__ == "__main__":
    main()
