"""`riskpo report RUN`: one HTML file that opens without a server and loads nothing.

Curves, samples with filters, what `riskpo explain` says, memory plan and peak, settings, and all
lines that the run printed.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from string import Template

from riskpo.files import NOTES, SETTINGS, TEXTS, write_text
from riskpo.report.explain import report
from riskpo.report.logs import average_name, read_records
from riskpo.report.plots import plot
from riskpo.report.samples import read_samples

PAGE = "report.html"  # in run_dir
MEMORY = "memory "  # how lines on the plan and the peak begin

TEMPLATE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>riskpo: $name</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #22313f; max-width: 1100px;
       margin: 2em auto; padding: 0 1em }
img { max-width: 100% }
pre { background: #f4f6f7; padding: .8em; overflow: auto; white-space: pre-wrap }
table { border-collapse: collapse; width: 100%; table-layout: fixed }
th, td { text-align: left; vertical-align: top; border-bottom: 1px solid #e3e7ea;
         padding: .3em .5em }
td { white-space: pre-wrap; overflow-wrap: anywhere }
th:nth-child(-n+3) { width: 5.5em }
.right { color: #2e8b57 } .wrong { color: #c0392b }
</style>
<h1>$name</h1>
<p>$summary</p>
<h2>Curves</h2><img alt="curves" src="data:image/png;base64,$curves">
<h2>What the log says</h2><pre>$findings</pre>
<h2>Memory</h2><pre>$memory</pre>
<h2>Samples</h2>
<p><label>step <input id="step" size="4"></label> <label>verdict <select id="verdict">
<option></option></select></label> <label>text <input id="text"></label>
<span id="count"></span></p>
<table><thead><tr><th>step<th>verdict<th>reward<th>prompt<th>response<th>gold</tr></thead>
<tbody id="rows"></tbody></table>
<h2>Settings</h2><pre>$settings</pre>
<details><summary>Everything the run printed</summary><pre>$notes</pre></details>
<script type="application/json" id="samples">$samples</script>
<script>
const at = id => document.getElementById(id), most = 500;
const rows = JSON.parse(at("samples").textContent);
const [step, verdict, text] = ["step", "verdict", "text"].map(at);
for (const name of new Set(rows.map(r => r.verdict))) verdict.add(new Option(name));
function show() {
  const found = rows.filter(r => (!step.value || r.step == step.value)
    && (!verdict.value || r.verdict == verdict.value)
    && [r.prompt, r.response, r.gold].join().toLowerCase().includes(text.value.toLowerCase()));
  at("count").textContent =
    Math.min(found.length, most) + " of " + found.length + " shown, newest first";
  at("rows").replaceChildren(...found.slice(-most).reverse().map(r => {
    const line = document.createElement("tr");
    for (const name of ["step", "verdict", "reward", "prompt", "response", "gold"])
      line.insertCell().textContent = r[name];
    line.cells[1].className = r.reward > 0 ? "right" : "wrong";
    return line;
  }));
}
for (const field of [step, verdict, text]) field.oninput = show;
show();
</script>
</html>
""")


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html and the curves.png that it shows; returns the page's path."""
    folder = Path(run_dir)
    curves = base64.b64encode(plot(folder).read_bytes()).decode()
    notes = (folder / NOTES).read_text(encoding="utf-8") if (folder / NOTES).is_file() else ""
    steps = read_records(folder, "step")
    samples = read_samples(folder) if (folder / TEXTS).is_file() else []
    texts = {
        "name": folder.name,
        "summary": "; ".join(_summary(folder)) or "no step yet",
        "findings": report(folder) if steps else "No step is finished.",
        # once, also where a resumed run has said it again
        "memory": "".join(dict.fromkeys(x for x in notes.splitlines(True) if x.startswith(MEMORY))),
        "settings": (folder / SETTINGS).read_text(encoding="utf-8"),
        "notes": notes,
    }
    # "<" written so that no text can end the script element
    rows = json.dumps(samples).replace("<", "\\u003c")
    escaped = {name: html.escape(text) for name, text in texts.items()}
    return write_text(folder / PAGE, TEMPLATE.substitute(escaped, curves=curves, samples=rows))


def _summary(folder: Path) -> list[str]:
    """Reward and held-out accuracy, first and last, with the interval over questions."""
    found = []
    steps, evaluations = read_records(folder, "step"), read_records(folder, "eval")
    if steps:
        first, last = steps[0]["reward_mean"], steps[-1]["reward_mean"]
        found.append(f"{len(steps)} steps: mean reward {first:.3f} to {last:.3f}")
    name = average_name(evaluations) or ""
    for record in evaluations[:1] + evaluations[1:][-1:]:
        low, high = record[f"{name}_low"], record[f"{name}_high"]
        where = f"held-out {name} after step {record['step']}"
        found.append(f"{where}: {record[name]:.3f} [{low:.3f}, {high:.3f}]")
    return found
