"""Keys of a recipe by their last name, for those who write `--steps 3` or `steps=3`."""

from __future__ import annotations

from palate import recipe as recipes


def key_named(name: str) -> list[str]:
    """The dotted keys of the settings that end in this name, the trainer's first; empty where there is none."""
    tree = recipes.as_tree(recipes.read("srpo-emoji"))

    def walk(part: dict, prefix: str) -> list[str]:
        found = []
        for key, value in part.items():
            dotted = f"{prefix}.{key}" if prefix else key
            found += [dotted] if key == name and prefix else []
            found += walk(value, dotted) if isinstance(value, dict) else []
        return found

    return sorted(walk(tree, ""), key=lambda key: (not key.startswith("trainer."), key.count("."), key))[:3]
