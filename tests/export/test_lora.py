"""Exported LoRAs change the network exactly as the trained one did, read by diffusers and by small readers."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from palate import recipe
from palate.export import (
    FORMATS,
    WEIGHTS,
    Lora,
    export_lora,
    export_merged,
    lora_file,
    read_adapter,
    to_comfyui,
    to_diffusers,
    to_kohya,
)
from palate.models.facts import facts_of
from palate.models.original import fuse
from palate.models.weights import NamedWeights
from palate.runtime.errors import InputError

RANK, ALPHA = 3, 7.0  # alpha != rank on purpose


def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    ).eval()


DOUBLE = (
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
)
FAMILIES = {
    "stable-diffusion": (
        unet,
        ("to_q", "to_k", "to_v", "to_out.0"),
        lambda net: StableDiffusionPipeline(
            None,
            None,
            None,
            net,
            DDIMScheduler(steps_offset=1, clip_sample=False),
            None,
            None,
            requires_safety_checker=False,
        ),
    ),
    "flux": (
        flux,
        ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *DOUBLE),
        lambda net: FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, net),
    ),
    "sd3": (
        sd3,
        ("to_q", "to_k", "to_v", "to_out.0"),
        lambda net: StableDiffusion3Pipeline(
            net, FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None
        ),
    ),
}
RECIPE = """
run: {{folder: {folder}}}
model: {{name: {name}, folder: owner/base, lora_rank: 3, lora_alpha: 7.0, weights: {weights}}}
algorithm: {{name: srpo, preference: absolute}}
reward: {{name: warmth}}
prompts: {{list: [a dog]}}
"""


def output(network):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        if isinstance(network, UNet2DConditionModel):
            return network(draw(2, 4, 8, 8), torch.tensor([10.0, 500.0]), draw(2, 5, 16)).sample
        if isinstance(network, SD3Transformer2DModel):
            return network(draw(2, 4, 8, 8), draw(2, 5, 32), draw(2, 32), torch.tensor([10.0, 500.0])).sample
        return network(
            hidden_states=draw(2, 6, 16),
            timestep=torch.tensor([0.1, 0.5]),
            encoder_hidden_states=draw(2, 5, 32),
            pooled_projections=draw(2, 16),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample


def trained(name, folder, targets=None):
    """A run folder of that family with a random adapter, and the network that carries it."""
    make, own, _ = FAMILIES[name]
    network = make()
    network.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets or own)), adapter_name="policy"
    )
    generator = torch.Generator().manual_seed(2)
    for key, p in network.named_parameters():
        if "lora_" in key:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    network.save_lora_adapter(folder / "adapter", adapter_name="policy")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, name=name, weights="lora"))
    return network


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, output(trained(request.param, folder))


@pytest.mark.parametrize("form", FORMATS)
def test_diffusers_loads_it_back_to_the_same_outputs(run, form, tmp_path):
    name, folder, expected = run
    if (name, form) == ("sd3", "kohya"):
        with pytest.raises(ValueError, match="no such form of sd3; use comfyui or diffusers"):
            export_lora(folder, form, tmp_path)
        return
    export_lora(folder, form, tmp_path)
    if name != "stable-diffusion" and form != "diffusers":
        return  # diffusers' readers of these expect the published widths; the readers below take any
    make, _, pipeline = FAMILIES[name]
    network = make()
    before = output(network)
    pipe = pipeline(network)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(network), expected, atol=2e-5, rtol=1e-4)
    assert float((expected - before).abs().max()) > 0.05  # there was something to lose


def kohya_changes(tensors, prefix="lora_unet_"):
    """A reader of kohya's form: name -> weight change. Takes every key, or says which it left."""
    left, changes = dict(tensors), {}
    for key in [k for k in tensors if k.endswith(".lora_down.weight")]:
        stem = key.removesuffix(".lora_down.weight")
        down, up = left.pop(key), left.pop(f"{stem}.lora_up.weight")
        alpha = float(left.pop(f"{stem}.alpha")) if f"{stem}.alpha" in left else down.shape[0]
        changes[stem.removeprefix(prefix)] = alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1))
    assert not left, f"keys that no reader knows: {sorted(left)}"
    return changes


