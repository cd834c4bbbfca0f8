"""What people give a family by mistake: the same sentence from every family, before anything large loads."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import FromOriginalModelMixin
from huggingface_hub import errors
from safetensors.torch import save_file
from support.tiny_families import FAMILIES, load, saved

from palate.models import source
from palate.models.repository import Repository

NAMES = [n for n in FAMILIES if not n.endswith(("-v", "-schnell", "-sigma", "-base", "-dev", "-turbo"))]
DENOISERS = ("unet", "transformer")


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(self, part, *_, **__):
        raise AssertionError(f"{part} was read before the mistake was found")

    monkeypatch.setattr(Repository, "read", refuse)


def copied(name, tmp_path):
    return shutil.copytree(saved(name)[0], tmp_path / name)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(name, message, folder=None, **options):
    with pytest.raises(ValueError, match=message) as error:
        load(name, folder, **options)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_something_else_are_refused(name, tmp_path, nothing_loads, monkeypatch):
    """Stored quantised, inpainting and editing, another family's, gated."""
    folder = copied(name, tmp_path)
    part = next(part for part in DENOISERS if (folder / part).is_dir())
    for which in (part, "text_encoder"):
        before = (folder / which / "config.json").read_text()
        edit(folder / which / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        refused(name, rf"its {which} is stored quantised .bitsandbytes.*give the unquantised .* model.quantize", folder)
        (folder / which / "config.json").write_text(before)
    before = (folder / part / "config.json").read_text()
    channels = json.loads(before).get("in_channels", 16)
    edit(folder / part / "config.json", in_channels=2 * channels + 1)
    refused(name, rf"its {part} takes {2 * channels + 1} channels .inpainting, control or editing", folder)
    (folder / part / "config.json").write_text(before)
    index = (folder / "model_index.json").read_text()
    edit(folder / "model_index.json", _class_name="SomeInpaintPipeline")
    refused(name, "SomeInpaintPipeline, which changes given images", folder)
    (folder / "model_index.json").write_text(index)
    other = "pixart-alpha" if part == "unet" else "stable-diffusion"
    refused(name, r"(holds|its unet is|its transformer is) .*set model.name to", saved(other)[0])

    def gated(*_, **__):
        raise errors.GatedRepoError("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(source, "snapshot_download", gated)
    refused(name, "is gated: accept its licence at .*owner/base, then log in with .hf auth login", "owner/base")


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_files_that_do_not_fit_are_refused(name, tmp_path, nothing_loads):
    for size in (17, [32, 17]):
        refused(name, "image_size got 17; .* needs a multiple of", image_size=size)
    for wrong, message in (
        ("nowhere.safetensors", "does not exist"),
        ("model.ckpt", "expected a .safetensors file"),
        ("model.gguf", "expected a .safetensors file"),
        ("cut.safetensors", "is damaged or incomplete"),
    ):
        if not wrong.startswith("nowhere"):
            (tmp_path / wrong).write_bytes(b"\x10\x00")
        refused(name, message, file=str(tmp_path / wrong))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_has_fp16_weights_only_is_read(name, tmp_path):
    """As many are published; they are stored in the precision of the recipe."""
    folder = copied(name, tmp_path)
    part = next(part for part in DENOISERS if (folder / part).is_dir())
    file = folder / part / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    plain, model = load(name, training="none"), load(name, folder, training="none")
    ours, theirs = model.weights.network.state_dict(), plain.weights.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


PRECISIONS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_is_read_in_every_precision_that_people_publish(name, tmp_path):
    """Its numbers are those of the file, whatever they are stored in."""
    base = load(name, training="none")
    if not issubclass(base.facts.network, FromOriginalModelMixin):
        return  # diffusers reads no single file of it, which is said: the test after the next
    state = base.weights.network.state_dict()
    for dtype in PRECISIONS:
        stored = {key: (value + 0.25).to(dtype) for key, value in state.items()}
        save_file(stored, tmp_path / "file.safetensors")
        model = load(name, file=str(tmp_path / "file.safetensors"), training="none")
        found = model.weights.network.state_dict()
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[key], stored[key].to(found[key].dtype)) for key in stored), dtype


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_that_is_quantised_is_a_sentence(name, tmp_path, nothing_loads):
    """Its numbers stand for others, by tensors that diffusers would pass over in silence."""
    for end in ("weight_scale", "scale_weight", "comfy_quant", "weight.absmax", "weight.quant_state.bitsandbytes__nf4",
                "qweight", "SCB"):  # fmt: skip
        save_file({"blocks.0.to_q.weight": torch.zeros(4, 4), f"blocks.0.to_q.{end}": torch.zeros(1)},
                  tmp_path / "file.safetensors")  # fmt: skip
        refused(name, rf"stored quantised .it holds blocks.0.to_q.{end}.*bfloat16 or plain fp8, and set model.quantize",
                file=str(tmp_path / "file.safetensors"))  # fmt: skip
    save_file({"a.weight": torch.zeros(4, 4), "scaled_fp8": torch.zeros(2)}, tmp_path / "file.safetensors")
    refused(name, "stored quantised .it holds scaled_fp8", file=str(tmp_path / "file.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_file_of_another_model_is_a_sentence(name, tmp_path):
    """Where diffusers reads single files of the family at all; else that is the sentence."""
    save_file({"some.layer.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    refused(
        name,
        r"(reads no single file of .*give its folder|cannot be read as .*is it another model's|holds no weights for)",
        file=str(tmp_path / "other.safetensors"),
        training="none",
    )
