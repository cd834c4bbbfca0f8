"""Every method draws whatever size a step asks for, as a model of that size does, and goes on exactly."""

from __future__ import annotations

import pytest
from support.loop import Elastic, rows, same, tensors
from support.ranks import MAKE, TEACHERS, Networks, go

from palate.algorithms import table
from palate.core import TakesAnySize
from palate.recipe import SampleSettings

OTHERS = {"distar": ("assistant",), "opd": tuple(TEACHERS)}
WIDE = (8, 16)


class ElasticNetworks(Elastic, Networks):
    """The stand-in for all methods, which draws any size."""


def trained(folder, name, monkeypatch, *, size=None, **options):
    """A run of the method on a model of that size; the sizes of the images that it decoded, and its run folder."""
    seen = []

    def model(dtype, others, training):
        made = ElasticNetworks(dtype, others, training)
        if size is not None:
            made.held = made.at_size(size)  # for as long as the model is there
            made.held.__enter__()
        decode = made.decode
        made.decode = lambda latents: seen.append(tuple(latents.shape[-2:])) or decode(latents)
        return made

    monkeypatch.setattr("support.ranks.Networks", model)
    go(folder, name, checkpoint_every=1, **options)
    return seen


def test_every_method_says_that_it_takes_any_size():
    kinds = [table.find(name).load_class() for name in table.names()]
    assert len(kinds) >= 11 and [kind for kind in kinds if not (isinstance(kind, TakesAnySize) and kind.any_size)] == []


@pytest.mark.parametrize("name", MAKE)
def test_a_step_of_a_size_is_that_of_a_model_of_this_size(name, tmp_path, monkeypatch):
    trained(tmp_path / "own", name, monkeypatch, size=WIDE)
    trained(tmp_path / "asked", name, monkeypatch, sizes=[WIDE])
    assert rows(tmp_path / "own") == rows(tmp_path / "asked")
    assert same(tensors(tmp_path / "own", 4), tensors(tmp_path / "asked", 4))


@pytest.mark.parametrize("name", MAKE)
def test_sizes_in_turn_go_on_exactly(name, tmp_path, monkeypatch):
    sizes = {"sizes": [8, WIDE, (16, 8)], "seed": 1}
    seen = trained(tmp_path / "whole", name, monkeypatch, steps=6, **sizes)
    trained(tmp_path / "halves", name, monkeypatch, steps=3, **sizes)
    trained(tmp_path / "halves", name, monkeypatch, steps=6, resume=True, **sizes)
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert same(tensors(tmp_path / "halves", 6), tensors(tmp_path / "whole", 6))
    assert name in ("opd", "distar") or len(set(seen)) > 1


def test_the_guard_looks_at_the_size_that_previews_have(tmp_path, monkeypatch):
    from palate.recipe import GuardSettings

    guard = GuardSettings(every=2, prompts=4, action="warn")
    sample = SampleSettings(steps=2, image_size=(16, 24))
    seen = trained(tmp_path, "srpo", monkeypatch, guard=guard, sample=sample)
    assert (8, 12) in seen and (4, 4) in seen  # latents of the guard, and of the training
    looks = [row for row in rows(tmp_path) if row["event"] == "guard"]
    assert len(looks) == 3 and looks[0]["verdict"] == "base"
    seen.clear()
    with pytest.raises(ValueError, match=r"other settings"):
        trained(tmp_path, "srpo", monkeypatch, guard=guard, sample=SampleSettings(steps=2), resume=True, steps=6)
