"""tools/experiments/plot.py: the mean and the range of an arm's seeds, and arms that began at another run's switch."""

import sys

import pytest
from conftest import load_module
from PIL import Image


@pytest.fixture(scope="module")
def plot():
    return load_module("tools/experiments/plot.py")


def write_run(folder, offline, online):
    folder.mkdir()
    lines = ["step,phase,score,p_mean,p_share", *(f"{step},offline,{score},," for step, score in offline)]
    lines += ["150,coefficient,,,", *(f"{step},online,{score},0.04,0.05" for step, score in online)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_mean_and_range_at_the_steps_that_all_seeds_have(plot):
    figure, axes = plot.plt.subplots()
    plot.draw(axes, [{10: 1.0, 20: 4.0, 30: 9.0}, {10: 3.0, 20: 8.0}], "C0")
    assert axes.lines[0].get_xydata().tolist() == [[10, 2], [20, 6]]
    corners = {tuple(vertex) for vertex in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert {(10, 1), (10, 3), (20, 4), (20, 8)} <= corners
    plot.plt.close(figure)


def test_arms_from_an_offline_checkpoint_start_at_the_switch(plot, tmp_path, monkeypatch):
    runs = [write_run(tmp_path / f"samg-seed{seed}", [(100, 10), (200, 20)], [(50, 30)]) for seed in (0, 1)]
    runs.append(write_run(tmp_path / "none-seed0", [], [(50, 25), (100, 35)]))
    drawn, output = [], tmp_path / "x.png"
    monkeypatch.setattr(plot, "draw", lambda axes, curves, colour, **style: drawn.append((style.get("label"), curves)))
    monkeypatch.setattr(plot.plt.Axes, "legend", lambda *args, **options: None)  # nothing is drawn here
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, runs), "--output", str(output)])
    plot.main()
    scores = [(label, curves) for label, curves in drawn if label]
    assert scores == [
        ("samg (2 seeds)", [{100: 10, 200: 20, 250: 30}] * 2),
        ("none", [{250: 25, 300: 35}]),
    ]
    assert Image.open(output).size[0] > 500


def test_a_folder_without_a_log_ends_in_one_line(plot, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path), "--output", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match="error: no readable metrics.csv in"):
        plot.main()
