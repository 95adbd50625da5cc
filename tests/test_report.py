"""tools/experiments/report.py on small made-up trees of runs, against figures worked out by hand."""

import csv
import io
import json
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from conftest import load_module


@pytest.fixture(scope="module")
def report(awac):
    """tools/experiments/report.py; its parts lie beside it."""
    return load_module("tools/experiments/report.py")


@pytest.fixture(scope="module")
def runs(report):
    return sys.modules["report_runs"]


@pytest.fixture(scope="module")
def tables(report):
    return sys.modules["report_tables"]


@pytest.fixture
def make_run(request, tmp_path):
    """make_run(20, 40, seed=1): a finished run whose evaluations online gave these scores; returns its folder."""

    def make(*scores, algorithm="awac", env="Hopper-v4", tree="runs", offline_score=0.0, finished=True, **fields):
        config = asdict(request.getfixturevalue(algorithm).TrainConfig(env=env, **fields))
        folder = tmp_path / tree / env / f"{config['name']}-seed{config['seed']}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with open(folder / "metrics.csv", "w") as file:
            file.write("step,phase,critic_loss,td_error,guidance_size,horizon,score,p_mean,p_share\n")
            for i, score in enumerate(scores):
                for step, shown in ((500, ""), (1000, score)):
                    file.write(f"{1000 * i + step},online,1.0,0.5,0.2,20.0,{shown},0.5,0.75\n")
        if finished:
            summary = {"offline_score": offline_score, "final_score": np.mean(scores[-5:]), "last_score": scores[-1]}
            summary |= {"train_score": np.mean(scores[-5:]) - 5, "best_score": max(scores)}
            summary |= {"switch_drop": offline_score - min(scores), "regret": 1 - np.mean(scores) / 100}
            summary |= {"train_return": 1.0, "train_regret": 0.5, "peak_memory_mb": 100.0 + config["seed"]}
            summary["seconds"] = {"offline": 10.0, "coefficient": 1.0, "evaluation": 3}
            summary["seconds"] |= {"act": 1.0, "environment": 2.0, "insert": 1.0, "update": 18.0}
            summary |= config | {"algorithm": algorithm + "_samg" * ("samg" in config), "device": "cpu"}
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture
def all_arms(runs, tmp_path):
    return lambda **options: runs.group(runs.find_runs(tmp_path / "runs"), **options)


@pytest.fixture
def arms(all_arms):
    """The arms of a tree with one environment, by label."""
    return lambda **options: {arm.label: arm for arm in all_arms(**options)}


@pytest.fixture
def run_report(report, tmp_path, monkeypatch, capsys):
    """run_report() writes tmp_path/out and returns what was printed."""

    def run(*words, output="out"):
        argv = ["report.py", str(tmp_path / "runs"), "--output", str(tmp_path / output), *map(str, words)]
        monkeypatch.setattr(sys, "argv", argv)
        report.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def table(runs, tables, all_arms):
    """table(1): {(task, row, column): text} of the paper's Table 1, with the runs of the tree."""

    def make(n):
        made = tables.paper_table(n, all_arms(), runs.read_paper())
        names = [" ".join(filter(None, (head, sub))) for head, subs in made.heads for sub in subs]
        cells, task = {}, ""
        for row in made.rows:
            task = row[0].text or task
            cells |= {(task, row[1].text, name): cell for name, cell in zip(names[2:], row[2:])}
        return made, cells

    return make


@pytest.fixture
def page(run_report, tmp_path):
    """page(): report.html of the tree, as {section's id: its text}; what a closed switch hides is cut out."""

    def make():
        run_report()
        text = (tmp_path / "out/report.html").read_text()
        shown = re.sub("</summary>.*?</details>", "</summary></details>", text, flags=re.S)
        return dict(re.findall(r'<h2 id="(\w+)">(.*?)(?=<h2|</main>)', shown, re.S))

    return make


