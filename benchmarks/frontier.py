"""What each method pays for its reward: optimised reward against held-out reward, diversity and drift.

    python benchmarks/frontier.py   # of the style rows that comparison.py has; nothing is trained

A run's points are its looks that kept the concepts within LOST of the base's (comparison.py), the base among them. Its
frontier at reward g is the best held-out reward, or diversity, of any point whose optimised reward is at least g. The
area under it is taken over the rewards from the base's to the highest that a method reaches on average, above the
lowest value seen, as a share of the box; it is the mean over a method's seeds, with Student's interval over them. All
runs are judged on the same prompts and noise, so that the interval does not speak of others. Two methods are compared
on the seeds that both have. Every run looks equally often, but one that saturates ends early.

Writes RESULTS/frontier.md and frontier-{heldout,diversity,drift}.svg, where a line goes through a method's looks, means
over its seeds, in the order of training; methods that hardly rise are left out of the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from comparison import LOST, by_method, keeping, mean, student
from methods import about, scatter
from rows import write_table

TASK = "style"
AREAS = {"heldout": "held-out", "diversity": "diversity"}
PANELS = {
    "heldout": "held-out objective",
    "diversity": "diversity inside prompt and style",
    "drift": "distance from the base's images",
}
GRID, MOVED = 61, 0.15
Runs = dict[int, list[dict[str, float]]]  # seed -> the points of its run, means over prompts


def envelope(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """For each g the best y among the points with x >= g, NaN where there is none. x, y (..., points) -> (..., G)."""
    good = x[..., None, :] >= grid[:, None]
    best = np.where(good, y[..., None, :], -np.inf).max(-1)
    return np.where(np.isinf(best), np.nan, best)


def area(x: np.ndarray, y: np.ndarray, low: float, high: float, floor: float, ceiling: float) -> np.ndarray:
    """Share of the box (low..high) x (floor..ceiling) under the frontier; x it does not reach count with the floor."""
    found = envelope(x, y, np.linspace(low, high, GRID))
    return (np.nan_to_num(found, nan=floor).clip(floor, ceiling) - floor).mean(-1) / max(ceiling - floor, 1e-12)


def share_above(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], low: float, high: float
) -> float:
    """Share of the x in low..high, of those that either reaches, where the first's frontier is higher; equal: half.

    Each is (x, y) of a method's points. NaN for an empty range.
    """
    grid = np.linspace(low, high, GRID)
    a, b = (np.nan_to_num(envelope(*cloud, grid), nan=-np.inf) for cloud in (first, second))
    reached = np.isfinite(a) | np.isfinite(b)
    return float(((a > b) + (a == b) / 2)[reached].mean()) if low < high and reached.any() else float("nan")


def kept_points(run: dict[str, Any]) -> list[dict[str, float]]:
    """The run's looks that kept the concepts, means over prompts."""
    return [
        {key: mean(run["points"][place], key) for key in ("reward", "concept", *PANELS)}
        for place in keeping(run["points"], LOST)
    ]


def over_seeds(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of two values or more."""
    center = float(np.mean(values))
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return center, center - half, center + half


def areas(methods: dict[str, Runs], key: str) -> dict[str, dict[int, float]]:
    """Method -> seed -> area under the frontier of `key`, all in one box."""
    every = [point for runs in methods.values() for points in runs.values() for point in points]
    low, floor, ceiling = every[0]["reward"], min(p[key] for p in every), max(p[key] for p in every)
    high = low + max(map(top_rise, methods.values()))

    def under(points: list[dict[str, float]]) -> float:
        x, y = (np.array([point[name] for point in points]) for name in ("reward", key))
        return float(area(x, y, low, high, floor, ceiling))

    return {method: {seed: under(points) for seed, points in runs.items()} for method, runs in methods.items()}


def table(methods: dict[str, Runs]) -> str:
    """A line a method, the largest area of held-out reward first, and how far the others lie below it."""
    found = {key: areas(methods, key) for key in AREAS}
    lines = [
        "| method | seeds | highest optimised | its held-out | its concept | its diversity | "
        + " | ".join(f"area, {name}" for name in AREAS.values())
        + " |",
        "|---" * (6 + len(AREAS)) + "|",
    ]
    base = next(iter(next(iter(methods.values())).values()))[0]
    shown = ("reward", "heldout", "concept", "diversity")
    lines.append("| base | | " + " | ".join(f"{base[key]:.3f}" for key in shown) + " | |" + " |" * (len(AREAS) - 1))
    order = sorted(methods, key=lambda method: -np.mean(list(found["heldout"][method].values())))
    for method in order:
        tops = [max(points, key=lambda point: point["reward"]) for points in methods[method].values()]
        cells = [about([top[key] for top in tops], "{:.3f}") for key in shown]
        cells += [_interval(list(found[key][method].values())) for key in AREAS]
        lines.append(f"| {method} | {len(tops)} | " + " | ".join(cells) + " |")
    leader, *others = order
    less = []
    for method in others:
        shared = [seed for seed in methods[method] if seed in methods[leader]]
        if shared:
            own = [found["heldout"][leader][seed] - found["heldout"][method][seed] for seed in shared]
            less.append(f"{method} {_interval(own)}")
    if less:
        lines += ["", f"{leader} has the largest area of held-out reward; on the seeds of both it is larger by: "
                  + ", ".join(less) + "."]  # fmt: skip
    return "\n".join(lines)


def _interval(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    center, low, high = over_seeds(values)
    return f"{center:.2f} ({low:.2f} to {high:.2f})"


def top_rise(runs: Runs) -> float:
    """How far the optimised reward rises over the base's, mean over seeds."""
    return float(np.mean([max(p["reward"] for p in points) - points[0]["reward"] for points in runs.values()]))


def plot(methods: dict[str, Runs], folder: Path) -> None:
    """Of the methods that rise at least MOVED as far as the furthest; the others would lie on the base."""
    furthest = max(map(top_rise, methods.values()))
    for name, title in PANELS.items():
        series = {}
        for method, runs in methods.items():
            if top_rise(runs) < MOVED * furthest:
                continue
            longest = max(len(points) for points in runs.values())  # a run that ended early stays where it ended
            now = [[points[min(look, len(points) - 1)] for points in runs.values()] for look in range(longest)]
            series[method] = [tuple(float(np.mean([p[key] for p in look])) for key in ("reward", name)) for look in now]
        path = folder / f"frontier-{name}.svg"
        path.write_text(scatter(f"Optimised objective against {title}", "optimised objective", title, series, series))


def write(results: Path) -> str:
    """The table and the figures of the rows that are there; "" and nothing written if there are none."""
    methods = {
        method: {seed: kept_points(run) for seed, run in runs.items()}
        for method, runs in by_method(results, TASK).items()
    }
    if not methods:
        return ""
    text = table(methods)
    write_table(results / "frontier.md", text)
    plot(methods, results)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    print(
        write(parser.parse_args().results) or f"no rows of this model: python benchmarks/comparison.py --tasks {TASK}"
    )


if __name__ == "__main__":
    main()
