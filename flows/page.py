"""The report's page: typography and colours for light and dark, and small builders that escape whatever they are given.
No scripts and nothing from outside, so the file can be mailed, archived and opened offline."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

CSS = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d2125;--soft:#666d75;--faint:#e4e1d8;--accent:#1f6f5c;
--a1:#1f6f5c;--a2:#b4552d;--a3:#4a63a8;--a4:#8a6d1d;--bad:#b3261e;--good:#1f6f5c;--tint:#1f6f5c1c;--drop:#b4552d}
@media(prefers-color-scheme:dark){:root{--paper:#15181b;--card:#1d2125;--ink:#e9e6df;--soft:#9aa2aa;--faint:#31373d;--accent:#6cc5ac;
--a1:#6cc5ac;--a2:#e59a72;--a3:#93a9ee;--a4:#d8bb62;--bad:#ff8a80;--good:#6cc5ac;--tint:#6cc5ac22;--drop:#e59a72}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 ui-sans-serif,system-ui,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:44px 28px 80px}
h1,h2{font-family:ui-serif,"Iowan Old Style",Palatino,"Palatino Linotype",Georgia,serif;font-weight:600;letter-spacing:-.01em;line-height:1.15}
h1{font-size:40px;margin:0 0 8px}h2{font-size:25px;margin:60px 0 4px}h3{font-size:15px;margin:26px 0 8px}
p{margin:6px 0 14px;max-width:70ch}.lead{color:var(--soft)}.kicker{color:var(--accent);font-size:13px;letter-spacing:.09em;text-transform:uppercase}
.meta{color:var(--soft);font-size:14px;max-width:none}code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--faint);border-radius:8px;padding:14px;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(138px,1fr));gap:12px;margin:26px 0 0}
.tile{background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:13px 14px}
.tile b{display:block;white-space:nowrap;font:600 27px/1.15 ui-serif,"Iowan Old Style",Palatino,Georgia,serif;font-variant-numeric:lining-nums tabular-nums}
.tile span{color:var(--soft);font-size:13px;line-height:1.35;display:block;margin-top:4px}
.state{display:inline-block;border-radius:99px;padding:1px 11px;font-size:13px;border:1px solid currentColor;color:var(--good)}
.state.failed,.state.stopped,.state.crashed{color:var(--bad)}.error{border-left:3px solid var(--bad);padding-left:14px}
.card{background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:18px;overflow-x:auto;margin:14px 0}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap}th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left;padding-left:0}tr:last-child td{border-bottom:0}td small{color:var(--soft);margin-left:6px}
td.best{font-weight:650;color:var(--accent)}td.text{text-align:left;white-space:normal}
svg{display:block;width:100%;height:auto}svg text{font:11px ui-sans-serif,system-ui,sans-serif;fill:var(--soft)}
svg.rates{min-width:620px;max-width:820px}.rate .full{fill:var(--faint)}.rate .part{fill:var(--a1);opacity:.45}.rate .value{fill:var(--ink)}
svg.changes{min-width:620px;max-width:820px}.zero{stroke:var(--soft)}.change{--c:var(--soft)}.change.up{--c:var(--good)}.change.down{--c:var(--bad)}
.change path{stroke:var(--c);stroke-width:2}.change circle{fill:var(--c);stroke:var(--c);stroke-width:2}.change.open circle{fill:var(--card)}.change .beside{fill:var(--ink)}
svg.dag{min-width:860px}svg.stages{min-width:620px}.node .box{fill:var(--paper);stroke:var(--faint)}.node .name{fill:var(--ink);font-size:13px;font-weight:600}
.node .bar{fill:var(--accent)}.node.skipped .box{stroke-dasharray:4 3}.node.skipped .bar{fill:var(--soft);opacity:.5}
.node.failed .box,.node.stopped .box{stroke:var(--bad)}.node.failed .bar{fill:var(--bad)}.edge{fill:none;stroke:var(--soft);opacity:.55;stroke-width:1.2}
.grid{stroke:var(--faint);fill:none}.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.s0{--c:var(--a1)}.s1{--c:var(--a2)}.s2{--c:var(--a3)}.s3{--c:var(--a4)}.line{stroke:var(--c)}.dot{fill:var(--c)}svg .value{fill:var(--c);font-weight:600}
.keys{display:flex;gap:18px;font-size:13px;margin-bottom:6px}.key::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;
background:var(--c);margin-right:7px;vertical-align:3px}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(228px,1fr));gap:12px}
.curve{margin:0;background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:11px 13px 7px}
.curve figcaption{display:flex;justify-content:space-between;gap:8px;font-size:13px;color:var(--soft)}.curve b{color:var(--ink);font-variant-numeric:tabular-nums}
.raw{fill:none;stroke:var(--a1);opacity:.25}.mean{fill:none;stroke:var(--a1);stroke-width:1.8}
.funnel{display:grid;grid-template-columns:minmax(150px,max-content) 1fr max-content;gap:5px 14px;align-items:center;font-size:14px}
.funnel .track{height:17px;display:flex;border-radius:4px;overflow:hidden;background:var(--tint)}
.funnel .kept{background:var(--a1);opacity:.85}.funnel .lost{background:var(--drop)}.funnel .n{text-align:right;font-variant-numeric:tabular-nums}
.funnel .n small{color:var(--drop);margin-left:7px}.funnel .total{font-weight:650}
.strip{display:flex;gap:16px;overflow-x:auto;scroll-snap-type:x proximity;padding:4px 2px 14px}
.strip figure{margin:0;flex:0 0 min(430px,82vw);scroll-snap-align:start;background:var(--card);border:1px solid var(--faint);border-radius:10px;padding:12px}
.strip figcaption{font-size:14px;margin-bottom:8px;display:flex;justify-content:space-between}.strip figcaption span{color:var(--soft)}
.strip img{display:block;width:100%;height:auto;border-radius:5px;background:#fff}
.chain{list-style:none;margin:0;padding:0}.chain li{padding:7px 0 7px 24px;position:relative;border-left:2px solid var(--faint);margin-left:6px}
.chain li::before{content:"";position:absolute;left:-6px;top:15px;width:10px;height:10px;border-radius:50%;background:var(--accent)}
.chain b{display:inline-block;min-width:104px}.chain code{color:var(--soft);overflow-wrap:anywhere}
details{margin:12px 0}summary{cursor:pointer;color:var(--accent)}footer{margin-top:64px;color:var(--soft);font-size:13px}
@media(max-width:640px){main{padding:28px 16px 60px}h1{font-size:31px}}
@media print{body{background:#fff}.strip{flex-wrap:wrap}details{display:block}}
"""


