"""Every file in configs/ loads, names its own task, and holds what CORL publishes or what the README lists as ours."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT

LEVELS = ("medium", "medium_replay", "medium_expert")
MAZES = ("umaze", "umaze_diverse", "medium_play", "medium_diverse", "large_play", "large_diverse")
FAMILIES = {
    "locomotion": [f"{env}_{level}" for env in ("hopper", "halfcheetah", "walker2d") for level in LEVELS],
    "antmaze": [f"antmaze_{maze}" for maze in MAZES],
    "adroit": ["pen_binary", "door_binary", "relocate_binary"],
}
TASKS = [name for names in FAMILIES.values() for name in names]
ALGORITHMS = ("awac", "iql", "cql", "calql")
BASELINES = ("td3_bc", "spot")  # without guidance
CONFIGS = [(name, path) for name in ALGORITHMS + BASELINES for path in sorted((ROOT / "configs" / name).iterdir())]

# CORL's published values under the names here (its eval_freq and n_episodes: eval_frequency, n_test_episodes), for all
# tasks, for a family ("adroit": those of its cloned tasks) and for a single task: the narrower one counts
EVERY = {"batch_size": 256, "eval_frequency": 5_000, "n_test_episodes": 10, "normalize_reward": False}
MAZE = {"eval_frequency": 50_000, "n_test_episodes": 100, "normalize_reward": True}
CQL = {
    "alpha_multiplier": 1.0,
    "backup_entropy": False,
    "bc_steps": 0,
    "cql_alpha": 10.0,
    "cql_alpha_online": 10.0,
    "cql_clip_diff_max": math.inf,
    "cql_clip_diff_min": -math.inf,
    "cql_temp": 1.0,
    "cql_importance_sample": True,
    "cql_lagrange": False,
    "cql_max_target_backup": False,
    "cql_n_actions": 10,
    "cql_target_action_gap": -1.0,
    "discount": 0.99,
    "hidden_dim": 256,
    "normalize": True,
    "orthogonal_init": True,
    "policy_lr": 3e-5,
    "q_n_hidden_layers": 3,
    "qf_lr": 3e-4,
    "reward_bias": 0.0,
    "reward_scale": 1.0,
    "target_update_period": 1,
    "soft_target_update_rate": 0.005,
    "use_automatic_entropy_tuning": True,
}
CQL_FINE_TUNING = {"policy_lr": 1e-4, "cql_clip_diff_min": -200.0, "cql_max_target_backup": True, "normalize": False}
CQL_FINE_TUNING |= {"cql_target_action_gap": 0.8}
CQL_MAZE = {"cql_alpha": 5.0, "cql_alpha_online": 5.0, "cql_lagrange": True, "q_n_hidden_layers": 5}
CQL_MAZE |= {"reward_scale": 10.0, "reward_bias": -5.0}
CORL = {
    "awac": {
        "all": EVERY | {"gamma": 0.99, "hidden_dim": 256, "learning_rate": 3e-4, "tau": 0.005, "awac_lambda": 0.1},
        "locomotion": {"awac_lambda": 0.3333, "eval_frequency": 1_000},
        "antmaze": MAZE,
    },
    "iql": {
        "all": EVERY
        | {"actor_dropout": 0.0, "actor_lr": 3e-4, "beta": 3.0, "discount": 0.99, "iql_deterministic": False}
        | {"iql_tau": 0.7, "normalize": True, "qf_lr": 3e-4, "tau": 0.005, "vf_lr": 3e-4},
        "antmaze": MAZE | {"beta": 10.0, "iql_tau": 0.9},
        "adroit": {"actor_dropout": 0.1, "iql_tau": 0.8},
        "hopper_medium": {"iql_deterministic": True, "normalize_reward": True, "tau": 0.001},
        "hopper_medium_replay": {"iql_deterministic": True, "normalize_reward": True, "tau": 0.001},
        "hopper_medium_expert": {"beta": 6.0, "iql_tau": 0.5},
    },
    "cql": {
        "all": EVERY | CQL,
        "antmaze": MAZE | CQL_FINE_TUNING | CQL_MAZE,
        "adroit": CQL_FINE_TUNING | {"cql_alpha": 1.0, "cql_alpha_online": 1.0},
        "hopper_medium": {"normalize_reward": True},
    },
}
CORL["calql"] = CORL["cql"] | {  # which has no Cal-QL on locomotion: CQL's values
    "all": EVERY | CQL | {"mixing_ratio": 0.5, "is_sparse_reward": False},
    "antmaze": CORL["cql"]["antmaze"] | {"is_sparse_reward": True},
}

# The paper's values and ours, which count before CORL's
SIMPLE = {"vae_simple_decoder": True}
PAPER = {
    "all": {"offline_iterations": 1_000_000, "online_iterations": 200_000, "warmup_steps": 2_000, "p_threshold": 0.6}
    | {"buffer_size": 20_000, "coefficient_frequency": 10_000, "mastered_share": 0.1, "vae_simple_decoder": False}
    | {"critic_layer_norm": False},  # as CORL
    "antmaze": {"buffer_size": 50_000},
} | {name: SIMPLE for name in FAMILIES["locomotion"] if not name.startswith("halfcheetah")}
RARE = {"eval_frequency": 20_000}
CQL_OURS = {"all": {"guidance_steps": 100_000, "refresh_offline_critic": False}}
DOSE = {"p_share": 0.05, "vae_tail": "joint", "coefficient": "vae"}
OURS = {
    "awac": {"locomotion": {"eval_frequency": 5_000}, "antmaze": RARE},
    "iql": {"all": {"exp_adv_max": 100}, "antmaze": RARE},
    "cql": CQL_OURS | {"antmaze": RARE | {"cql_alpha_online": 2.0, "p_threshold": 0.7}},
    "calql": CQL_OURS
    | {"antmaze": RARE | {"cql_alpha_online": 2.0}}
    | {"adroit": {"is_sparse_reward": True, "hidden_dim": 512, "reward_scale": 10.0, "reward_bias": 5.0}},
}


# TD3+BC and SPOT: CORL's values, on SPOT's locomotion its authors'; online phases: docs/td3_bc.md and docs/spot.md
TD3 = {
    "offline_iterations": 1_000_000,
    "online_iterations": 200_000,
    "batch_size": 256,
    "hidden_dim": 256,
    "critic_lr": 3e-4,
    "discount": 0.99,
    "tau": 0.005,
    "policy_noise": 0.2,
    "noise_clip": 0.5,
    "policy_freq": 2,
    "critic_layer_norm": False,
    "normalize": True,
    "normalize_reward": False,
    "expl_noise": 0.1,
    "eval_frequency": 5_000,
    "n_test_episodes": 10,
    "reward_scale": 1.0,
    "reward_bias": 0.0,
}
SPOT = {
    "vae_iterations": 100_000,
    "vae_hidden_dim": 750,
    "vae_lr": 1e-3,
    "beta": 0.5,
    "lambd_cool": True,
    "lambd_end": 0.2,
}
SPOT |= {"iwae": False, "reset_optimizers": True, "keep_offline_data": True}
SPARSE = {"actor_lr": 1e-4, "actor_dropout": 0.0, "actor_init_w": 1e-3, "critic_init_w": 3e-3, "normalize": False}
RARE_MAZE = {"normalize_reward": True, "n_test_episodes": 100, "eval_frequency": 20_000}
LAMBDAS = {
    **dict(zip(FAMILIES["locomotion"], (0.1, 0.1, 0.2, 0.05, 0.05, 1.0, 0.2, 0.2, 0.5))),
    **dict(zip(FAMILIES["antmaze"], (0.25, 0.25, 0.05, 0.025, 0.025, 0.025))),
    **dict.fromkeys(FAMILIES["adroit"], 1.0),
}
BASELINE = {
    "td3_bc": {
        "all": TD3
        | {"actor_lr": 3e-4, "alpha": 2.5, "bc_decay": "exponential", "bc_decay_end": 0.5, "bc_decay_steps": 0}
        | {"online_data": "all", "mixing_ratio": 0.0, "reset_optimizers": False},
        "antmaze": RARE_MAZE,
    },
    "spot": {
        "all": TD3 | SPOT,
        "locomotion": {"actor_lr": 3e-4, "actor_dropout": 0.1, "actor_init_w": 0.0, "critic_init_w": 0.0}
        | {"online_discount": 0.0},
        "antmaze": SPARSE | RARE_MAZE | {"online_discount": 0.995},
        "adroit": SPARSE | {"lambd_end": 0.5, "online_discount": 0.0},
    }
    | {name: {"lambd": value} for name, value in LAMBDAS.items()},
}


@pytest.fixture
def load(request):
    """load(algorithm, name): the default configuration, and that of a file."""

    def load(algorithm, name):
        module, path = request.getfixturevalue(algorithm), ROOT / "configs" / algorithm / f"{name}.yaml"
        return module.TrainConfig(), module.parse_config(module.TrainConfig, ["--config", str(path)])

    return load


@pytest.mark.parametrize("algorithm", ALGORITHMS + BASELINES)
def test_there_is_a_file_for_each_of_the_18_tasks_and_the_quickstarts(algorithm):
    quickstarts = ("quickstart", "quickstart_likelihood")[: 1 + (algorithm in ALGORITHMS)]
    assert {path.name for owner, path in CONFIGS if owner == algorithm} == {
        f"{name}.yaml" for name in (*TASKS, *quickstarts)
    }
    assert len(TASKS) == 18


@pytest.mark.parametrize(("algorithm", "path"), CONFIGS, ids=lambda value: getattr(value, "stem", value))
def test_a_file_names_only_what_differs_from_the_defaults(load, algorithm, path):
    given = yaml.safe_load(path.read_text())
    default, config = load(algorithm, path.stem)
    assert all(getattr(config, name) == value for name, value in given.items())
    assert not [name for name, value in given.items() if name != "env" and getattr(default, name) == value]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_values_are_corls_the_papers_or_listed_as_ours(load, algorithm, name):
    _, config = load(algorithm, name)
    env, level = name.split("_", 1)
    assert config.env == f"{env}-{level.replace('_', '-')}-{'v0' if level == 'binary' else 'v2'}"
    family = next(family for family, names in FAMILIES.items() if name in names)
    expected = {}
    for table in (CORL[algorithm], PAPER, OURS[algorithm]):
        for key in ("all", family, name):
            expected |= table.get(key, {})
    expected |= DOSE
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("algorithm", BASELINES)
def test_values_of_the_baselines(load, algorithm, name):
    _, config = load(algorithm, name)
    env, level = name.split("_", 1)
    assert config.env == f"{env}-{level.replace('_', '-')}-{'v0' if level == 'binary' else 'v2'}"
    expected, family = {}, next(family for family, names in FAMILIES.items() if name in names)
    for key in ("all", family, name):
        expected |= BASELINE[algorithm].get(key, {})
    assert {key: getattr(config, key) for key in expected} == expected


def test_cqls_antmaze_rewards_become_10_r_minus_5(cql, load):
    _, config = load("cql", "antmaze_umaze")
    assert cql.reward_transform(SimpleNamespace(name="antmaze-umaze-v2"), np.array([]), config) == (10, -5)
