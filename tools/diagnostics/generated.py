"""Look at EDIS's generated rows: how they lie beside the data's, and by how much they break a Gymnasium task's physics.

    python tools/diagnostics/generated.py runs/Hopper-v4/edis-quickstart-seed0/checkpoint.pt --output generated.png
    python tools/diagnostics/generated.py CHECKPOINT --rows 200 --generate    # with and without guidance, anew

The checkpoint is one of algorithms/edis.py from its online phase. Its rows are the last retraining's. With --generate a
model is trained here, on the run's offline and online rows and with its settings, and samples with the run's energies,
with all weights at 0, and the rows are compared.

The picture has (s, a, r, s') of real and generated rows on the two first principal components of the real ones. The
error of a row is |s' - T(s, a)|, each component over its deviation in the data, root mean square over the components,
median over rows; T is one step of the simulator. Only for Hopper, HalfCheetah and Walker2d, whose state the observation
gives but for the place on the x axis; velocities that the task clips cannot be given back, so real rows have an error,
too, which stands beside it.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

FILE = Path(__file__).resolve().parents[2] / "algorithms" / "edis.py"


def load_file() -> Any:
    spec = importlib.util.spec_from_file_location("edis", FILE)
    module = sys.modules["edis"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def restore(edis: Any, path: Path) -> Any:
    """The run of a checkpoint, with its data and buffer, as it was when it was saved; nothing is written."""
    checkpoint = edis.load_checkpoint(path, edis.EDIS)
    config = checkpoint["config"]
    config.resume, config.offline_checkpoint, config.device = "", "", "cpu"
    run = edis.EDISRun(config, edis.EDIS)
    run.resumes, run.source = True, path
    run.load_state_dict(checkpoint)
    if run.buffer is None or not config.generated:
        raise SystemExit(f"error: {path} holds no generated rows: it must be of an online phase with generated true")
    return run


def step_errors(env: Any, s: np.ndarray, a: np.ndarray, s_next: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(n,): of next states (n, obs_dim) against one step of the simulator from s with a, in deviations."""
    simulator = env.env.unwrapped
    nq, errors = simulator.model.nq, []
    for state, action, successor in zip(s.astype(float), a, s_next):
        simulator.set_state(np.append(0.0, state[: nq - 1]), state[nq - 1 :])
        simulator.do_simulation(action, simulator.frame_skip)
        found = np.concatenate([simulator.data.qpos[1:], np.clip(simulator.data.qvel, -10, 10)])
        errors.append(np.sqrt(np.mean(((successor - found) / std) ** 2)))
    return np.array(errors)


def generate(edis: Any, run: Any, n: int) -> dict[str, torch.Tensor]:
    """n packed rows of a model trained here, with the run's energies and without."""
    generation, buffer = run.generation, run.buffer
    generation.config.n_generated = generation.config.generation_batch = n
    for i in range(generation.config.diffusion_iterations):
        generation.do_unit(generation.train_denoiser, buffer, i)
    found = {}
    for name in ("guided", "unguided"):
        if name == "unguided":
            for weight in ("state_weight", "action_weight", "next_state_weight"):
                setattr(generation.config, weight, 0.0)
        generation.do_unit(generation.generate, buffer, 0)
        found[name] = generation.work["rows"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=500, help="of each kind (default: %(default)s)")
    parser.add_argument("--generate", action="store_true", help="train a model here, sample with and without guidance")
    parser.add_argument("--output", type=Path, help="write the picture there")
    args = parser.parse_args()
    edis = load_file()
    run = restore(edis, args.checkpoint)
    s, a, buffer = run.env.obs_dim, run.env.act_dim, run.buffer
    torch.manual_seed(0)
    rows = {"offline": buffer.rows[torch.randint(buffer.kept, (args.rows,))]}
    rows["online"] = buffer.rows[torch.randint(buffer.kept, buffer.size, (args.rows,))]
    if args.generate:
        rows |= generate(edis, run, args.rows)
    else:
        rows["generated"] = run.generation.rows[torch.randint(len(run.generation.rows), (args.rows,))]
    real = buffer.rows[: buffer.size, : 2 * s + a + 1].numpy()
    mean, std = real.mean(0), real.std(0) + 1e-5
    print("| rows | mean reward | terminals | median physics error | 90 % below |\n| --- | --- | --- | --- | --- |")
    for name, some in rows.items():
        columns = some.numpy()
        parts = columns[:, :s], columns[:, s : s + a], columns[:, s + a + 1 : 2 * s + a + 1]
        errors = step_errors(run.env, *parts, std[s + a + 1 :])
        figures = (columns[:, s + a].mean(), columns[:, -3].mean(), np.median(errors), np.quantile(errors, 0.9))
        print(f"| {name} | " + " | ".join(f"{figure:.3g}" for figure in figures) + " |")
    if args.output:
        sample = (real[:: max(1, len(real) // 5000)] - mean) / std
        _, _, directions = np.linalg.svd(sample, full_matrices=False)
        figure, axes = plt.subplots(1, len(rows), figsize=(3.2 * len(rows), 3.4), sharex=True, sharey=True)
        for axis, (name, some) in zip(axes, rows.items()):
            axis.plot(*(sample @ directions[:2].T).T, ".", ms=1, color="0.8")
            axis.plot(*((some[:, : 2 * s + a + 1].numpy() - mean) / std @ directions[:2].T).T, ".", ms=2)
            axis.set_title(name)
        figure.tight_layout()
        figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
