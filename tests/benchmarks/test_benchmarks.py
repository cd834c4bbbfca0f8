"""benchmarks/: the mathematics of the frontier, the counter, rows, and (mostly soak) every program's quick form."""

from __future__ import annotations

import argparse
import importlib
import math
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from support import ROOT

from palate.models.gaussian import GaussianModel
from palate.models.vocabulary import parse_prompt

FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))

import comparison  # noqa: E402
import distar  # noqa: E402
import frontier  # noqa: E402
import guard  # noqa: E402
import methods  # noqa: E402
import opd  # noqa: E402
import publish  # noqa: E402
import rows  # noqa: E402
import sqdf  # noqa: E402
import srpo  # noqa: E402
import time_to_preference as time_to  # noqa: E402


def test_envelope_is_the_best_of_what_reaches_as_far():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([3.0, 1.0, 2.0])
    got = frontier.envelope(x, y, np.array([-1.0, 0.0, 0.5, 1.5, 2.0, 2.5]))
    np.testing.assert_array_equal(got, [3.0, 3.0, 2.0, 2.0, 2.0, np.nan])


def test_area_is_a_share_of_the_box():
    both = np.array([0.0, 1.0])
    assert frontier.area(both, np.array([5.0, 5.0]), 0, 1, 1.0, 5.0) == pytest.approx(1.0)
    assert frontier.area(both, np.array([5.0, 3.0]), 0, 1, 1.0, 5.0) == pytest.approx((1 + 60 * 0.5) / 61)
    half = frontier.area(np.array([0.0, 0.5]), np.array([5.0, 5.0]), 0, 1, 1.0, 5.0)  # reaches half of the range
    assert half == pytest.approx(31 / 61)
    many = frontier.area(np.stack([both, both / 2]), np.full((2, 2), 5.0), 0, 1, 1.0, 5.0)
    np.testing.assert_allclose(many, [1.0, 31 / 61])


def test_share_above():
    high, low = (np.array([0.0, 1.0]), np.array([2.0, 2.0])), (np.array([0.0, 1.0]), np.array([1.0, 1.0]))
    assert frontier.share_above(high, low, 0, 1) == 1.0 and frontier.share_above(low, high, 0, 1) == 0.0
    short = (np.array([0.0, 0.5]), np.array([2.0, 2.0]))
    assert frontier.share_above(short, low, 0, 1) == pytest.approx(31 / 61)
    assert frontier.share_above(short, low, 0, 2) == pytest.approx(16 / 31)  # what neither reaches does not count


def test_areas_of_known_points():
    """Two methods on a line, two seeds: one keeps the held-out value, the other pays; ruins are no points."""

    def run(*looks):
        return {
            "points": [
                {
                    "reward": [r - 0.1, r + 0.1],
                    "heldout": [h, h],
                    "concept": [c, c],
                    "diversity": [h, np.nan],
                    "drift": [r],
                }
                for r, h, c in looks
            ]
        }

    base, ruined = (0.0, 0.0, 1.0), (5.0, 5.0, 0.9)
    found = {
        "SQDF": {0: [base, (1.0, 0.0, 0.96), ruined], 1: [base, (1.0, 0.0, 1.0)]},
        "ReFL": {0: [base, (1.0, -1.0, 1.0)], 1: [base, (1.0, 0.0, 1.0)]},
        "DGPO": {0: [base, ruined]},
    }
    runs = {m: {s: frontier.kept_points(run(*looks)) for s, looks in own.items()} for m, own in found.items()}
    assert [len(points) for points in runs["SQDF"].values()] == [2, 2] and len(runs["DGPO"][0]) == 1
    told = frontier.areas(runs, "heldout")
    assert told["SQDF"] == {0: 1.0, 1: 1.0} and told["ReFL"] == {0: pytest.approx(1 / 61), 1: 1.0}
    assert told["DGPO"] == {0: pytest.approx(1 / 61)}  # the base alone
    text = frontier.table(runs)
    center, low, high = frontier.over_seeds([1 / 61, 1.0])  # of two seeds: 12.7 standard errors
    assert high - center == pytest.approx(12.706 * (60 / 61) / 2, abs=1e-3) and center - low == pytest.approx(
        high - center
    )
    assert f"| ReFL | 2 | 1.000 ± 0.000 | -0.500 ± 0.707 | 1.000 ± 0.000 | -0.500 ± 0.707 | 0.51 ({low:.2f} to" in text
    assert "SQDF has the largest area" in text and "ReFL 0.49 (" in text and text.endswith("DGPO 0.98.")