def exact(lora):
    return lora.alpha / lora.rank * (lora.up.flatten(1) @ lora.down.flatten(1))


def test_kohya_of_a_unet_is_read_by_a_small_reader_with_its_alpha(tmp_path):
    trained("stable-diffusion", tmp_path, targets=("to_q", "conv1", "proj_in", "ff.net.2"))
    layers = read_adapter(tmp_path / "adapter")
    for form in ("kohya", "comfyui"):
        tensors = load_file(export_lora(tmp_path, form) / lora_file(tmp_path, form))
        changes = kohya_changes(tensors)
        assert changes.keys() == {name.replace(".", "_") for name in layers}
        for name, lora in layers.items():
            torch.testing.assert_close(changes[name.replace(".", "_")], exact(lora))
    assert {float(tensors[k]) for k in tensors if k.endswith(".alpha")} == {ALPHA}


def test_comfyui_of_a_transformer_is_read_by_a_small_reader_with_its_alpha(tmp_path):
    trained("flux", tmp_path)
    layers = read_adapter(tmp_path / "adapter")
    left = load_file(export_lora(tmp_path, "comfyui") / lora_file(tmp_path, "comfyui"))
    for name, lora in layers.items():
        down, up, alpha = (
            left.pop(f"transformer.{name}.{kind}") for kind in ("lora_A.weight", "lora_B.weight", "alpha")
        )
        torch.testing.assert_close(float(alpha) / down.shape[0] * up @ down, exact(lora))
    assert not left


def flux_expected(layers, original, parts, rows):
    """Changes of the fused layer: the parts' own changes stacked, zero where a part has no LoRA."""
    width = next(exact(layers[p]).shape[1] for p in parts if p in layers)
    return torch.cat(
        [exact(layers[p]) if p in layers else torch.zeros(r, width) for p, r in zip(parts, rows, strict=False)]
    )


@pytest.mark.parametrize(
    "targets",
    [
        None,
        ("attn.to_q", "attn.to_v"),
        ("attn.to_k", "proj_mlp", "0.proj_out", "1.proj_out", "norm.linear", "norm1.linear"),
    ],
)
def test_kohya_of_flux_stacks_q_k_v_in_the_original_layers(tmp_path, targets):
    trained("flux", tmp_path, targets)
    layers = read_adapter(tmp_path / "adapter")
    changes = kohya_changes(load_file(export_lora(tmp_path, "kohya") / lora_file(tmp_path, "kohya")))
    expected = {}
    for i in range(2):
        double, single = f"transformer_blocks.{i}.", f"single_transformer_blocks.{i}."
        groups = {
            f"double_blocks_{i}_img_attn_qkv": ([double + "attn.to_" + x for x in "qkv"], [16] * 3),
            f"double_blocks_{i}_txt_attn_qkv": ([double + f"attn.add_{x}_proj" for x in "qkv"], [16] * 3),
            f"double_blocks_{i}_img_attn_proj": ([double + "attn.to_out.0"], [16]),
            f"double_blocks_{i}_img_mlp_0": ([double + "ff.net.0.proj"], [64]),
            f"double_blocks_{i}_txt_attn_proj": ([double + "attn.to_add_out"], [16]),
            f"double_blocks_{i}_img_mlp_2": ([double + "ff.net.2"], [16]),
            f"double_blocks_{i}_txt_mlp_0": ([double + "ff_context.net.0.proj"], [64]),
            f"double_blocks_{i}_img_mod_lin": ([double + "norm1.linear"], [96]),
            f"single_blocks_{i}_linear1": (
                [*(single + "attn.to_" + x for x in "qkv"), single + "proj_mlp"],
                [16, 16, 16, 64],
            ),
            f"single_blocks_{i}_linear2": ([single + "proj_out"], [16]),
            f"single_blocks_{i}_modulation_lin": ([single + "norm.linear"], [48]),
        }
        expected |= {
            name: flux_expected(layers, name, *group)
            for name, group in groups.items()
            if any(p in layers for p in group[0])
        }
    assert changes.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(changes[name], expected[name])


