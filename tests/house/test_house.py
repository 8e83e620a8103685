"""Rules of the house: files of at most 400 lines, functions of at most 60, and no path of one machine."""

import ast
import re
import subprocess

import pytest
from checkout import ROOT

FILE_LINES, FUNCTION_LINES = 400, 60

LONG_KERNELS = {
    (
        "pallas_kernels/backends/jax_triton/arrow.py",
        "_arrow_attention",
    ): "Triton reads its source, and 19 lines are arguments"
}
"""Kernels that may be longer, and why: what is no kernel is cut."""

MACHINE_PATH = re.compile(r"(?<![\w.~$}/-])/(work|root|workspace|home/\w+|Users/\w+)/")


def listed():
    """Paths from the root of every file that git would keep."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if (ROOT / name).is_file()]


def long_files(root, names):
    lengths = {name: len((root / name).read_text(encoding="utf-8").splitlines()) for name in names}
    return {name: lines for name, lines in lengths.items() if lines > FILE_LINES}


def long_functions(root, names):
    """Lines from `def` to the last, by file and name: the docstring counts, decorators do not."""
    lengthy = {}
    for name in names:
        for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    lengthy[name, node.name] = lines
    return lengthy


def machine_paths(root, names):
    """The first path of one machine in each text; a file that is not UTF-8 is no text."""
    paths = {}
    for name in names:
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if match := MACHINE_PATH.search(text):
            paths[name] = text[match.start() :][:60].split("\n")[0]
    return paths


@pytest.mark.checkout
def test_files_are_short():
    assert not long_files(ROOT, [name for name in listed() if name.endswith(".py")])


@pytest.mark.checkout
def test_functions_are_short():
    lengthy = long_functions(ROOT, [name for name in listed() if name.endswith(".py")])
    assert not {function: lines for function, lines in lengthy.items() if function not in LONG_KERNELS}
    assert not LONG_KERNELS.keys() - lengthy.keys(), "no longer too long: take them off the list"


@pytest.mark.checkout
def test_no_file_names_a_path_of_one_machine():
    assert not machine_paths(ROOT, listed())


@pytest.mark.parametrize("excess", [0, 1])
def test_an_offender_is_seen(excess, tmp_path):
    (tmp_path / "file.py").write_text("x = 1\n" * (FILE_LINES + excess))
    body = "    x = 1\n" * (FUNCTION_LINES - 1 + excess)
    (tmp_path / "function.py").write_text(f"class A:\n  @staticmethod\n  async def a():\n{body}\ndef a():\n    pass\n")
    names = ["file.py", "function.py"]
    assert long_files(tmp_path, names) == ({"file.py": FILE_LINES + 1} if excess else {})
    assert long_functions(tmp_path, names) == ({("function.py", "a"): FUNCTION_LINES + 1} if excess else {})


@pytest.mark.parametrize(
    ("path", "foreign"),
    [
        ("/{}/main/build", True),
        ("cd=/{}/x", True),
        ("'/{}/x'", True),
        ("build/{}/x", False),
        ("https://host.org/{}/x", False),
        ("$HOME/{}/x", False),
        ("/{}-around/x", False),
    ],
)
@pytest.mark.parametrize("folder", ["work", "root", "home/someone", "Users/someone"])
def test_a_path_of_one_machine_is_seen(folder, path, foreign, tmp_path):
    (tmp_path / "notes.md").write_text(f"Look:\n{path.format(folder)}\nand go on")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert machine_paths(tmp_path, ["notes.md", "picture.png"]) == (
        {"notes.md": path.format(folder)[path.index("/{") :]} if foreign else {}
    )
