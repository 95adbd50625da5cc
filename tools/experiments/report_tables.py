"""The tables of report.py: each one is a grid of cells, for Markdown, LaTeX and HTML, and records for CSV."""

import csv
import io
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from report_runs import ALGORITHMS, Arm, arm_of_column, interval, spread

from report_runs import interquartile_mean, optimality_gap, pooled_mean  # isort: skip

TITLES = {"cql": "CQL", "awac": "AWAC", "iql": "IQL", "td3_bc": "TD3+BC", "spot": "SPOT", "cal_ql": "Cal-QL"}
TITLES |= {"edis": "EDIS"}
SCORES = {"final_score": 1, "last_score": 1, "train_score": 1, "offline_score": 1, "regret": 3}  # digits
MORE_SCORES = {"best_score": 1, "switch_drop": 1, "train_regret": 3}
# Paper's columns, by table: (head, [(subhead, column)])
PAIRS = {name: [("Vanilla", name), ("SAMG", f"{name}_samg")] for name in ("cql", "awac", "iql", "cal_ql")}
ALONE = {name: [("", name)] for name in ("td3_bc", "spot", "cal_ql", "edis")} | {"td3_bc": [("offline", "td3_bc")]}
OFFLINE = {(1, "td3_bc")}  # what the paper prints there are CORL's scores of the offline phase (docs/paper.md)
LAYOUTS = {
    1: {name: PAIRS[name] for name in ("cql", "awac", "iql")} | ALONE,
    2: {"cal_ql": PAIRS["cal_ql"]},
    3: PAIRS,
}
CAPTIONS = {
    1: "Normalised score after online fine-tuning",
    2: "Normalised score of Cal-QL with and without SAMG",
    3: "Cumulative regret of online fine-tuning",
}
DASH = "–"


@dataclass
class Cell:
    text: str
    bold: bool = False
    note: str = ""  # shown in brackets

    def __str__(self) -> str:
        return self.text + (f" ({self.note})" if self.note else "")


@dataclass
class Table:
    """`heads` is a list of (head, [subheads]); the first column, or the first two, name the row."""

    name: str  # of its files
    title: str
    caption: str
    heads: list[tuple[str, list[str]]]
    rows: list[list[Cell]]
    records: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def height(self, row: int) -> int:
        """How many rows the name of this one covers: those below it without a name belong to it."""
        below = range(row + 1, len(self.rows))
        return 1 + next((i for i, r in enumerate(below) if self.rows[r][0].text), len(below))


def number(value: float, digits: int, sign: str = "") -> str:
    """'-0.0' is '0.0'; nan is a dash."""
    value = round(float(value), digits) + 0.0
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else DASH


def mean_std(values: np.ndarray, digits: int) -> str:
    if not len(values):
        return DASH
    return number(values.mean(), digits) + (f" ± {number(spread(values), digits)}" if len(values) > 1 else "")


# --- All arms
def results(arms: list[Arm], every: bool = True) -> Table:
    """One row for every arm found, with every figure or the first ones only."""
    scores = SCORES | (MORE_SCORES if every else {})
    heads = [(head, [""]) for head in ("environment", "arm", "seeds", *(name.replace("_", " ") for name in scores))]
    rows, records, notes = [], [], []
    for arm in arms:
        cells = []
        for name, digits in scores.items():
            values = arm.values(name)
            few = 0 < len(values) < len(arm.counted)
            cells.append(Cell(mean_std(values, digits), note=str(len(values)) if few else ""))
        seeds, _, gaps = arm.seeds_text().partition(": ")
        rows.append([Cell(arm.env), Cell(arm.label), Cell(seeds, note=gaps), *cells])
        record = {"env": arm.env, "algorithm": arm.algorithm, "arm": arm.label, "n": len(arm.counted)}
        record["not_counted"] = arm.gaps()
        for name in scores:
            values = arm.values(name)
            record |= {name: values.mean() if len(values) else "", f"{name}_std": text_or_nothing(spread(values))}
        records.append(record)
    if any(arm.counted and not arm.normalized for arm in arms):
        notes.append("Environments without a regret have no normalised score: their scores are returns.")
    older = [arm for arm in arms if any("last_score" not in run.summary for run in arm.counted)]
    if names := ", ".join(f"{arm.env} {arm.label}" for arm in older):
        notes.append(f"Older runs, whose final score is the last evaluation alone: {names}.")
    caption = (
        "Mean ± sample standard deviation over the finished runs, in brackets their number where some have no figure. "
        "Final score: mean of the last five evaluations online; last score: the last of them; train score: mean of the "
        "training episodes since before these five."
    )
    return Table("results", "Results of all arms", caption, heads, rows, records, notes)


