"""Commands for scripts and for many runs: the list of runs, tables of several, pruned checkpoints, hints."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import statistics
from importlib.resources import files
from pathlib import Path

import pytest
import typer
from PIL import Image
from support.commands import short
from support.pages import fake_run

from palate import cli, recipe
from palate.cli import compare_table, optimize
from palate.cli import runs as runs_command
from palate.cli.doctor import EMBEDDED
from palate.cli.options import Seeds, Words
from palate.cli.phases import Phases, line
from palate.models.vocabulary import vocabulary
from palate.runtime import checkpoint
from palate.runtime.errors import InputError
from palate.runtime.phases import listening, tell
from palate.train import Outcome

ASSETS = Path(str(files("palate") / "assets"))


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three runs that differ in the seed, and one in the learning rate."""
    root = tmp_path_factory.mktemp("runs")
    runs = []
    for i, (seed, lift, lr) in enumerate([(0, 1.0, 1e-5), (1, 0.8, 1e-5), (2, 0.5, 1e-5), (0, 0.2, 1e-4)]):
        run = fake_run(root / f"r{i}", lift=lift, steps=2)
        tree = json.loads((run / "recipe.yaml").read_text())
        tree["trainer"] |= {"seed": seed, "lr": lr}
        (run / "recipe.yaml").write_text(json.dumps(tree))
        runs.append(run)
    return runs


def values(runs, key):
    return [json.loads((run / "evaluation.json").read_text())["metrics"][key]["value"] for run in runs]


def test_a_group_is_the_mean_and_the_sample_deviation_of_its_runs(seeds):
    groups, keys, cells = compare_table.compare_runs(seeds, "seed")
    assert groups == ["base", "lr 1e-05", "lr 0.0001"] and keys[0] == "style/3d"
    three = values(seeds[:3], "reward/emoji")
    cell = cells["lr 1e-05"]["reward/emoji"]
    assert cell.mean == pytest.approx(statistics.mean(three)) and cell.std == pytest.approx(statistics.stdev(three))
    assert cells["lr 0.0001"]["reward/emoji"].std is None and cells["base"]["reward/emoji"].std == pytest.approx(0)
    with pytest.raises(InputError, match="has no key 'sead'"):
        compare_table.compare_runs(seeds, "sead")


def test_groups_of_several_methods_are_named_by_the_method(seeds, tmp_path):
    """Two methods have no key in common but the name: a column's head must not list all settings of both."""
    other = tmp_path / "other"
    shutil.copytree(seeds[0], other)
    tree = json.loads((other / "recipe.yaml").read_text())
    tree["algorithm"] = {"name": "refl", "T": 8}
    tree["trainer"]["checkpoint_every"] = 7
    (other / "recipe.yaml").write_text(json.dumps(tree))
    assert compare_table.compare_runs([*seeds[:3], other], "seed")[0] == ["base", "srpo", "refl"]
    groups = compare_table.compare_runs([*seeds, other], "seed")[0]
    assert groups == ["base", "srpo, lr 1e-05", "srpo, lr 0.0001", "refl"]


