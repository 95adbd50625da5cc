"""tools/maintenance/shared_blocks.py: what counts as a block, what a difference is, and what --fix touches."""

import subprocess
import sys

import pytest
from conftest import ROOT

FILE = '''"""The {algorithm} file."""
# /// script
# dependencies = ["torch"]
# ///

import math
{imports}

# --- Configuration
@dataclass
class TrainConfig:
    name: str = "{algorithm}"


# --- Networks
# Kept small.
WIDTH = 3  # as the paper's
KINDS = {{"a": WIDTH}}
KINDS |= {{"b": WIDTH}}


# Once only.
@cache
def mlp(*sizes: int) -> float:
    """Layers."""
    return math.prod(sizes)  # no bias
    # the end


# --- {algorithm} with SAMG
class {algorithm}:
    ALGORITHM = "{algorithm}"


# --- Main
def main(algorithm):
    print(algorithm)


if __name__ == "__main__":
    main({algorithm})'''


@pytest.fixture
def folder(tmp_path):
    """awac_samg.py, cql_samg.py and iql_samg.py, in step."""
    for name, imports in (("AWAC", ""), ("CQL", "import copy\n"), ("IQL", "")):
        text = FILE.format(algorithm=name, imports=imports)
        (tmp_path / f"{name.lower()}_samg.py").write_text(text)
    return tmp_path