def text_or_nothing(value: float) -> float | str:
    return value if math.isfinite(value) else ""


# --- The paper's tables
def paper_table(n: int, arms: list[Arm], paper: dict, only_found: bool = False) -> Table:
    """Table n of the paper: for each task these runs, the paper's figures, and the difference where it means something.

    Other environments with normalised scores come before the paper's tasks. `only_found` leaves out tasks and
    algorithms without runs.
    """
    metric, digits = ("regret", 3) if n == 3 else ("final_score", 1)
    tasks = list(dict.fromkeys(task for table, task, _ in paper if table == n))
    extra = sorted({arm.env for arm in arms if arm.normalized} - set(tasks))
    best = "lowest" if n == 3 else "highest"
    caption = f"Mean ± standard deviation, in brackets the seeds; in bold the {best} mean that a row shows."
    caption += "" if n == 3 else " Of these runs, the mean of the last five evaluations."
    table = Table(f"table{n}", f"{CAPTIONS[n]} (the paper's Table {n})", caption, [("task", [""]), ("", [""])], [], [])
    layout = LAYOUTS[n]
    records, found, reasons = {}, {}, {}  # the first two by task
    columns = [column for pair in layout.values() for _, column in pair]
    for task in [*extra, *tasks]:
        records[task] = {column: record_of(n, task, column, arms, paper, metric, reasons) for column in columns}
        found[task] = {column for column in columns if records[task][column]["seeds"] not in ("", "missing")}
    if only_found:
        columns = set().union(*found.values())
        layout = {name: pair for name, pair in layout.items() if any(column in columns for _, column in pair)}
    table.heads += [(TITLES[name], [subhead for subhead, _ in pair]) for name, pair in layout.items()]
    for task in records:
        if found[task] or (task in tasks and not only_found):
            shown = [records[task][column] for pair in layout.values() for _, column in pair]
            table.records += shown
            table.rows += task_rows(task, shown, bool(found[task]), digits, lowest=n == 3)
    table.notes += [f"Not comparable, {', '.join(where)}: {reason}." for reason, where in reasons.items()]
    if any(record["comparable"] for record in table.records):
        table.notes.append(
            "A run does not record its simulator: without D4RL's, the locomotion tasks run on Gymnasium's v4, whose "
            "physics differ slightly from the paper's."
        )
    if n == 2 and any("†" in cell.text for row in table.rows for cell in row):
        table.notes.append(
            "† Tables 1 and 2 of the paper disagree: Table 2 prints Cal-QL's figures of antmaze medium-play and "
            "-diverse, and of large-play and -diverse, the other way round. Table 1's are quoted here."
        )
    return table


def record_of(n: int, task: str, column: str, arms: list[Arm], paper: dict, metric: str, reasons: dict) -> dict:
    """One cell, in numbers. `reasons` collects why cells are not comparable."""
    name, guided = column.removesuffix("_samg"), column.endswith("_samg")
    algorithm = next((ours for ours, (theirs, _) in ALGORITHMS.items() if theirs == name), "")
    record = {"table": n, "task": task, "column": column, "arm": "", "n": "", "mean": "", "std": "", "seeds": ""}
    record |= {"paper_mean": "", "paper_std": "", "difference": "", "comparable": ""}
    if figures := paper.get((1, task, column) if n == 2 and not guided else (n, task, column)):
        record["paper_mean"], record["paper_std"] = figures
        record["swapped"] = n == 2 and figures != paper[2, task, column]
    if not algorithm:
        return record
    candidates = arm_of_column(arms, task, algorithm, guided)
    if len(candidates) != 1:
        record["seeds"] = f"several arms: {', '.join(arm.label for arm in candidates)}" if candidates else "missing"
        return record
    arm = candidates[0]
    offline = (n, column) in OFFLINE
    values = arm.values("offline_score" if offline else metric)
    record |= {"arm": arm.label, "n": len(values), "seeds": arm.seeds_text()}
    if not len(values):
        return record
    record |= {"mean": values.mean(), "std": text_or_nothing(spread(values))}
    if reason := arm.incomparable(n, offline) or ("" if figures else "not a task of the paper's table"):
        reasons.setdefault(reason, [])
        reasons[reason] += [] if task in reasons[reason] else [task]
    record["comparable"] = not reason
    if not reason:
        record["difference"] = values.mean() - record["paper_mean"]
    return record


