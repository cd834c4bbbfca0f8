"""models/merge.py: the merged adapter's change is the weighted sum of the changes, in files as in tensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from palate.models import lora
from palate.models.adapters import common
from palate.models.merge import merge_adapters, merged
from palate.models.original import Lora
from palate.models.saved import check_rates, read_saved


def layer(seed, rank=2, alpha=3.0, shape=(5, 4)):
    generator = torch.Generator().manual_seed(seed)
    return Lora(
        torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator), alpha
    )


def change(part):
    return part.scale * part.up @ part.down


def write(folder, layers):
    record = json.dumps(lora.peft_config(layers))
    lora.write(folder / lora.FILE, lora.to_peft(layers), {"format": "pt", lora.METADATA: record})
    return folder


def test_the_change_is_the_weighted_sum_whatever_ranks_and_alphas():
    a, b = {"x": layer(0), "y": layer(1)}, {"x": layer(2, rank=3, alpha=1.0)}
    got = merged([a, b], [0.5, -2.0])
    torch.testing.assert_close(change(got["x"]), 0.5 * change(a["x"]) - 2 * change(b["x"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(change(got["y"]), 0.5 * change(a["y"]), atol=1e-6, rtol=0)
    assert got["x"].rank == 5 and got["x"].alpha == 5.0 and got["y"].rank == 2


def test_rank_and_alpha_are_those_that_most_layers_have():
    assert common({"x": layer(0), "y": layer(1), "z": layer(2, rank=5, alpha=1.0)}) == (2, 3.0)


def test_files_of_runs_are_merged_and_read_back(tmp_path):
    a, b = {"down.to_k": layer(0), "up.to_q": layer(1)}, {"down.to_k": layer(2, rank=3), "up.to_q": layer(3, rank=3)}
    sources = [write(tmp_path / "a", a), write(tmp_path / "run" / "adapter", b).parent]  # a folder, and that of a run
    assert merge_adapters(sources, [0.25, 0.75], tmp_path / "out") == 5
    shapes = {"down.to_k": (5, 4), "up.to_q": (5, 4)}
    back = lora.read(tmp_path / "out" / lora.FILE, shapes, None, "test")
    for name in shapes:
        torch.testing.assert_close(
            change(back[name]), 0.25 * change(a[name]) + 0.75 * change(b[name]), atol=1e-5, rtol=0
        )
    first = (tmp_path / "out" / lora.FILE).read_bytes()
    merge_adapters(sources, [0.25, 0.75], tmp_path / "again")
    assert (tmp_path / "again" / lora.FILE).read_bytes() == first and load_file(tmp_path / "out" / lora.FILE)


@pytest.mark.parametrize(("first", "second", "told"), [("abc", "c", 2), ("abc", "bc", 5), ("abcd", "ab", 5)])
def test_the_rank_that_is_told_is_the_one_that_a_start_asks_for(first, second, told, tmp_path):
    """That of most layers, where adapters share some of theirs; of as many, the one that is read first."""
    sources = [
        write(tmp_path / name, {each: layer(3, rank=rank) for each in names})
        for name, names, rank in (("first", first, 2), ("second", second, 3))
    ]
    assert merge_adapters(sources, [1.0, 1.0], tmp_path / "out") == told
    path = tmp_path / "out" / lora.FILE
    check_rates(lora.read(path, dict.fromkeys(first, (5, 4)), None, "test"), path, told, None, "model.start")


def test_what_cannot_be_merged_is_said(tmp_path):
    one = write(tmp_path / "a", {"x": layer(0)})
    with pytest.raises(ValueError, match="no layer in common"):
        merge_adapters([one, write(tmp_path / "b", {"z": layer(1)})], [1, 1], tmp_path / "out")
    with pytest.raises(ValueError, match="as many weights"):
        merge_adapters([one], [1, 1], tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        merge_adapters([one, tmp_path / "nothing"], [1, 1], tmp_path / "out")
    cut = write(tmp_path / "cut", {"x": layer(0)}) / lora.FILE
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"merge: .*cut.* is damaged or incomplete"):
        merge_adapters([one, tmp_path / "cut"], [1, 1], tmp_path / "out")
    with pytest.raises(ValueError, match=r"cut.* is damaged or incomplete"):  # an adapter of named weights, likewise
        read_saved(tmp_path / "cut", "policy", {}, training="lora", reference=torch.nn.Identity())
    dora = layer(0)._replace(magnitude=torch.ones(5))
    with pytest.raises(ValueError, match="DoRA"):
        merged([{"x": dora}], [1.0])
    assert not (tmp_path / "out").exists()
