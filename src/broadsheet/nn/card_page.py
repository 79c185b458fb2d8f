"""Cards of features as one page that needs nothing else, and as a figure.

The page has its style in itself, no script and no external request; its content security policy forbids both. Texts and
names are the model's input, so they count as hostile: everything is escaped, and characters that would turn the line
around or cannot be seen are written out.
"""

import html
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from broadsheet.errors import InvalidInput
from broadsheet.nn.cards import Excerpt, FeatureCard

_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Text with what cannot be seen, or would reorder a line, written out; HTML is not escaped here.

    Example:
        >>> visible("a\\nb\\u202ec")
        'a⏎b⟨U+202E⟩c'
    """
    out = []
    for char in text:
        kind = unicodedata.category(char)
        if char in _SHOWN:
            out.append(_SHOWN[char])
        elif kind in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and char != "\u200d":
            out.append(f"⟨U+{ord(char):04X}⟩")
        else:
            out.append(char)
    return "".join(out)


def feature_page(cards: Sequence[FeatureCard], title: str = "Features") -> str:
    """Cards one below the other as an HTML document, for light and dark screens and for paper.

    Args:
        cards: of features from whatever methods.
        title: of the page.

    Returns:
        the document; write it to a file with ``encoding="utf-8"``.
    """
    if not cards:
        raise InvalidInput("cards is empty: hand in at least one card")
    sourced = any(e.sources is not None for card in cards for e in _excerpts(card))
    many = len(cards) > 1
    tokens = sorted({card.tokens for card in cards})
    read = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    deck = f"{len(cards):,} feature{'s' * many}, measured on {read} tokens."
    source_key = '<span class="t s" style="--s:.8">underline: what it was read from</span>' if sourced else ""
    key = f'<p class="key"><span class="t" style="--a:.75">background: how active it is</span> {source_key}</p>'
    index = (
        f'<nav aria-label="Features"><ol>{"".join(map(_entry, range(len(cards)), cards))}</ol></nav>' if many else ""
    )
    body = "".join(_article(i, card) for i, card in enumerate(cards))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{_text(title)}</title><style>{_style()}</style></head><body><main>'
        f"<header><h1>{_text(title)}</h1><p class=deck>{deck}</p>{key}</header>{index}{body}</main></body></html>\n"
    )


def _style() -> str:
    return resources.files("broadsheet.nn").joinpath("card_page.css").read_text(encoding="utf-8")


def _text(value: str) -> str:
    return html.escape(visible(value), quote=True)


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _excerpts(card: FeatureCard) -> list[Excerpt]:
    return [*card.top, *(e for decile in card.deciles for e in decile.examples)]


def _entry(i: int, card: FeatureCard) -> str:
    said = card.description or (", ".join(word.strip() or "␣" for word, _ in card.promoted[:3]))
    return (
        f'<li><a href="#card-{i}"><b>{_text(card.name or card.site)}</b> <span>{_text(said)}</span>'
        f"<i>{_percent(card.density)}</i></a></li>"
    )


def _article(i: int, card: FeatureCard) -> str:
    facts = {
        "active on": _percent(card.density),
        "at most": _number(card.maximum),
        "mean when active": _number(card.mean),
    }
    numbers = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    description = f"<p class=said>{_text(card.description)}</p>" if card.description else ""
    words = ""
    if card.promoted or card.suppressed:
        largest = max(abs(value) for _, value in (*card.promoted, *card.suppressed)) or 1.0
        words = (
            f"<section><h3>Words it raises</h3>{_bars(card.promoted, largest, 'up', quote=True)}</section>"
            f"<section><h3>Words it lowers</h3>{_bars(card.suppressed, largest, 'down', quote=True)}</section>"
        )
    parts = ""
    if card.parts:
        most = max(abs(value) for _, value in card.parts) or 1.0
        parts = f"<section class=wide><h3>Where it comes from</h3>{_bars(card.parts, most, 'part')}</section>"
    if card.top:
        top = f"<section><h3>Most active</h3>{''.join(_excerpt(e, card.maximum) for e in card.top)}</section>"
    else:
        top = "<section><p class=none>It was active on none of these tokens.</p></section>"
    deciles = ""
    if card.deciles:
        tenths = "".join(
            f"<section><h4>{10 * (n - 1)} to {10 * n} % <small>{_number(d.low)} to {_number(d.high)}</small></h4>"
            f"{''.join(_excerpt(e, card.maximum) for e in d.examples)}</section>"
            for n, d in reversed(list(enumerate(card.deciles, 1)))
        )
        deciles = (
            f"<details><summary>Drawn at random, from the strongest tenth to the weakest</summary>{tenths}</details>"
        )
    return (
        f'<article id="card-{i}"><div class=head><h2>{_text(card.name or card.site)}</h2>'
        f"<code>{_text(card.site)}</code></div>{description}<div class=columns><div class=figures><dl>{numbers}</dl>"
        f"{_histogram(card)}<div class=words>{words}</div>{parts}</div>"
        f"<div class=texts>{top}{deciles}</div></div></article>"
    )


def _excerpt(excerpt: Excerpt, maximum: float) -> str:
    most = max((abs(s) for s in excerpt.sources), default=0.0) if excerpt.sources else 0.0
    spans = []
    for i, (token, value) in enumerate(zip(excerpt.tokens, excerpt.values, strict=True)):
        active = min(1.0, max(0.0, value / maximum)) if maximum > 0 else 0.0
        style, kind, tip = [], "t", []
        if active > 0.005:
            style.append(f"--a:{active:.2f}")
            tip.append(f"activation {_number(value)}")
        if excerpt.sources is not None and most > 0 and abs(excerpt.sources[i]) > 0.02 * most:
            kind += " s" if excerpt.sources[i] > 0 else " s n"
            style.append(f"--s:{abs(excerpt.sources[i]) / most:.2f}")
            tip.append(f"gave {_number(excerpt.sources[i])}")
        kind += " at" if i == excerpt.place else ""
        text = _text(token)
        if style or i == excerpt.place:
            title = f' title="{", ".join(tip)}"' if tip else ""
            spans.append(f'<span class="{kind}" style="{";".join(style)}"{title}>{text}</span>')
        else:
            spans.append(text)
    number = f'<b title="text {excerpt.text}">{_number(excerpt.activation)}</b>'
    return f"<p class=excerpt>{number}<bdi>{''.join(spans)}</bdi></p>"


def _bars(rows: Sequence[tuple[str, float]], largest: float, kind: str, quote: bool = False) -> str:
    def row(name: str, value: float) -> str:
        shown = _text(name).replace(" ", "␣") if quote and not name.strip() else _text(name)
        width = f"{100 * min(1.0, abs(value) / largest):.1f}%"
        return f'<li class="{kind}" style="--w:{width}"><span>{shown}</span><em>{_number(value)}</em></li>'

    return f"<ol class=bars>{''.join(row(*pair) for pair in rows)}</ol>"


def _histogram(card: FeatureCard) -> str:
    if not len(card.counts):
        return ""
    width, height = 300, 84
    heights = np.log1p(card.counts) / np.log1p(card.counts.max())
    step = width / len(heights)
    bars = "".join(
        f'<rect x="{n * step:.2f}" y="{height * (1 - h):.2f}" width="{max(step - 1, 0.6):.2f}" '
        f'height="{height * h:.2f}">'
        f"<title>{_number(card.edges[n])} to {_number(card.edges[n + 1])}: {card.counts[n]:,}</title></rect>"
        for n, h in enumerate(heights)
        if h > 0
    )
    ticks = "".join(
        f'<text x="{x:.1f}" y="{height + 14}" text-anchor="{anchor}">{_number(value)}</text>'
        for x, anchor, value in ((0, "start", card.edges[0]), (width, "end", card.edges[-1]))
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="Histogram of activations">{bars}'
        f'<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>{ticks}</svg>'
        "<figcaption>Activations that are not zero; heights on a log scale</figcaption></figure>"
    )


def draw_card(card: FeatureCard, figure: Any = None, texts: int = 8) -> Any:
    """A card as a figure: histogram, words, and the most active texts with their tokens coloured.

    Args:
        card: what to draw.
        figure: matplotlib ``Figure`` or ``SubFigure``; None makes one.
        texts: excerpts at most.
    """
    from matplotlib.figure import Figure

    from broadsheet.nn.plotting import COLOURS, GRID, style

    with style():
        if figure is None:
            figure = Figure(figsize=(11, 4.6))
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 2.5), height_ratios=(1, 1.35))
        histogram = figure.add_subplot(grid[0, 0])
        words, text = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[:, 1])
        if len(card.counts):
            histogram.bar(card.edges[:-1], card.counts, np.diff(card.edges), align="edge", color=COLOURS["ours"])
            histogram.set_yscale("log")
        histogram.set_title(f"active on {_percent(card.density)} of tokens", fontsize=9, fontweight="normal")
        histogram.set_xlabel("activation")
        histogram.set_ylabel("tokens")
        rows = [*card.promoted[:6], *reversed(card.suppressed[:6])] or list(card.parts[:12])
        colours = [COLOURS["ours"] if value > 0 else COLOURS["baseline"] for _, value in rows]
        words.barh(range(len(rows)), [value for _, value in rows], color=colours, height=0.7)
        names = [visible(name).strip().replace("$", r"\$") or "␣" for name, _ in rows]
        words.set_yticks(range(len(rows)), [name[:18] for name in names], fontsize=8)
        words.invert_yaxis()
        words.grid(axis="y", visible=False)
        words.grid(axis="x", color=GRID)
        words.set_xlabel("direct effect on the logit" if card.promoted else "share")
        text.set_axis_off()
        text.set_title(visible(card.description or card.name or card.site).replace("$", r"\$"))
        _draw_texts(text, card, texts)
    return figure


def _draw_texts(ax: Any, card: FeatureCard, texts: int) -> None:
    """Excerpts as lines of a fixed pitch, which is what lets coloured tokens stand side by side."""
    from matplotlib.colors import to_rgba

    from broadsheet.nn.plotting import COLOURS, INK

    columns, line = 84, 1.0
    ax.set_xlim(-9, columns)
    ax.set_ylim(texts * line + 0.2, -0.6)
    for row, excerpt in enumerate(card.top[:texts]):
        shown = [visible(token) for token in excerpt.tokens]
        first, last = _fitting([len(token) for token in shown], excerpt.place, columns)
        ax.text(-1.5, row, _number(excerpt.activation), ha="right", va="center", fontsize=8, color=COLOURS["neutral"])
        x = 0
        most = max((abs(s) for s in excerpt.sources), default=0.0) if excerpt.sources else 0.0
        for i in range(first, last):
            width = len(shown[i])
            value = max(0.0, excerpt.values[i]) / card.maximum if card.maximum > 0 else 0.0
            if value > 0.01:
                ax.axvspan(
                    x, x + width, 1 - (row + 0.96) / (texts + 0.8), 1 - (row + 0.24) / (texts + 0.8), lw=0,
                    color=to_rgba(COLOURS["ours"], 0.6 * min(1.0, value)),
                )  # fmt: skip
            if excerpt.sources is not None and most > 0 and abs(excerpt.sources[i]) > 0.02 * most:
                strength = abs(excerpt.sources[i]) / most
                ax.plot([x, x + width], [row + 0.42] * 2, color=to_rgba(COLOURS["baseline"], strength), lw=2.4)
            for j, char in enumerate(shown[i]):
                weight = "bold" if i == excerpt.place else "normal"
                if not char.isspace():
                    ax.text(
                        x + j + 0.5, row, char.replace("$", r"\$"), ha="center", va="center", fontsize=8.5, color=INK,
                        family="DejaVu Sans Mono", fontweight=weight,
                    )  # fmt: skip
            x += width


def _fitting(widths: Sequence[int], place: int, columns: int) -> tuple[int, int]:
    """The tokens around one that fit into a line, three quarters of it before."""
    first, last, used = place, place + 1, widths[place]
    while first > 0 and used + widths[first - 1] <= columns * 3 // 4:
        first -= 1
        used += widths[first]
    while last < len(widths) and used + widths[last] <= columns:
        used += widths[last]
        last += 1
    return first, last
