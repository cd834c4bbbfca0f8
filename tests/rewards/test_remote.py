"""The remote reward: values come through unchanged, bad calls are refused, bad answers stop the step."""

from __future__ import annotations

import base64
import http.client
import io
import json
import struct
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from palate import cli, recipe  # noqa: E402
from palate.optimize import load_oracle  # noqa: E402
from palate.recipe import OracleSettings  # noqa: E402
from palate.rewards.remote import TOKEN, Patience, RemoteError, RemoteReward, load_remote  # noqa: E402
from palate.rewards.server import Limits, _Scorer, make_app  # noqa: E402

SECRET = "a-token-of-twenty-six-bytes"


def images(*shape, seed=0):
    """On the grid of 8-bit grey levels, so that a PNG keeps them exactly."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


class Brightness:
    """Mean plus the prompt's length, counting calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, pixels, prompts):
        self.calls += 1
        if prompts[0] == "nan":
            return torch.full((len(pixels),), torch.nan)
        if prompts[0] == "slow":
            time.sleep(0.4)
        return pixels.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


@pytest.fixture(scope="module")
def served():
    """(port, the reward behind it)."""
    reward = Brightness()
    app = make_app(reward, SECRET, limits=Limits(max_bytes=40_000, max_images=4, max_side=64, waiting=2, remembered=8))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], reward
    server.should_exit = True
    thread.join(5)


def client(port, token=SECRET, *, timeout=120.0, retries=0, piece=4, **options):
    patience = Patience(timeout, retries, wait=0.01)
    return RemoteReward(f"http://127.0.0.1:{port}/score", token, patience=patience, piece=piece, **options)


def test_scores_are_the_rewards_own_in_order(served):
    pixels, prompts = images(11, 3, 8, 6), [f"{'x' * i}" for i in range(11)]
    got = client(served[0], concurrency=3, retries=9)(pixels.requires_grad_(), prompts)
    expected = pixels.mean((1, 2, 3)) + torch.arange(11.0)
    torch.testing.assert_close(got, expected.detach(), atol=1e-6, rtol=0)
    assert not got.requires_grad


def test_a_reward_service_can_be_the_oracle(served, monkeypatch):
    """palate optimize asks it in the same words, token and id included, and once: each try is a question."""
    monkeypatch.setenv(TOKEN, SECRET)
    oracle = load_oracle(OracleSettings(url=f"http://127.0.0.1:{served[0]}/score"))
    assert oracle(torch.zeros(3, 3, 8, 8), ["a", "bb", ""]).tolist() == [1, 2, 0]
    with pytest.raises(RemoteError, match=r"HTTP 500 .the reward gave a value that is not finite"):
        oracle(torch.zeros(1, 3, 8, 8), ["nan"])
    with pytest.raises(ValueError, match=r"optimize.oracle.url: http://far.example/score would send the token"):
        load_oracle(OracleSettings(url="http://far.example/score"))


def test_a_repeated_request_is_answered_from_memory(served):
    port, reward = served
    before, remote = reward.calls, client(port)
    first = remote(images(2, 3, 8, 8, seed=1), ["a", "b"])
    assert torch.equal(first, remote(images(2, 3, 8, 8, seed=1), ["a", "b"])) and reward.calls == before + 1
    remote(images(2, 3, 8, 8, seed=1), ["a", "c"])
    assert reward.calls == before + 2


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_numbers_of_any_kind_come_back_in_the_order_of_pictures_of_any_size(kind):
    scorer = _Scorer(lambda images, prompts: kind([x.mean().item() for x in images]), 8, torch.device("cpu"))
    pictures = [Image.new("RGB", size, (grey,) * 3) for size, grey in (((4, 4), 0), ((8, 4), 51), ((4, 4), 255))]
    assert scorer.compute(("1", b""), pictures, ["a"] * 3) == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("answer", [[1.0], [[1.0], [2.0]], "ab", 3.0, torch.ones(())])
def test_a_server_whose_reward_gives_no_number_per_picture_says_so(answer):
    scorer = _Scorer(lambda images, prompts: answer, 8, torch.device("cpu"))
    with pytest.raises(Exception, match=r"the reward gave (shape|\w+).*; expected 2 numbers, one per image") as told:
        scorer.compute(("1", b""), [Image.new("RGB", (4, 4))] * 2, ["a", "b"])
    assert told.value.status == 500


