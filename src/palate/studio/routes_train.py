"""Aligning to a taste, and steering by words, while the pictures follow."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, Response

from palate.algorithms.direct import DirectSettings
from palate.models.vocabulary import known_words, with_words
from palate.runs.comparison import common_rows
from palate.runtime.errors import InputError
from palate.studio.curves import curves_of
from palate.studio.process import quoted
from palate.studio.runview import SIDES, RunView
from palate.studio.shared import Studio, go_to, studio_of
from palate.studio.steering import Draft, change, wanted_words
from palate.studio.undo import adapter_now, go_back
from palate.taste.card import START
from palate.taste.exported import export_votes
from palate.taste.words import unasked

router = APIRouter()
WAYS = {  # recipe -> what the person reads
    "taste-emoji": "Quick, about a minute: the model that draws in one step",
    "taste-emoji-srpo": "Fine, some minutes: the model that draws in many steps, by SRPO",
    "taste-emoji-dpo": "Straight from your pairs, without a taste between them, by DPO",
}
STEER_WAYS = {
    "direct-emoji": "Quick, about a minute: the model that draws in one step",
    "srpo-emoji": "Fine, some minutes, with a wanted and an unwanted word: the model that draws in many steps, by SRPO",
}
OFTEN = (
    "trainer.preview_every=5",
    "trainer.checkpoint_every=5",
    "trainer.keep_checkpoints=40",
    "trainer.guard.every=10",
)


@router.get("/align")
def align(request: Request, run: str | None = None) -> HTMLResponse:
    studio = studio_of(request)
    summary = studio.voting.summary()
    return studio.render(request, "align.html", summary=summary, ways=WAYS, start=START, asked=bool(run),
                         learns=_unasked(studio), examples=_word_examples(studio),
                         **_live(studio, studio.chosen(run)))  # fmt: skip


def _live(studio: Studio, view: RunView | None) -> dict[str, object]:
    """What the live part of a page shows of a run. refused: why a word that was just sent was not taken; here none
    was sent."""
    if view is None:
        return {"view": None, "words": None, "effects": {}, "refused": "", "curves": [], "wall": []}
    words = wanted_words(view)
    return {"view": view, "words": words, "effects": studio.effects.of(view, words), "refused": "",
            "curves": curves_of(view, studio.liking.of(view)), "wall": _wall(view)}  # fmt: skip


def _wall(view: RunView) -> list[dict[str, object]]:
    """The newest pictures, each with the first one of its prompt and seed; `before` is None where there is none."""
    if not view.previews:
        return []
    first, newest = view.pictures(view.previews[0]), view.pictures(view.previews[-1])
    pairs = dict(common_rows(newest, first))  # a resumed run may draw other prompts than before
    return [
        {"prompt": row["prompt"], "before": first[pairs[k]]["file"] if k in pairs else None, "after": row["file"]}
        for k, row in enumerate(newest)
    ]


def _word_examples(studio: Studio) -> list[dict[str, str]]:
    """The third way: the words that the taste has, put into a prompt, with a picture drawn so."""
    words = [choice.word for choice in studio.voting.words()]
    if not words or not studio.artist.ready.is_set():
        return []
    found: list[dict[str, str]] = []
    for drawn in studio.artist.rows():
        if drawn.picture.prompt == drawn.prompt and len(found) < 3 and drawn.prompt not in {f["plain"] for f in found}:
            found.append({"plain": drawn.prompt, "text": with_words(drawn.prompt, words)})
    return found


@router.get("/live")
def live(request: Request, run: str, page: str = "align") -> HTMLResponse:
    """The part of a page that changes while the run goes on."""
    studio = studio_of(request)
    return studio.render(request, "live.html", oob=True, page=page if page in ("align", "steer") else "align",
                         **_live(studio, studio.view(run)))  # fmt: skip


@router.post("/align/start")
def start(request: Request, way: str = Form("taste-emoji")) -> Response:
    """Learn the taste from all votes so far and align to it, on from the model that is drawn from."""
    studio = studio_of(request)
    votes = len(studio.voting.votes())
    if way not in WAYS:
        raise InputError(f"expected one of {', '.join(WAYS)}")
    if votes < START:
        raise InputError(f"a first taste needs {START} votes, there are {votes}; choose some more pictures")
    _require_idle(studio)
    source = studio.workspace.settings()["source"]
    if source and source not in studio.workspace.names():
        raise InputError(f"{source}, whose pictures you chose between, is gone; choose another model under Settings")
    taste = studio.voting.summary()["taste"]
    if taste is None:
        raise InputError(studio.artist.silence)
    if not taste["learnt"]:
        raise InputError(taste["verdict"])
    name, made = studio.workspace.new_name("align"), way
    overrides = [] if way == "taste-emoji-dpo" else [f"reward.source.taste={quoted(studio.voting.learn_taste())}"]
    if way != "taste-emoji":
        pairs = studio.workspace.home / "pairs" / name
        export_votes(studio.workspace.store, pairs, reads=_reads)
        of = {
            "taste-emoji-dpo": f"pairs={quoted(pairs / 'train.json')}",
            "taste-emoji-srpo": f"images={quoted(pairs / 'images')}",
        }
        overrides.append(f"prompts.{of[way]}")
    if source and way == "taste-emoji":
        overrides.append(f"model.start={quoted(adapter_now(studio.workspace.run(source)))}")
        if _steered(studio, source):  # words may cost more than a taste: what they cost was asked for
            overrides.append("trainer.guard.base=start")
    if way == "taste-emoji" and (words := _unasked(studio)):
        made = "taste-emoji-words"
        overrides.append(f"algorithm.context={json.dumps(words)}")
    studio.processes.train(made, name, overrides)
    return go_to("/align", request, run=name)


def _require_idle(studio: Studio) -> None:
    """InputError while this machine trains a run: a page that is older than it still has its button."""
    if busy := next((name for name in studio.workspace.names() if studio.processes.owner(name) is not None), ""):
        raise InputError(f"{busy} is training already; look at it, or stop it first")


def _reads(prompt: str) -> bool:
    """Whether the embedded model can be trained on a picture of that prompt; own pictures may show anything."""
    try:
        return bool(known_words(prompt))
    except InputError:
        return False


def _unasked(studio: Studio) -> list[str]:
    """The words that the next alignment begins with: those of the taste, unless the model draws by them already."""
    earlier = (view.recipe.algorithm for view in _rounds(studio, studio.workspace.settings()["source"]))
    known = next((list(a.context) for a in earlier if isinstance(a, DirectSettings) and a.context), [])
    return unasked(studio.voting.words(), known)


def _steered(studio: Studio, run: str) -> bool:
    """Whether words, and not tastes alone, led from the plain model to that run's result."""
    return any(view.recipe.reward.name != "taste" for view in _rounds(studio, run))


