"""Offline data sets from wherever they are, as columns in D4RL's raw layout.

    from d4rl_envs import sources
    for name, array in sources.read("minari:D4RL/pointmaze/umaze-v2", "minari:D4RL/pointmaze/umaze-v2"): ...

    python -m d4rl_envs.sources minari:mujoco/hopper/medium-v0 hopper.hdf5      the same as a file in that layout

D4RL's own files by name, HDF5 in D4RL's and in robomimic's layout, Minari, OGBench, and Cal-QL's binary Adroit files.
"""

import argparse
import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from tqdm import tqdm

from d4rl_envs.downloads import ALTERNATIVES, SourceError, download, reason
from d4rl_envs.pickles import ArrayUnpickler
from d4rl_envs.scores import REFERENCE_SCORES, is_binary, is_d4rl
from d4rl_envs.spaces import flat_rows, leaves, say, say_order

Columns = Iterator[tuple[str, np.ndarray]]
COLUMNS = ("rewards", "terminals", "timeouts", "observations", "actions", "next_observations")  # as they are read
OPTIONAL = {"timeouts", "next_observations"}
DATASET_HOST = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main"  # all of the files in one folder
SHA256: dict[str, str] = {}  # of D4RL's files by name, where known: none could be verified yet
WIDTHS = {"hopper": (11, 3), "halfcheetah": (17, 6), "walker2d": (17, 6), "antmaze": (29, 8)}
WIDTHS |= {"pen": (45, 24), "door": (39, 28), "relocate": (39, 30)}  # of observations and actions


def read(source: str | Path, env: str) -> Columns:
    """The columns of a data set for the environment of that name, one at a time, in the order of COLUMNS.

    `source` is an HDF5 file in D4RL's or robomimic's layout; OGBench's .npz; a folder that holds the environment's
    file; `minari:<id>`; `ogbench:<id>`; or empty for what `env` names: D4RL's own file, found or downloaded.

    rewards, terminals and timeouts are (n,), observations, actions and next_observations (n, width), as stored: whether
    they fit the environment is the reader's to check. terminals are true ends; a timeout is the end of an episode,
    whether it is a true one or not. timeouts and next_observations come only where they are known. Raises SourceError,
    here or while the columns are read.
    """
    place = find(source, env)
    if isinstance(place, str):
        return read_minari(place)
    if place.is_dir():
        return read_binary(place, env)
    task = str(source) if str(source).startswith("ogbench:") and not env.startswith("ogbench:") else env
    return read_ogbench(place, task) if place.suffix == ".npz" else read_hdf5(place)


def find(source: str | Path, env: str) -> Path | str:
    """Where a data set lies: a file, the folder of Cal-QL's files, or `minari:<id>`; what is not here is downloaded."""
    source, folder = str(source) or (env if env.startswith(("minari:", "ogbench:")) else ""), None
    if source.startswith(("minari:", "ogbench:")):
        return source if source.startswith("minari:") else find_ogbench(source)
    if source and not (folder := Path(source).expanduser()).is_dir():
        if not folder.is_file():
            raise SourceError(f"no data set at {source}; {ALTERNATIVES}")
        return folder
    if env.startswith("ogbench:"):
        return find_ogbench(env, folder)
    folders = [os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets", "~/.d4rl/datasets"]
    folders = [folder] if folder else [Path(name).expanduser() for name in folders]
    urls = addresses(env)
    names = list(dict.fromkeys([*(Path(url).name for url in urls), f"{env}.hdf5"]))  # D4RL's own name first
    if found := [folder / name for folder in folders for name in names if (folder / name).is_file()]:
        return found[0]
    if is_binary(env):
        if missing := [str(path) for path in binary_files(folders[0], env) if not path.is_file()]:
            needs = f"{env} needs Cal-QL's {' and '.join(missing)}"
            raise SourceError(f"{needs}; name the folder of such files with --dataset")
        return folders[0]
    if folder:
        raise SourceError(f"no {' or '.join(names)} in {source}; {ALTERNATIVES}")
    if not urls:
        raise SourceError(f"D4RL has no single data file for {env!r}; {ALTERNATIVES}")
    return download(urls, folders[0] / names[0], lambda path: check_d4rl(path, names[0], env))


# --- D4RL's files
def addresses(env: str) -> list[str]:
    """The addresses of D4RL's HDF5 file for a D4RL name, to be tried in this order; none if it has no file."""
    if not is_d4rl(env) or is_binary(env):
        return []
    path = ""
    if match := re.fullmatch("(hopper|halfcheetah|walker2d)-(.+)-v2", env):
        path = f"gym_mujoco_v2/{match[1]}_{match[2].replace('-', '_')}-v2.hdf5"
    elif match := re.fullmatch("antmaze-(umaze|medium|large)(-play|-diverse)?-v2", env):
        maze = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}[match[1]]
        flags = f"multistart_{match[2] is not None}_multigoal_{match[2] == '-diverse'}"
        path = f"ant_maze_v2/Ant_maze_{maze}_noisy_{flags}_sparse_fixed.hdf5"
    elif re.fullmatch("(pen|door|relocate)-.+-v1", env):
        path = f"hand_dapg_v1/{env}.hdf5"
    return [f"{DATASET_HOST}/{path}", f"{MIRROR}/{Path(path).name}"] if path else []


