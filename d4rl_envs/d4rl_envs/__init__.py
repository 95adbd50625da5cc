"""D4RL's locomotion, AntMaze and Adroit tasks under their own names in Gymnasium, with D4RL's own physics.

    import gymnasium, d4rl_envs
    env = gymnasium.make("hopper-medium-v2")

The level in a name (medium, human, ...) is the data set's: all levels of a robot are the same simulator.
"""

from gymnasium import register

from d4rl_envs.scores import REFERENCE_SCORES, normalized_score

__all__ = ["REFERENCE_SCORES", "TASKS", "normalized_score"]

LEVELS = {
    "locomotion": ("random", "medium", "medium-replay", "medium-expert", "expert"),
    "adroit": ("human", "cloned", "expert"),
}
ROBOTS = {"hopper": "HopperEnv", "halfcheetah": "HalfCheetahEnv", "walker2d": "Walker2dEnv"}
HANDS = {"pen": ("PenEnv", 100), "door": ("DoorEnv", 200), "relocate": ("RelocateEnv", 200)}
MAZES = {
    **{"umaze": ("umaze", 700), "umaze-diverse": ("umaze", 700)},
    **{f"{maze}-{kind}": (maze, 1000) for maze in ("medium", "large") for kind in ("play", "diverse")},
}
# D4RL's name: (class, time limit in steps, arguments of the class)
TASKS = {
    **{
        f"{robot}-{level}-v2": (f"d4rl_envs.locomotion:{entry}", 1000, {})
        for robot, entry in ROBOTS.items()
        for level in LEVELS["locomotion"]
    },
    **{
        f"antmaze-{name}-v2": ("d4rl_envs.antmaze:AntMazeEnv", limit, {"maze": maze})
        for name, (maze, limit) in MAZES.items()
    },
    **{
        f"{hand}-{level}-v1": (f"d4rl_envs.adroit:{entry}", limit, {})
        for hand, (entry, limit) in HANDS.items()
        for level in LEVELS["adroit"]
    },
    **{
        f"{hand}-binary-v0": (f"d4rl_envs.adroit:{entry}", limit, {"reward_type": "binary"})  # Cal-QL's tasks
        for hand, (entry, limit) in HANDS.items()
    },
}
for name, (entry_point, limit, arguments) in TASKS.items():
    register(name, entry_point, max_episode_steps=limit, kwargs=arguments)