def test_relative_rewards_of_other_words_stand_in_no_table(seeds, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(seeds[0], other)
    evaluation = json.loads((other / "evaluation.json").read_text())
    evaluation["words"]["positive"] = ["cartoon"]
    (other / "evaluation.json").write_text(json.dumps(evaluation))
    alike, keys = (compare_table.compare_runs([seeds[0], run], None)[1] for run in (seeds[1], other))
    assert set(alike) - set(keys) == {"reward/emoji-relative"}


def test_the_four_formats_hold_the_same_numbers(seeds):
    made = compare_table.compare_runs(seeds[:3], "seed")
    mean = made[2]["all runs"]["reward/emoji"].mean
    found = json.loads(compare_table.as_text("json", *made))
    assert found["all runs"]["reward/emoji"] == {"mean": mean, "std": pytest.approx(0, abs=1), "runs": 3}
    rows = list(csv.DictReader(io.StringIO(compare_table.as_text("csv", *made))))
    (row,) = [row for row in rows if row["metric"] == "reward/emoji" and row["group"] == "all runs"]
    assert float(row["mean"]) == pytest.approx(mean, rel=1e-5) and row["runs"] == "3"
    markdown, latex = (compare_table.as_text(form, *made) for form in ("markdown", "latex"))
    assert f"| {mean:.3f} ± " in markdown and f"${mean:.3f} \\pm " in latex and latex.count("\\\\") == len(made[1]) + 1
    with pytest.raises(InputError, match="expected one of markdown, latex, csv, json"):
        compare_table.as_text("xml", *made)


def test_the_commands_print_them(seeds, palate):
    code, out, _ = palate("compare", *seeds[:2], "--format", "json")
    assert code == 0 and set(json.loads(out)) == {"base", "r0", "r1"}
    code, out, _ = palate("runs", seeds[0].parent, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and set(rows) == {"r0", "r1", "r2", "r3"}
    assert rows["r0"]["state"] == "finished" and (rows["r0"]["step"], rows["r0"]["steps"]) == (40, 40)
    assert rows["r0"]["words"] == "+3d −flat, outline → step 20: +outline −3d"
    assert rows["r0"]["headline"].startswith("3d ") and rows["r0"]["megabytes"] > 0
    for arguments in (["--group", "seed"], ["--format", "latex", "--blind"], ["--format", "xml"]):
        code, _, error = palate("compare", *seeds[:2], *arguments)
        assert code == 2 and short(error)
    for place, why in (("nowhere", "nowhere does not exist"), ("r0/recipe.yaml", "recipe.yaml is a file")):
        code, _, error = palate("runs", seeds[0].parent / place)
        assert code == 2 and short(error) and why in error
    for way in ([], ["--blind"]):
        code, _, error = palate("compare", seeds[0], seeds[0], *way)
        assert code == 2 and short(error) and "is given twice" in error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_sign_ends_a_command_whatever_the_output_can_show(encoding, seeds, tmp_path, monkeypatch):
    """A run's words have a minus sign and an arrow, a folder's name any bytes: an old terminal shows what it can."""
    shutil.copytree(seeds[0], tmp_path / os.fsdecode(b"caf\xe9"))
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr("sys.argv", ["palate", "runs", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown.flush()
    said = shown.buffer.getvalue().decode(encoding)
    words = "+3d −flat, outline → step 20: +outline −3d"
    assert ended.value.code == 0 and "caf?" in said
    assert (words if encoding == "utf-8" else words.replace("−", "-").replace("→", "->")) in said


def test_a_run_that_cannot_be_read_stays_in_the_list(tmp_path):
    run = fake_run(tmp_path / "bad", steps=2)
    (run / "evaluation.json").write_text("{")
    row = runs_command.describe(run)
    assert row.state == "broken" and "evaluation.json is not JSON" in row.headline


def test_a_run_that_its_guard_ended_is_finished(tmp_path):
    run = fake_run(tmp_path / "guarded", steps=2)
    kept = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["step"] <= 20]

    def listed(*guard):
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*kept, *guard]))
        row = runs_command.describe(run)
        return row.state, row.headline.endswith("(ended by its guard)")

    look = {"step": 20, "event": "guard", "verdict": "concept fell from 1 to 0.8, more than 0.04", "best_step": 10}
    assert listed(look | {"action": "warn"}) == ("stopped", False)
    assert listed(look | {"action": "stop"}) == ("finished", True)
    assert listed(look | {"action": "stop"}, look | {"verdict": "ok"}) == ("stopped", False)  # resumed


def test_prune_keeps_the_newest_good_one_and_the_best(tiny, palate):
    assert palate("train", "tiny.yaml", "trainer.steps=10", "trainer.keep_checkpoints=9")[0] == 0
    folder = tiny / "runs/tiny/checkpoints"
    assert checkpoint.steps(folder) == [2, 4, 6, 8, 10]
    with (tiny / "runs/tiny/metrics.jsonl").open("a") as log:
        log.write(json.dumps({"event": "guard", "step": 10, "best_step": 4}) + "\n")
    for file in (folder / checkpoint.name(10)).glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-3])  # damaged: the newest good one is 8
    code, out, _ = palate("checkpoints", "runs/tiny", "--prune")
    assert code == 0 and "deleted 2 of 5; left: 4, 8, 10" in out and checkpoint.steps(folder) == [4, 8, 10]


