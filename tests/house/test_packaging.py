"""What the wheel holds, and what the repository must not."""

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest
from checkout import ROOT

import dfa2_jax

PACKAGES = {"dfa2_jax", "pallas_kernels"}
TEXT = {"", ".cfg", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".txtpb", ".yaml", ".yml"}


def committed_or_new():
    """Paths from the root of every file that git would keep."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.split("\0") if (ROOT / path).is_file()]


@pytest.mark.checkout
def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path):
    files = committed_or_new()
    for path in files:  # a copy: setuptools packs what an earlier build left in build/lib
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / "source" / path)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == PACKAGES
    assert sorted(names) == sorted(path for path in files if path.split("/")[0] in PACKAGES)
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names and f"{package}/py.typed" in names
    metadata = f"dfa2_jax-{dfa2_jax.__version__}.dist-info/METADATA"
    said = message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    assert said["Version"] == dfa2_jax.__version__ and said["Keywords"] and said["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in said.get_all("Classifier") and said.get_all("Project-URL")
    targets = re.findall(r"\]\(([^)]*)\)", said.get_payload())
    assert targets and all(target.startswith("https://") for target in targets), "a package index has no other files"
    required = [line for line in said.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in required if line.startswith(("matplotlib", "scikit-image", "scipy", "torch"))]
    assert {"report", "plots", "quality"} <= {*said.get_all("Provides-Extra")}


def test_public_names():
    """They are listed once each, and come from their modules when they are asked for."""
    code = """
import sys, dfa2_jax
assert not {"jax", "numpy"} & {*sys.modules}, "import dfa2_jax does work"
assert {*dfa2_jax.__all__} <= {*dir(dfa2_jax)}
from dfa2_jax import *
assert Plan is dfa2_jax.Plan and Pipeline.__module__ == "dfa2_jax.pipeline.pipeline"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {*dfa2_jax.__all__} == {*dfa2_jax._MODULES, "__version__"}
    assert sorted(dfa2_jax.__all__) == sorted({*dfa2_jax.__all__})
    for name in dfa2_jax.__all__:
        assert getattr(dfa2_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        _ = dfa2_jax.Pipelin
    assert dfa2_jax.__version__ == version("dfa2-jax")


def test_type_checkers_see_the_names_that_programs_get():
    block = Path(dfa2_jax.__file__).read_text().partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    seen = re.findall(r"from (\S+) import (\S+) as (\S+)", block)
    assert all(name == again for _, name, again in seen)
    assert {name: module for module, name, _ in seen} == dfa2_jax._MODULES


@pytest.mark.checkout
def test_every_target_that_pages_name_has_a_rule():
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / ".ci" / "run"]
    target = re.compile(r"(?:^|`)make ([a-z][\w-]*)(?![\w/-])", re.MULTILINE)
    named = {name for page in pages for name in target.findall(page.read_text())}
    assert named and named <= rules
    phony = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert {*phony[1].split()} <= rules


@pytest.mark.checkout
def test_no_file_names_a_package_registry():
    host = re.compile(
        r"(index-url|find-links|trusted-host)|https?://[^\s)\"']*(pypi|pythonhosted|npmjs|jfrog|artifactory)"
    )
    for path in committed_or_new():
        if (ROOT / path).suffix in TEXT and path != "tests/house/test_packaging.py":
            named = host.search((ROOT / path).read_text(errors="ignore"))
            assert named is None, f"{path}: {named.group()}"
