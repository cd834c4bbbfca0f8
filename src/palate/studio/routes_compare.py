"""Comparing a result with what it began from, or with another run."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Form, Request
from fastapi.responses import FileResponse, HTMLResponse, Response

from palate.runs.comparison import common_rows
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.studio.comparing import ENOUGH, PAIRS, STRONGEST
from palate.studio.runview import RunView
from palate.studio.shared import Studio, go_to, studio_of

router = APIRouter()


@router.get("/compare")
def compare(request: Request, run: str | None = None, other: str = "", step: int | None = None) -> HTMLResponse:
    studio = studio_of(request)
    views = [view for view in studio.views() if view.previews]
    view = studio.view(run) if run else (views[0] if views else None)
    values: dict[str, object] = {"view": view, "views": views, "other": other, "strongest": STRONGEST, "most": PAIRS,
                                "study": None}  # fmt: skip
    if view is not None:
        second = studio.view(other) if other else None  # LoRAs of two models do not add up
        values["mixes"] = second is not None and second.recipe.model.folder == view.recipe.model.folder
        values |= _wall(view, step, second) | _study(studio, view.name, other)
    return studio.render(request, "compare.html", **values)


def _wall(view: RunView, step: int | None, second: RunView | None = None) -> dict[str, object]:
    """Every previewed prompt at that step, and before training, or as the newest pictures of a second run show it."""
    now = step if step in view.previews else (view.previews[-1] if view.previews else 0)
    first = (second.previews[-1:] if second else view.previews[:1]) or [0]
    before, after = (second or view).pictures(first[0]), view.pictures(now)
    pairs = [  # a resumed run may draw other prompts than before
        {"prompt": before[i]["prompt"], "before": before[i]["file"], "after": after[j]["file"]}
        for i, j in common_rows(before, after)
    ]
    return {"wall": pairs, "at": now, "first": first[0], "beside": second.name if second else ""}


def _study(studio: Studio, run: str, other: str) -> dict[str, object]:
    """The blind study that has begun, if one has; drawing a new one takes a click."""
    try:
        name = studio.comparing.existing(run, other)
    except InputError:
        name = None
    if name is None:
        return {"study": None}
    return {"study": name, **_pair(studio, name)}


def _pair(studio: Studio, name: str) -> dict[str, object]:
    pair = studio.comparing.next(name)
    answers = len(studio.comparing.answers(name))
    return {"pair": pair, "rate": studio.comparing.win_rate(name), "answers": answers, "enough": ENOUGH}


@router.post("/compare/start")
def start(request: Request, run: str = Form(), other: str = Form("")) -> Response:
    studio_of(request).comparing.study(run, other)
    return go_to("/compare", request, run=run, **({"other": other} if other else {}))


@router.post("/compare/answer")
def answer(request: Request, study: str = Form(), number: int = Form(), choice: str = Form()) -> HTMLResponse:
    studio = studio_of(request)
    studio.comparing.answer(study, number, choice)
    return studio.render(request, "blind.html", study=study, **_pair(studio, study))


@router.get("/compare/grid")
def grid(request: Request, run: str, strength: float = 1.0, other: str = "", mix: float = 0.0) -> HTMLResponse:
    """The run's first prompts drawn now, with its LoRA at a strength and mixed with another's."""
    studio = studio_of(request)
    images = studio.comparing.grid(run, strength, other, mix)
    urls = ["data:image/png;base64," + base64.b64encode(content).decode() for content in images]
    return studio.render(request, "grid.html", urls=urls)


@router.get("/sample/{run}/{step}/{file}")
def sample(request: Request, run: str, step: int, file: str) -> Response:
    """A preview's picture."""
    studio = studio_of(request)
    folder = studio.workspace.run(run) / "samples" / checkpoint.name(step)
    path = folder / file
    if path.parent != folder or path.suffix != ".png" or not path.is_file():
        return Response(status_code=404)
    return FileResponse(path, headers={"Cache-Control": "no-cache"})
