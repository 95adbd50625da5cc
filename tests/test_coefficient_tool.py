"""tools/diagnostics/coefficient.py: its numbers where the answers are known, its files, and what it refuses."""

import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, load_module, write_dataset

MINI = ROOT / "data" / "hopper-medium-mini.hdf5"
SMALL = ("--rows", 3000, "--set", "vae_iterations=60", "vae_hidden_dim=16", "batch_size=32", "adapt_iterations=5")
SMALL += ("p_share=0", "p_threshold=0.45", "device=cpu")
KEYS = {
    "auroc",
    "p_threshold",
    "share_above_threshold",
    "shares",
    "ks_uniform",
    "p_mean",
    "kl",
    "reconstruction",
    "collapsed",
}
KEYS |= {"fit_seconds", "row_microseconds", "row_microseconds_batch", "adapt"}


@pytest.fixture(scope="module")
def tool():
    return load_module("tools/diagnostics/coefficient.py")


@pytest.fixture(scope="module")
def measured(tool, tmp_path_factory):
    """The files of one run of the tool with everything on."""
    folder, threads = tmp_path_factory.mktemp("measured"), torch.get_num_threads()
    words = [MINI, "--other", MINI, "--json", folder / "all.json", "--pictures", folder / "pictures", *SMALL]
    words += ["--coefficients", "vae", "even", "--variants", "vae:vae_mean_weight=1.0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "LATENT_ROWS", (40, 20))  # t-SNE is slow
        tool.main([str(word) for word in words])
    torch.set_num_threads(threads)
    return folder


def columns(n, obs_dim=3, seed=0):
    """A data set whose action is known from the state: a = tanh(s) of the first two dimensions."""
    states = np.random.default_rng(seed).normal(size=(n, obs_dim)).astype(np.float32)
    flags = {"rewards": np.zeros(n, np.float32), "terminals": np.zeros(n, bool), "timeouts": np.zeros(n, bool)}
    return {"observations": states, "next_observations": states, "actions": np.tanh(states[:, :2])} | flags


class Fake(torch.nn.Module):
    """p = 1 exactly where a = tanh(s); `constant`: 0.3; `uniform`: the first dimension's rank under N(0, 1)."""

    def __init__(self, config, obs_dim, act_dim, device):
        super().__init__()
        self.kind, self.fit_iterations, self.adaptive = config.coefficient, 0, False

    def forward(self, states, actions, next_states):
        if self.kind == "uniform":
            return torch.special.ndtr(states[:, 0])
        known = (actions - torch.tanh(states[:, :2])).abs().amax(1) < 1e-5
        return torch.where(known, 1.0, 0.0) if self.kind == "oracle" else states.new_full((len(states),), 0.3)


def measure_fake(tool, awac, monkeypatch, tmp_path, kind):
    monkeypatch.setitem(awac.COEFFICIENTS, kind, Fake)
    path = write_dataset(tmp_path / "known.hdf5", columns(2000))
    data = tool.make_data(awac, path, write_dataset(tmp_path / "other.hdf5", columns(500, seed=1)), 0, 0, "cpu")
    config = awac.TrainConfig(coefficient=kind)
    return tool.measure(awac, tool.Entry(kind, config), data, 0).result


# --- Numbers
def test_a_perfect_coefficient_has_auroc_1_and_a_constant_one_a_half(tool, awac, monkeypatch, tmp_path):
    perfect = measure_fake(tool, awac, monkeypatch, tmp_path, "oracle")
    kinds = ("random_action", "shuffled_action", "shifted_state")
    assert [perfect["auroc"][kind] for kind in kinds] == pytest.approx(
        [1.0] * 3, abs=0.01
    )  # a shuffle has fixed points
    assert perfect["auroc"]["random_action"] == perfect["auroc"]["shifted_state"] == 1.0
    assert perfect["auroc"]["other_level"] == 0.5  # the same policy
    assert perfect["p_mean"] == perfect["share_above_threshold"] == perfect["ks_uniform"] == 1.0
    constant = measure_fake(tool, awac, monkeypatch, tmp_path, "constant")
    assert {constant["auroc"][kind] for kind in (*kinds, "other_level")} == {0.5}
    assert constant["share_above_threshold"] == 0 and constant["ks_uniform"] == pytest.approx(0.7)


def test_calibration_is_the_distance_from_uniform(tool, awac, monkeypatch, tmp_path):
    result = measure_fake(tool, awac, monkeypatch, tmp_path, "uniform")
    assert result["ks_uniform"] < 0.1 and result["p_mean"] == pytest.approx(0.5, abs=0.05)
    assert result["share_above_threshold"] == pytest.approx(0.4, abs=0.1)  # p_m = 0.6
    assert result["auroc"]["mastered"] is result["kl"] is result["collapsed"] is result["adapt"] is None


@pytest.mark.parametrize("n", [100, 3000, 9999])
def test_a_tenth_is_held_out_in_whole_stretches(tool, n):
    held_out = tool.hold_out(n, seed=3)
    assert held_out.sum() == pytest.approx(n / 10, abs=5) and (held_out == tool.hold_out(n, seed=3)).all()
    assert 5 <= (np.diff(held_out.astype(int)) != 0).sum() <= 10  # the edges of five stretches
    assert (held_out != tool.hold_out(n, seed=4)).any()


def test_the_other_pairs_are_what_their_names_say(tool, awac):
    data = tool.make_data(awac, MINI, MINI, 4000, 0, "cpu")
    known, training = data.held_out.stored(), data.training.stored()
    assert len(known.p) + len(training.p) == 4000
    rows = {tuple(row) for row in training.states.tolist()}
    assert not any(tuple(row) in rows for row in known.states.tolist())
    random, shuffled, shifted = (data.others[kind] for kind in tool.KINDS[:3])
    assert torch.equal(random.states, known.states) and torch.equal(shuffled.states, known.states)
    assert random.actions.abs().max() <= 1 and random.actions.std(0).tolist() == pytest.approx([3**-0.5] * 3, abs=0.05)
    assert torch.equal(shuffled.actions.sort(0).values, known.actions.sort(0).values)
    moves = (shifted.states - known.states) / training.states.std(0)
    assert moves.abs().sub(1).abs().max() < 1e-2 and 0.4 < (moves > 0).float().mean() < 0.6
    assert len(data.others["other_level"].p) == tool.MEASURED_ROWS


# --- Whole runs
def test_the_json_has_every_number_in_its_range(measured):
    results = json.loads((measured / "all.json").read_text())
    run = results.pop("_run")
    assert (
        list(results) == ["vae", "even", "vae:vae_mean_weight=1.0"]
        and run["rows_fitted"] + run["rows_held_out"] == 3000
    )
    assert run["settings"]["vae:vae_mean_weight=1.0"]["vae_mean_weight"] == 1.0
    for label, row in results.items():
        assert row.keys() == KEYS and 0 <= min(row[key] for key in ("share_above_threshold", "ks_uniform", "p_mean"))
        assert all(value is None or 0 <= value <= 1 for value in row["auroc"].values())
        assert row["fit_seconds"] >= 0 and row["row_microseconds"] > 0 and row["p_threshold"] == 0.45
        if label != "even":
            assert row["kl"] > 0 and row["reconstruction"] > 0 and row["fit_seconds"] > 0
            assert row["adapt"]["pool"] == "other_level" and row["adapt"]["adapt_accepted"] in (0, 1)
            assert row["adapt"]["mastered_rows"] == row["adapt"]["candidates"] // 10
            assert (
                row["adapt"]["mastered_share_before"] == 0 and row["adapt"]["auroc_after"] == row["auroc"]["mastered"]
            )
    even = results["even"]
    assert even["p_mean"] == 0.5 and even["share_above_threshold"] == 1.0 and even["adapt"] is even["kl"] is None
    assert set(even["auroc"].values()) == {0.5, None}
    assert results["vae"]["auroc"] != results["vae:vae_mean_weight=1.0"]["auroc"]


def test_the_pictures_are_there_and_nothing_beside_them(measured):
    names = {path.name for path in (measured / "pictures").iterdir()}
    assert names == {"p_histograms.png", "p_roc.png", "p_latents.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (measured / "pictures").iterdir())
    assert {path.name for path in measured.iterdir()} == {"all.json", "pictures"}


def test_latents_are_the_means_of_the_c_vae(tool, awac):
    data = tool.make_data(awac, MINI, None, 1000, 0, "cpu")
    assert tool.pick_latents(SimpleNamespace(), data) is None
    vae = SimpleNamespace(encode=lambda states, actions: (states + actions.sum(1, True), None))
    found = tool.pick_latents(SimpleNamespace(vae=vae), data)
    assert {kind: rows.shape for kind, rows in found.items()} == {"held_out": (100, 11)} | {
        kind: (100, 11) for kind in tool.KINDS[:3]
    }


def test_the_same_seed_gives_the_same_numbers(tool, awac):
    config = awac.TrainConfig(vae_iterations=20, vae_hidden_dim=8, device="cpu")
    data = tool.make_data(awac, MINI, None, 1000, 0, "cpu")
    first, again, other = (tool.measure(awac, tool.Entry("vae", config), data, seed).result for seed in (0, 0, 1))
    timings = {"fit_seconds", "row_microseconds", "row_microseconds_batch"}
    numbers = [{key: value for key, value in row.items() if key not in timings} for row in (first, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]


@pytest.mark.parametrize("kind", ["likelihood", "rnd", "embedding"])
def test_calibrated_coefficients_are_measured(tool, awac, kind):
    dose = {"p_share": 0, "p_threshold": 0.05}
    config = awac.TrainConfig(coefficient=kind, fit_iterations=300, fit_hidden_dim=16, device="cpu", **dose)
    result = tool.measure(awac, tool.Entry(kind, config), tool.make_data(awac, MINI, None, 4000, 0, "cpu"), 0).result
    assert result["auroc"]["random_action"] > 0.6 and 0.8 < result["share_above_threshold"] <= 1
    assert result["kl"] is None and result["ks_uniform"] < (1 if kind == "embedding" else 0.2)


def test_a_collapse_and_a_missing_guidance_are_said_in_words(tool, measured):
    row = json.loads((measured / "all.json").read_text())["vae"]
    assert "collapsed" not in tool.tables({"vae": row | {"collapsed": False}})
    assert "`vae`: the posterior has collapsed (KL 2.0e-07" in tool.tables(
        {"vae": row | {"kl": 2e-7, "collapsed": True}}
    )
    assert "no guidance" in tool.tables({"vae": row | {"share_above_threshold": 0.0}})
    skipped = {"pool": "random_action", "candidates": 3, "known": 300, "skipped": "too few"}
    assert "no adaptive update, too few (3 and 300)" in tool.tables({"vae": row | {"adapt": skipped}})
    assert len({line.count("|") for line in tool.tables({"vae": row}).split("\n\n")[1].splitlines()}) == 1


def test_a_checkpoints_coefficient_is_measured_as_it_is(tool, awac, tmp_path):
    values = {"env": "Hopper-v4", "dataset": str(MINI), "vae_hidden_dim": 8, "vae_iterations": 5, "device": "cpu"}
    values |= {"hidden_dim": 8, "offline_iterations": 10, "p_share": 0, "p_threshold": 0.2}
    run = awac.GuidedRun(awac.TrainConfig(**values), awac.AWAC)
    run.load_dataset()
    run.coefficient.fit(run.dataset)
    run.step = run.switch
    torch.save(run.state_dict(), path := tmp_path / "checkpoint.pt")
    words = [path, "--dataset", MINI, "--rows", 2000, "--json", tmp_path / "p.json", "--set", "p_threshold=0.5"]
    tool.main([str(word) for word in words])
    row = json.loads((tmp_path / "p.json").read_text())["vae"]
    run.config.p_threshold = 0.0
    known = tool.make_data(awac, MINI, None, 2000, 0, "cpu").held_out.stored()
    p = run.coefficient(*known.triple())
    assert row["p_mean"] == pytest.approx(p.mean().item(), abs=1e-6) and row["fit_seconds"] is None
    assert row["share_above_threshold"] == pytest.approx((p >= 0.5).float().mean().item()) and row["kl"] > 0


# --- Variants
def entries(tool, awac, *variants, coefficients=(), settings=(), config=None):
    args = SimpleNamespace(variants=variants, coefficients=list(coefficients), set=settings, seed=5, config=config)
    return tool.make_entries(awac, args)


def test_by_default_those_that_are_fitted_are_measured(tool, awac):
    labels = [entry.label for entry in entries(tool, awac)]
    assert "vae" in labels and not {"static", "even", "random", "none"} & set(labels)


def test_a_variant_is_a_row_with_its_own_settings(tool, awac, tmp_path):
    (tmp_path / "task.yaml").write_text("tau: 0.02\nvae_beta: 0.1\n")
    words = ("vae:vae_kl_target=0,vae_kl_annealing=20,vae_simple_decoder=true", "even")
    found = entries(tool, awac, *words, settings=["gamma=0.5"], config=tmp_path / "task.yaml", coefficients=["vae"])
    assert [entry.label for entry in found] == ["vae", *words]
    plain, variant, even = (entry.config for entry in found)
    assert (plain.vae_kl_target, plain.vae_simple_decoder, plain.vae_beta, plain.tau) == (0.03, False, 0.1, 0.02)
    assert variant.vae_kl_target == 0 and variant.vae_simple_decoder is True and variant.coefficient == "vae"
    assert even.coefficient == "even" and {entry.config.gamma for entry in found} == {0.5} and plain.seed == 5
    assert [entry.label for entry in entries(tool, awac, "even")] == ["even"]


# --- Bad input
@pytest.fixture
def refused(tool, capsys):
    def refused(names, *words):
        with pytest.raises(SystemExit) as stop:
            tool.main([str(word) for word in words])
        message = stop.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert not [name for name in names if str(name) not in message], message
        assert not [line for line in capsys.readouterr().out.splitlines() if not line.startswith("warning: ")]

    return refused


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["no such file", "nowhere.hdf5"], ["nowhere.hdf5"]),
        (["neither a data set", "README.md"], [ROOT / "README.md"]),
        (["--seed"], [MINI, "--seed", "-1"]),
        (["--rows", "invalid int"], [MINI, "--rows", "many"]),
        (["unrecognized", "--colour"], [MINI, "--colour", "red"]),
        (["50 rows are too few", "100"], [MINI, "--rows", "50"]),
        (["'vae_beta' is not of the form field=value"], [MINI, "--set", "vae_beta"]),
        (["'' is not of the form"], [MINI, "--variants", "vae:vae_beta=1,"]),
        (["did you mean vae_beta"], [MINI, "--set", "vae_beat=1"]),
        (["vae_iterations"], [MINI, "--variants", "vae:vae_iterations=few"]),
        (["coefficient must be one of", "'vea'"], [MINI, "--coefficients", "vea"]),
        (["named twice"], [MINI, "--coefficients", "vae", "vae"]),
        (["nowhere/a.json is a directory, or not in one"], [MINI, "--json", "nowhere/a.json"]),
        (["no algorithm file", "plot.py"], [MINI, "--algorithm", ROOT / "tools/experiments/plot.py"]),
        (["--dataset is for a checkpoint"], [MINI, "--dataset", MINI]),
    ],
)
def test_bad_input_ends_with_one_line(refused, names, words):
    refused(names, *words)