def test_counted_counts_rows_times_network_calls():
    model = methods.Counted(GaussianModel(torch.zeros(1, 2, 2), 1.0))
    x, t = torch.zeros(3, 1, 2, 2), torch.full((3,), 0.5)
    with torch.no_grad():
        model.predict(x, t, x)
        model.predict(x, t, x, guidance=3.0)
    model.predict(x, t, x, guidance=1.0)
    assert (model.forwards, model.differentiated) == (3 + 6 + 3, 3)
    model.counting = False
    model.predict(x, t, x)
    assert model.forwards == 12 and model.latent_shape == (1, 2, 2)


def test_rows_are_made_once_and_one_that_fails_stops_no_other(tmp_path, capfd):
    """In processes of one thread; what lies on disk is read, never made again."""
    wanted = [
        rows.Row(tmp_path / "known.json", math.sqrt, (4.0,)),
        rows.Row(tmp_path / "bad.json", math.sqrt, (-1.0,)),
        rows.Row(tmp_path / "threads.json", torch.get_num_threads),
    ]
    rows.keep(tmp_path / "known.json", 5, [4.0])
    with pytest.raises(ValueError):
        rows.measured(wanted, jobs=1)
    assert rows.made(tmp_path / "threads.json") == 1 and not wanted[1].path.exists()
    assert "[2 of 2, " in capfd.readouterr().out
    assert rows.measured([wanted[0], wanted[2]], jobs=2) == [5, 1]
    here = rows.Row(tmp_path / "here.json", math.sqrt, (9.0,))
    with pytest.raises(SystemExit, match="1 of 2 rows are left after 0 minutes"):
        rows.measured([wanted[0], here], jobs=0, minutes=0)
    with pytest.raises(ValueError):
        rows.measured([wanted[1], here], jobs=0)  # in this process, and no other row is stopped there either
    assert rows.made(here.path) == 3
    with pytest.raises(ValueError, match=r"known.json was made with \[4.0\], not with \[9.0\]"):
        rows.measured([wanted[0]._replace(arguments=(9.0,))], jobs=1)


@pytest.mark.slow
def test_no_process_outlives_a_command_that_was_killed(tmp_path):
    """A row that would take a minute, in a process of its own; the command is ended by force in the middle of it."""
    code = f"""import sys, time
sys.path.insert(0, {str(FOLDER)!r})
import pathlib, rows
if __name__ == "__main__":
    rows.measured([rows.Row(pathlib.Path({str(tmp_path / "row.json")!r}), time.sleep, (60,))], 1)"""
    command = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 60
        while not (made := psutil.Process(command.pid).children()) and time.monotonic() < end:
            time.sleep(0.02)
        while not any("spawn_main" in " ".join(child.cmdline()) for child in made) and time.monotonic() < end:
            made = psutil.Process(command.pid).children()
    finally:
        command.kill()
        command.wait()
    left = psutil.wait_procs(made, timeout=40)[1]
    for child in left:
        child.kill()
    assert made and not left


def test_the_search_takes_the_best_that_kept_its_concepts():
    def best(task, *runs):
        found = [{"lr": lr, "goal": h, "concept": c, "concept_base": 1.0, "finite": f} for lr, h, c, f in runs]
        chosen = comparison.best_of(task, found)
        return chosen and chosen["lr"]

    lost = ((1, 0.2, 0.5, True), (2, 0.3, 0.7, True), (4, 0.4, 0.8, False))
    assert best("style", (1, 0.2, 1.0, True), (2, 0.3, 0.91, True), (4, 0.4, 0.8, True)) == 2
    assert best("style", *lost) == 2  # none kept them: the most of it
    assert best("scenes", (1, 0.4, 0.5, True), *lost[1:]) == 1  # several things a prompt: the goal alone
    assert best("style", *((lr, 0.2, 1.0, False) for lr in (1, 2, 4))) is None


