"""The road out: a workflow that ComfyUI can run, merged weights in shards, an export on the hub."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open

from palate import recipe
from palate.export import WEIGHTS, Lora, export_merged
from palate.export.card import metrics_of
from palate.export.hub import Parcel, add_pictures, parcel, push, state_of
from palate.export.workflow import workflow
from palate.models import families, lora
from palate.models.facts import HasFacts
from palate.models.weights import NamedWeights
from palate.recipe.paths import without_folders
from palate.runtime.errors import InputError

# ComfyUI's core nodes: the kinds of their outputs, and of their inputs that are links; the other inputs are values
NODES = {
    "CheckpointLoaderSimple": (["MODEL", "CLIP", "VAE"], {}, {"ckpt_name"}),
    "UNETLoader": (["MODEL"], {}, {"unet_name", "weight_dtype"}),
    "CLIPLoader": (["CLIP"], {}, {"clip_name", "type"}),
    "DualCLIPLoader": (["CLIP"], {}, {"clip_name1", "clip_name2", "type"}),
    "VAELoader": (["VAE"], {}, {"vae_name"}),
    "LoraLoaderModelOnly": (["MODEL"], {"model": "MODEL"}, {"lora_name", "strength_model"}),
    "ModelSamplingAuraFlow": (["MODEL"], {"model": "MODEL"}, {"shift"}),
    "CLIPTextEncode": (["CONDITIONING"], {"clip": "CLIP"}, {"text"}),
    "FluxGuidance": (["CONDITIONING"], {"conditioning": "CONDITIONING"}, {"guidance"}),
    "EmptyLatentImage": (["LATENT"], {}, {"width", "height", "batch_size"}),
    "EmptySD3LatentImage": (["LATENT"], {}, {"width", "height", "batch_size"}),
    "EmptyFlux2LatentImage": (["LATENT"], {}, {"width", "height", "batch_size"}),
    "KSampler": (
        ["LATENT"],
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {"seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"},
    ),
    "CFGGuider": (
        ["GUIDER"], {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}, {"cfg"}
    ),
    "RandomNoise": (["NOISE"], {}, {"noise_seed"}),
    "KSamplerSelect": (["SAMPLER"], {}, {"sampler_name"}),
    "Flux2Scheduler": (["SIGMAS"], {}, {"steps", "width", "height"}),
    "SamplerCustomAdvanced": (
        ["LATENT", "LATENT"],
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        set(),
    ),
    "VAEDecode": (["IMAGE"], {"samples": "LATENT", "vae": "VAE"}, set()),
    "SaveImage": ([], {"images": "IMAGE"}, {"filename_prefix"}),
}  # fmt: skip


def plan(model: str, *, told=None, **sample):
    tree = {
        "model": {"name": model, "folder": "owner/base", **({"image_size": [768, 1280]} if told is None else told)},
        "algorithm": {"name": "srpo", "positive": ["a"], "negative": ["b"]},
        "reward": {"name": "pickscore"}, "prompts": {"list": ["a cat"]}, "sample": sample,
    }  # fmt: skip
    return recipe.parse(json.dumps(tree))


KINDS = {name: families.find(name).load_class() for name in families.names()}
SHOWN = [name for name, kind in KINDS.items() if isinstance(kind, HasFacts) and kind.facts.comfyui]


@pytest.mark.parametrize("model", SHOWN)
def test_a_workflow_has_nodes_of_comfyui_s_core_whose_links_fit(model):
    assert {"flux", "sdxl"} <= set(SHOWN)
    graph = workflow(plan(model, guidance=2.5, steps=9), "mine.safetensors")
    assert graph == json.loads(json.dumps(graph))
    for node in graph.values():
        _, links, values = NODES[node["class_type"]]
        assert set(node["inputs"]) == {*links, *values}, node["class_type"]
        for name, kind in links.items():
            source, number = node["inputs"][name]
            assert NODES[graph[source]["class_type"]][0][number] == kind, (node["class_type"], name)
        assert not any(isinstance(node["inputs"][name], list) for name in values)
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("LoraLoaderModelOnly") == kinds.count("SaveImage") == 1
    sampled = next(node for node in graph.values() if node["class_type"] in ("KSampler", "CFGGuider"))
    behind, seen = sampled["inputs"]["model"], []
    while behind:  # the model that is sampled has the LoRA on it
        seen.append(graph[behind[0]])
        behind = seen[-1]["inputs"].get("model")
    assert [n["inputs"]["lora_name"] for n in seen if "lora_name" in n["inputs"]] == ["mine.safetensors"]
    latent = next(node["inputs"] for node in graph.values() if node["class_type"].endswith("LatentImage"))
    assert (latent["height"], latent["width"]) == (768, 1280)
    assert sampled["inputs"]["cfg"] == 2.5
    steps = [node["inputs"]["steps"] for node in graph.values() if "steps" in node["inputs"]]
    assert steps == [9]


def inputs_of(graph, kind):
    return [node["inputs"] for node in graph.values() if node["class_type"].endswith(kind)]


def test_a_workflow_draws_at_the_size_of_the_base_model(tmp_path):
    """Published sizes; of Stable Diffusion 2.1 the one that its folder's configuration tells."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"sample_size": 96}')
    sizes = {("stable-diffusion", "owner/base"): 512, ("stable-diffusion", str(tmp_path)): 768, ("sdxl", "a/b"): 1024}
    for (name, folder), size in sizes.items():
        (latent,) = inputs_of(workflow(plan(name, told={"folder": folder}), "x.safetensors"), "LatentImage")
        assert (latent["height"], latent["width"]) == (size, size)


