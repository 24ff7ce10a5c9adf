"""Pieces of HTML. Whatever is not made here is escaped here."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path


def element(name: str, *content: str, **attributes: str) -> str:
    """Return an element around content that is HTML already; attributes are escaped, `_` ends a Python word."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{''.join(content)}</{name}>"


def paragraph(words: str) -> str:
    """Return a paragraph of plain text."""
    return element("p", escape(words))


def bullets(lines: Sequence[str]) -> str:
    """Return a list of plain texts; nothing for no texts."""
    return element("ul", *(element("li", escape(line)) for line in lines)) if lines else ""


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values as a list of two columns."""
    return element("dl", *(element("dt", escape(name)) + element("dd", escape(words)) for name, words in pairs))


def image(path: Path, caption: str, kind: str = "") -> str:
    """Return a picture with its bytes inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    told = f' class="{escape(kind)}"' if kind else ""
    return element("figure", f'<img{told} alt="{escape(caption)}" src="data:image/png;base64,{data}">')


def plain_table(heads: Mapping[str, str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of plain texts.

    Args:
        heads: the class of each column by its title: number, long, or empty.
        rows: texts.
    """
    kinds = list(heads.values())
    head = element("tr", *(_cell("th", title, kind) for title, kind in heads.items()))
    body = (element("tr", *(_cell("td", *pair) for pair in zip(row, kinds, strict=True))) for row in rows)
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def _cell(name: str, words: str, kind: str) -> str:
    """Return a cell of a table; a long text breaks its lines behind dots and the like rather than inside a number."""
    text = escape(words)
    if kind == "long":
        text = re.sub(r"([./,=])(?=\S)", r"\1<wbr>", text)
    return element(name, text, **({"class_": kind} if kind else {}))