def columns(section):
    """The heads of its tables."""
    return re.findall(r"<th[^>]*>([^<]+)</th>", section)


# --- The paper's figures
def test_the_papers_figures_are_there(runs):
    paper = runs.read_paper()
    assert len(paper) == 18 * 10 + 18 * 2 + 6 * 8
    assert paper[1, "hopper-medium-v2", "awac_samg"] == (102.5, 1.8)
    assert paper[2, "pen-binary-v0", "cal_ql_samg"] == (5.01, 12.01)
    assert paper[3, "antmaze-large-play-v2", "iql"] == (0.335, 0.032)


def test_tables_1_and_2_disagree_on_four_tasks_and_table_1_is_quoted(runs, table):
    paper = runs.read_paper()
    tasks = {task for n, task, column in paper if n == 2 and column == "cal_ql"}
    other = {task for task in tasks if paper[1, task, "cal_ql"] != paper[2, task, "cal_ql"]}
    assert other == {f"antmaze-{size}-{kind}-v2" for size in ("medium", "large") for kind in ("play", "diverse")}
    made, cells = table(2)
    assert cells["antmaze-medium-play-v2", "paper", "Cal-QL Vanilla"].text == "94.0 ± 2.2†"
    assert cells["antmaze-umaze-v2", "paper", "Cal-QL Vanilla"].text == "96.8 ± 0.4"
    assert any(note.startswith("† Tables 1 and 2 of the paper disagree") for note in made.notes)


# --- Means, and what is not in them
def test_mean_and_sample_standard_deviation_over_seeds(make_run, table):
    for seed, score in enumerate((10, 20, 60)):
        make_run(score, seed=seed)
    _, cells = table(1)
    # sqrt((20^2 + 10^2 + 30^2) / 2) = 26.46
    assert str(cells["Hopper-v4", "these runs", "AWAC SAMG"]) == "30.0 ± 26.5 (3)"
    assert str(cells["Hopper-v4", "these runs", "AWAC Vanilla"]) == "missing"
    assert str(cells["hopper-medium-v2", "these runs", "AWAC SAMG"]) == "missing"


def test_regret_of_table_3(make_run, table):
    make_run(0, 40, 80, env="antmaze-umaze-v2", seed=0)
    make_run(20, 60, 100, env="antmaze-umaze-v2", seed=1)
    _, cells = table(3)
    # 1 - 0.4 and 1 - 0.6: mean 0.5, standard deviation 0.2 / sqrt(2)
    assert str(cells["antmaze-umaze-v2", "these runs", "AWAC SAMG"]) == "0.500 ± 0.141 (2)"


def test_runs_that_did_not_finish_are_shown_and_not_averaged(make_run, table, arms, run_report):
    make_run(10, seed=0)
    make_run(20, seed=1)
    make_run(1000, seed=2, finished=False)
    with open(make_run(1000, seed=3) / "metrics.csv", "a") as file:
        file.write("2000,online,nan,0.5,0.2,20.0,1000,0.5,0.5\n")
    error = make_run(1000, seed=4, finished=False) / "error.txt"
    error.write_text("Traceback\n\nerror: out of memory\n\n")
    for seed in range(6):
        make_run(30, seed=seed, samg=False)
    made, cells = table(1)
    text = "15.0 ± 7.1 (2/6: 1 diverged, 1 failed, 1 missing, 1 unfinished)"
    assert str(cells["Hopper-v4", "these runs", "AWAC SAMG"]) == text
    assert str(cells["Hopper-v4", "these runs", "AWAC Vanilla"]) == "30.0 ± 0.0 (6)"
    assert [record["n"] for record in made.records if record["column"] == "awac_samg" and record["n"]] == [2]
    assert arms()["awac-samg"].values("final_score").tolist() == [10, 20]
    printed = run_report()
    assert text in printed and text in (error.parents[3] / "out/tables/table1.md").read_text()
    assert "Hopper-v4/awac-samg-seed2: unfinished: at online step 1000 of 200000" in printed
    assert "Hopper-v4/awac-samg-seed3: diverged: critic_loss is nan in online step 2000" in printed
    assert "Hopper-v4/awac-samg-seed4: failed: error: out of memory" in printed
    assert "Hopper-v4, awac-samg, seed 5: missing: no folder" in printed