def check_d4rl(path: Path, name: str, env: str) -> None:
    """ValueError if a file cannot be D4RL's of that name: another kind, other sizes, returns far from the task's."""
    import h5py

    if name in SHA256:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != SHA256[name]:
                raise ValueError("it is not the file whose SHA-256 is known")
    family = env.split("-")[0]
    with h5py.File(path) as file:
        if missing := sorted({*COLUMNS} - OPTIONAL - file.keys()):
            raise ValueError(f"it has no {', '.join(missing)}")
        n, widths = len(file["rewards"]), dict(zip(("observations", "actions"), WIDTHS[family]))
        for key in (key for key in COLUMNS if key in file):
            width = widths.get(key.removeprefix("next_"))
            needed = (n, width) if width else (n,)
            if file[key].shape not in (needed, (*needed, 1)) or not n:
                raise ValueError(f"{key} has shape {file[key].shape}, not {needed}")
        rewards = file["rewards"][()].astype(np.float64).ravel()
        ends = file["terminals"][()].astype(bool).ravel()
        ends |= file["timeouts"][()].astype(bool).ravel() if "timeouts" in file else False
    if not np.isfinite(rewards).all() or (family == "antmaze" and not np.isin(rewards, (0, 1)).all()):
        raise ValueError("its rewards are not " + ("0 and 1" if family == "antmaze" else "finite"))
    returns = np.diff(np.append(0, rewards.cumsum()[np.flatnonzero(ends)]))
    low, high = REFERENCE_SCORES[family]
    if family != "antmaze" and len(returns):
        scores = 100 * (np.array([returns.mean(), returns.max()]) - low) / (high - low)
        if scores.min() < -100 or scores.max() > 1000:  # the best people score 400 with the pen
            raise ValueError(f"its episodes score {scores[0]:.0f} in the mean, {scores[1]:.0f} at best: not {env}'s")


def read_hdf5(path: Path) -> Columns:
    """D4RL's raw layout, or robomimic's: `data/demo_<n>` with obs, actions, rewards, dones and perhaps next_obs."""
    import h5py

    try:
        with h5py.File(path) as file:
            if "data" in file and "rewards" not in file:
                yield from read_robomimic(path, file["data"])
                return
            if missing := sorted({*COLUMNS} - OPTIONAL - file.keys()):
                has = f"it has no {', '.join(missing)}, but {', '.join(file)}"
                raise SourceError(f"{path} is not in D4RL's layout: {has}; rename or write what is missing")
            for key in (key for key in COLUMNS if key in file):
                if not (getattr(file[key], "shape", ()) and file[key].dtype.kind in "biuf"):
                    raise SourceError(f"{path}: {key} is not an array of numbers; write it as one")
                yield key, file[key][()]
    except SourceError:
        raise
    except Exception as error:
        what = f"cannot read {path} as HDF5, it may be cut off or of another kind ({reason(error)})"
        raise SourceError(f"{what}; fetch it again") from None


