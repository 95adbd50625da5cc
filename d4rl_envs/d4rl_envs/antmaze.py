"""AntMaze as D4RL has it: its light, strong ant, its mazes, its rules for goal, start and end."""

import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv
from gymnasium.spaces import Box
from gymnasium.utils import EzPickle

from d4rl_envs.contacts import OldDepths
from d4rl_envs.physics import compile_as_mujoco21

# Wall #, start S (the origin of the coordinates), goal G. The first row lies at the smallest y.
MAZES = {
    "umaze": ("#####", "#S..#", "###.#", "#G..#", "#####"),
    "medium": (
        *("########", "#S.##..#", "#..#...#", "##...###"),
        *("#..#...#", "#.#..#.#", "#...#.G#", "########"),
    ),
    "large": (
        *("############", "#S...#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#"),
        *("#..#.#.....#", "##.#.#.#.###", "#..#...#.G.#", "############"),
    ),
}
CELL = 4.0  # width of a cell; walls are half as high
GOAL_RADIUS = 0.5
LEG_RADIUS, TORSO_RADIUS = 0.08, 0.25
TORQUE = 30.0  # of each motor, at action 1


def cells(maze: str, kind: str) -> list[tuple[int, int]]:
    """(row, column) of every cell of a maze that is marked with one of the characters of `kind`."""
    return [(i, j) for i, row in enumerate(MAZES[maze]) for j, mark in enumerate(row) if mark in kind]


def cell_to_xy(maze: str, cell: tuple[int, int]) -> np.ndarray:
    """A cell's centre, (2,)."""
    (start,) = cells(maze, "S")
    return CELL * np.subtract(cell, start)[::-1].astype(float)


def build_ant_maze(maze: str) -> mujoco.MjSpec:
    """The model. A leg lies along a diagonal of the x-y plane: aux segment, hip, thigh, ankle, shin."""
    spec = mujoco.MjSpec()
    spec.modelname = f"antmaze-{maze}"
    spec.option.timestep, spec.option.integrator = 0.02, mujoco.mjtIntegrator.mjINT_RK4
    spec.option.disableflags = mujoco.mjtDisableBit.mjDSBL_ISLAND  # OldDepths makes the constraints anew
    spec.option.tolerance = 1e-13  # MuJoCo 2.1's solver stopped later at the same tolerance
    geom, joint = spec.default.geom, spec.default.joint
    geom.density, geom.margin, geom.friction, geom.rgba = 5.0, 0.01, (1, 0.5, 0.5), (0.8, 0.6, 0.4, 1)
    geom.contype, geom.conaffinity = 1, 0  # the ant touches floor and walls, never itself
    geom.solref[:], geom.solimp[:3] = (0.02, 1), (0.8, 0.8, 0.01)
    joint.armature, joint.damping[0] = 1.0, 1.0
    plane, box = mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX
    sphere, capsule = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE

    world, touched = spec.worldbody, {"contype": 1, "conaffinity": 1}
    world.add_light(pos=(0, 0, 30), dir=(0.2, 0.1, -1), type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
    world.add_geom(name="floor", type=plane, size=(40, 40, 40), rgba=(0.8, 0.9, 0.8, 1), **touched)
    for row, column in cells(maze, "#"):
        pos, size = (*cell_to_xy(maze, (row, column)), CELL / 4), (CELL / 2, CELL / 2, CELL / 4)
        world.add_geom(name=f"wall_{row}_{column}", type=box, pos=pos, size=size, rgba=(0.7, 0.5, 0.3, 1), **touched)
    world.add_site(name="goal", type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=(GOAL_RADIUS, 0.01, 0), rgba=(1, 0, 0, 0.5))

    torso = world.add_body(name="torso", pos=(0, 0, 0.75))
    torso.add_geom(name="torso", type=sphere, size=(TORSO_RADIUS, 0, 0))
    torso.add_joint(name="root", type=mujoco.mjtJoint.mjJNT_FREE, armature=0, damping=[0] * 3)
    legs = {"front_left": (1, 1), "front_right": (-1, 1), "back_left": (-1, -1), "back_right": (1, -1)}
    for leg, (x, y) in legs.items():
        segments = {"aux": 0.2, "thigh": 0.2, "shin": 0.4}
        body, pos = torso, (0, 0, 0)
        for segment, length in segments.items():
            name = f"{leg}_{segment}"
            body, end = body.add_body(name=name, pos=pos), (length * x, length * y, 0)
            body.add_geom(name=name, type=capsule, size=(LEG_RADIUS, 0, 0), fromto=(0, 0, 0, *end))
            if segment == "thigh":
                body.add_joint(name=f"{leg}_hip", axis=(0, 0, 1), limited=True, range=(-30, 30))
            elif segment == "shin":
                bend = (30, 70) if x > 0 else (-70, -30)  # an episode starts outside, with straight legs
                body.add_joint(name=f"{leg}_ankle", axis=(-x * y, 1, 0), limited=True, range=bend)
            pos = end
    for leg in ("back_right", "front_left", "front_right", "back_left"):  # the order of the actions
        for joint in ("hip", "ankle"):
            motor = spec.add_actuator(name=f"{leg}_{joint}", target=f"{leg}_{joint}")
            motor.trntype, motor.ctrllimited = mujoco.mjtTrn.mjTRN_JOINT, True
            motor.ctrlrange = (-TORQUE, TORQUE)
    return spec


def forward(model: mujoco.MjModel, data: mujoco.MjData, restore_depths: OldDepths) -> None:
    """mj_forward as in MuJoCo 2.1, which also started each solution at the last one."""
    mujoco.mj_forward(model, data)
    if restore_depths(model, data):
        mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_VEL, 0)
    data.qacc_warmstart[:] = data.qacc