def document(title: str, body: str) -> str:
    """A whole HTML page; `body` is markup, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>{body}</main></body></html>\n"
    )


def section(title: str, lead: str, *parts: str) -> str:
    """A headed section, or nothing where no part has content. `title` and `lead` are text, parts are markup."""
    inner = "".join(part for part in parts if part)
    return f'\n<section><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{inner}</section>' if inner else ""


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Key numbers: (number, what it is)."""
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{escape(n)}</b><span>{escape(what)}</span></div>' for n, what in items) + "</div>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], best: Sequence[set[int]] = ()) -> str:
    """A table of text cells. best[i] are the columns of row i that are shown in bold."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = []
    for index, row in enumerate(rows):
        strong = best[index] if index < len(best) else set()
        cells = (f'<td class="best">{escape(str(c))}</td>' if i in strong else f"<td>{escape(str(c))}</td>" for i, c in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="card"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def funnel_bars(name: str, rules: Sequence[tuple[str, int, int]]) -> str:
    """Rows left after each rule as bars: (rule, rows in, rejected), in the order of the policy."""
    total = rules[0][1] if rules else 0
    if not total:
        return ""
    cells = []
    left = total
    for rule, rows_in, rejected in rules:
        if not rejected:
            continue
        left = rows_in - rejected
        cells.append(_bar(rule, left / total, rejected / total, f"{left:,}", f"−{rejected:,}"))
    idle = [rule for rule, _, rejected in rules if not rejected]
    first = _bar("offered", 1, 0, f"{total:,}", "")
    last = f'<span class="total">kept</span><span class="meta">{left / total:.1%} of what was offered</span><span class="n total">{left:,}</span>'
    note = f'<p class="meta">Rules that put nothing out: {escape(", ".join(idle))}.</p>' if idle else ""
    return f'<h3>{escape(name)}</h3><div class="card"><div class="funnel">{first}{"".join(cells)}{last}</div></div>{note}'


def _bar(label: str, kept: float, lost: float, count: str, drop: str) -> str:
    minus = f"<small>{escape(drop)}</small>" if drop else ""
    return (
        f'<span>{escape(label)}</span><span class="track"><i class="kept" style="width:{100 * kept:.2f}%"></i>'
        f'<i class="lost" style="width:{100 * lost:.2f}%"></i></span><span class="n">{escape(count)}{minus}</span>'
    )


def picture(path: Path, caption: str, note: str) -> str:
    """A PNG file inside the page itself; nothing where the file is gone."""
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return ""
    return (
        f"<figure><figcaption><b>{escape(caption)}</b><span>{escape(note)}</span></figcaption>"
        f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'
    )


def strip(title: str, figures: Sequence[str]) -> str:
    """Pictures side by side, to be scrolled through."""
    shown = "".join(figure for figure in figures if figure)
    return f'<h3>{escape(title)}</h3><div class="strip">{shown}</div>' if shown else ""
