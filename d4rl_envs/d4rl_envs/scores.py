"""D4RL's normalised scores."""

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


def normalized_score(name: str, episode_return: float) -> float:
    """100 * (return - min) / (max - min), for a D4RL name such as "hopper-medium-v2" or its first word."""
    family = name.split("-")[0]
    if family not in REFERENCE_SCORES:
        raise ValueError(f"no reference scores for {name!r}: D4RL's are {', '.join(REFERENCE_SCORES)}")
    low, high = REFERENCE_SCORES[family]
    return 100.0 * (episode_return - low) / (high - low)