def read_robomimic(path: Path, data: Any) -> Columns:
    """Demonstrations one after another; observations of one row, keys in alphabetical order, images left out.

    A `done` is a terminal, and each demonstration's last row a timeout, too. Where all of them end in `done`, it only
    marks the recordings' ends (robomimic's done_mode 1 and 2): a terminal is then, of these rows, one with a reward
    where rewards are 0 and 1, else that of a demonstration shorter than the longest, which a time limit may have ended.
    """
    demos = [data[key] for key in sorted(data, key=lambda key: int(re.sub(r"\D", "", key) or -1))]
    keys = [key for key in sorted(demos[0].get("obs", ())) if demos[0]["obs"][key].ndim <= 2] if demos else []
    if not demos:
        raise SourceError(f"{path} has no demonstrations in its group data; extract it again")
    successors = "next_obs" in demos[0]
    for demo in demos:
        groups = ("obs", "next_obs") if successors else ("obs",)
        needed = ["actions", "rewards", "dones", *(f"{group}/{key}" for group in groups for key in keys)]
        if lacks := [key for key in needed if key not in demo] or ([] if keys else ["obs of numbers"]):
            hint = "write them with robomimic's dataset_states_to_obs.py"
            raise SourceError(f"{path}: {demo.name} has no {', '.join(lacks)}; {hint}")
        if len(lengths := {len(demo[key]) for key in needed}) > 1:
            raise SourceError(f"{path}: the columns of {demo.name} have lengths {sorted(lengths)}; it needs equal ones")
    say_order(str(path), [(key, math.prod(demos[0]["obs"][key].shape[1:])) for key in keys])
    if left_out := sorted(demos[0]["obs"].keys() - keys):
        say(f"{path}: left out, as they are images: {', '.join(left_out)}")

    def column(key: str) -> np.ndarray:
        return np.concatenate([demo[key][()] for demo in demos])

    def observations(group: str) -> np.ndarray:
        rows = ([demo[group][key][()].reshape(len(demo["rewards"]), -1) for key in keys] for demo in demos)
        return np.concatenate([np.concatenate(parts, axis=1) for parts in rows])

    rewards, dones = column("rewards"), column("dones").astype(bool)
    lengths = np.array([len(demo["rewards"]) for demo in demos])
    ends = np.cumsum(lengths) - 1
    if dones[ends].all():
        sparse = np.isin(rewards, (0, 1)).all() and rewards.any()
        dones[ends] = rewards[ends] > 0 if sparse else lengths < lengths.max()
        say(f"{path}: every demonstration ends in done, taken for a true end in {dones[ends].sum()} of {len(ends)}")
    yield "rewards", rewards
    yield "terminals", dones
    yield "timeouts", np.isin(np.arange(len(rewards)), ends)
    yield "observations", observations("obs")
    yield "actions", column("actions")
    if successors:
        yield "next_observations", observations("next_obs")


def join_episodes(episodes: list[tuple]) -> Columns:
    """Columns of episodes (r, d, s, a, s'); the last row of each is a timeout, terminal or not."""
    parts = [list(column) for column in zip(*episodes)]
    parts.insert(2, [np.arange(len(rewards)) == len(rewards) - 1 for rewards in parts[0]])
    return ((key, np.concatenate(column, dtype=np.float32)) for key, column in zip(COLUMNS, parts))


# --- Minari
def open_minari(name: str) -> Any:
    """The Minari data set of `minari:<id>`, downloaded if it is not here."""
    try:
        import minari

        dataset = minari.load_dataset(name.removeprefix("minari:"), download=True)
    except Exception as error:
        install = 'install: pip install "minari[hf]"; here already: minari list local'
        raise SourceError(f"cannot open {name}: {reason(error)} ({install})") from None
    if dataset.env_spec and dataset.env_spec.id.startswith("AntMaze_"):
        say(f"{name}: another robot and task than D4RL's AntMaze, so its scores do not compare with D4RL's")
    return dataset


