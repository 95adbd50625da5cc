"""D4RL's locomotion, AntMaze and Adroit tasks under their own names in Gymnasium, with D4RL's own physics.

    import d4rl_envs
    from d4rl_envs import sources

    env = d4rl_envs.make("hopper-medium-v2")  # so does gymnasium.make
    columns = dict(sources.read("", "hopper-medium-v2"))  # D4RL's data set, found or downloaded

The level in a name (medium, human, ...) is the data set's: all levels of a robot are the same simulator. MuJoCo and
gymnasium-robotics are imported when an environment is made that needs them.
"""

from gymnasium import register

from d4rl_envs.environments import make
from d4rl_envs.episodes import find_timeouts
from d4rl_envs.scores import REFERENCE_SCORES, normalized_score, scoring

__all__ = ["REFERENCE_SCORES", "TASKS", "find_timeouts", "make", "normalized_score", "scoring"]

LEVELS = {
    "locomotion": ("random", "medium", "medium-replay", "medium-expert", "expert"),
    "adroit": ("human", "cloned", "expert"),
}
ROBOTS = {"hopper": "HopperEnv", "halfcheetah": "HalfCheetahEnv", "walker2d": "Walker2dEnv"}
HANDS = {"pen": ("PenEnv", 100), "door": ("DoorEnv", 200), "relocate": ("RelocateEnv", 200)}
MAZES = {
    "umaze": ("umaze", 700),
    "umaze-diverse": ("umaze", 700),
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
