"""Who may talk to the studio: one browser at a time is let in by a link that works once, from this machine's names.

As in `palate.rewards.remote`: the Host must be one of ours (no DNS rebinding), a page of another origin may ask for
nothing, requests have a largest size, and everything that can be judged before the body is read is judged then.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from html import escape
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from palate.rewards.client import LOOPBACK, place_of

BODY_LIMIT = 1 << 20  # bytes of an ordinary request
UPLOAD_LIMIT = 64 << 20  # bytes of uploaded pictures
UPLOADS = ("/choose/upload",)
EVERYWHERE = ("0.0.0.0", "::")  # all addresses of this machine, under any of which a phone may call
FOREIGN = "This name of the machine is not allowed. Open the link that palate studio printed, or start it with --host."
TOO_LARGE = "The request is too large."
ONCE = (
    "Open the link that palate studio printed; it works once. If it was used already, a browser that is let in makes "
    "another: Open on another device, on its first page. If there is none, stop palate studio in its terminal and "
    "start it again: it prints a new link, and nothing that you chose is lost."
)
SECRET_LENGTH = 16  # characters that a token file must hold at least
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; manifest-src 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # under no-referrer a form's own Origin would read "null" and be refused
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
UNCACHED = {"Cache-Control": "no-store"}  # but for what says otherwise, as pictures do: a browser may be shared
PLAIN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Palate Studio</title><link rel="stylesheet" href="/static/studio.css"><main class="narrow"><h1>Palate Studio</h1>
<p role="alert">{sentence}</p>{form}</main></html>"""
ENTRY = "/enter"  # where that form leads
FORM = """<form method="post" action="{entry}"><input type="hidden" name="to" value="{wanted}">
<label>Token <input name="token" type="password" autocomplete="off" required></label>
<button class="primary">Open</button></form>"""


class TooLarge(Exception):
    """A body grew past its limit while it was read."""


