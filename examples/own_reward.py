"""A reward is a function. This one wants dark images; SRPO trains the embedded model on it.

    python examples/own_reward.py [steps]

A reward of your own takes images (B, 3, H, W) in [0, 1] and B prompts, and returns (B,), larger is better. SRPO and
DRaFT follow its gradient; DDPO, Flow-GRPO, DiffusionNFT and DPO need its value only.
"""

import sys
from pathlib import Path

import palate
from palate.evaluate import generate

PROMPTS = ["a dog on a blue background", "a red apple", "a cat", "a house on a green background"]


def darkness(images, prompts):
    return 1 - images.mean((1, 2, 3))


def main(folder: Path, steps: int = 20) -> float:
    """Mean darkness of the four prompts before and after; returns the gain."""
    model = palate.EmojiModel.load()
    # a reward that does not read the prompt has no relative preference: train its plain value
    srpo = palate.SRPO(palate.SRPOSettings(preference="absolute", rollout_guidance=3.0, rollout_steps=8))
    palate.train(model, srpo, darkness, PROMPTS, folder=folder, steps=steps, batch_size=4, lr=3e-4)

    before, after = (
        darkness(generate(model, PROMPTS, [0], steps=8, weights=weights), PROMPTS).mean().item()
        for weights in ("reference", "policy")
    )
    print(f"darkness: {before:.3f} before, {after:.3f} after {steps} steps; the run is {folder}")
    return after - before


if __name__ == "__main__":
    main(Path("runs/own-reward"), *map(int, sys.argv[1:]))
