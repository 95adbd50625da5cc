"""Observations of several parts as one flat array, in the same order for data and environments."""

import sys
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space, Tuple
from gymnasium.spaces.utils import flatdim, flatten, flatten_space
from tqdm import tqdm


@cache
def say(text: str) -> None:
    """Write a line to standard error, past progress bars; the same line only once."""
    tqdm.write(text, file=sys.stderr)


def in_order(space: Space) -> Space:
    """The space with the keys of its Dict spaces in alphabetical order, which flatten() follows."""
    if isinstance(space, Dict):
        return Dict({key: in_order(space[key]) for key in sorted(space)})
    return Tuple([in_order(part) for part in space]) if isinstance(space, Tuple) else space


def leaves(space: Space, path: str = "") -> list[tuple[str, int]]:
    """(name, width) of each part of a space's flat observations, in their order."""
    if isinstance(space, (Dict, Tuple)):
        parts = [(key, space[key]) for key in sorted(space)] if isinstance(space, Dict) else enumerate(space)
        return [leaf for key, part in parts for leaf in leaves(part, f"{path}/{key}".lstrip("/"))]
    return [(path, flatdim(space))]


def say_order(name: str, parts: list[tuple[str, int]]) -> None:
    say(f"{name}: observations are flattened in the order {', '.join(f'{key} ({width})' for key, width in parts)}")


def flat_rows(space: Space, values: Any) -> np.ndarray:
    """(n, width) of n observations whose parts are arrays of n rows, as flatten() would make each."""
    if isinstance(space, Dict):
        return np.concatenate([flat_rows(space[key], values[key]) for key in sorted(space)], axis=1)
    if isinstance(space, Tuple):
        return np.concatenate([flat_rows(part, value) for part, value in zip(space, values)], axis=1)
    if isinstance(space, Box):
        return np.reshape(values, (len(values), -1))
    return np.array([flatten(space, value) for value in values])


class FlatObservations(gymnasium.ObservationWrapper):
    """Gymnasium's FlattenObservation with the keys in alphabetical order, whatever order the space has."""

    def __init__(self, env: gymnasium.Env) -> None:
        super().__init__(env)
        self.parts = in_order(env.observation_space)
        self.observation_space = flatten_space(self.parts)

    def observation(self, observation: Any) -> np.ndarray:
        return flatten(self.parts, observation)
