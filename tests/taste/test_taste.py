"""taste/taste.py, reward.py, words.py, ask.py: what is learned is what was liked, and the reward says it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from palate import Taste, fit_taste
from palate.models.vocabulary import parse_prompt, vocabulary, with_words
from palate.rewards.combine import score_pair
from palate.runtime.errors import InputError
from palate.taste.ask import next_pair, telling_pairs
from palate.taste.features import COLOUR_COLUMNS, features_of
from palate.taste.learner import Posterior
from palate.taste.pictures import Choice, as_image
from palate.taste.taste import load_objective, mixed
from palate.taste.words import WordChoice, hidden_prompt, offered, unasked, word_gains

G = torch.Generator().manual_seed(5)
PICTURES = (torch.rand(60, 3, 8, 8, generator=G) * 0.5 + torch.rand(60, 3, 1, 1, generator=G) * 0.5).clamp(0, 1)
PROMPT = vocabulary().concepts[0]


class Tower:
    """Two towers that run fast: mean colour against the length of the prompt."""

    runs = 0

    def image_features(self, images):
        Tower.runs += 1
        return images.mean((2, 3))

    def score(self, features, prompts):
        return features[:, 1] * torch.tensor([float(len(prompt)) for prompt in prompts])

    def __call__(self, images, prompts):
        return self.score(self.image_features(images), prompts)


def warmth(images):
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def choices(liked=warmth, count=40, seed=0):
    rng, values = np.random.default_rng(seed), liked(PICTURES)
    found = []
    for _ in range(count):
        i, j = rng.choice(60, 2, replace=False)
        found.append(Choice(PROMPT, PICTURES[i], PICTURES[j], "left" if values[i] > values[j] else "right"))
    return found


@pytest.fixture(scope="module")
def taste():
    return fit_taste(choices(), base=Tower(), source="clip-score", blocks=["colour"])


def test_unseen_pairs_are_ordered_as_the_voter_would(taste):
    rng, values = np.random.default_rng(9), warmth(PICTURES)
    pairs = [rng.choice(60, 2, replace=False) for _ in range(100)]
    p = taste.predict([(PICTURES[i], PICTURES[j], PROMPT) for i, j in pairs])
    right = [(values[i] > values[j]) == (q > 0.5) for (i, j), q in zip(pairs, p, strict=True)]
    assert np.mean(right) >= 0.85
    turned = taste.predict([(PICTURES[j], PICTURES[i], PROMPT) for i, j in pairs])
    assert p + turned == pytest.approx(np.ones(100), abs=1e-9)


def test_the_card_names_what_was_liked_and_how_well_it_is_known(taste):
    assert taste.learnt and taste.card["accuracy"] > 0.8 and taste.card["of"] == 40
    assert "warm colours" in taste.card["words"]["wanted"]
    assert "blue light" in taste.card["words"]["unwanted"]


def test_forms_of_pictures_say_the_same(taste, tmp_path):
    array = (PICTURES[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    exact = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    forms = [exact, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png")]
    p = [taste.predict([{"left": form, "right": PICTURES[1], "prompt": PROMPT}])[0] for form in forms]
    assert p == pytest.approx([p[0]] * 4, abs=1e-9)


def test_a_saved_taste_is_the_same_taste(taste, tmp_path):
    taste.save(tmp_path / "t")
    again = Taste.load(tmp_path / "t", base=Tower())
    pairs = [(PICTURES[0], PICTURES[1], PROMPT), (PICTURES[2], PICTURES[3], PROMPT)]
    assert again.predict(pairs) == pytest.approx(taste.predict(pairs), abs=1e-12)
    assert torch.allclose(again.reward(PICTURES[:4], [PROMPT] * 4), taste.reward(PICTURES[:4], [PROMPT] * 4), atol=1e-5)
    assert again.card == taste.card | {"raters": {"voter 1": 1.0}}  # whoever chose is nobody's business


@pytest.mark.parametrize("damage", ["cut", "missing", "columns"])
def test_a_damaged_or_foreign_taste_is_refused(taste, tmp_path, monkeypatch, damage):
    path = taste.save(tmp_path / "t") / "taste.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "missing":
        path.unlink()
    else:
        monkeypatch.setattr("palate.taste.features.COLOUR_COLUMNS", ("another", *COLOUR_COLUMNS[1:]))
    with pytest.raises(InputError, match="taste"):
        Taste.load(tmp_path / "t", base=Tower())


class OtherTower(Tower):
    """The same kind of tower with other weights."""

    def image_features(self, images):
        return images.mean((2, 3)).flip(1) * 3


def test_a_taste_knows_the_tower_that_it_was_learned_on(tmp_path):
    taste = fit_taste(choices(), base=Tower(), source="clip-score", blocks=["pairs", "tower"])
    taste.save(tmp_path / "t")
    assert Taste.load(tmp_path / "t", base=Tower()).card["log_evidence"] == taste.card["log_evidence"]
    with pytest.raises(InputError, match=r"another version of the reward clip-score.*fit it again"):
        Taste.load(tmp_path / "t", base=OtherTower())
    scaling, probe = taste.scaling, taste.features.probe()
    scaling.save(tmp_path / "s.safetensors", probe)
    other = features_of(OtherTower(), "clip-score", ["pairs", "tower"]).probe()
    assert type(scaling).load(tmp_path / "s.safetensors", probe + 1e-4) is not None  # another machine's rounding
    assert type(scaling).load(tmp_path / "s.safetensors", other) is None
    assert type(scaling).load(tmp_path / "s.safetensors", probe[:, 1:]) is None


def test_the_card_of_stored_pictures_names_the_most_and_the_least_liked(tmp_path):
    found = []
    for i, choice in enumerate(choices(count=24)):
        files = [tmp_path / f"{i}-{side}.png" for side in ("left", "right")]
        for path, image in zip(files, (choice.left, choice.right), strict=True):
            Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
        found.append({"prompt": PROMPT, "left": files[0], "right": files[1], "choice": choice.choice})
    card = fit_taste(found, base=Tower(), source="clip-score", blocks=["colour"]).card
    warm = {
        side: np.mean([float(warmth(as_image(file)[None])) for file in card[side]]) for side in ("liked", "disliked")
    }
    assert len(card["liked"]) == 6 and not set(card["liked"]) & set(card["disliked"])
    assert warm["liked"] > warm["disliked"] + 0.1


def test_reward_is_the_utility_in_standard_deviations_plus_the_absolute_reward(taste):
    prompts = [PROMPT] * 60
    plain = taste.objective(absolute=0.0)(PICTURES, prompts)
    assert torch.allclose(plain, taste.utility(PICTURES, prompts), atol=1e-6)
    pool = torch.cat([torch.stack([c.left, c.right]) for c in choices()])
    assert float(taste.utility(pool, [PROMPT] * 80).std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    both = taste.objective(absolute=3.0)(PICTURES, prompts)
    assert torch.allclose(both - plain, 3.0 * Tower()(PICTURES, prompts), atol=1e-4)
    assert torch.allclose(taste.reward(PICTURES, prompts) - plain, 4.0 * Tower()(PICTURES, prompts), atol=1e-4)


def test_the_reward_does_not_change_with_the_scale_of_the_votes(taste):
    """Twice the weights (as many more votes would give) are the same reward: that is what the division by q is for."""
    bigger = Taste(taste.features, taste.scaling, taste.posterior._replace(mean=2 * taste.posterior.mean), taste.base)
    prompts = [PROMPT] * 5
    assert torch.allclose(bigger.reward(PICTURES[:5], prompts), taste.reward(PICTURES[:5], prompts), atol=1e-5)


def test_the_lower_bound_lies_below_by_the_posterior_deviation(taste):
    prompts, objective = [PROMPT] * 6, taste.objective(absolute=0.0)
    z = torch.from_numpy(taste.rows(PICTURES[:6], prompts))
    deviation = torch.einsum("bi,ij,bj->b", z, torch.from_numpy(taste.posterior.covariance), z).sqrt() / objective.q
    gap = objective(PICTURES[:6], prompts) - taste.objective(absolute=0.0, confidence=2.0)(PICTURES[:6], prompts)
    assert torch.allclose(gap.double(), 2 * deviation, atol=1e-4)


def test_the_gradient_leads_to_what_is_liked_and_the_tower_runs_once_for_two_prompts(taste):
    images = PICTURES[:4].clone().requires_grad_()
    taste.objective(absolute=0.0)(images, [PROMPT] * 4).sum().backward()
    better = (images.detach() + 0.2 * images.grad / images.grad.abs().amax()).clamp(0, 1)
    assert (warmth(better) > warmth(images.detach())).all()
    before = Tower.runs
    first, second = score_pair(taste.objective(), PICTURES[:4], ["x"] * 4, ["xyz"] * 4)
    assert Tower.runs == before + 1
    assert torch.allclose(second - first, 4.0 * 2.0 * PICTURES[:4].mean((2, 3))[:, 1], atol=1e-4)


def test_tastes_add_up_in_their_own_standard_deviations(taste, tmp_path):
    other = fit_taste(
        choices(lambda x: x.mean((1, 2, 3)), seed=3), base=Tower(), source="clip-score", blocks=["colour"]
    )
    sum_of = mixed([(0.7, taste), (0.3, other)])
    prompts = [PROMPT] * 60
    parts = [t.scaling.std(torch.from_numpy(t.posterior.mean)) for t in (taste, other)]
    z = torch.from_numpy(taste.rows(PICTURES, prompts))
    factor = other.scaling.gain / taste.scaling.gain
    own = torch.from_numpy(other.posterior.mean) * factor
    expected = 0.7 * z @ torch.from_numpy(taste.posterior.mean) / parts[0] + 0.3 * z @ own / taste.scaling.std(own)
    got = z @ torch.from_numpy(sum_of.posterior.mean)
    assert torch.allclose(got, expected, atol=1e-8)
    bounds = [one.objective(absolute=0.0, confidence=2.0)(PICTURES, prompts) for one in (taste, mixed([(3.0, taste)]))]
    assert torch.allclose(*bounds, atol=1e-4)  # what is uncertain grows with the weight as what is known does


def test_raters_have_a_quality_each():
    rng = np.random.default_rng(0)
    good = [choice._replace(rater="ann") for choice in choices(count=40)]
    coin = [
        choice._replace(rater="bob", choice=str(rng.choice(["left", "right"]))) for choice in choices(count=40, seed=2)
    ]
    found = fit_taste([*good, *coin], base=Tower(), source="clip-score", blocks=["colour"])
    assert found.card["raters"]["ann"] == 1.0 and found.card["raters"]["bob"] < 0.6


def test_votes_of_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="votes"):
        fit_taste([], base=Tower(), source="clip-score")
    with pytest.raises(InputError, match="does not exist"):
        fit_taste(tmp_path / "none")
    with pytest.raises(InputError, match="choice"):
        fit_taste([{"left": PICTURES[0], "right": PICTURES[1], "choice": "up"}], base=Tower(), source="clip-score")
    with pytest.raises(InputError, match=r"reward\.source\.taste"):
        load_objective(None)


# -------------------------------------------------------------------------------------------------------- words, pairs


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("3d-style cat", "outline", "outline-style cat"),
        ("A cat,  3d/large", "small", "A cat,  3d/small"),
        ("a 3d, large cat", "outline", "an outline, large cat"),
        ("An outline cat", "3d", "A 3d cat"),
        ("a cat on a blue background and a blue car", "red", "a cat on a red background and a blue car"),
        ("a blue cat on an orange background", "blue", "a blue cat on a blue background"),
    ],
)
def test_a_word_is_put_where_that_of_its_kind_stands_in_the_text(prompt, word, expected):
    assert with_words(prompt, [word]) == expected


def test_a_word_that_the_taste_has_is_offered_and_put_into_a_prompt():
    vocab = vocabulary()
    colour, style = next(iter(vocab.colours)), vocab.styles[0]
    concept = vocab.concepts[0]
    prompts = [concept] * 6 + [f"{concept} on a {colour} background"] * 6 + [f"{style} {concept}"] * 2
    z = np.array([[0.0, 1.0]] * 6 + [[2.0, 4.0]] * 6 + [[0.0, 1.0]] * 2)
    posterior = Posterior(np.array([2.0, 0.0]), np.diag([0.25, 1.0]), 1.0, 0.0, np.zeros(0))
    (best,) = gains = word_gains(z, prompts, posterior, 2.0)
    assert best[:4] == (colour, "background", pytest.approx(2.0), 6)
    assert best.error == pytest.approx((2.0**2 * 0.25 + 3.0**2) ** 0.5 / 2)
    assert all(g.word != style for g in gains)  # two pictures are too few
    assert [w.word for w in offered(gains)] == [colour]
    text = with_words(f"a {concept}", [f"{colour} background", style])
    assert text == f"{style} {concept} on a {colour} background"
    other = list(vocab.colours)[3]
    assert with_words(text, [other]).split().count(other) == 1 and colour not in with_words(text, [other]).split()
    with pytest.raises(InputError, match="no word of style"):
        with_words(f"a {concept}", [vocab.concepts[1]])
    assert with_words(text, [other, vocab.sizes[0]], replacing=False) == f"{vocab.sizes[0]} {text}"
    choices = [WordChoice(style, "style", 2.0, 9), WordChoice(colour, "background", 1.0, 9)]
    assert unasked(choices) == [colour] and unasked(choices[:1]) == []
    assert unasked(choices, [colour]) == [] and unasked(choices, [other]) == [colour]
    doubtful = WordChoice(colour, "background", 1.0, 9, error=0.6)  # .4 with a standard deviation less
    assert unasked([doubtful]) == [colour] and unasked([doubtful], [other]) == []


def test_the_next_pair_is_of_one_prompt_new_and_the_most_telling_of_its_candidates(taste):
    rng = np.random.default_rng(0)
    z = taste.rows(PICTURES, [PROMPT] * 60)
    groups = ["a"] * 30 + ["b"] * 30
    for _ in range(5):
        i, j = next_pair(taste.posterior, z, groups, set(), rng)
        assert groups[i] == groups[j] and i != j
        nats = taste.posterior.information(z[[i]] - z[[j]])[0]
        others = [rng.choice(30, 2, replace=False) for _ in range(50)]
        typical = np.median([taste.posterior.information(z[[a]] - z[[b]])[0] for a, b in others])
        assert nats > typical
    shown = {frozenset((0, 1)), frozenset((0, 2))}
    assert next_pair(None, z[:3], ["a"] * 3, shown, rng) in ((1, 2), (2, 1))
    assert next_pair(None, z[:3], ["a"] * 3, shown | {frozenset((1, 2))}, rng) is None
    met = [next_pair(taste.posterior, z, groups, set(), rng, champion=7) for _ in range(40)]
    assert all(7 in pair for pair in met)
    assert 10 <= sum(pair[0] == 7 for pair in met) <= 30  # on either side: who favours one favours no picture by it


def test_pairs_asked_together_use_each_picture_once(taste):
    z = taste.rows(PICTURES[:20], [PROMPT] * 20)
    found = telling_pairs(taste.posterior, z, ["a"] * 20, 8, np.random.default_rng(0))
    rows = [row for i, j, _ in found for row in (i, j)]
    assert len(found) == 8 and len(set(rows)) == 16
    assert [nats for *_, nats in found] == [pytest.approx(taste.posterior.information(z[[i]] - z[[j]])[0])
                                            for i, j, _ in found]  # fmt: skip


def test_a_taste_stands_on_a_reward_with_two_towers_and_each_block_once():
    with pytest.raises(InputError, match="warmth has none"):
        features_of(lambda images, prompts: images.mean((1, 2, 3)), "warmth", ["colour"])
    with pytest.raises(InputError, match=r"got 'colour'.*each once"):
        features_of(Tower(), "clip-score", ["colour", "colour"])


def test_votes_that_do_not_count_are_said(tmp_path, caplog):
    from palate.taste.votes import Picture, Vote, VoteStore

    store = VoteStore(tmp_path)
    for k in range(3):
        names = []
        for side in (0, 1):
            Image.fromarray(np.full((8, 8, 3), 40 * k + side, np.uint8)).save(tmp_path / "x.png")
            names.append(store.keep((tmp_path / "x.png").read_bytes()))
        store.append(Vote(PROMPT, *map(Picture, names), "tie"))
    (store.pictures / names[0]).unlink()
    found = fit_taste(store, base=Tower(), source="clip-score", blocks=["colour"])
    assert "1 of 3 votes do not count" in caplog.text
    assert found.card["liked"] == found.card["disliked"] == []  # ties like nothing better than anything else


def test_a_taste_is_standardised_on_pictures_from_all_over_the_studio_s_pool(tmp_path, monkeypatch):
    """Also on those that came last; lines that were cut, and pictures that are gone, are passed over."""
    from palate.taste import pictures
    from palate.taste.votes import VoteStore

    store, names = VoteStore(tmp_path), []
    for shade in range(7):
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(tmp_path / "x.png")
        names.append(store.keep((tmp_path / "x.png").read_bytes()))
    rows = [json.dumps({"file": name, "shown": f"p{k}"}) for k, name in enumerate(names)]
    (tmp_path / "pool.jsonl").write_text("\n".join([*rows, rows[0][:20]]))
    monkeypatch.setattr(pictures, "POOL", 3)
    images, shown = pictures.pool_beside(store)
    assert shown == ["p0", "p3", "p6"] and (255 * images.mean((1, 2, 3))).round().tolist() == [0, 3, 6]
    (store.pictures / names[3]).unlink()
    assert pictures.pool_beside(tmp_path)[1] == ["p0", "p2", "p5"]


def test_a_hidden_prompt_says_more_where_the_prompt_says_nothing():
    vocab, rng = vocabulary(), np.random.default_rng(0)
    concept, style, colour = vocab.concepts[0], vocab.styles[0], next(iter(vocab.colours))
    plain = [parse_prompt(hidden_prompt(concept, rng)) for _ in range(200)]
    shares = [np.mean([getattr(said, kind) is not None for said in plain]) for kind in ("size", "style", "background")]
    assert {said.concept for said in plain} == {concept} and shares == pytest.approx([0.4, 0.7, 0.7], abs=0.12)
    assert {said.style for said in plain} == {None, *vocab.styles}
    full = f"{style} {concept} on a {colour} background"
    told = [parse_prompt(hidden_prompt(full, rng)) for _ in range(20)]
    assert {(said.concept, said.style, said.background) for said in told} == {(concept, style, colour)}


def test_a_picture_without_features_is_named():
    thin = torch.rand(3, 1, 40)
    with pytest.raises(InputError, match="a picture of 40 x 1 pixels"):
        fit_taste([Choice(PROMPT, thin, PICTURES[0], "left")], base=Tower(), source="clip-score", blocks=["colour"])


def test_pictures_of_many_sizes_keep_their_places_and_wait_by_the_batch(taste, monkeypatch):
    from palate.taste import pictures

    sizes = [8 + k % 3 for k in range(40)]
    images = [torch.rand(3, size, size, generator=G) for size in sizes]
    pairs = [Choice(PROMPT, images[i], images[(i + 7) % 40]) for i in range(40)]
    whole = taste.predict(pairs)
    seen = []
    monkeypatch.setattr(pictures, "BATCH", 5)
    plain = pictures.raw_features
    monkeypatch.setattr(pictures, "raw_features", lambda f, x, p: seen.append(len(x)) or plain(f, x, p))
    np.testing.assert_allclose(taste.predict(pairs), whole, rtol=1e-9)
    assert max(seen) == 5 and sum(seen) == 40


@pytest.mark.parametrize("weight", ["nan", "inf", "much"])
def test_tastes_add_up_with_numbers_alone(weight):
    with pytest.raises(InputError, match="expected FOLDER or FOLDER:WEIGHT"):
        load_objective(f"tastes/a:{weight}")


def test_pairs_that_are_asked_for_are_read_when_they_are_answered(tmp_path, monkeypatch, capsys):
    """Their pictures are named from the list's own folder, as in every list, wherever the command was given."""
    from types import SimpleNamespace

    from palate.cli import fit_taste as command
    from palate.evaluate import write_samples
    from palate.taste.readers import import_votes
    from palate.taste.votes import VoteStore

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_samples(tmp_path / "lists/s p", PICTURES[:4], ["a fox"] * 4, range(4), guidance=1.0, steps=1)
    asked = SimpleNamespace(posterior=None, rows=lambda images, prompts: np.zeros((4, 2)))
    monkeypatch.setattr(command, "_load", lambda folder, weights: asked)
    out = tmp_path / "lists" / "next.jsonl"
    command.ask(tmp_path, tmp_path / "lists/s p", count=2, out=out, seed=0, weights=None)
    rows = [json.loads(line) | {"choice": "right"} for line in out.read_text().splitlines()]
    out.write_text("\n".join(map(json.dumps, rows)))
    assert import_votes(out, VoteStore(tmp_path / "votes")) == 2
    assert "outside" not in capsys.readouterr().out
    command.ask(tmp_path, tmp_path / "lists/s p", count=1, out=tmp_path / "new/next.jsonl", seed=0, weights=None)
    assert "lie beside or above" in capsys.readouterr().out
