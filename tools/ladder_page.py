"""The memory ladder's three files: JSON, Markdown tables and the figure."""

from __future__ import annotations

import json
import platform
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tools.ladder_rows import Ladder

Records = list[dict[str, Any]]
PACKAGES = ("torch", "transformers", "bitsandbytes", "numpy")


def write(out: Path, ladder: Ladder, measured: Records) -> None:
    """The three files in `out`, rows in the order of the ladder; earlier points stay."""
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"memory-ladder-{ladder.name}"
    records = in_order(ladder, measured + kept_records(Path(f"{stem}.json"), ladder, measured))
    text = json.dumps({"about": about(ladder, records), "records": records}, indent=1)
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    tables = points_table(ladder, records) + "\n" + gains_table(ladder, records)
    Path(f"{stem}.md").write_text(tables, encoding="utf-8")
    if any("measured" in record for record in records):
        picture(ladder, records, Path(f"{stem}.png"))


def about(ladder: Ladder, records: Records) -> dict[str, Any]:
    """Machine, versions, model and command."""
    flag = " --model FOLDER" if ladder.folder else f" --{ladder.name}"
    return {
        "command": "python -m tools.memory_ladder" + flag * (ladder.name != "cpu"),
        "written": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "platform": platform.platform(),
        "devices": sorted({r["device"] for r in records if "device" in r}),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "model": ladder.config,
    }


def device_of(ladder: Ladder) -> str:
    """Name of what is measured, asked in the measuring process: it is the one with a context."""
    if ladder.device == "cuda" and torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        return f"{card.name}, {card.total_memory / 2**30:.1f} GiB"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "cpu")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def kept_records(path: Path, ladder: Ladder, measured: Records) -> Records:
    """Points of an earlier run on the same model that were not measured again."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["about"]["model"] != ladder.config:
        return []
    again = {(r["label"], r["tokens"]) for r in measured}
    return [r for r in earlier["records"] if (r["label"], r["tokens"]) not in again]


def in_order(ladder: Ladder, records: Records) -> Records:
    """Sorted as the rows are, the shortest context first; rows that are no more stay out."""
    place = {row.label: i for i, row in enumerate(ladder.rows)}
    known = [r for r in records if r["label"] in place]
    return sorted(known, key=lambda r: (place[r["label"]], r["tokens"]))


def points_table(ladder: Ladder, records: Records) -> str:
    """Measured peak of every point, and in brackets how far the plan is off."""
    name, _ = ladder.unit
    contexts = sorted({r["tokens"] for r in records})
    found = {(r["label"], r["tokens"]): r for r in records}
    lines = [
        f"| {name} over the loaded model | " + " | ".join(f"{n:,}" for n in contexts) + " |",
        "|---|" + "---:|" * len(contexts),
    ]
    for label in dict.fromkeys(r["label"] for r in records):
        cells = [_point(ladder, found.get((label, n))) for n in contexts]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _point(ladder: Ladder, record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    if "error" in record:
        reason = "out of memory" if "out of memory" in record["error"] else "failed"
        return f"{reason} (plan {_in_units(ladder, record['predicted'])})"
    off = record["predicted"] / record["measured"] - 1
    return f"{_in_units(ladder, record['measured'])} ({off:+.0%})"


def _in_units(ladder: Ladder, size: float) -> str:
    name, unit = ladder.unit
    text = f"{size / unit:,.1f}" if name == "GiB" else f"{size / unit:,.0f}"
    return text if float(text.replace(",", "")) else text.lstrip("-")


def gains_table(ladder: Ladder, records: Records) -> str:
    """What a row needs less than the one it stands over, in units and percent of that one."""
    name, _ = ladder.unit
    found = {(r["label"], r["tokens"]): r for r in records if "measured" in r}
    contexts = sorted({tokens for _, tokens in found})
    lines = [
        f"| row | over | {name} less at "
        + " | ".join(f"{n:,}" for n in contexts)
        + " |\n|---|---|"
        + "---:|" * len(contexts)
    ]
    for row in ladder.rows:
        if row.over is None:
            continue
        pairs = [(found.get((row.over, n)), found.get((row.label, n))) for n in contexts]
        if any(over and record for over, record in pairs):
            cells = [_gain(ladder, *pair) for pair in pairs]
            lines.append(f"| {row.label} | {row.over} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _gain(ladder: Ladder, over: dict[str, Any] | None, record: dict[str, Any] | None) -> str:
    """Measured, its share of the row without the switch, and in brackets what the plan said."""
    if over is None or record is None:
        return "-"
    gain = over["measured"] - record["measured"]
    planned = _in_units(ladder, over["predicted"] - record["predicted"])
    return f"{_in_units(ladder, gain)}, {gain / over['measured']:.0%} ({planned})"


def picture(ladder: Ladder, records: Records, path: Path) -> None:
    """Left: the rows at the longest context that most of them have. Right: growth, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [r for r in records if "measured" in r]
    labels = [row.label for row in ladder.rows if any(r["label"] == row.label for r in found)]
    colour = {label: pyplot.get_cmap("tab10")(i % 10) for i, label in enumerate(labels)}
    figure, (bars, lines) = pyplot.subplots(
        1, 2, figsize=(9, 0.33 * len(labels) + 1.7), width_ratios=(6, 5), dpi=200
    )
    _bars(bars, ladder, found, labels, colour)
    _growth(lines, ladder, found, labels, colour)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _bars(axes: Any, ladder: Ladder, found: Records, labels: list[str], colour: Any) -> None:
    name, unit = ladder.unit
    counts = Counter(r["tokens"] for r in found)
    tokens = max(counts, key=lambda n: (counts[n], n))
    points = [r for r in found if r["tokens"] == tokens]
    most = max(max(r["measured"], r["predicted"]) for r in points) / unit
    for r in points:
        y, size = labels.index(r["label"]), r["measured"] / unit
        axes.barh(y, size, 0.7, color=colour[r["label"]])
        held = r.get("of_it_in_second_place", 0) / unit
        axes.barh(y, held, 0.7, left=size - held, fill=False, hatch="////", edgecolor="w", lw=0)
        end = max(size, r["predicted"] / unit) + 0.02 * most
        axes.text(end, y, _in_units(ladder, r["measured"]), va="center", fontsize=8)
    y = [labels.index(r["label"]) for r in points]
    axes.plot([r["predicted"] / unit for r in points], y, "k|", ms=14, label="the plan")
    if any("of_it_in_second_place" in r for r in points):
        axes.barh(0, 0, color="0.5", hatch="////", edgecolor="w", label="a GPU's host would hold")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * most)
    axes.set_title(f"{tokens:,} tokens: peak over the loaded model, {name}", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _growth(axes: Any, ladder: Ladder, found: Records, labels: list[str], colour: Any) -> None:
    name, unit = ladder.unit
    for label in labels:
        points = [r for r in found if r["label"] == label]
        x, style = [r["tokens"] for r in points], {"color": colour[label], "lw": 1.2}
        axes.plot(x, [r["measured"] / unit for r in points], "o-", ms=3.5, **style)
        axes.plot(x, [r["predicted"] / unit for r in points], "--", **style)
    axes.plot([], [], "o-", color="0.3", ms=3.5, lw=1.2, label="measured")
    axes.plot([], [], "--", color="0.3", lw=1.2, label="the plan")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    contexts = sorted({r["tokens"] for r in found})
    axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(labelsize=8)
    axes.set_title(f"growth, {name}; colours as on the left", fontsize=9)
    axes.set_xlabel("tokens of a micro-batch", fontsize=8.5)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