def test_an_arm_without_a_finished_run_has_no_mean(make_run, table):
    make_run(10, env="hopper-medium-v2", finished=False)
    made, cells = table(1)
    assert str(cells["hopper-medium-v2", "these runs", "AWAC SAMG"]) == "none (0/1: 1 unfinished)"
    assert cells["hopper-medium-v2", "difference", "AWAC SAMG"].text == "–"


def test_a_run_that_failed_before_it_had_a_configuration(tmp_path, arms):
    folder = tmp_path / "runs/hopper-medium-v2/iql-samg-seed3"
    folder.mkdir(parents=True)
    (folder / "error.txt").write_text("error: no data set at x.hdf5\n")
    arm = arms()["iql-samg"]
    assert (arm.env, arm.algorithm, arm.gaps()) == ("hopper-medium-v2", "iql", "1 failed")


def test_a_line_that_is_being_written_is_not_read(make_run, runs, tmp_path):
    with open(make_run(10, 20, finished=False) / "metrics.csv", "a") as file:
        file.write("2500,online,na")
    (run,) = runs.find_runs(tmp_path / "runs")
    assert run.state == "unfinished" and run.curves["score"][1].tolist() == [10, 20]


def test_seeds_that_should_be_there(make_run, arms):
    make_run(10, seed=1)
    assert arms()["awac-samg"].seeds_text() == "1"
    assert arms(n_seeds=3)["awac-samg"].seeds_text() == "1/3: 2 missing"


def test_runs_of_different_configurations_are_not_averaged(make_run, table, arms):
    make_run(10, seed=0)
    make_run(20, seed=1, batch_size=64)
    _, cells = table(1)
    assert "configurations differ in batch_size" in arms()["awac-samg"].seeds_text()
    assert "Hopper-v4" not in {task for task, _, _ in cells}
    make_run(30, seed=1, samg=False)
    assert str(table(1)[1]["Hopper-v4", "these runs", "AWAC SAMG"]).startswith("none (0/2: configurations differ")


# --- What the page shows first
MAIN = ["arm", "seeds", "final score", "last score", "train score", "offline score", "regret"]


def test_results_and_curves_come_first_with_the_mean_of_the_last_five_beside_the_last(make_run, page, tmp_path):
    make_run(0, 10, 20, 30, 40, 70, seed=0)
    make_run(0, 30, 40, 50, 60, 90, seed=1)
    sections = page()
    assert list(sections)[:2] == ["results", "curves"] and list(sections).index("paper") > 2
    assert columns(sections["results"]) == MAIN  # all that fits a screen; the switch shows the others
    (row,) = re.findall(r'<tr class="first">(.*?)</tr>', sections["results"])
    # means of the last five: 34 and 54; the last ones: 70 and 90; sqrt(2 * 10^2) = 14.1
    texts = [text.replace("\N{NO-BREAK SPACE}", " ") for text in re.findall("<td[^>]*>([^<]*)", row)]
    assert texts[:5] == ["awac-samg", "2", "44.0 ± 14.1", "80.0 ± 14.1", "39.0 ± 14.1"]
    (record,) = csv.DictReader(io.StringIO((tmp_path / "out/tables/results.csv").read_text()))
    assert (record["final_score"], record["last_score"], record["train_score"]) == ("44.0", "80.0", "39.0")
    assert {"best_score", "switch_drop", "train_regret"} <= record.keys()


