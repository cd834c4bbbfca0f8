"""benchmarks/results_page.py: which looks are shown beside each other, and what is said to those who do not see."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import claims
import methods
import results_page
import rows


def run(method, goals, *, concepts=None, task="style"):
    """A row whose looks have these goals, the base's first, and these concepts."""
    concepts = concepts or [0.9] * len(goals)
    points = [{"heldout": [goal] * 2, "concept": [seen] * 2} for goal, seen in zip(goals, concepts, strict=True)]
    stream = io.BytesIO()
    Image.new("RGB", (24, 8), (90, 0, 0)).save(stream, "PNG")
    sheet = base64.b64encode(stream.getvalue()).decode()
    return {"task": task, "method": method, "points": points, "pictures": [sheet] * len(points)}


def test_only_looks_that_kept_the_concepts_are_shown_beside_each_other():
    """The level is a rise of .4; "lost" is there at its second look, without its concepts, and at .32 with them."""
    lost = run("lost", [1.0, 1.32, 1.4], concepts=[0.9, 0.9, 0.8])
    runs = [run("even", [1.0, 1.2, 1.4]), lost, run("higher", [1.0, 1.1, 1.45])]
    level, found = results_page.equal_looks(runs)
    assert level == pytest.approx(1.4) and found == [("base", 0), ("even", 2), ("lost", 1), ("higher", 2)]
    scenes = [found | {"task": "scenes"} for found in runs]  # whose prompts name several things: no limit there
    assert ("lost", 2) in results_page.equal_looks(scenes)[1]


def test_looks_further_than_a_quarter_of_the_rise_from_the_level_are_left_out():
    runs = [run("even", [1.0, 1.4]), run("near", [1.0, 1.31]), run("far", [1.0, 1.29, 1.6])]
    level, found = results_page.equal_looks(runs)
    assert level == pytest.approx(1.4) and found == [("base", 0), ("even", 1), ("near", 1)]


def test_the_text_of_the_pictures_says_how_far_their_merits_are_apart(tmp_path):
    def keep(folder, task, *runs):
        for found in runs:
            rows.keep(
                folder / f"{methods.slug('comparison', task, found['method'], 0, 500)}.json", found | {"task": task}
            )

    made = (run("even", [1.0, 1.2, 1.4]), run("lower", [1.0, 1.32]), run("high", [1.0, 1.45]))
    keep(tmp_path, "style", *made)
    keep(tmp_path, "scenes", *made)
    keep(tmp_path / "apart", "style", run("one", [1.0, 1.1]), run("other", [1.0, 1.9]))
    assert results_page.picture_table(tmp_path, "light")[1] == (
        "The same prompts and noise drawn by the base model and by even, high, lower, each at its look nearest to a "
        "held-out goal of 1.400 among those that kept the concepts; the rises go from 0.320 to 0.450."
    )
    assert "a held-out goal of 1.400; the rises" in results_page.picture_table(tmp_path, "light", "scenes")[1]
    assert results_page.picture_table(tmp_path / "apart", "light") is None  # nobody is near the level


def judged(**found):
    return claims.Judged(claims.CLAIMS[0], claims.Measured(2.0, 1.0, 3.0, **found))


def test_a_bound_is_said_in_words():
    lower, upper = "It is a lower bound: the slower", "It is an upper bound: the faster"
    assert lower in results_page.alt(judged(bound=True)) and upper in results_page.alt(judged(short=True))
    neither = results_page.alt(judged(bound=True, short=True))
    assert neither.endswith("It is no bound: neither method got there on every seed.") and lower not in neither
    assert "bound" not in results_page.alt(judged())


@pytest.mark.parametrize(
    ("value", "said"), [(0.754, "higher over 75% of the shared range"), (np.nan, "no shared range")]
)
def test_a_frontiers_share_stands_below_the_figure(value, said):
    series = {"points": {"SQDF": [[1.0, 2.0]], "ReFL": [[1.5, 1.0]]}, "axis": "diversity", "at": "heldout"}
    measured = claims.Measured(value, 0.0, 1.0, series=series)
    figure, axes = results_page.plt.subplots()
    results_page._frontier(axes, claims.Judged(claims.CLAIMS[0], measured), results_page.THEMES["light"])
    results_page.plt.close(figure)
    assert (axes.get_xlabel(), axes.get_ylabel()) == (f"held-out goal\nSQDF: {said}", "diversity")
