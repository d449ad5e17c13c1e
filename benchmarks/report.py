"""`python -m benchmarks.report FILE.json ...`: Markdown tables and PNG plots of measured rows.

--markdown FILE   the tables of every case (standard output without it)
--readme FILE     the short table of the (one) report, between the marks in FILE
--plots FOLDER    time against N, memory against N, error against time
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import readme_table, table

Row = dict[str, Any]
REHEARSALS = ("quick", "dry")


def load(path: Path) -> dict[str, Any]:
    """A report of `python -m benchmarks`."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("schema") != 1:
        raise SystemExit(f"{path}: schema {report.get('schema')!r}; this script reads 1")
    return report


def machine(report: dict[str, Any]) -> str:
    """One line: where, with what, when, how."""
    e = report["environment"]
    versions = e["packages"]
    where = e.get("gpu") or f"{e['processor']}, {e['cores']} cores"
    parts = [where]
    if e.get("driver"):
        parts.append(f"driver {e['driver']}, CUDA {e['cuda']}")
    parts += [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    parts += [f"Python {e['python']}", e["date"][:10], f"commit {e['commit']}"]
    return f"{', '.join(parts)}; `{e['command']}`"


def markdown(reports: list[dict[str, Any]]) -> str:
    """Every case of every report, under the machine that measured it."""
    parts = []
    for report in reports:
        parts.append(f"### {machine(report)}\n")
        if report["note"]:
            parts.append(f"{report['note']}\n")
        if report["set"] in REHEARSALS:
            parts.append("**A rehearsal: tiny sizes, the numbers mean nothing.**\n")
        for (op, case), rows in table.by_case(report["rows"]).items():
            done = table.measured(rows)
            if not done:
                continue
            parts.append(f"**{op}** ({case})  ")
            if table.regime_line(done[0]):
                parts.append(f"{table.regime_line(done[0])}\n")
            else:
                parts.append("")
            parts.append(table.markdown(rows))
            parts += [f"{x}  " for x in map(table.stages_line, done) if x]
        parts.append(_absent(report))
    return "\n".join(parts).rstrip() + "\n"


def _absent(report: dict[str, Any]) -> str:
    """Peers that ran nowhere, with their reason; cases for which there was no time."""
    ran = {r["provider"] for r in table.measured(report["rows"])}
    reasons = {r["provider"]: r["reason"] for r in report["rows"] if r["provider"] not in ran}
    lines = [f"- not run: {name}: {reason}" for name, reason in sorted(reasons.items())]
    lines += [f"- no time: {case}" for case in report["left_out"]]
    return "\n".join(lines) + "\n"


def sweep(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """linear_logprob rows by what stays fixed, then by provider, sorted by N."""
    groups: dict[str, dict[str, dict[int, Row]]] = {}
    for r in table.measured(rows):
        if r["op"] != "linear_logprob":
            continue
        s = r["sizes"]
        fixed = f"D={s['d']}, V={s['v']}, {s['regime']} rows, {s['phase']}"
        for part in ("zero", "masked"):
            share = s.get(f"{part}_fraction")  # results of earlier versions mask nothing
            fixed += f", {share:.0%} {part} rows" if share else ""
        at = groups.setdefault(fixed, {}).setdefault(r["provider"], {})
        at[s["n"]] = r  # measured twice: the later one
    return {
        fixed: {name: [at[n] for n in sorted(at)] for name, at in providers.items()}
        for fixed, providers in groups.items()
    }


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files; an empty list when the rows hold nothing to draw."""
    groups = sweep(report["rows"])
    written = []
    lines = {k: v for k, v in groups.items() if any(len(x) > 1 for x in v.values())} or groups
    longest = sorted(lines, key=lambda k: -sum(map(len, lines[k].values())))[:2]
    folder.mkdir(parents=True, exist_ok=True)
    for name, column, label in (
        ("time-vs-n", "median_ms", "milliseconds"),
        ("memory-vs-n", "peak_mib", "peak MiB beyond inputs and gradients"),
    ):
        if longest:
            path = folder / f"{name}.png"
            _against_n({k: lines[k] for k in longest}, column, label, report, path)
            written.append(path)
    at_one_n: dict[str, list[Row]] = {}
    for fixed, providers in groups.items():
        for r in (r for line in providers.values() for r in line if r["gradient_error"]):
            at_one_n.setdefault(f"{fixed}, N={r['sizes']['n']}", []).append(r)
    if at_one_n:
        fullest = max(at_one_n, key=lambda k: len(at_one_n[k]))
        path = folder / "error-vs-time.png"
        _error_against_time(fullest, at_one_n[fullest], report, path)
        written.append(path)
    return written


OURS, INK, GRID = "#c2410c", "#1f2937", "#e5e7eb"
OTHERS = ("#2563eb", "#0d9488", "#7c3aed", "#64748b", "#ca8a04", "#be185d", "#15803d", "#0891b2")


def _canvas(columns: int, height: float = 4.2):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, columns, figsize=(5.6 * columns + 2.4, height), squeeze=False, layout="constrained"
    )
    for axis in axes[0]:
        axis.grid(True, which="major", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, axes[0]


def _colours(names: list[str]) -> dict[str, str]:
    ours = [n for n in names if n.startswith("riskpo")]
    rest = [n for n in names if n not in ours]
    colours = {n: OTHERS[i % len(OTHERS)] for i, n in enumerate(rest)}
    return colours | dict.fromkeys(ours, OURS)


STYLES, OWN_MARKERS = ("-", "--", ":", "-."), ("D", "^", "P", "v")


def _against_n(
    groups: dict[str, dict[str, list[Row]]],
    column: str,
    label: str,
    report: dict[str, Any],
    path: Path,
) -> None:
    figure, axes = _canvas(len(groups))
    names = list(dict.fromkeys(n for providers in groups.values() for n in providers))
    colours = _colours(names)
    ours = [n for n in names if n.startswith("riskpo")]
    for axis, (title, providers) in zip(axes, groups.items(), strict=True):
        for name, rows in providers.items():
            own = name in ours
            x, y = ([r["sizes"]["n"] for r in rows], [max(r[column], 1e-3) for r in rows])
            style = STYLES[ours.index(name) % 4] if own else "-"
            axis.plot(
                x,
                y,
                style,
                marker="o",
                markersize=5 if own else 4,
                color=colours[name],
                linewidth=2.4 if own else 1.4,
                label=name,
                zorder=3 if own else 2,
            )
        if column == "median_ms":
            floor = {r["sizes"]["n"]: r["gemm_ms"] for rows in providers.values() for r in rows}
            ns = sorted(floor)
            axis.plot(ns, [floor[n] for n in ns], color=INK, linewidth=1, label="bare logits GEMM")
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel=label)
        ticks = sorted({r["sizes"]["n"] for rows in providers.values() for r in rows})
        axis.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axis.minorticks_off()
        _plain_ticks(axis.yaxis)
        axis.set_title(title, fontsize=10, color=INK)
    _finish(figure, axes, report, path)


def _error_against_time(title: str, rows: list[Row], report: dict[str, Any], path: Path) -> None:
    figure, axes = _canvas(1)
    names = [r["provider"] for r in rows]
    colours, ours = _colours(names), [n for n in names if n.startswith("riskpo")]
    for r in rows:
        name = r["provider"]
        own = name in ours
        axes[0].scatter(
            r["median_ms"],
            r["gradient_error"],
            s=95 if own else 60,
            marker=OWN_MARKERS[ours.index(name) % 4] if own else "o" if r["per_token"] else "s",
            edgecolor="white",
            color=colours[name],
            label=name if r["per_token"] else f"{name} (no per-token log-probs)",
            zorder=3,
        )
    axes[0].set(xscale="log", yscale="log", xlabel="milliseconds")
    axes[0].set_ylabel("gradient error against float64")
    _plain_ticks(axes[0].xaxis)
    axes[0].margins(0.12)
    axes[0].set_title(title, fontsize=10, color=INK)
    _finish(figure, axes, report, path)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... in plain digits instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _finish(figure: Any, axes: Any, report: dict[str, Any], path: Path) -> None:
    axes[-1].legend(
        loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8, labelcolor=INK
    )
    note = machine(report).split(";")[0]
    if report["set"] in REHEARSALS:
        note = f"REHEARSAL, the numbers mean nothing. {note}"
    figure.supxlabel(note, fontsize=7, color="#6b7280")
    figure.savefig(path, dpi=160)
    from matplotlib import pyplot

    pyplot.close(figure)


def main(words: list[str] | None = None) -> int:
    """Tables to a file or the terminal, plots to a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", type=Path, nargs="+", help="JSON of `python -m benchmarks`")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--readme", type=Path, help="write the README's table into it")
    parser.add_argument("--plots", type=Path, help="folder of the pictures")
    a = parser.parse_args(words)
    reports = [load(path) for path in a.files]
    text = markdown(reports)
    if a.readme is not None:
        readme_table.write(reports[0], a.readme)
    elif a.markdown is None:
        print(text)
    if a.markdown is not None:
        a.markdown.write_text(text, encoding="utf-8")
    if a.plots is not None:
        several = len(reports) > 1
        for path, report in zip(a.files, reports, strict=True):
            folder = a.plots / path.stem if several else a.plots
            try:
                print("\n".join(map(str, plot(report, folder))))
            except ImportError as error:
                print(f"no plots: {error}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
