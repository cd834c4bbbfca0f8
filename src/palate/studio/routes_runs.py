"""The list of runs, and what can be taken from them: report, log, export, deletion."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from safetensors.torch import save_file

from palate.export import export_lora, export_merged, read_adapter
from palate.export.names import to_form
from palate.models.facts import facts_of
from palate.report import write_report
from palate.runs.folder import RunFolder
from palate.runtime.errors import InputError
from palate.runtime.exclusive import exclusive
from palate.runtime.files import remove_folder
from palate.runtime.progress import printable
from palate.runtime.runlock import owned, require_free
from palate.runtime.tensors import writing_tensors
from palate.studio.access import POLICY
from palate.studio.artist import LOADING
from palate.studio.shared import go_to, studio_of
from palate.studio.undo import adapter_now

router = APIRouter()
FORMS = ("comfyui", "diffusers", "merged")
REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'self'; form-action 'none'; base-uri 'none'"


@router.get("/runs")
def runs(request: Request) -> HTMLResponse:
    return _listed(request, "runs.html")


@router.get("/runs/list")
def run_list(request: Request) -> HTMLResponse:
    return _listed(request, "runlist.html")


def _listed(request: Request, template: str) -> HTMLResponse:
    studio = studio_of(request)
    views, unreadable = studio.seen()
    return studio.render(request, template, views=views, unreadable=unreadable)


@router.post("/runs/{run}/delete")
def delete(request: Request, run: str, sure: str = Form("")) -> Response:
    """Delete a run that nobody trains."""
    studio = studio_of(request)
    folder = studio.workspace.run(run)
    if studio.processes.owner(run) is not None:
        raise InputError(f"{run} is training; stop it first")
    require_free(folder, "it cannot be deleted")
    if sure != run:
        raise InputError(f"to delete {run} with its checkpoints and pictures, say so in the question that is asked")
    if later := [view.name for view in studio.views() if view.name != run and view.needs(folder)]:
        raise InputError(f"{', '.join(later)} began with the result of {run} and cannot go on without it; delete "
                         f"{'it' if len(later) == 1 else 'them'} first")  # fmt: skip
    if folder.is_symlink():
        raise InputError(f"{run} is a link to another folder; delete it there")
    with exclusive(folder), owned(folder):  # nobody exports or resumes it in another window meanwhile
        remove_folder(folder)
    studio.processes.forget(run)
    with studio.workspace.turn():
        if drawn_from := studio.workspace.settings()["source"] == run:
            studio.workspace.set(source="")
            studio.voting.forget_pair()
    if drawn_from:
        studio.artist.wake()
    return go_to("/runs", request)


@router.get("/runs/{run}/log")
def log(request: Request, run: str) -> Response:
    studio = studio_of(request)
    text = studio.processes.log(studio.workspace.run(run).name).replace("\r", "\n")
    lines = [printable(line) for line in text.splitlines()[-400:]]
    return studio.render(request, "log.html", run=run, lines=lines)


@router.get("/runs/{run}/report")
def report(request: Request, run: str) -> Response:
    """The run's report, written anew, in a frame below the studio's own head: a link inside it could not lead back,
    since to the studio it is a page of another origin."""
    studio = studio_of(request)
    write_report(studio.workspace.run(run))
    page = studio.render(request, "report.html", run=run)
    page.headers["Content-Security-Policy"] = f"{POLICY}; frame-src 'self'"
    return page


@router.get("/runs/{run}/report.html")
def report_file(request: Request, run: str) -> Response:
    """The report as it lies in the run's folder; its scripts run apart from the studio."""
    path = studio_of(request).workspace.run(run) / "report.html"
    if not path.is_file():
        raise InputError(f"{run} has no report yet; open its page Report")
    headers = {"Content-Security-Policy": REPORT_POLICY, "X-Frame-Options": "SAMEORIGIN"}
    return FileResponse(path, media_type="text/html", headers=headers)


@router.post("/runs/{run}/export/{form}")
def export(request: Request, run: str, form: str) -> Response:
    """The run's LoRA as a download: one file for ComfyUI, a zip of the folder for the rest."""
    studio = studio_of(request)
    folder = studio.workspace.run(run)
    if form not in FORMS:
        raise InputError(f"expected one of {', '.join(FORMS)}, got {form[:20]!r}")
    if not (folder / "adapter").is_dir():
        if studio.processes.owner(run) is not None:
            raise InputError(f"{run} is training: it writes its LoRA at the end; stop it, or wait")
        adapter_now(folder)
    makers: dict[str, Callable[[], Path]] = {"merged": lambda: merged(folder)}
    if form == "comfyui" and studio.view(run).recipe.model.name == "emoji":
        makers[form] = lambda: embedded_lora(folder)
    with exclusive(folder):  # another window may ask for the same files
        written = makers.get(form, lambda: export_lora(folder, form))()
        if form != "comfyui":
            return Response(zipped(written, run), media_type="application/zip",
                            headers={"Content-Disposition": f'attachment; filename="{run}-{form}.zip"'})  # fmt: skip
        content = min(written.glob("*.safetensors")).read_bytes()
    return Response(content, media_type="application/octet-stream",
                    headers={"Content-Disposition": f'attachment; filename="{run}.safetensors"'})  # fmt: skip


def merged(folder: Path) -> Path:
    """The run's model with its LoRA in its weights; the folder written to."""
    with LOADING:
        model = RunFolder(folder).model(lambda text: None, mergeable=True)[0]
    return export_merged(folder, model)


def embedded_lora(folder: Path) -> Path:
    """The embedded model's LoRA under the names that ComfyUI reads; the folder written to.

    `palate export` refuses this form, because ComfyUI cannot load the embedded model itself. Here it shows what a run
    of a large model gives; the page says so.
    """
    tensors, extra = to_form(read_adapter(folder / "adapter"), "comfyui", facts_of("emoji"))
    target = folder / "export" / "comfyui"
    target.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    file = target / f"{folder.name}.safetensors"
    with writing_tensors(file):
        save_file(plain, file, {"format": "pt", "palate.family": "emoji", **extra})
    return target


def zipped(folder: Path, name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            archive.write(path, f"{name}/{path.relative_to(folder)}")
    return stream.getvalue()
