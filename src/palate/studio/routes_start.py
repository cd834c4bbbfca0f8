"""The first page, a run from a short form or from a recipe's text, and the event stream."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import torch
from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse

from palate import recipe as recipes
from palate.runtime.errors import InputError
from palate.runtime.trust import only_looking
from palate.studio.process import quoted
from palate.studio.shared import go_to, studio_of
from palate.taste.card import GOOD, START

router = APIRouter()
POLL = 0.4  # seconds between looks at a run folder
ALIVE = 15.0  # seconds after which an idle stream says that it is there


def recipe_names() -> dict[str, str]:
    """The recipes that this machine can train, with their first lines: the embedded model's, and all with a GPU."""
    found = recipes.published()
    return {name: text for name, text in found.items() if "emoji" in name or torch.cuda.is_available()}


@router.get("/")
def start(request: Request) -> HTMLResponse:
    studio = studio_of(request)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "it needs no GPU"
    views, unreadable = studio.seen()
    return studio.render(request, "start.html", recipes=recipe_names(), machine=machine, runs=views[:3],
                         unreadable=unreadable, votes=len(studio.voting.votes()), start=START, good=GOOD)  # fmt: skip


@router.get("/favicon.ico", include_in_schema=False)
def icon() -> Response:
    return Response(status_code=301, headers={"Location": "/static/icon.svg"})


@router.get("/recipe")
def recipe_text(request: Request, recipe: str = "") -> HTMLResponse:
    """The text of a published recipe, for the form."""
    if recipe not in recipe_names():
        raise InputError(f"there is no recipe named {recipe[:40]!r} for this machine")
    text = recipes.text_of(recipe)
    return studio_of(request).render(request, "recipe.html", text=text, mistakes=mistakes_of(text))


@router.post("/recipe/check")
def check_recipe(request: Request, text: str = Form("")) -> HTMLResponse:
    return studio_of(request).render(request, "mistakes.html", mistakes=mistakes_of(text))


def mistakes_of(text: str) -> list[str]:
    """What the command line would say about the recipe, a sentence each."""
    try:
        with only_looking("recipe"):
            recipes.parse(text)
    except InputError as error:
        return str(error).splitlines()
    return []


@router.post("/train")
def train(request: Request, text: str = Form(""), name: str = Form(""), steps: int = Form(0)) -> Response:
    """Begin a run of the recipe's text under a name."""
    studio = studio_of(request)
    name = studio.workspace.checked_name(name.strip() or studio.workspace.new_name("run"))
    overrides = [f"trainer.steps={steps}"] if steps > 0 else []
    recipes.parse(text, [*overrides, f"run.folder={quoted(studio.workspace.runs / name)}"])
    studio.workspace.recipes.mkdir(parents=True, exist_ok=True)
    file = studio.workspace.recipes / f"{name}.{secrets.token_hex(4)}.yaml"  # not another window's of the same name
    file.write_text(text, encoding="utf-8")
    studio.processes.train(str(file), name, overrides)
    return go_to("/align", request, run=name)


@router.post("/invite")
def invite(request: Request) -> Response:
    """A link for another browser or a phone, which works once."""
    studio = studio_of(request)
    assert studio.access is not None, "make_app gives it one"
    return PlainTextResponse(studio.access.invitation(request.headers["host"]))


@router.get("/events")
async def events(request: Request, run: str) -> StreamingResponse:
    """Says `change` whenever the run folder, or its process, is not as it was."""
    studio = studio_of(request)
    folder = studio.workspace.place(run)

    def stamp() -> tuple[object, ...]:
        found: list[object] = []
        for name in ("metrics.jsonl", "control.json", "recipe.yaml", "adapter", "samples", "checkpoints"):
            with contextlib.suppress(OSError):
                stat = (folder / name).stat()
                found.append((stat.st_mtime_ns, stat.st_size))
        return (*found, studio.processes.owner(folder.name))

    async def stream() -> AsyncIterator[str]:
        last, idle = await asyncio.to_thread(stamp), 0.0
        yield "retry: 1000\n\nevent: change\ndata: \n\n"  # what happened between the page and this stream
        while not await request.is_disconnected():
            await asyncio.sleep(POLL)
            now, idle = await asyncio.to_thread(stamp), idle + POLL
            if now != last:
                last, idle = now, 0.0
                yield "event: change\ndata: \n\n"
            elif idle > ALIVE:
                idle = 0.0
                yield ": still here\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
