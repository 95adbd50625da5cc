"""D4RL's names, its reference returns, and how a task is scored."""

import re

# The returns (min, max) that count as 0 and 100
REFERENCE_SCORES = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
}
LOCOMOTION = "hopper|halfcheetah|walker2d"
D4RL_NAMES = "|".join(
    (
        f"({LOCOMOTION})-(random|medium|expert|medium-replay|full-replay|medium-expert)-v[0-2]",
        "antmaze-(umaze|medium|large)(-play|-diverse)?-v[0-2]",
        "(pen|door|relocate)-(human|cloned|expert)-v[01]",
        "(pen|door|relocate)-binary-v0",  # Cal-QL's
    )
)
GYMNASIUM_ROBOTS = "(Hopper|HalfCheetah|Walker2d)-v[2-5]"  # D4RL's reference returns are used for these, too
# With info["success"]: gymnasium-robotics' mazes, which are not D4RL's, and OGBench's ids without the prefix
GOAL_TASKS = r"(\w+:)?(Ant|Point)Maze_\w+-v\d+|[\w-]+-singletask(-task\d)?-v\d+"


def is_d4rl(name: str) -> bool:
    """True for D4RL's exact names and Cal-QL's binary ones."""
    return re.fullmatch(D4RL_NAMES, name) is not None


def is_binary(name: str) -> bool:
    """True for Cal-QL's binary Adroit tasks."""
    return is_d4rl(name) and "-binary-" in name


def scoring(name: str) -> tuple[float, float] | str | None:
    """How episodes of a task are scored: a name that make() takes, or the id of an environment's spec.

    (low, high): 100 * (return - low) / (high - low). "success": 100 if info["goal_achieved"] was ever true, else 0.
    None: the return itself. A Minari data set's task is scored by its environment's id.
    """
    if name.startswith("minari:"):
        from d4rl_envs.sources import open_minari

        spec = open_minari(name).env_spec
        return scoring(spec.id) if spec else None
    if name.startswith("ogbench:") or re.fullmatch(GOAL_TASKS, name):
        return "success"
    if not is_d4rl(name) and not re.fullmatch(GYMNASIUM_ROBOTS, name):
        return None
    if name.startswith("antmaze-") or is_binary(name):
        return "success"
    return REFERENCE_SCORES[name.split("-")[0].lower()]


def normalized_score(name: str, episode_return: float) -> float:
    """100 * (return - min) / (max - min), for a D4RL name such as "hopper-medium-v2" or its first word."""
    family = name.split("-")[0]
    if family not in REFERENCE_SCORES:
        raise ValueError(f"no reference scores for {name!r}: D4RL's are {', '.join(REFERENCE_SCORES)}")
    low, high = REFERENCE_SCORES[family]
    return 100.0 * (episode_return - low) / (high - low)
