"""Templates and what they say about the world: dates, names, numbers, mathematics, code."""

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from xml.etree.ElementTree import Element

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from broadsheet.feed.social import render_markdown
from broadsheet.lab.report import number

STATIC = Path(__file__).parent / "static"

# Between dollars, neither opening nor closing on a space, so that "from $5 to $10" stays money; bounded, so that no
# text makes the search slow.
_MATH = re.compile(
    r"\$\$(?P<block>[^$]{1,600})\$\$"
    r"|\$(?P<line>(?!\s)[^$]{1,400}(?<!\s))\$(?!\d)"
    r"|\\\((?P<paren>[^$]{1,400}?)\\\)"
)
_MATHML = {
    *("math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "msub", "msup", "msubsup", "munder", "mover", "munderover"),
    *("mfrac", "msqrt", "mroot", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose"),
}
_MATH_ATTRIBUTES = {"stretchy", "accent", "accentunder", "fence", "form", "separator", "mathvariant", "linethickness"}


def paper_path(paper_id: str) -> str:
    """Where a paper's page is."""
    return f"/papers/{quote(paper_id)}"


def path_with(path: str, **query: Any) -> str:
    """A path with the parts of a query that are not empty."""
    given = {key: value for key, value in query.items() if value not in (None, "", False)}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path


@cache
def asset(name: str) -> str:
    """The address of a shipped file; it changes with the file, so that browsers may keep it for ever."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:10]
    return f"/static/{name}?v={digest}"


def long_date(value: date | datetime | None) -> str:
    """ "8 December 2025"."""
    return "" if value is None else f"{value.day} {value:%B %Y}"


def iso(value: date | datetime | None) -> str:
    """A moment as feeds and ``<time>`` want it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds")
    return "" if value is None else value.isoformat()


def names(authors: Sequence[str], n_authors: int = 0, most: int = 3) -> str:
    """Authors in a line: "A, B and C", "A, B, C and 9 more", or how many where none is named."""
    count = max(n_authors, len(authors))
    if not authors:
        return f"{count} author{'' if count == 1 else 's'}" if count else ""
    shown = list(authors[:most])
    if count > len(shown):
        return f"{', '.join(shown)} and {count - len(shown)}\u00a0more"  # the number stays with its word
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 vote", "2 votes"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def shorten(text: str, most: int) -> str:
    """The text, or its beginning up to a whole word and an ellipsis."""
    if len(text) <= most:
        return text
    return text[:most].rsplit(" ", 1)[0].rstrip(" ,;:.–-") + " …"


def math(text: str) -> Markup:
    """Text with its TeX as MathML. Everything else is escaped; what is no TeX stays as it was written."""
    parts, end = [], 0
    for found in _MATH.finditer(text):
        parts.append(escape(text[end : found.start()]))
        tex = found["block"] or found["line"] or found["paren"]
        parts.append(_mathml(tex, bool(found["block"])) or escape(found[0]))
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


@lru_cache(maxsize=4096)
def _mathml(tex: str, block: bool) -> Markup | None:
    from defusedxml.ElementTree import fromstring
    from latex2mathml.converter import convert

    try:
        root = fromstring(convert(tex))
        return Markup(_written(root, f' display="{"block" if block else "inline"}"'))
    except Exception:  # the converter raises whatever comes; a reader still sees what the author typed
        return None


def _written(element: Element, extra: str = "") -> str:
    """MathML written anew from a list of what is allowed: the converter itself lets HTML in ``\\text{}`` through."""
    tag = element.tag.rpartition("}")[2]
    if tag not in _MATHML:
        raise ValueError(f"{tag} is no MathML that we show")
    attributes = "".join(f' {k}="{escape(v)}"' for k, v in element.attrib.items() if k in _MATH_ATTRIBUTES)
    inside = escape(element.text or "") + Markup("").join(
        Markup(_written(child)) + escape(child.tail or "") for child in element
    )
    return f"<{tag}{extra}{attributes}>{inside}</{tag}>"


@lru_cache(maxsize=256)
def python_code(text: str) -> Markup:
    """Python with its parts marked for the style sheet."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return Markup(highlight(text.strip("\n"), PythonLexer(), HtmlFormatter(nowrap=True)))


LINKS = {
    "code": "Official code",
    "project": "Project page",
    "arxiv": "arXiv",
    "pdf": "PDF",
    "huggingface": "Hugging Face",
}


def field_name(field: str) -> str:
    """A field of the catalogue as people say it."""
    return {"": "other papers", "fields": "neural fields"}.get(field, field.replace("_", " "))


def moment(value: datetime) -> str:
    """ "8 December 2025, 14:03 UTC"."""
    return f"{long_date(value)}, {value.astimezone(UTC):%H:%M} UTC"


def effect(claim: Any) -> str:
    """The effect of a claim's view with its 95% interval."""
    sign = "×" if claim.compared == "ratio" else ""
    if claim.effect is None:
        return "–"
    if claim.low is None or claim.high is None:
        return f"{sign}{number(claim.effect)} (no interval from one seed)"
    return f"{sign}{number(claim.effect)} [{number(claim.low)}, {number(claim.high)}]"


def bar_words(claim: Any) -> str:
    """What the effect must be for the claim to count as shown."""
    sign = "above" if claim.better == "higher" else "below"
    return f"{sign} {'×' if claim.compared == 'ratio' else ''}{number(claim.needed)}"


def follow_path(follow: Any) -> str:
    """Where to see what somebody follows."""
    if follow.kind == "field":
        return f"/fields/{quote(follow.value)}"
    return path_with("/author", name=follow.value) if follow.kind == "author" else path_with("/search", q=follow.value)


def environment() -> Environment:
    """The templates, which escape everything that is not marked as safe and know no undefined names."""
    made = Environment(
        loader=PackageLoader("broadsheet.web"),
        autoescape=lambda name: name is None or not name.endswith(".md"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "long_date": long_date,
        "iso": iso,
        "names": names,
        "plural": plural,
        "shorten": shorten,
        "math": math,
        "number": number,
        "effect": effect,
        "bar_words": bar_words,
        "field_name": field_name,
        "link_name": lambda name: LINKS.get(name, name),
        "moment": moment,
        "follow_path": follow_path,
        "python_code": python_code,
        "paper_path": paper_path,
        "markdown": lambda text: Markup(render_markdown(text)),
    }
    made.tests["contains_small"] = lambda presets: "small" in presets
    made.globals |= {"asset": asset, "path_with": path_with}
    return made
