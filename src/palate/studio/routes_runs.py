"""The list of runs, and what can be taken from them: report, log, export, deletion."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response

from palate.export import WEIGHTS, export_lora, export_merged
from palate.report import write_report
from palate.runs import trained_model
from palate.runtime.errors import InputError
from palate.runtime.progress import printable
from palate.runtime.runlock import require_free
from palate.studio.shared import go_to, studio_of
from palate.studio.undo import make_result

router = APIRouter()
FORMS = ("comfyui", "diffusers", "merged")
REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'none'; form-action 'none'; base-uri 'none'"


@router.get("/runs")
def runs(request: Request) -> HTMLResponse:
    studio = studio_of(request)
    return studio.render(request, "runs.html", views=studio.views())


@router.get("/runs/list")
def run_list(request: Request) -> HTMLResponse:
    studio = studio_of(request)
    return studio.render(request, "runlist.html", views=studio.views())


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
    if folder.is_symlink():
        raise InputError(f"{run} is a link to another folder; delete it there")
    shutil.rmtree(folder)
    if studio.workspace.settings()["source"] == run:
        studio.workspace.set(source="")
        studio.artist.wake()
    return go_to("/runs", request)


@router.get("/runs/{run}/log")
def log(request: Request, run: str) -> Response:
    studio = studio_of(request)
    text = studio.processes.log(studio.workspace.run(run).name).replace("\r", "\n")
    lines = [printable(line) for line in text.splitlines()[-400:]]
    return PlainTextResponse("\n".join(lines) or "This run was not started here, or has printed nothing.")


@router.get("/runs/{run}/report")
def report(request: Request, run: str) -> Response:
    """The run's page, written anew; its scripts run apart from the studio."""
    folder = studio_of(request).workspace.run(run)
    path = write_report(folder)
    return FileResponse(path, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})


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
        make_result(folder)
    target = folder / "export" / form
    makers: dict[str, Callable[[], Path]] = {
        "merged": lambda: export_merged(folder, trained_model(folder, warn=lambda text: None)[0]),
    }
    if form == "merged" and target.exists():
        shutil.rmtree(target)
    written = makers.get(form, lambda: export_lora(folder, form))()
    if form == "comfyui":
        files = sorted(written.glob("*.safetensors"))
        return FileResponse(files[0] if files else written / WEIGHTS, media_type="application/octet-stream",
                            filename=f"{run}.safetensors")  # fmt: skip
    return Response(zipped(written, run), media_type="application/zip",
                    headers={"Content-Disposition": f'attachment; filename="{run}-{form}.zip"'})  # fmt: skip


def zipped(folder: Path, name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(path, f"{name}/{path.relative_to(folder)}")
    return stream.getvalue()
