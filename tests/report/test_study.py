"""A blind study: the page cannot tell whose picture is whose, the key can; the win rate has the interval it says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re

import pytest
import torch
from PIL import Image
from support.pages import HOSTILE, Page

from palate import cli, evaluate, runs
from palate.evaluate.intervals import wilson, win_rate_interval
from palate.report import study
from palate.runtime.errors import InputError


def run(path, shade: float, prompts=("a dog", "an apple", "a fox"), seeds=(0, 1)):
    """A run with the images of an evaluation: plain colours, the run's shade in red, the row in green."""
    words, numbers = evaluate.pairs(prompts, seeds)
    images = torch.stack(
        [torch.tensor([shade, i / 10, 0.5]).view(3, 1, 1).expand(3, 16, 16) for i in range(len(words))]
    )
    runs.write_samples(path / "evaluation/result", images, words, numbers, guidance=3.0, steps=8)
    return path


@pytest.fixture
def two(tmp_path):
    return run(tmp_path / "alpha", 0.2), run(tmp_path / "beta", 0.8)


def shown(page: Page) -> list[list[bool]]:
    """For every pair, whether the left and the right picture are beta's."""
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in page.sources]
    red = [image.getpixel((0, 0))[0] > 128 for image in pictures]
    return [red[i : i + 2] for i in range(0, len(red), 2)]


def test_the_key_says_what_the_page_shows_and_the_page_says_nothing(two):
    path, key_path = study.write_study(*two)
    text, key = path.read_text("utf-8"), json.loads(key_path.read_text())
    page = Page(text)
    assert path == two[0] / "compare-blind.html" and key_path == two[0] / "compare-blind-key.json"
    assert key["runs"] == {"a": "alpha", "b": "beta"} and len(key["pairs"]) == 6
    assert shown(page) == [[pair["left"] == "b", pair["left"] == "a"] for pair in key["pairs"]]
    words = re.findall(r'class="words"><bdi>(.*?)</bdi>', text)
    assert words == [pair["prompt"] for pair in key["pairs"]]
    for secret in ("alpha", "beta", str(key["seed"]), "0000.png", "evaluation/"):
        assert secret not in text
    assert key["study"] in text
    for row in key["pairs"]:
        index = runs.read_index(two[0] / "evaluation/result")
        assert {"file": row["files"]["a"], "prompt": row["prompt"], "seed": row["seed"]}.items() <= index[
            int(row["files"]["a"][:4])
        ].items()


def test_sides_and_order_are_drawn_from_the_seed(two, tmp_path):
    keys = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2), ("s", None), ("t", None)):
        keys.append(json.loads(study.write_study(*two, page=tmp_path / f"{name}.html", seed=seed)[1].read_text()))
    assert keys[0] == keys[1] != keys[2] and keys[3]["seed"] != keys[4]["seed"] and keys[3]["study"] != keys[4]["study"]
    assert (tmp_path / "x.html").read_bytes() == (tmp_path / "y.html").read_bytes()
    few = json.loads(study.write_study(*two, page=tmp_path / "few.html", seed=1, count=2)[1].read_text())
    assert few["pairs"] == keys[0]["pairs"][:2]
    assert {pair["left"] for key in keys[:3] for pair in key["pairs"]} == {"a", "b"}
    orders = [[pair["files"]["a"] for pair in key["pairs"]] for key in (keys[0], keys[2])]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) and orders[0] != sorted(orders[0])
    left = sum(study._draw(seed, "side", i)[0] % 2 for seed in range(20) for i in range(50))
    assert abs(left - 500) < 4 * 250**0.5  # fair: four standard deviations of 1,000 flips


def test_the_page_runs_its_own_script_and_loads_nothing(two):
    text = study.write_study(*two)[0].read_text("utf-8")
    page = Page(text)
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    assert page.tags.count("script") == 1 and page.handlers == [] and not {"link", "iframe", "form"} & set(page.tags)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert set(page.alts) == {"left picture", "right picture"}


