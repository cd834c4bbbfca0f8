"""A run in a notebook: a line with a bar that changes in place, the newest previews under it, no chatter."""

from __future__ import annotations

import base64
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as of_diffusers
from support.loop import run
from transformers.utils import logging as of_transformers

from palate.models.quiet import quietly
from palate.runtime import notebook
from palate.runtime.progress import Progress


class Kernel:
    """IPython as a kernel has it; what stands in the cell now, from the top."""

    def __init__(self, monkeypatch, in_kernel=True):
        self.shown = []
        shell = SimpleNamespace(trait_names=lambda: ["kernel"] if in_kernel else [], kernel=object())
        module, display = ModuleType("IPython"), ModuleType("IPython.display")
        module.get_ipython, display.display = lambda: shell, self.display
        monkeypatch.setitem(sys.modules, "IPython", module)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def display(self, data, *, raw, display_id):
        assert raw and display_id
        place = len(self.shown)
        self.shown.append(data)
        return SimpleNamespace(update=lambda new, *, raw: self.shown.__setitem__(place, new))


def test_a_cell_shows_a_bar_and_the_newest_previews(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(notebook, "SECONDS", 0.0)
    kernel = Kernel(monkeypatch)
    run(tmp_path, steps=3, preview_every=1, progress=True)
    line, pictures = kernel.shown  # nothing else: changed in place
    assert line["text/plain"].startswith("100 %") and "step 3/3" in line["text/plain"]
    assert '<progress value="3" max="3">' in line["text/html"]
    assert base64.b64decode(pictures["image/png"]).startswith(b"\x89PNG") and pictures["text/plain"].endswith("step 3")
    assert "step 1/3" not in capsys.readouterr().out


def test_outside_a_kernel_nothing_is_displayed(monkeypatch):
    kernel = Kernel(monkeypatch, in_kernel=False)  # IPython in a terminal
    with Progress(2) as progress:
        progress.show(1, {})
        progress.picture(b"", "")
    assert not kernel.shown and notebook.cell() is None


def test_prompts_in_a_line_are_text(monkeypatch):
    kernel = Kernel(monkeypatch)
    notebook.cell().say("<img src=x>", 1, 1)
    assert "<img" not in kernel.shown[0]["text/html"] and kernel.shown[0]["text/plain"] == "<img src=x>"


def test_libraries_are_quiet_for_folders_alone_and_as_before_afterwards(tmp_path):
    logs = (of_diffusers, of_transformers)
    before = [each.is_progress_bar_enabled() for each in logs]
    for each in logs:
        each.enable_progress_bar()
    try:
        with pytest.raises(ValueError), quietly(tmp_path):
            assert not any(each.is_progress_bar_enabled() for each in logs)
            raise ValueError
        with quietly("owner/name"):  # a download takes minutes
            assert all(each.is_progress_bar_enabled() for each in logs)
        assert all(each.is_progress_bar_enabled() for each in logs)
    finally:
        for each, was in zip(logs, before, strict=True):
            each.enable_progress_bar() if was else each.disable_progress_bar()


def test_a_warning_without_content_is_left_out(caplog):
    network = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None, layers_per_block=1,
    )  # fmt: skip
    of_diffusers.enable_propagation()
    with caplog.at_level(logging.WARNING):
        network.to(torch.float32)
        network._keep_in_fp32_modules = ["time_embedding"]
        network.to(torch.float32)
    told = {record.getMessage() for record in caplog.records if "kept in float32" in record.getMessage()}
    assert len(told) == 1 and "time_embedding" in told.pop()