def test_a_black_box_run_is_counted_in_queries_and_ends_with_its_last_round(tmp_path):
    run, newest = tmp_path / "opt", tmp_path / "opt/round-02/checkpoints/step-000003"
    newest.mkdir(parents=True)
    (run / "recipe.yaml").write_text("trainer: {steps: 3}\noptimize: {budget: 4, rounds: 2}\n")
    rows = [{"query": k, "round": 1 + k // 2, "prompt": "a dog", "file": f"queries/{k:06d}.png"} for k in range(4)]
    (run / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ended, state in (("", "stopped"), ("finished", "finished")):
        (newest / "state.json").write_text(json.dumps({"finished": ended}))
        row = runs_command.describe(run)
        assert (row.state, row.step, row.steps) == (state, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "tiny.yaml", "--steps", "3"], "did you mean trainer.steps=3"),
        (["train", "tiny.yaml", "--batch-size=8"], "did you mean trainer.batch_size=8?"),
        (["resume", "runs/tiny", "--lr", "1e-4"], "did you mean trainer.lr=1e-4?"),
    ],
)
def test_an_option_that_is_a_key_of_recipes_is_named(tiny, palate, arguments, hint):
    code, _, error = palate(*arguments)
    assert code == 2 and short(error) and hint in error
    assert "did you mean" not in palate("train", "tiny.yaml", "--nothing", "3")[2]


def test_options_that_every_command_has_stand_anywhere(palate):
    assert palate("recipes", "--quiet")[0] == 0
    code, _, error = palate("--quiet", "recipes", "--verbose")
    assert code == 2 and "exclude each other" in error
    code, out, _ = palate("train", "-h")
    assert code == 0 and "Examples:" in out and "palate train srpo-emoji" in out


