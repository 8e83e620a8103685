"""Rules of the house: files of at most 400 lines, functions of at most 60, whole writes, no path of one machine."""

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

PLAIN_WRITES = {
    ("dfa2_jax/conversion.py", "write_chunk"): "in a folder that appears as a whole",
    ("dfa2_jax/conversion.py", "write_config"): "in a folder that appears as a whole",
    ("pallas_kernels/inspect/sass.py", "disassemble"): "in a temporary folder",
    ("benchmarks/convert.py", "write_plainly"): "is what is measured",
}
"""Functions that write files in another way than by `dfa2_jax.io.atomic`, and why."""

WRITERS = {"write_text", "write_bytes", "tofile", "save_file", "savez", "savez_compressed", "savetxt"}
WRITING = re.compile(r"[rbt]*[wax+][bt+]*")
"""A mode of `open`."""

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


def writes_plainly(call):
    """Whether a call writes a file that others see half-written. A figure goes to a `file` that is open."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name == "open":
        return any(WRITING.fullmatch(str(getattr(argument, "value", ""))) for argument in arguments)
    if name == "savefig":
        return "file" not in ast.unparse(arguments[0])
    return name in WRITERS or ast.unparse(call.func) in ("np.save", "numpy.save")


def plain_writes(root, names):
    """By file and innermost function."""
    found = set()
    for name in names:
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and writes_plainly(call):
                around = [f for f in functions if f.lineno <= call.lineno <= f.end_lineno]
                found.add((name, max(around, key=lambda f: f.lineno).name if around else ""))
    return found


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
def test_files_are_written_as_a_whole():
    folders = ("dfa2_jax/", "pallas_kernels/", "convert/", "toy/", "benchmarks/")
    names = [name for name in listed() if name.endswith(".py") and name.startswith(folders)]
    written = plain_writes(ROOT, [name for name in names if name != "dfa2_jax/io/atomic.py"])
    assert written == {*PLAIN_WRITES}, "use dfa2_jax.io.atomic.replacing or write_whole"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("path.write_text('')", True),
        ("open(path, 'w')", True),
        ("path.open(mode='xb')", True),
        ("path.open('r+b')", True),
        ("np.save(path, x)", True),
        ("figure.savefig(path)", True),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("figure.savefig(file, format='png')", False),
        ("plan.save(path)", False),
    ],
)
def test_a_plain_write_is_seen(line, seen, tmp_path):
    (tmp_path / "file.py").write_text(f"def outer():\n    def inner():\n        {line}\n")
    assert plain_writes(tmp_path, ["file.py"]) == ({("file.py", "inner")} if seen else set())


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
