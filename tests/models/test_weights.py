"""models/weights.py: named weights on a small network of the real class, and the two traps of adapters."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from palate.models import adapters
from palate.models.weights import NamedWeights

NAMES = ("policy", "assistant")
D = torch.float64


def make(training="lora", names=NAMES, rank=2) -> NamedWeights:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = (
            UNet2DConditionModel(
                sample_size=4,
                in_channels=2,
                out_channels=2,
                layers_per_block=1,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                cross_attention_dim=8,
                attention_head_dim=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )
            .to(D)
            .eval()
        )
        targets = ("to_q", "to_v", "conv1")
        weights = NamedWeights(unet, training=training, rank=rank, alpha=None, targets=targets, names=names)
    weights.network.to(D)
    for name in names:  # every name says something else
        for k, p in enumerate(weights.parameters(name)):
            noise = torch.randn(p.shape, dtype=D, generator=torch.Generator().manual_seed(100 * len(name) + k))
            p.data.add_(0.1 * noise)
    return weights


X = torch.randn(2, 2, 4, 4, dtype=D, generator=torch.Generator().manual_seed(1))
COND = torch.randn(2, 3, 8, dtype=D, generator=torch.Generator().manual_seed(2))


def say(weights: NamedWeights, name: str, x=X):
    with weights.using(name) as network:
        return network(x, torch.tensor([300.0, 700.0], dtype=D), COND).sample


def gradients(weights: NamedWeights, name: str):
    found = [p.grad for p in weights.parameters(name)]
    for p in weights.parameters(name):
        p.grad = None
    return found


def test_an_adapter_of_another_rank_says_which_to_set(tmp_path):
    make(rank=3).save(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this model.*set model.lora_rank=3"):
        make().load(tmp_path)


def test_an_adapter_of_another_alpha_says_which_to_set(tmp_path):
    """Its tensors fit; it would come back too strong or too weak."""
    make().save(tmp_path)
    other = make()
    for module in adapters.adapted(other.network, "policy").values():
        module.lora_alpha["policy"] = 8
    with pytest.raises(ValueError, match=r"has alpha 2, this model 8; set model.lora_alpha=2"):
        other.load(tmp_path)


def test_the_first_factor_is_drawn_with_the_deviation_of_one_over_the_rank():
    """`model.lora_init=gaussian`, N(0, 1 / rank^2); the second factor stays as it was."""
    weights = make(rank=5)
    before = [p.detach().clone() for p in weights.parameters("policy")]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights.draw_first_factor()
    kinds = [".lora_A." in key for key in adapters.own_parameters(weights.network, "policy", adapter=True)]
    pairs = list(zip(kinds, before, weights.parameters("policy"), strict=True))
    drawn = torch.cat([p.detach().flatten() for first, _, p in pairs if first])
    assert (
        len(drawn) > 2000 and float(drawn.std()) == pytest.approx(1 / 5, rel=0.06) and abs(float(drawn.mean())) < 0.02
    )
    assert all(torch.equal(old, p) for first, old, p in pairs if not first)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_names_are_separate_and_the_reference_is_what_it_was(training):
    weights = make(training)
    three = [say(weights, name).detach() for name in (*NAMES, "reference")]
    assert all((three[i] - three[j]).abs().max() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))
    with torch.no_grad():
        for p in weights.parameters("assistant"):
            p.zero_()
    assert torch.equal(say(weights, "policy"), three[0]) and torch.equal(say(weights, "reference"), three[2])
    assert not torch.equal(say(weights, "assistant"), three[1])
    assert weights.parameters("reference") == [] and not say(weights, "reference").requires_grad
    own = {name: {id(p) for p in weights.parameters(name)} for name in NAMES}
    assert own["policy"] and not own["policy"] & own["assistant"]
    assert [id(p) for p in weights.parameters("policy")] == [id(p) for p in weights.parameters("policy")]
    assert all(p.requires_grad for name in NAMES for p in weights.parameters(name))


@pytest.mark.parametrize("name", ["0", "conv1", "attn2"])
def test_a_frozen_name_that_is_also_a_part_of_the_network_freezes_itself_only(name, tmp_path):
    weights = make()
    weights.save(tmp_path)
    weights.add_frozen(tmp_path, name)
    assert all(p.requires_grad for trained in NAMES for p in weights.parameters(trained))
    assert not any(p.requires_grad for p in adapters.own_parameters(weights.network, name, adapter=True).values())
    assert torch.allclose(say(weights, name), say(weights, "policy"))


def test_every_name_starts_as_the_reference():
    with torch.random.fork_rng():
        unet = make("none", names=("policy",)).network
        weights = NamedWeights(unet, training="lora", rank=2, alpha=None, targets=("to_q",), names=NAMES)
        weights.network.to(D)
    assert all(torch.equal(say(weights, name), say(weights, "reference")) for name in NAMES)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("speaker", NAMES)
@pytest.mark.parametrize("between", [*NAMES, "reference"])
def test_a_switch_between_forward_and_backward_leaves_the_gradient(training, speaker, between):
    """peft flips requires_grad when it selects; a backward after that would be silently empty."""
    weights = make(training)
    say(weights, speaker).square().sum().backward()
    plain = gradients(weights, speaker)
    loss = say(weights, speaker).square().sum()
    with torch.no_grad():
        say(weights, between)
    loss.backward()
    switched = gradients(weights, speaker)
    other = NAMES[1 - NAMES.index(speaker)]
    assert all(g is None for g in gradients(weights, other))
    assert all(torch.equal(a, b) for a, b in zip(plain, switched, strict=True))
    assert sum(float(g.abs().sum()) for g in plain) > 0


def test_a_backward_inside_another_selection_keeps_the_gradient():
    weights = make()
    loss = say(weights, "policy").square().sum()
    plain = torch.autograd.grad(loss, weights.parameters("policy"), retain_graph=True)
    for name in ("assistant", "reference"):
        with weights.using(name):
            loss.backward(retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(weights, "policy"), strict=True))


@pytest.mark.parametrize("name", ["assistant", "reference"])
def test_what_is_frozen_stays_frozen_and_the_policy_returns_after_an_error(name):
    weights = make()
    for p in weights.parameters("assistant"):
        p.requires_grad_(False)
    before = say(weights, "policy").detach()
    with pytest.raises(RuntimeError, match="inside"), weights.using(name):
        raise RuntimeError("inside")
    assert torch.equal(weights.network(X, torch.tensor([300.0, 700.0], dtype=D), COND).sample, before)
    assert torch.equal(say(weights, "policy").detach(), before)
    assert not any(p.requires_grad for p in weights.parameters("assistant"))
    assert all(p.requires_grad for p in weights.parameters("policy"))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_checkpointed_blocks_recompute_under_the_weights_that_made_them(training):
    """One loss through three speakers, backward while the policy is selected."""
    weights = make(training)

    def all_gradients():
        x = X.clone().requires_grad_()
        sum(k * say(weights, name, x).square().sum() for k, name in enumerate((*NAMES, "reference"), 1)).backward()
        return [x.grad, *gradients(weights, "policy"), *gradients(weights, "assistant")]

    plain = all_gradients()
    weights.checkpoint_activations()
    recomputed = all_gradients()
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("training", ["lora", "full"])
def test_saved_names_load_back_each_to_its_own(tmp_path, training):
    first, second = make(training), make(training)
    for name in NAMES:
        first.save(tmp_path / name, name)
        for p in second.parameters(name):
            p.data.zero_()
    second.load(tmp_path / "assistant", "assistant")
    assert not any(p.any() for p in second.parameters("policy"))
    second.load(tmp_path / "policy", "policy")
    assert all(
        torch.equal(a, b)
        for name in NAMES
        for a, b in zip(first.parameters(name), second.parameters(name), strict=False)
    )
    with pytest.raises(ValueError, match=r"no .*safetensors"):
        second.load(tmp_path)
    if training == "lora":
        with pytest.raises(ValueError, match="does not fit"):
            make(rank=3).load(tmp_path / "policy")


def test_bad_names_are_refused():
    for names in (("assistant",), ("policy", "policy"), ("policy", "reference"), "policy"):
        with pytest.raises(ValueError, match="names got"):
            make(names=names)
    weights = make(names=("policy",))
    for call in (lambda: say(weights, "assistant"), lambda: weights.parameters("assistant")):
        with pytest.raises(ValueError, match="weights got 'assistant'; expected one of policy, reference"):
            call()