def test_short_helps_are_whole_at_80_columns_and_every_command_has_two_lines_of_examples(palate, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = palate("--help")
    listed = out.split("\nTrain:")[1]
    assert "..." not in listed and max(map(len, out.splitlines())) <= 80
    for group in ("Train:", "Look:", "Share:", "Check:"):
        assert group in out
    names = [text.split()[0] for text in listed.splitlines() if text.startswith("  ") and text.strip()[0].islower()]
    for name in names:
        if name not in ("palate", "customize", "votes", "taste"):  # groups, whose own commands have them
            assert "Examples:" in palate(name, "--help")[1], name


def test_a_group_without_a_command_shows_its_help_as_it_is_laid_out(palate):
    for group in ("votes", "taste"):
        asked, (code, out, error) = palate(group, "--help")[1], palate(group)
        assert code == 2 and not out and error.strip() == asked.strip()


def test_seeds_and_words():
    assert Seeds("0-3,8") == (0, 1, 2, 3, 8) and str(Seeds("0-3,8")) == "0-3,8"
    assert Words(" 3d, glossy ,") == ("3d", "glossy")


def test_every_word_of_the_embedded_model_is_listed(palate):
    code, out, _ = palate("recipes", "--words")
    told = [line for line in out.splitlines() if not line.startswith("synonyms")]
    listed = set(re.findall(r"\w+", " ".join(line.partition(": ")[2] for line in told)))
    joints = {"a", "at", "and", "background", "style", "on"}  # what holds a caption together
    assert code == 0 and set(vocabulary().words) - listed == joints


def test_doctor_looks_for_all_weights_of_the_package():
    folders = {path.relative_to(ASSETS).parts[0] for path in ASSETS.rglob("*.safetensors")}
    assert folders == set(EMBEDDED)


def test_phases_say_the_count_and_the_time_left(capsys):
    assert line("drawing", 120, 416, 60.0) == "drawing 120/416  29 %, 2 min left"
    assert line("judging", 0, 10, 9.0) == "judging 0/10  0 %" and line("loading", 0, 0, 3.0) == "loading"
    heard = []
    with listening(lambda *what: heard.append(what)):
        tell("drawing", 1, 2)
    tell("drawing", 2, 2)
    assert heard == [("drawing", 1, 2)]
    phases = Phases()
    for done in range(5):
        phases("drawing", done, 4)
    phases("judging", 0, 4)
    phases.spoken = 0.0
    phases("judging", 0, 4)
    assert capsys.readouterr().err.splitlines() == [
        "drawing 0/4  0 %",
        "judging 0/4  0 %",
    ]  # no line per batch or twice


def test_a_table_counts_each_run_once_and_mixes_no_bases(seeds, tmp_path):
    """The same run twice is no two seeds; a run of another model has another base; a run may be called base."""
    with pytest.raises(InputError, match="given twice"):
        compare_table.compare_runs([seeds[0], seeds[0].parent / "." / seeds[0].name], None)
    own = tmp_path / "base"
    shutil.copytree(seeds[1], own)
    groups, _, cells = compare_table.compare_runs([seeds[0], own], None)
    assert groups == ["base", seeds[0].name, "base (run)"]
    assert cells["base (run)"]["reward/emoji"].mean == values([own], "reward/emoji")[0]
    evaluation = json.loads((own / "evaluation.json").read_text())
    evaluation["metrics"]["reward/emoji"]["base"] += 1
    (own / "evaluation.json").write_text(json.dumps(evaluation))
    groups, _, cells = compare_table.compare_runs([seeds[0], own], None)
    assert groups == [f"base of {seeds[0].name}", seeds[0].name, "base of base", "base"]
    assert cells["base of base"]["reward/emoji"].mean == evaluation["metrics"]["reward/emoji"]["base"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "RUN", "--out", "PARENT"], ["evaluate", "RUN", "--out", "found.json"],
        ["compare", "RUN", "RUN", "--blind", "--out", "PARENT"], ["export", "RUN", "--out", "RUN"],
        ["export", "RUN", "--out", "RUN/adapter"], ["merge", "RUN", "RUN", "--out", "RUN/adapter"],
        ["merge", "RUN/export/a", "RUN", "--out", "RUN/export/a"],
        ["sample", "RUN", "--prompt", "a fox", "--out", "RUN/evaluation/result"],
        ["sample", "RUN", "--prompt", "a fox", "--out", "RUN/recipe.yaml"],
    ],
)  # fmt: skip
def test_a_place_that_holds_something_else_is_refused_before_any_work(seeds, arguments):
    """An option that names a folder for a page, or a run's own files for something new, would write over them."""
    run = seeds[0]
    if not (run / "metrics.jsonl").exists():
        (run / "metrics.jsonl").touch()
    (run / "export/a").mkdir(parents=True, exist_ok=True)
    places = {"RUN": str(run), "PARENT": str(run.parent)}
    before = sorted(path for path in run.parent.rglob("*"))
    given = [argument.replace("RUN", places["RUN"]).replace("PARENT", places["PARENT"]) for argument in arguments]
    with pytest.raises(InputError, match="--out"):
        cli.app(given, standalone_mode=False)
    assert sorted(path for path in run.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "other"),
    [
        (["doctor", "--device", "rtx-4090"], "--device belongs to a recipe"),
        (["doctor", "--source", "weights"], "--source belongs to --reward"),
        (["checkpoints", "RUN", "--keep", "3"], "--keep belongs to --prune"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(seeds, arguments, other):
    with pytest.raises(InputError, match=other):
        cli.app([argument.replace("RUN", str(seeds[0])) for argument in arguments], standalone_mode=False)


def test_names_in_a_latex_table_are_shown_as_they_are():
    text = compare_table.as_text("latex", [r"a_b\c^2 ~"], [], {r"a_b\c^2 ~": {}})
    assert r"a\_b\textbackslash{}c\textasciicircum{}2 \textasciitilde{}" in text


def test_numbers_in_a_latex_table_are_mathematics():
    """A minus and not a hyphen, powers of ten and not an e."""
    cells = {"a": compare_table.Cell(-0.25, None, 1), "b": compare_table.Cell(7.4031e-5, 12345678.0, 2)}
    text = compare_table.as_text(
        "latex", ["a", "b"], ["reward/emoji"], {name: {"reward/emoji": cell} for name, cell in cells.items()}
    )
    assert r" & $-0.250$ & $7.403 \times 10^{-5} \pm 1.235 \times 10^{7}$ \\" in text


def test_what_exact_oracles_measure_takes_no_settings_of_drawing(seeds):
    with pytest.raises(InputError, match=r"--tasks draws as the run's recipe says.*sample\.guidance=3"):
        cli.app(["evaluate", str(seeds[0]), "--tasks", "sample.guidance=3"], standalone_mode=False)


def test_an_evaluation_that_is_none_is_said_and_hides_no_other_run(seeds, tmp_path):
    for name in ("good", "odd"):
        shutil.copytree(seeds[1], tmp_path / name)
    (tmp_path / "odd/evaluation.json").write_text("{}")
    rows = {row.name: row for row in map(runs_command.describe, runs_command.find_runs(tmp_path))}
    assert rows["odd"].state == "broken" and "is no evaluation" in rows["odd"].headline
    assert rows["good"].state != "broken"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *(("recipe.yaml", {section: value}) for section in ("trainer", "algorithm", "reward", "optimize")
          for value in ("x", [1], 3)),
        ("recipe.yaml", {"trainer": {"steps": "40"}}),
        ("recipe.yaml", {"optimize": {"budget": "40"}}),
        ("recipe.yaml", {"reward": {"relative": "x"}}),
        ("evaluation.json", {"optimised": 3}),
        ("evaluation.json", {"verdict": 3}),
    ],
)  # fmt: skip
def test_a_run_whose_files_somebody_changed_does_not_end_the_list(seeds, tmp_path, file, changes):
    shutil.copytree(seeds[0], tmp_path / "odd")
    tree = json.loads((tmp_path / "odd" / file).read_text())
    (tmp_path / "odd" / file).write_text(json.dumps(tree | changes))
    row = runs_command.describe(tmp_path / "odd")
    assert row.state == "broken" and file in row.headline