def test_summaries_without_the_last_and_the_train_score_have_a_dash(make_run, tables, all_arms):
    for name, seeds, without in (("awac-old", (0, 1), ("last_score", "train_score")), ("awac-some", (0,), ())):
        for seed in seeds:
            file = make_run(10 + seed, name=name, seed=seed) / "summary.json"
            summary = json.loads(file.read_text())
            file.write_text(json.dumps({key: value for key, value in summary.items() if key not in without}))
    file = make_run(30, name="awac-some", seed=1) / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"train_score": None}))  # no training episode ended
    made = tables.results(all_arms())
    names = [head for head, _ in made.heads]
    old, some = ({name: str(cell) for name, cell in zip(names, row)} for row in made.rows)
    assert (old["final score"], old["last score"], old["train score"]) == ("10.5 ± 0.7", "–", "–")
    assert (some["last score"], some["train score"]) == ("20.0 ± 14.1", "5.0 (1)")
    assert made.notes == ["Older runs, whose final score is the last evaluation alone: Hopper-v4 awac-old."]


def test_the_papers_tables_hold_what_has_runs_until_a_switch_shows_the_rest(make_run, page, run_report, tmp_path):
    make_run(10, env="hopper-medium-v2")
    make_run(20, env="antmaze-umaze-v2", samg=False)
    make_run(30, env="walker2d-medium-v2", algorithm="iql")
    paper = page()["paper"]
    first, second, third = re.split('id="table[23]"', paper)
    shown = re.findall('<td class="name stick"[^>]*>([^<]*)', first)
    assert shown == ["hopper-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v2"]
    pair = ["Vanilla", "SAMG"]
    assert columns(first) == ["task", "AWAC", "IQL", *pair, *pair]  # not those that nobody ran
    assert "<table" not in second and "no runs on its tasks" in second
    assert "antmaze-umaze-v2" in third and columns(third)[:2] == ["task", "AWAC"]
    text = (tmp_path / "out/report.html").read_text()
    assert text.count("<details") == text.count("</details>") == 4 and "relocate-binary-v0" in text
    for name, rows in (("table1", 180), ("table2", 36)):  # the files are complete
        lines = (tmp_path / f"out/tables/{name}.csv").read_text().splitlines()
        assert len(lines) == 1 + rows and "relocate-binary-v0" in (tmp_path / f"out/tables/{name}.md").read_text()
    printed = run_report()
    assert "antmaze-umaze-v2" in printed and "relocate-binary-v0" not in printed and "EDIS" not in printed


def test_without_a_run_on_their_tasks_the_papers_tables_are_closed_under_one_line(make_run, page):
    for seed in range(5):
        make_run(10, seed=seed)
    paper = page()["paper"]
    assert "No run is on a task of the paper's tables." in paper
    assert "<table" not in paper and paper.count("<summary>") == 3 and "missing" not in paper


def test_the_best_of_what_a_row_shows_is_bold(make_run, runs, tables, all_arms):
    make_run(10, env="hopper-medium-replay-v2", algorithm="iql")
    for only_found, best in ((False, "108.3 ± 0.2"), (True, "100.4 ± 0.9")):  # AWAC's; IQL's
        made = tables.paper_table(1, all_arms(), runs.read_paper(), only_found)
        row = next(i for i, row in enumerate(made.rows) if row[0].text == "hopper-medium-replay-v2")
        assert [cell.text for cell in made.rows[row + 1] if cell.bold] == [best]


def test_an_arm_looks_the_same_in_every_figure(make_run, all_arms, report):
    names = ("fade", "kept", "likelihood", "none", "samg-0.6", "samg-share-0.05", "samg-share-0.2")
    for env, some in (("Hopper-v4", names), ("Walker2d-v4", names[2:4])):
        for algorithm in ("awac", "iql"):
            for name in some:
                make_run(10, env=env, algorithm=algorithm, name=f"{algorithm}-{name}")
    arms = all_arms()
    look = report.figures.styles(arms, arms)
    assert sorted(look) == sorted(names) and len({style["color"] for style in look.values()}) == 7
    some = [arm for arm in arms if (arm.env, arm.algorithm) == ("Walker2d-v4", "iql")]
    assert report.figures.styles(some, arms)["none"] == look["none"]
    for i in range(6):  # more names than colours: those of a figure are told apart
        make_run(10, env="Ant-v4", name=f"awac-{i}")
    arms = all_arms()
    assert set(report.figures.styles(some, arms)) == {"likelihood", "none"}
    looks = report.figures.styles(arms, arms).values()
    assert len(arms) == 24 and len({tuple(style.values()) for style in looks}) == len(looks) == 13


