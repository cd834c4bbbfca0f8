"""What each method pays for its reward: optimised reward against held-out reward, concepts, diversity and drift.

    python benchmarks/frontier.py [--seeds 0] [--methods SRPO ReFL ...] [--budget 4000] [--jobs 2]
    python benchmarks/frontier.py --quick                 # the mechanics, in a few minutes; its numbers mean nothing

Each method is run at three strengths (what `methods.METHODS` names for it: its regulariser, or its learning rate if it
has none), every run with the same budget of denoiser forwards from the same base, and measured several times on the way
on the same prompts and noise. All these points are a method's cloud; its frontier at reward g is the best held-out
reward of any point whose optimised reward is at least g. The area under it is taken over the rewards from the base's to
the highest of any method, above the lowest held-out value seen, as a share of the box; its interval resamples prompts,
the same ones for every method, so that differences of areas are paired. What another training seed would change is not
in it: --seeds 0 1 2 makes three runs of each strength, all in one cloud. Run `comparison.py tune` first for tuned
learning rates; otherwise the recipes' are used.

Writes RESULTS/frontier-{heldout,concept,diversity,drift}.svg.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from methods import METHODS, RATES, available, parsed, rate, referees, scatter, settings, slug, small, watch
from rows import Row, measured, write_table

PANELS = {
    "heldout": "held-out objective",
    "concept": "concept accuracy",
    "diversity": "diversity inside prompt and style",
    "drift": "distance from the base's images",
}
GRID = 61


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


def strengths(method: str, results: Path, quick: bool) -> list[tuple[str, list[str]]]:
    """(label, overrides) of each run of a method."""
    key, values = METHODS[method][1]
    lr = rate(method, results)
    if key == "trainer.lr":
        chosen = [(f"lr x {factor:g}", [f"trainer.lr={lr * factor}"]) for factor in RATES]
    else:
        chosen = [(f"{key.split('.')[1]} {value:g}", [f"trainer.lr={lr}", f"{key}={value}"]) for value in values]
    return chosen[:1] if quick else chosen


def run(method: str, seed: int, prompts: int, budget: int, checks: int, overrides: list[str]) -> list[dict]:
    found = watch(method, seed, referees(prompts, (0, 1)), budget=budget, checks=checks, overrides=overrides)
    return [{"updates": c.updates, "forwards": c.forwards, **c.values} for c in found]


def clouds_of(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Every measurement of every run of each method, the base's first: per-prompt values."""
    labels, rows = [], []
    for seed in args.seeds:
        for method in args.methods:
            for label, overrides in strengths(method, args.results, args.quick):
                overrides = [*overrides, *args.override, *(small(method) if args.quick else [])]
                labels.append((method, label, seed))
                rows.append(
                    Row(
                        args.results / f"{slug('frontier', method, label, seed, args.budget)}.json",
                        run,
                        (method, seed, args.prompts, args.budget, args.checks, overrides),
                        recipe=settings(method),
                    )
                )

    def show(points: list[dict]) -> dict[str, float]:
        return {name: round(float(np.nanmean(points[-1][name])), 3) for name in ("reward", *PANELS)}

    clouds: dict[str, list[dict]] = {}
    found = measured(rows, args.jobs, show, minutes=args.minutes)
    for (method, label, seed), points in zip(labels, found, strict=True):
        known = clouds.setdefault(method, [])
        known += [{**point, "label": label, "seed": seed} for point in (points[1:] if known else points)]
    return clouds


def values(points: list[dict], name: str, weights: np.ndarray) -> np.ndarray:
    """Means over prompts of each point, (points,), or (resamples, points) with weights (resamples, prompts)."""
    columns = np.array([point[name] for point in points], dtype=float)
    known = np.isfinite(columns)
    return (weights @ np.where(known, columns, 0).T) / np.maximum(weights @ known.T, 1e-12)


