"""A vision-language server for tests: OpenAI's chat completions, its answers given by a function of the request."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

SECRET = "a-token-of-twenty-six-bytes"


@dataclass
class FakeJudge:
    """`say` gives an answer's text from (pixels, question), or {token: probability} of its first token, the likeliest
    of which is written. `logprobs`: whether the server tells them; `refuses`: whether it answers 400 to who asks for
    them. `script`: HTTP answers that come first, one per request. `after` answers it stops to answer until `go`."""

    say: Callable[[np.ndarray, str], str | dict[str, float]] = lambda pixels, question: "yes"
    logprobs: bool = True
    refuses: bool = False
    script: list[int] = field(default_factory=list)
    seconds: float = 0.0
    raw: bytes | None = None
    after: int | None = None
    url: str = ""
    asked: list[tuple[np.ndarray, str, dict[str, Any]]] = field(default_factory=list)
    received: Counter = field(default_factory=Counter)
    answered: Counter = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def source(self) -> str:
        return f"{self.url}#owner/judge"


@contextlib.contextmanager
def serving(judge: FakeJudge) -> Iterator[FakeJudge]:
    """Inside, `judge.url` is that of a running server."""

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            try:
                status, body = self._answer(request)
            finally:
                with judge.lock:
                    judge.at_once -= 1
            with contextlib.suppress(OSError):  # whoever asked may be gone
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def _answer(self, request):
            if self.headers["Authorization"] != f"Bearer {SECRET}":
                return 401, b'{"error": "no token"}'
            with judge.lock:
                if judge.script and (status := judge.script.pop(0)) != 200:
                    return status, b'{"error": "as the script says"}'
            if judge.refuses and request.get("logprobs"):
                return 400, b'{"error": "logprobs is not supported"}'
            pixels, question = parts_of(request)
            key = (pixels.tobytes(), question)
            with judge.lock:
                judge.asked.append((pixels, question, request))
                judge.received[key] += 1
                stop = judge.after is not None and sum(judge.answered.values()) >= judge.after
                if not stop:
                    judge.answered[key] += 1
            if stop:
                judge.go.wait(60)
                return 503, b"{}"
            time.sleep(judge.seconds)
            body = judge.raw if judge.raw is not None else completion(judge, request, judge.say(pixels, question))
            return 200, body

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"
    try:
        yield judge
    finally:
        judge.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


def parts_of(request: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The picture and the text of a request."""
    picture, text = request["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data))), text["text"]


def completion(judge: FakeJudge, request: dict[str, Any], said: str | dict[str, float]) -> bytes:
    """The body of a chat completion that says it."""
    chances = {said: 1.0} if isinstance(said, str) else said
    written = max(chances, key=lambda token: chances[token])
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": written}}
    if judge.logprobs and request.get("logprobs"):
        top = [{"token": token, "logprob": math.log(chance), "bytes": list(token.encode())}
               for token, chance in chances.items()]  # fmt: skip
        place = {"token": written, "logprob": math.log(chances[written]), "top_logprobs": top}
        end = {"token": "", "logprob": 0.0, "top_logprobs": []}
        choice["logprobs"] = {"content": [place, end]}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
