"""An export on the Hugging Face hub: what would be sent, and sending it. Private unless it is asked to be public."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from palate.runtime.errors import InputError
from palate.runtime.files import write_atomically

SHOWN = 4  # pairs of pictures on the card
PICTURES = "pictures"


class Parcel(NamedTuple):
    """What goes to a repository of the hub."""

    repository: str
    private: bool
    files: list[tuple[str, int]]  # path in the repository, bytes

    def text(self) -> str:
        """A line for each file, and one for all."""
        total = sum(size for _, size in self.files)
        lines = [f"  {path}  {size:,} bytes" for path, size in self.files]
        return "\n".join(
            [f"{self.repository}, {'private' if self.private else 'PUBLIC'}: {len(self.files)} files, {total:,} bytes",
             *lines]
        )  # fmt: skip


def check_repository(repository: str) -> None:
    """InputError: that is no id of a repository."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: {str(error).splitlines()[0]}") from error
    if repository.count("/") != 1:
        raise InputError(f"--push-to-hub: expected NAME/REPOSITORY, for example me/my-lora, got {repository!r}")


def parcel(folder: Path, repository: str, *, private: bool = True) -> Parcel:
    """What would be sent of an export's folder."""
    check_repository(repository)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Parcel(repository, private, [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files])


def add_pictures(run: Path, folder: Path) -> int:
    """Put the first pairs of the run's evaluation beside the export and on its card; how many there are."""
    sides = [run / "evaluation" / side for side in ("base", "result")]
    names = [path.name for path in sorted(sides[1].glob("*.png")) if (sides[0] / path.name).is_file()][:SHOWN]
    if not names:
        return 0
    rows = ["", "## Pictures", "", "| before | after |", "|---|---|"]
    for name in names:
        cells = []
        for side in sides:
            target = folder / PICTURES / f"{side.name}-{name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(side / name, target)
            cells.append(f"![{side.name}]({PICTURES}/{target.name})")
        rows.append(f"| {' | '.join(cells)} |")
    card = folder / "README.md"
    text = card.read_text("utf-8")
    if "## Pictures" not in text:
        write_atomically(card, (text.rstrip("\n") + "\n" + "\n".join([*rows, ""])).encode())
    return len(names)


def push(folder: Path, sent: Parcel, *, api: HfApi | None = None) -> str:
    """Create the repository if it is not there, and upload the folder in one commit; the address of the repository.

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
            repo_id=sent.repository, folder_path=folder, repo_type="model", commit_message="Upload of palate export"
        )
    except (HfHubHTTPError, OSError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"--push-to-hub {sent.repository}: the hub refused ({why})") from error
    return str(made)
