"""policy_hold_steps: after the warm-up the critics learn and the policy stays, then both learn."""

import pytest
import torch
from reference import make_batch, scattered_agent, single
from runs import TINY, checkpoint, copies_at, only_folder

ALGORITHMS = {"awac": "AWAC", "iql": "IQL", "cql": "CQL", "calql": "CalQL"}


@pytest.mark.parametrize(("module", "name"), ALGORITHMS.items())
def test_an_update_with_the_policy_held_moves_the_critics_alone(module, name, request):
    module = request.getfixturevalue(module)
    agent = scattered_agent(getattr(module, name), module.TrainConfig(hidden_dim=16, batch_size=8), 0.1).float()
    batch = single(make_batch(module))
    for held in (True, False):
        before = {key: value.clone() for key, value in agent.state_dict().items()}
        agent.policy_held = held
        agent.update(batch, guided=True)
        moved = {key.split(".")[0] for key, value in agent.state_dict().items() if not torch.equal(value, before[key])}
        assert {"critic", "target_critic"} <= moved
        assert ("actor" in moved, "log_alpha" in moved) == (not held, not held and name in ("CQL", "CalQL"))


def test_a_run_holds_the_policy_for_so_many_steps_after_the_warm_up(awac, call, hopper_file, tmp_path):
    short = {"online_iterations": 300, "checkpoint_frequency": 1, "vae_iterations": 20, "offline_iterations": 20}
    settings = TINY | short | {"policy_hold_steps": 100}  # after 100 steps of warm-up
    with copies_at({("online", step) for step in (100, 200, 300)}, awac.GuidedRun, tmp_path):
        call(env="Hopper-v4", dataset=hopper_file, runs_dir=tmp_path / "runs", **settings)
    offline = checkpoint(only_folder(tmp_path / "runs"), "offline_checkpoint.pt")["agent"]
    agents = [checkpoint(tmp_path / f"online{step}")["agent"] for step in (200, 300)]  # of the last episode's start
    name = "actor.mean.0.weight"
    assert torch.equal(agents[0][name], offline[name]) and not torch.equal(agents[1][name], offline[name])
    assert not torch.equal(agents[0]["critic.heads.0.0.weight"], offline["critic.heads.0.0.weight"])
