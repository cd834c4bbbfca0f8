"""Who is let in, and what is refused whoever asks."""

from __future__ import annotations

import html

import pytest
from starlette.testclient import TestClient

from palate.runtime.errors import InputError
from palate.studio.access import BODY_LIMIT, Access, limit_of
from palate.studio.app import listen, serve

SECRET = "t" * 20


async def inner(scope, receive, send):
    """Reads the whole body and says how long it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(size).encode()})


def browser_of(access):
    return TestClient(access, base_url="http://localhost", follow_redirects=False)


def entered():
    made = browser_of(Access(inner, token=SECRET, port=7))
    assert made.get(f"/choose?token={SECRET}&a=1").headers["location"] == "/choose?a=1"
    return made


def test_the_link_lets_one_browser_in_once():
    access = Access(inner, token=SECRET, port=7)
    first, second = browser_of(access), browser_of(access)
    answer = first.get(f"/?token={SECRET}")
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 303 and "httponly" in cookie and "samesite=strict" in cookie and SECRET not in cookie
    assert first.get("/").status_code == 200
    assert second.get(f"/?token={SECRET}").status_code == 401 and second.get("/").status_code == 401
    assert "start it again: it prints a new link" in second.get("/").text  # as who closed the browser has to
    assert "Open on another device, on its first page" in second.get("/").text  # as who has it open may
    assert first.get(f"/?token={SECRET}").status_code == 303  # whoever is in may use an old link
    invited = access.invite()
    assert second.get(f"/?token={invited}").status_code == 303 and second.get("/").status_code == 200


def test_a_token_file_may_be_used_again():
    access = Access(inner, token=SECRET, port=7, lasting=True)
    for _ in range(2):
        other = browser_of(access)
        assert "Enter the token" in other.get("/").text
        assert other.get(f"/?token={SECRET}").status_code == 303 and other.get("/").status_code == 200


def test_a_link_for_another_device_works_once_beside_a_token_file_too():
    access = Access(inner, token=SECRET, port=7, lasting=True)
    invited = access.invite()
    assert browser_of(access).get(f"/?token={invited}").status_code == 303
    assert browser_of(access).get(f"/?token={invited}").status_code == 401


def test_a_link_for_another_device_names_the_machine_as_others_reach_it():
    here = Access(inner, token=SECRET, port=7)
    assert here.invitation("127.0.0.1:9000").startswith("http://127.0.0.1:9000/?token=")  # a tunnel's port
    everywhere = Access(inner, token=SECRET, hosts=("0.0.0.0", "desk"), port=7, lasting=True)
    assert everywhere.invitation("127.0.0.1:8420").startswith("http://desk:8420/?token=")
    assert everywhere.invitation("[fe80::1]:8420").startswith("http://[fe80::1]:8420/?token=")


def test_a_studio_on_all_addresses_answers_to_addresses_and_not_to_names():
    for host, status in (("192.168.1.5:8420", 401), ("[fe80::1]", 401), ("evil.example", 403), ("1.2.3.evil", 403)):
        everywhere = Access(inner, token=SECRET, hosts=("0.0.0.0", "here"), port=7, lasting=True)
        assert browser_of(everywhere).get("/", headers={"host": host}).status_code == status
    answer = browser_of(Access(inner, token=SECRET, hosts=("here",), port=7)).get("/", headers={"host": "192.168.1.5"})
    assert answer.status_code == 403 and "--host" in answer.text


@pytest.mark.parametrize("token", ["", "t" * 19, "T" * 20, "é" * 20])
def test_a_wrong_token_is_refused(token):
    assert browser_of(Access(inner, token=SECRET, port=7)).get("/", params={"token": token}).status_code == 401


@pytest.mark.parametrize("cookie", ["palate-studio-7=", "palate-studio-7=x", "palate-studio-8=x", "=;;", "a" * 9000])
def test_a_wrong_cookie_is_refused(cookie):
    answer = browser_of(Access(inner, token=SECRET, port=7)).get("/", headers={"cookie": cookie})
    assert answer.status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8420", "localhost.evil.example", "", "[::2]"])
def test_a_foreign_host_is_refused(host):
    assert entered().get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9999", "[::1]:8420"])
def test_names_of_this_machine_are_allowed(host):
    assert entered().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost:1"},
        {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
    ],
)  # fmt: skip
def test_another_origin_is_refused(headers):
    made = entered()
    assert made.post("/", headers=headers).status_code == 403
    assert made.post("/", headers={"origin": "http://localhost", "sec-fetch-site": "same-origin"}).status_code == 200


def test_a_link_followed_from_another_page_lets_in():
    """A strict cookie is not sent along with its own redirect, so a page in between goes on."""
    made = browser_of(Access(inner, token=SECRET, port=7))
    answer = made.get(f"/?token={SECRET}", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"})
    assert answer.status_code == 200 and 'http-equiv="refresh"' in answer.text and "set-cookie" in answer.headers


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/steer?run=a%20%26b&token=T", "/steer?run=a+%26b"),
        ("/steer?token=T&run=a&step=5", "/steer?run=a&step=5"),
        ("//evil.example/x?token=T", "/evil.example/x"),
        ("/%2F%2Fevil.example?token=T", "/evil.example"),
        ("/%5Cevil.example?token=T", "/%5Cevil.example"),
        ('/"><b>?token=T&x="><b>', "/%22%3E%3Cb%3E?x=%22%3E%3Cb%3E"),
    ],
)
def test_a_link_leads_to_its_own_page_of_this_site(path, target):
    """Followed from here, from another site, and by the form where the token is typed."""
    url = "http://localhost" + path.replace("=T", f"={SECRET}")
    assert browser_of(Access(inner, token=SECRET, port=7)).get(url).headers["location"] == target
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    text = browser_of(Access(inner, token=SECRET, port=7)).get(url, headers=headers).text
    shown = html.escape(target)
    assert f'content="0;url={shown}">' in text and f'<a href="{shown}">' in text and "<b>" not in text
    asked = browser_of(Access(inner, token=SECRET, port=7, lasting=True)).get(url.replace(SECRET, "wrong"))
    assert asked.status_code == 401 and f'name="to" value="{shown}"' in asked.text and "<b>" not in asked.text
    lasting = browser_of(Access(inner, token=SECRET, port=7, lasting=True))
    entered = lasting.post("/enter", data={"to": target, "token": SECRET}, headers={"x-forwarded-proto": "https"})
    assert entered.headers["location"] == target and "Secure" in entered.headers["set-cookie"]


def test_a_token_that_is_typed_stands_in_no_address_and_the_form_lets_nobody_in_without_it():
    access = Access(inner, token=SECRET, port=7, lasting=True)
    assert 'method="post"' in browser_of(access).get("/runs").text
    for data in ({"to": "/runs"}, {"to": "/runs", "token": "wrong"}, {"token": ""}):
        assert browser_of(access).post("/enter", data=data).status_code == 401
    answer = browser_of(access).post("/enter", data={"to": "//evil.example", "token": SECRET})
    assert answer.headers["location"] == "/evil.example"
    assert browser_of(Access(inner, token=SECRET, port=7)).post("/enter", data={"token": SECRET}).status_code == 401


def test_pages_stay_in_no_cache_and_a_length_of_any_size_is_refused():
    made = entered()
    assert made.get("/").headers["cache-control"] == "no-store" and "cache-control" not in made.get("/static/x").headers
    assert made.get("/", headers={"content-length": "9" * 5000}).status_code == 413


def test_large_bodies_are_refused_by_their_length_and_as_they_come():
    made = entered()
    assert made.post("/", content=b"x" * BODY_LIMIT).text == str(BODY_LIMIT)
    assert made.post("/", content=b"x" * (BODY_LIMIT + 1)).status_code == 413
    assert made.post("/", content=(b"x" * 65536 for _ in range(20))).status_code == 413  # no length is told
    assert made.post("/", content=b"x", headers={"content-length": "-1"}).status_code in (400, 413)
    assert limit_of("/choose/upload") > BODY_LIMIT


def test_every_answer_carries_the_policy():
    stranger = browser_of(Access(inner, token=SECRET, port=7))
    for answer in (entered().get("/"), stranger.get("/"), stranger.get("/", headers={"host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_port_in_use_gives_the_next():
    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    second = listen("127.0.0.1", port)
    assert second.getsockname()[1] > port
    first.close()
    second.close()
    with pytest.raises(InputError, match="address of this machine"):
        listen("203.0.113.7", 8420)
    with listen("127.0.0.1", 65535), pytest.raises(InputError, match="none of 65535 to 65535 is free"):
        listen("127.0.0.1", 65535)


def test_other_machines_need_a_token_file(tmp_path):
    with pytest.raises(InputError, match="token-file"):
        serve(tmp_path, host="0.0.0.0")
    (tmp_path / "short").write_text("secret")
    with pytest.raises(InputError, match="at least 16"):
        serve(tmp_path, host="0.0.0.0", token_file=tmp_path / "short")
    with pytest.raises(InputError, match="cannot read"):
        serve(tmp_path, token_file=tmp_path / "missing")


@pytest.mark.parametrize(
    "headers", [{"host": "[::1"}, {"host": "localhost:port"}, {"origin": "http://[x"}, {"content-length": "²"}]
)
def test_a_header_that_cannot_be_read_is_refused_and_breaks_nothing(headers):
    access = Access(inner, token=SECRET, port=7)
    refused = access._refusal({"method": "GET", "query_string": b"", "path": "/"}, {"host": "localhost"} | headers)
    allowed = headers == {"host": "localhost:port"}  # a port that is no number: the name is this machine's
    assert (refused is None) == allowed
    assert access.invitation("localhost:port").startswith("http")


def test_a_token_file_that_is_no_text_is_said(tmp_path):
    (tmp_path / "token").write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(InputError, match=r"--token-file: .* is not text"):
        serve(tmp_path, token_file=tmp_path / "token", browser=False)