def test_violet_is_a_share_of_the_pixels():
    def shade(red, green, blue):
        return torch.tensor([red, green, blue]).view(1, 3, 1, 1)

    seen = {(0.6, 0.2, 0.8): 1, (0.9, 0.4, 0.8): 1, (0.2, 0.3, 0.8): 0, (0.8, 0.2, 0.2): 0, (0.5, 0.5, 0.5): 0,
            (0.62, 0.58, 0.65): 0, (0.12, 0.02, 0.2): 0, (0.3, 0.8, 0.4): 0}  # fmt: skip
    for colours, share in seen.items():
        assert float(srpo.violet(shade(*colours))) == share, colours
    both = torch.cat([shade(0.6, 0.2, 0.8), shade(0.3, 0.8, 0.4)], 3).expand(2, 3, 4, 2)
    assert srpo.violet(both).tolist() == [0.5, 0.5]


def test_a_run_that_a_signal_ended_is_no_row(tmp_path):
    """`train` returns normally after SIGTERM, to be resumed; a table must not take such a run for a whole one."""
    outcome = methods.Outcome(tmp_path, 7, "signal", 143)
    with pytest.raises(RuntimeError, match="signal at step 7"):
        methods.whole(outcome)
    assert methods.whole(outcome._replace(reason="guard: concept fell", exit_code=0)).step == 7
    row = rows.Row(tmp_path / "row.json", lambda: methods.whole(outcome))
    with pytest.raises(RuntimeError, match="its row is not kept"):
        rows.stored(row)
    assert not row.path.exists() and not list(tmp_path.iterdir())
    cut = {"points": [{"updates": 0, **dict.fromkeys(distar.KEYS, 0.5), "seconds": 0.0}]}
    rows.keep(tmp_path / f"{methods.slug('distar', 'family', 'DI*', 0, 60)}.json", cut)
    with pytest.raises(ValueError, match="ends after 0 updates of 60"):
        distar.family_table(argparse.Namespace(results=tmp_path, updates=60, seeds=[0]))


def test_areas_and_shares_at_equal_reward():
    """SQDF keeps all diversity up to held-out reward 1; ReFL loses it on the way and goes further."""

    def points(*pairs):
        return [{"heldout": h, "diversity": d, "concept": d} for h, d in pairs]

    clouds = {"SQDF": {0: [points((0, 1), (1, 1))]}, "ReFL": {0: [points((0, 1), (1, 0), (2, 0))]}}
    rows = sqdf.frontier_table(clouds).splitlines()[2:]
    assert rows[0].startswith("| SQDF | 1 | 1.000 | 1.000 | 1.000 ")
    assert rows[1].startswith("| ReFL | 1 | 2.000 | 0.016 |") and rows[1].endswith("| 99%, 99% |")
    assert sqdf.at_reward(clouds["ReFL"][0][0], 0.5, "diversity") == 0.5
    level = sqdf.levels(clouds).splitlines()
    assert level[2].startswith("| 0.000 (base) |")
    assert level[4] == "| 0.500 | 1.000, 1.000 (1 of 1 seeds) | 0.500, 0.500 (1 of 1 seeds) |"


