"""What a run shows and hands over: previews on fixed prompts and seeds, the trained weights at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from palate.core import DrawsOwnSamples, HasNetworks, Model, SavesAdapter
from palate.evaluate import generate, pairs, write_samples
from palate.evaluate.samples import Drawing, steps_and_guidance
from palate.models.sizes import at_size
from palate.recipe import SampleSettings
from palate.runtime import checkpoint, sharding
from palate.runtime.distributed import Ranks
from palate.runtime.files import new_folder, write_file
from palate.runtime.images import encode_png, grid
from palate.train.checks import require_sampleable
from palate.train.state import Weights

PREVIEW_SEEDS = (0,)


class Previews:
    """Draws the same prompts from the same noise at any step, with the averaged weights where they are kept."""

    def __init__(
        self, model: Model, algorithm: Any, weights: Weights, prompts: Sequence[str], sample: SampleSettings,
        *, folder: Path, ranks: Ranks
    ):  # fmt: skip
        self.model, self.weights, self.prompts = model, weights, list(prompts)
        self.sampler = algorithm.sampler if isinstance(algorithm, DrawsOwnSamples) else None
        self.sample, self.folder, self.ranks = sample, folder, ranks

    def draw(self, step: int) -> Tensor:
        """Images (P, 3, H, W) on the CPU, which are also written to samples/step-NNNNNN by the main rank."""
        if not self.sampler:
            require_sampleable(self.model, "previews")
        how = Drawing(self.sample.steps, self.sample.guidance, sampler=self.sampler)
        steps, guidance = steps_and_guidance(self.model, how)
        with self.weights.averaged(), at_size(self.model, self.sample.image_size):
            images = generate(
                self.model, self.prompts, PREVIEW_SEEDS, steps=steps, guidance=guidance, sampler=self.sampler
            )
        prompts, seeds = pairs(self.prompts, PREVIEW_SEEDS)

        def write() -> None:
            with new_folder(self.folder / "samples" / checkpoint.name(step)) as temporary:
                write_samples(temporary, images, prompts, seeds, guidance=guidance, steps=steps)
                write_file(temporary / "grid.png", encode_png(grid(images, round(len(images) ** 0.5))))

        self.ranks.on_main(write)
        return images


def write_adapter(folder: Path, model: Model, weights: Weights, sharded: Sequence[nn.Module], ranks: Ranks) -> None:
    """Write folder/adapter: what was trained (its average, where one is kept), in the form that others read."""
    with weights.averaged():
        if sharded:
            assert isinstance(model, HasNetworks), "only such a model can be sharded"
            networks = {name: model.weights.networks[name] for name in weights.parameters}
            whole = {name: sharding.full_state_dict(network) for name, network in networks.items()}

            def write_networks() -> None:
                with new_folder(folder / "adapter") as temporary:
                    for name, network in networks.items():
                        place = temporary if name == "policy" else temporary / name
                        sharding.save_network(network, whole[name], place)

            ranks.on_main(write_networks)
        elif isinstance(model, SavesAdapter):

            def write() -> None:
                with new_folder(folder / "adapter") as temporary:
                    model.save_adapter(temporary)

            ranks.on_main(write)
