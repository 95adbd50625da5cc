"""Make a data set in D4RL's raw HDF5 layout from small policies that ship with the project, without training anything.

    python tools/data/collect.py hopper-medium                           # as many rows as D4RL's, hopper-medium-v2.hdf5
    python tools/data/collect.py walker2d-medium --rows 20000 --simulator Walker2d-v4   # on Gymnasium's own physics
    python tools/data/collect.py antmaze-umaze --rows 100000 --seed 1 --workers 4 --output antmaze.hdf5
    python tools/data/collect.py door-human --demonstrations door-v0_demos.pickle

These are the project's own data, not D4RL's: other policies, if on the same simulators (d4rl_envs) and in the same
manner. Do not compare scores from them with published D4RL results.

hopper, halfcheetah, walker2d: -random, -medium, -expert: actions sampled from one policy; -medium-expert: half of the
    rows each, medium first; -medium-replay: as a replay buffer would hold them, the policies on the way up to the
    medium one, oldest first, with the same share of the rows each.
antmaze -umaze, -umaze-diverse, and -medium and -large with -play or -diverse: an ant that walks along the shortest
    path to a goal, with action noise of 0.2. It starts in the maze's own start cell (umaze) or in any (others); the
    goal lies in the maze's own goal cell or (-diverse) in any. Nothing ends at the goal; an episode has 701 (umaze) or
    1,001 rows. Then rewards are relabelled as D4RL's: 1, and terminals true, where the next row lies within 0.5 of one
    fixed goal, the attribute `target_goal`; terminals come in runs, and only timeouts end an episode.
pen-human, door-human, relocate-human: replays demonstrations from the states that they began in, with the simulator's
    own observations and rewards. --demonstrations is hand_dapg's pickle (github.com/aravindr93/hand_dapg), of which
    nothing but arrays is admitted, or HDF5 in D4RL's layout with `metadata/initial_state`, as this tool writes it.

A file has one row a step: observations, actions, rewards, terminals, timeouts, infos/qpos and infos/qvel (before the
step); next_observations (locomotion), infos/goal (antmaze). Episodes are whole: the one that reaches --rows is still
finished. Rows are kept beside the output, in `<output>.part`, until the file is written; after an interruption of any
kind the same command goes on from there. Each episode draws from its own seed, (--seed, number of the episode), so
neither that nor --workers changes the data. The same command gives everybody with the same library versions and the
same kind of CPU the same `content_sha256` (of the columns' names, types and bytes). Needs `pip install ./d4rl_envs`.
"""

import argparse
import difflib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import gymnasium
import h5py
import mujoco
import numpy as np
from d4rl_envs.pickles import ArrayUnpickler
from policies import act, face, load_policies
from tqdm import tqdm

try:
    import d4rl_envs
    from d4rl_envs import antmaze
except ImportError:
    d4rl_envs = None

ROOT = Path(__file__).resolve().parents[2]
NOTE = "This project's own data, not a D4RL data set: do not compare scores from it with published D4RL results."
FLAGS = ("terminals", "timeouts")
ENDS = ("rewards", *FLAGS, "infos/qpos", "infos/qvel")
COLUMNS = {  # of an episode's rows, in the order of the file
    "locomotion": ("observations", "actions", "next_observations", *ENDS),
    "antmaze": ("observations", "actions", *ENDS, "infos/goal"),
    "adroit": ("observations", "actions", *ENDS),
}
D4RL_ROWS = {"medium-expert": 2_000_000}  # others 1,000,000, but for
REPLAY_ROWS = {"hopper": 402_000, "walker2d": 302_000, "halfcheetah": 202_000}
STATES = {  # of the Adroit simulators
    "pen": ("qpos", "qvel", "desired_orien"),
    "door": ("qpos", "qvel", "door_body_pos"),
    "relocate": ("qpos", "qvel", "obj_pos", "target_pos"),
}
BLOCK = 20_000  # rows kept in memory until they are written
ACTION_NOISE = 0.2  # antmaze


def fail(message: str) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit("error: " + " ".join(message.split()))


