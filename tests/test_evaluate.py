"""The metrics on features whose answer is known, and the evaluation as a deterministic, paired measurement."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from palate import evaluate
from palate.evaluate import Referee
from palate.path import Prediction, flow_schedule


class FakeJudge:
    """Concept = is the image bright in red; style = is it bright in green. Features = the pooled image."""

    concepts = ["apple", "dog"]
    styles = ["flat", "3d"]

    def features(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def concept(self, images):
        return (images[:, 0].mean((1, 2)) > 0.5).long()

    def style(self, images):
        return (images[:, 1].mean((1, 2)) > 0.5).long()


COLOURS = ["black", "blue"]


def parse(prompt):
    words = prompt.split()
    pick = lambda names: next((word for word in words if word in names), None)  # noqa: E731
    return SimpleNamespace(concept=pick(FakeJudge.concepts), style=pick(FakeJudge.styles), background=pick(COLOURS))


def background(images):
    return (images[:, 2, 0, 0] > 0.5).long()


def referee() -> Referee:
    rewards = {
        "emoji": lambda images, prompts: images.mean((1, 2, 3)),
        "emoji-heldout": lambda images, prompts: images[:, 2].mean((1, 2)),
    }
    return Referee(rewards, "emoji-heldout", FakeJudge(), parse, background, COLOURS)


def flat_image(red, green, blue, size=8):
    return torch.tensor([red, green, blue], dtype=torch.float32).view(3, 1, 1).expand(3, size, size)


class FakeModel:
    """The image is the latent's pixels; the policy's pictures are brighter than the reference's by `lift`."""

    schedule = staticmethod(flow_schedule)
    latent_shape = (3, 8, 8)
    image_size = 8
    default_steps, default_guidance = 1, 1.0

    def __init__(self, lift: float = 0.2):
        self.lift = lift

    def encode_prompts(self, prompts):
        return list(prompts)

    def decode(self, latents):
        return latents.clamp(0, 1)

    def predict(self, xt, t, cond, *, guidance=1.0, weights="policy"):
        alpha, sigma = flow_schedule(t)
        target = 0.4 + 0.2 * torch.tanh(xt) + (self.lift if weights == "policy" else 0.0)
        return Prediction(target, (xt - alpha * target) / sigma)

    def parameters(self, weights="policy"):
        return []


# --- pure metrics ---


def test_vendi_counts_orthogonal_features_and_ignores_copies():
    assert evaluate.vendi(torch.ones(7, 4)) == pytest.approx(1.0, abs=1e-9)
    assert evaluate.vendi(torch.eye(6) * 3.0) == pytest.approx(6.0, abs=1e-9)
    assert evaluate.vendi(torch.eye(3).repeat(5, 1)) == pytest.approx(3.0, abs=1e-9)  # N > D: the other Gram matrix
    unequal = torch.eye(2)[[0, 0, 0, 1]]  # shares 3/4 and 1/4: exp of their entropy
    assert evaluate.vendi(unequal) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_diversity_is_the_mean_pairwise_cosine_distance_inside_each_prompt():
    angle = math.pi / 3
    features = torch.tensor([[1.0, 0], [2.0, 0], [1.0, 0], [math.cos(angle), math.sin(angle)], [0, 5.0], [1.0, 0]])
    values = evaluate.diversity(features, ["a", "a", "b", "b", "c", "d"])
    assert values[:2].tolist() == pytest.approx([0.0, 1 - math.cos(angle)], abs=1e-7)
    assert values[2:].isnan().all()  # one image has no pair
    assert evaluate.diversity(torch.eye(5), "xxxxx").item() == pytest.approx(1.0)
    brute = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    cosines = torch.corrcoef(torch.cat([brute, -brute], 1))  # rows have mean 0, so correlation = cosine
    expected = 1 - (cosines.sum() - 9) / 72
    assert evaluate.diversity(brute, [0] * 9).item() == pytest.approx(expected.item(), abs=1e-6)


