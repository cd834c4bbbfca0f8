"""Choosing between pictures."""

from __future__ import annotations

import json
import re
from typing import Annotated

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import FileResponse, HTMLResponse, Response

from palate.models.vocabulary import known_words
from palate.runtime.errors import InputError
from palate.runtime.files import split_lines
from palate.studio.artist import png_of
from palate.studio.shared import Studio, go_to, studio_of
from palate.studio.steering import one_line
from palate.studio.workspace import MODES
from palate.taste.card import GOOD, START

router = APIRouter()
PICTURE = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp|bmp)")
OWN_PROMPTS = 40
PLAIN = "-"  # no name of a run begins so; a form cannot tell an empty field from none
UPLOADED = 100  # pictures at once


@router.get("/choose")
def choose(request: Request) -> HTMLResponse:
    studio = studio_of(request)
    return studio.render(request, "choose.html", settings=studio.workspace.settings(), sources=_sources(studio),
                         **_pair(request))  # fmt: skip


def _sources(studio: Studio) -> list[str]:
    """The runs whose pictures can be chosen among: those of earlier rounds that are still there."""
    there = studio.workspace.names()
    return [run for run in studio.workspace.rounds() if run in there]


def _pair(request: Request) -> dict[str, object]:
    studio = studio_of(request)
    pair = studio.voting.pair() if studio.artist.ready.is_set() else None
    return {"pair": pair, "votes": len(studio.voting.votes()), "problem": studio.artist.problem, "start": START,
            "good": GOOD}  # fmt: skip


@router.get("/choose/pair")
def pair(request: Request) -> HTMLResponse:
    return studio_of(request).render(request, "pair.html", **_pair(request))


@router.post("/choose/vote")
def vote(request: Request, pair: str = Form(), choice: str = Form(), ms: int | None = Form(None)) -> HTMLResponse:
    studio_of(request).voting.vote(pair, choice, ms)
    return _voted(request)


@router.post("/choose/undo")
def undo(request: Request) -> HTMLResponse:
    studio_of(request).voting.undo()
    return _voted(request)


def _voted(request: Request) -> HTMLResponse:
    answer = studio_of(request).render(request, "pair.html", **_pair(request))
    answer.headers["HX-Trigger"] = "voted"  # the taste below is computed anew
    return answer


@router.get("/choose/taste")
def taste(request: Request) -> HTMLResponse:
    studio = studio_of(request)
    return studio.render(request, "taste.html", summary=studio.voting.summary())


@router.post("/choose/settings")
def settings(
    request: Request, mode: str = Form("fresh"), prompts: str = Form(""), source: str = Form(""), seen: str = Form("")
) -> Response:
    """How pairs are chosen, prompts of one's own, one per line (words that the model does not know are refused), and
    whose pictures: a run's of an earlier round, or PLAIN, the model's as it came; "" leaves it.

    seen: the settings that the form was shown with, JSON. What still says what it said then is left, since another
    window may have changed it."""
    studio = studio_of(request)
    if mode not in MODES:
        raise InputError(f"expected {' or '.join(MODES)}")
    if source not in ("", PLAIN, *_sources(studio)):
        raise InputError(f"there is no round named {source[:64]!r}")
    own = [line for line in map(one_line, split_lines(prompts)) if line]
    if len(own) > OWN_PROMPTS:
        raise InputError(f"{len(own)} prompts; at most {OWN_PROMPTS} at a time")
    for prompt in own:
        known_words(prompt)
    given: dict[str, object] = {"mode": mode, "prompts": own}
    if source:
        given["source"] = source.removeprefix(PLAIN)
    shown = _shown(seen)
    changed = {key: value for key, value in given.items() if key not in shown or shown[key] != value}
    with studio.workspace.turn():
        before = studio.workspace.settings()
        studio.workspace.set(**changed)
        now = studio.workspace.settings()
        if (now["prompts"], now["source"]) != (before["prompts"], before["source"]):
            studio.voting.forget_pair()
    studio.artist.wake([prompt for prompt in now["prompts"] if prompt not in before["prompts"]])
    return go_to("/choose", request)


def _shown(seen: str) -> dict[str, object]:
    """The settings that a form was shown with; none where it does not say."""
    try:
        tree = json.loads(seen)
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


@router.post("/choose/upload")
async def upload(
    request: Request, better: Annotated[list[UploadFile], File()], worse: Annotated[list[UploadFile], File()],
    prompt: Annotated[str, Form()] = ""
) -> Response:  # fmt: skip
    """Own pictures as votes."""
    from starlette.concurrency import run_in_threadpool

    if len(better) + len(worse) > UPLOADED:
        raise InputError(f"at most {UPLOADED} pictures at once")
    contents = [[(file.filename or "", await file.read()) for file in side if file.size] for side in (better, worse)]
    await run_in_threadpool(studio_of(request).voting.add_pictures, one_line(prompt)[:300], *contents)
    return go_to("/choose", request)


@router.get("/drawn")
def drawn(request: Request, prompt: str) -> Response:
    """A picture of a prompt, by the model in use."""
    artist = studio_of(request).artist
    if not artist.wait(0) or not artist.pool:
        raise InputError(artist.silence)
    known_words(prompt)
    return Response(png_of(artist.draw([prompt], [7])[0]), media_type="image/png")


@router.get("/picture/{name}")
def picture(request: Request, name: str) -> Response:
    """A stored picture by the hash of its content."""
    path = studio_of(request).workspace.store.pictures / name
    if not PICTURE.fullmatch(name) or not path.is_file():
        return Response(status_code=404)
    return FileResponse(path, headers={"Cache-Control": "private, max-age=3600, immutable"})
