"""Every file in configs/ loads, names its own task, and holds what CORL publishes or what the README lists as ours."""

import pytest
import yaml
from conftest import ROOT

CONFIGS = sorted((ROOT / "configs" / "awac").glob("*.yaml"))
LOCOMOTION = [
    f"{env}_{level}"
    for env in ("hopper", "halfcheetah", "walker2d")
    for level in ("medium", "medium_replay", "medium_expert")
]
ANTMAZE = [
    f"antmaze_{maze}"
    for maze in ("umaze", "umaze_diverse", "medium_play", "medium_diverse", "large_play", "large_diverse")
]
ADROIT = ["pen_binary", "door_binary", "relocate_binary"]


def load(awac, name):
    return awac.parse_config(awac.TrainConfig, ["--config", str(ROOT / "configs" / "awac" / f"{name}.yaml")])


def test_there_is_a_file_for_each_of_the_18_tasks_and_a_quickstart():
    assert {path.stem for path in CONFIGS} == {*LOCOMOTION, *ANTMAZE, *ADROIT, "quickstart"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_names_only_what_differs_from_the_defaults(awac, path):
    given = yaml.safe_load(path.read_text())
    config, default = load(awac, path.stem), awac.TrainConfig()
    assert all(getattr(config, name) == value for name, value in given.items())
    assert not [name for name, value in given.items() if name != "env" and getattr(default, name) == value]


@pytest.mark.parametrize("name", LOCOMOTION + ANTMAZE + ADROIT)
def test_values_are_corls_and_the_papers(awac, name):
    config = load(awac, name)
    family, level = name.split("_", 1)
    assert config.env == f"{family}-{level.replace('_', '-')}-{'v0' if name in ADROIT else 'v2'}"
    corl = {"batch_size": 256, "gamma": 0.99, "hidden_dim": 256, "learning_rate": 3e-4, "tau": 0.005}
    corl |= {"awac_lambda": 0.3333 if name in LOCOMOTION else 0.1, "normalize_reward": name in ANTMAZE}
    corl |= {"n_test_episodes": 100 if name in ANTMAZE else 10}
    paper = {"offline_iterations": 1_000_000, "online_iterations": 200_000, "warmup_steps": 2_000, "p_threshold": 0.6}
    paper |= {"buffer_size": 50_000 if name in ANTMAZE else 20_000, "coefficient_frequency": 10_000}
    paper |= {"vae_simple_decoder": family in ("hopper", "walker2d"), "mastered_share": 0.1}
    assert {key: getattr(config, key) for key in corl | paper} == corl | paper