def test_hostile_words_are_shown_and_inert(tmp_path):
    pair = [run(tmp_path / name, shade, prompts=(HOSTILE, "a dog")) for name, shade in (("a", 0.2), ("b", 0.8))]
    text = study.write_study(*pair)[0].read_text("utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1 and page.handlers == [] and "<script>alert(1)</script>" in page.text
    assert all(source.startswith("data:") for source in page.sources) and "{{ 7*7 }}" in page.text
    assert not {"\x00", "\x1b", "\u202e"} & set(text)


def test_a_study_is_of_what_both_have_in_whichever_evaluation(two, tmp_path):
    gamma = run(tmp_path / "gamma", 0.8, prompts=("a fox", "a cat", "a dog"), seeds=(0, 7))
    for number in (1, 2):  # an evaluation that was put aside for a later one serves as well
        path, key_path = study.write_study(two[0], gamma, page=tmp_path / f"p{number}.html")
        pairs = json.loads(key_path.read_text())["pairs"]
        assert sorted((p["prompt"], p["seed"]) for p in pairs) == [("a dog", 0), ("a fox", 0)]
        assert {p["prompt"]: p["files"] for p in pairs} == {
            "a dog": {"a": "0000.png", "b": "0004.png"}, "a fox": {"a": "0004.png", "b": "0000.png"}
        }  # fmt: skip
        assert shown(Page(path.read_text("utf-8"))) == [[pair["left"] == "b", pair["left"] == "a"] for pair in pairs]
        if number == 1:
            (gamma / "evaluations/0123").mkdir(parents=True)
            (gamma / "evaluation").rename(gamma / "evaluations/0123/evaluation")
            run(gamma, 0.8, seeds=(7, 8))


def test_studies_that_would_mislead_are_refused(two, tmp_path):
    study.write_study(*two)
    with pytest.raises(ValueError, match=r"compare-blind-key.json is there already"):
        study.write_study(*two)
    with pytest.raises(ValueError, match="alpha and gamma have no prompt and seed in common"):
        study.write_study(two[0], run(tmp_path / "gamma", 0.1, seeds=(7, 8)), page=tmp_path / "p.html")
    with pytest.raises(ValueError, match="given twice"):
        study.write_study(two[0], two[0], page=tmp_path / "p.html")
    (two[1] / "evaluation/result/0002.png").unlink()
    with pytest.raises(ValueError, match=r"0002.png is missing"):
        study.write_study(*two, page=tmp_path / "p.html")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"has no pictures that .* run palate evaluate on both"):
        study.write_study(empty, two[1], page=tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists() and not (tmp_path / "p-key.json").exists()


# --- the result ---

KEY = {"study": "s", "runs": {"a": "alpha", "b": "beta"}, "pairs": [{"left": side} for side in "abab"]}


def row(pair, choice, session="one", study="s"):
    return {"study": study, "session": session, "pair": pair, "choice": choice}


def test_a_choice_counts_for_the_run_that_was_on_that_side_and_a_tie_for_both():
    choices = [row(0, "left"), row(1, "left"), row(2, "right"), row(3, "tie"), row(3, "right", "two")]
    result = study.score(choices, KEY)
    assert result["wins"] == {"a": 2, "b": 2} and result["ties"] == 1 and result["sessions"] == 2
    interval = win_rate_interval([1, 0, 1, 0.5, 0], [0, 1, 2, 3, 3])
    assert result["win_rate"] == 0.5 and (result["low"], result["high"]) == interval
    assert result["decided"]["win_rate"] == 0.5 and result["decided"]["low"] == pytest.approx(wilson(2, 4)[0])
    assert "no preference is shown" in study.text_of(result)
    key = KEY | {"pairs": [{"left": side} for side in "abababababab"]}
    for people, whose in ((12, ""), (3, " by these"), (1, " by this person")):
        sides = ["left" if pair["left"] == "b" else "right" for pair in key["pairs"]]
        one_sided = study.score([row(i, side, str(i % people)) for i, side in enumerate(sides)], key)
        assert one_sided["win_rate"] == 0.0 and study.text_of(one_sided).endswith(f"beta is preferred{whose}")
    halves = sides[:6] + sides[1:7]  # beta of the first six pairs, alpha of the others
    alike = study.score([row(i, side, str(i % 6)) for i, side in enumerate(halves)], key)
    apart = study.score([row(i, side, str(i // 2)) for i, side in enumerate(halves)], key)
    assert apart["win_rate"] == alike["win_rate"] == 0.5 and apart["high"] > alike["high"]  # six with a taste each
    few = study.score([row(i % 4, sides[i % 4], str(i)) for i in range(12)], KEY)
    assert few["win_rate"] == 0.0 and "no preference" in study.text_of(few)  # four pairs agree once in eight by chance
    two_prompts = {**key, "pairs": [pair | {"prompt": "ab"[i % 2]} for i, pair in enumerate(key["pairs"])]}
    assert study.score([row(i, side) for i, side in enumerate(sides)], two_prompts)["high"] > 0.5
    assert study.score([row(0, "tie")], KEY)["decided"] is None


def test_choices_are_read_once_and_contradictions_are_named(tmp_path):
    def file(name, *rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    early, late = (
        file("early.jsonl", row(0, "left")),
        file("late.jsonl", row(0, "left"), row(1, "tie"), row(0, "right", "two")),
    )
    assert len(study.read_choices([early, late])) == 3
    odd = tmp_path / "odd.jsonl"  # as a browser writes it: JSON.stringify leaves these characters as they are
    odd.write_text(json.dumps(row(0, "left", "a\u2028b\x85c"), ensure_ascii=False) + "\n", "utf-8")
    assert [found["session"] for found in study.read_choices([odd])] == ["a\u2028b\x85c"]
    with pytest.raises(ValueError, match=r"late2.jsonl line 1: pair 0 of session one was 'left' before and is 'right'"):
        study.read_choices([early, file("late2.jsonl", row(0, "right"))])
    for bad in ({"study": "s"}, row(0, "middle"), row("0", "left"), row(True, "left"), [1], "x"):
        with pytest.raises(ValueError, match=r"bad.jsonl line 1"):
            study.read_choices([file("bad.jsonl", bad)])
    with pytest.raises(ValueError, match="holds no choice"):
        study.read_choices([file("none.jsonl")])
    with pytest.raises(ValueError, match="does not exist"):
        study.read_choices([tmp_path / "nowhere.jsonl"])
    with pytest.raises(ValueError, match="one study at a time"):
        study.score([row(0, "left", study="t")], KEY)
    with pytest.raises(ValueError, match="pair 4; this study has pairs 0 to 3"):
        study.score([row(4, "left")], KEY)


def test_the_key_is_found_by_its_study(two, tmp_path, monkeypatch):
    _, key_path = study.write_study(*two)
    key = json.loads(key_path.read_text())
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps(row(0, "left", study=key["study"])) + "\n")
    assert study.find_key([choices], run=two[0]) == study.find_key([choices], key=key_path) == key
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name it with --key"):
        study.find_key([choices])
    (tmp_path / "runs").mkdir()
    two[0].rename(tmp_path / "runs" / "alpha")
    (tmp_path / "runs" / "aaa").mkdir()
    (tmp_path / "runs" / "aaa" / "x-key.json").write_text("{")  # another study's, cut short
    assert study.find_key([choices]) == key
    choices.write_text(json.dumps(row(0, "left", study="other")) + "\n")
    with pytest.raises(ValueError, match="the key of study 'other'"):
        study.find_key([choices])
    with pytest.raises(ValueError, match="is not the key"):
        study.find_key([choices], key=choices)


def test_a_study_from_the_command_line(two, tmp_path, monkeypatch, capsys):
    def palate(*arguments):
        monkeypatch.setattr("sys.argv", ["palate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    for folder in two:
        (folder / "recipe.yaml").write_text("model: {name: emoji}\n")
    code, out, _ = palate("compare", *two, "--blind", "--count", 4, "--seed", 3)
    assert code == 0 and "compare-blind.html" in out and "compare-blind-key.json" in out
    key = json.loads((two[0] / "compare-blind-key.json").read_text())
    choices = tmp_path / "choices.jsonl"
    sides = ["left" if pair["left"] == "b" else "right" for pair in key["pairs"]]
    choices.write_text("".join(json.dumps(row(i, side, study=key["study"])) + "\n" for i, side in enumerate(sides)))
    code, out, _ = palate("compare", two[0], "--score", choices)
    assert code == 0 and "beta: 4 wins" in out and "win rate of alpha: 0.000, 95 % interval 0.000 to 0.861" in out
    for arguments in (
        ["compare"],
        ["compare", two[0]],
        ["compare", "--score", choices],
        ["compare", *two, "--blind", "--count", 4],
        ["compare", *two, "--count", 4],
        ["compare", *two, "--seed", 4],
        ["compare", *two, "--key", choices],
        ["compare", *two, "--blind", "--score", choices],
    ):
        code, _, err = palate(*arguments)
        assert code == 2 and err.startswith("palate: ") and "Traceback" not in err


def test_a_file_that_is_no_text_is_no_choice_and_no_key(two, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe\n{}")
    with pytest.raises(InputError, match="expected"):
        study.read_choices([tmp_path / "picture.png"])
    with pytest.raises(InputError, match="is not the key"):
        study._read_key(tmp_path / "picture.png")
    (tmp_path / "marked.jsonl").write_bytes(
        json.dumps({"study": "s", "session": "1", "pair": 0, "choice": "tie"}).encode("utf-8-sig")
    )
    assert study.read_choices([tmp_path / "marked.jsonl"])[0]["choice"] == "tie"


def test_pictures_that_were_only_begun_are_not_taken_for_whole(two):
    """A drawing that breaks off over an older one leaves no index, so that nothing judges a mixture of both."""

    def part(count):
        yield torch.zeros(count, 3, 16, 16)
        raise KeyboardInterrupt

    folder = two[0] / "evaluation/result"
    with pytest.raises(KeyboardInterrupt):
        runs.write_samples(folder, part(2), *evaluate.pairs(["a dog"], range(6)), guidance=3.0, steps=8)
    with pytest.raises(InputError, match="is missing"):
        runs.read_index(folder)


def test_choices_about_pictures_that_were_drawn_anew_are_no_votes(two, tmp_path):
    from palate.taste.readers import import_votes
    from palate.taste.votes import VoteStore

    _, key = study.write_study(*two, count=2)
    choice = {"study": json.loads(key.read_text())["study"], "session": "1", "pair": 0, "choice": "left"}
    (tmp_path / "choices.jsonl").write_text(json.dumps(choice))
    assert import_votes(tmp_path / "choices.jsonl", VoteStore(tmp_path / "votes"), key=key) == 1
    run(two[1], 0.9)  # evaluated again after more training
    with pytest.raises(InputError, match="drawn anew since the study"):
        import_votes(tmp_path / "choices.jsonl", VoteStore(tmp_path / "more"), key=key)
