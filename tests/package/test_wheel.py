"""The wheel: every file of the package is in it, and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest
from support import ROOT


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_the_command(tmp_path):
    files = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "src/palate").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    source = tmp_path / "source"
    for name in (*files, "pyproject.toml", "README.md", "LICENSE", "NOTICE"):  # a copy: the build leaves files behind
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "-w",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("palate-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        (entry,) = (name for name in held if name.endswith(".dist-info/entry_points.txt"))
        assert "palate = palate.cli:main" in archive.read(entry).decode().splitlines()
    wanted = {name.removeprefix("src/") for name in files}
    for folder in ("assets/emoji/", "assets/emoji-1step/", "assets/prompts/", "recipes/"):
        assert any(name.startswith(f"palate/{folder}") for name in wanted), folder
    assert not sorted(wanted - held)
