"""tools/diagnostics/bench.py and the plain reference that it measures against."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import load_module
from reference import make_batch

ALGORITHMS = {"awac": "AWAC", "iql": "IQL", "cql": "CQL", "calql": "CalQL"}
TINY = ("--batch_size=8", "--hidden_dim=8", "--vae_hidden_dim=8", "--rows=200", "--rounds=2", "--updates=2")
TINY += ("--steps=3", "--starts=1", "--loading_rows=2000", "--device=cpu")


@pytest.fixture(scope="module")
def bench():
    return load_module("tools/diagnostics/bench.py")


@pytest.fixture(scope="module")
def plain():
    return load_module("tools/diagnostics/plain_reference.py")


# --- The reference
@pytest.mark.parametrize("name", ALGORITHMS)
def test_plain_reference_is_the_algorithm_without_samg(name, plain, request):
    """Losses and parameters of three updates in float64, from the same parameters, batch and random numbers."""
    module = request.getfixturevalue(name)
    config = module.TrainConfig(hidden_dim=8, batch_size=8, samg=False, critic_layer_norm=False)
    bounds = {"action_low": -np.ones(2, np.float32), "action_high": np.ones(2, np.float32)}
    torch.manual_seed(0)
    agent = getattr(module, ALGORITHMS[name])(config, type("Env", (), {"obs_dim": 3, "act_dim": 2} | bounds), "cpu")
    agent.double()
    reference = plain.PLAIN[name](config, 3, 2, "cpu")
    reference.copy_from(agent)
    batch = make_batch(module, dones=[0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], extra=-0.5)
    s, a, r, s_next, d, _, extra = batch
    columns = [s, a, r[:, None], s_next, d[:, None], *([extra[:, None]] if name == "calql" else [])]
    for seed in range(3):
        torch.manual_seed(seed)
        ours = agent.update(batch, guided=False)
        torch.manual_seed(seed)
        theirs = reference.update(columns)
        for loss in ("critic_loss", "actor_loss", "value_loss", "alpha"):
            if loss in theirs:
                assert ours[loss].item() == pytest.approx(theirs[loss], rel=1e-9, abs=1e-12), loss
    pairs = [(agent.actor, reference.actor), (agent.critic.heads[0], reference.critic_1)]
    pairs += [(agent.target_critic.heads[1], reference.target_2)]
    for own, other in pairs:
        for x, y in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


# --- Counting
def test_flop_of_a_network_by_hand(bench):
    """3 -> 4 -> 2 on 5 rows: products of 5 x 3 x 4 and 5 x 4 x 2, with two operations each."""
    first, second = 2 * 5 * 3 * 4, 2 * 5 * 4 * 2
    assert bench.mlp_flop([3, 4, 2], 5, "forward") == first + second
    assert bench.mlp_flop([3, 4, 2], 5, "train") == 3 * (first + second) - first
    assert bench.mlp_flop([3, 4, 2], 5, "through") == 2 * (first + second)


def test_flop_of_the_updates(bench, awac, iql, cql):
    """The counts for hopper; guidance costs AWAC Q_off(s', a'), IQL nothing."""

    def gflop(name, guided, **values):
        config = {"awac": awac, "iql": iql, "cql": cql}[name].TrainConfig(**values)
        return bench.update_flop(name, config, 11, 3, guided) / 1e9

    assert gflop("awac", False) == pytest.approx(1.10, abs=0.005)
    assert gflop("awac", True) / gflop("awac", False) == pytest.approx(1.125, abs=0.002)
    assert gflop("iql", False) == gflop("iql", True) == pytest.approx(0.525, abs=0.005)
    assert gflop("cql", False, q_n_hidden_layers=2) == pytest.approx(6.95, abs=0.05)


# --- Measuring
def check(results):
    """Finite numbers below the tables' names."""
    assert results
    for rows in results.values():
        assert rows and all(row.keys() == rows[0].keys() for row in rows)
        assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, str))


def test_updates_are_compared_in_turns(bench, tmp_path, capsys):
    words = ["--only=update,fitting", "--algorithms=awac,calql", "--variants=eager", f"--json={tmp_path / 'b.json'}"]
    bench.main([*words, *TINY])
    results = json.loads((tmp_path / "b.json").read_text())
    assert results.keys() == {"machine", "settings", "update", "fitting", "updates_per_second", "peak_memory_mb"}
    assert {"device", "threads", "torch", "clock", "limit_gflop_per_s"} <= results["machine"].keys()
    check(results["update"])
    check(results["fitting"])
    assert {phase for rates in results["updates_per_second"].values() for phase in rates} == {
        "offline",
        "online",
        "coefficient",
    }
    updates, overheads = results["update"].values()
    kinds = [(row["algorithm"], row["update"], row["samg"]) for row in updates]
    expected = [("plain reference", "off"), ("eager", "off"), ("eager", "on")]
    assert kinds == [(name, *kind) for name in ("awac", "calql") for kind in expected]
    keys = {"min_ms", "median_ms", "ratio", "ratio_of_medians", "gflop", "limit_ms", "share_of_limit", "first_3_s"}
    assert keys <= updates[0].keys()
    assert updates[0]["ratio"] == 1 and all(row["min_ms"] <= row["median_ms"] for row in updates)
    assert [(row["algorithm"], row["update"]) for row in overheads] == [("awac", "eager"), ("calql", "eager")]
    assert "| awac | plain reference | off |" in capsys.readouterr().out