def summary(clouds: dict[str, list[dict]], resamples: int = 1000) -> tuple[dict, str]:
    """Areas with intervals, and how far they lie below the largest, as a dictionary and as a table."""
    count = len(next(iter(clouds.values()))[0]["reward"])
    flat = np.full((1, count), 1 / count)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples) / count
    means = {m: {n: values(p, n, flat)[0] for n in ("reward", *PANELS)} for m, p in clouds.items()}
    base = {name: float(column[0]) for name, column in next(iter(means.values())).items()}
    top = max(float(column["reward"].max()) for column in means.values())
    lines = [
        "| method | points | highest optimised | its held-out | its concept | its diversity | area held-out "
        "| area concept | area diversity |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines.append(
        "| base | 1 | "
        + " | ".join(f"{base[n]:.3f}" for n in ("reward", "heldout", "concept", "diversity"))
        + " | | | |"
    )
    result: dict = {"base": base, "methods": {}}
    areas: dict[str, np.ndarray] = {}  # held-out: of all prompts, then of each resample of them
    for method, points in clouds.items():
        own, best = means[method], int(means[method]["reward"].argmax())
        row = {"points": len(points), **{name: float(own[name][best]) for name in ("reward", *PANELS)}}
        cells = []
        for name in ("heldout", "concept", "diversity"):
            every = np.concatenate([column[name] for column in means.values()])
            box = (base["reward"], top, float(every.min()), float(every.max()))
            value = float(area(own["reward"], own[name], *box))
            resampled = area(values(points, "reward", drawn), values(points, name, drawn), *box)
            low, high = np.quantile(resampled, [0.025, 0.975])
            row[f"area_{name}"] = [value, float(low), float(high)]
            if name == "heldout":
                areas[method] = np.concatenate([[value], resampled])
            cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        result["methods"][method] = row
        lines.append(
            f"| {method} | {len(points)} | "
            + " | ".join(f"{row[n]:.3f}" for n in ("reward", "heldout", "concept", "diversity"))
            + " | "
            + " | ".join(cells)
            + " |"
        )
    leader = max(areas, key=lambda method: areas[method][0])
    behind = []
    for method in areas:
        if method != leader:
            less = areas[leader] - areas[method]
            low, high = np.quantile(less[1:], [0.025, 0.975])
            result["methods"][method][f"area_heldout less than {leader}"] = [float(less[0]), float(low), float(high)]
            behind.append(f"{method} {less[0]:.2f} ({low:+.2f} to {high:+.2f})")
    if behind:
        lines += ["", f"{leader} has the largest area of held-out reward; below it lie " + ", ".join(behind) + "."]
    return result, "\n".join(lines)


def plot(clouds: dict[str, list[dict]], folder: Path) -> None:
    for name, title in PANELS.items():
        series, lines = {}, {}
        for method, points in clouds.items():
            x, y = (np.array([np.nanmean(point[key]) for point in points]) for key in ("reward", name))
            series[method] = list(zip(x.tolist(), y.tolist(), strict=True))
            grid = np.linspace(x.min(), x.max(), GRID)
            best = envelope(x, y if name != "drift" else -y, grid)
            lines[method] = list(zip(grid.tolist(), (best if name != "drift" else -best).tolist(), strict=True))
        path = folder / f"frontier-{name}.svg"
        path.write_text(scatter(f"Optimised objective against {title}", "optimised objective", title, series, lines))
        print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=available(), choices=available())
    parser.add_argument("--budget", type=int, default=4000, help="denoiser forwards of each run")
    parser.add_argument("--checks", type=int, default=2, help="measurements in a run, evenly spread over the budget")
    parser.add_argument("--prompts", type=int, default=48, help="two images each")
    parser.add_argument("--override", nargs="*", default=[], help="for every method")
    args = parsed(parser)
    if args.quick:
        args.seeds, args.budget, args.checks, args.prompts = args.seeds[:1], 60, 1, 6
    clouds = clouds_of(args)
    result, text = summary(clouds)
    (args.results / "frontier.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(args.results / "frontier.md", text)
    print(text)
    plot(clouds, args.results)


if __name__ == "__main__":
    main()
