"""Helpers of the studio's tests."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest

HOSTILE = [
    "<script>window.pwned=1</script>", "<img src=x onerror=window.pwned=1>", '"><svg onload=window.pwned=1>',
    "'-window.pwned=1-'", "{{ 7*7 }}", "{% import os %}", "javascript:window.pwned=1", "\u202efox\u2066",
    "fox\x1b[31m", "</title><script>window.pwned=1</script>", "' hx-on:load='window.pwned=1", "../../../etc/passwd",
    "a" * 5000, "<iframe srcdoc='<script>parent.pwned=1</script>'>", "&lt;script&gt;window.pwned=1&lt;/script&gt;",
    "<a href=javascript:window.pwned=1>x</a>", "<style>*{display:none}</style>", "<base href=http://evil.example>",
    "<form action=http://evil.example>", "<meta http-equiv=refresh content=0;url=http://evil.example>",
]  # fmt: skip


def wait_for(condition, seconds=30.0, what=""):
    """What the condition returns once it is true; fails after the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    pytest.fail(f"waited {seconds} s for {what or condition}")


class Labels(HTMLParser):
    """Problems of a page: buttons, links and fields without a name, inline scripts, styles and handlers, ids twice."""

    def __init__(self, text):
        super().__init__()
        self.problems, self.stack, self.ids, self.labels = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            if attrs["id"] in self.ids:
                self.problems.append(f"id {attrs['id']} twice")
            self.ids.append(attrs["id"])
        if tag == "script" and "src" not in attrs:
            self.problems.append("inline script")
        if "style" in attrs or tag == "style" or any(name.startswith("on") for name in attrs):
            self.problems.append(f"inline style or handler on {tag}")
        if tag == "img" and "alt" not in attrs:
            self.problems.append("img without alt")
        self.labels += tag == "label"
        fields = tag in ("input", "select", "textarea") and attrs.get("type") != "hidden"
        if fields and not self.labels and "aria-label" not in attrs:
            self.problems.append(f"{tag} {attrs.get('name')} without a label")
        if tag in ("button", "a"):
            self.stack.append([tag, bool(attrs.get("aria-label"))])
        if tag == "img" and attrs.get("alt") and self.stack:
            self.stack[-1][1] = True

    def handle_data(self, data):
        if self.stack and data.strip():
            self.stack[-1][1] = True

    def handle_endtag(self, tag):
        self.labels -= tag == "label"
        if self.stack and self.stack[-1][0] == tag and not self.stack.pop()[1]:
            self.problems.append(f"{tag} without a name")
