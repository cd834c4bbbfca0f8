"""Is a gain more than luck? The same recipe with three seeds, measured on the same prompts and noise.

    python examples/three_seeds.py [steps]

The optimised reward rises in every run, whatever else happens. Report what was not optimised beside it, and the spread
between seeds, before you believe a difference between two settings.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

import palate
from palate.evaluate import embedded_panel, evaluate_model

PROMPTS = ["a dog on a blue background", "an apple", "a cat", "a house on a green background"]


def main(folder: Path, steps: int = 20, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, list[float]]:
    """Train with SRPO per seed; returns each metric's change from the base model, one value per seed."""
    panel = embedded_panel()
    changes: dict[str, list[float]] = {}
    for seed in seeds:
        model = palate.EmojiModel.load()
        srpo = palate.SRPO(
            palate.SRPOSettings(positive=["3d"], negative=["flat"], rollout_steps=8, rollout_guidance=3.0)
        )
        run = folder / f"seed-{seed}"
        outcome = palate.train(
            model, srpo, palate.load_reward("emoji"), PROMPTS, folder=run, steps=steps, batch_size=4, lr=3e-4, seed=seed
        )
        if outcome.exit_code:  # Ctrl-C ends one run, and a part of it is no seed to compare
            sys.exit(outcome.exit_code)
        measured = evaluate_model(model, PROMPTS, [0], panel=panel, steps=8, base_weights="reference")
        for name in ("reward/emoji", "reward/emoji-heldout", "style/3d", "concept"):
            changes.setdefault(name, []).append(measured.summary["metrics"][name]["change"])
    print(f"change from the base model after {steps} steps, mean and standard deviation over {len(seeds)} seeds")
    for name, values in changes.items():
        print(f"  {name:22} {mean(values):+.3f} ± {stdev(values):.3f}")
    return changes


if __name__ == "__main__":
    main(Path("runs/three-seeds"), *map(int, sys.argv[1:]))
