"""What `palate export` does once its options are read."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_token

from palate.export import export_merged, export_one_step
from palate.export.hub import add_pictures, check_repository, parcel, push, state_of
from palate.export.lora import MAX_SHARD_SIZE, WORKFLOW, write_lora
from palate.runs.folder import RunFolder
from palate.runs.result import adapter_of
from palate.runtime.errors import InputError
from palate.runtime.files import new_folder
from palate.runtime.progress import printable
from palate.runtime.runlock import require_free

_warn = logging.getLogger("palate").warning


class Hub(NamedTuple):
    """Where an export goes besides the disk. dry: only say what would be sent."""

    repository: str
    public: bool = False
    dry: bool = False


def export_run(
    folder: Path, form: str, out: Path | None, *, max_shard_size: str | None = None, hub: Hub | None = None
) -> None:
    """Write the run's result in that form, and say where it lies; then send it to the hub, if asked."""
    if hub is not None:
        check_repository(hub.repository)
        if not hub.dry and get_token() is None:
            raise InputError(
                "--push-to-hub: no token of the hub on this machine; run `hf auth login`, or use --dry-run"
            )
    if max_shard_size is not None and form != "merged":
        raise InputError("--max-shard-size belongs to --format merged")
    target, files = _write(folder, form, out, max_shard_size or MAX_SHARD_SIZE)
    if hub is None:
        return
    files += add_pictures(folder, target)
    sent = parcel(target, hub.repository, files, private=not hub.public, seen=state_of(hub.repository))
    print(printable(("would send to " if hub.dry else "sending to ") + sent.text().split("\n")[0]))
    print("\n".join(printable(line) for line in sent.text().split("\n")[1:]))
    if not hub.dry:
        print(f"sent: {printable(push(target, sent))}")


def _write(folder: Path, form: str, out: Path | None, max_shard_size: str) -> tuple[Path, list[Path]]:
    """Write the export; returns its folder and the files that are its own."""
    run = RunFolder(folder)
    require_free(folder, "its result changes with every step")
    if form == "one-step":
        algorithm = run.recipe.algorithm
        if algorithm.name != "distar":
            raise InputError(f"--format one-step: {algorithm.name} makes no generator; use the run of a distar recipe")
        target, model = out or folder / "export" / form, run.model(_warn, mergeable=True)[0]
        with nullcontext(out) if out is not None else new_folder(target) as whole:
            export_one_step(model, algorithm, whole)
        print(f"pipeline: {printable(str(target))}; its README.md has the call")
        return target, _all_files(target)
    if form == "merged":
        model = run.model(_warn, mergeable=True)[0]
        target = export_merged(folder, model, out, recipe=run.recipe, max_shard_size=max_shard_size)
        print(f"network: {printable(str(target))}")
        return target, _all_files(target)
    if run.recipe.model.weights == "lora":
        adapter_of(folder, lambda: run.model(_warn)[0])
    positive, negative = run.words()
    words = {"positive": ", ".join(positive), "negative": ", ".join(negative)}
    files = write_lora(folder, form, out, words, recipe=run.recipe)
    target = files[0].parent
    print(f"LoRA: {printable(str(files[0]))}")
    if target / WORKFLOW in files:
        print(f"workflow: {printable(str(target / WORKFLOW))}; ComfyUI opens it, or takes it at /prompt")
    return target, files


def _all_files(folder: Path) -> list[Path]:
    """Those of a folder that held nothing before the export."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