def test_a_data_set_that_does_not_fit_ends_with_one_line(refused, tmp_path):
    with h5py.File(empty := tmp_path / "empty.hdf5", "w") as file:
        file["observations"] = np.zeros(3)
    refused(["D4RL's HDF5 layout", empty], empty)
    narrow = write_dataset(tmp_path / "narrow.hdf5", columns(200, obs_dim=2))
    refused(["observations has shape", "narrow.hdf5"], MINI, "--other", narrow, "--rows", 1000)
    wide = write_dataset(tmp_path / "wide.hdf5", columns(200) | {"actions": np.full((200, 2), 3.0)})
    refused(["beyond the action space"], wide)


def test_a_checkpoint_that_cannot_be_measured_ends_with_one_line(refused, awac, tmp_path):
    config = {"vae_iterations": 5, "vae_hidden_dim": 8, "offline_iterations": 10, "device": "cpu"}
    coefficient = awac.VAECoefficient(awac.TrainConfig(**config), 3, 2, "cpu").state_dict()
    whole = {"algorithm": "awac_samg", "config": config, "coefficient": coefficient, "progress": {"step": 15}}

    def save(**changes):
        torch.save(whole | changes, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"

    refused(["holds no data", "--dataset"], save())
    refused(["do not apply"], save(), "--dataset", MINI, "--variants", "vae:vae_beta=1")
    refused(["other dimensions", MINI.name], save(), "--dataset", MINI, "--rows", 500)
    refused(["before its coefficient was fitted"], save(progress={"step": 14}), "--dataset", MINI)
    refused(["without SAMG"], save(config=config | {"samg": False}), "--dataset", MINI)
    refused(["does not fit awac_samg.py", "wings"], save(config=config | {"wings": 2}), "--dataset", MINI)
    refused(["neither a data set", "checkpoint"], save(algorithm="../tools/experiments/plot"), "--dataset", MINI)


def test_diverged_training_ends_with_one_line(refused):
    refused(
        ["vae: ", "not finite", "smaller learning rate"],
        MINI,
        "--coefficients",
        "vae",
        *SMALL,
        "vae_learning_rate=1e30",
    )
