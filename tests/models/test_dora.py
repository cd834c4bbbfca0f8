"""A DoRA's change of a weight, wherever a LoRA is scaled, mixed, merged or written: its norms of rows stay."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny_families import load, saved

from palate.export.names import to_form
from palate.models import adapters, lora
from palate.models.facts import facts_of
from palate.models.merge import merged
from palate.models.original import Lora
from palate.runtime.errors import InputError

LINEAR, CONV = "transformer_blocks.0.attn.to_q", "pos_embed.proj"


def dora(shapes, seed=0, *, plain=()):
    """Layers with norms of their own, but for the `plain` ones."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in (LINEAR, CONV):
        out, into, *kernel = shapes[name]
        layers[name] = Lora(torch.randn(3, into, *kernel, generator=generator),
                            torch.randn(out, 3, *[1] * len(kernel), generator=generator), 2.0,
                            None if name in plain else torch.rand(out, generator=generator) + 0.5)  # fmt: skip
    return layers


@pytest.fixture
def begun(tmp_path):
    """(a tiny SD3 that begins with a DoRA of a linear layer and of a convolution, its layers, the base's weights)."""
    model = load("sd3")
    base = {name: model.weights.network.get_submodule(name).get_parameter("base_layer.weight" if name == LINEAR else
            "weight").detach().clone() for name in (LINEAR, CONV)}  # fmt: skip
    layers = dora(adapters.shapes_of(saved("sd3")[1].transformer))
    tensors, metadata = to_form(layers, "diffusers", facts_of("sd3"))
    lora.write(tmp_path / lora.FILE, tensors, metadata)
    model.weights.begin(tmp_path, rank=3, alpha=None)
    return model, layers, base


def test_the_change_is_what_peft_adds_to_the_weight(begun):
    model, layers, base = begun
    network = model.weights.merged()
    for name, one in layers.items():
        rows = (base[name] + one.change(base[name])).flatten(1).norm(dim=1)
        torch.testing.assert_close(rows, one.magnitude)  # what the method is named for
        theirs = network.get_submodule(name).weight - base[name]
        torch.testing.assert_close(one.change(base[name]), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 1.5])
def test_a_strength_multiplies_the_change_and_leaves_nothing_behind(begun, strength):
    """At 0 the base model is left, whatever the norms are."""
    model, layers, base = begun
    generator = torch.Generator().manual_seed(3)
    inputs = {LINEAR: torch.randn(2, base[LINEAR].shape[1], generator=generator),
              CONV: torch.randn(2, *base[CONV].shape[1:], generator=generator)}  # fmt: skip
    for name, one in layers.items():
        layer = model.weights.network.get_submodule(name)
        with torch.no_grad():
            as_trained = layer(inputs[name])
            with model.at_strength(strength):
                found = layer(inputs[name])
            assert torch.equal(layer(inputs[name]), as_trained)
            layer.base_layer.weight += strength * one.change(base[name])
            expected = layer.base_layer(inputs[name])
            layer.base_layer.weight.copy_(base[name])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_live_grid_adds_up_changes_of_the_base_model():
    from palate.studio.comparing import with_strength

    shapes = {LINEAR: (6, 5), CONV: (4, 3, 2, 2)}
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    network = torch.nn.Module()
    network.named_modules = lambda: [(name, SimpleNamespace(weight=weight)) for name, weight in now.items()]
    now = {name: weight.clone() for name, weight in base.items()}
    model = SimpleNamespace(weights=SimpleNamespace(network=network))
    one, two = dora(shapes), dora(shapes, 1, plain=(CONV,))
    for strengths in ((1.0, 0.0), (0.3, 0.9), (0.0, 0.0)):
        with_strength(model, list(zip(strengths, (one, two), strict=True)))
        for name, weight in base.items():
            changes = (s * part[name].change(weight) for s, part in zip(strengths, (one, two), strict=True))
            torch.testing.assert_close(now[name], weight + sum(changes))


def test_what_cannot_keep_the_norms_is_refused(tmp_path):
    """A sum of DoRAs is none, and kohya's and ComfyUI's readers divide by other norms; theirs of inputs are no ours."""
    layers = dora({LINEAR: (5, 5), CONV: (4, 3, 2, 2)})
    with pytest.raises(InputError, match="a DoRA cannot be added"):
        merged([layers, layers], [0.5, 0.5])
    for form, family in (("comfyui", "sd3"), ("comfyui", "sdxl"), ("kohya", "sdxl"), ("kohya", "flux")):
        with pytest.raises(InputError, match=f"--format {form}: this is a DoRA"):
            to_form(layers, form, facts_of(family))
    one = layers[LINEAR]
    for shape, read in (((5, 1), True), ((1, 5), False)):  # by the shape alone, where a layer is square
        file = tmp_path / f"{shape[0]}.safetensors"
        lora.write(file, {"a.lora_down.weight": one.down, "a.lora_up.weight": one.up, "a.alpha": torch.tensor(2.0),
                          "a.dora_scale": one.magnitude.view(shape)}, {"format": "pt"})  # fmt: skip
        if read:
            assert torch.equal(lora.read(file, {"a": (5, 5)}, None, "model.start")["a"].magnitude, one.magnitude)
        else:
            with pytest.raises(InputError, match="norms of inputs"):
                lora.read(file, {"a": (5, 5)}, None, "model.start")
