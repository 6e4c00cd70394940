"""One HTML file that shows a trial: its funnel beside the current one, and for each rule the rows nearest to its border.
No scripts and nothing from outside, so that the file can be mailed, archived and opened offline."""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dreamlite_data.dataset import read_images
from dreamlite_data.lake import Lake
from dreamlite_data.policies.policy import REQUIRED_COLUMNS, Rule, parameters_of
from dreamlite_data.policies.trial import Trial
from dreamlite_data.thumbnails import data_url, mask_png, thumbnail

THUMBNAIL_PX = 160
SAMPLES = 6
_SHOWN_MEASURES = 6
_CSS = """
:root{color-scheme:light dark;--paper:#fbfaf7;--card:#fff;--ink:#1d2125;--soft:#666d75;--faint:#e4e1d8;--keep:#1f6f5c;--drop:#b4552d}
@media(prefers-color-scheme:dark){
:root{--paper:#15181b;--card:#1d2125;--ink:#e9e6df;--soft:#9aa2aa;--faint:#31373d;--keep:#6cc5ac;--drop:#e59a72}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 ui-sans-serif,system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:36px 24px 72px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px}h2{font-size:20px;margin:44px 0 2px}
p{margin:4px 0 12px;max-width:80ch;color:var(--soft)}code{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.warning{border-left:3px solid var(--drop);padding-left:12px;color:var(--ink)}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;background:var(--card);font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:right;border:1px solid var(--faint);white-space:nowrap}th{color:var(--soft);font-weight:500}
th:first-child,td:first-child{text-align:left}th[colspan]{text-align:center}td.keep{color:var(--keep)}td.drop{color:var(--drop)}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:0 28px}.side h3{font-size:14px;margin:10px 0 6px}.side.keep h3{color:var(--keep)}
.side.drop h3{color:var(--drop)}.none{font-size:13px}.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:10px}
.wide .cards{grid-template-columns:1fr}.sample{margin:0;background:var(--card);border:1px solid var(--faint);border-radius:8px;padding:9px}
.pictures{display:flex;gap:6px;align-items:flex-end;flex-wrap:wrap}.pictures span{font-size:11px;color:var(--soft);text-align:center}
.pictures img{display:block;width:auto;height:112px;max-width:100%;border-radius:4px;background:#8883}
.pictures img.mask{height:112px;image-rendering:pixelated}.margin{font-variant-numeric:tabular-nums;font-size:13px;font-weight:600}
.words{font-size:13px;margin:5px 0 3px;color:var(--ink)}.measures{font-size:11.5px;color:var(--soft);overflow-wrap:anywhere}
@media(max-width:720px){.sides{grid-template-columns:1fr}}
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A row to show: its candidate columns, and the margin by which it passes or fails the rule of its section (None where the
    rule has none)."""

    row: dict[str, Any]
    margin: float | None
    note: str = ""