def test_forwards_to_a_share_of_the_style():
    """The first look after the start counts whole, as an upper bound; a later one less what lies beyond the level."""

    def row(method, seed, forwards, *looks):
        checks = [{"forwards": 0, "style": 0.0, "concept": 0.7, "reward": 0.05, "heldout": 0.1}]
        for k, style in enumerate(looks, 1):
            style, concept = style if isinstance(style, tuple) else (style, 0.7)
            checks.append({"forwards": k * forwards, "style": style, "concept": concept, "reward": 0.05 + style / 4,
                           "heldout": 0.1})  # fmt: skip
        spent = len(looks) * forwards
        return {"method": method, "seed": seed, "forwards": spent, "updates": 10,
                "differentiated": spent / 4, "checks": checks}  # fmt: skip

    def to(level, *looks):
        return time_to.forwards_to(row("SRPO", 0, 100, *looks)["checks"], level)

    assert to(0.2, 0.8) == to(0.8, 0.8) == (100, True)
    assert to(0.2, 0.1, 0.5) == (125, False)  # on the line from the first look, not from the start
    assert to(0.2, 0.2, 0.5) == (100, True) and to(0.6, 0.2, 0.5) == (math.inf, False)
    assert to(0.2, (0.8, 0.66)) == (math.inf, False)  # the concepts are lost
    assert to(0.8, (0.8, 0.6), 0.5, 0.9) == (pytest.approx(275), False)
    assert to(0.8, (0.8, 0.6), 0.9) == (200, False)  # the share was there before, the concepts were not
    fast = [row("SRPO", seed, 100, 0.4, 0.6) for seed in range(3)]
    slow = [row("DDPO", seed, 600, 0.1, 0.4 if seed == 0 else 0.1) for seed in range(3)]
    text = time_to.table([*fast, *slow])
    most = "at most 100 ± 0"
    assert f"| SRPO | {most} | {most} | 200 ± 0 | never | {most} | {most} | 140 ± 0 | 20 | 25% |" in text
    assert "| 0.60 | 0.70 (0.70) | +0.200 (3 of 3) |" in text
    assert "| DDPO | 800 (1 of 3 seeds) | 1200 (1 of 3 seeds) | never | never |" in text
    mixed = [row("SRPO", 0, 100, 0.8), row("SRPO", 1, 100, 0.4, 0.8)]
    text = time_to.table(mixed)
    assert "| SRPO | at most 100 ± 0 | at most 100 ± 0 | at most 125 ± 35 | at most 150 ± 71 |" in text


def test_forwards_to_a_rise_of_the_objective():
    checks = [
        {"forwards": f, "style": 0.0, "concept": c, "reward": r}
        for f, c, r in ((0, 0.9, 2.0), (100, 0.2, 1.9), (200, 0.1, 2.1), (300, 0.1, 2.3))
    ]
    assert time_to.forwards_to(checks, 0.1, "reward") == (pytest.approx(200), False)  # whatever the concepts do
    assert time_to.forwards_to(checks, 0.2, "reward") == (pytest.approx(250), False)
    assert time_to.forwards_to(checks, 0.4, "reward") == (math.inf, False)
    assert time_to.forwards_to([checks[0], *checks[2:]], 0.05, "reward") == (200, True)


