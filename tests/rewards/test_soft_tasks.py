"""rewards/soft_tasks.py: probabilities of what the exact score counts, and their gradient."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from palate.models.vocabulary import Caption, Subject
from palate.rewards.detector import THRESHOLD, Cells, Detector
from palate.rewards.load import load_reward
from palate.rewards.soft_tasks import SLACK, SoftTaskReward, exactly, middle, mirrored, peaks_of
from palate.rewards.table import find
from palate.rewards.tasks import MARGIN, TaskReward, load_detector, requirements
from palate.runtime.errors import InputError

D = torch.float64
CONCEPTS, PAINTS = ["cat", "dog", "apple"], ["red", "blue"]


def cells_of(things, sharp=20.0):
    """Cells of (row, column, concept, paint): sure of these, and of nothing else."""
    middle_, concept = torch.full((1, 16, 16), -sharp, dtype=D), torch.zeros(1, 3, 16, 16, dtype=D)
    paint, place = torch.zeros(1, 3, 16, 16, dtype=D), torch.zeros(1, 3, 16, 16, dtype=D)
    for k, (row, column, name, colour) in enumerate(things):
        middle_[0, row, column] = sharp - 0.5 * k  # no two alike
        concept[0, CONCEPTS.index(name), row, column] = sharp
        paint[0, PAINTS.index(colour) if colour else 2, row, column] = sharp
    return Cells(middle_, concept, paint, place)


def seeing(cells):
    detector = Detector(CONCEPTS, PAINTS, width=8)
    detector.forward = lambda images: cells
    return detector


def test_how_many_is_the_sum_over_all_ways():
    chances = torch.rand(6, dtype=D, generator=torch.Generator().manual_seed(0))
    for count in range(7):
        ways = [
            math.prod(float(p) if k in chosen else 1 - float(p) for k, p in enumerate(chances))
            for chosen in itertools.combinations(range(6), count)
        ]
        assert float(exactly(chances, count)) == pytest.approx(sum(ways), abs=1e-15)
    assert float(sum(exactly(chances, n) for n in range(7))) == pytest.approx(1.0, abs=1e-15)


def random_scene(rng):
    spots = rng.sample(list(itertools.product(range(1, 16, 4), range(1, 16, 4))), rng.randint(0, 4))
    return [(*spot, rng.choice(CONCEPTS), rng.choice([*PAINTS, None])) for spot in spots]


def random_caption(rng):
    """Of one thing, of a number of it, or of two things, with colours or a side."""
    kind, (first, second) = rng.randrange(4), rng.sample(CONCEPTS, 2)
    paints = [rng.choice([*PAINTS, None]) for _ in range(2)]
    if kind == 0:
        return Caption(first, paint=paints[0])
    if kind == 1:
        return Caption(first, number=rng.randint(2, 4))
    relation = rng.choice(["left", "right", "above", "below"]) if kind == 2 else None
    return Caption(first, paint=paints[0], relation=relation, second=Subject(second, paints[1]))


def test_where_the_detector_is_sure_each_probability_is_the_exact_truth():
    rng, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(300):
        detector, caption = seeing(cells_of(random_scene(rng))), random_caption(rng)
        met = requirements(caption, detector.detect(torch.zeros(1, 3, 64, 64))[0])
        chances = SoftTaskReward(detector).chances(detector(None), 0, caption)
        assert [float(p) for p in chances] == pytest.approx([float(m) for m in met], abs=0.15)  # sides are soft
        assert [float(p) > 0.5 for p in chances] == met
        seen[all(met)] += 1
    assert min(seen.values()) > 20


def test_the_probability_of_a_side_is_the_logistic_of_the_distance_beyond_the_margin():
    cells = cells_of([(8, 4, "cat", None), (8, 6, "dog", None)], sharp=60.0)
    cells.place[0, 0, 8, 6] = -0.3
    reward, caption = SoftTaskReward(seeing(cells)), Caption("cat", relation="left", second=Subject("dog"))
    apart = (6.5 - 0.3 - 4.5) / 8
    assert float(reward.chances(cells, 0, caption)[-1]) == pytest.approx(
        1 / (1 + math.exp(-(apart - MARGIN) / SLACK)), abs=1e-12
    )
    other = reward.chances(cells, 0, caption._replace(relation="right"))[-1]
    assert float(other) == pytest.approx(1 / (1 + math.exp((apart + MARGIN) / SLACK)), abs=1e-12)
    assert float(middle(cells.place[0, 0], 8 * 16 + 6, 0)) == pytest.approx(6.2 / 8 - 1)


def test_a_cell_counts_with_one_half_where_detections_begin():
    logits = torch.full((16, 16), -9.0)
    logits[3, 3] = math.log(THRESHOLD / (1 - THRESHOLD))
    places, counts = peaks_of(logits)
    assert int(places[0]) == 3 * 16 + 3 and float(counts[0]) == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize(
    "caption",
    [
        Caption("cat"),
        Caption("cat", number=2),
        Caption("cat", paint="red", second=Subject("dog", "blue")),
        Caption("cat", relation="above", second=Subject("dog")),
    ],
)
def test_the_gradient_is_that_of_the_formulas(caption):
    """gradcheck in float64 on logits that are unsure, in every input that the caption reads."""
    torch.manual_seed(1)
    detector = seeing(None)
    parts = [torch.randn(shape, dtype=D) for shape in ((1, 16, 16), (1, 3, 16, 16), (1, 3, 16, 16), (1, 3, 16, 16))]
    tops = [part.requires_grad_() for part in parts]

    def score(*inputs):
        return torch.stack([p.log() for p in SoftTaskReward(detector).chances(Cells(*inputs), 0, caption)]).mean()

    value = score(*tops)
    grads = torch.autograd.grad(value, tops, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    for k, (part, grad) in enumerate(zip(tops, grads, strict=True)):
        if grad is None:
            continue
        way = torch.randn(part.shape, dtype=D, generator=generator)
        with torch.no_grad():
            up, down = ([p + sign * 1e-6 * way if i == k else p for i, p in enumerate(tops)] for sign in (1, -1))
            slope = (score(*up) - score(*down)) / 2e-6
        assert float((grad * way).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)
    assert grads[0] is not None and float(grads[0].abs().sum()) > 0.01


def test_a_thing_that_is_hardly_there_still_has_a_gradient():
    """d log q / d logit = 1 - q: where a probability itself would be flat."""
    cells = cells_of([], sharp=0.0)
    low = cells.middle - 12
    low[0, 5, 5] += 1
    logits = low.requires_grad_()
    chance = SoftTaskReward(seeing(None)).chances(cells._replace(middle=logits), 0, Caption("cat"))[0]
    (slope,) = torch.autograd.grad(chance.log(), logits)
    assert float(slope[0, 5, 5]) == pytest.approx(1.0, abs=1e-4) and int((slope != 0).sum()) == 1


def test_images_of_a_batch_are_scored_each_by_itself_and_reach_their_pixels():
    torch.manual_seed(0)
    detector = Detector(["cat", "dog"], ["red"], width=8).requires_grad_(False)
    reward = SoftTaskReward(detector)
    images = torch.rand(3, 3, 64, 64, requires_grad=True)
    values = reward(images, ["a cat", "a dog", "a cat"])
    alone = torch.cat([reward(images[k : k + 1], [p]) for k, p in enumerate(("a cat", "a dog", "a cat"))])
    assert torch.allclose(values, alone, atol=1e-5) and bool((values < 0).all()) and values.dtype == images.dtype
    (slope,) = torch.autograd.grad(values[1], images)
    assert not slope[[0, 2]].any() and float(slope[1].abs().max()) > 0 and bool(torch.isfinite(slope).all())
    step = images + 0.5 * slope / slope.norm()
    assert float(reward(step.detach(), ["a cat", "a dog", "a cat"])[1]) > float(values[1].detach())
    for each in (reward, TaskReward(detector)):  # of which the exact one gave 0, whatever the picture
        with pytest.raises(InputError, match=r"^emoji-tasks.*: the prompt 'on a blue background' names no thing"):
            each(images[:1], ["on a blue background"])


def test_pictures_that_are_not_finite_have_no_score():
    """A number that is none, which the loop sees and skips the update, in the place of an error."""
    reward = SoftTaskReward(Detector(["cat", "dog"], ["red"], width=8).requires_grad_(False))
    images = torch.stack([torch.rand(3, 64, 64), torch.full((3, 64, 64), torch.nan)])
    for prompt in ("a cat", "two cats", "a red cat to the left of a dog"):
        assert reward(images, [prompt] * 2).isnan().tolist() == [False, True]


def test_the_detector_follows_the_images_to_their_device():
    """As every other network of a reward: the model may be on an accelerator."""
    moves = []

    class Elsewhere(Detector):
        def to(self, device):
            moves.append(device)
            return self

        def forward(self, images):
            return cells

    detector, cells = Elsewhere(CONCEPTS, PAINTS, width=8), cells_of([(4, 4, "cat", "red")])
    reward = SoftTaskReward(detector)
    reward(torch.zeros(1, 3, 64, 64), ["a cat"])
    assert moves == []
    torch.nn.Module.to(detector, "meta")
    reward(torch.zeros(1, 3, 64, 64), ["a cat"])
    assert moves == [torch.device("cpu")]


def test_its_name_is_a_reward_with_a_gradient_beside_the_exact_one():
    assert find("emoji-tasks-soft").gradient and not find("emoji-tasks").gradient
    try:
        load_detector()
    except InputError as error:
        with pytest.raises(InputError, match=str(error)[:40]):
            load_reward("emoji-tasks-soft")
    else:
        assert isinstance(load_reward("emoji-tasks-soft"), SoftTaskReward)


def test_the_prompt_of_a_mirrored_picture():
    assert mirrored("a red cat to the left of a dog, right?") == "a red cat to the right of a dog, left?"
    assert mirrored("a cat above a dog") == "a cat above a dog"