def test_every_round_starts_with_another(bench):
    calls = []
    args = bench.parse(["--rounds=3", "--updates=1", "--device=cpu"])
    bench.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, args)
    assert "".join(calls) == "abcbcacab"


def test_online_steps(bench):
    """For the algorithm with the most of its own around a step."""
    results = bench.bench_online(bench.parse(["--algorithms=calql", *TINY]))
    check(results)
    split, hot = results.values()
    assert [row["part"] for row in split] == ["act", "environment", "insert", "sample", "update"]
    assert sum(row["share"] for row in split) == pytest.approx(1)
    assert len(hot) == 1


def test_retrainings_of_edis(bench):
    """Every part of a retraining is counted as often as it comes in one."""
    results = bench.bench_generation(bench.parse(["--denoiser_width=8", "--generation_rows=20", *TINY]))
    check(results)
    parts, (total,) = results.values()
    passes = {"denoiser": 2 * 1000 * 10 / 20 * 63, "energies": 100_000 / 20 * 255}
    assert [row["of_a_retraining"] for row in parts] == pytest.approx([10_000, 20, *passes.values()])
    assert [row["work"].split()[-1] for row in parts] == ["denoiser", "energies"] * 2
    assert total["minutes_of_a_retraining"] == pytest.approx(sum(row["minutes"] for row in parts))
    assert total["retrainings_of_a_run"] == 20
    assert total["hours_of_a_run"] == pytest.approx(total["minutes_of_a_retraining"] / 3)
    assert total["rows_per_s"] == pytest.approx(100_000 / 60 / parts[-1]["minutes"])


def test_the_ensemble_and_separate_critics_make_the_same_updates(bench, wsrl):
    torch.manual_seed(0)
    ensemble = wsrl.CriticEnsemble(10, 14, 8, 2).double()
    separate = bench.SeparateCritics(wsrl, ensemble)
    batch = wsrl.Batch(*(torch.rand(shape).double() for shape in ((6, 11), (6, 3), (6,), (6, 11), (6,), (6,), (6,))))
    updates = [bench.critics_update(wsrl, critic, batch, 0.01, False) for critic in (ensemble, separate)]
    for _ in range(3):
        losses = [update().item() for update in updates]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    rows = bench.bench_ensemble(bench.parse(["--variants=eager", *TINY]))
    check(rows)
    ((one, other),) = rows.values()
    assert (one["critics"], other["critics"], one["ratio"]) == ("separate", "batched", 1)


def test_loading(bench, monkeypatch):
    """Here in this process, which saves the imports of two others."""
    monkeypatch.setattr(bench, "run_child", lambda args, part, *words: bench.CHILDREN[part](args, *words))
    results = bench.bench_loading(bench.parse(["--algorithms=awac", *TINY]))
    check(results)
    ((row,),) = results.values()
    assert row["packed_mb"] == pytest.approx(2000 * (2 * 11 + 3 + 4) * 4 / 2**20)
    assert row["beyond_reading_s"] == row["load_s"] - row["read_s"]


def test_a_process_of_its_own(bench):
    result = bench.run_child(bench.parse([*TINY]), "memory", "iql", "eager")
    assert result.keys() == {"first_s", "peak_mb"} and all(value > 0 for value in result.values())
    with pytest.raises(SystemExit, match="error: read failed: .*nowhere"):
        bench.run_child(bench.parse([*TINY]), "read", "iql", "/nowhere/rows.hdf5")


def test_compiled_variant_makes_the_same_update(bench):
    """Without compiling, which takes half a minute: the builder calls the agent's own update."""
    case = bench.make_case("awac", bench.parse([*TINY]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        updates = {name: make(case, True) for name, make in bench.VARIANTS.items()}
    losses = {}
    for name, update in updates.items():
        torch.manual_seed(3)
        losses[name] = update()["critic_loss"].item()
    assert losses["eager"] == losses["compiled"] == losses["graphs"] != losses["layer_norm"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only=updates"], "error: --only knows update, online"),
        (["--algorithms=awac,sac"], "not 'sac'"),
        (["--rounds=0"], "error: --rounds must be at least 1, it is 0"),
        (["--clock=cpu", "--threads=2"], "error: --clock cpu"),
        (["--json=/nowhere/b.json"], "error: no folder /nowhere"),
    ],
)
def test_bad_options_end_with_one_line(words, message, bench):
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    assert message in stop.value.code and "\n" not in stop.value.code