def test_parts_of_different_alpha_and_rank_are_fused_exactly():
    draw = torch.Generator().manual_seed(0)
    layers = {
        f"transformer_blocks.0.attn.to_{x}": Lora(
            torch.randn(r, 6, generator=draw), torch.randn(4, r, generator=draw), a
        )
        for x, r, a in (("q", 2, 1.0), ("k", 3, 5.0), ("v", 1, 2.0))
    }
    ((name, fused),) = fuse(layers, facts_of("flux").original).items()
    assert name == "double_blocks_0_img_attn_qkv" and fused.rank == 6
    torch.testing.assert_close(exact(fused), torch.cat([exact(lora) for lora in layers.values()]))
    tensors, metadata = to_diffusers(layers, "transformer")
    config = json.loads(metadata["lora_adapter_metadata"])
    assert config["transformer.alpha_pattern"] == {
        "transformer_blocks.0.attn.to_k": 5.0,
        "transformer_blocks.0.attn.to_v": 2.0,
    }
    assert len(tensors) == 6 and len(to_comfyui(layers)) == 9
    with pytest.raises(ValueError, match="x_embedder has no name in the original program"):
        to_kohya({"x_embedder": layers["transformer_blocks.0.attn.to_q"]}, facts_of("flux"))


def test_the_file_says_what_it_is_and_the_card_how_it_was_made(run, tmp_path):
    name, folder, _ = run
    (folder / "evaluation.json").write_text(
        json.dumps({"metrics": {"reward/warmth": {"base": 0.25, "value": 0.5}, "empty": {"base": None}}})
    )
    export_lora(folder, "diffusers", tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    plan = recipe.read(str(folder / "recipe.yaml"))
    assert metadata["palate.base_model"] == "owner/base" and metadata["palate.family"] == name
    assert metadata["palate.recipe"] == recipe.fingerprint(plan) and metadata["palate.version"]
    assert (metadata["palate.rank"], metadata["palate.alpha"], metadata["ss_network_alpha"]) == ("3", "7", "7")
    card = (tmp_path / "README.md").read_text()
    assert "| reward/warmth | 0.250 | 0.500 |" in card and "licence" in card and "lora_alpha: 7.0" in card
    assert (tmp_path / "recipe.yaml").read_text() == recipe.reader.to_share(plan)
    (folder / "evaluation.json").unlink()


BASES = {  # family, width of the text that its network reads -> the base as the WebUI's Lora page tells it
    ("stable-diffusion", 768): "SD1",
    ("stable-diffusion", 1024): "SD2",
    ("sdxl", 2048): "SDXL",
}


@pytest.mark.parametrize("base", BASES)
def test_the_webui_shows_a_lora_beside_the_models_that_it_is_for(base, tmp_path):
    """Its page hides what its metadata say is of another base: SDXL and 2.x by kohya's keys, all others are of 1.x."""
    family, width = base
    text = f"model: {{name: {family}, folder: a/b}}\nalgorithm: {{name: ddpo}}\nreward: {{name: emoji}}\n"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.yaml").write_text(f"{text}prompts: {{list: [a fox]}}\n")
    stem = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file(
        {f"{stem}.lora_A.weight": torch.zeros(RANK, width), f"{stem}.lora_B.weight": torch.zeros(640, RANK)},
        tmp_path / "adapter" / WEIGHTS,
        metadata={"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": ALPHA})},
    )
    written = export_lora(tmp_path, "kohya")
    with safe_open(written / lora_file(tmp_path, "kohya"), "pt") as file:
        metadata = file.metadata()
    xl, two = metadata["ss_base_model_version"].startswith("sdxl_"), metadata.get("ss_v2") == "True"
    assert ("SDXL" if xl else "SD2" if two else "SD1") == BASES[base]
    assert metadata["modelspec.architecture"].endswith("/lora")


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_the_card_of_another_run_is_not_written_over(form, tmp_path):
    """In diffusers' form its weights would go with it; in the others they would stay, without a card. A run's own
    export is made again, and what palate did not write is let be."""
    for name in ("one", "two"):
        trained("stable-diffusion", tmp_path / name)
    out = tmp_path / "out"
    for _ in range(2):
        export_lora(tmp_path / "one", form, out)
    save_file({"x": torch.zeros(1)}, out / "theirs.safetensors", metadata={"ss_output_name": "theirs"})
    (out / "cut.safetensors").write_bytes(b"no weights")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(InputError, match=r"--out: .*out holds .* of the run one, whose README.md and recipe.yaml"):
        export_lora(tmp_path / "two", form, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    export_lora(tmp_path / "one", form, out)


def test_what_cannot_be_exported_says_why(run, tmp_path):
    name, folder, _ = run
    with pytest.raises(ValueError, match="--format: got 'onnx'; expected one of diffusers"):
        export_lora(folder, "onnx")
    with pytest.raises(ValueError, match="not a run"):
        export_lora(tmp_path, "diffusers")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "adapter" / WEIGHTS
    whole, good = load_file(weights), weights.read_bytes()
    metadata = {"lora_adapter_metadata": json.dumps({"r": 3, "lora_alpha": 7.0})}
    first = next(k for k in whole if "lora_B" in k)
    for tensors, said, words in (
        ({k: v for k, v in whole.items() if k != first}, metadata, "has no lora_B"),
        (whole | {"stray": torch.zeros(1)}, metadata, "1 of .* tensors belong to no LoRA"),
        (whole, None, "not a LoRA that a run wrote"),
        (whole, {"lora_adapter_metadata": '{"lora_alpha": 1, "use_rslora": true}'}, "rank-stabilised"),
    ):
        save_file(tensors, weights, metadata=said)
        with pytest.raises(ValueError, match=words):
            export_lora(copy, "kohya")
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="not a LoRA that a run wrote"):
        export_lora(copy, "kohya")
    weights.unlink()
    with pytest.raises(ValueError, match="finish the run first"):
        export_lora(copy, "kohya")
    (copy / "recipe.yaml").write_text(RECIPE.format(folder=copy, name=name, weights="full"))
    with pytest.raises(ValueError, match="trained the full model"):
        export_lora(copy, "diffusers")