class Access:
    """ASGI middleware. `token` is exchanged for a cookie; one from a file (`lasting`) may be used again."""

    def __init__(self, app: ASGIApp, *, token: str, hosts: Sequence[str] = (), lasting: bool = False, port: int = 0):
        self.app, self.lasting = app, lasting
        self.hosts = {*LOOPBACK, *hosts}
        self.anywhere = bool(self.hosts & set(EVERYWHERE))
        self.cookie = f"palate-studio-{port}"  # cookies do not know ports
        self._token = token
        self._tokens = {token}
        self._sessions: set[str] = set()

    def invite(self) -> str:
        """A further token that works once, for another browser."""
        token = secrets.token_urlsafe(24)
        self._tokens.add(token)
        return token

    def invitation(self, host: str) -> str:
        """Such a link for another browser, from the Host (with its port) that this one came by: under the name by which
        other machines reach the studio, where they can."""
        name, port = place_of("//" + host)
        outside = sorted(self.hosts - {*LOOPBACK, *EVERYWHERE})
        if name in LOOPBACK and outside:
            name = outside[0]
        place = f"[{name}]" if ":" in name else name
        return f"http://{place}{f':{port}' if port else ''}/?token={self.invite()}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._refusal(scope, headers) or self._exchange(scope, headers)
        wanted = _wanted(scope) if scope["method"] == "GET" and scope["path"] != ENTRY else "/"
        if answer is None and self.lasting and (scope["method"], scope["path"]) == ("POST", ENTRY):
            answer, wanted = await self._entered(headers, receive)
        if answer is None and not scope["path"].startswith("/static/") and not self._known(headers):
            asks = _form(wanted) if self.lasting else ""
            how = "Enter the token." if self.lasting else ONCE
            answer = _page(f"This browser is not let in. {how}", 401, asks)
        if answer is not None:
            await answer(scope, receive, _with_headers(scope, send))
            return
        await self._limited(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """What is refused whoever asks: a foreign host, another origin, a body that is too large."""
        name, _ = place_of("//" + headers.get("host", ""))
        if name not in self.hosts and not (self.anywhere and _is_address(name)):
            return _page(FOREIGN, 403)
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        entry = (
            scope["method"] == "GET"
            and headers.get("sec-fetch-mode") == "navigate"
            and b"token=" in scope["query_string"]
        )
        if foreign or (headers.get("sec-fetch-site") in ("cross-site", "same-site") and not entry):
            return _page("Calls from another page are not allowed.", 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > limit_of(scope["path"]):
            return _page(TOO_LARGE, 413)
        return None

    def _exchange(self, scope: Scope, headers: Headers) -> Response | None:
        """A token in the URL becomes a cookie, and leaves the URL."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for key, value in query if key == "token"]
        if scope["method"] != "GET" or not given:
            return None
        return self._let_in(given[0], _wanted(scope), headers)

    async def _entered(self, headers: Headers, receive: Receive) -> tuple[Response | None, str]:
        """The answer to the token of a form's body, which no log keeps as it keeps a URL, and the page wanted."""
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body") or len(body) > BODY_LIMIT:
                break
        given = dict(parse_qsl(body[:BODY_LIMIT].decode("latin-1")))
        target = "/" + given.get("to", "").lstrip("/\\")
        return self._let_in(given.get("token", ""), target, headers), target

    def _let_in(self, given: str, target: str, headers: Headers) -> Response | None:
        found = next((t for t in tuple(self._tokens) if hmac.compare_digest(t.encode(), given.encode())), None)
        if found is None:
            return RedirectResponse(target, 303) if self._known(headers) else None
        if not self.lasting or found != self._token:
            self._tokens.discard(found)
        session = secrets.token_urlsafe(24)
        self._sessions.add(session)
        answer: Response = RedirectResponse(target, 303)
        if headers.get("sec-fetch-site") == "cross-site":  # a strict cookie is not sent along with its own redirect
            page = PLAIN.format(sentence=f'Opening. <a href="{escape(target)}">Go on</a>', form="")
            onwards = f'<meta http-equiv="refresh" content="0;url={escape(target)}"><title>'
            answer = HTMLResponse(page.replace("<title>", onwards))
        secure = headers.get("x-forwarded-proto") == "https"  # through a proxy; the studio itself speaks http
        answer.set_cookie(self.cookie, session, httponly=True, samesite="strict", path="/", secure=secure)
        return answer

    def _known(self, headers: Headers) -> bool:
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load(headers.get("cookie", ""))
        except CookieError:
            return False
        given = jar[self.cookie].value.encode() if self.cookie in jar else b""
        return any(hmac.compare_digest(session.encode(), given) for session in self._sessions)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, with a body that stops at its limit whatever its length claims."""
        limit, seen, begun = limit_of(scope["path"]), 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await _with_headers(scope, send)(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if not begun:
                await _page(TOO_LARGE, 413)(scope, receive, _with_headers(scope, send))


def _page(sentence: str, status: int, form: str = "") -> HTMLResponse:
    return HTMLResponse(PLAIN.format(sentence=sentence, form=form), status)


def _path(scope: Scope) -> str:
    """The path as it stands in a URL of this site: one slash first, so that no other site can be named by it."""
    return "/" + quote(scope["path"].lstrip("/"))


def _wanted(scope: Scope) -> str:
    """The address that was asked for, without a token in it."""
    query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    left = urlencode([(key, value) for key, value in query if key != "token"])
    return _path(scope) + (f"?{left}" if left else "")


def _form(wanted: str) -> str:
    """Asks for the token and goes on to the page that was wanted."""
    return FORM.format(entry=ENTRY, wanted=escape(wanted))


def _is_address(name: str) -> bool:
    """Whether a host is named by its address: no other page's name can be made to lead here by it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def limit_of(path: str) -> int:
    return UPLOAD_LIMIT if path in UPLOADS else BODY_LIMIT


def _with_headers(scope: Scope, send: Send) -> Send:
    every = HEADERS if scope["path"].startswith("/static/") else HEADERS | UNCACHED

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            there = {key.lower() for key, _ in message["headers"]}
            own = [(key.lower().encode(), value.encode()) for key, value in every.items()]
            message["headers"] = [*message["headers"], *(pair for pair in own if pair[0] not in there)]
        await send(message)

    return sent
