"""The vision-language judge: what it is asked, what is taken for an answer, and that a bad one drops the batch."""

from __future__ import annotations

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from palate import recipe
from palate.rewards.client import Patience
from palate.rewards.remote import TOKEN, RemoteError
from palate.rewards.vlm import VLMReward, load_vlm, parse

SECRET = "a-token-of-twenty-six-bytes"


@pytest.fixture
def judge():
    """(the reward, a dict: "say" makes the answer's text of a request, "asked" lists the requests)."""
    told = {"asked": [], "say": lambda request: "Score: 3"}

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told["asked"].append((self.path, self.headers["Authorization"], request))
            body = json.dumps({"choices": [{"message": {"content": told["say"](request)}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"
    yield VLMReward(url, SECRET, model="owner/judge", patience=Patience(retries=0)), told
    server.shutdown()


def picture_of(request):
    head, _, data = request["messages"][0]["content"][0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_each_image_is_judged_with_its_own_prompt_and_comes_back_in_its_place(judge):
    reward, told = judge
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 4, 6) * 10 / 255
    told["say"] = lambda request: f"It is so.\nScore: {1 + picture_of(request)[0, 0, 0] / 10}"
    got = reward(images.clone().requires_grad_(), [f"prompt {i}" for i in range(5)])
    assert got.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0] and not got.requires_grad
    for path, token, request in told["asked"]:
        assert (path, token) == ("/v1/chat/completions", f"Bearer {SECRET}")
        assert request["model"] == "owner/judge" and request["temperature"] == 0
        pixels = picture_of(request)
        assert pixels.shape == (4, 6, 3)
        assert f'"prompt {pixels[0, 0, 0] // 10}"' in request["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 4", 4.0),
        ("4.5", 4.5),
        ("score: 2 at first.\nFinal **Score:** 3.5/5", 3.5),
        ("Score = 1.", 1.0),
        ("Alignment Score (1-5): 3.62\nStyle Score (1-5): 2.5", 2.5),  # UnifiedReward's form
        ("**Score [1 to 5]:** 4", 4.0),
        ("Score: 4 - 3 dogs are there", 4.0),
    ],
)
def test_answers_that_are_a_score(text, score):
    assert parse(text) == score


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fine",
        "Score: 6",
        "Score: 0.5",
        "Score: 45",
        "nan",
        "12 of 5",
        "Score (1 - 5): good",
        "Score: 3-4",
        None,
        {"a": 1},
    ],
)
def test_any_other_answer_drops_the_batch(text, judge):
    reward, told = judge
    told["say"] = lambda request: text if picture_of(request)[0, 0, 0] else "Score: 3"
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    with pytest.raises(RemoteError, match=r"a bad answer; expected .*Score: N, .*Nothing of this batch is used"):
        reward(images, ["a", "b"])


def test_a_recipe_names_url_and_model(monkeypatch):
    monkeypatch.setenv(TOKEN, SECRET)
    made = load_vlm("http://127.0.0.1:8000/v1/chat/completions#owner/judge")
    assert (made.chat.model, made.chat.url) == ("owner/judge", "http://127.0.0.1:8000/v1/chat/completions")
    with pytest.raises(ValueError, match="names no model; write it behind the URL"):
        load_vlm("http://127.0.0.1:8000/v1/chat/completions")
    with pytest.raises(ValueError, match=r"reward.source.vlm-judge: http://far.example/v1 would send the token"):
        load_vlm("http://far.example/v1#m")
    with pytest.raises(ValueError, match=r"must hold .prompt. exactly once"):
        VLMReward("http://127.0.0.1:1", SECRET, model="m", question="How good?")
    with pytest.raises(
        recipe.RecipeError, match=r"reward.source.vlm-judge: give the server's URL, for example http://127.0.0.1"
    ):
        recipe.read("srpo-emoji", ["reward={name: vlm-judge}"])