def _rounds(studio: Studio, run: str) -> Iterator[RunView]:
    """The run, the one whose result it began with, and so on back to the plain model; none for ""."""
    seen: set[str] = set()
    while run in studio.workspace.names() and run not in seen:
        seen.add(run)
        view = studio.view(run)
        yield view
        run = view.began_with


@router.post("/runs/{run}/stop")
def stop(request: Request, run: str) -> Response:
    studio = studio_of(request)
    if not studio.processes.stop(studio.workspace.run(run).name):
        view = studio.view(run)
        if view.state == "running":
            raise InputError(f"{view.message} Stop it there: this machine does not reach its process")
        raise InputError(f"{run} is not training, so there is nothing to stop")
    return Response(status_code=204)


@router.post("/runs/{run}/resume")
def resume(request: Request, run: str, more: int = Form(0)) -> Response:
    """Continue a run that stopped or died; `more` steps beyond its end for one that finished."""
    studio = studio_of(request)
    view = studio.view(run)
    if view.ended_by_guard:
        raise InputError(
            f"the guard has ended {view.name}: its result is what was still well. Choose again, or compare"
        )
    overrides = [f"trainer.steps={max(view.steps, view.step) + min(more, 1000)}"] if more > 0 else []
    studio.processes.resume(view.name, overrides)
    return go_to(view.page, request, run=run)