def test_drift_of_identical_images_is_nothing_and_of_known_changes_is_known():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = images.flatten(1)
    same = evaluate.drift(images, images, features, features)
    assert same.pop("feature_distance") == pytest.approx(0, abs=1e-9)
    assert all(value == 1.0 for value in same.values())
    half = evaluate.drift(
        images * torch.tensor([0.5, 1, 1]).view(3, 1, 1), images, torch.eye(4), torch.eye(4).roll(1, 0)
    )
    assert half["feature_distance"] == pytest.approx(1.0)
    assert half["red_ratio"] == pytest.approx(0.5) and half["blue_ratio"] == pytest.approx(1.0)
    assert evaluate.drift(images * 0.5, images, features, features)["high_frequency_ratio"] == pytest.approx(
        0.25, rel=1e-5
    )


def test_bootstrap_covers_the_known_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        low, high = evaluate.bootstrap_interval(3 + torch.randn(60, generator=generator), resamples=400, seed=trial)
        hits += low <= 3 <= high
    assert 87 <= hits <= 99  # 95 expected, sd 2.2
    values = torch.randn(4000, generator=generator, dtype=torch.float64)
    low, high = evaluate.bootstrap_interval(values)
    assert high - low == pytest.approx(
        2 * 1.96 * values.std().item() / 4000**0.5, rel=0.06
    )  # a 90 % one is 16 % narrower