def tool(folder, *words):
    """Exit status, stdout, stderr."""
    command = [sys.executable, ROOT / "tools/maintenance/shared_blocks.py", "--folder", folder, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def replace(path, old, new):
    text = path.read_bytes()
    assert text.count(old.encode()) == 1
    path.write_bytes(text.replace(old.encode(), new.encode()))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def line_of(path, text):
    return path.read_text().split("\n").index(text) + 1


def test_the_files_of_this_repository_are_in_step():
    status, _, error = tool(ROOT / "algorithms", "--check")
    assert not status, error


def test_identical_blocks_pass_and_trainconfig_imports_and_the_algorithm_are_each_files_own(folder):
    assert tool(folder) == tool(folder, "--check") == (0, "3 file(s), 9 blocks: in step\n", "")


def test_one_letter_is_reported_with_block_files_and_lines(folder):
    path = replace(folder / "cql_samg.py", '"""Layers."""', '"""Layer."""')
    status, output, error = tool(folder)
    here, there = line_of(path, '    """Layer."""'), line_of(folder / "awac_samg.py", '    """Layers."""')
    assert here == there + 1  # one more import
    lines = [f'  awac_samg.py:{there}: \'    """Layers."""\'', f'  cql_samg.py:{here}: \'    """Layer."""\'']
    assert (status, output) == (1, "")
    assert error.splitlines() == ["mlp is not the same in awac_samg.py and cql_samg.py", *lines]


@pytest.mark.parametrize(
    "block, old, new",
    [
        ("WIDTH", "# Kept small.", "# Kept narrow."),
        ("WIDTH", "  # as the paper's", ""),
        ("WIDTH", "WIDTH = 3  # as", "WIDTH = 3 # as"),
        ("KINDS", '\nKINDS |= {"b": WIDTH}', ""),
        ("mlp", "# Once only.\n", ""),
        ("mlp", "@cache\n", "@lru_cache\n"),
        ("mlp", "# no bias", "# no bias "),
        ("mlp", "\n    # the end", ""),
        ("main", "print(algorithm)", "print( algorithm)"),
        ("main", "def main", "async def main"),
        ("dependencies", '"torch"', '"torch==2"'),
    ],
)
def test_every_letter_of_a_block_counts_and_fix_copies_it_through(folder, block, old, new):
    in_step = contents(folder)
    replace(folder / "iql_samg.py", old, new)
    status, _, error = tool(folder)
    assert status == 1 and error.startswith(f"{block} is not the same in awac_samg.py and iql_samg.py\n")
    assert len(error.splitlines()) == 3
    status, output, error = tool(folder, "--fix", folder / "awac_samg.py")
    assert (status, output, error) == (0, f"iql_samg.py: {block} now as in awac_samg.py\n", "")
    assert contents(folder) == in_step  # and no file beside them


def test_the_version_of_most_files_is_the_one_to_compare_with(folder):
    replace(folder / "awac_samg.py", "no bias", "bias")
    assert tool(folder)[2].startswith("mlp is not the same in cql_samg.py and awac_samg.py\n")


def test_fix_takes_the_named_files_version_and_leaves_all_other_text(folder):
    path = folder / "cql_samg.py"
    replace(path, "# Once only.\n@cache\n", "# Twice.\n# Thrice.\n@cache\n@once\n")
    replace(path, "    # the end", "    # the end,\n\n    # or not")
    replace(path, '["torch"]', '[\n#     "torch", "numpy",\n# ]')
    replace(path, "print(algorithm)", "print(algorithm, 2)")
    replace(path, 'name: str = "CQL"', 'name: str = "own"')
    model = path.read_text()
    assert tool(folder)[0] == 1
    assert tool(folder, "--fix", path)[0] == 0
    assert tool(folder)[0] == 0
    for name in ("AWAC", "IQL"):
        expected = model.replace("CQL", name).replace("import copy\n\n", "\n").replace('"own"', f'"{name}"')
        assert (folder / f"{name.lower()}_samg.py").read_text() == expected
    assert path.read_text() == model


def test_fix_twice_changes_nothing(folder):
    replace(folder / "cql_samg.py", "WIDTH = 3", "WIDTH = 4")
    tool(folder, "--fix", folder / "cql_samg.py")
    before, times = contents(folder), [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert tool(folder, "--fix", folder / "cql_samg.py") == (0, "", "")
    assert (contents(folder), [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]) == (before, times)


def test_fix_of_one_block_leaves_the_others(folder):
    path = replace(replace(folder / "cql_samg.py", "WIDTH = 3", "WIDTH = 4"), "print(algorithm)", "print(1)")
    output = tool(folder, "--fix", path, "--block", "WIDTH")[1]
    assert output.splitlines() == [f"{name}_samg.py: WIDTH now as in cql_samg.py" for name in ("awac", "iql")]
    assert tool(folder)[2].count("not the same") == 1 and "main is not the same" in tool(folder)[2]


def test_a_block_that_a_file_lacks_is_neither_a_difference_nor_put_there(folder):
    replace(folder / "iql_samg.py", "def main", "def start")
    before = contents(folder)
    assert tool(folder)[0] == 0
    assert tool(folder, "--fix", folder / "awac_samg.py") == (0, "", "")
    assert contents(folder) == before


def test_matrix_lists_every_block_and_file(folder):
    replace(folder / "iql_samg.py", "def main", "def start")
    replace(folder / "cql_samg.py", "WIDTH = 3", "WIDTH = 4")
    status, output, _ = tool(folder, "--matrix")
    head, *rows = [line.split() for line in output.splitlines()]
    assert not status and head == ["block", "awac_samg.py", "cql_samg.py", "iql_samg.py"]
    assert {name: states for name, *states in rows} == {
        "dependencies": ["same"] * 3,
        "TrainConfig": ["own"] * 3,
        "WIDTH": ["same", "different", "same"],
        "KINDS": ["same"] * 3,
        "mlp": ["same"] * 3,
        "AWAC": ["own", "absent", "absent"],
        "CQL": ["absent", "own", "absent"],
        "IQL": ["absent", "absent", "own"],
        "main": ["same", "same", "absent"],
        "start": ["absent", "absent", "same"],
    }


def test_common_sections_come_in_the_same_order(folder):
    path = replace(folder / "iql_samg.py", "# --- Configuration", "# --- Start")  # in no other file: no fault
    assert tool(folder)[0] == 0
    for old, new in (("Networks", "X"), ("Main", "Networks"), ("X", "Main")):
        replace(path, f"# --- {old}", f"# --- {new}")
    status, _, error = tool(folder)
    assert status == 1
    assert error.splitlines() == [
        f"sections in another order: Networks in {name}_samg.py where there is Main in iql_samg.py"
        for name in ("awac", "cql")
    ]


@pytest.mark.parametrize("bad", [b"def f(:\n", b"x = '\xff'\n", b"x = 1\0\n", b"x = 1\ny = 2\nx = 3\n"])
def test_a_file_that_cannot_be_read_is_refused_in_one_line_and_nothing_changes(folder, bad):
    replace(folder / "cql_samg.py", "WIDTH = 3", "WIDTH = 4")
    (folder / "td3_samg.py").write_bytes(bad)
    before = contents(folder)
    for words in ((), ("--matrix",), ("--fix", folder / "cql_samg.py")):
        status, output, error = tool(folder, *words)
        assert (status, output, error.count("\n")) == (1, "", 1)
        assert error.startswith("error: ") and "td3_samg.py" in error
    assert contents(folder) == before


def test_wrong_use_is_one_line(folder, tmp_path_factory):
    empty, path = tmp_path_factory.mktemp("empty"), folder / "cql_samg.py"
    cases = [(empty,), (folder, "--block", "mlp"), (folder, "--fix", "cql_samg.py")]
    cases += [(folder, "--fix", path, "--block", name) for name in ("TrainConfig", "CQL", "nothing")]
    before = contents(folder)
    for case in cases:
        status, output, error = tool(*case)
        assert (status, output, error.count("\n")) == (1, "", 1) and error.startswith("error: ")
    assert contents(folder) == before
