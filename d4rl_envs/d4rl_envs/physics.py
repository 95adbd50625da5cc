"""The physics of MuJoCo 2.1, which D4RL's data was made with, on today's MuJoCo."""

import warnings

import mujoco
import numpy as np


def compile_quietly(spec: mujoco.MjSpec) -> mujoco.MjModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "compiler attribute")  # Gymnasium's half_cheetah.xml sets its total mass
        return spec.compile()


def compile_as_mujoco21(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile a specification as MuJoCo 2.1 would have, in the two respects that matter for D4RL's robots.

    A capsule of radius r around a segment of length l weighs what a cylinder of length l + r does (today: what the
    capsule itself does), and turns like it. Two geoms touch from the larger of their margins on (since MuJoCo 3.5: from
    the sum): halved margins do the same where both geoms have the same one.
    """
    model = compile_quietly(spec)
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            radius, half_length, _ = model.geom_size[geom.id]
            geom.type, geom.size = mujoco.mjtGeom.mjGEOM_CYLINDER, (radius, half_length + radius / 2, 0)
            geom.pos, geom.quat, geom.fromto = model.geom_pos[geom.id], model.geom_quat[geom.id], np.full(6, np.nan)
    cylinders = compile_quietly(spec)
    for name in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, name)[:] = getattr(cylinders, name)
    model.geom_margin /= 2
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what follows from the masses, like the solver's inverse weights
    return model