# --- Trees
def test_trees_of_runs_are_joined_unless_a_seed_is_in_both(make_run, arms, table):
    make_run(10, seed=0, tree="runs/here")
    make_run(20, seed=1, tree="runs/a/there", dataset="")
    assert arms()["awac-samg"].values("final_score").tolist() == [10, 20]
    make_run(40, seed=1, tree="runs/here")
    apart = {"a/there/awac-samg": [20], "here/awac-samg": [10, 40]}
    assert {label: arm.values("final_score").tolist() for label, arm in arms().items()} == apart
    _, cells = table(1)
    assert str(cells["Hopper-v4", "these runs", "AWAC SAMG"]) == "several arms (a/there/awac-samg, here/awac-samg)"


def test_offline_phases_of_a_sweep_are_no_arms_of_the_tables(make_run, run_report, tmp_path):
    make_run(10, seed=0)
    make_run(50, seed=0, tree="runs/offline", name="awac-offline-abc", online_iterations=0, coefficient="none")
    printed = run_report()
    assert "awac-samg" in printed and "awac-offline" not in printed
    assert "awac-offline-abc" in (tmp_path / "out/tables/costs.md").read_text()


def test_the_column_of_an_arm(make_run, runs, all_arms):
    make_run(1, name="mine", p_threshold=0.2)

    def column(guided):
        return [arm.name for arm in runs.arm_of_column(all_arms(), "Hopper-v4", "awac", guided)]

    assert column(True) == ["mine"] and column(False) == []
    make_run(2, name="other")
    assert column(True) == ["mine", "other"]
    make_run(3)
    make_run(4, samg=False, name="awac-vanilla")
    make_run(5, samg=False, keep_offline_data=False)
    assert column(True) == ["awac-samg"] and column(False) == ["awac-vanilla"]


# --- Against the paper
FULL = {"offline_iterations": 1_000_000, "online_iterations": 200_000}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "+7.5"),
        ({"dataset": "/data/hopper_medium-v2.hdf5"}, "+7.5"),
        ({"dataset": "/data/hopper_medium.hdf5"}, "not comparable"),
        ({"offline_iterations": 1000}, "not comparable"),
        ({"online_iterations": 500_000}, "not comparable"),
    ],
)
def test_a_difference_only_where_it_means_something(make_run, table, fields, text):
    make_run(110, env="hopper-medium-v2", **FULL | fields)
    made, cells = table(1)
    assert cells["hopper-medium-v2", "paper", "AWAC SAMG"].text == "102.5 ± 1.8"
    assert cells["hopper-medium-v2", "difference", "AWAC SAMG"].text == text
    assert any("hopper-medium-v2" in note for note in made.notes) == (text == "not comparable")


@pytest.mark.parametrize("env", ["Hopper-v4", "pen-binary-v0"])
def test_own_environments_and_tasks_without_a_d4rl_file_are_not_comparable(make_run, table, env):
    make_run(110, env=env, dataset="/data/hopper_medium-v2.hdf5", **FULL)
    assert table(1)[1][env, "difference", "AWAC SAMG"].text == "not comparable"


