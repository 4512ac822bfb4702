"""The frame of a study's report: its style, its few lines of script, and tables. Everything a user named is escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hrm_rl.study.plots import COLORS, Image

# Nothing may be fetched: whatever stands in the page, a browser asks no one.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f5f6f8;--better:0,104,168;--worse:196,82,10;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#14171d;--card:#1e232c;--better:90,180,240;--worse:255,154,82;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p,li{max-width:60rem}a{color:var(--s0)}
nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
blockquote{margin:1rem 0;padding:.8rem 1rem;background:var(--card);border-left:4px solid var(--s0);font-size:1.1rem}
.note{background:var(--card);border-left:4px solid var(--s1);padding:.5rem .8rem;margin:.5rem 0}
.small{font-size:.85rem;font-weight:400;color:var(--muted)}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3rem .55rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
th{white-space:nowrap;color:var(--muted);font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap}
td details{margin:0}
td.name{min-width:11rem;max-width:20rem;font-weight:600;overflow-wrap:anywhere}td.text{min-width:16rem}
.ready th[data-sort]{cursor:pointer}.ready th[data-sort]:after{content:" \\2195";opacity:.5}
.ready th[aria-sort=ascending]:after{content:" \\2191";opacity:1}
.ready th[aria-sort=descending]:after{content:" \\2193";opacity:1}
.badge{display:inline-block;padding:.1rem .5rem;border-radius:1rem;white-space:nowrap;font-weight:600;
border:1.5px solid var(--muted)}
.badge.held{border-color:var(--s2);color:var(--s2)}.badge.did-not-hold{border-color:var(--s1);color:var(--s1)}
.figs{display:flex;flex-wrap:wrap;gap:.5rem 1rem}
figure{margin:.5rem 0;max-width:100%;overflow-x:auto}
figure.big img{min-width:34rem}
img{display:block;max-width:100%;height:auto}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600}
.key{display:inline-flex;align-items:center;gap:.35rem;margin-right:1rem;font-size:.85rem}
.key i{display:inline-block;width:1.4rem;height:.25rem;border-radius:2px}
dl{font-size:.9rem}dt{font-weight:600;margin-top:.5rem}dd{margin:0 0 0 1rem}
code,pre{font:.85rem/1.4 ui-monospace,monospace;background:var(--card);padding:.1rem .3rem}
pre{padding:.6rem;overflow-x:auto;white-space:pre-wrap}
"""

# Sorts a table by the column that is clicked, and says whether every figure could be decoded.
_SCRIPT = """
(function(){
var root=document.documentElement;
document.querySelectorAll('th[data-sort]').forEach(function(th){
 function sort(){
  var row=th.parentNode,at=[].indexOf.call(row.children,th),body=th.closest('table').tBodies[0];
  var up=th.getAttribute('aria-sort')!=='ascending',numeric=th.dataset.sort==='number';
  [].forEach.call(row.children,function(o){o.removeAttribute('aria-sort')});
  th.setAttribute('aria-sort',up?'ascending':'descending');
  [].slice.call(body.rows).map(function(r,i){var v=r.cells[at].dataset.v;return [numeric?parseFloat(v):v,i,r]})
  .sort(function(a,b){
   if(numeric&&(isNaN(a[0])||isNaN(b[0])))return isNaN(a[0])-isNaN(b[0])||a[1]-b[1];
   var c=numeric?a[0]-b[0]:a[0].localeCompare(b[0]);return (up?c:-c)||a[1]-b[1]})
  .forEach(function(e){body.appendChild(e[2])});
 }
 th.tabIndex=0;th.setAttribute('role','button');th.addEventListener('click',sort);
 th.addEventListener('keydown',function(e){if(e.key==='Enter'||e.key===' '){e.preventDefault();sort()}});
});
root.classList.add('ready');root.dataset.ready='1';
window.addEventListener('load',function(){
 var all=[].slice.call(document.images),bad=all.filter(function(i){return !(i.complete&&i.naturalWidth>0)});
 root.dataset.images=(all.length-bad.length)+'/'+all.length;
 if(bad.length){var p=document.createElement('p');p.className='note';
  p.textContent=bad.length+' of '+all.length+' figures could not be decoded: the file is damaged.';
  document.body.insertBefore(p,document.body.firstChild)}
});
})();
"""


@dataclass(frozen=True)
class Cell:
    """One cell of a table: HTML that is safe already, and the value it is sorted by."""

    html: str
    value: float | str
    shade: float = 0.0  # -1 worse .. 1 better than the baseline
    kind: str = ""  # CSS class


def escape(text: object) -> str:
    """Any text, safe between tags and within quoted attributes."""
    return html.escape(str(text), quote=True)


def text_cell(text: object, kind: str = "") -> Cell:
    return Cell(escape(text), str(text), kind=kind)


def number_cell(value: float, shown: str | None = None, shade: float = 0.0) -> Cell:
    """A number; those that are not finite sort last."""
    return Cell(escape(number(value) if shown is None else shown), value, shade, "n")


def number(value: float, form: str = ".3g") -> str:
    """A number for the eye; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:{form}}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], sortable: bool = True) -> str:
    """A table in a box that scrolls sideways. A column is sorted as its first cell is: by number or as text."""
    rows = [list(row) for row in rows]
    numeric = [bool(rows) and not isinstance(rows[0][i].value, str) for i in range(len(heads))]
    top = "".join(
        f'<th scope="col"{" class=n" if is_number else ""}'
        + (f' data-sort="{"number" if is_number else "text"}"' if sortable else "")
        + f">{escape(head)}</th>"
        for head, is_number in zip(heads, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    style = ""
    if cell.shade:
        side = "better" if cell.shade > 0 else "worse"
        style = f' style="background:rgba(var(--{side}),{min(1.0, abs(cell.shade)) * 0.55:.2f})"'
    value = cell.value if isinstance(cell.value, str) else f"{cell.value:.9g}"
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f'<td{kind} data-v="{escape(value)}"{style}>{cell.html}</td>'


def figure(image: Image, big: bool = False) -> str:
    """An image in the page itself."""
    kind = ' class="big"' if big else ""
    return (f'<figure{kind}><img src="{image.uri}" width="{image.width}" height="{image.height}" '
            f'alt="{escape(image.alt)}"></figure>')  # fmt: skip


def key(color: str, text: str) -> str:
    """One entry of a legend; `color` is a name of plots.COLORS."""
    return f'<span class="key"><i style="background:var(--{color})"></i>{escape(text)}</span>'


def folded(summary: str, content: str, open_: bool = False) -> str:
    """Content that opens by a click, also without a script."""
    return f"<details{' open' if open_ else ''}><summary>{escape(summary)}</summary>{content}</details>"


def page(title: str, body: str) -> str:
    """The whole document."""
    style = _STYLE.replace("LIGHT", _variables(0)).replace("DARK", _variables(1))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{style}</style></head><body>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def _variables(which: int) -> str:
    return "".join(f"--{name}:{pair[which]};" for name, pair in COLORS.items())