def runge_kutta_step(model: mujoco.MjModel, data: mujoco.MjData, restore_depths: OldDepths) -> None:
    """mj_step as before MuJoCo 4.0, which integrates the orientation of a free joint to a higher order."""
    time_step, qpos, qvel, qacc = model.opt.timestep, data.qpos, data.qvel, data.qacc
    start, speed = qpos.copy(), qvel.copy()
    forward(model, data, restore_depths)
    speeds, accelerations = speed.copy(), qacc.copy()
    for share, weight in ((0.5, 2), (0.5, 2), (1, 1)):
        qpos[:] = start
        mujoco.mj_integratePos(model, qpos, qvel, share * time_step)
        qvel[:] = speed + share * time_step * qacc
        forward(model, data, restore_depths)
        speeds += weight * qvel
        accelerations += weight * qacc
    qpos[:] = start
    mujoco.mj_integratePos(model, qpos, speeds, time_step / 6)
    qvel[:] = speed + time_step / 6 * accelerations
    data.time += time_step


class AntMazeEnv(MujocoEnv, EzPickle):
    """Observation (29,): qpos (15,) and qvel (14,), action (8,). Reward 1 within 0.5 of the goal, then it ends.

    The goal is drawn anew at each reset, in the goal's cell; the observation does not tell it, info["goal"] of reset()
    does. Every draw comes from the environment's own generator, in the order goal, qpos, qvel (D4RL itself draws goals
    from numpy's global one). reset(options={"start": (x, y), "goal": (x, y)}) sets either, and with
    ends_at_goal=False the episode goes on at the goal: so D4RL's data was collected.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 10}

    def __init__(self, maze: str = "umaze", ends_at_goal: bool = True, **kwargs) -> None:
        if maze not in MAZES:
            raise ValueError(f"maze must be one of {', '.join(MAZES)}, not {maze!r}")
        EzPickle.__init__(self, maze, ends_at_goal, **kwargs)
        self.maze, self.ends_at_goal = maze, ends_at_goal
        self.target_goal = cell_to_xy(maze, cells(maze, "G")[0])
        camera = {"distance": 40.0, "lookat": np.array((*self.target_goal / 2, 0.0)), "elevation": -70.0}
        space = Box(-np.inf, np.inf, (29,), np.float64)
        kwargs = {"default_camera_config": camera} | kwargs
        super().__init__(__file__, 5, space, **kwargs)  # a path must be given: there is no file, the model is built
        self.action_space = Box(-1.0, 1.0, (8,), np.float32)

    def _initialize_simulation(self):
        model = compile_as_mujoco21(build_ant_maze(self.maze))
        model.vis.global_.offwidth, model.vis.global_.offheight = self.width, self.height
        self.restore_depths = OldDepths(model)
        return model, mujoco.MjData(model)

    def _step_mujoco_simulation(self, ctrl, n_frames):
        self.data.ctrl[:] = ctrl
        for _ in range(n_frames):
            runge_kutta_step(self.model, self.data, self.restore_depths)

    def reset(self, *, seed=None, options=None):
        self.options = options or {}
        if unknown := self.options.keys() - {"start", "goal"}:
            raise ValueError(f"unknown reset option {unknown.pop()!r}: there are start and goal")
        return super().reset(seed=seed)

    def reset_model(self):
        (cell,), draw = cells(self.maze, "G"), self.np_random
        noise = draw.uniform(0, CELL / 4, 2) + draw.uniform(0, CELL / 8, 2)
        goal = np.maximum(cell_to_xy(self.maze, cell) + noise, 0)
        self.target_goal = np.array(self.options.get("goal", goal), float)
        qpos = self.init_qpos + draw.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + draw.standard_normal(self.model.nv) * 0.1
        qpos[:2] = self.options.get("start", qpos[:2])
        mujoco.mj_normalizeQuat(self.model, qpos)
        self.model.site("goal").pos[:2] = self.target_goal
        self.set_state(qpos, qvel)
        return self._get_obs()

    def _get_obs(self):
        return np.concatenate((self.data.qpos, self.data.qvel))

    def _get_reset_info(self):
        return {"goal": self.target_goal.copy()}

    def step(self, action):
        action = np.asarray(action)
        torque = -TORQUE + (action + 1) * 0.5 * (2 * TORQUE)  # rounded in the action's own precision, as D4RL's is
        self.do_simulation(np.clip(torque, -TORQUE, TORQUE), self.frame_skip)
        reached = bool(np.linalg.norm(self.data.qpos[:2] - self.target_goal) <= GOAL_RADIUS)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reached), reached and self.ends_at_goal, False, {"goal_achieved": reached}