def test_bootstrap_is_paired_seeded_and_resamples_whole_groups():
    base = 10 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = evaluate.bootstrap_interval(base + 1, base)
    assert low == pytest.approx(1, abs=1e-9) and high == pytest.approx(1, abs=1e-9)  # the common part cancels
    assert evaluate.bootstrap_interval(base) == evaluate.bootstrap_interval(base)
    assert evaluate.bootstrap_interval(base, seed=1) != evaluate.bootstrap_interval(base)
    # 5 copies of each value in a group carry no more information than one
    grouped = evaluate.bootstrap_interval(base.repeat_interleave(5), groups=[i // 5 for i in range(250)])
    assert grouped == pytest.approx(evaluate.bootstrap_interval(base), abs=1e-9)
    with_gap = torch.cat([base, torch.tensor([math.nan])])
    assert evaluate.bootstrap_interval(with_gap) == pytest.approx(evaluate.bootstrap_interval(base), abs=1e-9)


def test_shares_and_accuracies_read_the_judge():
    images = torch.stack(
        [flat_image(0.9, 0.9, 0.9), flat_image(0.9, 0.1, 0.1), flat_image(0.1, 0.9, 0.1), flat_image(0.1, 0.9, 0.9)]
    )
    captions = [parse(prompt) for prompt in ("dog blue", "dog blue", "dog", "apple blue")]
    assert evaluate.style_share(FakeJudge(), images) == {"flat": 0.25, "3d": 0.75}
    assert evaluate.concept_accuracy(FakeJudge(), images, captions) == pytest.approx(0.75)
    assert evaluate.background_accuracy(background(images), COLOURS, captions) == pytest.approx(
        2 / 3
    )  # the third did not ask


# --- evaluation ---


def judged(images, prompts, seeds, base=None):
    r = referee()
    ask = {"rewards": r.rewards, "judge": r.judge, "parse": r.parse, "background": r.background, "colours": r.colours}
    return evaluate.evaluate_images(images, prompts, seeds, base=base, **ask)


def test_evaluation_by_hand():
    images = torch.stack([flat_image(0.9, 0.9, 0.9), flat_image(0.9, 0.1, 0.1), flat_image(0.9, 0.9, 0.0)])
    base = torch.stack([flat_image(0.9, 0.1, 0.9), flat_image(0.9, 0.1, 0.1), flat_image(0.1, 0.1, 0.9)])
    result = judged(images, ["dog blue", "dog blue", "3d dog"], [0, 1, 0], base)
    metrics = result.summary["metrics"]
    assert (
        metrics["style/3d"]["value"] == 0.5 and metrics["style/3d"]["base"] == 0.0
    )  # the third prompt names its style
    assert metrics["style_named"]["value"] == 1.0 and metrics["style_named"]["change"] == 1.0
    assert metrics["concept"]["value"] == 1.0 and metrics["concept"]["base"] == pytest.approx(2 / 3, abs=1e-6)
    assert metrics["background"]["value"] == 0.5
    assert metrics["reward/emoji-heldout"]["change"] == pytest.approx((0 + 0 - 0.9) / 3, abs=1e-6)
    assert result.rows[1]["feature_distance"] == 0.0 and "background" not in result.rows[2]
    assert list(json.loads(evaluate.to_json(result.to_dict()))) == [
        "drift",
        "images",
        "metrics",
        "prompts",
        "rows",
        "seeds",
    ]


def test_a_bad_reward_is_named():
    images = torch.rand(2, 3, 8, 8)
    for value, words in ((torch.zeros(2, 1), "shape"), (torch.tensor([0.0, math.nan]), "finite")):
        with pytest.raises(ValueError, match=f"'bad' .*{words}"):
            evaluate.evaluate_images(
                images, ["a", "b"], [0, 0], rewards={"bad": lambda i, p, v=value: v}, judge=FakeJudge()
            )


def test_noise_belongs_to_prompt_and_seed_whatever_the_batch_or_the_weights():
    model, prompts = FakeModel(lift=0.0), ["dog", "apple", "dog blue"]
    images = evaluate.generate(model, prompts, [3, 5])
    assert torch.equal(images, evaluate.generate(model, prompts, [3, 5], batch_size=4))
    assert torch.equal(
        images, evaluate.generate(model, prompts, [3, 5], weights="reference")
    )  # lift 0: the same network
    assert torch.equal(images[1::2], evaluate.generate(model, prompts, [5]))
    assert evaluate.pairs(prompts, [3, 5]) == (["dog", "dog", "apple", "apple", "dog blue", "dog blue"], [3, 5] * 3)
    assert len({image.sum().item() for image in images}) == 6


def test_quick_check_agrees_with_the_full_evaluation():
    prompts, ids = ["dog", "dog", "apple blue", "3d apple"], [4, 9, 2, 7]
    result = evaluate.quick_check(FakeModel(), prompts, ids, seed=1, referee=referee())
    assert result == evaluate.quick_check(FakeModel(), prompts, ids, seed=1, referee=referee())
    assert set(result) == {
        "reward",
        "heldout",
        "concept",
        "background",
        "diversity",
        "saturation",
        "style/flat",
        "style/3d",
    }
    assert result["style/flat"] + result["style/3d"] == pytest.approx(1)
    shuffled = [2, 0, 3, 1]  # the noise follows the id, not the place
    again = evaluate.quick_check(
        FakeModel(), [prompts[i] for i in shuffled], [ids[i] for i in shuffled], seed=1, referee=referee()
    )
    assert again == pytest.approx(result, rel=1e-4)


def test_evaluate_run_measures_the_result_against_the_base_and_repeats_to_the_byte(tmp_path):
    (tmp_path / "recipe.yaml").write_text("reward: {name: emoji}\n")
    ask = {"prompts": ["dog", "apple blue"], "seeds": [0, 1], "referee": referee()}
    result = evaluate.evaluate_run(tmp_path, model=FakeModel(0.2), **ask)
    first = (tmp_path / "evaluation.json").read_bytes()
    assert result["metrics"]["reward/emoji"]["change"] == pytest.approx(0.2, abs=0.003)  # 8-bit PNG
    assert result["optimised"] == ["emoji"] and result["verdict"]["text"].startswith("Optimised reward up")
    evaluate.evaluate_run(tmp_path, model=FakeModel(0.2), **ask)
    assert (tmp_path / "evaluation.json").read_bytes() == first
    again = evaluate.evaluate_samples(
        tmp_path / "evaluation/result", base_folder=tmp_path / "evaluation/base", referee=referee()
    )
    assert again["metrics"] == result["metrics"]  # the stored images are the judged images


def test_the_verdict_warns_of_over_optimisation():
    def metric(base, value, margin=0.01):
        change = value - base
        return {
            "base": base,
            "value": value,
            "change": change,
            "change_low": change - margin,
            "change_high": change + margin,
        }

    good = {
        "reward/r": metric(1, 2),
        "reward/h": metric(1, 1.005),
        "concept": metric(0.98, 0.97),
        "diversity": metric(0.2, 0.19),
    }
    assert evaluate.verdict(good, ["r"], "h") == {
        "text": "Optimised reward up (1 to 2), held-out reward unchanged (1 to 1), "
        "concept 0.98 to 0.97, diversity x 0.95.",
        "warnings": [],
    }
    bad = {
        "reward/r": metric(1, 3),
        "reward/h": metric(1, 0.5),
        "concept": metric(0.98, 0.6),
        "diversity": metric(0.2, 0.1),
    }
    result = evaluate.verdict(bad, ["r"], "h")
    assert "held-out reward down" in result["text"] and len(result["warnings"]) == 3


def test_words_in_force_follow_the_steering(tmp_path):
    recipe = {"algorithm": {"positive": ["3d"], "negative": ["flat"]}}
    assert evaluate.words_in_force(tmp_path, recipe) == (["3d"], ["flat"])
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "step", "step": 1}\n{"event": "steer", "step": 2, "positive": ["outline"], "negative": null}\n'
    )
    assert evaluate.words_in_force(tmp_path, recipe) == (["outline"], ["flat"])


