"""Runs as self-contained HTML: pictures before and after, what was wanted, kept and paid, curves, every number.

`write_report` shows one run, or several side by side; `write_evaluation` what was measured on them; `study` lets people
choose between two runs without knowing whose pictures they see. Nothing is loaded: images are data URIs, charts inline
SVG. All text is escaped, so a prompt is shown, never obeyed.

`palate.report(run)` calls `palate.api.report`, which writes a run's page and returns its path;
`help(palate.api.report)` has its arguments.
"""

from palate.report.blackbox import read_queries, read_rounds
from palate.report.chart import Line, Mark, chart, ticks
from palate.report.curves import curves, read_metrics
from palate.report.evaluation import write_evaluation
from palate.report.html import render
from palate.report.page import write_report
from palate.report.pictures import picture
from palate.report.story import gauges, sentence
from palate.report.tables import metric_rows
from palate.runtime.callable_module import callable_as

__all__ = [
    "Line",
    "Mark",
    "chart",
    "curves",
    "gauges",
    "metric_rows",
    "picture",
    "read_metrics",
    "read_queries",
    "read_rounds",
    "render",
    "sentence",
    "ticks",
    "write_evaluation",
    "write_report",
]

callable_as(__name__, "palate.api", "report")
