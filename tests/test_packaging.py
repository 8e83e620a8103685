"""What the wheel holds, and what the repository must not."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.checkout, pytest.mark.torch]  # needs the repository, and the build tools beside torch

ROOT = Path(__file__).parent.parent
PACKAGES = {"convert", "dfa2_jax", "pallas_kernels"}


def tracked():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / file for file in files if (ROOT / file).is_file()]


def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == PACKAGES
    source = {path.relative_to(ROOT).as_posix() for path in tracked()}
    wanted = {name for name in source if name.split("/")[0] in PACKAGES}
    assert {name for name in names if name.split("/")[0] in PACKAGES} == wanted


def test_convert_resolves_beside_dfa2_jax():
    """Another distribution owns the name `convert` too: with both installed, ours must win, or fail here."""
    import convert
    import dfa2_jax

    assert Path(convert.__file__).parent.parent == Path(dfa2_jax.__file__).parent.parent


def test_no_file_names_a_package_registry():
    host = re.compile(r"(index-url|find-links)|https?://[^\s)\"']*(pypi|pythonhosted|registry\.npm|jfrog|artifactory)")
    for path in tracked():
        if path.suffix in {".py", ".toml", ".txt", ".md", ".sh", ".yml", ".yaml", ".cfg", ""} and path != Path(__file__):
            found = host.search(path.read_text(errors="ignore"))
            assert found is None, f"{path.relative_to(ROOT)}: {found.group()}"
