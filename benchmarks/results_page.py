"""The pictures of the results page, and the page: one figure per claim, and the same prompts for each method.

    python benchmarks/results_page.py [--results benchmarks/results]
    python benchmarks/results_page.py --images DIR        # elsewhere than docs/images; the pages are left alone

It ends with a line for whatever is missing: claims and rows that were not measured, with their commands.

Everything is made from the rows that are there: claims.py judges them, comparison.py sums them up, a figure is drawn
for each claim that was measured, in a light and a dark form with a text that says what is to be seen, and publish.py
writes tables and figures into the documentation. Pictures are those that the comparison's first seed kept of its
looks: of each method, among the looks that kept the concepts, the one whose held-out goal is nearest to a level that
most methods reach, where it is within NEAR of that level's rise. So styles are compared at about equal merit, and the
text says how far apart it is.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import claims
import comparison
import frontier
import matplotlib
import numpy as np
import time_to_preference
from claims import Judged
from methods import available, slug
from PIL import Image
from rows import made_in, of_others, write_table
from tasks import TASKS

matplotlib.use("svg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
THEMES = {
    "light": {"ink": "#1d1f24", "soft": "#6b7280", "grid": "#e5e7eb", "first": "#c2410c", "second": "#2563eb"},
    "dark": {"ink": "#e5e7eb", "soft": "#9ca3af", "grid": "#374151", "first": "#fb923c", "second": "#60a5fa"},
}
VERDICTS = {"holds": "holds", "fails": "does not hold", "open": "the runs cannot tell"}
AXES = {"heldout": "held-out goal", "diversity": "diversity"}
SIZE = (6.4, 2.9)  # inches
NEAR = 0.25  # of the level's rise: how far from the level a look may be whose pictures are shown
SEARCH = "comparison-tune"  # its rows are no results


def style(theme: str) -> dict[str, Any]:
    """matplotlib's settings of a theme; the background stays the page's."""
    colours = THEMES[theme]
    return {
        "svg.hashsalt": "palate", "svg.fonttype": "none", "font.size": 10, "figure.figsize": SIZE,
        "text.color": colours["ink"], "axes.labelcolor": colours["ink"], "axes.edgecolor": colours["soft"],
        "xtick.color": colours["soft"], "ytick.color": colours["soft"], "grid.color": colours["grid"],
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "legend.labelcolor": colours["ink"], "savefig.transparent": True,
    }  # fmt: skip


def headline(row: Judged) -> str:
    """The claim and its verdict, the figure's title."""
    return f"{row.claim.text[0].upper()}{row.claim.text[1:]}: {VERDICTS[row.verdict]}"


def alt(row: Judged) -> str:
    """What the figure shows, for those who do not see it."""
    assert row.found is not None, "only what was measured is drawn"
    slower, faster = row.found.bound, row.found.short
    if slower and faster:
        bound = " It is no bound: neither method got there on every seed."
    elif slower:
        bound = " It is a lower bound: the slower method did not get there on every seed."
    elif faster:
        bound = " It is an upper bound: the faster method did not get there on every seed."
    else:
        bound = ""
    return (
        f"{headline(row)}. Found {claims.told(row.found)} {row.claim.unit}, where the claim needs more than "
        f"{row.claim.bar:g}.{bound}"
    )


# --- figures --------------------------------------------------------------------------------------------------------


def draw(row: Judged, theme: str) -> str:
    """The SVG of a claim's figure in a theme."""
    kinds = {"curves": _curves, "bars": _bars, "frontier": _frontier}
    with plt.rc_context(style(theme)):
        figure, axes = plt.subplots(layout="constrained")
        kinds[row.claim.kind](axes, row, THEMES[theme])
        axes.set_title(headline(row), loc="left", fontsize=11, fontweight="bold", wrap=True)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Title": headline(row)})
        plt.close(figure)
    return stream.getvalue()


