"""The pages without a browser: what they hold, what they refuse, that hostile texts stay texts."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.studio import HOSTILE, Labels, wait_for

from palate import fit_taste, recipe
from palate.models.vocabulary import vocabulary
from palate.runtime.errors import InputError
from palate.studio.artist import png_of, read_picture
from palate.studio.runview import RunView
from palate.studio.shared import PAGES
from palate.studio.steering import change
from palate.taste.votes import Picture, Vote

PATHS = [path for path, _ in PAGES]


@pytest.mark.parametrize("path", PATHS)
def test_every_page_stands_on_an_empty_folder_labelled_and_without_inline_code(studio, path):
    client, _ = studio
    answer = client.get(path)
    assert answer.status_code == 200 and not Labels(answer.text).problems
    assert answer.text.count("<h1") == 1 and '<html lang="en">' in answer.text
    for link in re.findall(r'(?:src|href)="([^"#]+)"', answer.text):
        assert link.startswith("/") and client.get(link).status_code == 200, link


def test_a_page_weighs_little(studio):
    client, _ = studio
    page = client.get("/choose").text
    links = set(re.findall(r'(?:src|href)="(/static[^"]+)"', page))
    assert len(page) + sum(len(client.get(link).content) for link in links) < 300_000


def test_votes_are_counted_once_per_pair_and_undone(studio):
    client, found = studio

    def pair():
        return re.search(r'data-pair="(\w+)"', client.get("/choose/pair").text)[1]

    first, before = pair(), len(found.voting.votes())
    assert pair() == first  # a reload shows the same
    answer = client.post("/choose/vote", data={"pair": first, "choice": "left", "ms": "812"})
    assert answer.headers["hx-trigger"] == "voted"
    client.post("/choose/vote", data={"pair": first, "choice": "right"})  # the key twice, or an older window
    assert len(found.voting.votes()) == before + 1 and pair() != first
    vote = found.voting.votes()[-1]
    assert (vote.choice, vote.ms, vote.left.model) == ("left", 812, found.artist.fingerprint)
    client.post("/choose/undo")
    shown = found.voting.pair()
    assert len(found.voting.votes()) == before and (shown.left, shown.right) == (vote.left, vote.right)
    assert shown.id != first  # the line that took the vote back names the old one


def test_a_pair_that_was_voted_on_is_not_shown_again(studio, monkeypatch):
    """Not while a new model has drawn nothing yet, nor after the studio was killed between the vote and the next."""
    client, found = studio
    first, before = found.voting.pair(), len(found.voting.votes())
    with monkeypatch.context() as patch:
        patch.setattr(found.artist, "rows", lambda prompts=(): [])
        assert "are being drawn" in client.post("/choose/vote", data={"pair": first.id, "choice": "left"}).text
        client.post("/choose/vote", data={"pair": first.id, "choice": "right"})
        assert [vote.choice for vote in found.voting.votes()[before:]] == ["left"]
    assert found.voting.pair().id != first.id
    found.workspace.write("pair.json", first.tree())
    assert found.voting.pair().id != first.id
    client.post("/choose/undo")


def test_own_prompts_are_asked_about_from_the_next_pair_on(studio):
    client, found = studio
    own = next(name for name in vocabulary().concepts if name != found.voting.pair().prompt)
    client.post("/choose/settings", data={"prompts": f"  {own} \n"}, headers={"hx-request": "true"})
    wait_for(found.voting.pair, 20, "a pair of the own prompt")
    for _ in range(3):
        pair = found.voting.pair()
        assert pair.prompt == own
        client.post("/choose/vote", data={"pair": pair.id, "choice": "tie"})
    client.post("/choose/settings", headers={"hx-request": "true"})
    for _ in range(3):
        client.post("/choose/undo")
    assert found.workspace.settings()["prompts"] == []


def test_pictures_that_are_gone_are_not_asked_about(studio):
    _, found = studio
    drawn = found.artist.rows()[0]
    path = found.workspace.store.pictures / drawn.picture.file
    content = path.read_bytes()
    path.unlink()
    assert drawn.picture.file not in {row.picture.file for row in found.artist.rows()}
    path.write_bytes(content)


def test_every_twelfth_choice_is_asked_twice(studio, monkeypatch):
    """3 of 40, and after 60 the five that it takes to say that votes disagree."""
    _, found = studio
    pair = found.voting.pair()
    votes = [Vote("fox", pair.left, pair.right, "left", id=str(k)) for k in range(60)]
    monkeypatch.setattr(found.voting, "posterior", lambda scaling: None)
    asked = []
    for count in range(6, 61):
        monkeypatch.setattr(found.voting, "votes", lambda count=count: votes[:count])
        again = found.voting._next(votes[count - 1])
        asked += [count] if again.repeat_of else []
        if again.repeat_of:  # with its sides exchanged, so that a favoured side is no agreement
            assert (again.left, again.right) == (pair.right, pair.left)
    assert asked == [12, 24, 36, 48, 60]
    found.voting.forget_pair()


def test_the_picture_that_won_stays_and_meets_another_of_its_prompt(studio):
    """In the mode "champion". A time that no answer takes, of a page left open or a clock put back, is none."""
    _, found = studio
    found.workspace.set(mode="champion")
    before = len(found.voting.votes())
    for choice, ms, kept in (("left", 900, 900), ("right", -1, None), ("right", 3_600_000, None), ("left", 0, 0)):
        pair = found.voting.pair()
        vote = found.voting.vote(pair.id, choice, ms)
        assert vote.ms == kept
        shown = found.voting.pair()
        won, lost = (vote.left, vote.right) if choice == "left" else (vote.right, vote.left)
        assert won in (shown.left, shown.right) and lost not in (shown.left, shown.right)
        assert shown.prompt == vote.prompt
    found.workspace.set(mode="fresh")
    while len(found.voting.votes()) > before:
        found.voting.undo()


def test_a_picture_depends_on_its_seed_and_not_on_what_is_drawn_with_it(studio):
    _, found = studio
    many, one = found.artist.draw(["fox"] * 18, range(18)), found.artist.draw(["fox"], [17])
    assert torch.allclose(many[17], one[0], atol=1e-4) and not torch.allclose(many[1], one[0], atol=1e-2)


def test_each_taste_that_is_learnt_has_a_folder_of_its_own_and_says_what_the_page_says(studio):
    client, found = studio
    before = len(found.voting.votes())
    while len(found.voting.votes()) < 20:
        client.post("/choose/vote", data={"pair": found.voting.pair().id, "choice": "left"})
    folders = [found.voting.learn_taste() for _ in range(2)]
    cards = [json.loads((folder / "card.json").read_text()) for folder in folders]
    shown = found.voting.summary()["taste"]
    assert len(set(folders)) == 2
    assert all(card[key] == shown[key] for card in cards for key in ("expected", "verdict", "learnt"))
    while len(found.voting.votes()) > before:
        found.voting.undo()


def test_the_pictures_that_a_taste_likes_are_shown_as_liked(studio, monkeypatch):
    _, found = studio
    rows, rng = found.artist.rows(), np.random.default_rng(0)
    files = [found.workspace.store.path_of(drawn.picture) for drawn in rows]
    warm = {path.name: float((image[0] - image[2]).mean()) for path in files for image in [read_picture(path)]}
    votes = []
    for _ in range(40):
        left, right = (rows[int(k)] for k in rng.choice(len(rows), 2, replace=False))
        choice = "left" if warm[left.picture.file] > warm[right.picture.file] else "right"
        votes.append(Vote(left.prompt, left.picture, right.picture, choice))
    monkeypatch.setattr(found.voting, "votes", lambda: votes)
    card = found.voting.summary()["taste"]
    liked, disliked = ([warm[file] for file in card[side]] for side in ("liked", "disliked"))
    assert np.mean(liked) > np.mean(list(warm.values())) > np.mean(disliked)


def test_pairs_are_of_one_concept_and_no_percentage_is_shown_before_twenty(studio):
    client, found = studio
    while len(found.voting.votes()) < 19:
        pair = found.voting.pair()
        assert pair.prompt in vocabulary().concepts
        client.post("/choose/vote", data={"pair": pair.id, "choice": "left"})
    text = client.get("/choose/taste").text
    assert "%" not in text and "taste-accuracy" not in text
    assert "disabled" in re.search(r"<button[^>]*align-start[^>]*>", client.get("/align").text)[0]
    answer = client.post("/align/start", headers={"hx-request": "true"})
    assert answer.status_code == 422 and answer.headers["hx-retarget"] == "#notice" and "20 votes" in answer.text
    client.post("/choose/vote", data={"pair": found.voting.pair().id, "choice": "tie"})
    text = client.get("/choose/taste").text
    assert 'data-testid="taste-accuracy"' in text and "%" in text
    assert found.voting.scaling() is found.voting.scaling() or len(found.artist.rows()) < 64


def test_a_picture_that_cannot_be_drawn_is_said_and_hides_no_pair(studio, monkeypatch):
    """And when pictures can be drawn again, the sentence goes by itself."""
    client, found = studio
    shown = found.voting.pair()

    def full(rng):
        raise OSError("cannot write there")

    with monkeypatch.context() as patch:
        patch.setattr(found.artist, "_draw_some", full)
        found.artist.wake(["dog"])
        wait_for(lambda: found.artist.problem, 20, "the problem")
        text = client.get("/choose").text
        assert "cannot write there" in text and f'data-pair="{shown.id}"' in text
    found.artist.wake(["dog"])
    wait_for(lambda: not found.artist.problem, 20, "pictures")
    assert 'class="notice"' not in client.get("/choose/pair").text


def start_button(client):
    return re.search(r"<button[^>]*align-start[^>]*>", client.get("/align").text)[0]


def test_a_taste_that_is_not_learnt_is_not_offered_for_alignment(studio, monkeypatch):
    """Answers "left", whatever the pictures: the page says so and what to do; button and request refuse."""
    client, found = studio
    begun = []
    monkeypatch.setattr(found.processes, "train", lambda *given: begun.append(given))
    while len(found.voting.votes()) < 22:
        client.post("/choose/vote", data={"pair": found.voting.pair().id, "choice": "left"})
    assert found.voting.summary()["taste"]["learnt"] is False
    page = client.get("/align").text
    assert "no taste is learnt yet" in page and "Choose 20 more pictures" in page and "all the same" not in page
    assert "disabled" in start_button(client) and 'href="/choose">Choose more pictures' in page
    assert 'href="/align"' not in client.get("/choose/taste").text
    for way in ("taste-emoji", "taste-emoji-srpo", "taste-emoji-dpo"):
        answer = client.post("/align/start", data={"way": way}, headers={"hx-request": "true"})
        assert answer.status_code == 422 and "no taste is learnt yet" in answer.text
    assert not begun
    card = found.voting.summary()["taste"]
    learnt = card | {"learnt": True, "verdict": "Your choices are predicted in 80 % (65 to 90) of cases."}
    monkeypatch.setattr(found.voting, "summary", lambda: {"votes": 22, "start": 20, "good": 40, "taste": learnt})
    monkeypatch.setattr(found.voting, "words", list)  # which words fit such answers is chance
    assert "disabled" not in start_button(client)
    client.post("/align/start", data={"way": "taste-emoji"})
    assert [given[:2] for given in begun] == [("taste-emoji", "align-1")]


@pytest.fixture
def steered(studio):
    """The page of a run that was steered twice, its folder and its client."""
    client, found = studio
    folder = found.workspace.runs / "steer-9"
    folder.mkdir()
    plan = recipe.read("direct-emoji", ["algorithm.positive=['3d']", f"run.folder='{folder}'"])
    (folder / "recipe.yaml").write_text(recipe.dump(plan))
    rows = [{"step": k, "event": "step", "loss": 0.0, "reward": k / 10} for k in range(1, 9)]
    rows.insert(3, {"step": 4, "event": "steer", "positive": ["cartoon"], "negative": []})
    rows.insert(7, {"step": 7, "event": "steer", "positive": None, "negative": ["<b>red</b>"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield client, found, folder
    shutil.rmtree(folder)


def test_the_chart_marks_where_words_changed(steered):
    client, found, _ = steered
    view = found.view("steer-9")
    assert view.marks() == [(4, "+wanted cartoon, -wanted 3d"), (7, "+unwanted <b>red</b>")]
    page = client.get("/steer?run=steer-9").text
    assert "words changed at steps 4 (+wanted cartoon, -wanted 3d), 7 (+unwanted &lt;b&gt;red&lt;/b&gt;)" in page
    x = re.findall(r'<g class="mark">.*?<line x1="([\d.]+)"', page)
    assert [float(value) for value in x[:2]] == pytest.approx([34 + 278 * step / 60 for step in (4, 7)], abs=0.06)
    assert not Labels(page).problems and "<b>red" not in page


def test_words_of_a_run_that_its_guard_ended_are_those_of_its_result(steered):
    _, found, folder = steered
    assert found.view("steer-9").words().positive == {"cartoon": 4}
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"event": "guard", "step": 8, "action": "stop", "best_step": 5, "verdict": "x"}) + "\n")
    words = found.view("steer-9").words()
    assert (words.positive, words.negative) == ({"cartoon": 4}, {})  # not those of step 7


def test_steering_starts_the_quick_way_or_srpo_which_needs_both_sides(studio, monkeypatch):
    client, found = studio
    begun = []
    monkeypatch.setattr(found.processes, "train", lambda *given: begun.append(given))
    client.post("/steer/word", data={"word": "3d", "side": "positive"})
    headers = {"hx-request": "true"}
    answer = client.post("/steer/start", data={"way": "srpo-emoji"}, headers=headers)
    assert answer.status_code == 422 and "at least one of each" in answer.text and not begun
    assert client.post("/steer/start", data={"way": "taste-emoji"}, headers=headers).status_code == 422
    client.post("/steer/start", headers=headers)
    client.post("/steer/word", data={"word": "flat", "side": "negative"})
    client.post("/steer/start", data={"way": "srpo-emoji"}, headers=headers)
    assert [(way, name) for way, name, _ in begun] == [("direct-emoji", "steer-1"), ("srpo-emoji", "steer-1")]
    assert begun[0][2] == ['algorithm.positive=["3d"]', "algorithm.negative=[]"]
    plan = recipe.read(begun[1][0], begun[1][2])
    assert (plan.algorithm.name, plan.algorithm.positive, plan.algorithm.negative) == ("srpo", ("3d",), ("flat",))
    assert (plan.trainer.preview_every, plan.trainer.guard.every) == (5, 10)
    (found.workspace.home / "steer.json").unlink()


def test_the_last_word_of_a_side_of_srpo_stays(studio, monkeypatch):
    _, found = studio
    plan = recipe.read("srpo-emoji", ["algorithm.positive=['3d','cartoon']", "algorithm.negative=['flat']"])
    folder = found.workspace.runs / "x"
    folder.mkdir()
    view = RunView("x", folder, "running", "", plan, [], [])
    said = []
    monkeypatch.setattr("palate.studio.steering.steer", lambda folder, **words: said.append(words))
    change(view, "positive", "3d", add=False)
    assert said == [{"positive": ["cartoon"], "negative": ["flat"]}]
    with pytest.raises(InputError, match="add another one before you take 'flat' away"):
        change(view, "negative", "flat", add=False)
    folder.rmdir()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_stay_texts(studio, text):
    client, found = studio
    for answer in (
        client.post("/steer/word", data={"word": text}),
        client.post("/choose/settings", data={"prompts": text}, headers={"hx-request": "true"}),
        client.post("/recipe/check", data={"text": text}),
        client.get("/align", params={"run": text}),
        client.get("/drawn", params={"prompt": text}),
        client.post("/train", data={"text": "algorithm: {name: srpo}", "name": text}),
    ):
        assert answer.status_code in (200, 204, 422)
        for tag in ("<script>window", "<img src=x", "<svg", "<iframe", "<style>*", "<base", "<meta http-equiv=refresh"):
            assert tag not in answer.text
        assert "evil.example>" not in answer.text
    assert not found.workspace.names()
    for name in ("steer.json", "settings.json"):
        (found.workspace.home / name).unlink(missing_ok=True)


def test_hostile_prompts_of_votes_are_escaped(studio):
    """A vote file from elsewhere may hold any text."""
    client, found = studio
    files = [{"file": drawn.picture.file} for drawn in found.artist.pool[:2]]
    for text in HOSTILE:
        tree = {"id": "x1", "prompt": text, "left": files[0], "right": files[1], "repeat_of": None}
        found.workspace.write("pair.json", tree)
        page = client.get("/choose").text
        assert not Labels(page).problems and "<script>window" not in page
    vote = Vote(HOSTILE[1], *(Picture(file["file"]) for file in files), "left")
    found.workspace.store.append(vote)
    assert client.get("/choose/taste").status_code == 200
    found.workspace.store.undo()
    (found.workspace.home / "pair.json").unlink()


@pytest.mark.parametrize(
    "path",
    [
        "/picture/..%2fvotes.jsonl", "/picture/" + "a" * 64 + ".png", "/sample/..%2f..%2fetc/0/passwd",
        "/sample/x/0/0000.png", "/runs/..%2f../log", "/runs/studio/report", "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/events?run=../x", "/live?run=..", "/compare?run=../../etc", "/compare/grid?run=x",
    ],
)  # fmt: skip
def test_paths_that_lead_out_or_nowhere_are_refused(studio, path):
    client, _ = studio
    answer = client.get(path)
    assert answer.status_code in (404, 422) and "root:" not in answer.text and "import " not in answer.text


def test_the_log_and_the_report_of_a_run_have_the_way_back_that_every_page_has(steered):
    """The report itself is a file that is opened from folders too: it leads nowhere, and to the studio, whose pages
    alone may frame it, it is a page of another origin."""
    client, found, folder = steered
    found.workspace.logs.mkdir(parents=True, exist_ok=True)
    found.processes.log_path("steer-9").write_text("step 1\r<b>step 2</b>\n")
    for part in ("log", "report"):
        answer = client.get(f"/runs/steer-9/{part}")
        assert answer.status_code == 200 and not Labels(answer.text).problems and "steer-9" in answer.text
        for path in PATHS:
            assert f'href="{path}"' in answer.text
        assert '<a href="/runs" aria-current="page">' in answer.text
    assert "step 1\n&lt;b&gt;step 2&lt;/b&gt;" in client.get("/runs/steer-9/log").text
    assert "frame-src 'self'" in client.get("/runs/steer-9/report").headers["content-security-policy"]
    (source,) = re.findall(r'<iframe[^>]* src="([^"]+)"', client.get("/runs/steer-9/report").text)
    inside = client.get(source)
    assert inside.text == (folder / "report.html").read_text("utf-8") and 'href="/' not in inside.text
    policy = inside.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;") and "frame-ancestors 'self'" in policy
    assert inside.headers["x-frame-options"] == "SAMEORIGIN"
    (folder / "report.html").unlink()
    assert client.get(source).status_code == 422


def picture(shade):
    stream = io.BytesIO()
    Image.fromarray(np.full((40, 30, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_own_pictures_become_votes(studio):
    client, found = studio
    before = len(found.voting.votes())
    files = [("better", ("a.png", picture(200))), ("better", ("b.png", picture(180))), ("worse", ("c.png", picture(9)))]
    for _ in range(2):  # a form that is sent twice is one
        assert client.post("/choose/upload", files=files, data={"prompt": "fox"}).status_code == 200
    new = found.voting.votes()[before:]
    assert [vote.choice for vote in new] == ["left", "right"] and {vote.prompt for vote in new} == {"fox"}
    assert found.voting.summary()["taste"] is not None  # pictures of another size are looked at as well
    bad = [("better", ("a.png", picture(11))), ("better", ("b<b>.png", b"GIF89a")), ("worse", ("c.png", picture(10)))]
    answer = client.post("/choose/upload", files=bad)
    assert answer.status_code == 422 and ">b&lt;b&gt;.png: not a PNG" in answer.text  # which of them it was
    for _ in new:
        found.workspace.store.undo()


def test_words_are_refused_with_what_is_near_and_kept_as_a_draft(studio):
    client, _ = studio
    vocab = vocabulary()
    style = vocab.styles[0]
    answer = client.post("/steer/word", data={"word": "sparkly"})
    assert 'data-testid="refused"' in answer.text and style in answer.text
    answer = client.post("/steer/word", data={"word": style})
    assert 'data-testid="refused"' not in answer.text and "word-chip" in answer.text
    synonym = next((word for word, known in vocab.synonyms.items() if known == style), style)
    assert "wanted already" in client.post("/steer/word", data={"word": synonym, "side": "negative"}).text
    client.post("/steer/word", data={"word": style, "side": "positive", "action": "remove"})
    assert "word-chip" not in client.get("/steer").text
    answer = client.post("/steer/start", headers={"hx-request": "true"})
    assert answer.status_code == 422 and "at least one word" in answer.text


def test_a_recipe_is_checked_as_the_command_line_would(studio):
    client, _ = studio
    text = client.get("/recipe", params={"recipe": "srpo-emoji"}).text
    assert "<textarea" in text and "The recipe is valid" in text
    answer = client.post("/recipe/check", data={"text": "algorithm: {name: srpoo}\nfoo: 1\n"})
    assert answer.text.count("<li>") >= 2 and "did you mean srpo?" in answer.text
    assert "no recipe named" in client.get("/recipe", params={"recipe": "nope"}).text


def test_damaged_files_of_the_studio_itself_do_not_stop_it(studio):
    client, found = studio
    for name in ("settings.json", "pair.json", "steer.json", "rounds.json"):
        path = found.workspace.home / name
        wrong = json.dumps({"mode": 3, "prompts": [1], "source": 4, "runs": 2, "positive": 4, "id": 1}).encode()
        for damage in (b"", b"{", b"[1]", wrong):
            path.write_bytes(damage)
            for page in PATHS:
                assert client.get(page).status_code == 200, (name, damage, page)
        path.unlink()


def test_the_taste_chart_is_of_the_fixed_pictures(studio):
    """Mean taste of each preview above that of the first one, in standard deviations; not the batches' reward."""
    client, found = studio
    folder, taste = found.workspace.runs / "align-9", found.workspace.home / "tastes" / "warm"
    rows = [drawn for drawn in found.artist.pool[:24]]
    images = torch.stack([read_picture(found.workspace.store.pictures / row.picture.file) for row in rows])
    warm = (images[:, 0] - images[:, 2]).mean((1, 2))
    order = [int(k) for k in warm.argsort()]
    prompts = [row.prompt for row in rows]
    pairs = [{"prompt": prompts[j], "left": images[i], "right": images[j], "choice": "right"}
             for i, j in zip(order[:12], order[12:], strict=True)]  # fmt: skip
    learned = fit_taste(pairs * 2, blocks=["colour"])
    learned.save(taste)
    plan = recipe.read("taste-emoji", [f"reward.source.taste='{taste}'", f"run.folder='{folder}'"])
    shown = [prompts[i] for i in order[:3]]
    for step, chosen in ((0, order[:3]), (5, order[10:13]), (10, order[-3:])):
        samples = folder / "samples" / f"step-{step:06d}"
        samples.mkdir(parents=True)
        for k, i in enumerate(chosen):
            (samples / f"{k:04d}.png").write_bytes(png_of(images[i]))
        index = [{"file": f"{k:04d}.png", "prompt": shown[k], "seed": k} for k in range(3)]
        if step == 10:  # a resumed run that draws one more prompt, and those in another order
            index = [
                {"file": "0000.png", "prompt": "a fox", "seed": 9},
                *index[:0:-1],
                {**index[0], "file": "0003.png"},
            ]
            (samples / "0003.png").write_bytes((samples / "0000.png").read_bytes())
        (samples / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in index))
    (folder / "recipe.yaml").write_text(recipe.dump(plan))
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": k, "event": "step", "loss": 0.0, "reward": -k}) + "\n" for k in range(1, 11)))  # fmt: skip
    points = found.liking.of(found.view("align-9"))
    groups = (order[:3], order[10:13], order[-3:])
    exact = [learned.utility(images[chosen], shown).mean() for chosen in groups]
    assert [step for step, _ in points] == [0, 5, 10] and points[0][1] == 0.0
    assert [value for _, value in points[1:]] == pytest.approx([float(e - exact[0]) for e in exact[1:]], abs=1e-4)
    assert points[2][1] > points[1][1] > 0
    page = client.get("/align?run=align-9").text
    tiles = re.findall(r'data-before="/sample/align-9/(\S+)" data-after="/sample/align-9/(\S+)"', page)
    assert tiles == [("10/0000.png",) * 2, *((f"0/000{k}.png", f"10/000{k or 3}.png") for k in (2, 1, 0))]
    assert page.count('class="crisp before"') == 3  # a picture without an earlier one of its prompt stays
    assert "Your taste of these pictures" in page and f"to {points[2][1]:.3g}" in page
    shutil.rmtree(folder)
