"""Hopper, HalfCheetah and Walker2d as D4RL's data has them: Gymnasium's v4 tasks with MuJoCo 2.1's physics."""

import mujoco
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv as HalfCheetahV4
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv as HopperV4
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv as Walker2dV4

from d4rl_envs.physics import compile_as_mujoco21


class OldPhysics:
    """Mixin for Gymnasium's v4 tasks: the model that Gymnasium ships, compiled as MuJoCo 2.1 did; actions clipped."""

    def _initialize_simulation(self):
        model = compile_as_mujoco21(mujoco.MjSpec.from_file(self.fullpath))
        window = model.vis.global_  # for rendering: as Gymnasium sets it
        window.offwidth, window.offheight = max(window.offwidth, self.width), max(window.offheight, self.height)
        return model, mujoco.MjData(model)

    def step(self, action):
        """As in v4. Beyond +-1 an action costs no more than at the bound: D4RL's wrapper clips it before."""
        return super().step(np.clip(action, self.action_space.low, self.action_space.high))


class HopperEnv(OldPhysics, HopperV4):
    """Observation (11,), action (3,), 1,000 steps; ends when the hopper falls."""


class HalfCheetahEnv(OldPhysics, HalfCheetahV4):
    """Observation (17,), action (6,), 1,000 steps; never ends before."""


class Walker2dEnv(OldPhysics, Walker2dV4):
    """Observation (17,), action (6,), 1,000 steps; ends when the walker falls."""
