"""What the page of a report is put together from: how numbers are written, tables, sections, and its style."""

from collections.abc import Sequence
from html import escape
from typing import Any

DASH, MINUS, NBSP = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"

STYLE = """
:root { --ink: #22282b; --faint: #66737a; --line: #dde3e5; --accent: #0f6e84; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", "Source Serif 4", Georgia, "Times New Roman", serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; font-weight: 600; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 2.75rem 0 .4rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
p { margin: .4rem 0 .9rem; max-width: 44rem; overflow-wrap: anywhere; }
.lead { border-left: 3px solid var(--line); padding-left: .9rem; }
.lead:first-of-type { border-color: var(--accent); }
.about, figcaption { color: var(--faint); font-size: .92rem; }
.note { margin: .8rem 0; padding: .6rem .9rem .6rem 1.9rem; max-width: 50rem; background: #f3f7f8;
  border-left: 3px solid var(--accent); font-size: .95rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; max-width: 38rem; }
figure svg { display: block; width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 2rem; }
.scroll { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: separate; border-spacing: 0; font: 14px/1.4 system-ui, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink); }
th, td { padding: .32rem .75rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: .2rem; position: sticky; left: 0; background: #fff; }
th:last-child, td:last-child { padding-right: .2rem; }
th { font-weight: 600; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th.text, td.text { text-align: left; }
tbody tr + tr td { border-top: 1px solid var(--line); }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: .8rem; background: #f6f8f8;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 600px) {
  body { font-size: 16px; }
  main { padding: 1.25rem 1rem 3rem; }
  th, td { padding: .3rem .5rem; }
}
@media print { main { max-width: none; padding: 0; } details { break-inside: avoid; } }
"""


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """With its sign."""
    rounded = round(difference, 2)
    return f"{MINUS if rounded < 0 else '+' if rounded > 0 else ''}{abs(rounded):.2f}"


def loss(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def saved(cost: dict[str, Any], key: str) -> str:
    return f"{100 * cost['saved'][key]:.0f}{NBSP}%"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def note(sentences: Sequence[str]) -> str:
    """Set off from the rest; nothing where there are none."""
    items = "".join(f"<li>{sentence}</li>" for sentence in sentences)
    return f'<ul class="note">{items}</ul>' if items else ""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page. The title is text, the parts are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or browsers ask for one
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, about: str, *parts: str) -> str:
    intro = f'<p class="about">{about}</p>' if about else ""
    return "\n".join([f"<section>\n<h2>{title}</h2>", intro, *filter(None, parts), "</section>"])


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """The first `texts` columns to the left, the others to the right. Cells are HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        marked = ((f'{tag} class="text"' if number < texts else tag, cell) for number, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{opening}>{cell}</{tag}>" for opening, cell in marked) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead>{row(head, "th")}</thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )
