"""With the additions switched off, a run is that of the revision before them, to the last digit."""

import subprocess

import pytest
from conftest import ROOT, run_main
from runs import TINY, only_folder, rows, run_script

REVISION = "049b472"  # before LayerNorm in the critics, p_share, vae_tail and a stronger adapt_hold
RUNS = {
    "awac": ("AWAC", "GuidedRun"),
    "iql": ("IQL", "IQLRun"),
    "cql": ("CQL", "GuidedRun"),
    "calql": ("CalQL", "CalQLRun"),
}
OFF = {"critic_layer_norm": "false", "p_share": 0, "vae_tail": "mean", "adapt_hold": 10}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", RUNS)
def test_without_the_additions_a_run_is_as_before(algorithm, request, hopper_file, tmp_path):
    shown = subprocess.run(
        ["git", "show", f"{REVISION}:algorithms/{algorithm}_samg.py"], cwd=ROOT, capture_output=True, check=False
    )
    if shown.returncode:
        pytest.skip(f"revision {REVISION} is not in this checkout's history")
    old_file = tmp_path / f"old_{algorithm}_samg.py"
    old_file.write_bytes(shown.stdout)
    # observations unnormalised: their statistics are summed in float64 since then
    settings = TINY | {"env": "Hopper-v4", "dataset": hopper_file, "normalize": "false", "p_threshold": 0.4}
    run_script(old_file, runs_dir=tmp_path / "old", **{name: settings[name] for name in settings.keys() - OFF})
    kinds = (getattr(request.getfixturevalue(algorithm), kind) for kind in RUNS[algorithm])
    run_main(*kinds, runs_dir=tmp_path / "new", **settings | OFF)
    old, new = (rows(only_folder(tmp_path / name)) for name in ("old", "new"))
    assert any(row["mastered_rows"] for row in old) and any(row["r_in_mean"] for row in old)
    assert [{column: row[column] for column in old[0]} for row in new] == old