def read_minari(name: str) -> Columns:
    dataset = open_minari(name)
    space = dataset.observation_space
    if isinstance(space, (gymnasium.spaces.Dict, gymnasium.spaces.Tuple)):
        say_order(name, leaves(space))
    elif len(space.shape or ()) != 1:
        raise SourceError(f"{name} has no flat observations, they are {space}; use a data set of vectors")
    try:
        every = tqdm(dataset.iterate_episodes(), name, dataset.total_episodes, leave=False, delay=1)
        episodes = []
        for e in every:
            s, a, r, d = flat_rows(space, e.observations), e.actions, e.rewards, e.terminations
            if not len(s) - 1 == len(a) == len(r) == len(d):
                raise ValueError(
                    f"episode {e.id} has {len(s)} observations, {len(a)} actions, {len(r)} rewards and {len(d)} "
                    "terminations; it needs one observation more than the others"
                )
            episodes.append((r, d, s[:-1], a, s[1:]))
        return join_episodes(episodes)
    except Exception as error:
        raise SourceError(f"cannot read {name}: {reason(error)}; make or download it again") from None


# --- OGBench
def ogbench_names(task: str) -> tuple[str, str]:
    """(environment's id, data file's name) of `ogbench:<single-task id>`, such as cube-single-play-singletask-v0."""
    words = task.removeprefix("ogbench:").split("-")
    place = words.index("singletask") if "singletask" in words else 0
    if place < 2:
        raise SourceError(f"{task} is no single-task id: name one such as ogbench:cube-single-play-singletask-v0")
    return "-".join([*words[: place - 1], *words[place:]]), "-".join([*words[:place], words[-1]]) + ".npz"


def import_ogbench() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a machine without a screen
            import ogbench.relabel_utils
        return ogbench
    except ImportError as error:
        raise SourceError(f"OGBench cannot be imported: {reason(error)} (install: pip install ogbench)") from None


def open_ogbench(task: str, **options: Any) -> gymnasium.Env:
    """The environment of an OGBench task: -1 a step or for each part that is not in its place; the goal ends it."""
    env_id = ogbench_names(task)[0]
    import_ogbench()
    warnings.filterwarnings("ignore", ".*Box (low|high)'s precision lowered")  # each look at its spaces makes them anew
    return gymnasium.make(env_id, **options)


def find_ogbench(task: str, folder: Path | None = None) -> Path:
    """An OGBench task's file, in that folder; without one in OGBENCH_DATASET_DIR or ~/.ogbench/data, or downloaded."""
    name = ogbench_names(task)[1]
    place = folder or Path(os.environ.get("OGBENCH_DATASET_DIR") or "~/.ogbench/data").expanduser()
    if (place / name).is_file():
        return place / name
    if folder:
        raise SourceError(f"no {name} in {folder}; {ALTERNATIVES}")
    return download([f"{import_ogbench().utils.DATASET_URL}/{name}"], place / name, check_ogbench)


def check_ogbench(path: Path) -> None:
    with np.load(path) as file:
        if missing := sorted({"observations", "actions", "terminals"} - {*file.files}):
            raise ValueError(f"it has no {', '.join(missing)}")