def _curves(axes: Any, row: Judged, colours: dict[str, str]) -> None:
    """The goal's rise over forwards, a thin line per seed; the level at which the methods are compared."""
    found = row.found
    assert found is not None and found.series is not None
    for (name, runs), colour in zip(found.series["curves"].items(), _colours(colours), strict=True):
        for k, (forwards, rises) in enumerate(runs):
            axes.plot(forwards, rises, color=colour, lw=1.4, alpha=0.75, label=name if k == 0 else None)
    level = found.series["level"]
    axes.axhline(level, color=colours["soft"], lw=1, ls="--")
    axes.set_xlabel(f"denoiser forwards\nto the dashed line: {claims.told(found)} {row.claim.unit}")
    axes.set_ylabel("rise, held out")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper left")


def _bars(axes: Any, row: Judged, colours: dict[str, str]) -> None:
    """Mean of both sides, a dot per seed, and what was found in words. Where the difference is small beside the values
    the axis does not begin at 0, and a mean is a stroke: a bar's length would say something else."""
    found = row.found
    assert found is not None and found.series is not None
    sides = found.series["bars"]
    values = np.concatenate([list(side) for side in sides.values()])
    low, high = values.min(), values.max()
    cut = low > 0 and 0 < high - low < low / 2
    for k, (side, colour) in enumerate(zip(sides.values(), _colours(colours), strict=True)):
        if cut:
            axes.vlines(np.mean(side), k - 0.28, k + 0.28, color=colour, alpha=0.35, lw=5)
        else:
            axes.barh(k, np.mean(side), height=0.55, color=colour, alpha=0.35)
        axes.plot(side, [k] * len(side), "o", color=colour, ms=5)
    axes.set_yticks(range(len(sides)), list(sides))
    axes.set_ylim(len(sides) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    if cut:
        axes.set_xlim(low - (high - low) / 2, high + (high - low) / 2)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(f"found: {claims.told(found)} {row.claim.unit}")


def _frontier(axes: Any, row: Judged, colours: dict[str, str]) -> None:
    """Every look of both methods; below, over how much of the range that both reach the first is higher."""
    found = row.found
    assert found is not None and found.series is not None
    for (name, points), colour in zip(found.series["points"].items(), _colours(colours), strict=True):
        axes.scatter(*np.array(points).T, s=16, color=colour, alpha=0.75, label=name)
    higher = f"higher over {found.value:.0%} of the shared range" if np.isfinite(found.value) else "no shared range"
    axes.set_xlabel(f"{AXES[found.series['at']]}\n{next(iter(found.series['points']))}: {higher}")
    axes.set_ylabel(AXES[found.series["axis"]])
    axes.legend(loc="best")


def _colours(colours: dict[str, str]) -> tuple[str, str]:
    return colours["second"], colours["first"]


# --- pictures -------------------------------------------------------------------------------------------------------


def equal_looks(rows: Sequence[dict[str, Any]]) -> tuple[float, list[tuple[str, int]]]:
    """The level, the median of the methods' best kept goals, and of each method whose looks come near it, within NEAR
    of its rise over the base, the nearest that kept the concepts; the base first."""
    goals = {r["method"]: [comparison.mean(point, "heldout") for point in r["points"]] for r in rows}
    best = [goals[r["method"]][comparison.best_kept(r["points"], r["task"])] for r in rows]
    base = next(iter(goals.values()))[0]
    level = float(np.median(best))
    found = [("base", 0)]
    for row in rows:
        values = goals[row["method"]]
        place = min(comparison.kept_looks(row["points"], row["task"]), key=lambda k: abs(values[k] - level))
        if place > 0 and abs(values[place] - level) <= max(1e-9, NEAR * abs(level - base)):
            found.append((row["method"], place))
    return level, found


def picture_table(results: Path, theme: str, task: str = "style") -> tuple[Image.Image, str] | None:
    """A row of pictures per method, its name beside it, and the alternative text; None without rows, and where no
    method comes near the level."""
    by = {row["method"]: row for _, row in made_in(results, f"{slug('comparison', task)}-*.json")
          if row["pictures"] and row["task"] == task}  # fmt: skip
    rows = list(by.values())
    level, chosen = equal_looks(rows) if rows else (0.0, [])
    if len(chosen) < 2:
        return None
    strips = [(name, _sheet((rows[0] if name == "base" else by[name])["pictures"][place])) for name, place in chosen]
    with plt.rc_context(style(theme)):
        figure, axes = plt.subplots(len(strips), 1, figsize=(6.4, 0.95 * len(strips)), layout="constrained")
        for axis, (name, strip) in zip(np.atleast_1d(axes), strips, strict=True):
            axis.imshow(strip, interpolation="nearest")
            axis.set_ylabel(name, rotation=0, ha="right", va="center")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)
            axis.spines[:].set_visible(False)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    rises = [comparison.mean(by[name]["points"][place], "heldout") - comparison.mean(by[name]["points"][0], "heldout")
             for name, place in chosen[1:]]  # fmt: skip
    kept = " among those that kept the concepts" if task in comparison.CONCEPTS else ""
    text = (
        f"The same prompts and noise drawn by the base model and by {', '.join(name for name, _ in chosen[1:])}, each "
        f"at its look nearest to a held-out goal of {level:.3f}{kept}; the rises go from {min(rises):.3f} to "
        f"{max(rises):.3f}."
    )
    return Image.open(io.BytesIO(stream.getvalue())), text