def test_the_reward_is_given_its_images_on_the_servers_device():
    seen = []

    def reward(pixels, prompts):
        seen.append(pixels.device.type)
        return torch.ones(len(pixels))

    scorer = _Scorer(reward, 8, torch.device("meta"))
    assert scorer.compute(("1", b""), [Image.new("RGB", (4, 4))], ["a"]) == [1.0] and seen == ["meta"]
    with pytest.raises(ValueError, match="device got 'gpu'; expected cpu, cuda or cuda:N"):
        make_app(reward, SECRET, device="gpu")


def png(array_size):
    stream = io.BytesIO()
    Image.new("RGB", array_size).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def bomb(side=60_000):
    """A PNG header that claims side x side pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")
    ).decode()


BODY = {"id": "1", "prompts": ["a"], "images": [png((4, 4))]}
GOOD = {"Authorization": f"Bearer {SECRET}", "Content-Type": "application/json"}
REFUSED = {
    "no token": ({"Authorization": None}, BODY, 401),
    "another token": ({"Authorization": "Bearer " + "x" * 27}, BODY, 401),
    "token of another kind": ({"Authorization": SECRET}, BODY, 401),
    "not ascii": ({"Authorization": "Bearer \xe9"}, BODY, 401),
    "another origin": ({"Origin": "https://evil.example"}, BODY, 403),
    "no origin": ({"Origin": "null"}, BODY, 403),
    "rebound name": ({"Host": "evil.example"}, BODY, 403),
    "a name that cannot be read": ({"Host": "[::1"}, BODY, 403),
    "an origin that cannot be read": ({"Origin": "http://[x"}, BODY, 403),
    "a form": ({"Content-Type": "text/plain"}, BODY, 415),
    "too large": ({}, BODY | {"prompts": ["a" * 50_000]}, 413),
    "too many": ({}, BODY | {"prompts": ["a"] * 5, "images": [png((4, 4))] * 5}, 413),
    "too wide": ({}, BODY | {"images": [png((65, 4))]}, 413),
    "a bomb": ({}, BODY | {"images": [bomb()]}, (400, 413)),
    "none": ({}, BODY | {"prompts": [], "images": []}, 413),
    "unequal": ({}, BODY | {"prompts": ["a", "b"]}, 400),
    "numbers": ({}, BODY | {"prompts": [3]}, 400),
    "a list": ({}, [1], 400),
    "not JSON": ({}, None, 400),
    "not base64": ({}, BODY | {"images": ["%%%"]}, 400),
    "not a PNG": ({}, BODY | {"images": [base64.b64encode(b"GIF89a").decode()]}, 400),
    "a long id": ({}, BODY | {"id": "x" * 999}, 400),
    "nested": ({}, "[" * 20_000, 400),
    "not finite": ({}, BODY | {"prompts": ["nan"]}, 500),
}


def call(port, headers, body, path="/score"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    content = body if isinstance(body, str) else "{" if body is None else json.dumps(body)
    headers = {name: value for name, value in (GOOD | headers).items() if value is not None}
    connection.request("POST", path, content.encode(), headers)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls_are_refused_in_a_sentence(served, name):
    headers, body, expected = REFUSED[name]
    status, answer = call(served[0], headers, body)
    assert status in (expected if isinstance(expected, tuple) else (expected,))
    assert 5 < len(json.loads(answer)["error"]) < 120 and SECRET not in answer.decode()


def test_a_good_call_and_nothing_else_is_there(served):
    assert call(served[0], {"Origin": f"http://127.0.0.1:{served[0]}"}, BODY)[0] == 200
    assert [call(served[0], {}, BODY, path)[0] for path in ("/", "/docs", "/openapi.json")] == [404] * 3


def test_more_than_the_limit_at_a_time_are_sent_away_and_come_back(served):
    def slow(seed, **options):
        return client(served[0], **options)(images(1, 3, 4, 4, seed=seed), ["slow"])

    outcomes = []
    threads = [
        threading.Thread(
            target=lambda s=s: outcomes.append(call(served[0], {}, BODY | {"prompts": ["slow"], "id": str(s)})[0])
        )
        for s in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {200, 503}
    assert slow(9, retries=3).shape == (1,)


class Evil(BaseHTTPRequestHandler):
    """Answers as `script` says, one entry a request: (status, body) or a function of the handler."""

    script: ClassVar[list] = []
    seen: ClassVar[list] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Evil.seen.append((self.headers.get("Authorization"), json.loads(body)["id"]))
        answer = Evil.script.pop(0)
        if callable(answer):
            return answer(self)
        status, content = answer
        content = content(json.loads(body)["id"]) if callable(content) else content
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/elsewhere")
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def evil():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Evil.script, Evil.seen = [], []
    yield server.server_port
    server.shutdown()
    server.server_close()


def answer(scores):
    return lambda name: json.dumps({"id": name, "scores": scores})


def drop(handler):
    handler.connection.close()


def drip(handler):
    """A byte now and then, each of them inside the socket's own time-out."""
    try:
        for _ in range(100):
            handler.wfile.write(b"H")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        return


