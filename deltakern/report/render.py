"""A report as data, and that data as JSON, Markdown, terminal tables and one self-contained HTML page with charts.

Everything shown is drawn from the dictionary that :func:`build` makes and ``report.json`` holds; nothing is measured here.
"""

from __future__ import annotations

import datetime
import html
import io
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltakern._extras import require
from deltakern.report import flops, page, stages
from deltakern.report.rows import Row

SCHEMA = 1
Table = tuple[str, list[str], list[list[str]], str]  # title, header, rows, what to know about it
FRAME_SIZES = (512, 256)


# --- numbers as text -------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """``value`` to so many significant digits, thousands separated: 1.23, 31,300."""
    if value == 0 or value != value:
        return "0" if value == 0 else "nan"
    rounded = float(f"{value:.{digits}g}")
    places = max(0, digits - 1 - int(f"{abs(rounded):e}".partition("e")[2]))
    return f"{rounded:,.{places}f}"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    size, unit = next(((s, u) for s, u in units if abs(value) >= s * 0.9995), units[-1])
    return f"{number(value / size)} {unit}"


def seconds(value: float | None) -> str:
    """A time, "12.3 ms"; "" for None."""
    return "" if value is None else _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))


def bytes_(value: float | None) -> str:
    """An amount of memory in powers of 1024; "" for None."""
    return "" if value is None else _scaled(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")))


def times(value: float | None, digits: int = 3) -> str:
    """A ratio, "2.31x"; exactly one is "1x", None is ""."""
    return "" if value is None else "1x" if value == 1 else f"{number(value, digits)}x"


def rate(value: float, what: str) -> str:
    """A rate, as "1.23 TB/s" with ``what`` "B/s"."""
    return _scaled(value, ((1e12, f"T{what}"), (1e9, f"G{what}"), (1e6, f"M{what}"), (1, what)))


def gflop(value: float) -> str:
    """FLOPs as GFLOP: to the hundredth below ten thousand, else whole."""
    value /= 1e9
    return f"{value:,.0f}" if value >= 1e4 else f"{value:,.2f}" if value >= 1 else number(value, 3)


# --- the data ----------------------------------------------------------------------------------------------------------------


def build(
    rows: Iterable[Row], *, preset: str, parts: Sequence[str], notes: Sequence[str] = (), where: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The report: closed forms, systems, and rows, ready for JSON.

    Args:
        rows: measurements.
        preset: name of the sizes that were run, or of where the rows come from.
        parts: which of "flops", "latency", "memory", "accuracy" the report is about.
        notes: what could not be measured, in words.
        where: machine and versions of this run.
    """
    tables = {}
    if "flops" in parts:
        tables = {
            "conventions": "2 per multiply-add; linear layers, patch embedding, QK^T and PV; GFLOP = 1e9",
            "pieces": {str(size): flops.pieces(size, size) for size in FRAME_SIZES},
            "parameters": flops.parameters(),
            "systems": {str(size): [asdict(s) for s in flops.systems(size)] for size in FRAME_SIZES},
            "claims": flops.claims(),
            "dinoworld_attention": {str(size): flops.CROPS * flops.dinoworld_attention(size, size) for size in FRAME_SIZES},
        }
    return {
        "schema": SCHEMA,
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "preset": preset,
        "parts": list(parts),
        "where": where or {},
        "notes": list(notes),
        "flops": tables,
        "rows": [asdict(row) for row in rows],
    }


def _of(report: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["kind"] == kind]


def _devices(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["where"].get("device", "") for row in report["rows"]))


def machine_ceilings(report: dict[str, Any], device: str) -> dict[str, float]:
    """The device's ceilings by name, "copy" and "gemm", a second."""
    found = (row for row in _of(report, "ceiling") if row["where"].get("device", "") == device)
    return {row["name"]: row["figures"]["per_second"] for row in found}


def side_by_side(report: dict[str, Any], kind: str) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """Rows of one kind, those of a measurement side by side: (device, name, case, dtype, shape) to implementation to row."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in _of(report, kind):
        key = (row["where"].get("device", ""), row["name"], row["case"], row["dtype"], json.dumps(row["shape"], sort_keys=True))
        found.setdefault(key, {})[row["impl"]] = row
    return found


def stage_name(name: str, shape: dict[str, Any], preset: str = "") -> str:
    """A stage with its batch, where that is more than one clip, and with its preset if given."""
    batched = f"{name}, batch {shape['batch']}" if shape.get("batch", 1) > 1 else name
    return f"{batched}, {preset}" if preset else batched


def _presets(report: dict[str, Any]) -> set[str]:
    return {row["case"] for row in _of(report, "model")}


def _several(report: dict[str, Any]) -> bool:
    return len(_devices(report)) > 1


# --- tables ------------------------------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> list[Table]:
    """Every table of the report, as text cells."""
    made: list[Table] = []
    for build_one in (_systems, _pieces, _stage_latency, _stage_memory, _op_latency, _accuracy):
        made += build_one(report)
    return [_without_empty_columns(t) for t in made if t[2]]


def _without_empty_columns(table: Table) -> Table:
    title, header, rows, about = table
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return title, [header[i] for i in kept], [[row[i] for i in kept] for row in rows], about


def _systems(report: dict[str, Any]) -> list[Table]:
    made: list[Table] = []
    for size, systems in report["flops"].get("systems", {}).items():
        rows = []
        for s in systems:
            paper = "" if s["paper_gflop"] is None else number(s["paper_gflop"], 4)
            own = "as published" if s["published"] else number(s["gflop"], 5)
            rows.append(
                [
                    s["name"],
                    "not published" if s["tokens"] is None else f"{s['tokens']:,}",
                    times(s["token_ratio"], 4),
                    f"{s['parameters'] / 1e9:,.3f}".rstrip("0").rstrip(".") + " B",
                    times(s["parameter_ratio"]),
                    own,
                    paper,
                    times(s["flops_ratio"], 4),
                ]
            )
        header = ["system", "tokens a frame", "tokens, ratio", "parameters", "parameters, ratio", "GFLOP, computed", "GFLOP, paper"]
        header += ["FLOPs, ratio"]
        about = (
            "Forecast of 3 frames from 4, two square crops; ratios are to DeltaWorld. DeltaWorld: 20 samples, each decoded at every step."
        )
        if any(s["published"] for s in systems):
            found = report["flops"]["claims"]
            most = number(found["FLOPs, Cosmos-12B"], 1)
            about += (
                " Cosmos: as published (arXiv 2604.04913), tokenizer and prefill not counted, parameters without the 7B diffusion decoder."
                f" So the project page's {times(found['tokens a frame, DINO-world'], 4)} fewer tokens,"
                f" {int(found['parameters, Cosmos-12B'])}x fewer parameters and {most}x fewer FLOPs."
            )
        dense = next((s for s in systems if s["name"] == "DINO-world" and s["paper_gflop"]), None)
        if dense is not None:
            twice = dense["gflop"] + report["flops"]["dinoworld_attention"][size] / 1e9
            about += (
                f" DINO-world: the paper's {number(dense['paper_gflop'], 3)} is not reached by any reading of the model;"
                f" with the predictor's attention counted twice it would be {number(twice, 4)}."
            )
        made.append((f"Systems at {size} x {size}", header, rows, about))
    return made


def _pieces(report: dict[str, Any]) -> list[Table]:
    pieces = report["flops"].get("pieces", {})
    if not pieces:
        return []
    sizes = list(pieces)
    rows = [[name, *(gflop(pieces[size][name]) for size in sizes)] for name in pieces[sizes[0]]]
    return [
        (
            "FLOPs of the released models, in closed form",
            ["piece", *(f"GFLOP, {s} px" for s in sizes)],
            rows,
            report["flops"]["conventions"],
        )
    ]


def _stage_latency(report: dict[str, Any]) -> list[Table]:
    rows, several = [], _several(report)
    for (device, stage, case, dtype, shape), impls in side_by_side(report, "model").items():
        name = stage_name(stage, json.loads(shape), case if len(_presets(report)) > 1 else "")
        timed = {impl: row for impl, row in impls.items() if row["seconds"] is not None}
        base = timed.get(stages.RELEASE, {}).get("seconds")
        for impl, row in timed.items():
            extra = [f"{row['figures']['kernels']:.0f} kernels"] if "kernels" in row["figures"] else []
            extra += [f"together {seconds(row['figures']['kernel_seconds'])}"] if "kernel_seconds" in row["figures"] else []
            extra += [f"launching {seconds(row['figures']['launch_seconds'])}"] if "launch_seconds" in row["figures"] else []
            extra += [f"as a graph {seconds(row['figures']['graph_seconds'])}"] if "graph_seconds" in row["figures"] else []
            ours = base / row["seconds"] if base and impl != stages.RELEASE else None
            rows.append(
                [
                    *([device] if several else []),
                    name,
                    impl,
                    dtype,
                    seconds(row["seconds"]),
                    times(ours),
                    f"{seconds(row['low'])} to {seconds(row['high'])}",
                    str(row["rounds"]),
                    rate(row["figures"]["flops"] / row["seconds"], "FLOP/s") if "flops" in row["figures"] else "",
                    ", ".join(extra),
                ]
            )
    header = [*(["device"] if several else []), "stage", "implementation", "dtype", "median"]
    header += ["against release (eager)", "10% to 90%", "rounds", "rate", "launches"]
    about = (
        "Implementations take turns in one run, batch of one clip. The rate counts the FLOPs that the implementation itself has to do, "
        "so work left out is not in it. A training step is forward, backward, clipping and AdamW."
    )
    measured = {(row["name"], row["impl"]) for row in _of(report, "model") if row["seconds"] is not None}
    compiled = {name for name, impl in measured if impl == stages.RELEASE_COMPILED}
    if compiled and "rollout" not in compiled and ("rollout", stages.RELEASE) in measured:
        about += " The rollout is not measured under torch.compile with this preset on a CPU; its parts are."
    return [("Latency by stage", header, _once(rows, 2 if several else 1), about)]


def _stage_memory(report: dict[str, Any]) -> list[Table]:
    rows, several = [], _several(report)
    for (device, stage, case, dtype, shape), impls in side_by_side(report, "model").items():
        name = stage_name(stage, json.loads(shape), case if len(_presets(report)) > 1 else "")
        base = impls.get(stages.RELEASE, {}).get("figures", {}).get("peak_bytes")
        for impl, row in impls.items():
            peak = row["figures"].get("peak_bytes")
            if peak is None:
                continue
            ratio = times(peak / base) if base and impl != stages.RELEASE else ""
            rows.append([*([device] if several else []), name, impl, dtype, bytes_(peak), ratio])
    header = [*(["device"] if several else []), "stage", "implementation", "dtype", "peak", "against release (eager)"]
    return [
        (
            "Peak memory by stage",
            header,
            _once(rows, 2 if several else 1),
            "The most that one call holds in tensors at a time, beyond weights and inputs.",
        )
    ]


def _op_latency(report: dict[str, Any]) -> list[Table]:
    rows, several = [], _several(report)
    for (device, name, case, dtype, shape), impls in side_by_side(report, "op").items():
        best, sizes = machine_ceilings(report, device), json.loads(shape)
        base = impls.get("reference", {}).get("seconds")
        for impl, row in impls.items():
            moved = row["figures"].get("bytes")
            speed = moved / row["seconds"] if moved else None
            share = f"{100 * speed / best['copy']:.0f}%" if speed and "copy" in best else ""
            rows.append(
                [
                    *([device] if several else []),
                    f"{name} {case}",
                    sizes.get("pass", "forward"),
                    impl,
                    dtype,
                    seconds(row["seconds"]),
                    times(base / row["seconds"]) if base and impl != "reference" else "",
                    share,
                    f"{seconds(row['low'])} to {seconds(row['high'])}",
                    "" if speed is None else rate(speed, "B/s"),
                    "" if sizes.get("scale", 1) == 1 else number(sizes["scale"]),
                ]
            )
    header = [*(["device"] if several else []), "op and case", "pass", "implementation", "dtype", "median"]
    header += ["against reference", "of copy", "10% to 90%", "bandwidth", "scale"]
    about = (
        "Bandwidth counts every input and output once; what fits a cache may pass copy. A case is shrunk by the scale where the "
        "machine is small. Every implementation was held to float64 before it was timed; a wrong one has no row."
    )
    return [("Ops", header, _once(rows, 3 if several else 2), about)]


def _accuracy(report: dict[str, Any]) -> list[Table]:
    rows, several = [], _several(report)
    for row in _of(report, "accuracy"):
        figures = row["figures"]
        rows.append(
            [
                *([row["where"].get("device", "")] if several else []),
                row["name"],
                row["impl"],
                row["dtype"],
                f"{figures['error']:.1e}" if "error" in figures else "",
                f"{figures['plain']:.1e}" if "plain" in figures else "",
                "yes" if figures["ok"] else "NO",
            ]
        )
    header = [*(["device"] if several else []), "op or model", "implementation", "dtype", "error", "plain PyTorch's", "within the rule"]
    about = (
        "Relative RMS error against float64, the worst of outputs and gradients over the op's small cases. The rule: at most twice "
        "plain PyTorch's in the same dtype, plus one eps."
    )
    return [("Error against float64", header, _once(rows, 2 if several else 1), about)]


def heading(report: dict[str, Any]) -> str:
    """When the report was made, of which sizes, and where with what: of this run, or of every machine whose rows were read."""
    measured = [report["where"]] if report["where"] else [row["where"] for row in report["rows"]]

    def values(key: str, among: Sequence[dict[str, Any]] = measured) -> list[str]:
        return [str(value) for value in dict.fromkeys(where.get(key) for where in among) if value]

    said = [report["made"], f"preset {report['preset']}" if report["where"] else report["preset"]]
    said += [f"deltakern {', '.join(values('deltakern'))}"] if values("deltakern") else []
    for device in values("device") or [""]:
        commits = values("commit", [where for where in measured if where.get("device", "") == device])
        said.append(" at ".join(filter(None, (device, ", ".join(commits)))))
    for key, label in (("driver", "driver"), ("torch", "torch"), ("triton", "triton"), ("python", "Python"), ("threads", "threads")):
        said += [f"{label} {', '.join(values(key))}"] if values(key) else []
    return " · ".join(filter(None, said))


def _numbers(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Columns of numbers, some of which may be missing or not published."""
    return [i for i in range(1, len(header)) if all(re.match(r"$|\d|(not|as) published$", row[i]) for row in rows)]


def _once(rows: list[list[str]], columns: int) -> list[list[str]]:
    """The first cells are left empty where they repeat the row above."""
    shown = []
    for i, row in enumerate(rows):
        same = i > 0 and row[:columns] == rows[i - 1][:columns]
        shown.append([*([""] * columns if same else row[:columns]), *row[columns:]])
    return shown


# --- Markdown, JSON, terminal --------------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# deltakern report", heading(report)]
    parts += [f"> {note}" for note in report["notes"]]
    for title, header, rows, about in tables(report):
        parts += [f"## {title}", markdown_table(header, rows), about]
    return "\n\n".join(parts) + "\n"


LEAST = ("parameters, ratio", "tokens, ratio", "rounds", "scale", "launches", "10% to 90%", "rate", "plain PyTorch's", "bandwidth")
"""Columns that a narrow terminal does without, the first ones first; files have them all."""
FIRST = 20  # characters that a first column may be narrowed to


def _by_device(table: Table) -> list[tuple[str, Table]]:
    """A table taken apart: one for each device, and what is the same in all its rows in its title. What it says of itself comes last."""
    title, header, rows, about = table
    groups: dict[str, list[list[str]]] = {}
    if header[0] == "device":
        device = ""
        for row in rows:
            device = row[0] or device
            groups.setdefault(device, []).append(row[1:])
        header = header[1:]
    else:
        groups[""] = rows
    made = []
    for device, lines in groups.items():
        same = [i for i, name in enumerate(header) if name in ("dtype", "pass") and len({line[i] for line in lines} - {""}) == 1]
        named = ", ".join(filter(None, [device, *(lines[0][i] for i in same)]))
        kept = [i for i in range(len(header)) if i not in same]
        last = about if len(made) == len(groups) - 1 else ""
        cells = [[line[i] for i in kept] for line in lines]
        made.append((device, (f"{title}: {named}" if named else title, [header[i] for i in kept], cells, last)))
    return made


def _narrowed(header: list[str], rows: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """Without the columns that matter least, as many as it takes for the rest to be read; titles are broken where they are wide."""
    widths = [max(len(cell) for cell in [*name.split(), *(row[i] for row in rows)]) for i, name in enumerate(header)]

    def needed(kept: Sequence[int]) -> int:
        return min(widths[0], FIRST) + sum(widths[i] for i in kept[1:]) + 3 * len(kept)

    kept = list(range(len(header)))
    for name in LEAST:
        for i in [i for i in kept if header[i] == name]:
            if needed(kept) > width:
                kept.remove(i)
    titles = ["\n".join(textwrap.wrap(header[i], max(widths[i], 9))) for i in kept]
    return titles, [[row[i] for i in kept] for row in rows]


def print_tables(report: dict[str, Any]) -> None:
    """The report in the terminal, in as many columns as it has room for."""
    rich_console, rich_table, rich_box = (require(f"rich.{m}", "report", "printing tables") for m in ("console", "table", "box"))
    console = rich_console.Console()
    for title, header, rows, about in (part for table in tables(report) for _, part in _by_device(table)):
        header, rows = _narrowed(header, rows, console.width)
        style = {"title_justify": "left", "caption_justify": "left", "header_style": "bold", "box": rich_box.SIMPLE_HEAD, "pad_edge": False}
        shown = rich_table.Table(title=title, caption=about or None, **style)
        for i, column in enumerate(header):
            numeric = i in _numbers(header, rows)
            wraps = i == 0 or column == "launches"
            shown.add_column(column, justify="right" if numeric else "left", no_wrap=not wraps, overflow="fold")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()
    for note in report["notes"]:
        console.print(note, style="yellow", markup=False)


# --- charts --------------------------------------------------------------------------------------------------------------------

COLOURS = {
    stages.RELEASE: "#8b95a1",
    stages.RELEASE_COMPILED: "#f97316",
    stages.RELEASE_BLOCKS: "#fb923c",
    stages.REFERENCE: "#06b6d4",
    stages.OURS: "#3b82f6",
    stages.LIVE: "#a855f7",
    stages.OURS_COMPILED: "#a855f7",
    stages.ONE_FUTURE: "#10b981",
    "reference": "#8b95a1",
    "reference (torch.compile)": "#f97316",
    "triton": "#3b82f6",
    "cuda": "#10b981",
    "cpp": "#10b981",
}


def _svg(title: str, draw: Callable[[Any], None], *, width: float = 4.8, height: float = 3.0, columns: int = 2) -> page.Html:
    """A matplotlib chart as inline SVG in the page's colours."""
    matplotlib = require("matplotlib", "report", "drawing charts")
    make = require("matplotlib.figure", "report", "drawing charts").Figure
    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids that differ between the charts of a page, and not from run to run
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(ink, page.INK),
    }
    with matplotlib.rc_context(style):
        figure = make(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, frameon=False, fontsize=7, loc="outside lower left", ncols=columns)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(page.INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    return page.Html(f'<figure role="img" aria-label="{html.escape(title)}" style="max-width: 40rem">{drawn}</figure>')


def _grouped_bars(
    title: str, groups: dict[str, dict[str, float]], label: str, text: Callable[[float], str], colours: dict[str, str] = COLOURS
) -> page.Html:
    """Horizontal bars on a log axis: name of the group to name of the bar to value."""

    def draw(axes: Any) -> None:
        position, ticks = 0.0, []
        seen: set[str] = set()
        for name, bars in groups.items():
            ticks.append((position + (len(bars) - 1) / 2, name))
            for bar, value in bars.items():
                axes.barh(position, value, height=0.85, color=colours.get(bar, "#64748b"), label=None if bar in seen else bar)
                axes.annotate(text(value), (value, position), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
                seen.add(bar)
                position += 1
            position += 0.8
        axes.set_xscale("log")
        values = [v for bars in groups.values() for v in bars.values() if v > 0]
        axes.set_xlim(min(values) / 3, max(values) * 6)
        axes.set_yticks([t for t, _ in ticks], [textwrap.fill(n, 17) for _, n in ticks], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#808080", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)

    bars = sum(len(g) for g in groups.values())
    return _svg(title, draw, height=1.3 + 0.19 * bars + 0.15 * len(groups))


def _halves(groups: dict[str, Any]) -> list[dict[str, Any]]:
    """Long charts in two, so that they stand side by side."""
    names = list(groups)
    if len(names) <= 5:
        return [groups]
    middle = (len(names) + 1) // 2
    return [{n: groups[n] for n in part} for part in (names[:middle], names[middle:])]


def _stage_groups(
    report: dict[str, Any], device: str, value: Callable[[dict[str, Any]], float | None]
) -> dict[str, dict[str, dict[str, float]]]:
    """By preset and dtype: stage to implementation to value."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (where, stage, case, dtype, shape), impls in side_by_side(report, "model").items():
        name = stage_name(stage, json.loads(shape))
        bars = {impl: v for impl, row in impls.items() if (v := value(row))}
        if where == device and bars:
            found.setdefault(f"{case}, {dtype}", {})[name] = bars
    return found


def _latency_charts(report: dict[str, Any], device: str) -> list[page.Html]:
    made = []
    for preset, groups in _stage_groups(report, device, lambda row: row["seconds"]).items():
        for i, part in enumerate(_halves(groups)):
            milliseconds = {n: {k: 1e3 * v for k, v in bars.items()} for n, bars in part.items()}
            title = f"Latency by stage ({preset})" + (", continued" if i else "")
            made.append(_grouped_bars(title, milliseconds, "milliseconds a call", lambda v: seconds(v / 1e3)))
    return made


def _memory_charts(report: dict[str, Any], device: str) -> list[page.Html]:
    made = []
    for preset, groups in _stage_groups(report, device, lambda row: row["figures"].get("peak_bytes")).items():
        for i, part in enumerate(_halves(groups)):
            mebibytes = {n: {k: v / 2**20 for k, v in bars.items()} for n, bars in part.items()}
            title = f"Peak memory by stage ({preset})" + (", continued" if i else "")
            made.append(_grouped_bars(title, mebibytes, "MiB", lambda v: bytes_(v * 2**20)))
    return made


def _systems_charts(report: dict[str, Any]) -> list[page.Html]:
    made = []
    colours = {"computed here": "#3b82f6", "paper": "#8b95a1"}
    for size, systems in report["flops"].get("systems", {}).items():
        groups = {}
        for s in systems:
            bars = {} if s["published"] else {"computed here": s["gflop"]}
            groups[s["name"]] = {**bars, **({"paper": s["paper_gflop"]} if s["paper_gflop"] else {})}
        made.append(_grouped_bars(f"FLOPs of a forecast, {size} x {size}", groups, "GFLOP", lambda v: number(v, 3), colours))
    return made


def _roofline(report: dict[str, Any], device: str) -> list[page.Html]:
    """Every op below what copy bandwidth and matrix rate allow; the best implementation filled, the reference hollow."""
    ceilings = machine_ceilings(report, device)
    groups = {}
    for (where, name, case, dtype, shape), impls in side_by_side(report, "op").items():
        if where == device and json.loads(shape).get("pass", "forward") == "forward":
            groups[(name, case, dtype)] = {i: r for i, r in impls.items() if r["figures"].get("flops") and r["figures"].get("bytes")}
    groups = {k: v for k, v in groups.items() if v}
    if not groups or not ceilings.keys() >= {"copy", "gemm"}:
        return []
    ops = list(dict.fromkeys(name for name, _, _ in groups))
    colour = dict(zip(ops, page.PALETTE * len(ops), strict=False))
    marks = dict(zip(ops, "osD^vPX*hp" * len(ops), strict=False))

    def draw(axes: Any) -> None:
        points, named = [], set()
        for (name, _, _), impls in groups.items():
            best = min(impls, key=lambda i: impls[i]["seconds"])
            for impl in {"reference", best} & set(impls):
                row = impls[impl]
                at = (row["figures"]["flops"] / row["figures"]["bytes"], row["figures"]["flops"] / row["seconds"])
                points.append(at)
                filled = impl == best
                axes.plot(
                    *at,
                    marks[name],
                    markersize=5.5,
                    markeredgecolor=colour[name],
                    markerfacecolor=colour[name] if filled else "none",
                    label=name if filled and name not in named else None,
                    alpha=0.9,
                )
                if filled:
                    named.add(name)
        low, high = min(p[0] for p in points) / 4, max(max(p[0] for p in points), ceilings["gemm"] / ceilings["copy"]) * 4
        knee = ceilings["gemm"] / ceilings["copy"]
        axes.plot([low, knee, high], [low * ceilings["copy"], ceilings["gemm"], ceilings["gemm"]], color="#ef4444", linewidth=1.2)
        axes.annotate(
            f"copy {rate(ceilings['copy'], 'B/s')}",
            (low * 2, low * 2 * ceilings["copy"]),
            fontsize=7,
            xytext=(7, -7),
            textcoords="offset points",
        )
        axes.annotate(
            f"matrix product {rate(ceilings['gemm'], 'FLOP/s')}",
            (high, ceilings["gemm"]),
            fontsize=7,
            ha="right",
            xytext=(0, 4),
            textcoords="offset points",
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOP a byte")
        axes.set_ylabel("FLOP a second")
        axes.grid(color="#808080", alpha=0.25, linewidth=0.6)

    return [_svg("Roofline: filled the fastest, hollow the reference", draw, height=4.4, columns=3)]


def _accuracy_charts(report: dict[str, Any], device: str) -> list[page.Html]:
    made = []
    for dtype in ("float32", "bfloat16"):
        groups: dict[str, dict[str, float]] = {}
        for row in _of(report, "accuracy"):
            if row["where"].get("device", "") == device and row["dtype"] == dtype and row["figures"].get("error"):
                groups.setdefault(row["name"], {})[row["impl"]] = row["figures"]["error"]
        if groups:
            made.append(_grouped_bars(f"Error against float64, {dtype}", groups, "relative RMS error", lambda v: f"{v:.0e}"))
    return made


# --- the page ------------------------------------------------------------------------------------------------------------------


def html_page(report: dict[str, Any]) -> page.Page:
    """The report as one page that needs nothing else."""
    made = page.Page("deltakern report", heading(report))
    for note in report["notes"]:
        made.add(page.paragraph(note, "verdict bad"))
    found = {table[0]: table for table in tables(report)}

    def shown(table: Table) -> list[page.Html]:
        _, header, rows, about = table
        drawn = [page.table(header, rows, numbers=_numbers(header, rows))]
        return [*drawn, page.paragraph(about, "soft")] if about else drawn  # beside the table, which may scroll sideways

    charts = {
        "Latency by stage": _latency_charts,
        "Peak memory by stage": _memory_charts,
        "Ops": _roofline,
        "Error against float64": _accuracy_charts,
    }
    for size in report["flops"].get("systems", {}):
        title = f"Systems at {size} x {size}"
        made.section(title, *shown(found[title]))
    if report["flops"]:
        made.add(page.charts(*_systems_charts(report)))
        title = "FLOPs of the released models, in closed form"
        made.section(title, *shown(found[title]))
    for title, draw in charts.items():
        if title not in found:
            continue
        made.section(title)
        for device, table in _by_device(found[title]):
            drawn = draw(report, device or _devices(report)[0])
            named = table[0].partition(": ")[2]
            made.add(*([page.paragraph(named, "label")] if named else []), *([page.charts(*drawn)] if drawn else []), *shown(table))
    return made


def write(report: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes ``report.json``, ``report.md`` and ``report.html``; returns their paths by suffix."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {suffix: folder / f"report.{suffix}" for suffix in ("json", "md", "html")}
    paths["json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    paths["md"].write_text(markdown(report), encoding="utf-8")
    html_page(report).write(paths["html"])
    return paths
