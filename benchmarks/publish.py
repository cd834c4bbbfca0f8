"""Write what has been measured into the documentation.

    python benchmarks/publish.py [--results benchmarks/results]

A page marks where a table belongs: `<!-- results: NAME -->` and, after it, `<!-- end -->`. What stands between them is
replaced by RESULTS/NAME.md, which the comparisons write beside their rows, and by their pictures, which are copied to
docs/images. A table that has not been measured leaves the page as it is; one of another embedded model than the
package's is headed by a sentence that says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import textwrap
from pathlib import Path

from rows import table_of

DOCS = Path(__file__).parent.parent / "docs"
FRONTIER = "The optimised objective against {}: a line through the looks of each method that rises, as it trains"
PICTURES = {  # table -> its pictures in RESULTS, each with what it shows for those who do not see it
    "time_to_preference": {
        "time_to_preference.svg": "The share of pictures in the style over denoiser forwards, a curve for each method"
    },
    "frontier": {
        "frontier-heldout.svg": FRONTIER.format("the held-out objective"),
        "frontier-diversity.svg": FRONTIER.format("the diversity inside a prompt and style"),
        "frontier-drift.svg": FRONTIER.format("the distance from the base's images"),
    },
    "sqdf": {
        "sqdf-frontier.svg": "Diversity over the held-out objective: SQDF at several alpha_kl, DRaFT-1 and ReFL at "
        "several learning rates"
    },
    "distar-family": {
        "distar-family.svg": "Diversity inside a prompt over the reward, at each look on the way: DI*, DI++ and SIM"
    },
}
WIDTH = 100
OTHER = (
    "**Measured on an earlier embedded model**, not on the one in the package: not to be compared with tables that do "
    "not say so."
)
MARK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def wrapped(text: str) -> str:
    """Sentences in lines of at most WIDTH characters, as the pages have them; tables and pictures as they are."""
    lines = (
        [line] if line.startswith(("|", "!", "<", " ")) else textwrap.wrap(line, WIDTH, break_on_hyphens=False) or [""]
        for line in text.splitlines()
    )
    return "\n".join(part for own in lines for part in own)


def filled(page: str, place: Path, results: Path, images: Path) -> str:
    """The text of a page that lies in the folder `place`, with the tables that RESULTS holds."""

    def fill(found: re.Match) -> str:
        name = found[2]
        table = results / f"{name}.md"
        if not table.is_file():
            return found[0]
        text, ours = table_of(table)
        parts = [wrapped(text)] if ours else [wrapped(OTHER), wrapped(text)]
        for picture, title in PICTURES.get(name, {}).items():
            if (results / picture).is_file():
                images.mkdir(parents=True, exist_ok=True)
                shutil.copy(results / picture, images / picture)
                parts.append(f"![{title}]({os.path.relpath(images / picture, place)})")
        return found[1] + "\n" + "\n\n".join(parts) + "\n\n" + found[3]

    return MARK.sub(fill, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    write(parser.parse_args().results)


def write(results: Path) -> None:
    """Fill every page that has a mark, and print the names of those that changed."""
    for path in sorted(DOCS.rglob("*.md")):
        before = path.read_text("utf-8")
        after = filled(before, path.parent, results, DOCS / "images")
        if after != before:
            path.write_text(after, "utf-8")
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
