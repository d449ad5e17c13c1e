"""The README's table: a few columns of one report, between two marks, never written by hand.

One line for each regime of the shapes that were measured in several: forward + backward of log-prob
from hidden states, ours beside plain PyTorch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.table import measured

Row = dict[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = {"rl-late": "RL, late", "rl": "RL", "sft": "SFT", "flat": "flat"}
PLAIN, OURS = "plain", "riskpo_kernels"
HEADINGS = (
    "rows (mean entropy)",
    "plain PyTorch",
    "exact (`tail_eps=0`)",
    "`tail_eps=2^-14`",
    "time, of plain's",
    "units",
    "gradient error at 2^-14",
)


def readme_table(report: dict[str, Any]) -> str:
    """Milliseconds with the peak in MiB, for each shape and regime; markdown."""
    shapes: dict[tuple[Any, ...], dict[str, dict[str, Row]]] = defaultdict(dict)
    for row in measured(report["rows"]):
        size = row["sizes"]
        if row["op"] != "linear_logprob" or size["phase"] != "forward+backward":
            continue
        if size["zero_fraction"] or size.get("masked_fraction") or size["regime"] not in NAMES:
            continue
        shape = tuple(size[x] for x in ("n", "d", "v", "dtype"))
        shapes[shape].setdefault(size["regime"], {})[row["provider"]] = row
    several = {shape: found for shape, found in shapes.items() if len(found) > 1}
    lines = []
    for (n, d, v, dtype), found in several.items():
        if len(several) > 1:
            lines += [f"N = {n:,}, D = {d:,}, V = {v:,}, {dtype}:", ""]
        lines += [_line(HEADINGS), _line("---" for _ in HEADINGS)]
        lines += [_line(_cells(name, found[name])) for name in NAMES if name in found]
        lines.append("")
    return "\n".join(lines)


def write(report: dict[str, Any], readme: Path) -> None:
    """Put the table between the marks."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{readme}: needs one line {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    text = f"{before}{BEGIN}\n{readme_table(report).rstrip()}\n{END}{after}"
    readme.write_text(text, encoding="utf-8")


def _cells(regime: str, rows: dict[str, Row]) -> Iterable[str]:
    plain = rows.get(PLAIN)
    # the default of a dtype has a row of its own name only
    exact = rows.get(f"{OURS}, tail_eps=0", rows.get(OURS))
    sparse = rows.get(f"{OURS}, tail_eps=2^-14", rows.get(OURS))
    one = next(iter(rows.values()))
    yield f"{NAMES[regime]} ({one['entropy_nats']:.2f})"
    yield _cost(plain)
    yield _cost(exact)
    yield _cost(sparse, bold=True)
    fast = plain is not None and sparse is not None
    yield f"{sparse['median_ms'] / plain['median_ms']:.2f}" if fast else ""
    yield f"{sparse['units']:.2f}" if sparse and sparse["units"] else ""
    yield f"{sparse['gradient_error']:.0e}".replace("e-0", "e-") if sparse else ""


def _cost(row: Row | None, *, bold: bool = False) -> str:
    if row is None:
        return ""
    ms = f"{row['median_ms']:,.{0 if row['median_ms'] >= 100 else 1}f}"
    return f"{f'**{ms}**' if bold else ms} ({row['peak_mib']:,.0f} MiB)"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