def read_ogbench(path: Path, task: str) -> Columns:
    """OGBench's .npz, in which `terminals` end a trajectory on a row of its own, whose action leads nowhere.

    Rewards and true ends (masks of 0) are the file's, if it has both, else made for the task by OGBench's own rule:
    those of a row's own state, as its single-task environments give them. Files with next_observations lack such rows.
    """
    try:
        check_ogbench(path)
        with np.load(path) as file:
            ends = file["terminals"].ravel().astype(bool)
            ends[-1:] = True
            successors = "next_observations" in file
            kept, last = (np.ones(len(ends), bool), ends) if successors else (~ends, np.roll(ends, -1))
            if "rewards" in file and "masks" in file:
                rewards, masks = file["rewards"][kept], file["masks"][kept]
            elif task.startswith("ogbench:"):
                data = {key: file[key][kept] for key in ("qpos", "button_states") if key in file}
                env_id, _ = ogbench_names(task)
                import_ogbench().relabel_utils.relabel_dataset(env_id, open_ogbench(task), data)
                rewards, masks = data["rewards"], data["masks"]
            else:
                hint = "name the task, such as ogbench:cube-single-play-singletask-v0, as the environment"
                raise SourceError(f"{path} has no rewards and masks: {hint}")
            yield "rewards", rewards
            yield "terminals", masks == 0
            yield "timeouts", last[kept]
            yield "observations", file["observations"][kept]
            yield "actions", file["actions"][kept]
            yield "next_observations", file["next_observations"] if successors else file["observations"][1:][kept[:-1]]
    except SourceError:
        raise
    except Exception as error:
        what = f"{path} is not as OGBench's ({type(error).__name__}: {reason(error)})"
        raise SourceError(f"{what}; fetch it again") from None


# --- Cal-QL's binary Adroit files
def binary_files(folder: Path, env: str) -> list[Path]:
    """Cal-QL's for a binary Adroit task: demonstrations, and rollouts of policies cloned from them."""
    hand = env.split("-")[0]
    return [folder / f"{hand}2_sparse.npy", folder / f"{hand}_bc_sparse4.npy"]


def read_binary(folder: Path, env: str) -> Columns:
    """The columns that Cal-QL trains on (github.com/nakamotoo/Cal-QL, get_hand_dataset_with_mc_calculation).

    Each trajectory up to its last solved row, none if there is none; every solved row, of reward 0, is a terminal.
    """
    episodes = []
    for path in binary_files(folder, env):
        try:
            with open(path, "rb") as file:
                getattr(np.lib.format, "read_array_header_{}_{}".format(*np.lib.format.read_magic(file)))(file)
                trajectories = ArrayUnpickler(file).load()
            for trajectory in trajectories:
                keys = ("observations", "actions", "next_observations")
                rows = ([x["state_observation"] if isinstance(x, dict) else x for x in trajectory[key]] for key in keys)
                s, a, s_next = map(np.array, rows)
                rewards = np.ravel(trajectory["rewards"])[: len(a)]  # a demonstration has one more
                if not np.isin(rewards, (-1, 0)).all():
                    raise ValueError("its rewards are not all -1 or 0")
                if n := len(np.trim_zeros(rewards == 0, "b")):
                    episodes.append((rewards[:n], rewards[:n] == 0, s[:n], a[:n].clip(-1, 1), s_next[:n]))
        except Exception as error:
            raise SourceError(
                f"{path} is not as Cal-QL's ({type(error).__name__}: {reason(error)}); fetch it again"
            ) from None
    if not episodes:
        raise SourceError(f"no trajectory in {folder} solves {env}; fetch Cal-QL's files again")
    return join_episodes(episodes)


# --- Command line
def write_hdf5(path: Path, columns: Columns) -> None:
    """Write columns as a file in D4RL's raw layout, whole or not at all. Numbers are float32, flags bool."""
    import h5py

    aside, sizes = path.with_suffix(f".{os.getpid()}.part"), []
    try:
        with h5py.File(aside, "w") as file:
            for key, array in columns:
                kind = bool if key in ("terminals", "timeouts") else np.float32
                file.create_dataset(key, data=array.astype(kind, copy=False), compression="gzip", shuffle=True)
                sizes.append(f"{key} {array.shape}")
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        say(f"{path}: {', '.join(sizes)}")
    finally:
        aside.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a data set as HDF5 in D4RL's raw layout.")
    parser.add_argument("source", help="file, folder, minari:<id> or ogbench:<id>; '' for D4RL's own of --env")
    parser.add_argument("output", type=Path, help="HDF5 file to write")
    parser.add_argument("--env", default="", help="the task's name, where the source does not tell it")
    args = parser.parse_args()
    try:
        write_hdf5(args.output, read(args.source, args.env or args.source))
    except SourceError as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        raise SystemExit(f"error: cannot write {args.output}: {reason(error)}") from None


if __name__ == "__main__":
    main()