def test_passing_failures_are_retried_with_the_same_id(evil):
    Evil.script = [(503, "busy"), drop, (429, "slow down"), (200, answer([0.25]))]
    assert client(evil, retries=3)(images(1, 3, 4, 4), ["a"]).tolist() == [0.25]
    assert len(Evil.seen) == 4 and len(set(Evil.seen)) == 1


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (401, '{"error": "the bearer token is missing"}', f"bearer token is missing.*{TOKEN}"),
        (404, "nothing", "usually /score"),
        (
            404,
            '{"message": "The model m does not exist."}',
            "does not exist.*/v1/chat/completions; and the model's name",
        ),
        (413, "large", "batch_size"),
        (500, "", "HTTP 500"),
        (302, "", "HTTP 302"),
        (200, "not json", "bad answer"),
        (200, answer([0.1, 0.2]), "bad answer"),
        (200, answer([]), "bad answer"),
        (200, answer(["0.1"]), "bad answer"),
        (200, answer([True]), "bad answer"),
        (200, answer([float("nan")]), "1 finite numbers"),
        (200, answer([float("inf")]), "bad answer"),
        (200, '{"id": "other", "scores": [0.1]}', "bad answer"),
        (200, "[" * 5000, "bad answer"),
        (200, answer([10**400]), "bad answer"),
        (200, " " * (1 << 21), "larger than"),
    ],
)
def test_answers_that_no_retry_mends_stop_at_once(evil, status, content, words):
    Evil.script = [(status, content)] * 3
    with pytest.raises(RemoteError, match=words) as error:
        client(evil, retries=2)(images(1, 3, 4, 4), ["a"])
    assert len(Evil.seen) == 1 and SECRET not in str(error.value) and len(str(error.value)) < 400


def test_a_slow_answer_ends_at_the_time_out(evil):
    Evil.script = [drip, drip]
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"no answer.*2 times.*palate resume"):
        client(evil, retries=1, timeout=0.3)(images(1, 3, 4, 4), ["a"])
    assert time.monotonic() - began < 2.5


def test_one_bad_piece_drops_the_whole_batch(evil):
    Evil.script = [(200, answer([0.1])), (200, answer([0.1, 0.2]))]
    with pytest.raises(RemoteError):
        client(evil, piece=1, concurrency=1)(images(2, 3, 4, 4), ["a", "b"])


@pytest.mark.parametrize(
    ("url", "token", "words"),
    [
        ("ftp://127.0.0.1/x", SECRET, "expected a URL"),
        ("nonsense", SECRET, "expected a URL"),
        ("http://[::1:8411/score", SECRET, "expected a URL"),
        ("http://127.0.0.1:port/score", SECRET, "expected a URL"),
        ("https://reward..example/score", SECRET, "expected a URL"),
        (f"https://{'a' * 70}.example/score", SECRET, "expected a URL"),
        ("http://me:pw@127.0.0.1/", SECRET, "without a password"),
        ("http://reward.example/score", SECRET, "in the clear"),
        ("http://127.0.0.1:1/score", "", TOKEN),
        ("http://127.0.0.1:1/scöre", SECRET, "not ASCII"),
        ("http://127.0.0.1:1/a score", SECRET, "spaces"),
        ("http://127.0.0.1:1/score", SECRET + "\r", f"token in {TOKEN} has a line end"),
        ("http://127.0.0.1:1/score", SECRET + "€", f"token in {TOKEN} has a line end or a sign that is not ASCII"),
        (None, SECRET, "expected a URL"),
    ],
)
def test_unsafe_clients_are_not_made(monkeypatch, url, token, words):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(ValueError, match=words):
        load_remote(url)
    with pytest.raises(ValueError, match="at least 16"):
        make_app(Brightness(), "short")


def test_a_dead_service_is_exit_code_5(monkeypatch, capfd):
    monkeypatch.setenv(TOKEN, SECRET)
    monkeypatch.setattr(sys, "argv", ["palate", "train", "x"])
    reward = recipe.load_reward("remote", "http://127.0.0.1:9/score")
    reward.retries, reward.wait = 1, 0.0
    monkeypatch.setattr(recipe, "read", lambda *a: reward(images(1, 3, 4, 4), ["a"]))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capfd.readouterr().err
    assert (
        ended.value.code == 5
        and error.startswith("palate: reward service http://127.0.0.1:9/score")
        and len(error.splitlines()) <= 2
    )
