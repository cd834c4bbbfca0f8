"""Does a change of the code leave every number as it was? Three steps each of five recipes, as digests.

    python benchmarks/same_numbers.py record before.json        # on the old commit
    python benchmarks/same_numbers.py compare before.json       # on the new one: exit 1 and the differences, if any

A digest covers metrics.jsonl without its `_seconds` fields, every tensor of the newest checkpoint (name, type, shape,
bytes) and every PNG. Numbers are comparable on one machine, with one version of torch and one number of threads
(`--threads`, 1 by default): records of different machines differ in the last bit and mean nothing to each other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

PREVIEWS = ["trainer.preview_every=3", "trainer.preview_prompts=2"]
GUARDED = ["trainer.guard.every=3", "trainer.guard.prompts=4"]
RUNS: dict[str, list[str]] = {
    "srpo-emoji": ["trainer.steps=3", "trainer.batch_size=4", *PREVIEWS, *GUARDED],
    "sqdf-emoji": ["trainer.steps=3", "trainer.batch_size=4", *PREVIEWS, *GUARDED],
    "distar-emoji-quick": ["trainer.steps=3", "trainer.batch_size=4", *PREVIEWS, *GUARDED],
    "grpo-emoji": ["trainer.steps=3", "trainer.batch_size=2", "algorithm.group=4", *PREVIEWS, *GUARDED],
    "optimize-emoji": [
        "trainer.steps=3",
        "trainer.batch_size=4",
        "optimize.oracle.name=jpeg-size",
        "optimize.budget=64",
        "optimize.rounds=2",
    ],
}


def run_recipe(name: str, overrides: list[str], folder: Path, threads: int) -> dict[str, str]:
    """Trains `name` into `folder` in a process of its own; returns the digest of each thing that it wrote."""
    command = "optimize" if name.startswith("optimize") else "train"
    settings = [f"run.folder={folder}", f"trainer.threads={threads}", "trainer.checkpoint_every=3", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(
        [sys.executable, "-m", "palate", command, name, *settings],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise SystemExit(f"{name}: exit {process.returncode}\n{process.stdout}\n{process.stderr}")
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each log without its times, of each checkpoint's and adapter's tensors, of each picture."""
    found = {}
    for log in sorted(folder.rglob("*.jsonl")):
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        kept = [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]
        found[log.relative_to(folder).as_posix()] = _sha(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.rglob("*.safetensors")):
        found[file.relative_to(folder).as_posix()] = tensors_digest(file)
    for picture in sorted(path for path in folder.rglob("*.png") if path.name != "grid.png"):
        found[picture.relative_to(folder).as_posix()] = _sha(picture.read_bytes())
    if not found:
        raise SystemExit(f"{folder}: nothing was written")
    return found


def tensors_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with safe_open(file, framework="pt") as opened:
        for key in sorted(opened.keys()):
            tensor = opened.get_tensor(key).contiguous()
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line for each thing that is not the same in both records."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        lines += [f"{name}: {key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return lines


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        now = {name: run_recipe(name, RUNS[name], Path(temporary) / name, given.threads) for name in given.only}
    if given.action == "record":
        given.file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", "utf-8")
        print(f"{sum(map(len, now.values()))} digests of {len(now)} recipes in {given.file}")
        return
    before = json.loads(given.file.read_text("utf-8"))
    changed = differences({name: before[name] for name in given.only}, now)
    print("\n".join(["these differ:", *changed]) if changed else f"{sum(map(len, now.values()))} digests: all equal")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