# --- What to collect
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", metavar="TASK", help="D4RL's name, such as hopper-medium or hopper-medium-v2")
    parser.add_argument("--rows", type=int, help="steps to collect (default: as many as D4RL's file has)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="HDF5 file to write; must not exist (default: <D4RL's name>.hdf5)")
    parser.add_argument(
        "--simulator", metavar="ID", help="locomotion: Gymnasium id to collect on instead of the task's"
    )
    parser.add_argument("--policies", type=Path, default=ROOT / "data/policies", help="folder (default: the project's)")
    parser.add_argument("--demonstrations", type=Path, metavar="FILE", help="Adroit: what to replay")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()

    if d4rl_envs is None:
        fail("D4RL's simulators are not installed: pip install ./d4rl_envs, in a checkout of this project")
    args.task = find_task(args.task)
    args.robot, _, args.level = args.task.rpartition("-")[0].partition("-")
    args.family = "antmaze" if args.robot == "antmaze" else "adroit" if args.robot in STATES else "locomotion"
    if args.family == "adroit":
        if args.level != "human":
            fail(f"{args.task}: of Adroit only {args.robot}-human can be made here, from people's demonstrations")
        if args.demonstrations is None:
            fail(f"{args.task} needs --demonstrations: hand_dapg's {args.robot}-v0_demos.pickle, or HDF5 with states")
        if args.rows is not None:
            fail(f"--rows has no use for {args.task}: every demonstration is replayed to its end")
    elif args.demonstrations is not None:
        fail(f"--demonstrations has no use for {args.task}: it is made with the policies in {args.policies}")
    elif args.rows is None:
        args.rows = D4RL_ROWS.get(args.level, 1_000_000)
        args.rows = REPLAY_ROWS[args.robot] if args.level == "medium-replay" else args.rows
    if args.simulator and args.family != "locomotion":
        fail(f"--simulator has no use for {args.task}: it is for hopper, halfcheetah and walker2d")
    args.simulator = args.simulator or args.task
    for name in ("rows", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name} must be at least 1")
    if not 0 <= args.seed < 2**31:
        fail("--seed must be from 0 to 2**31 - 1")
    args.output = args.output or Path(f"{args.task}.hdf5")
    if args.output.exists():
        fail(f"{args.output} exists already")
    if not (args.output.parent.is_dir() and os.access(args.output.parent, os.W_OK)):
        fail(f"no such writable folder: {args.output.parent}")
    return args


def find_task(name: str) -> str:
    """hopper-medium or hopper-medium-v2 -> hopper-medium-v2"""
    full = {task.rpartition("-")[0]: task for task in d4rl_envs.TASKS if "-binary-" not in task}
    if (name := full.get(name, name)) in full.values():
        return name
    near = difflib.get_close_matches(name, [*full, *full.values()], n=3)
    fail(f"there is no task {name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else f": {', '.join(full)}"))


def read_policies(args: argparse.Namespace) -> tuple[Path | None, list[tuple[int | None, int]], dict[str, Any]]:
    """The policy file; [(policy, rows in all up to which it acts)], policy None for random actions; their facts."""
    if args.level == "random":
        return None, [(None, args.rows)], {"policies": "uniformly random actions"}
    path, sizes = args.policies / f"{'ant' if args.family == 'antmaze' else args.robot}.npz", make_env(args.simulator)
    try:
        actors, scores = load_policies(path)
        for actor in actors:
            action = actor(*(np.zeros(space.shape) for space in (sizes.observation_space, sizes.action_space)))
            if action.shape != sizes.action_space.shape or not np.isfinite(np.concatenate(actor.layers, None)).all():
                raise ValueError("its arrays are not of this task, or not finite")
        if len(actors) < 1 + (args.level in ("medium", "medium-expert", "medium-replay")):
            raise ValueError(f"it holds {len(actors)} policies, too few for {args.level}")
    except FileNotFoundError:
        fail(f"no policy file {path}: name the folder that holds it with --policies")
    except Exception as error:
        fail(f"{path} is not a policy file for {args.task} ({type(error).__name__}: {error})")
    best = len(actors) - 1
    chosen = {"medium": [best - 1], "medium-expert": [best - 1, best], "medium-replay": [*range(best)]}
    chosen = chosen.get(args.level, [best]) if args.family == "locomotion" else [best]
    stages = [(policy, -(-args.rows * (i + 1) // len(chosen))) for i, policy in enumerate(chosen)]
    facts = {"policies": f"{path.name} {', '.join(map(str, chosen))} of {len(actors)}, sampled actions"}
    facts |= {"policy_scores": [float(scores[policy]) for policy in chosen]}
    return path, stages, facts | {"policies_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# --- Episodes
@cache
def make_env(task: str) -> gymnasium.Env:
    mujoco.set_mju_user_warning(lambda message: tqdm.write(f"MuJoCo: {message}"))  # else it writes MUJOCO_LOG.TXT
    if task.startswith("antmaze"):
        return antmaze.AntMazeEnv(d4rl_envs.TASKS[task][2]["maze"], ends_at_goal=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "out of date": D4RL's tasks are the v4 ids
            return gymnasium.make(task, disable_env_checker=True)
    except gymnasium.error.Error as error:
        fail(f"cannot make the simulator {task!r}: {error}")


read_actors = cache(lambda path: load_policies(path)[0])  # once a process


def run_episode(task: str, policies: Path | None, policy: int | None, seed: int, episode: int) -> dict[str, np.ndarray]:
    """The rows of an episode, which depend on nothing but the arguments."""
    rng = np.random.default_rng(np.random.SeedSequence((seed, episode)))
    actor = None if policy is None else read_actors(policies)[policy]
    family, roll_out = ("antmaze", roam) if task.startswith("antmaze") else ("locomotion", run)
    return to_columns(family, roll_out(make_env(task), task, actor, rng))


def to_columns(family: str, rows: list[tuple]) -> dict[str, np.ndarray]:
    columns = zip(COLUMNS[family], zip(*rows))
    return {name: np.array(column, bool if name in FLAGS else np.float32) for name, column in columns}


def run(env: gymnasium.Env, task: str, actor: Any, rng: np.random.Generator) -> list[tuple]:
    """An episode of hopper, halfcheetah or walker2d."""
    rows, size, data = [], env.action_space.shape, env.unwrapped.data
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    over = False
    while not over:
        state = data.qpos.copy(), data.qvel.copy()
        action = actor(observation, rng.standard_normal(size)) if actor else rng.uniform(-1, 1, size).astype(np.float32)
        successor, reward, terminated, truncated, _ = env.step(action)
        over = terminated or truncated
        rows.append((observation, action, successor, reward, terminated, truncated and not terminated, *state))
        observation = successor
    return rows


def roam(env: gymnasium.Env, task: str, actor: Any, rng: np.random.Generator) -> list[tuple]:
    """An episode of antmaze; its rewards and terminals are still to be set, by relabel()."""
    options, free, limit = {}, antmaze.cells(env.maze, ".SG"), d4rl_envs.TASKS[task][1]
    if task != "antmaze-umaze-v2":  # D4RL's noise, within the cell
        options["start"] = antmaze.cell_to_xy(env.maze, free[rng.integers(len(free))]) + rng.uniform(0, 1, 2)
    if "diverse" in task:
        noise = rng.uniform(0, 1, 2) + rng.uniform(0, 0.5, 2)
        options["goal"] = antmaze.cell_to_xy(env.maze, free[rng.integers(len(free))]) + noise
    observation, info = env.reset(seed=int(rng.integers(2**31)), options=options)
    rows, goal = [], info["goal"]
    for step in range(limit + 1):
        direction = waypoint(env.maze, observation[:2], goal) - observation[:2]
        seen, quarter = face(observation, direction / max(np.linalg.norm(direction), 1e-9))
        action = act(actor(seen, rng.standard_normal(8)), quarter)
        action = np.clip(action + np.float32(ACTION_NOISE) * rng.standard_normal(8, np.float32), -1, 1)
        rows.append((observation, action, 0, False, step == limit, observation[:15], observation[15:], goal))
        observation = env.step(action)[0]
    return rows


@cache
def shortest_paths(maze: str, goal: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """{cell: the next one on a shortest way to the goal's cell}, of all free cells."""
    free, following, front = set(antmaze.cells(maze, ".SG")), {goal: goal}, deque([goal])
    while front:
        row, column = cell = front.popleft()
        for near in ((row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column)):
            if near in free and near not in following:
                following[near] = cell
                front.append(near)
    return following


def waypoint(maze: str, xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Where an ant at `xy` has to aim, (2,) each: the next cell's centre, or the goal if it is in this cell or that."""
    (start,) = antmaze.cells(maze, "S")
    cell, last = (tuple(int(i) for i in np.round(point[::-1] / antmaze.CELL) + start) for point in (xy, goal))
    following = shortest_paths(maze, last).get(cell, last)
    return goal if following == last else antmaze.cell_to_xy(maze, following)


def relabel(xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """(n, 2) -> (n,) bool: whether the next row lies at the goal; the file's last row has none."""
    near = np.linalg.norm(xy - goal, axis=1) <= antmaze.GOAL_RADIUS
    return np.append(near[1:], False)


# --- Demonstrations
def read_demonstrations(path: Path, robot: str) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """[(actions, state at the start)]"""
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                states = {name: file[f"metadata/initial_state/{name}"][:] for name in STATES[robot]}
                starts, actions = file["metadata/initial_state/episode_start"][:], file["actions"][:]
            parts = [(part, {}) for part in np.split(actions, starts[1:])]
            for i, (_, state) in enumerate(parts):
                state.update({name: column[i] for name, column in states.items()})
        else:
            with path.open("rb") as file:
                parts = [(demo["actions"], demo["init_state_dict"]) for demo in ArrayUnpickler(file).load()]
        demos = []
        for actions, state in parts:
            state = {name: np.array(state[name], np.float64) for name in STATES[robot]}
            demos.append((np.array(actions, np.float32).clip(-1, 1), state))
        if not demos or not all(len(actions) and np.isfinite(actions).all() for actions, _ in demos):
            raise ValueError("no demonstrations, or one without a step, or with actions that are not finite")
        return demos
    except FileNotFoundError:
        fail(f"no such file: {path}")
    except Exception as error:
        fail(f"{path} holds no demonstrations of {robot} ({type(error).__name__}: {error})")


def replay(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], int]:
    """The columns of all demonstrations played again, with `metadata/initial_state`; how many there are.

    A dropped pen ends the simulator's episode, and with it the demonstration.
    """
    demos, env = read_demonstrations(args.demonstrations, args.robot), make_env(args.task).unwrapped  # no time limit
    rows, starts = [], []
    for i, (actions, state) in enumerate(tqdm(demos, desc=args.task, unit="episode")):
        try:
            observation, _ = env.reset(seed=args.seed, options={"initial_state_dict": state})
            starts.append(len(rows))
            for step, action in enumerate(actions, 1):
                before = env.data.qpos.copy(), env.data.qvel.copy()
                successor, reward, terminated, _, _ = env.step(action)
                over = not terminated and step == len(actions)
                rows.append((observation, action, reward, terminated, over, *before))
                observation = successor
                if terminated:
                    break
        except (AssertionError, ValueError) as error:
            fail(f"{args.demonstrations}: demonstration {i} does not fit {args.task} ({str(error)[:100]})")
    columns = to_columns("adroit", rows) | {"metadata/initial_state/episode_start": np.array(starts)}
    for name in STATES[args.robot]:
        columns[f"metadata/initial_state/{name}"] = np.stack([state[name] for _, state in demos])
    return columns, len(demos)


# --- Blocks: what is collected already
class Blocks:
    """The folder `<output>.part`: whole episodes in files named by their first one's number, and the arguments.

    Each file is written aside and renamed, so a kill at any time leaves whole ones.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any]) -> None:
        self.folder, self.episodes, self.rows, self.files = folder, 0, 0, []
        folder.mkdir(exist_ok=True)
        path, arguments = folder / "arguments.json", {name: str(value) for name, value in arguments.items()}
        if not path.is_file():
            self.put(path, lambda file: file.write(json.dumps(arguments).encode()))
        try:
            known = json.loads(path.read_text())
            if changed := [name for name in arguments if arguments[name] != known.get(name)]:
                name, was = changed[0], known.get(changed[0])
                fail(f"{folder} has rows of {name} {was}, not {arguments[name]}: go on with that, or delete the folder")
            for path in sorted(folder.glob("[0-9]*.npz")):
                if int(path.stem) != self.episodes:
                    raise ValueError(f"before it there are {self.episodes} episodes")
                self.count(path, *(self.read(path, name) for name in FLAGS))
        except Exception as error:
            fail(f"{path} is damaged ({error}): delete it and all blocks after it, and give the command again")

    def put(self, path: Path, write: Any) -> None:
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def count(self, path: Path, terminals: np.ndarray, timeouts: np.ndarray) -> None:
        self.files.append(path)
        self.rows += len(timeouts)
        self.episodes += int((terminals | timeouts).sum())

    def add(self, episodes: list[dict[str, np.ndarray]]) -> None:
        path = self.folder / f"{self.episodes:07}.npz"
        block = {name: np.concatenate([episode[name] for episode in episodes]) for name in episodes[0]}
        self.put(path, lambda file: np.savez(file, **block))
        self.count(path, *(block[name] for name in FLAGS))

    def read(self, path: Path, name: str) -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            return file[name]

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """A column, block by block."""
        return (self.read(path, name) for path in self.files)

    def column(self, name: str) -> np.ndarray:
        return np.concatenate(list(self.parts(name)))


# --- Collecting
def start_worker() -> None:
    """End with the parent, however that ends."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_order(pool: ProcessPoolExecutor | None, ahead: int, function: Any, numbers: Iterable[int]) -> Iterator[Any]:
    """map(function, numbers), without end, in the pool's processes if there is one."""
    if pool is None:
        yield from map(function, numbers)
        return
    numbers = iter(numbers)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the processes that this starts leave Ctrl-C to us
    waiting = deque(pool.submit(function, number) for number in itertools.islice(numbers, ahead))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        while True:
            yield waiting.popleft().result()
            waiting.append(pool.submit(function, next(numbers)))
    finally:
        for future in waiting:
            future.cancel()


def collect(args: argparse.Namespace, blocks: Blocks, policies: Path | None, stages: list) -> None:
    """Fill up the blocks to args.rows rows in whole episodes; what read_policies returns tells how."""
    pool, episodes = None, []
    if args.workers > 1:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(args.workers, context, start_worker)
    bar = tqdm(total=args.rows, initial=min(blocks.rows, args.rows), desc=args.task, unit="row", unit_scale=True)
    try:
        for policy, until in stages:
            rows = blocks.rows
            if rows >= until:
                continue
            function = partial(run_episode, args.simulator, policies, policy, args.seed)
            for episode in in_order(pool, 2 * args.workers, function, itertools.count(blocks.episodes)):
                episodes.append(episode)
                rows += len(episode["rewards"])
                bar.update(min(rows, args.rows) - bar.n)
                if rows >= until or rows - blocks.rows >= BLOCK:
                    blocks.add(episodes)
                    episodes = []
                if rows >= until:
                    break
    except KeyboardInterrupt:
        if episodes:
            blocks.add(episodes)
        raise
    finally:
        bar.close()
        if pool:
            pool.shutdown(cancel_futures=True)


# --- The file
def write(path: Path, columns: dict[str, Iterable[np.ndarray]], attributes: dict[str, Any]) -> str:
    """Write columns, each given in parts, aside and rename, so that a file under its final name is always complete.

    Returns the SHA-256 of the columns' names, types and bytes, which is among the file's attributes, too: unlike the
    file's own it does not depend on the version of HDF5.
    """
    aside, digest, content = path.with_name(f".{path.name}.{os.getpid()}"), hashlib.sha256(), io.BytesIO()
    with h5py.File(content, "w") as file:  # in memory: where the disk is full, HDF5 crashes
        for name, parts in columns.items():
            n = 0
            for part in map(np.ascontiguousarray, parts):
                if not n:
                    shape = {"maxshape": (None, *part.shape[1:]), "chunks": (4096, *part.shape[1:])}
                    column = file.create_dataset(name, data=part, **shape, compression="gzip", shuffle=True)
                    digest.update(f"{name} {part.dtype.str} {part.shape[1:]}".encode())
                else:
                    column.resize(n + len(part), axis=0)
                    column[n:] = part
                digest.update(part.tobytes())
                n += len(part)
        file.attrs.update(attributes | {"content_sha256": digest.hexdigest()})
    try:
        with aside.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError as error:
        fail(f"cannot write {path}: {error}")
    finally:
        aside.unlink(missing_ok=True)
    return digest.hexdigest()


def summarise(task: str, rewards: np.ndarray, terminals: np.ndarray, timeouts: np.ndarray) -> dict[str, Any]:
    """Facts of a file. In antmaze's score an episode with any reward counts as a return of 1, as D4RL evaluates."""
    ends = np.flatnonzero(timeouts if task.startswith("antmaze") else terminals | timeouts)
    returns = np.add.reduceat(rewards, np.append(0, ends[:-1] + 1), dtype=np.float64)
    scored = returns > 0 if task.startswith("antmaze") else returns
    return {
        "rows": len(rewards),
        "episodes": len(ends),
        "mean_return": float(returns.mean()),
        "normalised_score": d4rl_envs.normalized_score(task, float(scored.mean())),
        "terminals": int(terminals.sum()),
        "timeouts": int(timeouts.sum()),
    }


def finish(args: argparse.Namespace, columns: dict, attributes: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the file and print its facts."""
    facts |= {"content_sha256": write(args.output, columns, attributes | facts)}
    facts |= {"bytes": args.output.stat().st_size}
    print(args.output)
    for name, value in facts.items():
        print(f"{name:18} {round(value, 3) if isinstance(value, float) else value}")


def make(args: argparse.Namespace) -> None:
    attributes = {"note": NOTE, "task": args.task, "simulator": args.simulator, "seed": args.seed}
    versions = {f"{module.__name__}_version": module.__version__ for module in (gymnasium, mujoco, np)}
    if args.family == "adroit":
        columns, n_demos = replay(args)
        facts = summarise(args.task, *(columns[name] for name in ("rewards", *FLAGS)))
        attributes |= {"demonstrations": f"{n_demos} of {args.demonstrations.name}"}
        finish(args, {name: [column] for name, column in columns.items()}, attributes | versions, facts)
        return

    policies, stages, about = read_policies(args)
    folder = args.output.with_name(f"{args.output.name}.part")
    try:
        asked = {"task": args.task, "simulator": args.simulator, "rows": args.rows, "seed": args.seed}
        blocks = Blocks(folder, {**asked, **about, **versions})
        collect(args, blocks, policies, stages)
    except OSError as error:
        fail(f"cannot keep rows in {folder}: {error}; once that is put right, the same command goes on")
    except BrokenProcessPool as error:
        fail(f"a worker process died: {error} The same command goes on")
    columns, facts = {name: blocks.parts(name) for name in COLUMNS[args.family]}, {}
    rewards, terminals, timeouts = (blocks.column(name) for name in ("rewards", *FLAGS))
    if args.family == "antmaze":
        goal, own_goals = make_env(args.task).reset(seed=args.seed)[1]["goal"], blocks.column("infos/goal")
        xy = np.concatenate([part[:, :2] for part in blocks.parts("observations")])
        terminals = relabel(xy, goal)
        rewards = terminals.astype(np.float32)
        columns |= {"rewards": [rewards], "terminals": [terminals]}
        at_own = (np.linalg.norm(xy - own_goals, axis=1) <= antmaze.GOAL_RADIUS).reshape(blocks.episodes, -1)
        facts, attributes = {"reached_own_goal": float(at_own.any(1).mean())}, attributes | {"target_goal": goal}
    facts = summarise(args.task, rewards, terminals, timeouts) | facts
    finish(args, columns, attributes | about | versions, facts)
    shutil.rmtree(folder)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        make(args)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on")


if __name__ == "__main__":
    main()