def test_table_1s_td3_bc_is_held_against_the_offline_score_and_spot_against_the_final_one(make_run, table):
    for algorithm, name in (("td3_bc", "td3_bc-vanilla"), ("spot", "")):
        make_run(90, algorithm=algorithm, name=name, env="hopper-medium-v2", offline_score=66.9, **FULL)
    make_run(91, algorithm="td3_bc", name="td3_bc-published", env="hopper-medium-v2", **FULL | {"online_iterations": 0})
    _, cells = table(1)
    assert [cells["hopper-medium-v2", row, "TD3+BC offline"].text for row in ("these runs", "difference")] == [
        "66.9",
        "+0.5",
    ]
    assert cells["hopper-medium-v2", "these runs", "SPOT"].text == "90.0"


def test_table_3_compares_at_500000_steps(make_run, table):
    make_run(50, env="antmaze-umaze-v2", seed=0, online_iterations=500_000)
    make_run(50, env="antmaze-umaze-v2", seed=0, samg=False)
    _, cells = table(3)
    assert cells["antmaze-umaze-v2", "difference", "AWAC SAMG"].text == "+0.420"  # 0.5 - 0.080
    assert cells["antmaze-umaze-v2", "difference", "AWAC Vanilla"].text == "not comparable"


def test_the_best_of_a_row_is_bold(make_run, table):
    for score, algorithm in ((30, "awac"), (50, "iql"), (40, "cql")):
        make_run(score, algorithm=algorithm, env="antmaze-umaze-v2")
    for n in (1, 3):  # the highest score, the lowest regret
        bold = [name for (task, row, name), cell in table(n)[1].items() if cell.bold and task == "antmaze-umaze-v2"]
        assert bold == ["IQL SAMG", "CQL SAMG"]  # of these runs; of the paper: 97.0, and 0.021


# --- Statistics
def test_interquartile_mean(runs):
    tasks = np.array([0.0, 30, 10, 20]), np.array([100.0, 40, 60, 50])
    assert runs.interquartile_mean(*tasks) == 35  # of 20, 30, 40, 50
    assert runs.pooled_mean(*tasks) == 38.75
    assert runs.optimality_gap(np.array([80.0, 120]), np.array([50.0, 90])) == 20  # of 20, 0, 50, 10


def test_the_bootstrap_draws_within_each_task(runs):
    # The first task's mean is 0, 5 or 10, the second's 50: pooled 25, 27.5 or 30. Unstratified, 0 to 50.
    low, high = runs.interval([np.array([0.0, 10]), np.array([50.0, 50])], runs.pooled_mean)
    assert (low, high) == (25, 30)
    assert np.isnan(runs.interval([np.array([0.0, 10]), np.array([50.0])], runs.pooled_mean)).all()


def test_aggregates(make_run, all_arms, tables):
    for env, scores in (("Hopper-v4", (0, 30, 10, 20)), ("Walker2d-v4", (100, 40, 60, 50))):
        for seed, score in enumerate(scores):
            make_run(score, env=env, seed=seed)
    (row,) = tables.aggregates(all_arms()).rows
    assert [cell.text for cell in row[:3]] == ["awac-samg", "2", "8"]
    assert row[3].text.startswith("35.0 [") and row[4].text.startswith("38.8 [")


def test_curves_are_over_the_steps_that_all_seeds_have(make_run, runs, arms):
    make_run(10, 20, 30, seed=0)
    make_run(30, 40, seed=1)
    steps, values = runs.mean_curve(arms()["awac-samg"], "score")
    assert steps.tolist() == [1000, 2000] and values.mean(-1).tolist() == [20, 30]
    steps, values = runs.mean_curve(arms()["awac-samg"], "p_share")
    assert steps.tolist() == [500, 1000, 1500, 2000] and (values == 0.75).all()


