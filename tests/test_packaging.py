"""What the wheel holds, and what the repository must not."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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


@pytest.mark.checkout
def test_no_file_names_a_package_registry():
    host = re.compile(
        r"(index-url|find-links|trusted-host)|https?://[^\s)\"']*(pypi|pythonhosted|npmjs|jfrog|artifactory)"
    )
    for path in committed_or_new():
        if (ROOT / path).suffix in TEXT and path != "tests/test_packaging.py":
            found = host.search((ROOT / path).read_text(errors="ignore"))
            assert found is None, f"{path}: {found.group()}"
