"""Change the words of a run while it trains, from Python: first towards "3d", then towards "outline".

    python examples/steering.py [steps]

`palate.steer` writes one small file into the run folder; the loop takes it up at its next step and logs the change, so
that a resumed run repeats it at the same step. It can come from another process, as here from another thread.
"""

import sys
import threading
import time
from pathlib import Path

import palate
from palate.train import read_metrics

PROMPTS = ["a dog on a blue background", "an apple", "a cat", "a house"]


def steer_after(folder: Path, step: int) -> None:
    """Wait until the log holds `step`, then ask for other words."""
    log = folder / "metrics.jsonl"
    while not (log.exists() and any(row.get("step", 0) >= step for row in read_metrics(log))):
        time.sleep(0.05)
    palate.steer(folder, ["outline"], ["3d"])


def main(folder: Path, steps: int = 20) -> list[dict]:
    """Train, steer half way; returns the logged changes of words."""
    watcher = threading.Thread(target=steer_after, args=(folder, steps // 2), daemon=True)
    watcher.start()
    srpo = palate.SRPO(palate.SRPOSettings(positive=["3d"], negative=["outline"], rollout_steps=6))
    model, reward = palate.EmojiModel.load(), palate.load_reward("emoji")
    palate.train(model, srpo, reward, PROMPTS, folder=folder, steps=steps, batch_size=4, lr=3e-4)
    changes = [row for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "steer"]
    for row in changes:
        print(f"from step {row['step']} on: towards {row['positive']}, away from {row['negative']}")
    return changes


if __name__ == "__main__":
    main(Path("runs/steering"), *map(int, sys.argv[1:]))