def test_numbers_that_an_algorithm_calls_positive_are_no_words(seeds, tmp_path):
    shutil.copytree(seeds[0], tmp_path / "own")
    tree = json.loads((tmp_path / "own" / "recipe.yaml").read_text())
    tree["algorithm"] |= {"positive": 0.5, "negative": "much"}
    (tmp_path / "own" / "recipe.yaml").write_text(json.dumps(tree))
    assert runs_command.describe(tmp_path / "own").words.startswith("no words → ")


def test_a_folder_that_was_deleted_is_named_before_anything_loads(palate, tmp_path, monkeypatch):
    """Even torch does not load there."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, error = palate("doctor")
    assert code == 2 and "the current folder was deleted or moved" in error


@pytest.mark.parametrize("fresh", [False, True])
def test_to_continue_an_optimisation_costs_no_score_that_was_paid_for(tmp_path, monkeypatch, capsys, fresh):
    made = recipe.read("optimize-emoji", [f"run.folder={tmp_path / 'run'}"])
    monkeypatch.setattr(optimize, "require_room", lambda made: None)
    monkeypatch.setattr(optimize, "from_recipe", lambda *_, **__: Outcome(tmp_path / "run", 8, "signal", 130))
    with pytest.raises(typer.Exit):
        optimize.optimize_recipe(made, fresh=fresh, quiet=True)
    said = capsys.readouterr().out
    assert "continue with the same command" in said and ("without --fresh" in said) is fresh


def test_words_for_a_run_that_is_over_or_stopped_come_with_a_way_that_takes_them(tiny, palate):
    assert palate("train", "tiny.yaml")[0] == 0
    run = tiny / "runs/tiny"
    newest = run / "checkpoints" / checkpoint.name(4) / "state.json"
    ended = newest.read_text()

    def said():
        code, out, _ = palate("steer", "runs/tiny", "--positive", "3d")
        assert code == 0
        return out

    assert "(finished), so the words wait; `palate resume runs/tiny trainer.steps=8` takes them" in said()
    newest.write_text(json.dumps(json.loads(ended) | {"finished": ""}))  # stopped: it keeps its own length
    assert "(stopped), so the words wait; `palate resume runs/tiny` takes them" in said()
    newest.write_text(ended)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4, "event": "guard", "action": "stop", "best_step": 2}) + "\n")
    assert "its guard has ended this run" in said() and "palate resume" not in said()


def test_weights_for_a_taste_on_the_embedded_reward_are_refused_in_words_that_its_command_knows(palate, monkeypatch):
    monkeypatch.setattr("palate.cli.fit_taste.source_of", lambda folder: "emoji")
    code, _, error = palate("taste", "show", "mine", "--weights", "w")
    assert code == 2 and short(error) and "leave the option out" in error and "--features" not in error
    code, _, error = palate("taste", "fit", "votes", "--weights", "w")
    assert code == 2 and short(error) and "--features" in error


def test_one_vote_is_one_vote(palate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side, shade in (("win", 200), ("lose", 20)):
        (tmp_path / "own" / side).mkdir(parents=True)
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(tmp_path / "own" / side / "a.png")
    code, out, _ = palate("votes", "import", "own", "--to", "votes")
    assert code == 0 and "1 new vote, 1 in all" in out
    assert palate("votes", "show", "votes")[1].startswith("1 vote: 1 ")
    assert "1 vote: pairs" in palate("votes", "export", "votes", "--out", "pairs")[1]
