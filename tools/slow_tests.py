"""Write tests/durations.txt, by which tests are marked `slow`, from a log of pytest on a quiet machine.

    make test TEST_ARGS="--durations=0 --durations-min=1" | tee log && python tools/slow_tests.py log

A line per test: its seconds, set-up included, and its name. Tests that the log does not name keep their line.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "tests" / "durations.txt"
LINE = re.compile(r"^\s*([\d.]+)s (setup|call|teardown)\s+(\S.*?)\s*$")


def measured(log: str) -> dict[str, float]:
    """Test -> seconds of its set-up, call and tear-down together."""
    found: defaultdict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if match := LINE.match(line):
            found[match[3]] += float(match[1])
    return dict(found)


def read(text: str) -> dict[str, float]:
    """Test -> seconds, of what this program wrote."""
    rows = (line.split(" ", 1) for line in text.splitlines() if line.strip())
    return {name: float(seconds) for seconds, name in rows}


def written(rows: dict[str, float]) -> str:
    """The file's text, the slowest test first."""
    return "".join(
        f"{seconds:.1f} {name}\n" for name, seconds in sorted(rows.items(), key=lambda row: (-row[1], row[0]))
    )


if __name__ == "__main__":
    known = read(FILE.read_text("utf-8")) if FILE.is_file() else {}
    for log in sys.argv[1:]:
        known |= measured(Path(log).read_text("utf-8"))
    FILE.write_text(written(known), "utf-8")
    print(f"{len(known)} tests in {FILE}")
