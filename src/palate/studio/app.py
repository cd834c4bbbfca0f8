"""The application: its pages put together, how it answers mistakes, and the server."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from palate.runtime.errors import InputError, PalateError
from palate.runtime.files import with_remedy
from palate.runtime.progress import printable
from palate.studio import routes_choose, routes_compare, routes_runs, routes_start, routes_train
from palate.studio.access import EVERYWHERE, SECRET_LENGTH, Access
from palate.studio.shared import Studio, studio_of

TRIES = 20  # ports, one after the other
FIRST = "demo-studio"  # the run of `palate demo`; "demo" is that of `make demo`, which begins its own anew


def make_app(runs: str | Path, *, token: str, hosts: tuple[str, ...] = (), lasting: bool = False, port: int = 0) -> Any:
    """The ASGI application on a folder of runs. `token` lets one browser in (any number, if `lasting`)."""
    studio = Studio(runs)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        studio.artist.start()
        yield
        studio.artist.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.studio = studio
    for routes in (routes_start, routes_choose, routes_train, routes_compare, routes_runs):
        app.include_router(routes.router)
    app.mount("/static", StaticFiles(directory=str(files("palate.studio") / "static")), name="static")
    app.add_exception_handler(PalateError, _mistake)
    app.add_exception_handler(OSError, _mistake)
    app.add_exception_handler(HTTPException, _missing)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _fault)
    studio.access = Access(app, token=token, hosts=hosts, lasting=lasting, port=port)
    return studio.access


def _answer(request: Request, sentence: str, status: int) -> Response:
    """A sentence: into the page's notice for a part of a page, else as a page of its own."""
    studio = studio_of(request)
    if request.headers.get("hx-request"):
        answer = studio.render(request, "notice.html", sentence=sentence)
        answer.headers["HX-Retarget"], answer.headers["HX-Reswap"] = "#notice", "innerHTML"
    else:
        answer = studio.render(request, "problem.html", sentence=sentence)
    answer.status_code = status
    return answer


async def _mistake(request: Request, error: Exception) -> Response:
    said = with_remedy(error) if isinstance(error, OSError) else str(error)
    return _answer(request, printable(said), 422 if isinstance(error, InputError) else 500)


async def _fault(request: Request, error: Exception) -> Response:
    """An error of our own: said on the page, and its traceback stands in the terminal."""
    return _answer(request, "This failed by a fault of palate; its terminal shows where.", 500)


async def _missing(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    sentence = "There is no such page." if status == 404 else "This cannot be asked here."
    return _answer(request, sentence, status)


async def _malformed(request: Request, error: Exception) -> Response:
    return _answer(request, "The request lacks a value, or holds one of another kind.", 422)


def listen(host: str, port: int) -> socket.socket:
    """A socket on the port, or on the next free one. InputError: none of TRIES is free, or the host is not ours."""
    last = min(port + TRIES - 1, 65535)
    for candidate in range(port, last + 1) if port else (0,):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((host, candidate))
            opened.listen(128)
            return opened
        except OSError as error:
            opened.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise InputError(
                    f"--host {host}: {error.strerror or error}; give an address of this machine"
                ) from error
    raise InputError(f"--port: none of {port} to {last} is free and allowed; name another above 1023 with --port")


def opened_in_browser(url: str) -> bool:
    """Open the page, where there is a display to open it on; whether a browser was found."""
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(display) and webbrowser.open(url)


def serve(
    runs: str | Path,
    *,
    port: int = 8420,
    host: str = "127.0.0.1",
    token_file: Path | None = None,
    browser: bool = True,
    first_run: str = "",
) -> None:
    """Serve the studio on a folder of runs until interrupted; prints one line with the link. InputError as `listen`.

    first_run: a recipe that is begun as the run FIRST, whose page is opened; where it was begun before, it is shown.
    """
    token = secrets.token_urlsafe(24)
    if token_file is not None:
        try:
            token = token_file.read_text("utf-8").strip()
        except OSError as error:
            raise InputError(f"--token-file: cannot read {token_file}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"--token-file: {token_file} is not text; openssl rand -hex 16 makes a secret") from error
        if len(token) < SECRET_LENGTH:
            raise InputError(
                f"--token-file: {token_file} holds {len(token)} characters; at least {SECRET_LENGTH} are needed"
            )
    elif host not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(f"--host {host} lets other machines in: give --token-file with a secret of your own")
    opened = listen(host, port)
    own = opened.getsockname()[1]
    if port and own != port:
        print(f"palate: port {port} is in use or not allowed; taking {own}", file=sys.stderr)
    named = host if host not in EVERYWHERE else socket.gethostname()
    app = make_app(runs, token=token, hosts=(host, named), lasting=token_file is not None, port=own)
    page = "/"
    if first_run:
        studio = app.app.state.studio
        if FIRST in studio.workspace.names():
            print(f"palate: {FIRST} was begun before and is shown; delete it under Runs for another", file=sys.stderr)
        else:
            studio.processes.train(first_run, FIRST)
        page = f"/steer?run={FIRST}"
    url = f"http://{f'[{named}]' if ':' in named else named}:{own}{page}"
    url += "" if token_file else f"{'&' if '?' in page else '?'}token={token}"
    print(f"Palate Studio: {url}", flush=True)
    if browser and not opened_in_browser(url):
        print(
            "palate: no browser could be opened here; open the link in yours. From another machine, bring the port "
            f"through a tunnel first: ssh -L {own}:127.0.0.1:{own} {socket.gethostname()}", file=sys.stderr, flush=True,
        )  # fmt: skip
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, limit_concurrency=64, timeout_graceful_shutdown=3
    )
    uvicorn.Server(config).run(sockets=[opened])
