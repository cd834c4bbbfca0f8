"""The report is one inert, self-contained file: what a run's files say is shown, and nothing in them can act."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import shutil

import pytest
from PIL import Image
from support.pages import HOSTILE, Page, fake_run, sketch

from palate import report
from palate import runs as folders
from palate.cli import runs as runs_command
from palate.cli.compare_table import compare_runs
from palate.report import Line, Mark, tables
from palate.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, separate_labels, ticks
from palate.report.curves import smoothed
from palate.report.evaluation import _fall, prompt_cards
from palate.report.html import number, signed
from palate.report.page import run_page
from palate.report.pictures import clearest_pairs, grid, picture, preview_pairs, ranked_pairs
from palate.runtime.errors import InputError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return fake_run(root / "a"), fake_run(root / "b", lift=0.5)


def policy_of(text: str) -> dict[str, str]:
    """The content security policy of a page, by directive."""
    content = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text).group(1)
    return dict(part.strip().split(" ", 1) for part in content.split(";"))


def digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def test_the_report_shows_what_the_run_says(runs):
    path = report.write_report(runs[0])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert path == runs[0] / "report.html" and page.text.count("seed 0") >= 4
    evaluation = json.loads((runs[0] / "evaluation.json").read_text())
    assert report.sentence(evaluation) in page.text
    assert "Asked for 3d, away from flat and outline: " in page.text
    # four pairs that open the page, prompts x previews, typical, best and worst pairs; two for the enlarged picture
    assert page.tags.count("img") == 4 * 2 + 4 * 5 + 3 * 4 * 2 + 2
    assert page.text.count("optimised") >= 2 and "held out" in page.text
    assert "+outline −3d" in page.text and "rollback: concept fell by 0.06" in page.text
    row = re.search(r"<bdi>emoji-heldout</bdi>.*?</tr>", text, re.S).group()
    assert number(evaluation["metrics"]["reward/emoji-heldout"]["base"]) in row
    assert report.write_report(runs[0]).read_text(encoding="utf-8") == text  # deterministic


def test_the_page_loads_nothing_and_runs_its_own_script_alone(runs):
    found = evaluated(*runs)
    for path in (report.write_report(runs[0]), report.write_evaluation(runs, found)):
        text = path.read_text(encoding="utf-8")
        page, policy = Page(text), policy_of(text)
        (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
        (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
        assert policy == {
            "default-src": "'none'",
            "img-src": "data:",
            "style-src": digest(style),
            "script-src": digest(script),
            "base-uri": "'none'",
            "form-action": "'none'",
        }
        assert not {"link", "iframe", "object", "embed", "form"} & set(page.tags) and page.tags.count("script") == 1
        assert page.handlers == [] and " style=" not in text
        assert all(source.startswith("data:image/png;base64,") for source in page.sources)
        assert "@import" not in text and "url(" not in text and "http" not in script
        assert len(page.alts) == page.tags.count("img") and all(page.alts[:-2])  # the enlarged picture is filled later


def test_queries_are_not_shown_over_the_best_of_their_round(tmp_path):
    """The first of a row lies under the others only where it is the same noise before training."""
    run = fake_run(tmp_path / "a", steps=2)
    tree = json.loads((run / "recipe.yaml").read_text())
    tree["optimize"] = {"oracle": {"function": "mine:score"}, "budget": 9, "surrogate": "ucb"}
    (run / "recipe.yaml").write_text(json.dumps(tree))
    (run / "queries").mkdir()
    rows = [{"query": k, "round": 1, "prompt": "a dog", "file": f"queries/{k}.png", "score": k} for k in range(3)]
    (run / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        sketch(row["query"], 0.5).save(run / row["file"])
    text = report.write_report(run).read_text("utf-8")
    course, queries = (text[text.index(f"<h2>{name}</h2>") :] for name in ("Before, during, after", "The queries"))
    assert course[: -len(queries)].count('<tr data-row="the picture before">') == 4
    assert "round 1: 3 evaluated" in queries and "<tr data-row" not in queries
    compared = report.write_report(run, compare=[fake_run(tmp_path / "b", steps=2)]).read_text("utf-8")
    assert compared.count('<tr data-row="the base model&#39;s picture">') == 4


def test_columns_after_steering_say_under_which_words_they_were_made(runs):
    page = report.write_report(runs[0]).read_text(encoding="utf-8")
    head = re.search(r'<table class="pictures course">\n<thead>(.*?)</thead>', page, re.S).group(1)
    columns = re.findall(r"step (\d+)(?:<span class=\"words\"><bdi>(.*?)</bdi>)?", head)
    first, second = "+3d −flat, outline", "+outline −3d"
    assert columns == [("0", ""), ("10", first), ("20", second), ("30", second), ("40", second)]
    assert f"{first} → step 20: {second}" in page


def test_pictures_of_weights_that_the_guard_went_back_from_have_the_earlier_words(tmp_path):
    run = fake_run(tmp_path / "a")
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"event": "guard", "step": 40, "action": "stop", "best_step": 15, "verdict": "x"}) + "\n")
    page = report.write_report(run).read_text(encoding="utf-8")
    assert re.findall(r"step (\d+)<span class=\"words\"><bdi>(.*?)</bdi>", page)[-1] == ("40", "+3d −flat, outline")
    assert run_page(run)["words"] == "+3d −flat, outline"


def test_hostile_pictures_of_any_size_are_embedded_whole(tmp_path):
    sketch(0, 0.0, 96).save(tmp_path / "small.png")
    sketch(0, 0.0, 1000).save(tmp_path / "large.png")
    small, large = (report.picture(tmp_path / name) for name in ("small.png", "large.png"))
    decoded = Image.open(io.BytesIO(base64.b64decode(small.split(",")[1])))
    assert small.startswith("data:image/png") and decoded.tobytes() == sketch(0, 0.0, 96).tobytes()
    assert large.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))).size == (512, 512)


def test_hostile_words_are_shown_and_inert(tmp_path):
    folder = fake_run(tmp_path / "a", prompts=(HOSTILE, "a dog"))
    recipe = json.loads((folder / "recipe.yaml").read_text())
    recipe["algorithm"]["positive"] = [HOSTILE]
    recipe["reward"]["name"] = HOSTILE.replace("\x00", "")
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"event": "steer", "step": 3, "positive": [HOSTILE], "negative": []}) + "\n")
        log.write(
            json.dumps(
                {
                    "event": "guard",
                    "step": 4,
                    "verdict": "\x1b\x00\u202e" + HOSTILE,
                    "action": "stop",
                    "style/\x1b[0m": 0.1,
                    f"style/{HOSTILE}": 0.5,
                }
            )
            + "\n"
        )
    for path in (report.write_report(folder), report.write_report(folder, compare=(folder,))):
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        assert page.tags.count("script") == 1 and page.handlers == []
        assert all(source.startswith("data:") for source in page.sources)
        assert "{{ 7*7 }}" in page.text and "49" not in re.sub(r"\d*\.\d+", "", page.text).split()
        assert "<script>alert(1)</script>" in page.text  # as text
        assert not {"\x00", "\x1b", "\u202e"} & set(text) and "\\u202e" in text


def test_a_comparison_is_of_the_prompts_and_seeds_that_all_have(runs, tmp_path):
    path = report.write_report(runs[0], compare=(runs[1],))
    page = Page(path.read_text(encoding="utf-8"))
    assert (
        path == runs[0] / "compare.html" and page.tags.count("img") == 4 * 3 + 2 * 8 + 2
    )  # base, a, b; the pairs of each; the enlarged
    few = fake_run(tmp_path / "few", prompts=("a cat", "a bicycle on green", "a dog"), seeds=(0, 5), lift=0.3)
    both = [json.loads((run / "evaluation.json").read_text()) for run in (runs[0], few)]
    first, other = folders.on_common_rows(both, ["a", "few"])
    keys = [[(row["prompt"], row["seed"]) for row in evaluation["rows"]] for evaluation in (*both, first, other)]
    assert keys[2] == keys[3] == [key for key in keys[0] if key in keys[1]] and 0 < len(keys[2]) < len(keys[1])
    for evaluation in (first, other):
        assert "reward/emoji" in evaluation["metrics"] and "diversity" not in evaluation["metrics"]
        for key, metric in evaluation["metrics"].items():
            if not key.startswith("style/"):
                mean = sum(row[key] for row in evaluation["rows"]) / len(keys[2])
                assert metric["value"] == pytest.approx(mean, abs=1e-5)
                before = sum(row["base"][key] for row in evaluation["rows"]) / len(keys[2])
                assert metric["base"] == pytest.approx(before, abs=1e-5)
    text = report.write_report(few, compare=(runs[0],)).read_text(encoding="utf-8")
    assert f"{len(keys[2])} pairs of prompt and seed that all runs have" in text
    side_by_side = text.split("<h2>Side by side</h2>")[1].split("<h2>Numbers</h2>")[0]
    assert side_by_side.count("<img") == 2 * 3 and "a cat" not in side_by_side
    for stranger in (fake_run(tmp_path / "c", prompts=("a cat", "a mouse")), fake_run(tmp_path / "d", seeds=(5,))):
        with pytest.raises(ValueError, match="no prompt and seed in common"):
            report.write_report(runs[0], compare=(stranger,))


def test_previews_of_more_or_fewer_prompts_stand_side_by_side(tmp_path):
    """trainer.preview_prompts may change when a run is resumed."""
    folder = fake_run(tmp_path / "a")
    (folder / "evaluation.json").unlink()
    index = folder / "samples/step-000020/index.jsonl"
    index.write_text("".join(index.read_text().splitlines(True)[:2]))
    page = Page(report.write_report(folder).read_text(encoding="utf-8"))
    assert page.tags.count("img") == 4 * 2 + 2 * 5 + 2  # pairs of the ends, two prompts at five steps, the enlarged
    (folder / "samples/step-000040/index.jsonl").write_text(index.read_text())
    page = Page(report.write_report(folder).read_text(encoding="utf-8"))
    assert page.tags.count("img") == 2 * 2 + 2 * 5 + 2


def test_the_pairs_of_a_run_that_is_not_measured_are_those_that_changed_most(tmp_path):
    folder = fake_run(tmp_path / "a", prompts=[f"thing {k}" for k in range(6)])
    first, last = (folder / f"samples/step-{step:06d}" for step in (0, 40))
    for k, shade in enumerate((0, 40, 10, 30, 0, 20)):
        Image.new("RGB", (64, 64)).save(first / f"{k:04d}.png")
        Image.new("RGB", (64, 64), (shade, shade, shade)).save(last / f"{k:04d}.png")
    assert [pair["prompt"] for pair in preview_pairs(folder)] == ["thing 1", "thing 3", "thing 5", "thing 2"]


def test_the_pairs_of_a_taste_are_those_that_it_likes_better(tmp_path):
    """The held-out reward judges prompts, and sees nothing of what a taste changes."""
    folder = fake_run(tmp_path / "a")
    found = json.loads((folder / "evaluation.json").read_text())
    heldout = [pair["prompt"] for pair in clearest_pairs(folder, found, ())]
    for row in found["rows"]:
        order = heldout.index(row["prompt"])
        row["reward/taste"], row["base"]["reward/taste"] = float(order), 0.0
        row["correct"] = row["concept"] = row["base"]["concept"] = 1.0
    found["optimised"] = ["taste"]
    assert [pair["prompt"] for pair in clearest_pairs(folder, found, ())] == heldout[::-1]


def evaluated(*paths):
    found = {path.name: json.loads((path / "evaluation.json").read_text()) for path in paths}
    first = paths[0].name
    between = {path.name: folders.between(found[first], found[path.name]) for path in paths[1:]}
    return {"first": first, "runs": found, "between": between}


def test_the_evaluation_of_several_runs_is_one_page(runs):
    found = evaluated(*runs)
    path = report.write_evaluation(runs, found)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert (
        path == runs[0] / "evaluation.html" and report.write_evaluation(runs, found).read_text(encoding="utf-8") == text
    )
    assert json.loads((runs[0] / "evaluations.json").read_text()) == found
    for name, evaluation in found["runs"].items():
        assert report.sentence(evaluation) in page.text and name in page.text
        change = evaluation["metrics"]["reward/emoji-heldout"]["change"]
        assert signed(change) in re.search(r'<th scope="row"><bdi>emoji-heldout</bdi>.*?</tr>', text, re.S).group()
    for part in (
        "Run against run",
        "colour cast",
        "cross-prompt duplicates",
        "feature distance",
        "Vendi score",
        "Worst",
        "Best",
    ):
        assert part in page.text
    # per run four pairs at the top and typical, best and worst ones; a card per prompt; the enlarged picture
    assert page.tags.count("img") == 2 * (8 + 3 * 8) + 4 * 3 + 2
    one = report.write_evaluation(runs[:1], evaluated(runs[0]), runs[0] / "other" / "one.html")
    assert "Run against run" not in one.read_text(encoding="utf-8") and not one.with_suffix(".json").exists()


def test_a_card_shows_each_run_s_own_picture_of_its_prompt(runs, tmp_path):
    """Stored evaluations may be of other prompts, or of the same ones in another order: there the file of that number
    is of another prompt, or there is none."""
    few = fake_run(tmp_path / "few", prompts=("a dog", "a cat"), lift=0.3)
    cards = prompt_cards([runs[0], few], list(evaluated(runs[0], few)["runs"].values()))["cards"]
    shown = {card["prompt"]: {item["alt"]: item["src"] for item in card["pictures"]} for card in cards}
    own = next(row for row in folders.read_index(few / "evaluation/result") if row["prompt"] == "a dog")
    assert shown["a dog"]["a dog, few"] == picture(few / "evaluation/result" / own["file"])
    assert len(shown["a dog"]) == 3 and list(shown["a fox, small"]) == ["a fox, small, before", "a fox, small, a"]


def test_prompts_are_sorted_by_change(runs):
    evaluations = list(evaluated(*runs)["runs"].values())
    table = tables.prompt_table(evaluations)
    heads = ["optimised", "held out", "right object"]
    assert table["heads"] == [(i, name) for i in (0, 1) for name in heads]

    def of(p, key, e=evaluations[1]):
        return [r[key] - r["base"][key] for r in e["rows"] if r["prompt"] == p and key in r]

    for row in table["rows"]:
        values = of(row["prompt"], "reward/emoji-heldout")
        assert row["changes"][4] == pytest.approx(sum(values) / len(values))
    cards = [{"changes": [first, 9.0]} for first in (0.2, None, -1.0, 0.3)]
    assert [card["changes"][0] for card in sorted(cards, key=_fall)] == [0.3, 0.2, -1.0, None]
    text = report.write_evaluation(runs, evaluated(*runs)).read_text(encoding="utf-8")
    cards = re.findall(r'<figure data-changes="([^"]*)">', text)
    first = [float(card.split()[0]) for card in cards]
    assert first == sorted(first, reverse=True) and text.count("<option") == 2 * 6


def test_other_words_get_rows_of_their_own(runs):
    found = evaluated(*runs)

    def names():
        return [row["name"] for table in tables.metric_tables(found["runs"]) for row in table["rows"]]

    assert names().count("emoji-relative") == 1
    found["runs"]["b"]["words"] = {"positive": ["outline"], "negative": []}
    assert {"emoji-relative (+3d −flat, outline)", "emoji-relative (+outline)"} <= set(names())
    rows = {row["name"]: row for table in tables.metric_tables(found["runs"]) for row in table["rows"]}
    assert rows["emoji-relative (+outline)"]["cells"][0] is None and rows["emoji"]["cells"][1]["tag"] == "optimised"
    beside = [row["name"] for row in tables.compare_table(list(found["runs"].values()))]
    assert "emoji" in beside and "emoji-relative" not in beside


def test_what_was_optimised_comes_first_and_then_what_was_held_out():
    keys = ("zebra", "diversity", "concept", "reward/a", "reward/held", "reward/b")
    found = {"optimised": ["b"], "heldout": "held", "metrics": {key: {"value": 0.0} for key in keys}}
    assert [(row["key"], row["tag"]) for row in tables.metric_rows(found)] == [
        ("reward/b", "optimised"), ("reward/held", "held out"), ("reward/a", ""), ("concept", ""), ("diversity", ""),
        ("zebra", ""),
    ]  # fmt: skip


def test_numbers_have_three_digits_or_two_decimals():
    values = (None, 0.0, 1234.6, 123.46, -2.346, 0.5, 0.0001)
    assert [number(value) for value in values] == ["–", "0", "1,235", "123.5", "−2.35", "0.500", "0.00010"]
    assert [signed(value) for value in (0.5, -0.5, 0.0, None)] == ["+0.500", "−0.500", "0", "–"]


def test_drift_is_each_run_s_own():
    drifts = [{"drift": {"saturation_ratio": value}, "metrics": {}} for value in (1.0, 2.0)]
    assert {row["name"]: row["cells"] for row in tables.drift_rows(drifts)}["saturation"] == [1.0, 2.0]


def test_the_first_and_the_last_of_many_previews_are_among_those_shown(tmp_path):
    folder = fake_run(tmp_path / "a", prompts=("a dog",), steps=9)
    steps = [head["step"] for head in grid(folder, [], [])["heads"]]
    assert len(steps) == 6 and (steps[0], steps[-1]) == ("step 0", "step 80")


def test_the_best_pairs_are_those_whose_held_out_reward_rose_most(tmp_path):
    folder = fake_run(tmp_path / "a")
    found = json.loads((folder / "evaluation.json").read_text())
    for k, row in enumerate(found["rows"]):
        row["reward/emoji-heldout"], row["base"]["reward/emoji-heldout"] = 1.0, 0.1 * k
    order = [(row["prompt"], row["seed"]) for row in found["rows"]]
    typical, best, worst = ([(pair["prompt"], pair["seed"]) for pair in group["pairs"]]
                            for group in ranked_pairs(folder, found))  # fmt: skip
    assert best == order[: len(best)] and worst == order[::-1][: len(worst)]
    assert not set(typical) & {order[0], order[-1]}


def test_hostile_words_are_inert_on_the_page_of_an_evaluation(tmp_path):
    folder = fake_run(tmp_path / "a", prompts=(HOSTILE, "a dog"))
    found = evaluated(folder)
    why = {"metric": f"reward/{HOSTILE}", "prompt": HOSTILE, "seed": 0, "side": "base", "why": HOSTILE}
    found["runs"]["a"] |= {"failed": [why], "words": {"positive": [HOSTILE], "negative": []}, "optimised": [HOSTILE]}
    found["runs"]["a"]["metrics"][f"reward/{HOSTILE}"] = found["runs"]["a"]["metrics"]["reward/emoji"]
    text = report.write_evaluation([folder], found).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1 and page.handlers == [] and all(s.startswith("data:") for s in page.sources)
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text and "Left out" in page.text
    assert not {"\x00", "\x1b", "\u202e"} & set(text)


def test_a_run_that_has_only_begun_is_reported_and_a_broken_one_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: {name: emoji}\n")
    assert "Not measured yet" in report.write_report(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "step", "step": 1, "reward": 0.5}\n{"event": "st'
    )  # killed while writing
    assert "The objective" in report.write_report(tmp_path).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not a run \(it holds no recipe.yaml\)"):
        report.write_report(tmp_path / "nowhere")
    folder = fake_run(tmp_path / "run")
    (folder / "samples/step-000000/0001.png").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"0001.png cannot be read"):
        report.write_report(folder)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (["rows"], "rows"), (["prompts"], "prompts"), (["seeds"], "seeds"), (["rows", 2, "prompt"], "rows[2].prompt"),
        (["rows", 0, "seed"], "rows[0].seed"), (["metrics", "diversity", "value"], "metrics.diversity.value"),
        (["metrics", "concept", "change_low"], "metrics.concept.change_low"),
        (["metrics", "reward/emoji", "high"], "metrics.reward/emoji.high"),
    ],
)  # fmt: skip
def test_an_evaluation_that_somebody_cut_is_named_with_what_it_lacks(runs, tmp_path, path, named):
    """What a page can do without may be missing, as in files of earlier versions."""
    run = tmp_path / "a"
    shutil.copytree(runs[0], run)
    tree = json.loads((run / "evaluation.json").read_text())
    for key in ("verdict", "words", "drift", "by_prompt", "failed"):
        tree.pop(key, None)
    (run / "evaluation.json").write_text(json.dumps(tree))
    report.write_report(run)
    place = tree
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    (run / "evaluation.json").write_text(json.dumps(tree))
    told = f"{run / 'evaluation.json'}: {named} is missing or of another kind; write it again with palate evaluate"
    with pytest.raises(InputError, match=re.escape(told)):
        report.write_report(run)
    if path[0] == "rows" or path[-1] == "value":
        with pytest.raises(InputError, match="are missing; write it again"):
            compare_runs([run, runs[1]], None)
    assert runs_command.describe(run).state != "broken"


def test_a_chart_places_values_where_they_belong():
    svg = str(
        report.chart(
            "t", [Line("up", [(0, 0.0), (10, 0.5), (20, 1.0)], True)], [Mark(10, "now", "steer")], unit_range=True
        )
    )
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]+)"', svg).group(1).split()]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert points[0] == (LEFT, bottom) and points[2] == (right, TOP)
    assert points[1] == ((LEFT + right) / 2, (bottom + TOP) / 2)
    assert f'class="mark steer" x1="{points[1][0]}"' in svg and 'aria-label="t: up from 0 to 1; step 10: now"' in svg
    assert report.chart("t", [Line("none", [(0, math.nan)])]) == ""


def test_a_smoothed_curve_takes_as_many_steps_from_either_side():
    """So that a straight one stays as it is, at its ends too."""
    straight = [(step, 3.0 - 2.0 * step) for step in range(10)]
    for width in (0, 1, 3, 20):
        assert smoothed(straight, width) == [(step, pytest.approx(value)) for step, value in straight]
    assert smoothed([(step, float(step == 2)) for step in range(5)], 1)[1:4] == [
        (k, pytest.approx(1 / 3)) for k in (1, 2, 3)
    ]


def test_ticks_are_round_and_labels_keep_apart():
    assert ticks(0, 1) == [0, 0.5, 1] and ticks(0, 40, 5) == [0, 10, 20, 30, 40]
    assert ticks(-0.13, 0.31) == [0, 0.2]
    places = separate_labels([50, 51, 20, 52, 240], 14, 0, 240)
    assert (
        all(b - a >= 14 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
        and places[4] == 240
        and places[2] == 20
    )


def test_a_damaged_file_beside_a_run_has_a_remedy_that_works(tmp_path):
    run = fake_run(tmp_path / "run", steps=2)
    (run / "environment.json").write_text("{")
    with pytest.raises(InputError, match=r"environment\.json is not JSON .*; delete it$"):
        report.write_report(run)
    (run / "environment.json").unlink()
    assert report.write_report(run).is_file()
