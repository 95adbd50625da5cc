"""With the additions switched off, a run is that of the revision before them, to the last digit."""

import subprocess

import pytest
from conftest import ROOT, load_module, run_main
from runs import TINY, only_folder, rows

REVISION = "049b472"  # before LayerNorm in the critics, p_share and vae_tail
RUNS = {"awac": ("AWAC", "Run"), "iql": ("IQL", "IQLRun"), "cql": ("CQL", "Run"), "calql": ("CalQL", "CalQLRun")}
OFF = {"critic_layer_norm": "false", "p_share": 0, "vae_tail": "mean"}


@pytest.mark.parametrize("algorithm", RUNS)
def test_without_the_additions_a_run_is_as_before(algorithm, request, hopper_file, tmp_path):
    shown = subprocess.run(
        ["git", "show", f"{REVISION}:algorithms/{algorithm}_samg.py"], cwd=ROOT, capture_output=True, check=False
    )
    if shown.returncode:
        pytest.skip(f"revision {REVISION} is not in this checkout's history")
    old_file = tmp_path / f"old_{algorithm}_samg.py"
    old_file.write_bytes(shown.stdout)
    modules = {"old": load_module(old_file), "new": request.getfixturevalue(algorithm)}
    # observations unnormalised: their statistics are summed in float64 since then
    settings = TINY | {"env": "Hopper-v4", "dataset": hopper_file, "normalize": "false", "p_threshold": 0.4}
    found = {}
    for name, module in modules.items():
        kinds = (getattr(module, kind) for kind in RUNS[algorithm])
        run_main(*kinds, runs_dir=tmp_path / name, **settings | (OFF if name == "new" else {}))
        found[name] = rows(only_folder(tmp_path / name))
    assert any(row["mastered_rows"] for row in found["old"]) and any(row["r_in_mean"] for row in found["old"])
    assert [{column: row[column] for column in found["old"][0]} for row in found["new"]] == found["old"]