@pytest.fixture
def quick(monkeypatch, capsys):
    """quick(command) -> what it prints; in this process, which then reads the models once for all commands."""

    def run(command):
        name, *arguments = command.split()
        threads = torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--quick", "--jobs", "0"])
        try:
            importlib.import_module(name.removesuffix(".py")).main()
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_a_program_runs_by_itself_and_makes_its_rows_in_processes():
    """From the command line to the table."""
    command = [sys.executable, str(FOLDER / "distar.py"), "blackbox", "--seeds", "0", "--quick"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "| 0 | " in made.stdout


@pytest.mark.parametrize(
    "command, rows",
    [
        ("guard.py --methods DRaFT-LV", ["| DRaFT-LV, seed 0 |"]),
        ("sqdf.py blackbox", ["| jpeg-size | 1 |"]),
        ("comparison.py --tasks jpeg --methods DDPO", ["| DDPO | 1 |", "**small file**"]),
        ("blind_study.py", ["| clear taste, few ties | 40 |"]),
    ],
)
def test_quick_comparison_of_a_method_or_two(quick, command, rows):
    """To the table; with every method it is a soak test."""
    told = quick(command)
    assert all(row in told for row in rows)


@pytest.mark.soak
@pytest.mark.parametrize(
    "command, rows",
    [
        ("guard.py", [f"| {method}, seed 0 |" for method in guard.UNHELD]),
        ("sqdf.py sweep", ["| SQDF alpha_kl 0 |"]),
        ("sqdf.py ablations", ["| the recipe |", "| rollout-2 |"]),
        ("srpo.py pairs", ["| 3d against flat, outline | 1 |"]),
        ("comparison.py --tasks style absolute --methods SRPO DDPO", ["| SRPO | 1 |", "**absolute reward**"]),
        ("comparison.py --tasks taste --methods ReFL", ["| ReFL | 1 |"]),
        ("comparison.py tune --tasks style --methods ReFL", ['"style: ReFL": ']),
        ("distar.py teacher emoji-1step", ["diversity inside a prompt"]),
        ("distar.py family emoji-1step", ["| DI* | 1 |"]),
        ("opd.py", ["| student | "]),
        (
            "comparison.py --tasks scenes --methods LeapAlign DDPO",
            ["**embedded GenEval**", "| LeapAlign | 1 |", "| DDPO | 1 |"],
        ),
    ],
)
def test_quick(quick, command, rows):
    told = quick(command)
    assert all(row in told for row in rows)


def test_tables_go_where_the_page_marks_them(tmp_path):
    """Between the marks, and nothing else; what was not measured stays; twice is once."""
    page = (
        "# A\n<!-- results: frontier -->\nold\n<!-- end -->\nprose\n<!-- results: guard -->\n\nNot measured yet.\n"
        "<!-- end -->\n"
    )
    results, images = tmp_path / "results", tmp_path / "docs/images"
    results.mkdir()
    methods_table = "| a |\n|---|\n"
    rows.write_table(results / "frontier.md", methods_table)
    (results / "frontier-drift.svg").write_text("<svg/>")
    once = publish.filled(page, tmp_path / "docs/algorithms", results, images)
    assert once == (
        "# A\n<!-- results: frontier -->\n\n| a |\n|---|\n\n"
        "![The optimised objective against the distance from the base's images: a line through the looks of each "
        "method that rises, as it trains](../images/frontier-drift.svg)\n\n<!-- end -->\n"
        "prose\n<!-- results: guard -->\n\nNot measured yet.\n<!-- end -->\n"
    )
    assert publish.filled(once, tmp_path / "docs/algorithms", results, images) == once
    (results / "guard.md").write_text(f"<!-- of the embedded model 0123 -->\n{methods_table}")
    (results / "frontier.md").write_text(methods_table)  # the first tables do not say of which
    of_others = publish.filled(once, tmp_path / "docs/algorithms", results, images)
    assert of_others.count("**Measured on an earlier embedded model**") == 2 and of_others.count("| a |\n|---|") == 2
    long = "word " * 30
    assert publish.wrapped(f"| {long}|\n\n{long}\n![{long}](x)") == (
        f"| {long}|\n\n" + "\n".join(["word " * 19 + "word", "word " * 9 + "word"]) + f"\n![{long}](x)"
    )
    assert (images / "frontier-drift.svg").is_file()
    pages = "".join(path.read_text() for path in publish.DOCS.rglob("*.md"))
    wanted = {found[2] for found in publish.MARK.finditer(pages)}
    assert wanted == {
        "blind_study",
        "guard-images",
        "taste-accuracy",
        "taste-rounds",
        "claim-figures",
        "claims",
        "comparison",
        "time_to_preference",
        "frontier",
        "guard",
        "sqdf",
        "distar-teacher",
        "distar-family",
        "distar-blackbox",
        "opd",
        "srpo-pairs",
        "srpo-ablations",
    }


def test_the_guards_table():
    """A run that was put back to the base model is not one in which the guard kept anything; one whose interval holds a
    fall of .05 may have lost as much."""
    row = {
        "method": "SRPO",
        "seed": 0,
        "stopped": True,
        "why": "guard: concept fell",
        "step": 12,
        "kept": 8,
        "base": 0.95,
        "guarded": 0.93,
        "unguarded": 0.4,
        "change_low": -0.04,
        "change_high": 0.0,
        "images": 256,
    }
    unsure, idle = row | {"seed": 1, "change_low": -0.05}, row | {"seed": 2, "kept": 0, "guarded": 0.95}
    text = guard.table([row, unsure | {"guarded": 0.94}, idle, unsure | {"guarded": 0.89, "change_low": -0.1}])
    assert "| SRPO, seed 0 | concept fell, 12 | 8 | 0.950 | 0.930 (-0.020, -0.040 to +0.000) | 0.400 | yes |" in text
    assert text.count("| 0.400 | no |") == 2 and "| 0.400 | the base itself |" in text
    assert "1 of 4 runs kept a trained checkpoint that lost less than 0.05, by its whole interval; 1 were put" in text
    assert "the worst change -0.060; without a guard -0.550 on average" in text


def test_a_bar_of_one_step_is_met_missed_or_open_by_its_intervals_ends(tmp_path):
    def change(low, high):
        middle = (low + high) / 2
        return {"value": 0.98, "low": 0.96, "high": 0.99, "base": 0.98 - middle, "change": middle, "change_low": low,
                "change_high": high}  # fmt: skip

    told = {"prompts": 4, "frechet": 0.02, "frechet_of_the_teacher": 0.01, "background": change(0.0, 0.0)}
    plain = told | {"concept": change(-0.02, 0.01), "reward/emoji-heldout": change(-0.01, 0.03)}
    styled = told | {"concept": change(-0.06, -0.021), "style_named": change(-0.05, -0.02)}
    styled["background"] = told["background"] | {"high": 0.969}
    times = {}
    for k, name in enumerate(f"{what}, batch {batch}" for what in ("image", "network") for batch in (1, 16)):
        times |= {f"teacher, {name}": 0.16, f"generator, {name}": 0.01, f"ratio, {name}": 14.0 + k,
                  f"ratio, {name}, low": 13.0 + k, f"ratio, {name}, high": 14.9 + k}  # fmt: skip
    found = {"plain": plain, "styled": styled, "diversity_teacher": 0.1, "diversity_generator": 0.05, "seconds": times}
    rows.keep(tmp_path / "distar-teacher-emoji_1step.json", found)
    bars = [line.rstrip(" |").rpartition("| ")[2] for line in distar.teacher_table(tmp_path).splitlines()]
    assert [bar for bar in bars if bar.startswith(("change", ">="))] == [
        "change >= -0.02: met",
        ">= 0.97: open",  # .98, between .96 and .99
        "change >= +0.00: open",  # +.01 in the mean
        "change >= -0.02: not met",
        "change >= -0.03: open",  # -.035 in the mean
        ">= 0.97: not met",
        ">= 15: not met",
        ">= 15: open",
        ">= 15: met",
        ">= 15: met",
    ]
    assert "| x 15.0 (14.0 to 15.9) faster | >= 15: open |" in distar.teacher_table(tmp_path)


def test_intervals_of_shares_end_at_0_and_1():
    """Two seeds that differ: Student's interval would go from -.5 to 1.7; changes of concepts go below 0."""

    def seed(share, concept):
        own = {style: [share] * 4 for style in opd.TASTES}
        models = {"base": own | {"concept": [0.9] * 4}, "student": own | {"concept": [concept] * 4}}
        return {"owners": ["3d", "3d", "outline", "outline"], "models": models}

    found = opd.summary([seed(0.5, 0.8), seed(0.7, 0.9)])["student"]
    assert found["3d, own"] == found["outline, others"] == pytest.approx((0.6, 0.0, 1.0)) and found["seeds"] == 2
    assert found["concept"][1] < -0.6 and found["concept"][2] > 0.5
    text = opd.table({"student": found})
    assert "| student | 2 | 0.60 (0.00 to 1.00) | 0.60 (0.00 to 1.00) |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_prompts_like_those_of_the_evaluation_were_never_trained_on():
    prompts = distar.eval_like(512)
    ours = methods.recipe.read_prompts("emoji-eval")
    asked = {parse_prompt(prompt) for prompt in prompts}
    assert len(asked) == 512 and prompts[: len(ours)] == ours and methods.eval_like(5) == ours[:5]
    assert not asked & {parse_prompt(prompt) for prompt in methods.recipe.read_prompts("emoji-train")}
    assert not {parse_prompt(prompt) for prompt in methods.beside_eval(20)} & {parse_prompt(prompt) for prompt in ours}
    assert all(parse_prompt(prompt).concept and parse_prompt(prompt).style is None for prompt in prompts)