def test_merged_weights_need_no_lora(tmp_path):
    make, targets, _ = FAMILIES["stable-diffusion"]
    weights = NamedWeights(make(), training="lora", rank=RANK, alpha=ALPHA, targets=targets)
    generator = torch.Generator().manual_seed(2)
    for p in weights.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, name="stable-diffusion", weights="lora"))
    folder = export_merged(tmp_path, SimpleNamespace(weights=weights))
    plain = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(output(plain), output(weights.network), atol=2e-5, rtol=1e-4)
    assert "Merged LoRA of owner/base" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"--out: .* is not empty; give a new folder"):
        export_merged(tmp_path, SimpleNamespace(weights=weights), folder)
    for other in ("merged/unet/old.safetensors", "diffusers/mine"):
        (tmp_path / "export" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "export" / other).touch()
    assert export_merged(tmp_path, SimpleNamespace(weights=weights)) == folder  # its own place is made anew
    assert not (folder / "unet/old.safetensors").exists() and (tmp_path / "export/diffusers/mine").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["diffusers", "merged"]


def test_the_card_of_a_merged_network_says_what_was_trained(tmp_path):
    make, targets, _ = FAMILIES["stable-diffusion"]
    text = RECIPE.format(folder=tmp_path, name="stable-diffusion", weights="lora").replace("lora_alpha: 7.0, ", "")
    (tmp_path / "recipe.yaml").write_text(text)  # as with model.start, whose file says the alpha
    weights = NamedWeights(make(), training="lora", rank=RANK, alpha=ALPHA, targets=targets[:1])
    card = (export_merged(tmp_path, SimpleNamespace(weights=weights)) / "README.md").read_text()
    assert "Merged LoRA of owner/base" in card and "Format merged, rank 3, alpha 7." in card
    assert "- palate\n- text-to-image\n" in card  # no file of a LoRA
    (tmp_path / "recipe.yaml").write_text(text.replace("weights: lora", "weights: full"))
    weights = NamedWeights(make(), training="full", rank=RANK, alpha=None, targets=())
    card = (export_merged(tmp_path, SimpleNamespace(weights=weights)) / "README.md").read_text()
    assert "# Fully trained network of owner/base, trained with srpo" in card
    assert "Format merged, every weight trained." in card and "- lora\n" not in card and "LoRA" not in card