# --- sample folders ---


def samples(folder, prompts=("dog", "apple"), seeds=(0, 1)):
    words, numbers = evaluate.pairs(prompts, seeds)
    images = torch.rand(len(words), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    evaluate.write_samples(folder, images, words, numbers, guidance=3.0, steps=8)
    return folder


def test_samples_come_back_as_written(tmp_path):
    folder = samples(tmp_path / "a", prompts=("dog\x00<b>", "{{ 1 }}\u202e"))
    images, rows = evaluate.read_samples(folder)
    expected = evaluate.quantise(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(images, expected)
    assert [row["prompt"] for row in rows[1:3]] == ["dog\x00<b>", "{{ 1 }}\u202e"]


def test_runs_with_other_prompts_or_seeds_are_not_paired(tmp_path):
    a = samples(tmp_path / "a")
    cases = {"prompt of row 2 is 'apple'.*'dog blue'": ("dog", "dog blue"), "4 and 2 images.*'apple' seed 0": ("dog",)}
    for words, prompts in cases.items():
        with pytest.raises(ValueError, match=words):
            evaluate.evaluate_samples(a, base_folder=samples(tmp_path / prompts[-1], prompts), referee=referee())
    with pytest.raises(ValueError, match="seed of row 1 is 1 in the first, 7 in the second"):
        evaluate.evaluate_samples(a, base_folder=samples(tmp_path / "s", seeds=(0, 7)), referee=referee())


def test_missing_and_broken_images_are_named(tmp_path):
    folder = samples(tmp_path / "a")
    png = (folder / "0002.png").read_bytes()
    for content in (b"", b"not a picture", png[: len(png) // 2]):
        (folder / "0002.png").write_bytes(content)
        with pytest.raises(ValueError, match="0002.png cannot be read"):
            evaluate.read_samples(folder)
    (folder / "0002.png").unlink()
    with pytest.raises(ValueError, match="0002.png is missing"):
        evaluate.read_samples(folder)
    for line in ("{", '{"file": "../x.png", "prompt": "a", "seed": 0}', '{"prompt": "a", "seed": 0}', "[1]"):
        (folder / "index.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match="index.jsonl line 1"):
            evaluate.read_samples(folder)
    with pytest.raises(ValueError, match="index.jsonl is missing"):
        evaluate.read_samples(tmp_path / "nowhere")


def test_diversity_of_one_style_leaves_the_distance_between_styles_out():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    groups = ["a", "a", "a", "a", "b"]
    assert float(evaluate.diversity(features, groups)[0]) == pytest.approx(4 / 6)  # four of six pairs are orthogonal
    same = evaluate.diversity(features, groups, ["x", "x", "y", "y", "x"])
    assert float(same[0]) == 0.0 and same[1].isnan()
    assert float(evaluate.diversity(features, groups, ["x", "y", "x", "y", "x"])[0]) == 1.0
