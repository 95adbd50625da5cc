"""Adroit's pen, door and relocate as D4RL has them: gymnasium-robotics' robot and resets, D4RL's physics and rules."""

import mujoco
import numpy as np
from gymnasium.utils import EzPickle
from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv
from gymnasium_robotics.envs.adroit_hand.adroit_relocate import AdroitHandRelocateEnv

from d4rl_envs.contacts import OldDepths


class AsInD4RL:
    """Mixin for gymnasium-robotics' Adroit tasks.

    reward_type "dense" is D4RL's reward. "binary" is Cal-QL's task: -1 a step, 0 at the goal, which ends the episode
    unless ends_at_goal is False; a dropped pen does not. Its info["dense_reward"] is D4RL's reward of the step.
    info["goal_achieved"] tells whether the goal is reached in this step, info["success"] whether the episode is solved
    by now: dense, by D4RL's count of more than HOLD such steps; binary, by a single one.
    """

    HOLD = 25

    def __init__(self, reward_type: str = "dense", ends_at_goal: bool = True, **kwargs) -> None:
        if reward_type not in ("dense", "binary"):
            raise ValueError(f"reward_type must be dense or binary, not {reward_type!r}")
        self.binary, self.ends_at_goal, self.goal_steps = reward_type == "binary", ends_at_goal, 0
        super().__init__(**kwargs)
        EzPickle.__init__(self, reward_type, ends_at_goal, **kwargs)

    def _initialize_simulation(self):
        model, data = super()._initialize_simulation()
        for flag in ("NATIVECCD", "MULTICCD", "ISLAND"):  # later than MuJoCo 2.1
            model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{flag}"))
        model.opt.tolerance = 1e-13  # MuJoCo 2.1's solver stopped later at the same tolerance
        model.geom_margin /= 2  # today two geoms' margins add up; the masses are the same
        self.restore_depths = OldDepths(model)
        return model, data

    def _step_mujoco_simulation(self, ctrl, n_frames):
        self.data.ctrl[:] = ctrl
        for _ in range(n_frames):
            mujoco.mj_step1(self.model, self.data)
            self.restore_depths(self.model, self.data)
            mujoco.mj_step2(self.model, self.data)

    def set_state(self, qpos, qvel):
        super().set_state(qpos, qvel)
        self.data.qacc_warmstart[:] = self.data.qacc  # as MuJoCo 2.1 did

    def reset_model(self):
        self.goal_steps = 0
        return super().reset_model()

    def step(self, action):
        self.do_simulation(self.act_mean + np.clip(action, -1.0, 1.0) * self.act_rng, self.frame_skip)
        observation = self._get_obs()
        reward, achieved, terminated = self.judge(observation)
        self.goal_steps += achieved
        info = {"goal_achieved": achieved, "success": self.goal_steps > (0 if self.binary else self.HOLD)}
        if self.binary:
            info["dense_reward"] = float(reward)
            reward, terminated = achieved - 1.0, achieved and self.ends_at_goal
        if self.render_mode == "human":
            self.render()
        return observation, float(reward), terminated, False, info

    def judge(self, observation: np.ndarray) -> tuple[float, bool, bool]:
        """D4RL's reward, whether the goal is reached, whether the episode ends."""
        raise NotImplementedError


class PenEnv(AsInD4RL, AdroitHandPenEnv):
    """Turn a pen to the target's orientation. Observation (45,), action (24,), 100 steps; ends when the pen drops."""

    HOLD = 20

    def judge(self, observation):
        height, offset = observation[26], observation[39:42]
        likeness, distance = observation[33:36] @ observation[36:39], np.linalg.norm(offset)
        near, dropped = distance < 0.075, bool(height < 0.075)
        reward = likeness - distance + 10 * (near and likeness > 0.9) + 50 * (near and likeness > 0.95) - 5 * dropped
        return reward, bool(near and likeness > 0.95), dropped


class DoorEnv(AsInD4RL, AdroitHandDoorEnv):
    """Undo the latch and open the door. Observation (39,), action (28,), 200 steps; never ends before."""

    def judge(self, observation):
        angle, offset = observation[28], observation[35:38]
        cost = 0.1 * np.linalg.norm(offset) + 0.1 * (angle - 1.57) ** 2 + 1e-5 * np.sum(self.data.qvel**2)
        return 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35) - cost, bool(angle >= 1.35), False


class RelocateEnv(AsInD4RL, AdroitHandRelocateEnv):
    """Carry a ball to the target. Observation (39,), action (30,), 200 steps; never ends before."""

    def judge(self, observation):
        to_ball, to_target, distance = (np.linalg.norm(observation[i : i + 3]) for i in (30, 33, 36))
        lifted = self.data.xpos[self.obj_body_id][2] > 0.04
        reward = lifted * (1 - 0.5 * to_target - 0.5 * distance) - 0.1 * to_ball
        return reward + 10 * (distance < 0.1) + 20 * (distance < 0.05), bool(distance < 0.1), False
