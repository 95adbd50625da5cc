"""tools/diagnostics/coverage.py on hand-made clusters, of which it is known what covers them."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest
from conftest import load_module, write_dataset

# Rows of each level in each of five clusters; more than 50 cover it.
STATES = {"medium": [51, 50, 52, 0, 9], "replay": [0, 10, 30, 80, 51]}
ACTIONS = {"medium": [80, 82, 0, 0, 0], "replay": [10, 10, 51, 50, 50]}


@pytest.fixture(scope="module")
def coverage():
    return load_module("tools/diagnostics/coverage.py")


def clustered(counts, dimensions, random):
    """Rows around (10, 0, ...), (0, 10, ...), ... in that many dimensions; in two, around a circle."""
    angles = 2 * np.pi * np.arange(len(counts)) / len(counts)
    centres = np.eye(len(counts), dimensions) if dimensions > 2 else np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rows = np.repeat(10 * centres, counts, axis=0) + random.normal(scale=0.05, size=(sum(counts), dimensions))
    return random.permutation(rows).astype(np.float32)


def make_files(folder, dimensions):
    """A file for each level; rows of two dimensions need no t-SNE."""
    random = np.random.default_rng(0)
    for level in STATES:
        columns = {"observations": clustered(STATES[level], dimensions, random)}
        columns["actions"] = clustered(ACTIONS[level], dimensions, random)
        write_dataset(folder / f"{level}.hdf5", columns)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("levels"), 2)


@pytest.fixture
def call(coverage, monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["coverage.py", *map(str, words)])
        coverage.main()

    return call


def data(folder):
    return "--data", *(f"{level}={folder / level}.hdf5" for level in STATES)


def error(call, capsys, *words):
    """The one line with which a call ends."""
    with pytest.raises(SystemExit) as stop:
        call(*words)
    assert not capsys.readouterr().out
    message = stop.value.code  # the interpreter prints it to stderr and exits with status 1
    assert message.startswith("error: ") and "\n" not in message
    return message


# --- Coverage
@pytest.mark.parametrize("dimensions, repetitions", [(2, 2), (6, 1)], ids=["as they are", "t-SNE"])
def test_known_coverage(call, dimensions, repetitions, tmp_path, capsys):
    files = make_files(tmp_path, dimensions)
    out = tmp_path / "hopper.json", tmp_path / "hopper.png"
    settings = ("--share", 1, "--clusters", 5, "--repetitions", repetitions, "--task", "hopper")
    call(*data(files), *settings, "--json", out[0], "--picture", out[1])
    levels = json.loads(out[0].read_text())["levels"]
    for level, states, actions in (("medium", 0.4, 0.4), ("replay", 0.4, 0.2)):
        for space, share in (("states", states), ("actions", actions), ("both", (states + actions) / 2)):
            assert levels[level][space]["values"] == pytest.approx([share] * repetitions)
            assert levels[level][space]["mean"] == pytest.approx(share)
            assert levels[level][space]["std"] == pytest.approx(0)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2:] == [
        "| medium | 162 | 162 | 40.0 ± 0.0 | 40.0 ± 0.0 | 40.0 ± 0.0 |",
        "| replay | 171 | 171 | 40.0 ± 0.0 | 20.0 ± 0.0 | 30.0 ± 0.0 |",
    ]
    assert "note: medium has 162 rows in a draw: it can cover at most 3 of 5 clusters" in captured.err
    image = matplotlib.image.imread(out[1])[..., :3]
    for colour in ("#1f77b4", "#ff7f0e"):  # both levels are to be seen
        assert (np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02).sum() > 100


def test_threshold_is_more_than(coverage):
    levels, clusters = np.repeat([0, 1, 0], [50, 51, 3]), np.repeat([0, 0, 1], [50, 51, 3])
    assert coverage.covered(clusters, levels, 2, 2, 50).tolist() == [0, 0.5]
    assert coverage.covered(clusters, levels, 2, 2, 49).tolist() == [0.5, 0.5]
    assert coverage.covered(clusters, levels, 2, 3, 2).tolist() == [1, 0.5, 0]


def test_draws(coverage):
    assert coverage.draw_sizes([1000, 2000, 5], 0.1, 10**6) == [100, 200, 1]
    assert coverage.draw_sizes([100, 200], 0.29, 10**6) == [29, 58]
    assert coverage.draw_sizes([1000, 3000], 0.1, 40) == [10, 30]  # capped: each level in proportion


def test_repetitions_differ_and_repeat(call, files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = ("--share", 0.5, "--clusters", 5, "--min_samples", 20, "--repetitions", 3, "--seed", seed)
        call(*data(files), *settings, "--json", tmp_path / name, "--picture", tmp_path / f"{name}.png")
    a, b, c = (json.loads((tmp_path / name).read_text())["levels"] for name in "abc")
    assert a == b != c
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert pictures[0] == pictures[1] != pictures[2]
    values = np.array(a["medium"]["states"]["values"])
    assert a["medium"]["states"]["mean"] == pytest.approx(values.mean())
    assert a["medium"]["states"]["std"] == pytest.approx(values.std())


def test_tsne_repeats(coverage):
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    first = coverage.embed(rows, 10, 1)
    assert first.shape == (60, 2)
    assert np.array_equal(first, coverage.embed(rows, 10, 1))


def test_no_scale_and_constant_columns(coverage):
    """A dimension in other units and one that never changes alter nothing."""
    rows = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    np.testing.assert_allclose(coverage.embed(rows * [1000, 0.001] + 5, 30, 0), coverage.embed(rows, 30, 0), atol=1e-3)
    constant = coverage.embed(np.concatenate([rows[:, :1], np.ones((40, 1))], axis=1), 30, 0)
    np.testing.assert_allclose(constant, coverage.embed(rows[:, :1], 30, 0), atol=1e-6)


# --- Gain
GAINS = """task,algorithm,level,coverage,gain
hopper,iql,medium,0.5,10
hopper,iql,expert,0.9,-2
walker2d,iql,medium,0.7,20
"""


def test_gain(call, coverage, tmp_path, capsys):
    (tmp_path / "gains.csv").write_text(GAINS)
    call("--gain", tmp_path / "gains.csv", "--picture", tmp_path / "gain.png")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| medium | 2 | 60.0 ± 10.0 | 15.0 ± 5.0 |",
        "| expert | 1 | 90.0 ± 0.0 | -2.0 ± 0.0 |",
    ]
    figure = coverage.draw_gains(coverage.read_gains(tmp_path / "gains.csv", {}))
    points = np.concatenate([marks.get_offsets() for marks in figure.axes[0].collections if len(marks.get_offsets())])
    small = {(round(float(x)), round(float(y))) for x, y in points}
    assert {(50, 10), (90, -2), (70, 20)} <= small
    assert matplotlib.image.imread(tmp_path / "gain.png").ndim == 3


def saved(path, task="hopper", clusters=20, medium=0.25):
    settings = {"share": 0.1, "min_samples": 50, "clusters": clusters, "max_rows": 20000, "perplexity": 30.0}
    levels = {"medium": {"both": {"mean": medium}}}
    path.write_text(json.dumps({"task": task, "levels": levels, "settings": settings}))
    return path


def test_gain_takes_coverage_from_json(call, coverage, tmp_path, capsys):
    (tmp_path / "gains.csv").write_text("task,level,gain\nhopper,medium,3\n")
    known = saved(tmp_path / "hopper.json")
    rows = coverage.read_gains(tmp_path / "gains.csv", coverage.read_coverage([known]))
    assert rows == [("hopper", "medium", 0.25, 3)]
    picture = "--picture", tmp_path / "gain.png"
    assert "no coverage of hopper medium" in error(call, capsys, "--gain", tmp_path / "gains.csv", *picture)
    words = ("--gain", tmp_path / "gains.csv", *picture, "--coverage", known)
    assert "their settings differ" in error(call, capsys, *words, saved(tmp_path / "b.json", "walker2d", clusters=9))
    assert "given twice" in error(call, capsys, *words, saved(tmp_path / "b.json"))
    assert "does not name its task" in error(call, capsys, *words, saved(tmp_path / "b.json", task=""))
    assert "is no readable file of --json" in error(call, capsys, *words, tmp_path / "gains.csv")
    assert not (tmp_path / "gain.png").exists()


# --- Bad input
@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no column task, level, gain"),
        ("task,level,coverage,gain\n", "has no rows"),
        ("task,level,gain\nhopper,medium,1\n", "no coverage of hopper medium"),
        ("task,level,coverage,gain\nhopper,,0.5,1\n", "row 1: task and level"),
        ("task,level,coverage,gain\nhopper,medium,0.5,much\n", "row 1: coverage and gain must be numbers"),
        ("task,level,coverage,gain\nhopper,medium,0.5\n", "row 1: coverage and gain must be numbers"),
        ("task,level,coverage,gain\nhopper,medium,50,1\n", "a share from 0 to 1"),
        ("task,level,coverage,gain\nhopper,medium,0.5,nan\n", "gain finite"),
    ],
)
def test_bad_gains(call, capsys, tmp_path, text, message):
    (tmp_path / "gains.csv").write_text(text)
    picture = tmp_path / "gain.png"
    assert message in error(call, capsys, "--gain", tmp_path / "gains.csv", "--picture", picture)
    assert not picture.exists()


NAN = np.full((30, 2), np.nan)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"observations": np.ones((30, 2))}, "actions is no array of numbers"),
        ({"observations": np.ones(30), "actions": np.ones((30, 2))}, "observations is no array of numbers"),
        ({"observations": np.ones((30, 2)), "actions": np.ones((29, 2))}, "actions of shape (29, 2)"),
        ({"observations": np.ones((0, 2)), "actions": np.ones((0, 2))}, "0 rows"),
        ({"observations": NAN, "actions": np.ones((30, 2))}, "states are not finite in row 0"),
        ({"observations": np.full((30, 2), 1e300), "actions": np.ones((30, 2))}, "states are not finite in row 0"),
        ({"observations": np.ones((50, 2)), "actions": np.ones((50, 2))}, "states of a draw are all the same"),
        ({"observations": np.ones((30, 2)), "actions": np.ones((30, 2))}, "a draw has 30 rows"),
    ],
)
def test_bad_data(call, capsys, tmp_path, columns, message):
    path = write_dataset(tmp_path / "bad.hdf5", columns)
    words = ("--data", f"medium={path}", "--share", 1, "--json", tmp_path / "out.json")
    assert message in error(call, capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.hdf5"]


def test_bad_words(call, capsys, files, tmp_path):
    medium, other = f"medium={files / 'medium.hdf5'}", tmp_path / "other.hdf5"
    write_dataset(other, {"observations": np.ones((9, 3)), "actions": np.ones((9, 1))})
    for words, message in (
        ((), "one of the arguments --data --gain is required"),
        (("--data", files / "medium.hdf5"), "--data takes LEVEL=FILE"),
        (("--data", medium, medium), "names the level 'medium' twice"),
        (("--data", "medium=nowhere.hdf5"), "cannot read nowhere.hdf5"),
        (("--data", f"medium={__file__}"), "cannot read"),
        (("--data", medium, f"expert={other}"), "different tasks"),
        (("--data", medium, "--picture", tmp_path / "a.doc"), "--picture must end in one of"),
        (("--data", medium, "--json", tmp_path / "no" / "a.json"), "no such writable directory"),
        (("--data", medium, "--share", 0), "--share"),
        (("--data", medium, "--clusters", 1), "--clusters must be at least 2"),
        (("--data", medium, "--clusters", "many"), "--clusters"),
        (("--data", medium, "--perplexity", "nan"), "--perplexity"),
        (("--data", medium, "--coverage", "a.json"), "--coverage with --gain"),
        (("--gain", tmp_path / "gains.csv"), "--gain needs --picture"),
        (("--gain", tmp_path / "gains.csv", "--picture", tmp_path / "a.png"), "cannot read"),
    ):
        assert message in error(call, capsys, *words)


def test_files_whole_or_not_at_all(call, capsys, coverage, monkeypatch, tmp_path):
    (tmp_path / "gains.csv").write_text(GAINS)
    picture = tmp_path / "gain.png"
    picture.write_bytes(b"earlier")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(coverage.os, "fsync", full)
    with pytest.raises(SystemExit, match="error: cannot write .*no space left"):
        call("--gain", tmp_path / "gains.csv", "--picture", picture)
    assert picture.read_bytes() == b"earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gain.png", "gains.csv"]
