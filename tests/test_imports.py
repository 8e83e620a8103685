"""Imports point one way, and importing does no work."""

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import convert
import dfa2_jax
import pallas_kernels

PACKAGES = {package.__name__: Path(package.__file__).parent for package in (convert, dfa2_jax, pallas_kernels)}

# module -> what it may import of ours; a name covers what is under it
ALLOWED = {
    "pallas_kernels": ["pallas_kernels"],
    "convert": ["convert", "dfa2_jax.models", "dfa2_jax.checkpoint", "dfa2_jax.faults"],
    "dfa2_jax.models": ["dfa2_jax.models", "pallas_kernels.layout"],
    "dfa2_jax.models.attention": ["dfa2_jax.models.layers", "pallas_kernels"],
    "dfa2_jax.faults": [],
    "dfa2_jax.files": [],
    "dfa2_jax.timing": [],
    "dfa2_jax.setting": ["pallas_kernels.layout"],
    "dfa2_jax.plan": [
        *("dfa2_jax.faults", "dfa2_jax.files", "dfa2_jax.setting"),
        *("pallas_kernels.layout", "pallas_kernels.mask"),
    ],
    "dfa2_jax.caches": [],
    "dfa2_jax.output": ["dfa2_jax.plan", "dfa2_jax.request", "dfa2_jax.sampling"],
    "dfa2_jax.networks": ["dfa2_jax.checkpoint", "dfa2_jax.tokenizers"],
    "dfa2_jax.plan_view": ["dfa2_jax.files", "dfa2_jax.plan", "pallas_kernels.layout", "pallas_kernels.mask"],
    "dfa2_jax.progress": ["dfa2_jax.faults", "dfa2_jax.files", "dfa2_jax.plan"],
    "dfa2_jax.search": [],
    "dfa2_jax.calibration": [
        *(f"dfa2_jax.{name}" for name in ("models.attention", "pipeline", "plan", "progress", "sampling", "setting")),
        *("dfa2_jax.search", "dfa2_jax.models.layers", "pallas_kernels.layout", "pallas_kernels.mask"),
    ],
    "dfa2_jax.checkpoint": ["dfa2_jax.faults", "dfa2_jax.schedule", "dfa2_jax.tokenizers"],
    "dfa2_jax.tokenizers": [],
    "dfa2_jax.schedule": [],
    "dfa2_jax.sampling": ["dfa2_jax.models", "pallas_kernels.layout"],
    "dfa2_jax.families": ["dfa2_jax.models", "dfa2_jax.schedule"],
    "dfa2_jax.request": ["dfa2_jax.families"],
    "dfa2_jax.pipeline": [
        *(f"dfa2_jax.{name}" for name in ("caches", "checkpoint", "families", "models", "networks", "output")),
        *(f"dfa2_jax.{name}" for name in ("plan", "request", "sampling", "schedule", "setting", "timing")),
    ],
    "dfa2_jax.baselines": [
        *(f"dfa2_jax.{name}" for name in ("caches", "calibration", "models.attention", "pipeline", "plan", "sampling")),
        *("dfa2_jax.search", "pallas_kernels.layout", "pallas_kernels.mask"),
    ],
    "dfa2_jax.quality": [],
    "dfa2_jax.arithmetic": [
        *("dfa2_jax.models.attention", "dfa2_jax.networks", "dfa2_jax.sampling", "pallas_kernels.layout"),
    ],
    "dfa2_jax.heads": [
        *(f"dfa2_jax.{name}" for name in ("models.attention", "pipeline", "plan", "plan_view", "sampling")),
        "pallas_kernels.layout",
    ],
    "dfa2_jax.report_page": ["dfa2_jax.quality"],
    "dfa2_jax.report_table": [
        *(f"dfa2_jax.{name}" for name in ("arithmetic", "files", "heads", "plan", "quality", "report_page")),
    ],
    "dfa2_jax.report": [
        *(f"dfa2_jax.{name}" for name in ("calibration", "heads", "models.attention", "pipeline", "plan", "quality")),
        *("dfa2_jax.arithmetic", "dfa2_jax.report_table"),
    ],
    "dfa2_jax.cli": [
        *("dfa2_jax.models.attention", "dfa2_jax.pipeline", "dfa2_jax.checkpoint", "dfa2_jax.files"),
        *("dfa2_jax.calibration", "dfa2_jax.plan", "dfa2_jax.plan_view", "dfa2_jax.report", "dfa2_jax.report_table"),
    ],
    "dfa2_jax": [
        *("dfa2_jax.pipeline", "dfa2_jax.output", "dfa2_jax.faults", "dfa2_jax.calibration", "dfa2_jax.plan"),
        *("dfa2_jax.report", "dfa2_jax.report_table"),
    ],
}


def modules():
    for name, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((name, *parts)).removesuffix(".__init__"), path


def ours(name, package, tree, *, nested):
    """Our modules that a tree imports at its top level, or only inside functions (`nested`)."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom) or (id(node) in top) == nested:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found = [".".join([*base, *([node.module] if node.module else [])])]
            if node.level and not node.module:
                found = [".".join([*base, alias.name]) for alias in node.names]
        yield from (module for module in found if module.split(".")[0] in PACKAGES)


def under(module, allowed):
    return any(module == prefix or module.startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_one_way(name, path):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    rule = max((rule for rule in ALLOWED if under(name, [rule])), key=len)
    assert rule != "dfa2_jax" or name == "dfa2_jax", f"{name} is new: say in ALLOWED what it may import"
    tree = ast.parse(path.read_text())
    wrong = [module for module in ours(name, package, tree, nested=False) if not under(module, ALLOWED[rule])]
    assert not wrong, f"{name} must not import {wrong}"
    inside = {"dfa2_jax.checkpoint": ["convert", "dfa2_jax.models"]}.get(name, ALLOWED[rule])
    wrong = [module for module in ours(name, package, tree, nested=True) if not under(module, inside)]
    assert not wrong, f"{name} must not import {wrong}, even inside functions"


def test_importing_does_no_work():
    """Every module, in a fresh process: no backend, no change to JAX's configuration, none of the heavy libraries."""
    missing = {"pallas_kernels.jax_triton"} if find_spec("jax_triton") is None else set()
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
heavy = {{"torch", "transformers", "diffusers", "safetensors", "huggingface_hub"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