@router.post("/runs/{run}/back")
def back(request: Request, run: str, step: int = Form()) -> Response:
    """Undo: the run ends at an earlier step."""
    studio = studio_of(request)
    view = studio.view(run)
    if view.busy:
        raise InputError(f"{run} is training; stop it, then go back to a step")
    go_back(view.folder, step)
    return go_to(view.page, request, run=run)


@router.post("/runs/{run}/keep")
def keep(request: Request, run: str) -> Response:
    """Vote on with pictures of this run's model: the next round."""
    studio = studio_of(request)
    view = studio.view(run)
    if view.busy:
        raise InputError(f"{run} is training; stop it, or wait for its end")
    if not view.one_step:
        raise InputError(f"{run} is no run of a one-step generator, and pictures to choose among are drawn by one")
    adapter_now(view.folder)
    studio.workspace.begin_round(run)
    studio.voting.forget_pair()
    studio.artist.wake()
    return go_to("/choose", request)


# ------------------------------------------------------------------------------------------------------ steering


@router.get("/steer")
def steer(request: Request, run: str | None = None) -> HTMLResponse:
    studio = studio_of(request)
    view = studio.chosen(run, steerable=True)
    if view is not None and run is None and not view.busy:
        view = None
    known = _live(studio, view)
    if view is None:
        known["words"] = Draft(studio.workspace).words()
    return studio.render(request, "steer.html", ways=STEER_WAYS, **known)


@router.post("/steer/word")
def word(
    request: Request, word: str = Form(""), side: str = Form("positive"), run: str = Form(""), action: str = Form("add")
) -> Response:
    """Add or take away a word, of the run or of the draft; a refusal stands where the word was written."""
    studio = studio_of(request)
    refused = ""
    view = studio.view(run) if run else None
    try:
        if view is not None:
            change(view, side, word, add=action == "add")
        else:
            Draft(studio.workspace).change(side, word, add=action == "add")
    except InputError as error:
        refused = str(error)
    words = Draft(studio.workspace).words() if view is None else wanted_words(view)
    effects = {} if view is None else studio.effects.of(view, words)
    return studio.render(request, "words.html", view=view, words=words, effects=effects, refused=refused)


@router.post("/steer/start")
def steer_start(request: Request, way: str = Form("direct-emoji")) -> Response:
    """Begin a run towards the chosen words: on the one-step generator, or by SRPO on the base model."""
    studio = studio_of(request)
    words = Draft(studio.workspace).words()
    if way not in STEER_WAYS:
        raise InputError(f"expected one of {', '.join(STEER_WAYS)}")
    if not words.positive and not words.negative:
        raise InputError("choose at least one word, wanted or unwanted, before you start")
    if way == "srpo-emoji" and not (words.positive and words.negative):
        raise InputError("SRPO compares wanted with unwanted words: add at least one of each, or take the quick way")
    _require_idle(studio)
    name = studio.workspace.new_name("steer")
    overrides = [f"algorithm.{side}={json.dumps(list(words.of(side)))}" for side in SIDES]
    source = studio.workspace.settings()["source"]
    if way == "srpo-emoji":
        overrides += OFTEN  # what the page shows; the source is a one-step model's, from which this one cannot begin
    elif source:
        overrides.append(f"model.start={quoted(adapter_now(studio.workspace.run(source)))}")
    studio.processes.train(way, name, overrides)
    return go_to("/steer", request, run=name)
