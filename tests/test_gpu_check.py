"""tools/diagnostics/gpu_check.py on a CPU, with small numbers and emulated graphs: its path, not its figures."""

import json
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, load_module

check = load_module("tools/diagnostics/gpu_check.py")
JUDGED = {
    *("awac syncs", "vae syncs", "likelihood syncs", "rnd syncs", "embedding syncs", "awac agreement of devices"),
    *("awac agreement of eager", "awac agreement of graph", "all"),
}


@pytest.mark.slow
def test_every_phase_runs_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--algorithms", "awac", "--json", tmp_path / "check.json"]
    script = ROOT / "tools/diagnostics/gpu_check.py"
    process = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=500)
    lines = json.loads((tmp_path / "check.json").read_text())
    assert process.returncode == 0, process.stdout + process.stderr
    passed = {what for what, line in lines.items() if line["verdict"] == "PASS"}
    resumed = [what for what in lines if what.startswith("awac killed in online after")]
    assert passed == {*JUDGED, *resumed} and len(resumed) == 1 and lines["all"]["failed"] == []
    assert all(f"{phase}, time" in lines for phase in check.PHASES)
    assert lines["awac agreement of graph"] == {"verdict": "PASS", "error": 0.0, "same_stream": True}
    assert lines["2 processes without MPS"]["slower"] > 0
    assert lines["whole run, 1M + 50k + 200k extrapolated"]["minutes"] > 0
    assert process.stdout.count("\n") == len(lines)


def test_a_phase_over_its_time_is_cut_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(check, "PHASES", {"slow": (lambda args, report: time.sleep(60), 0.01 / 60)})
    with pytest.raises(SystemExit) as stop:
        check.main(["--device", "cpu", "--only", "slow"])
    assert stop.value.code == 1
    assert "FAIL slow to its end: error TimeUp: cut after 0 s" in capsys.readouterr().out


def test_a_difference_fails(monkeypatch, capsys):
    monkeypatch.setattr(check, "apart", lambda one, other: 1e-6)
    with pytest.raises(SystemExit) as stop:
        check.main(["--device", "cpu", "--only", "agreement", "--algorithms", "iql"])
    assert stop.value.code == 1
    assert "FAIL iql agreement of graph" in capsys.readouterr().out


def test_numbers_drawn_on_the_host_are_those_of_its_generator():
    for draw in (lambda: torch.randn(3), lambda: torch.zeros(3).normal_(), lambda: torch.randn_like(torch.ones(3))):
        torch.manual_seed(0)
        with check.HostDraws():
            drawn = draw()
        torch.manual_seed(0)
        assert torch.equal(drawn, torch.randn(3))


def test_cuda_is_refused_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: no CUDA here, --device cuda:1 cannot be checked"):
        check.main(["--device", "cuda:1"])
