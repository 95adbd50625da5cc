"""Write a video of a saved policy.

    python tools/experiments/watch.py runs/Hopper-v4/awac-samg-seed0/checkpoint.pt --output hopper.mp4

Needs requirements-dev.txt. Without a screen, set MUJOCO_GL=egl (GPU) or MUJOCO_GL=osmesa (CPU) before the command; on
Debian they are in the packages libegl1 and libosmesa6.
"""

import argparse
from pathlib import Path

import imageio
import torch
from sweep import ROOT, load_module
from tqdm import tqdm

NO_SCREEN = "without a screen, set MUJOCO_GL=egl or osmesa and install their libraries (Debian: libegl1, libosmesa6)"


def load_policy(path: Path):
    """The agent of a checkpoint and its environment, made to render, from the algorithm file that wrote it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        module = load_module(ROOT / "algorithms" / f"{checkpoint['algorithm']}.py")
    except Exception as error:
        raise SystemExit(f"error: cannot read the checkpoint {path}: {error}") from None
    algorithm = next(value for value in vars(module).values() if hasattr(value, "ALGORITHM"))
    config = module.TrainConfig(**checkpoint["config"])
    try:
        env = module.Environment(config.env, max_steps=config.max_episode_steps, render_mode="rgb_array")
    except SystemExit as stop:
        raise SystemExit(f"{stop.code}; {NO_SCREEN}") from None
    agent = algorithm(config, env, "cpu")
    agent.load_state_dict(checkpoint["agent"])
    return agent, env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("policy.mp4"))
    parser.add_argument("--episodes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=int, default=0, help="frames a second (default: the simulator's own)")
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error("--episodes must be at least 1")

    agent, env = load_policy(args.checkpoint)
    fps = args.fps or round(1 / getattr(env.env.unwrapped, "dt", 1 / 30))
    scores = []
    try:
        with imageio.get_writer(args.output, fps=fps, macro_block_size=1) as video:
            for episode in tqdm(range(args.episodes), desc="episodes"):
                observation, over = env.reset(args.seed + episode), False
                while not over:
                    frame = env.env.render()
                    video.append_data(frame)
                    observation, _, terminated, truncated = env.step(agent.act(observation, deterministic=True))
                    over = terminated or truncated
                scores.append(env.score())
    except Exception as error:
        args.output.unlink(missing_ok=True)
        raise SystemExit(f"error: cannot render {env.name}: {error}; {NO_SCREEN}") from None
    print(f"{args.output}: scores {', '.join(f'{score:.1f}' for score in scores)}")


if __name__ == "__main__":
    main()
