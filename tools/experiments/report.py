"""The paper's tables and pictures from a folder of runs, as one HTML page and as files.

    python tools/experiments/report.py runs --output report

Reads every run below the folder, <env>/<name>-seed<seed>, however deep, and writes report.html (all of it, nothing from
elsewhere), tables/*.md, *.tex and *.csv, and figures/*.png; prints the tables of what was found. The page shows first
what was run, and more at a click; the files are complete. Runs that differ in the seed only are one arm. Only finished
runs are averaged; all others are listed. The same runs give the same bytes. Needs requirements-dev.txt.
"""

import argparse
import base64
import re
import shlex
from pathlib import Path

import jinja2
import report_figures as figures
import report_tables as tables
from report_runs import ALGORITHMS, RESAMPLES, Arm, Run, fail, find_runs, group, one_field_apart, read_paper

from awac_samg import write_whole  # isort: skip  (report_runs has made it known)


def draw(arms: list[Arm]) -> dict[str, list[tuple[str, str, bytes]]]:
    """The figures by section: (file name, description, PNG)."""
    drawn: dict[str, list[tuple[str, str, bytes]]] = {"aggregates": [], "curves": [], "ablations": []}
    if tables.by_name(arms):
        text = "Interquartile mean of the final normalised scores with 95 % stratified-bootstrap interval"
        drawn["aggregates"].append(("aggregate-iqm", text, figures.aggregate(arms)))
    for algorithm in dict.fromkeys(arm.algorithm for arm in arms if arm.normalized):
        text = f"Performance profiles, {algorithm}: share of runs with a final score above τ, with 95 % bootstrap bands"
        mine = [arm for arm in arms if arm.algorithm == algorithm]
        drawn["aggregates"].append((f"performance-profiles-{algorithm}", text, figures.profiles(mine, arms)))
    for env, algorithm in dict.fromkeys((arm.env, arm.algorithm) for arm in arms):
        mine = [arm for arm in arms if (arm.env, arm.algorithm) == (env, algorithm)]
        if any("score" in run.curves for arm in mine for run in arm.runs):
            text = f"{env}, {algorithm or 'unknown algorithm'}"
            drawn["curves"].append((f"curves-{env}-{algorithm}", text, figures.curves(mine, arms)))
    for (algorithm, field), groups in one_field_apart(arms).items():
        for normalized in (True, False):
            some = [pair for pair in groups if all(arm.normalized == normalized for _, arm in pair[1])]
            if some:
                name = f"ablation-{algorithm}-{field}" + ("" if normalized else "-returns")
                text = "without and with SAMG" if field == "samg" else f"arms that differ in {field} only"
                drawn["ablations"].append((name, f"{algorithm}: {text}", figures.ablation(some)))
    return drawn


def draw_costs(arms: list[Arm]) -> list[tuple[str, str, bytes]]:
    drawn = []
    for env in dict.fromkeys(arm.env for arm in arms if arm.counted):
        mine = [arm for arm in arms if arm.env == env and arm.counted]
        text = f"{env}: mean seconds of a run by part, and peak memory"
        drawn.append((f"costs-{env}", text, figures.cost(mine)))
    return drawn


def exceptions(runs: list[Run], arms: list[Arm]) -> list[tuple[str, str, str]]:
    """What is not averaged, and why: (run or arm, state, detail)."""
    found = [(run.place, run.state, run.detail) for run in runs if run.detail]
    for arm in arms:
        name = f"{arm.env}, {arm.label}"
        found += [(f"{name}, seed {seed}", "missing", "no folder") for seed in arm.missing if not arm.offline_only]
        if arm.differing:
            found.append((name, "not counted", arm.gaps()))
    return found


def commands(root: str, arms: list[Arm]) -> list[str]:
    """The command of the report, and for each arm one that repeats its first run."""
    lines = [shlex.join(["python", "tools/experiments/report.py", root])]
    for arm in arms:
        if arm.config and arm.algorithm in ALGORITHMS:
            config = f"{root.rstrip('/')}/{arm.runs[0].place}/config.yaml"
            file = f"algorithms/{arm.algorithm}{'_samg' * ('samg' in arm.config)}.py"  # others have no guidance
            words = ["python", file, "--config", config, "--runs_dir", "repeated"]
            lines.append(shlex.join(words))
    return lines


def page(root: str, runs: list[Run], arms: list[Arm], made: list[tables.Table], found: dict, drawn: dict) -> str:
    """The page; `found` holds what it shows at first of the results and the paper's tables, by name."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    env = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters["base64"] = lambda content: base64.b64encode(content).decode()
    env.filters["unbroken"] = lambda text: re.sub(r"(?<=[±,]) ", "\N{NO-BREAK SPACE}", text)
    facts = {"runs": runs, "envs": sorted({run.env for run in runs}), "resamples": RESAMPLES}
    facts |= {"found": found, "figures": drawn}
    facts |= {"n_arms": sum(not arm.offline_only for arm in arms), "tables": {table.name: table for table in made}}
    facts |= {"finished": sum(run.state == "finished" for run in runs), "exceptions": exceptions(runs, arms)}
    return env.get_template("report.html.j2").render(facts, commands=commands(root, arms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="folder with all runs")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=0, help="how many seeds each arm should have (default: all found)")
    args = parser.parse_args()

    root = Path(args.runs)
    if not root.is_dir():
        fail(f"no folder {root}; give the one that holds the runs, such as runs")
    if not (runs := find_runs(root)):
        fail(f"no runs below {root}: no folder <name>-seed<seed> with a config.yaml in it")
    everything, paper = group(runs, args.seeds), read_paper()
    arms = [arm for arm in everything if not arm.offline_only]
    made = [tables.results(arms), *(tables.paper_table(n, arms, paper) for n in (1, 2, 3))]
    made += [tables.aggregates(arms), tables.costs(everything)]
    found = {f"table{n}": tables.paper_table(n, arms, paper, only_found=True) for n in (1, 2, 3)}
    tasks = {(f"table{n}", task) for n, task, _ in paper}
    first = {name: it for name, it in found.items() if any((name, row[0].text) in tasks for row in it.rows)}
    first["results"] = tables.results(arms, every=False)
    drawn = draw(arms) | {"costs": draw_costs(everything)}
    files = {"report.html": page(args.runs, runs, everything, made, first, drawn).encode()}
    for table in made:
        for ending, text in (("md", tables.to_markdown), ("tex", tables.to_latex), ("csv", tables.to_csv)):
            files[f"tables/{table.name}.{ending}"] = text(table).encode()
    for name, _, content in [picture for section in drawn.values() for picture in section]:
        name = re.sub(r"[^\w.-]+", "-", name)  # an environment's name may hold : and /
        files[f"figures/{name}.png"] = content
    try:
        for name, content in files.items():
            (args.output / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.output / name, content)
    except OSError as error:
        fail(f"cannot write to {args.output}: {error}")

    print("\n".join(tables.to_markdown(table) for table in (made[0], *found.values()) if table.rows))
    if left_out := exceptions(runs, everything):
        print("\n".join(["Remarks:", *(f"- {name}: {state}: {detail}" for name, state, detail in left_out)]))
    print(f"\n{args.output / 'report.html'}: {len(runs)} runs, {len(arms)} arms, {len(files)} files")


if __name__ == "__main__":
    main()