def test_arms_that_differ_in_one_field(make_run, runs, all_arms):
    for threshold in (0.2, 0.6):
        make_run(10, name=f"awac-p{threshold}", p_threshold=threshold)
    make_run(20, name="awac-both", p_threshold=0.2, coefficient="even")
    make_run(30, samg=False)
    make_run(40, samg=False, keep_offline_data=False, vae_iterations=1)  # without SAMG, vae_iterations means nothing
    found = runs.one_field_apart(all_arms())
    short = {key: [[(value, arm.name) for value, arm in pairs] for _, pairs in groups] for key, groups in found.items()}
    assert short == {
        ("awac", "coefficient"): [[("even", "awac-both"), ("vae", "awac-p0.2")]],
        ("awac", "keep_offline_data"): [[(False, "awac-no-offline-data"), (True, "awac")]],
        ("awac", "p_threshold"): [[(0.2, "awac-p0.2"), (0.6, "awac-p0.6")]],
    }
    make_run(50)
    ((_, pair),) = runs.one_field_apart(all_arms())["awac", "samg"]
    assert [(value, arm.name) for value, arm in pair] == [("vanilla", "awac"), ("SAMG", "awac-samg")]


# --- Files
def test_the_same_runs_give_the_same_bytes_and_a_page_of_its_own(make_run, run_report, tmp_path):
    for seed in (0, 1):
        make_run(10 + seed, 20 + seed, seed=seed)
        make_run(30, 25, seed=seed, samg=False)
        make_run(5, 7, seed=seed, env="<b>&-v0", name="x_y%")
    make_run(1, 2, seed=2, finished=False)
    run_report(output="out")
    run_report(output="again")
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()}
    for path in files:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    names = ("results", "table1", "table2", "table3", "aggregates", "costs")
    assert {f"tables/{name}.{kind}" for name in names for kind in ("md", "tex", "csv")} <= set(map(str, files))
    assert {"figures/curves-Hopper-v4-awac.png", "figures/ablation-awac-samg.png"} <= set(map(str, files))
    page = (tmp_path / "out/report.html").read_text()
    assert all(link.startswith(("#", "data:image/png")) for link in re.findall(r'(?:src|href)="([^"]*)', page))
    assert not re.search(r"<(script|link|iframe)|url\(|@import", page)
    targets = set(re.findall(r'href="#([^"]*)', page))
    assert targets <= set(re.findall(r'id="([^"]*)', page)) and {"results", "curves", "paper", "commands"} <= targets
    assert "&lt;b&gt;&amp;-v0" in page and "<b>&-v0" not in page
    assert f"python tools/experiments/report.py {tmp_path / 'runs'}\n" in page


def test_csv_and_latex(make_run, table, tables):
    for seed, score in enumerate((10, 20)):
        make_run(score, seed=seed, env="Hopper-v4", name="x_y%")
    made, _ = table(1)
    (row,) = [row for row in csv.DictReader(io.StringIO(tables.to_csv(made))) if row["arm"]]
    assert (row["task"], row["column"], row["mean"], row["n"]) == ("Hopper-v4", "awac_samg", "15.0", "2")
    assert float(row["std"]) == np.std([10, 20], ddof=1) and row["comparable"] == "False"
    tex = tables.to_latex(made)
    assert tex.count("{") == tex.count("}")
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if line.endswith(r"\\")} == {11}
    assert r"15.0 $\pm$ 7.1 (2)" in body and r"$-$0.34 $\pm$ 0.01" in body
    assert tables.latex_text("a_b% -1.5 x-2") == r"a\_b\% $-$1.5 x-2"


def test_bad_input_ends_with_one_line(make_run, run_report, tmp_path):
    with pytest.raises(SystemExit, match="error: no folder .*runs"):
        run_report()
    (tmp_path / "runs").mkdir()
    with pytest.raises(SystemExit, match="error: no runs below"):
        run_report()
    folder = make_run(10)
    (folder / "summary.json").write_text("{")
    with pytest.raises(SystemExit, match="error: cannot read the run in .*awac-samg-seed0"):
        run_report()
    (folder / "summary.json").unlink()
    (folder / "config.yaml").write_text("a: 1\n")
    with pytest.raises(SystemExit, match="config.yaml has no dataset, env"):
        run_report()
