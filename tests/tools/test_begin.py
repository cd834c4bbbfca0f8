"""A base that begins with a smaller one draws as it did; an autoencoder that begins with another encodes alike."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
base, autoencoder = pytest.importorskip("train_base"), pytest.importorskip("train_autoencoder")
words = pytest.importorskip("words")
EMOJI = Path(str(files("palate"))) / "assets/emoji"


def test_a_base_begins_with_what_the_smaller_one_says():
    """More channels, more transformer blocks, another order of words: the old channels' velocity is the same."""
    old = UNet2DConditionModel.from_pretrained(EMOJI / "unet", torch_dtype=torch.float32)
    channels = old.config.in_channels
    tokenizer = words.build_tokenizer()
    networks = torch.nn.ModuleDict(
        {"unet": base.build_unet(channels + 4), "text_encoder": base.build_text_encoder(len(tokenizer))}
    )
    base.begin_with(networks, tokenizer, EMOJI)
    text = CLIPTextModel.from_pretrained(EMOJI / "text_encoder", dtype=torch.float32)
    ids = words.tokenize(tokenizer, ["a 3d dog on a blue background", ""])
    x = torch.randn(2, channels + 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([700.0, 200.0])
    with torch.no_grad():
        cond = networks["text_encoder"].eval()(ids).last_hidden_state
        length = text.config.max_position_embeddings
        assert torch.allclose(cond[:, :length], text.eval()(ids[:, :length]).last_hidden_state, atol=1e-5)
        mine = networks["unet"].eval()(x, t, cond).sample[:, :channels]
        theirs = old.eval()(x[:, :channels], t, cond).sample
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_every_attention_is_taught_where_a_cell_is():
    """Untaught maps say the middle, whose error is the grid's own mean square; taught ones reach into the network."""
    unet = base.build_unet(10)
    names = set(unet.state_dict())
    places = base.Places(unet)
    assert len(places.maps) == sum(hasattr(block, "proj_in") for block in unet.modules()) > 2
    x, t, cond = torch.randn(2, 10, 16, 16), torch.tensor([900.0, 500.0]), torch.randn(2, 20, 128)
    unet(x, t, cond)
    grid = torch.linspace(-1, 1, 8).square().mean()
    assert float(places.loss()) == pytest.approx(float(grid), rel=1e-5)
    for told in places.maps:
        torch.nn.init.normal_(told.weight, std=0.1)
    places.loss().backward()
    assert float(unet.conv_in.weight.grad.abs().sum()) > 0 and unet.conv_out.weight.grad is None
    assert set(unet.state_dict()) == names  # nothing of it is saved with the model


def test_an_autoencoder_begins_with_the_anchors_channels():
    anchor = AutoencoderTiny.from_pretrained(EMOJI / "vae", torch_dtype=torch.float32)
    old = anchor.config.latent_channels
    wider = autoencoder.build(old + 4, 48, anchor.config.encoder_block_out_channels[0])
    autoencoder.begin_with(wider, anchor)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(wider.encode(images).latents[:, :old], anchor.encode(images).latents, atol=1e-5)


def test_the_terms_of_the_reconstruction_are_zero_only_for_the_image_itself():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert all(float(value) == 0 for value in autoencoder.losses(images, images).values())
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert all(float(value) > 0.01 for value in autoencoder.losses(blurred, images).values())
    line = torch.zeros(1, 3, 5, 5)
    line[..., 2, 2] = 1
    assert autoencoder.laplacian(line)[0, 0].tolist() == [[0, 1, 0], [1, -4, 1], [0, 1, 0]]


def test_the_energy_of_detail_is_paid_where_it_is_not_its_place_to_the_pixel():
    """A checkerboard moved by one pixel has all its detail; a grey one has none."""
    polish = pytest.importorskip("polish_decoder")
    board = (torch.arange(24)[:, None] + torch.arange(24)).remainder(2).float().expand(1, 3, 24, 24)
    assert float(polish.energy(board.roll(1, -1), board)) < 1e-4
    assert float(polish.energy(torch.full_like(board, 0.5), board)) > 1