def task_rows(task: str, records: list[dict], found: bool, digits: int, lowest: bool) -> list[list[Cell]]:
    rows = {name: [Cell(""), Cell(name)] for name in ("these runs", "paper", "difference")}
    rows["these runs"][0].text = task
    for key, row in (("mean", "these runs"), ("paper_mean", "paper")):
        means = [round(record[key], 3) for record in records if record[key] != ""]
        best = (min(means) if lowest else max(means)) if len(means) > 1 else None
        rows[row] += [Cell("", record[key] != "" and round(record[key], 3) == best) for record in records]
    for own, theirs, record in zip(rows["these runs"][2:], rows["paper"][2:], records):
        own.text, theirs.text = record["seeds"] or DASH, DASH
        if record["mean"] != "":
            plus_minus = f" ± {number(record['std'], digits)}" if record["std"] != "" else ""
            own.text, own.note = number(record["mean"], digits) + plus_minus, record["seeds"]
        elif own.text[0].isdigit():
            own.text, own.note = "none", record["seeds"]
        elif ": " in own.text:
            own.text, own.note = own.text.split(": ")
        if record["paper_mean"] != "":
            figures = [printed(record[key], digits) for key in ("paper_mean", "paper_std")]
            theirs.text = " ± ".join(figures) + ("†" if record["swapped"] else "")
        text = number(record["difference"], digits, "+") if record["difference"] != "" else DASH
        rows["difference"].append(Cell("not comparable" if record["comparable"] is False else text))
    if not found:
        del rows["difference"]
    if all(record["paper_mean"] == "" for record in records):
        del rows["paper"]
    return list(rows.values())


def printed(value: float, digits: int) -> str:
    """A figure of the paper with the digits it has there: Adroit's have two."""
    return f"{value:.{digits if round(value, digits) == value else 2}f}"


