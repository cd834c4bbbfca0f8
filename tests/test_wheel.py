"""The wheel: every tracked file of the package is in it, and the command."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tracked():
    """What git tracks of the package."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the package is not known")
    done = subprocess.run(["git", "ls-files", "-z", "src"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"git ls-files: {done.stderr.strip()[:200]}")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_wheel_holds_every_tracked_file_and_the_command(tmp_path, tracked):
    if missing := [name for name in ("pip", "setuptools") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed here, so no wheel can be built without the network")
    source = tmp_path / "source"
    for name in (*tracked, "pyproject.toml", "README.md", "LICENSE", "NOTICE"):  # a copy: the build leaves files behind
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "-w", str(tmp_path)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("palate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry,) = (name for name in held if name.endswith(".dist-info/entry_points.txt"))
        assert "palate = palate.cli:main" in archive.read(entry).decode().splitlines()
    wanted = {name.removeprefix("src/") for name in tracked if name.startswith("src/palate/")}
    for folder in ("assets/emoji/", "assets/emoji-1step/", "assets/prompts/", "recipes/"):
        assert any(name.startswith(f"palate/{folder}") for name in wanted), folder
    assert not sorted(wanted - held)
