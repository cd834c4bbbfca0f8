"""The sentence, the gauges and the curves of a report: what they say, and that they alarm where the verdict does."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from markupsafe import Markup
from support.pages import fake_run

from palate import report
from palate.evaluate.verdicts import verdict
from palate.report import gauges, sentence
from palate.report.curves import curves
from palate.report.html import environment
from palate.report.story import win_share

PROMPTS = 20


def metric(base, value, spread=0.01):
    """Before and after, with an interval of the change of that half width."""
    change = value - base
    return {"base": base, "base_low": base, "base_high": base, "value": value, "low": value, "high": value,
            "change": change, "change_low": change - spread, "change_high": change + spread}  # fmt: skip


def evaluation(*, prompts=PROMPTS, positive=("3d",), styles=("3d", "flat"), **metrics):
    """100 pictures, 5 in each wanted style before; `styles` after in turn."""
    rows = [{"prompt": str(i % prompts), "seed": i // prompts, "style": styles[i % len(styles)], "concept": 1.0,
             "base": {"style": "3d" if i < 5 else "cartoon" if i < 10 else "flat", "concept": 1.0}}
            for i in range(100)]  # fmt: skip
    found = {"reward/emoji": metric(0.0, 1.0), "reward/held": metric(2.0, 2.0), "concept": metric(0.97, 0.96),
             "diversity": metric(0.06, 0.04), "style/3d": metric(0.05, 0.5),
             "style/cartoon": metric(0.05, 0.5)}  # fmt: skip
    found |= {key.replace("__", "/").replace("_relative", "-relative"): value for key, value in metrics.items()}
    found = {key: value for key, value in found.items() if value}
    return {"prompts": prompts, "words": {"positive": list(positive), "negative": ["flat", "outline"]},
            "optimised": ["emoji"], "heldout": "held", "metrics": found, "rows": rows}  # fmt: skip


def test_the_sentence_is_the_story_in_words():
    assert sentence(evaluation(style__3d=metric(0.05, 0.69))) == (
        "Asked for 3d, away from flat and outline: 69 of 100 pictures are 3d now, 5 before; 96 of 100 still show the "
        "right thing; a third of the variety went."
    )


def test_several_wanted_styles_are_counted_together_in_the_sentence_and_in_the_gauge():
    found = evaluation(positive=("3d", "cartoon"), styles=("3d", "cartoon", "flat", "3d"))
    assert "75 of 100 pictures are 3d or cartoon now, 10 before" in sentence(found)
    wanted = gauges(found)[0]
    assert (wanted.figure, wanted.base, wanted.state) == ("75%", pytest.approx(0.1), "good")
    assert "pictures that are 3d or cartoon, 10% before" in wanted.text


def test_gauges_alarm_where_the_verdict_does_and_nowhere_else():
    """A fall of the plain held-out reward that a change of style makes is no alarm; two prompts tell nothing."""

    def kept(prompts=PROMPTS, **metrics):
        found = evaluation(prompts=prompts, concept=None, **metrics)
        said = verdict(found["metrics"], ["emoji"], "held", num_prompts=prompts)
        gauge = {g.title: g for g in gauges(found)}["Kept"]
        assert (gauge.state == "bad") == any("over-optimised" in warning for warning in said["warnings"])
        return gauge.state

    assert kept() == "good"
    assert kept(reward__held=metric(2.0, 1.9)) == "bad"
    assert kept(reward__held=metric(2.0, 1.9), reward__held_relative=metric(0.1, 0.4)) == "fair"
    assert kept(reward__held_relative=metric(0.4, 0.1)) == "bad"
    assert kept(prompts=2, reward__held=metric(2.0, 1.997, 0.001)) == "none"


def test_a_taste_is_asked_for_in_its_own_words_and_may_change_what_prompts_leave_open():
    """An objective has a number, a taste likes a picture better; the guard's limit is the alarm's."""
    found = evaluation(positive=(), reward__taste=metric(6.4, 6.5), reward__held=metric(0.745, 0.742, 0.001))
    found |= {"words": {}, "optimised": ["taste"]}
    for i, row in enumerate(found["rows"]):
        row["reward/taste"], row["base"]["reward/taste"] = float(i < 77), 0.5
    said = "Asked for what the taste likes: it prefers the new picture in 77 of 100 pairs; 96 of 100 still show the"
    assert sentence(found).startswith(said)
    assert gauges(found)[0].text == "pairs that the taste prefers; taste 6.40 → 6.50"
    del found["metrics"]["concept"]
    for limit, state in ((0.0, "bad"), (0.08, "fair")):
        warned = verdict(found["metrics"], ["taste"], "held", may_fall=limit)["warnings"]
        kept = {g.title: g for g in gauges(found | {"heldout_may_fall": limit})}["Kept"]
        assert kept.state == state and ("over-optimised" in "".join(warned)) == (state == "bad")


def test_a_picture_that_did_not_change_is_half_a_win():
    assert win_share([1.0, 0.0, 0.0, -1.0]) == 0.5 == win_share([]) and win_share([0.2, 0.0]) == 0.75


def test_a_cost_is_what_went_and_not_what_is_left():
    cost = gauges(evaluation(diversity=metric(0.06, 0.045)))[-1]
    assert (cost.figure, cost.base) == ("25%", 0.0) and cost.value == pytest.approx(0.25)
    assert cost.text == "of the base model's variety per prompt went; limit 15%"
    grown = gauges(evaluation(diversity=metric(0.06, 0.07)))[-1]
    assert (grown.figure, grown.value, grown.state) == ("0%", 0.0, "good")


@pytest.mark.parametrize(("spread", "chance"), [(0.01, True), (0.001, False)])
def test_a_cost_that_the_sentence_does_not_tell_from_chance_says_so(spread, chance):
    found = evaluation(diversity=metric(0.06, 0.054, spread))
    assert (
        ("it may be chance" in gauges(found)[-1].text) == chance == ("the variety may have fallen" in sentence(found))
    )
    assert "stayed" not in sentence(found)


def test_a_few_prompts_colour_no_gauge_and_cost_no_variety():
    few = evaluation(prompts=2, concept=metric(0.97, 0.5))
    assert {g.state for g in gauges(few)} == {"none"} and "variety" not in sentence(few)
    assert {g.title: g.state for g in gauges(evaluation(concept=metric(0.97, 0.5)))} == {
        "Wanted": "good", "Kept": "bad", "Cost": "bad"}  # fmt: skip


@pytest.mark.parametrize(
    ("diversity", "state"),
    [(metric(0.06, 0.055), "good"), (metric(0.06, 0.045, 0.03), "fair"), (metric(0.06, 0.045), "bad")],
)
def test_the_cost_is_high_only_where_its_interval_says_so(diversity, state):
    assert gauges(evaluation(diversity=diversity))[-1].state == state


def test_a_change_that_could_not_be_measured_is_a_dash_and_breaks_no_page():
    """Diversity within a style, where before no prompt had two pictures of one style."""
    cell = dict.fromkeys(("base", "base_low", "base_high", "change", "change_low", "change_high"))
    cell |= {"value": 0.5, "low": 0.4, "high": 0.6, "tag": "", "name": "x"}
    shown = environment().from_string(
        "{% import 'macros.html' as show %}{{ show.changes([{'name': 'x', 'cells': [cell]}]) }}"
        "{{ show.before_after([cell], 'x') }}"
    )
    text = Markup(shown.render(cell=cell)).striptags()
    assert text == "x –– → 0.500 beforeafterchange x –0.500 0.400 to 0.600 –"


def test_the_objective_is_plotted_and_statistics_of_it_are_not():
    rows = [{"event": "step", "step": k, "reward": 1.0 * k, "reward_std": 0.1, "reward_gap": 0.2, "reward_share": 0.3}
            for k in range(1, 5)]  # fmt: skip
    ((title, _, svg),) = curves(rows)
    assert title == "The objective" and re.findall(r'<text class="name [^>]*>([^<]*)<', str(svg)) == ["reward"]


def test_what_should_stay_is_a_ratio_to_before_and_plain_rewards_are_changes():
    looks = (0, {"concept": 0.8, "heldout": 2.0, "reward": 5.0}), (4, {"concept": 0.4, "heldout": 1.5, "reward": 5.5})
    rows = [{"event": "guard", "step": step, "verdict": "ok", **found} for step, found in looks]
    said = [re.search(r'aria-label="([^"]*)"', str(svg))[1] for *_, svg in curves(rows)]
    assert said == ["What should stay: concept from 1 to 0.5",
                    "Rewards of the plain prompts: held-out from 0 to -0.5, reward from 0 to 0.5"]  # fmt: skip


def test_folded_rows_of_pictures_say_the_words_too(tmp_path):
    folder = fake_run(tmp_path / "a", prompts=[f"a fox, {k}" for k in range(10)])
    page = report.write_report(folder).read_text(encoding="utf-8")
    heads = re.findall(r'<table class="pictures course">\n<thead>(.*?)</thead>', page, re.S)
    assert len(heads) == 2 and heads[0] == heads[1] and "+outline −3d" in heads[1]


def test_a_comparison_shows_six_metrics_and_folds_the_rest(tmp_path):
    runs = [fake_run(tmp_path / name, prompts=[f"a fox, {k}" for k in range(6)]) for name in "ab"]
    page = report.write_report(runs[0], compare=runs[1:]).read_text(encoding="utf-8")
    shown, folded = page.split("<h2>Numbers</h2>")[1].split("<details>")[:2]
    count = int(re.search(r"<summary>(\d+) more metrics", folded)[1])
    assert shown.count('<th scope="row">') == 6 and folded.split("</details>")[0].count('<th scope="row">') == count > 0


def colours(sheet):
    """The named colours of a style sheet, light and dark."""
    text = files("palate").joinpath(sheet).read_text("utf-8")
    return [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in text.split("prefers-color-scheme: dark")[:2]
    ]


def luminance(colour):
    """WCAG's relative luminance."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_reports_have_the_studios_colours_and_can_be_read(scheme):
    ours, studio = colours("report/templates/style.css")[scheme], colours("studio/static/studio.css")[scheme]
    for name in ("paper", "card", "ink", "soft", "line", "accent", "good", "bad"):
        assert ours[name] == studio[name], name
    assert (ours["fair"], ours["amber"]) == (studio["amber"], studio["amber-bg"])
    grounds = {"ink": ("paper", "card", "amber", "wash"), "soft": ("paper", "card")}
    for name in ("ink", "soft", "accent", "good", "fair", "bad", "g0", "g1", "g2", "g3"):
        for ground in grounds.get(name, ("paper",)):
            dark, light = sorted((luminance(ours[name]), luminance(ours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
