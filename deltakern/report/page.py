"""One self-contained HTML page: text, tables, pictures as data URIs, charts as inline SVG. No script, no request to anywhere.

Colours follow the reader's light or dark setting; the layout holds from phone to desk. The same content gives the same bytes.
Everything that is put in as text is escaped; functions here return ready HTML as :class:`Html`, which is not escaped again.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deltakern._extras import require

INK = "#010203"  # matplotlib draws text and axes in it; the page replaces it by its own text colour
PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4")  # legible on white and on near-black

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --ground: #ffffff; --panel: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4b0; --line: #333a43; --ground: #14171b; --panel: #1c2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 3rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.4rem 0 0.6rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; padding-top: 1.1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.1rem 0 0.3rem; }
p { margin: 0.4rem 0 0.8rem; max-width: 50rem; }
.soft, figcaption, caption { color: var(--soft); font-size: 0.88rem; }
a { color: inherit; }
code { font: 0.88em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--panel); padding: 0.1em 0.3em; border-radius: 3px; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 0.4rem; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-size: 0.88rem; color: var(--soft); font-weight: 600; }
td:first-child { min-width: 9.5rem; }
th.number, td.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
.verdict { padding: 0.7rem 1rem; background: var(--panel); border-left: 4px solid #10b981; max-width: 50rem; }
.verdict.bad { border-color: #ef4444; }
.row { display: grid; gap: 0.5rem; margin: 0.35rem 0 0.7rem; align-items: start; }
.row figure { margin: 0; }
.row figcaption { line-height: 1.3; padding-top: 0.15rem; }
.label { color: var(--soft); font-size: 0.88rem; margin: 0.5rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 0.9rem 1.3rem; }
.card .row { gap: 0.25rem; }
.tile { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--panel); }
.pixels { image-rendering: pixelated; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 1rem; }
.charts figure { margin: 0; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
@media (max-width: 560px) {
  h1 { font-size: 1.4rem; }
  .row { gap: 0.25rem; }
  .row.many { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
  th, td { padding-right: 0.45rem; }
  th, th.number { white-space: normal; font-size: 0.75rem; }
  td { font-size: 0.78rem; }
  td:first-child { min-width: 6rem; }
  figcaption, .label, table { font-size: 0.8rem; }
}
"""


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """``value`` as HTML: kept when it is :class:`Html`, escaped otherwise."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def paragraph(text: Any, kind: str = "") -> Html:
    """A paragraph; ``kind`` is a class of the style sheet ("soft", "verdict", "verdict bad", "label")."""
    return Html(f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>")


def link(url: str, text: str | None = None) -> Html:
    """A link."""
    return Html(f'<a href="{html.escape(url)}">{escape(text or url)}</a>')


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, caption: str = "", numbers: Sequence[int] = ()) -> Html:
    """A table that scrolls sideways by itself where the window is narrow.

    Args:
        header: titles of the columns.
        rows: cells, as many in each row.
        caption: below the table.
        numbers: indices of the columns that are set flush right.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table: a row has {len(row)} cells, the header {len(header)}: {row!r}")

    def line(cells: Sequence[Any], tag: str) -> str:
        return "".join(f"<{tag}{' class=number' if i in numbers else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(f'<div class="scroll"><table>{below}<thead><tr>{line(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>')


def data_uri(image: torch.Tensor) -> str:
    """A PNG as a data URI, from uint8 (3,H,W) or (H,W)."""
    if image.dtype != torch.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[0] != 3):
        raise ValueError(f"data_uri: image must be uint8 (3,H,W) or (H,W), got {image.dtype} {tuple(image.shape)}")
    pillow = require("PIL.Image", "demo", "writing pictures")
    array = image.cpu().numpy() if image.ndim == 2 else image.permute(1, 2, 0).contiguous().cpu().numpy()
    out = io.BytesIO()
    pillow.fromarray(array).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def picture(image: torch.Tensor, caption: str = "", *, pixels: bool = False, alt: str = "") -> Html:
    """A picture with its caption; ``pixels`` shows a small map enlarged without smoothing."""
    kind = "tile pixels" if pixels else "tile"
    height, width = image.shape[-2:]
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    shown = f'<img class="{kind}" width="{width}" height="{height}" alt="{html.escape(alt or caption)}" src="{data_uri(image)}">'
    return Html(f"<figure>{shown}{below}</figure>")


def row(pictures: Sequence[Html], label: str = "", *, columns: int | None = None) -> Html:
    """Pictures side by side in equal columns, under a label. ``columns`` keeps rows of different length aligned."""
    above = f'<p class="label">{escape(label)}</p>' if label else ""
    count = columns or len(pictures)
    kind = "row many" if count > 4 else "row"  # on a phone four abreast
    return Html(f'{above}<div class="{kind}" style="grid-template-columns: repeat({count}, minmax(0, 1fr))">{"".join(pictures)}</div>')


def card(title: str, *content: Html) -> Html:
    """Content under a title, to be put among :func:`cards`."""
    return Html(f'<div class="card"><p class="label">{escape(title)}</p>{"".join(content)}</div>')


def cards(each: Sequence[Html]) -> Html:
    """Cards in as many columns as the window has room for."""
    return Html(f'<div class="cards">{"".join(each)}</div>')


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    levels: Mapping[str, float] | None = None,
    log: bool = False,
) -> Html:
    """A line chart as inline SVG.

    Args:
        series: name to (xs, ys).
        title, x, y: text above the chart and at its axes.
        levels: name to a height at which a dashed line is drawn across.
        log: logarithmic y axis.
    """
    matplotlib = require("matplotlib", "demo", "drawing charts")
    figure_of = require("matplotlib.figure", "demo", "drawing charts").Figure
    # A salt of its own keeps ids of several charts in one page apart, and the same from run to run.
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    with matplotlib.rc_context(style):
        figure = figure_of(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for (name, (xs, ys)), colour in zip(series.items(), PALETTE * len(series), strict=False):
            axes.plot(list(xs), list(ys), label=name, color=colour, linewidth=1.3)
        for (name, height), colour in zip((levels or {}).items(), PALETTE[::-1] * len(levels or {}), strict=False):
            axes.axhline(height, label=name, color=colour, linewidth=1.2, linestyle="--")
        if log:
            axes.set_yscale("log")
        if all(float(place).is_integer() for xs, _ in series.values() for place in xs):
            axes.xaxis.set_major_locator(require("matplotlib.ticker", "demo", "drawing charts").MaxNLocator(integer=True))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_title(title, fontsize=10)
        axes.grid(color="#808080", alpha=0.25, linewidth=0.6)
        if len(series) + len(levels or {}) > 1:
            axes.legend(frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    return Html(f'<figure role="img" aria-label="{html.escape(title)}">{drawn}</figure>')


def charts(*drawn: Html) -> Html:
    """Charts side by side where there is room."""
    return Html(f'<div class="charts">{"".join(drawn)}</div>')


class Page:
    """A page under construction: a title, a lead, then sections."""

    def __init__(self, title: str, lead: Any = "") -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._parts.append(paragraph(lead))

    def add(self, *parts: Html) -> None:
        """Appends HTML to the current section."""
        for part in parts:
            if not isinstance(part, Html):
                raise TypeError(f"Page.add: takes Html (see paragraph, table, picture), got {type(part).__name__}")
            self._parts.append(part)

    def section(self, title: str, *parts: Html) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        self.add(*parts)

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page, making its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path
