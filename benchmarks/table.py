"""Rows as a table: for the terminal while a run goes on, and as Markdown for the README."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

# heading, how to show it
COLUMNS = (
    ("provider", lambda r: r["provider"]),
    ("backend", lambda r: r["backend"] or ""),
    ("ms", lambda r: _number(r["median_ms"])),
    ("± IQR", lambda r: _number(r["spread_ms"])),
    ("x GEMM", lambda r: _number(r["gemm_multiple"], 2)),
    ("TFLOP/s", lambda r: _number(r["tflops"] if r["gemm_ms"] else None)),
    ("units", lambda r: _number(r["units"], 2)),
    ("logits, dW sums in", lambda r: _rounding(r)),
    ("peak MiB", lambda r: _number(r["peak_mib"], 0)),
    ("log-prob error", lambda r: _power(r["logprob_error_nats"])),
    ("gradient error", lambda r: _power(r["gradient_error"])),
)


def _rounding(row: Row) -> str:
    """Where less than float32 is possible."""
    if row["sizes"].get("dtype") in (None, "float32") or row.get("logits_in") is None:
        return ""
    return f"{_short(row['logits_in'])}, {_short(row['sums_in'])}"


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def _number(x: float | None, digits: int | None = None) -> str:
    if x is None:
        return ""
    if digits is None:
        digits = 0 if abs(x) >= 1000 else 1 if abs(x) >= 10 else 2 if abs(x) >= 0.1 else 4
    return f"{x:,.{digits}f}"


def _power(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"


def columns_of(rows: list[Row]) -> list[tuple[str, Any]]:
    """The columns in which some row has something to say."""
    return [(head, show) for head, show in COLUMNS if any(show(r) for r in rows)]


def cells(row: Row, columns: list[tuple[str, Any]]) -> list[str]:
    """A row's text under each heading."""
    return [show(row) for _, show in columns]


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that hold a measurement."""
    return [r for r in rows if r["median_ms"] is not None]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows grouped by (op, case), in the order they were measured."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["case"]), []).append(r)
    return groups


def regime_line(row: Row) -> str:
    """What the rows' softmax is like, the bare GEMM that multiples refer to, and dtypes."""
    parts = []
    masked = row["sizes"].get("masked_fraction")
    if masked:
        parts.append(f"{masked:.0%} of the rows masked (x GEMM and units count them)")
    if row["entropy_nats"] is not None:
        parts.append(f"mean entropy {row['entropy_nats']:.2f} nats")
    if row["active_share"] is not None:
        parts.append(f"{row['active_share']:.2%} of (row, 128 columns) pairs hold mass > 2^-14")
    if row["rows"]:
        parts.append(row["rows"])
    if row["gemm_ms"]:
        parts.append(f"bare logits GEMM {_number(row['gemm_ms'])} ms")
    return "; ".join([", ".join(parts), *_precision(row)]).lstrip("; ")


def _precision(row: Row) -> list[str]:
    """In which dtypes, and over what the errors were taken."""
    dtype, back = row["sizes"].get("dtype"), row.get("gradients_in")
    parts = []
    if back or row.get("sums_in"):
        parts.append(f"inputs {dtype}" + (f", returned {back}" if back else ""))
    if dtype == "float32" and row.get("sums_in"):
        parts[-1] += ", logits and sums of dW float32" if back else ", logits float32"
    if row.get("errors_over") not in (None, "everything"):
        parts.append(f"errors over {row['errors_over']}")
    return parts


def stages_line(row: Row) -> str:
    """The parts of a step: what share the loss stage has, and the memory it needs alone."""
    e = row["extras"]
    if "loss_share" not in e:
        return ""
    return (
        f"{row['provider']}: loss stage {_number(e['loss_ms'])} ms = {e['loss_share']:.0%} of the "
        f"step, its own peak {_number(e['loss_peak_mib'], 0)} MiB"
    )


def terminal(op: str, case: str, rows: list[Row]) -> str:
    """One case as aligned text."""
    done = measured(rows)
    lines = [f"\n{op}: {case}"]
    if done:
        columns = columns_of(done)
        grid = [[head for head, _ in columns], *(cells(r, columns) for r in done)]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines += [f"  ({regime_line(done[0])})"] if regime_line(done[0]) else []
        for line in grid:
            text = [x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in _with(line, widths)]
            lines.append("  " + "  ".join(text).rstrip())
    lines += [f"  {x}" for x in map(stages_line, done) if x]
    lines += [f"  - {r['provider']}: {r['reason']}" for r in rows if r["reason"]]
    return "\n".join(lines)


def _with(line: list[str], widths: list[int]) -> Iterable[tuple[int, tuple[str, int]]]:
    return enumerate(zip(line, widths, strict=True))


def markdown(rows: list[Row]) -> str:
    """Measured rows of one case as a Markdown table; the ones without per-token log-probs apart."""
    parts = []
    for per_token in (True, False):
        chosen = [r for r in measured(rows) if r["per_token"] == per_token]
        if not chosen:
            continue
        if not per_token:
            parts.append("These return no per-token log-probs (a mean, or another loss):\n")
        columns = columns_of(chosen)
        parts.append("| " + " | ".join(head for head, _ in columns) + " |")
        parts.append("|" + "|".join(["---"] * 2 + ["---:"] * (len(columns) - 2)) + "|")
        parts += ["| " + " | ".join(cells(r, columns)) + " |" for r in chosen]
        parts.append("")
    return "\n".join(parts)