# --- Over all tasks
def by_name(arms: list[Arm]) -> dict[str, list[Arm]]:
    """Arms with normalised scores, by label, over all environments."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.normalized:
            found.setdefault(arm.label, []).append(arm)
    return dict(sorted(found.items()))


AGGREGATES = {"IQM": interquartile_mean, "mean": pooled_mean, "optimality gap": optimality_gap}


def aggregates(arms: list[Arm]) -> Table:
    """Final scores over tasks and seeds, with bootstrap intervals."""
    rows, records, notes = [], [], []
    for label, members in by_name(arms).items():
        tasks = [arm.values("final_score") for arm in members]
        record: dict[str, Any] = {"arm": label, "tasks": len(tasks), "runs": sum(map(len, tasks))}
        cells = []
        for name, statistic in AGGREGATES.items():
            value, (low, high) = float(statistic(*tasks)), interval(tasks, statistic)
            bounds = f" [{number(low, 1)}, {number(high, 1)}]" if math.isfinite(low) else ""
            cells.append(Cell(number(value, 1) + bounds))
            record |= {name: value, f"{name}_low": text_or_nothing(low), f"{name}_high": text_or_nothing(high)}
        rows.append([Cell(label), Cell(str(record["tasks"])), Cell(str(record["runs"])), *cells])
        records.append(record)
        if short := [arm.env for arm in members if len(arm.counted) < 2]:
            notes.append(f"No interval for {label}: one seed only on {', '.join(short)}.")
    if len({tuple(sorted(arm.env for arm in members)) for members in by_name(arms).values()}) > 1:
        notes.append("The arms have runs on different tasks: compare only those with the same ones.")
    heads = [(head, [""]) for head in ("arm", "tasks", "runs", *AGGREGATES)]
    caption = (
        "Final normalised scores, pooled over tasks and counted seeds: interquartile mean (IQM), mean, and optimality "
        "gap to 100 (less is better), with 95 % stratified-bootstrap intervals (Agarwal et al., 2021)."
    )
    return Table("aggregates", "Aggregates over tasks", caption, heads, rows, records, notes)


# --- Time and memory
PARTS = ("offline", "coefficient", "act", "environment", "insert", "update", "evaluation")


def mean_seconds(arm: Arm) -> dict[str, float]:
    """Of the counted runs, by part."""
    seconds = {part: arm.values(f"seconds.{part}") for part in PARTS}
    return {part: float(values.mean()) if len(values) else 0.0 for part, values in seconds.items()}


def costs(arms: list[Arm]) -> Table:
    rows, records = [], []
    for arm in arms:
        if not arm.counted:
            continue
        memory, gpu = arm.values("peak_memory_mb"), arm.values("peak_gpu_memory_mb")
        means = mean_seconds(arm)
        devices = "/".join(sorted({str(run.summary.get("device", "?")) for run in arm.counted}))
        cells = [number(means[part], 0) for part in PARTS] + [number(sum(means.values()), 0)]
        cells += [number(part.max(), 0) if len(part) else DASH for part in (memory, gpu)]
        rows.append([Cell(arm.env), Cell(arm.label), Cell(devices), *map(Cell, cells)])
        record = {"env": arm.env, "arm": arm.label, "n": len(arm.counted), "device": devices}
        record |= {f"{part}_seconds": value for part, value in means.items()}
        record["peak_memory_mb"] = memory.max() if len(memory) else ""
        records.append(record | {"peak_gpu_memory_mb": gpu.max() if len(gpu) else ""})
    heads = [(head, [""]) for head in ("environment", "arm", "device", *PARTS, "total", "memory, MB", "GPU, MB")]
    caption = (
        "Mean seconds of a run in each part, and the highest peak memory of its seeds. A run that started from another "
        "run's offline checkpoint spent no time offline."
    )
    return Table("costs", "Wall clock and memory", caption, heads, rows, records)


# --- Files
def to_markdown(table: Table) -> str:
    names = [" ".join(filter(None, (head, sub))) for head, subs in table.heads for sub in subs]
    lines = [names, ["---"] * len(names)]
    for row in table.rows:
        texts = [str(cell).replace("|", "\\|") for cell in row]
        lines.append([f"**{text}**" if cell.bold else text for cell, text in zip(row, texts)])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "".join(f"\n- {note}" for note in table.notes)
    return f"**{table.title}.** {table.caption}\n\n{body}\n" + (notes and notes + "\n")


LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", DASH: "--", "†": r"$^\dagger$", "−": "$-$"}
LATEX |= {character: "\\" + character for character in "&%$#_{}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}


def latex_text(text: str) -> str:
    text = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.])([-+])(?=\d)", r"$\1$", text)


def to_latex(table: Table) -> str:
    """A table that needs the packages booktabs and graphicx."""
    width = sum(len(subs) for _, subs in table.heads)
    names = sum(subs == [""] for _, subs in table.heads[:2])
    top, start = [], 1
    rules, subheads = "", []
    for head, subs in table.heads:
        title = latex_text(head)
        top.append(rf"\multicolumn{{{len(subs)}}}{{c}}{{{title}}}" if len(subs) > 1 else title)
        rules += rf"\cmidrule(lr){{{start}-{start + len(subs) - 1}}}" if len(subs) > 1 else ""
        subheads += map(latex_text, subs)
        start += len(subs)
    caption = latex_text(" ".join((f"{table.title}.", table.caption, *table.notes)))
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\label{{tab:{table.name}}}", r"\resizebox{\textwidth}{!}{%"]
    lines += [rf"\begin{{tabular}}{{{'l' * names}{'c' * (width - names)}}}", r"\toprule", " & ".join(top) + r" \\"]
    lines += [rules, " & ".join(subheads) + r" \\"] if any(subheads) else []
    lines.append(r"\midrule")
    for i, row in enumerate(table.rows):
        if i and row[0].text and not table.rows[i - 1][0].text:
            lines.append(r"\addlinespace")
        texts = [rf"\textbf{{{latex_text(str(cell))}}}" if cell.bold else latex_text(str(cell)) for cell in row]
        lines.append(" & ".join(texts) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def to_csv(table: Table) -> str:
    """Numbers, one record a line, in full precision."""
    columns = list(dict.fromkeys(key for record in table.records for key in record if key != "swapped"))
    out = csv.DictWriter(stream := io.StringIO(), columns, extrasaction="ignore", lineterminator="\n")
    out.writeheader()
    out.writerows({name: plain(value) for name, value in record.items()} for record in table.records)
    return stream.getvalue()


def plain(value: Any) -> Any:
    return repr(float(value)) if isinstance(value, (float, np.floating)) else value
