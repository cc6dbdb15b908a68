"""`gallery.html`: every object that was measured, with its pictures and figures; scripts of its own alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from train.metrics import Row
from train.report import Column, Record, cell

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; }
body { margin: 1.5rem auto; max-width: 1240px; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
article { border: 1px solid #ddd; border-radius: 6px; padding: .7rem 1rem; margin: 1rem 0; }
h2 { font-size: 1.05rem; margin: 0 0 .2rem; }
h2 small, .about, figcaption { color: #666; font-weight: normal; font-size: .85rem; }
.rank { float: right; color: #666; }
.figures { margin: .3rem 0; } .figures b { margin-right: 1rem; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 3fr); gap: .4rem .6rem; }
figure { margin: 0; grid-column: 2; } figure:first-child { grid-column: 1; grid-row: 1 / span 9; }
figure:only-child { grid-column: 1 / -1; }
img { max-width: 100%; border: 1px solid #eee; display: block; }
.worst { border-left: 5px solid #c0392b; } .best { border-left: 5px solid #27854a; }
"""

# Sorts and ranks the cards by a figure, as `_ranked` does; those without it stand at the end, unranked.
SCRIPT = """
const list = document.getElementById('objects'), by = document.getElementById('by');
const order = document.getElementById('order');
function sort() {
  const sign = by.selectedOptions[0].dataset.better === 'more' ? 1 : -1;
  const key = 'data-' + by.value, all = [...list.children];
  const some = all.filter(card => card.hasAttribute(key));
  some.sort((a, b) => sign * (a.getAttribute(key) - b.getAttribute(key)));
  const third = Math.floor(some.length / 3);
  some.forEach((card, place) => {
    card.className = place < third ? 'worst' : place >= some.length - third ? 'best' : 'typical';
    card.querySelector('.rank').textContent = card.className + ', ' + (place + 1) + ' of ' + some.length;
  });
  const none = all.filter(card => !card.hasAttribute(key));
  for (const card of none) { card.className = ''; card.querySelector('.rank').textContent = ''; }
  if (order.value === 'best') some.reverse();
  list.append(...some, ...none);
}
by.onchange = order.onchange = sort;
"""


def gallery_page(
    title: str,
    about: Sequence[str],
    rows: Mapping[str, Row],
    columns: Sequence[Column],
    records: Mapping[str, Record],
    figures: Mapping[str, Row],
    main: str,
    subtitles: Mapping[str, str],
) -> str:
    """The page: the table of means, then a card an object, worst first until another order is chosen.

    Args:
        title: of the page.
        about: paragraphs below it.
        rows: means by title.
        columns: of the figures shown; those that no object has are dropped.
        records: by name; `pictures` are `(title, path from the page)`.
        figures: each object's own, by name.
        main: the column by which the page is sorted at first.
        subtitles: what is said of each object beside its name.
    """
    filled = [c for c in columns if any(row.get(c.name) is not None for row in figures.values())]
    names = [name for name in records if "left_out" not in records[name]]
    ranked = next((c for c in filled if c.name == main), filled[0] if filled else None)
    cards = [
        _card(name, subtitles.get(name, ""), records[name], figures[name], filled, kind, rank)
        for name, kind, rank in _ranked(names, figures, ranked)
    ]
    text = html.escape
    options = [
        f'<option value="{c.name}" data-better="{"more" if c.more_is_better else "less"}"'
        f"{' selected' if c is ranked else ''}>{text(c.title)}</option>"
        for c in filled
    ]
    sorter = (
        f'<p>Sort by <select id="by">{"".join(options)}</select> <select id="order">'
        '<option value="worst">worst first</option><option value="best">best first</option></select></p>'
    )
    left = [f"<li>{text(n)}: {text(r['left_out'])}</li>" for n, r in records.items() if "left_out" in r]
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>',
        f"<style>{STYLE}</style></head>",
        f"<body><h1>{text(title)}</h1>",
        *(f'<p class="about">{text(line)}</p>' for line in about),
        _table(rows, columns),
        sorter if ranked is not None else "",
        f'<div id="objects">{"".join(cards)}</div>',
        f"<h2>Left out</h2><ul>{''.join(left)}</ul>" if left else "",
        f"<script>{SCRIPT}</script>" if ranked is not None else "",
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _ranked(
    names: Sequence[str], figures: Mapping[str, Row], column: Column | None
) -> list[tuple[str, str, str]]:
    """Name, kind (worst third, typical, best third) and rank, worst first; last those without a figure."""
    if column is None:
        return [(name, "", "") for name in names]
    given = {name: value for name in names if (value := figures[name].get(column.name)) is not None}
    order = sorted(given, key=lambda name: given[name], reverse=not column.more_is_better)
    count, third = len(order), len(order) // 3
    told = []
    for place, name in enumerate(order):
        kind = "worst" if place < third else "best" if place >= count - third else "typical"
        told.append((name, kind, f"{kind}, {place + 1} of {count}"))
    return told + [(name, "", "") for name in names if name not in given]


def _table(rows: Mapping[str, Row], columns: Sequence[Column]) -> str:
    filled = [c for c in columns if any(row.get(c.name) is not None for row in rows.values())]
    if not filled:
        return ""
    head = "".join(f"<th>{html.escape(c.title)}</th>" for c in filled)
    body = [
        f"<tr><td>{html.escape(title)}</td>"
        + "".join(f"<td>{cell(row.get(c.name), c.digits)}</td>" for c in filled)
        + "</tr>"
        for title, row in rows.items()
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>"


def _card(
    name: str, subtitle: str, record: Record, figures: Row, columns: Sequence[Column], kind: str, rank: str
) -> str:
    told = {c: value for c in columns if (value := figures.get(c.name)) is not None}
    data = "".join(f' data-{c.name}="{value!r}"' for c, value in told.items())
    shown = "".join(
        f"{html.escape(c.title.rstrip(' ↑↓'))} <b>{cell(value, c.digits)}</b>" for c, value in told.items()
    )
    pictures = "".join(
        f'<figure><a href="{quote(path)}"><img src="{quote(path)}" loading="lazy" '
        f'alt="{html.escape(f"{name}: {title}")}"></a><figcaption>{html.escape(title)}</figcaption></figure>'
        for title, path in record.get("pictures", ())
    )
    return (
        f'<article class="{kind}"{data}><span class="rank">{rank}</span>'
        f"<h2>{html.escape(name)} <small>{html.escape(subtitle)}</small></h2>"
        f'<p class="figures">{shown}</p><div class="pictures">{pictures}</div></article>'
    )
