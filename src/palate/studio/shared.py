"""What the routes share: the studio's parts, the run that a page is about, templates and redirects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from palate.runtime.errors import PalateError
from palate.runtime.progress import counted
from palate.studio.access import Access
from palate.studio.artist import Artist
from palate.studio.comparing import Comparing
from palate.studio.liking import Liking
from palate.studio.moved import follow_move
from palate.studio.process import Processes
from palate.studio.runview import RunView, view_of
from palate.studio.steering import Effects, control_words
from palate.studio.voting import Voting
from palate.studio.workspace import Workspace

PAGES = (("/", "Start"), ("/choose", "Choose"), ("/align", "Align"), ("/steer", "Steer"), ("/compare", "Compare"),
         ("/runs", "Runs"))  # fmt: skip


def readable(prompt: str) -> str:
    """A prompt as it is written in English, "on an orange background"; the models read both alike."""
    return re.sub(r"\ba (?=[aeio]|um|hour)", "an ", prompt)


class Studio:
    """What the routes use. Nothing in it is the page's state: that is in the workspace."""

    def __init__(self, runs: str | Path):
        self.workspace = Workspace(runs)
        follow_move(self.workspace)
        self.artist = Artist(self.workspace)
        self.voting = Voting(self.workspace, self.artist)
        self.processes = Processes(self.workspace)
        self.comparing = Comparing(self.workspace)
        self.effects = Effects(self.artist)
        self.liking = Liking(self.artist)
        self.pages = Environment(loader=PackageLoader("palate.studio", "templates"), autoescape=True,
                                 undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
        self.pages.filters |= {"readable": readable, "counted": counted}
        self.access: Access | None = None

    @property
    def control_words(self) -> list[str]:
        """Those that a page offers."""
        return control_words()

    def render(self, request: Request, template: str, **values: Any) -> HTMLResponse:
        page = self.pages.get_template(template)
        shared = {"path": request.url.path, "pages": PAGES, "studio": self}
        return HTMLResponse(page.render(**shared, **values))

    def view(self, name: str) -> RunView:
        return view_of(self.workspace.run(name), self.processes)

    def views(self) -> list[RunView]:
        """All runs whose recipe can be read, newest first."""
        return self.seen()[0]

    def seen(self) -> tuple[list[RunView], dict[str, str]]:
        """All runs whose recipe can be read, newest first, and why the others cannot: another version's, edited, or
        under a name of other signs."""
        found, unreadable = [], self.workspace.unopenable()
        for name in self.workspace.names():
            try:
                found.append(self.view(name))
            except (PalateError, OSError) as error:
                unreadable[name] = str(error).splitlines()[0]
        return found, unreadable

    def chosen(self, name: str | None, *, steerable: bool = False) -> RunView | None:
        """The run of that name; without one the run at work, else the newest: of those that are steered, or of those
        that are watched on the page Align."""
        if name:
            return self.view(name)
        views = [view for view in self.views() if view.steerable or not steerable]
        newest = next((view for view in views if steerable or view.page == "/align"), None)
        return next((view for view in views if view.busy), newest)


def studio_of(request: Request) -> Studio:
    studio: Studio = request.app.state.studio
    return studio


def go_to(path: str, request: Request, **query: str) -> Response:
    """Another page, whether a whole page or a part asks."""
    target = path + (f"?{urlencode(query)}" if query else "")
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={"HX-Redirect": target})
    return RedirectResponse(target, 303)