def test_flux_is_told_the_guidance_that_the_run_s_pictures_were_drawn_with():
    for told, expected in (
        ({}, 3.5),
        ({"distilled_guidance": 2.0}, 2.0),
        ({"distilled_guidance": 1.0, "rollout_distilled_guidance": 4.5}, 4.5),
    ):
        graph = workflow(plan("flux", told=told), "x.safetensors")
        assert [node["guidance"] for node in inputs_of(graph, "FluxGuidance")] == [expected] * 2
        (sampled,) = inputs_of(graph, "KSampler")
        assert sampled["cfg"] == 1.0
        assert {graph[sampled[side][0]]["class_type"] for side in ("positive", "negative")} == {"FluxGuidance"}
    graph = workflow(plan("flux2", told={"distilled_guidance": 3.0}), "x.safetensors")
    assert [node["guidance"] for node in inputs_of(graph, "FluxGuidance")] == [3.0] * 2


def test_families_that_comfyui_does_not_load_have_none():
    assert workflow(plan("sana"), "x.safetensors") is None
    assert workflow(recipe.read("srpo-emoji"), "x.safetensors") is None


def test_merged_weights_in_shards_read_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    weights = NamedWeights(network, training="lora", rank=2, alpha=3.0, targets=["to_k", "to_v"])
    for p in weights.parameters():
        p.data = torch.randn(p.shape)
    (tmp_path / "recipe.yaml").write_text(recipe.dump(plan("stable-diffusion")))
    model = SimpleNamespace(weights=weights)
    folder = export_merged(tmp_path, model, tmp_path / "shards", max_shard_size="100KB") / "unet"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == set(shards)
    assert all((folder / name).stat().st_size < 150_000 for name in shards)
    whole = export_merged(tmp_path, model, tmp_path / "whole") / "unet"
    assert [path.name for path in whole.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    one, other = (UNet2DConditionModel.from_pretrained(path).state_dict() for path in (folder, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    assert not torch.equal(one[f"{layer}.weight"], network.get_submodule(layer).base_layer.weight)
    for wrong in ("10", "0GB", "big", "1TB "):
        with pytest.raises(ValueError, match="--max-shard-size: expected for example 10GB"):
            export_merged(tmp_path, model, tmp_path / "wrong", max_shard_size=wrong)


class Hub:
    """What the hub is asked, in order."""

    def __init__(self, error: Exception | None = None):
        self.asked, self.error, self.private = [], error, True

    def create_repo(self, repository, **options):
        if self.error:
            raise self.error
        self.asked.append(("create", repository, options["private"], options["exist_ok"]))
        return f"https://hub/{repository}"

    def upload_folder(self, **options):
        self.asked.append(("upload", options["repo_id"], options["folder_path"]))
        self.patterns = options["allow_patterns"], options["delete_patterns"]

    def repo_info(self, repository, **options):
        if isinstance(self.error, Exception):
            raise self.error
        return SimpleNamespace(private=self.private)


def exported(tmp_path):
    """A run with an evaluation, and an export of it."""
    run, folder = tmp_path / "run", tmp_path / "run" / "export" / "diffusers"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# LoRA\n")
    (folder / "weights.safetensors").write_bytes(b"12345")
    (run / "evaluation.json").write_text('{"metrics": {}}')
    for side in ("base", "result"):
        (run / "evaluation" / side).mkdir(parents=True)
        (run / "evaluation" / side / "index.jsonl").write_text("")
        for i in range(6):
            (run / "evaluation" / side / f"{i:04d}.png").write_bytes(f"{side} {i}".encode())
    return run, folder


def test_an_export_goes_to_the_hub_private_with_its_pictures_on_the_card(tmp_path):
    run, folder = exported(tmp_path)
    shown = add_pictures(run, folder)
    assert len(shown) == 8 and add_pictures(run, folder) == shown  # the second time changes nothing
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit") and card.count("## Pictures") == 1
    assert "| ![base](pictures/base-0003.png) | ![result](pictures/result-0003.png) |" in card
    assert (folder / "pictures" / "result-0002.png").read_bytes() == b"result 2"
    files = [folder / "README.md", folder / "weights.safetensors", *shown]
    sent = parcel(folder, "me/mine", files)
    assert sent.private and len(sent.files) == 10 and ("weights.safetensors", 5) in sent.files
    assert "me/mine, private: 10 files" in sent.text() and "weights.safetensors  5 bytes" in sent.text()
    hub = Hub()
    assert push(folder, sent, api=hub) == "https://hub/me/mine"
    assert hub.asked == [("create", "me/mine", True, True), ("upload", "me/mine", folder)]
    assert "PUBLIC" in parcel(folder, "me/mine", files, private=False).text()


def test_no_token_a_wrong_name_and_a_hub_that_refuses_are_sentences(tmp_path, monkeypatch):
    _, folder = exported(tmp_path)
    for wrong in ("mine", "a/b/c", "me/my lora", ""):
        with pytest.raises(InputError, match="--push-to-hub: "):
            parcel(folder, wrong, [])
    sent = parcel(folder, "me/mine", [])
    monkeypatch.setattr("palate.export.hub.get_token", lambda: None)
    with pytest.raises(InputError, match=r"no token of the hub; run `hf auth login`.*--dry-run"):
        push(folder, sent)
    for error in (OSError, *HfHubHTTPError.__bases__):  # of the disk, and of the library that the hub is asked through
        with pytest.raises(InputError, match=r"--push-to-hub me/mine: the hub refused \(no route\)"):
            push(folder, sent, api=Hub(error("no route")))


def test_a_dry_run_without_a_token_says_what_would_be_sent(tmp_path, monkeypatch, capsys):
    from palate.cli import export as export_command

    run, folder = exported(tmp_path)
    monkeypatch.setattr(export_command, "get_token", lambda: None)
    monkeypatch.setattr(export_command, "_write", lambda *args: (folder, [folder / "weights.safetensors"]))
    monkeypatch.setattr(export_command, "state_of", lambda repository: "")
    monkeypatch.setattr(export_command, "push", lambda *args: pytest.fail("a dry run sends nothing"))
    export_command.export_run(run, "diffusers", None, hub=export_command.Hub("me/mine", dry=True))
    said = capsys.readouterr().out
    assert "would send to me/mine, private" in said and "pictures/base-0000.png" in said
    with pytest.raises(InputError, match="no token of the hub on this machine"):
        export_command.export_run(run, "diffusers", None, hub=export_command.Hub("me/mine"))


def trained_run(run, told=None):
    """A finished run with a LoRA of one layer."""
    layers = {"mid_block.attentions.0.to_q": Lora(torch.ones(2, 4), torch.ones(4, 2), 3.0)}
    record = json.dumps(lora.peft_config(layers))
    lora.write(run / "adapter" / WEIGHTS, lora.to_peft(layers), {"format": "pt", lora.METADATA: record})
    (run / "recipe.yaml").write_text(recipe.dump(plan("sdxl", told=told)))
    return run


def test_only_what_the_export_wrote_is_sent(tmp_path, monkeypatch, capsys):
    """--out may be the folder in which another program keeps all its LoRAs."""
    from palate.cli import export as export_command

    run, out = trained_run(tmp_path / "run"), tmp_path / "loras [all]"
    (out / "pictures").mkdir(parents=True)
    for other in ("theirs.safetensors", "pictures/mine.png", "workflow.json"):
        (out / other).write_bytes(b"theirs")
    hub = Hub()
    monkeypatch.setattr(export_command, "get_token", lambda: "token")
    monkeypatch.setattr(export_command, "state_of", lambda repository: "PUBLIC")
    monkeypatch.setattr(export_command, "push", lambda folder, sent: push(folder, sent, api=hub))
    export_command.export_run(run, "kohya", out, hub=export_command.Hub("me/mine"))
    own = ["README.md", "recipe.yaml", "run.safetensors"]
    there = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(there, allow_patterns=hub.patterns[0])) == own and len(there) == 6
    assert list(filter_repo_objects(["pictures/mine.png", "pictures/base-0.png"], allow_patterns=hub.patterns[1])) == [
        "pictures/base-0.png"
    ]
    said = capsys.readouterr().out
    assert "theirs" not in said and "sending to me/mine, PUBLIC already: 3 files" in said
    export_command.export_run(run, "kohya", out)  # again, over its own files
    with pytest.raises(InputError, match=r"--out: .*all\] holds a README.md that would be written over; name a folder"):
        (out / "README.md").write_text("# All my LoRAs")
        export_command.export_run(run, "kohya", out)
    (out / "README.md").unlink()
    (out / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"holds a workflow.json that would be written over"):
        export_command.export_run(run, "comfyui", out)
    assert not (out / "README.md").exists() and (out / "workflow.json").read_bytes() == b"theirs"


def test_the_hub_says_who_sees_a_repository_that_is_there():
    hub = Hub()
    assert state_of("me/mine", api=hub) == "private"
    hub.private = False
    assert state_of("me/mine", api=hub) == "PUBLIC"
    missing = RepositoryNotFoundError("no", response=SimpleNamespace(headers={}, request=None))
    assert state_of("me/mine", api=Hub(missing)) == ""
    unknown = state_of("me/mine", api=Hub(OSError("no route")))
    text = Parcel("me/mine", True, [], unknown).text()
    assert text == "me/mine, private if it is new (the hub could not be asked): 0 files, 0 bytes"


def test_what_is_shared_names_no_folder_of_this_disk(tmp_path, monkeypatch, capsys):
    from palate.cli import export as export_command

    home = tmp_path / "home" / "jane"
    own = {"folder": str(home / "models/base"), "start": f"{home}/runs/warm", "text_cache": "~/cache/text"}
    run, out = trained_run(home / "run", own), tmp_path / "out"
    monkeypatch.setattr(export_command, "state_of", lambda repository: "")
    export_command.export_run(run, "diffusers", out)
    kept = (out / "recipe.yaml").read_text()
    export_command.export_run(run, "diffusers", out, hub=export_command.Hub("me/mine", dry=True))
    assert (out / "recipe.yaml").read_text() == kept  # it is for others, sent or not; the whole one is the run's
    for path in out.iterdir():
        assert b"jane" not in path.read_bytes() and b"cache/text" not in path.read_bytes(), path
    with safe_open(out / WEIGHTS, "pt") as file:
        assert file.metadata()["palate.base_model"] == "base"
    assert "  folder: base\n" in (out / "README.md").read_text()


def test_paths_in_a_recipe_for_others_are_names_and_texts_stay():
    tree = {
        "prompts": {"list": ["/imagine a cat", "~ a dog"], "file": "/home/jane/prompts.txt"},
        "algorithm": {"positive": ["/r/art"], "teachers": {"a": {"adapter": "/home/jane/runs/a"}}},
        "reward": {
            "weights": {"/home/jane/my.py:Mine": 1.0},
            "source": {"remote": "https://judge.lab:8/b?api_key=SECRET", "x": "https://huggingface.co/a/b"},
        },
        "optimize": {
            "oracle": {
                "command": ["/usr/bin/python", "/home/jane/s.py", "--key=SECRET"],
                "checklist": "/home/jane/q a.json http://me:SECRET@judge.lab/v1#qwen",
                "url": "file:///home/jane/x",
            }
        },
    }
    assert without_folders(tree) == {
        "prompts": {"list": ["/imagine a cat", "~ a dog"], "file": "prompts.txt"},
        "algorithm": {"positive": ["/r/art"], "teachers": {"a": {"adapter": "a"}}},
        "reward": {
            "weights": {"my.py:Mine": 1.0},
            "source": {"remote": "https://HOST/b", "x": "https://huggingface.co/a/b"},
        },
        "optimize": {"oracle": {"command": ["python", "..."], "checklist": "q a.json http://HOST/v1#qwen", "url": "x"}},
    }


def test_numbers_of_an_outdated_evaluation_stand_on_no_card(tmp_path):
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    found = {"metrics": {"reward/x": {"base": 1.0, "value": 2.0}}, "checkpoint": "checkpoints/step-000010"}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    assert metrics_of(tmp_path) == {"reward/x": (1.0, 2.0)}  # before, after
    (tmp_path / "checkpoints" / "step-000020").mkdir()
    assert metrics_of(tmp_path) == {}


def test_pictures_of_an_outdated_evaluation_are_not_shown(tmp_path, monkeypatch, capsys):
    from palate.cli import export as export_command

    run, _ = exported(tmp_path)
    trained_run(run)
    out = run / "export" / "diffusers"
    shutil.rmtree(out)
    monkeypatch.setattr(export_command, "state_of", lambda repository: "")

    def shown():
        export_command.export_run(run, "diffusers", None, hub=export_command.Hub("me/mine", dry=True))
        assert ("## Pictures" in (out / "README.md").read_text()) == ("pictures/" in capsys.readouterr().out)
        return len(list(out.glob("pictures/*.png")))

    assert shown() == 8
    export_command.export_run(run, "diffusers", None)  # a card without pictures
    assert "## Pictures" not in (out / "README.md").read_text() and not list(out.glob("pictures/*.png"))
    assert shown() == 8
    (run / "evaluation/result/index.jsonl").unlink()  # a later evaluation broke off
    assert shown() == 0
    (run / "evaluation/result/index.jsonl").write_text("")
    assert shown() == 8
    (run / "evaluation.json").unlink()
    assert shown() == 0
