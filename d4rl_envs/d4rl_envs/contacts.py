"""How deep two geoms are in each other, as MuJoCo 2.1 had it: two faults that later versions corrected."""

import mujoco
import numpy as np

SPHERE, CAPSULE, BOX = (getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("SPHERE", "CAPSULE", "BOX"))


class OldDepths:
    """Restores the old depths of a model's contacts, when called between collision detection and the solver.

    A ball (of a capsule too) whose centre is inside a box was taken for one whose centre lies on the surface (until
    MuJoCo 3.2.7). Two boxes that touch at a face were given half their depth (until 3.4.0). Not restored: which corners
    of two boxes that touch become contacts (another algorithm since 3.12.0).
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self.is_box = model.geom_type == BOX
        round_ones = np.isin(model.geom_type, (SPHERE, CAPSULE))
        self.lowest = np.where(round_ones, -model.geom_size[:, 0], -np.inf)  # distance to a box, of each geom
        self.smallest = model.geom_size[round_ones, 0].min()
        self.boxes_move = (model.body_weldid[model.geom_bodyid[self.is_box]] > 0).any()

    def __call__(self, model: mujoco.MjModel, data: mujoco.MjData) -> bool:
        """Change the contacts and all that follows from them up to the velocity stage. True if there were any."""
        if not data.ncon:
            return False
        contacts = data.contact
        if not self.boxes_move and contacts.dist.min() >= -self.smallest:
            return False
        first, second = contacts.geom.T  # ordered by type: the box of a ball and a box is the second
        on_box, lowest = self.is_box[second], self.lowest[first]
        boxes, deep = on_box & self.is_box[first], on_box & (contacts.dist < lowest)
        for i in np.flatnonzero(deep):
            contacts[i].dist = lowest[i]
        for i in np.flatnonzero(boxes):
            normal = contacts[i].frame[:3]
            axes = data.geom_xmat[contacts[i].geom].reshape(2, 3, 3)
            if np.abs(normal @ axes).max() > 1 - 1e-9:
                contacts[i].dist /= 2
        if not (deep.any() or boxes.any()):
            return False
        mujoco.mj_makeConstraint(model, data)
        mujoco.mj_projectConstraint(model, data)
        mujoco.mj_fwdVelocity(model, data)
        return True