def write_contact_sheet(lake: Lake, trial: Trial, path: Path, samples: int = SAMPLES) -> Path:
    """Write the page to `path`; at most `samples` rows on each side of each rule. Deterministic in trial and lake."""
    sections: list[tuple[str, str, str, list[Sample], list[Sample]]] = []
    for rule, reached, rejected in trial.outcome:
        kept, dropped = _borderline(lake, trial, rule, samples)
        lead = f"{rejected:,} of {reached:,} rows that reach it fail." if rejected else f"It puts out none of {reached:,} rows."
        lead += "" if rule.margin or not dropped else " It has no margin, so these are a draw from both sides."
        sections.append((rule.name, " ".join(rule.body.split()), lead, kept, dropped))
    changes = (_changes(trial, trial.entering, samples), _changes(trial, trial.leaving, samples))
    shown = [sample for section in sections for sample in (*section[3], *section[4])] + [s for side in changes for s in side]
    pictures = _pictures(lake, shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(_page(trial, sections, changes, pictures), encoding="utf-8")
    draft.replace(path)
    return path


# --- choosing what to show -------------------------------------------------------------------------------------------


def _borderline(lake: Lake, trial: Trial, rule: Rule, count: int) -> tuple[list[Sample], list[Sample]]:
    """(just kept, just dropped): rows that are in and clear this rule by least, and rows that this rule puts out by least."""
    sides = ("verdict = 'keep'", f"first_rule = '{rule.name}'")
    if not rule.margin:
        dropped = _chosen(lake, trial, sides[1], "NULL", rule, count)
        return (_chosen(lake, trial, sides[0], "NULL", rule, count) if dropped else []), dropped  # beside nothing they show nothing
    # `judged` has every column of the candidates, so the margin of rows that pass comes from there without another join.
    return (
        _chosen(lake, trial, sides[0], f"CAST(({rule.body}) AS DOUBLE)", rule, count),
        _chosen(lake, trial, f"{sides[1]} AND margin IS NOT NULL", "margin", rule, count),
    )


def _chosen(lake: Lake, trial: Trial, where: str, margin: str, rule: Rule, count: int) -> list[Sample]:
    """Rows of one side, those nearest to the border first; without a margin a draw by the hash of rule and row."""
    found = lake.query(
        f"SELECT *, {margin} AS shown_margin FROM judged WHERE {where} "
        f"ORDER BY abs(shown_margin), sha256('{rule.name}:' || row_id) LIMIT {count}",
        {name: trial.parameters[name] for name in parameters_of(margin)},
        judged=trial.judged,
    ).to_pylist()
    return [Sample({key: value for key, value in row.items() if key != "shown_margin"}, row["shown_margin"]) for row in found]


def _changes(trial: Trial, changed: pa.Table, count: int) -> list[Sample]:
    """Rows that change sides against the current version, nearest to the border first; rows no longer offered have no picture."""
    shown = changed.slice(0, count)
    judged = trial.judged.filter(pc.is_in(trial.judged["row_id"], shown["row_id"].combine_chunks()))
    rows = {row["row_id"]: row for row in judged.to_pylist()}
    return [Sample(rows.get(row["row_id"], {"row_id": row["row_id"]}), row["margin"], row["rule"]) for row in shown.to_pylist()]


def _pictures(lake: Lake, samples: list[Sample]) -> dict[str, str]:
    """Data URLs of the images that the samples name."""
    ids = {sample.row.get(column) for sample in samples for column in ("image_id", "source_image_id")} - {None}
    known = lake.query(
        "SELECT image_id FROM images SEMI JOIN w USING (image_id)", w=pa.table({"image_id": pa.array(sorted(ids), pa.string())})
    )
    return {
        image_id: data_url(*thumbnail(payload, THUMBNAIL_PX))
        for image_id, payload in read_images(lake, known["image_id"].to_pylist()).items()
    }


# --- the page --------------------------------------------------------------------------------------------------------


def _page(trial: Trial, sections: list[tuple[str, str, str, list[Sample], list[Sample]]], changes: Any, pictures: dict[str, str]) -> str:
    against = f"{trial.name}@{trial.version}" if trial.version else f"no version of {trial.name} yet"
    body = [
        f"<h1>Trial of {escape(trial.name)}</h1>",
        f"<p>{trial.kept:,} of {len(trial.judged):,} candidates stay. Against {escape(against)}: {len(trial.entering):,} rows enter, "
        f"{len(trial.leaving):,} leave. Nothing was written to the lake.</p>",
        *(f'<p class="warning">{escape(text)}</p>' for text in trial.warnings),
        _funnel_table(trial),
        _section(
            "Rows that change sides", "", "Left: in now, out before. Right: out now, in before.", *changes, pictures, ("enter", "leave")
        ),
        *(_section(*section, pictures, _titles(section)) for section in sections),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Trial of {escape(trial.name)}</title><style>{_CSS}</style></head>\n<body><main>{''.join(body)}</main></body></html>\n"
    )


def _titles(section: tuple[str, str, str, list[Sample], list[Sample]]) -> tuple[str, str]:
    """'just' where the rows are those nearest to the border, which only a margin tells."""
    near = any(sample.margin is not None for sample in (*section[3], *section[4]))
    return ("just kept", "just dropped") if near else ("kept", "dropped")


def _funnel_table(trial: Trial) -> str:
    cells = []
    for row in trial.funnel:
        numbers = "".join(
            f'<td class="{kind}">{"" if row[key] is None else f"{row[key]:,}"}</td>'
            for key, kind in (
                ("rows_in", ""), ("rejected", "drop"), ("rows_out", "keep"),
                ("current_rows_in", ""), ("current_rejected", "drop"), ("current_rows_out", "keep"),
            )
        )  # fmt: skip
        cells.append(f"<tr><td>{escape(row['rule'])}</td>{numbers}</tr>")
    current = f"{trial.name}@{trial.version}" if trial.version else "no version yet"
    over = f'<tr><th></th><th colspan="3">this policy</th><th colspan="3">{escape(current)}</th></tr>'
    head = "".join(f"<th>{text}</th>" for text in ("rule", *("in", "rejected", "out") * 2))
    return f'<h2>Funnel</h2><div class="scroll"><table><thead>{over}<tr>{head}</tr></thead><tbody>{"".join(cells)}</tbody></table></div>'


def _section(
    name: str, code: str, lead: str, kept: list[Sample], dropped: list[Sample], pictures: dict[str, str], titles: tuple[str, str]
) -> str:
    wide = any(sample.row.get("source_image_id") for sample in (*kept, *dropped))
    sides = "".join(
        f'<div class="side {kind}"><h3>{title}</h3>'
        + (f'<div class="cards">{"".join(_card(sample, pictures) for sample in side)}</div>' if side else '<p class="none">none</p>')
        + "</div>"
        for kind, title, side in (("keep", titles[0], kept), ("drop", titles[1], dropped))
    )
    rule = f"<p><code>{escape(code)}</code></p>" if code else ""
    return f'<section><h2>{escape(name)}</h2>{rule}<p>{escape(lead)}</p><div class="sides{" wide" if wide else ""}">{sides}</div></section>'


def _card(sample: Sample, pictures: dict[str, str]) -> str:
    row = sample.row
    shown = []
    for label, image_id in (("source", row.get("source_image_id")), ("target" if row.get("source_image_id") else "", row.get("image_id"))):
        if image_id in pictures:
            shown.append(f'<span><img alt="{label or "image"}" src="{pictures[image_id]}">{label}</span>')
    if row.get("edit_mask"):
        shown.append(f'<span><img class="mask" alt="mask" src="{data_url(mask_png(row["edit_mask"], 4), "image/png")}">mask</span>')
    margin = f'<span class="margin">{sample.margin:+.4g}</span> ' if sample.margin is not None else ""
    note = f'<div class="measures">{escape(sample.note)}</div>' if sample.note else ""
    skip = {*REQUIRED_COLUMNS, "verdict", "first_rule", "rule_position", "margin", "failed", "group_id"} - {"edited_fraction"}
    measured = [(key, value) for key, value in row.items() if key not in skip and value is not None]
    measured.sort(key=lambda item: not isinstance(item[1], float))  # numbers of a scale first, then flags and sizes
    numbers = [f"{key} {_short(value)}" for key, value in measured]
    measures = " · ".join(numbers[:_SHOWN_MEASURES])
    return (
        f'<figure class="sample"><div class="pictures">{"".join(shown)}</div>'
        f'<p class="words">{margin}{escape(str(row.get("text") or ""))}</p>{note}'
        f'<div class="measures">{escape(measures)}</div><div class="measures"><code>{escape(row["row_id"])}</code></div></figure>'
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]
