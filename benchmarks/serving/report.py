"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from benchmarks.serving.plots import all_plots
from benchmarks.serving.results import Results
from benchmarks.serving.tables import failures, sheets

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Serving comparison: {{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th { font-weight: 600; vertical-align: bottom; max-width: 7rem } th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } .error { color: #a00; overflow-wrap: anywhere } .note { color: #555; font-size: .9rem }
figure { margin: 1rem 0 2rem } figure svg { max-width: 100%; height: auto } figcaption { font-weight: 600 }
pre { background: #f5f5f5; padding: .6rem; overflow-x: auto; font-size: .8rem }
</style>
</head>
<body>
<h1>Serving comparison: {{ name }}</h1>
<p>{{ description }}</p>
<p class="note">{% for key, value in machine.items() %}{{ key }}: {{ value }}{{ "; " if not loop.last }}{% endfor %}</p>
<h2>Variants</h2>
<ul>{% for line in variants %}<li><b>{{ line.name }}</b>: {{ line.what }}</li>{% endfor %}</ul>
{% if failures %}<h2>Did not run</h2>
<ul>{% for name, error in failures %}<li class="error"><b>{{ name }}</b>: {{ error }}</li>{% endfor %}</ul>{% endif %}
{% for sheet in sheets %}<h2>{{ sheet.title }}</h2>
<div class="wide"><table>
<tr>{% for heading in sheet.headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in sheet.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endfor %}
<p class="note">TTFT, TPOT and rates are SGLang's serving benchmark's; without "p99" they are medians. "Same tokens":
sampled greedy requests on an idle server, on every rank. "Same text under load": the benchmark's own answers, which
run in other batches, so in half precision they may differ between two runs of one server.</p>
{% for caption, svg in plots %}<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>{% endfor %}
<h2>Commands of the benchmark</h2>
{% for command in commands %}<pre>{{ command }}</pre>{% endfor %}
</body>
</html>
"""


def write_report(results: Results, machine: dict[str, Any]) -> Path:
    """Write report.html into the results' folder."""
    scenario = results.scenario
    variants = [
        {"name": v.name, "what": f"{v.kind}, {v.ranks} ranks" + (f", {dict(v.flags)}" if v.flags else "")}
        for v in scenario.variants
    ]
    runs = (results.run(variant, point) for variant in scenario.variants for point in scenario.load.points())
    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    html = environment.from_string(TEMPLATE).render(
        name=scenario.name,
        description=scenario.description,
        machine=machine,
        variants=variants,
        failures=failures(results),
        sheets=sheets(results),
        plots=all_plots(results),
        commands=[" ".join(run["command"]) for run in runs if run],
    )
    path = results.folder / "report.html"
    path.write_text(html)
    return path
