"""Imports point one way, and importing does no work."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from checkout import ROOT

import dfa2_jax
import pallas_kernels

PACKAGES = {package.__name__: Path(package.__file__).parent for package in (dfa2_jax, pallas_kernels)}

TOOLS = {name: ROOT / name for name in ("benchmarks", "toy")}

WINGS = (
    "dfa2_jax.__main__",
    "dfa2_jax.cli",
    "dfa2_jax.commands",
    "dfa2_jax",  # the public names
    "dfa2_jax.report",
    "dfa2_jax.calibration",
    "dfa2_jax.conversion",
    "dfa2_jax.pipeline",
    "dfa2_jax.families",
    "dfa2_jax.sampling",
    "dfa2_jax.options",
    "dfa2_jax.demo",
    "dfa2_jax.encoders",
    "dfa2_jax.vae",
    "dfa2_jax.parallel",
    "dfa2_jax.nn",
    "dfa2_jax.plan",
    "dfa2_jax.weights",
    "dfa2_jax.io",
    "pallas_kernels.inspect",  # reads compiled programs; nothing in production imports it
    "pallas_kernels",  # the public names
    "pallas_kernels.api",
    "pallas_kernels.products",
    "pallas_kernels.passes",
    "pallas_kernels.devices",
    "pallas_kernels.cost",
    "pallas_kernels.backends",
    "pallas_kernels.checks",
    "pallas_kernels.mask",
    "pallas_kernels.layout",
)
"""From the roof down: a wing imports itself and what stands below it."""

PUBLIC = ("dfa2_jax", "pallas_kernels")
"""Modules of public names. Others may import these names, which come from below."""

SHARED = {
    "dfa2_jax.families": {"base", "registry"},
    "pallas_kernels.backends": {
        "base",
        "passes",
        "product",
        "registry",
        "kernel_types",
        "triton",
    },  # jax_triton has Triton's tiles
}
"""Rooms of a wing that all other rooms may enter, or that enter all: a family imports no other family."""


def modules(packages=PACKAGES):
    for name, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((name, *parts)).removesuffix(".__init__"), path


KNOWN = {name for name, _ in modules(PACKAGES | TOOLS)}


def under(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


def wing(module):
    exact = [name for name in WINGS if under(module, name) and (name not in PUBLIC or module == name)]
    assert exact, f"{module} stands in no wing: give it a place in WINGS"
    return max(exact, key=len)


def imports(tree, packages=PACKAGES):
    """Our modules that a tree imports, and where: "top", "inside" a function, or for "types" alone."""
    place = {id(node): "top" for node in tree.body}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            place |= {id(nested): "types" for nested in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide which wing they come from"
            below = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [node.module, *(name for name in below if name in KNOWN)]
        else:
            continue
        yield from ((name, place.get(id(node), "inside")) for name in names if name.split(".")[0] in packages)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(name, path):
    place = WINGS.index(wing(name))
    inside = {module for module, _ in imports(ast.parse(path.read_text()))} - {*PUBLIC}
    wrong = [module for module in inside if WINGS.index(wing(module)) < place]
    assert not wrong, f"{name} must not import {wrong}, which stand above it"
    assert under(name, "pallas_kernels.inspect") or not any(
        under(module, "pallas_kernels.inspect") for module in inside
    )


@pytest.mark.parametrize("wing_name", SHARED)
def test_rooms_know_their_own_alone(wing_name):
    depth = wing_name.count(".") + 1
    for name, path in modules():
        room = name.split(".")[depth : depth + 1]
        if not under(name, wing_name) or not room or room[0] in SHARED[wing_name]:
            continue
        for module, _ in imports(ast.parse(path.read_text())):
            if under(module, wing_name):
                other = module.split(".")[depth]
                assert other in {*SHARED[wing_name], *room}, f"{name} imports {module}"


LATE = {
    "pallas_kernels.backends.jax_triton.backend": "needs jax-triton, an extra, only where its kernel runs",
    "pallas_kernels.backends.mosaic.backend": "needs jax 0.11 only where its kernels run",
    "pallas_kernels.backends.triton.backend": "needs Pallas's Triton, which JAX will drop, only where its kernels run",
}
"""Modules that import ours inside of functions, and why."""


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_stand_at_the_top(name, path):
    inside = [module for module, place in imports(ast.parse(path.read_text())) if place == "inside"]
    assert name in LATE or not inside, f"{name} imports {inside} inside of functions"


EXTRAS = {"matplotlib", "skimage"}
"""What the package imports where it is used: not everybody has installed them (`io.extras.need`)."""


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_what_others_made_is_imported_at_the_top_but_for_extras(name, path):
    tree = ast.parse(path.read_text())
    inside = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    wrong = inside - {*PACKAGES} - EXTRAS - ({"jax"} if name in LATE else set())
    assert not wrong, f"{name} imports {wrong} inside of functions"


@pytest.mark.checkout
@pytest.mark.parametrize("packages", [PACKAGES, TOOLS], ids=["packages", "tools"])
def test_no_circles(packages):
    """Module by module, also within a wing."""
    paths = dict(modules(packages))
    trees = {name: ast.parse(path.read_text()) for name, path in paths.items()}
    graph = {
        name: {module for module, place in imports(tree, packages) if place != "types" and module in paths} - {name}
        for name, tree in trees.items()
    }
    while leaves := [name for name, below in graph.items() if not below]:
        graph = {name: below - {*leaves} for name, below in graph.items() if name not in leaves}
    assert not graph, f"a circle among {sorted(graph)}"


def test_importing_does_no_work():
    """Every module, in a fresh process: no backend, no change to JAX's configuration, none of the heavy libraries."""
    missing = {"pallas_kernels.backends.jax_triton.arrow"} if find_spec("jax_triton") is None else set()
    names = [name for name, _ in modules() if not name.endswith("__main__") and name not in missing]
    code = f"""
import importlib, sys, jax
before = dict(jax.config.values)
for name in {names}:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was initialised"
changed = {{key: value for key, value in jax.config.values.items() if before.get(key, value) != value}}
assert not changed, changed
heavy = {{"torch", "transformers", "diffusers", "safetensors", "httpx", "requests"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
