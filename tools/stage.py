"""A stage on which new assets are built while the package keeps those that it ships.

    python tools/stage.py .cache/stage
    PYTHONPATH=.cache/stage python tools/build_atlas.py          # and every other tool: they read and write there
    python tools/stage.py .cache/stage --take                    # the stage's assets replace the package's

The stage is a package `palate` made of links to the sources, with an assets folder of its own. Making it again renews
the links, copies the licences and prompts that it lacks, and keeps what it has. Its assets may be a link to a folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "src/palate"


def build(stage: Path) -> Path:
    """Make or renew the stage; its assets folder."""
    package = stage.absolute() / "palate"
    assets = package / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for link in package.iterdir():
        if link.is_symlink() and link.name != "assets":
            link.unlink()
    for part in PACKAGE.iterdir():
        if part.name not in ("assets", "__pycache__"):
            (package / part.name).symlink_to(part)
    for name in ("licences", "prompts"):
        (assets / name).mkdir(exist_ok=True)
        for file in (PACKAGE / "assets" / name).iterdir():
            if not (assets / name / file.name).exists():
                shutil.copy(file, assets / name)
    return assets


def take(stage: Path) -> list[str]:
    """Put every folder and file of the stage's assets in the place of the package's; their names.

    All may read them afterwards: weights are written for their owner alone.
    """
    taken = []
    for part in sorted(build(stage).iterdir()):
        target = PACKAGE / "assets" / part.name
        if part.is_dir():
            draft = target.with_name(f".tmp-{target.name}")
            shutil.rmtree(draft, ignore_errors=True)
            try:
                shutil.copytree(part, draft)  # whole, before what is there goes
                shutil.rmtree(target, ignore_errors=True)
                draft.rename(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        else:
            shutil.copy(part, target)
        for path in [target, *target.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        taken.append(part.name)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", type=Path)
    parser.add_argument("--take", action="store_true", help="replace the package's assets by the stage's")
    args = parser.parse_args()
    print(f"taken: {', '.join(take(args.stage))}" if args.take else build(args.stage))


if __name__ == "__main__":
    main()
