"""An export on the Hugging Face hub: what would be sent, and sending it. Private unless it is asked to be public."""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from palate.export.card import CARD, PICTURES, SIDES
from palate.runtime.errors import InputError, first_line
from palate.runtime.files import write_atomically
from palate.runtime.hub import UNREACHED
from palate.runtime.result import evaluation_of

SHOWN = 4  # pairs of pictures on the card
UNKNOWN = "unknown"


class Parcel(NamedTuple):
    """What goes to a repository of the hub."""

    repository: str
    private: bool
    files: list[tuple[str, int]]  # path in the repository, bytes
    seen: str = ""  # what `state_of` says of the repository

    def text(self) -> str:
        """A line for each file, and one for all."""
        total = sum(size for _, size in self.files)
        lines = [f"  {path}  {size:,} bytes" for path, size in self.files]
        new = "private" if self.private else "PUBLIC"
        states = {"": new, UNKNOWN: f"{new} if it is new (the hub could not be asked)"}
        state = states.get(self.seen, f"{self.seen} already")
        return "\n".join([f"{self.repository}, {state}: {len(self.files)} files, {total:,} bytes", *lines])


def check_repository(repository: str) -> None:
    """InputError: that is no id of a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: {first_line(error)}") from error
    if repository.count("/") != 1:
        raise InputError(f"--push-to-hub: expected NAME/REPOSITORY, for example me/my-lora, got {repository!r}")


def parcel(folder: Path, repository: str, files: Iterable[Path], *, private: bool = True, seen: str = "") -> Parcel:
    """What would be sent: those files of an export's folder, and nothing else that lies there."""
    check_repository(repository)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return Parcel(repository, private, sorted(sizes.items()), seen)


def state_of(repository: str, *, api: HfApi | None = None) -> str:
    """Who sees the repository: "private" or "PUBLIC" as the hub says; "" where this token finds none, UNKNOWN where the
    hub is out of reach."""
    try:
        found = (api or HfApi()).repo_info(repository, repo_type="model", timeout=10)
    except RepositoryNotFoundError:
        return ""
    except UNREACHED:
        return UNKNOWN
    return "private" if found.private else "PUBLIC"


def add_pictures(run: Path, folder: Path) -> list[Path]:
    """Put the first pairs of the run's evaluation beside the export and on its card; their files. None where there is
    no evaluation, or the result has changed since."""
    evaluation = evaluation_of(run)
    if evaluation is None or evaluation["outdated"]:
        return []
    sides = [run / "evaluation" / side for side in SIDES]
    names = [path.name for path in sorted(sides[1].glob("*.png")) if (sides[0] / path.name).is_file()][:SHOWN]
    if not names:
        return []
    rows, files = ["", "## Pictures", "", "| before | after |", "|---|---|"], []
    for name in names:
        cells = []
        for side in sides:
            target = folder / PICTURES / f"{side.name}-{name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(side / name, target)
            files.append(target)
            cells.append(f"![{side.name}]({PICTURES}/{target.name})")
        rows.append(f"| {' | '.join(cells)} |")
    card = folder / CARD
    text = card.read_text("utf-8")
    if "## Pictures" not in text:
        write_atomically(card, (text.rstrip("\n") + "\n" + "\n".join([*rows, ""])).encode())
    return files


def push(folder: Path, sent: Parcel, *, api: HfApi | None = None) -> str:
    """Create the repository if it is not there, and upload the parcel's files in one commit, which takes away the
    pictures of an earlier one; the address of the repository.

    InputError: there is no token, or the hub refuses.
    """
    if api is None and get_token() is None:
        raise InputError(
            "--push-to-hub: this machine has no token of the hub; run `hf auth login`, or set HF_TOKEN. "
            "--dry-run shows what would be sent"
        )
    hub = api or HfApi()
    try:
        made = hub.create_repo(sent.repository, private=sent.private, exist_ok=True, repo_type="model")
        hub.upload_folder(
            repo_id=sent.repository,
            folder_path=folder,
            repo_type="model",
            commit_message="Upload of palate export",
            allow_patterns=[glob.escape(path) for path, _ in sent.files],
            delete_patterns=[f"{PICTURES}/{side}-*.png" for side in SIDES],
        )
    except UNREACHED as error:
        raise InputError(f"--push-to-hub {sent.repository}: the hub refused ({first_line(error)})") from error
    return str(made)
