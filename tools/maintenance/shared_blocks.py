"""Keep the single files in step: a top-level block of the same name is identical to the letter in all of them.

    python tools/maintenance/shared_blocks.py                             # check: exit status 1 on a difference
    python tools/maintenance/shared_blocks.py --matrix                    # which file has which block
    python tools/maintenance/shared_blocks.py --fix algorithms/awac_samg.py [--block Run]   # copy a change through

A block is a top-level function, class or assignment with its decorators, the comments directly above it and whatever is
indented below it, or the `# /// script` lines ("dependencies"). Neighbouring statements of one name are one block.
TrainConfig and the class that has an ALGORITHM are each file's own. Imports are no block: every file imports just what
it uses, which ruff checks. The sections (`# --- Networks`, not indented) that files share come in the same order.
"""

import argparse
import ast
import re
import shutil
from collections import Counter
from itertools import combinations, groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

ALGORITHMS = Path(__file__).resolve().parents[2] / "algorithms"


class Block(NamedTuple):
    start: int  # first line, counted from 0
    end: int  # behind the last line
    text: str | None  # None: the file's own, never compared or copied


class Source(NamedTuple):
    path: Path
    lines: list[str]
    blocks: dict[str, Block]
    sections: list[str]

    def shared(self) -> dict[str, str]:
        return {name: block.text for name, block in self.blocks.items() if block.text is not None}


def block_name(node: ast.stmt) -> str | None:
    """The name of a definition or an assignment; None for other statements."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    named = isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign))
    return " = ".join(map(ast.unparse, targets)) if named else getattr(node, "name", None)


def read_source(path: Path) -> Source:
    """Find the blocks of a file; ValueError, in one line, if it does not parse."""
    try:
        text = path.read_bytes().decode()  # bytes, so that line ends stay as they are
        body = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno} does not parse ({error.msg})") from None
    except ValueError as error:
        raise ValueError(f"{path} does not parse ({error})") from None
    lines, blocks = text.split("\n"), {}
    if match := re.search(r"^# /// script\s*\n(#.*\n)*?# ///", text, re.MULTILINE):
        start, end = (text[:place].count("\n") for place in match.span())
        blocks["dependencies"] = Block(start, end + 1, "\n".join(lines[start : end + 1]))
    for name, group in groupby(body, block_name):
        nodes = list(group)
        first, last = nodes[0], nodes[-1]
        if name is None:
            continue
        if name in blocks:
            raise ValueError(f"{path}:{first.lineno} defines {name} again, away from its other definition")
        start = min(part.lineno for part in (first, *getattr(first, "decorator_list", ()))) - 1
        end = last.end_lineno
        while start and re.match(r"#(?! ---| ///)", lines[start - 1]):
            start -= 1
        while end < len(lines) and re.match(r"\s|$", lines[end]):
            end += 1
        while not lines[end - 1].strip():
            end -= 1
        own = name == "TrainConfig" or "ALGORITHM" in map(block_name, getattr(first, "body", ()))
        blocks[name] = Block(start, end, None if own else "\n".join(lines[start:end]))
    return Source(path, lines, blocks, [line[6:].strip() for line in lines if line.startswith("# --- ")])


def usual_versions(sources: list[Source]) -> dict[str, str]:
    """Of every shared block the version that most files have; in a tie, that of the first file."""
    counts = Counter(pair for source in sources for pair in source.shared().items())
    return dict(sorted(reversed(counts), key=counts.get))  # the last one of a name stays


def check(sources: list[Source]) -> list[str]:
    """A message for every block that differs from its usual version, and for every two files of different order."""
    faults, usual = [], usual_versions(sources)
    for source in sources:
        for name, text in source.shared().items():
            if text == usual[name]:
                continue
            model = next(other for other in sources if other.shared().get(name) == usual[name])
            pairs = enumerate(zip_longest(usual[name].split("\n"), text.split("\n")))
            row, unlike = next((row, pair) for row, pair in pairs if pair[0] != pair[1])
            faults.append(f"{name} is not the same in {model.path.name} and {source.path.name}")
            for file, line in zip((model, source), unlike):
                shown = "(no such line)" if line is None else repr(line)
                faults.append(f"  {file.path.name}:{file.blocks[name].start + row + 1}: {shown}")
    for one, other in combinations(sources, 2):
        both = {*one.sections} & {*other.sections}
        common = [[title for title in file.sections if title in both] for file in (one, other)]
        if unlike := [pair for pair in zip_longest(*common) if pair[0] != pair[1]]:
            places = [f"{title} in {file.path.name}" for title, file in zip(unlike[0], (one, other))]
            faults.append(f"sections in another order: {' where there is '.join(places)}")
    return faults


def fix(sources: list[Source], model: Source, names: set[str]) -> None:
    """Write the model's version of these blocks into the files that have another; each file is whole at any time."""
    for source in sources:
        own, other = source.shared(), model.shared()
        changed = [name for name in own if name in names and other.get(name, own[name]) != own[name]]
        for name in sorted(changed, key=lambda name: -source.blocks[name].start):
            source.lines[slice(*source.blocks[name][:2])] = model.blocks[name].text.split("\n")
        if changed:
            aside = source.path.with_name(source.path.name + ".part")
            try:
                aside.write_bytes("\n".join(source.lines).encode())
                shutil.copymode(source.path, aside)
                aside.replace(source.path)
            finally:
                aside.unlink(missing_ok=True)
            print(f"{source.path.name}: {', '.join(changed)} now as in {model.path.name}")


def print_matrix(sources: list[Source], names: list[str]) -> None:
    """Blocks by files: own, absent, the same as in most files, or different from it."""
    usual, rows = usual_versions(sources), [["block", *(source.path.name for source in sources)]]
    for name in names:
        rows.append([name])
        for source in sources:
            same = "same" if source.shared().get(name) == usual.get(name) else "different"
            rows[-1].append("absent" if name not in source.blocks else same if name in source.shared() else "own")
    widths = [max(map(len, column)) for column in zip(*rows)]
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="name the blocks that differ (the default)")
    action.add_argument("--matrix", action="store_true", help="print which file has which block")
    action.add_argument("--fix", type=Path, metavar="FILE", help="copy FILE's version of what differs to the others")
    parser.add_argument("--block", metavar="NAME", help="with --fix: this block only")
    parser.add_argument("--folder", type=Path, default=ALGORITHMS, help="where the *.py are")
    args = parser.parse_args()
    try:
        sources = [read_source(path) for path in sorted(args.folder.glob("*.py"))]
        names = list(dict.fromkeys(name for source in sources for name in source.blocks))
        model = next((source for source in sources if args.fix and source.path.resolve() == args.fix.resolve()), None)
        if not sources:
            raise ValueError(f"no *.py in {args.folder}")
        if args.block and not args.fix:
            raise ValueError("--block goes with --fix FILE")
        if args.fix and not model:
            raise ValueError(f"{args.fix} is none of the *.py in {args.folder}")
        if args.block and args.block not in model.shared():
            raise ValueError(f"{args.fix} has no block {args.block} to share")
        if model:
            return fix(sources, model, {args.block} if args.block else set(names))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    if args.matrix:
        return print_matrix(sources, names)
    if faults := check(sources):
        raise SystemExit("\n".join(faults))
    print(f"{len(sources)} file(s), {len(names)} blocks: in step")


if __name__ == "__main__":
    main()
