"""Where the episodes of a data set end: its flags, checked against its states, and guessed where they are missing."""

import numpy as np


def continuity_breaks(states: np.ndarray, successors: np.ndarray, recorded: bool) -> np.ndarray:
    """(n,) bool of s and s', (n, obs_dim) each: where the next row's s lies far from s'; if s' is that s, s' from s.

    Columns count in units of their usual step. Far from s is five times what four fifths of all steps stay below, which
    an impact can exceed, too: a `recorded` s' is believed. Far from that is a tenth of such a step and ten times what
    rounding makes of it.
    """
    n, every = len(states), 1 + len(states) // 100_000
    here, there = states[::every], successors[::every]
    deviations = here.std(0, dtype=np.float64)
    units = np.maximum(np.median(np.abs(there - here), axis=0), 0.02 * deviations)
    moving = deviations > 1e-6 * (1 + np.abs(here[0]))  # the others are constant
    scale = np.divide(1, units, out=np.zeros(len(units)), where=moving).astype(np.float32)
    steps, gaps = np.zeros((2, n), np.float32)
    for start in range(0, n if moving.any() else 0, 8192):  # a block at a time stays in the cache
        there, here, after = (x[start : start + 8192] for x in (successors, states, states[1:]))
        with np.errstate(over="ignore"):
            steps[start : start + 8192] = (((there - here) * scale) ** 2).sum(1)
            gaps[start : start + len(after)] = (((there[: len(after)] - after) * scale) ** 2).sum(1)
    usual = np.quantile(steps, 0.8) or np.inf  # states that hardly ever move tell nothing
    return gaps > max(100 * np.median(gaps), 0.01 * usual) if recorded else steps > 25 * usual


def guess_timeouts(terminals: np.ndarray, breaks: np.ndarray, limit: int) -> np.ndarray:
    """(n,) bool for a file without timeouts: ends are where the states break off, or after `limit` steps (0: none)."""
    index, ends = np.arange(len(terminals)), terminals | breaks
    first = np.maximum.accumulate(np.where(np.append(True, ends[:-1]), index, 0))  # row of each row's episode
    return ~terminals & (breaks | ((index - first + 1) % limit == 0 if limit else False))


def find_timeouts(states, successors, terminals, timeouts, recorded: bool, limit: int) -> tuple:
    """Check the flags of a data set's rows against its states, or guess the timeouts where they are None.

    states and successors: s and s', (n, obs_dim) each; terminals, timeouts: (n,) bool; recorded: whether s' is the
    data's own, not the next row's s; limit: the task's time limit in steps, 0 without one. Returns the timeouts, (n,)
    bool, where else episodes end, (n,) bool, and what is to be said about both, lines of text.
    """
    breaks, notes = continuity_breaks(states, successors, recorded), []
    breaks[-1] = False
    if timeouts is None:
        timeouts = guess_timeouts(terminals, breaks, limit)
        rule = "where the states break off" + (f" or after {limit} steps" if limit else "")
        notes.append(f"it has no timeouts: guessed {timeouts.sum():,}, {rule}")
    strays = breaks & ~(terminals | timeouts)
    if guesses := recorded and not timeouts.any():
        rule = "as no timeout is set, episodes end there"  # the rows stay, but no return runs across
    else:
        rule = "does an episode's last row lack its timeout?"
    if (rows := np.flatnonzero(strays)).size:
        found = f"after {rows.size:,} rows inside episodes, first row {rows[0]}, the states do not go on"
        notes.append(f"warning: {found}: {rule}")
    return timeouts, strays & guesses, notes