def _sheet(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# --- the page -------------------------------------------------------------------------------------------------------


def both(name: str, text: str, ending: str = "svg") -> str:
    """Markdown that shows the light or the dark form, as the reader's theme asks."""
    text = text.replace("[", "(").replace("]", ")")
    return "\n".join(f"![{text}](images/{name}-{theme}.{ending}#only-{theme})" for theme in THEMES)


def figures(rows: Sequence[Judged], images: Path) -> Iterator[str]:
    """Write every figure, and give the markdown of each."""
    images.mkdir(parents=True, exist_ok=True)
    for row in rows:
        if row.found is None:
            continue
        for theme in THEMES:
            (images / f"claim-{row.claim.key}-{theme}.svg").write_text(draw(row, theme), encoding="utf-8")
        yield both(f"claim-{row.claim.key}", alt(row))


def write(results: Path, images: Path) -> Path:
    """claims.{json,md}, comparison.{json,md}, what other tables say of the same rows, and claim-figures.md with the
    figures and the pictures that rows keep."""
    judged = claims.judge(results)
    (results / "claims.json").write_text(json.dumps(claims.as_json(judged), indent=1) + "\n")
    write_table(results / "claims.md", claims.table(judged))
    comparison.write(comparison.usual(results))
    frontier.write(results)
    time_to_preference.write(results)
    parts = list(figures(judged, images))
    for task in TASKS:
        name = "equal-reward" if task == "style" else f"equal-reward-{task}"
        for theme in THEMES:
            if found := picture_table(results, theme, task):
                found[0].save(images / f"{name}-{theme}.png", optimize=True)
                if theme == "light":
                    parts.append(
                        both(name, f"{TASKS[task].title[0].upper()}{TASKS[task].title[1:]}. {found[1]}", "png")
                    )
    page = results / "claim-figures.md"
    write_table(page, "\n\n".join(parts))
    return page


def absent(results: Path) -> list[str]:
    """A line for whatever the page lacks: claims without rows, and tasks, methods and pictures of the comparison."""
    lines = [f"not measured: {command}" for command in claims.missing(claims.judge(results))]
    if others := of_others(results):
        programs = ", ".join(sorted({path.stem.split("-")[0] for path in others}))
        lines.append(f"of another model, so left out: {len(others)} rows of {programs}; their commands make them anew")
    rows = [row for path, row in made_in(results, "comparison-*.json") if not path.name.startswith(SEARCH)]
    for task in TASKS:
        own = [row for row in rows if row["task"] == task]
        wanted = [name for name in available() if name not in comparison.STAND_INS and comparison.applies(name, task)]
        without = [name for name in wanted if name not in {row["method"] for row in own}]
        if without:
            told = "any method" if len(without) == len(wanted) else ", ".join(without)
            lines.append(f"no rows of {task} for {told}: python benchmarks/comparison.py --tasks {task}")
        elif not any(row["pictures"] for row in own):
            lines.append(f"no pictures of {task}: its rows of seed 0 keep them")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--images", type=Path, help="else docs/images, and the pages are written")
    args = parser.parse_args()
    print(write(args.results, args.images or DOCS / "images"))
    print("\n".join(absent(args.results)))
    if args.images is None:
        import publish

        publish.write(args.results)


if __name__ == "__main__":
    main()
