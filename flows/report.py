"""One HTML page about one run: what each stage learned, on which data, in which time, and what ships.
Everything is read from the lake's tracking tables and the files that steps left; nothing is computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dreamlite_data.lake import Lake
from flows import charts, page
from flows.charts import Node, clock, number
from flows.step import step_id

RATES = {"generate": "generate/generate_exact", "edit": "edit/edit_exact"}
"""The two numbers everything else is about: share of held-out prompts and edits answered exactly."""

PARTS = {
    "Prompts, by number of objects": "generate/generate_exact_",
    "What is right in them: each object's attributes, and the whole": "generate/generate_part_",
    "Edits, by kind": "edit/edit_exact_",
    "Edits: the instruction followed, the rest preserved": "edit/edit_part_",
}
"""Breakdowns of the two rates, by the beginning of their metrics' names."""

EXACT_REACH_POINTS, REWARD_REACH = 10, 1
"""Where the axes of changes end: what a stage does beyond that needs no fine reading."""

PIXELS_OF = "SELECT kind, count(DISTINCT id) FROM lineage_of('{artifact}') GROUP BY kind"


def write_report(lake: Lake, run_id: str, output: Path) -> Path:
    """Write `output`/report.html about run `run_id` and return its path.

    Works on a running, failed or finished run: what is not there is left out. Raises ValueError for an unknown run.
    """
    run = Run(lake, run_id)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    parts = [
        _header(run),
        _learned(run),
        _pictures(run),
        _steps(run),
        _funnel(run),
        _faults(run),
        _curves(run),
        _artifact(run),
        _lineage(run),
        _config(run),
    ]
    path = output / "report.html"
    draft = path.with_suffix(".tmp")
    draft.write_text(page.document(f"DreamLite run {run_id}", "".join(parts)), encoding="utf-8")
    draft.replace(path)
    return path


class Run:
    """The rows of one run. A reused step shows the numbers of the run that computed it."""

    def __init__(self, lake: Lake, run_id: str) -> None:
        self.lake, self.run_id = lake, run_id
        rows = lake.query("SELECT * FROM runs WHERE run_id = ?", [run_id]).to_pylist()
        if not rows:
            known = lake.query("SELECT run_id FROM runs ORDER BY started_at DESC LIMIT 5").column("run_id").to_pylist()
            raise ValueError(f"no run {run_id!r} in {lake.root}; the newest are: {', '.join(known) or 'none'}.")
        self.row = rows[-1]
        self.steps: dict[str, dict[str, Any]] = {}
        for row in lake.query("SELECT * FROM steps WHERE run_id = ? ORDER BY started_at, step", [run_id]).to_pylist():
            row["outputs"] = json.loads(row["outputs_json"] or "{}")
            row["owner"] = row["outputs"].get("done_by", run_id)
            self.steps[row["step"]] = row
        self._fill_reused()
        self.evals = self._owned("evals")
        self.metrics = self._owned("metrics")
        self.changes = self._changes()

    def _changes(self) -> list[dict[str, Any]]:
        """Rows of eval_changes from each evaluated stage to the next, and from the exported graphs in fp32 to each smaller variant."""
        rows = self.lake.query("SELECT * FROM eval_changes WHERE run_id = ?", [self.run_id]).to_pylist()
        stages = self.stages()
        next_to = dict(zip(stages[1:], stages, strict=False)) | {stage: "export_fp32" for stage in stages if stage.startswith("export_")}
        found = [row for row in rows if next_to.get(row["stage"]) == row["before"]]
        return sorted(found, key=lambda row: (stages.index(row["stage"]), row["task"] != "generate"))

    def _fill_reused(self) -> None:
        """A reused step took no time here; the page shows what it took when it was computed."""
        reused = [row for row in self.steps.values() if row["state"] == "skipped"]
        if not reused:
            return
        first = self.lake.query(
            "SELECT step, key, arg_min(seconds, ended_at) AS seconds FROM steps WHERE state = 'done' AND list_contains(?, key) GROUP BY ALL",
            [[row["key"] for row in reused]],
        )
        seconds = {(row["step"], row["key"]): row["seconds"] for row in first.to_pylist()}
        for row in reused:
            row["seconds"] = seconds.get((row["step"], row["key"]), 0.0)

    def _owned(self, table: str) -> list[dict[str, Any]]:
        """Rows of `table` that belong to this run's steps, whichever run computed them."""
        owners = sorted({row["owner"] for row in self.steps.values()} | {self.run_id})
        order = "step, name, position" if table == "metrics" else "stage, task, metric"
        rows = self.lake.query(f"SELECT * FROM {table} WHERE list_contains(?, run_id) ORDER BY {order}", [owners]).to_pylist()
        return [row for row in rows if row["run_id"] == self._owner_of(row, table)]

    def _owner_of(self, row: dict[str, Any], table: str) -> str | None:
        if table == "metrics":
            step = self.steps.get(row["step"])
        else:
            stage = row["stage"]
            step = self.steps.get("evaluate_export" if stage.startswith("export_") else f"evaluate_{stage}")
        return step["owner"] if step else self.run_id

    def stages(self) -> list[str]:
        """Evaluated stages in the order in which they ran; export variants last, fp32 before the smaller ones."""
        seen = {row["stage"] for row in self.evals}
        order = [name.removeprefix("evaluate_") for name in self.steps if name.startswith("evaluate_") and name != "evaluate_export"]
        rest = sorted(seen - set(order), key=lambda stage: (stage != "export_fp32", stage))
        return [stage for stage in order if stage in seen] + rest

    def values(self, metric: str) -> dict[str, float]:
        """Stage -> value of 'task/metric'."""
        return {row["stage"]: row["value"] for row in self.evals if f"{row['task']}/{row['metric']}" == metric}

    def seconds(self) -> float:
        """Wall seconds of the run: to its end, or to its newest step where it still runs."""
        ends = [self.row["ended_at"], *(row["ended_at"] for row in self.steps.values())]
        ends = [end for end in ends if end is not None]
        return max(0.0, (max(ends) - self.row["started_at"]).total_seconds()) if ends and self.row["started_at"] else 0.0

    def artifact(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The exported bundle's row and its numbers, where this run has one."""
        artifact_id = self.steps.get("export", {}).get("outputs", {}).get("artifact_id")
        rows = self.lake.query("SELECT * FROM artifacts WHERE artifact_id = ?", [artifact_id]).to_pylist() if artifact_id else []
        return (rows[-1], json.loads(rows[-1]["metrics_json"] or "{}")) if rows else None


def _header(run: Run) -> str:
    row = run.row
    # The report is a step of the run it tells about, which therefore still says 'running'.
    broken = any(step["state"] in ("failed", "stopped") for step in run.steps.values())
    state = "done so far" if row["state"] == "running" and not broken else row["state"]
    started = f"{row['started_at']:%d %B %Y, %H:%M} UTC" if row["started_at"] else ""
    facts = [f"preset {row['preset']}", started, clock(run.seconds()), f"commit {(row['git_commit'] or 'unknown')[:10]}"]
    stages = [stage for stage in run.stages() if not stage.startswith("export_")]
    tiles = []
    for task, metric in RATES.items():
        values = run.values(metric)
        if stages and stages[-1] in values:
            tiles.append((f"{values[stages[-1]]:.1%}", f"{task} exactly right after {stages[-1]}"))
        shipped = [stage for stage in ("export_int8", "export_fp32") if stage in values]
        if shipped:
            tiles.append((f"{values[shipped[0]]:.1%}", f"{task} exactly right from the {shipped[0].removeprefix('export_')} bundle"))
    artifact = run.artifact()
    if artifact:
        sizes = artifact[1].get("sizes", {})
        name = "unet_int8.onnx" if "unet_int8.onnx" in sizes else "unet.onnx"
        if name in sizes:
            tiles.append((f"{sizes[name] / 1e6:.2f} MB", f"{name}, of {artifact[0]['bytes'] / 1e6:.1f} MB in the bundle"))
    rows = sum(item["rows"] for item in _datasets(run).values())
    if rows:
        tiles.append((number(rows), "curated dataset rows"))
    reused = sum(step["state"] == "skipped" for step in run.steps.values())
    tiles.append((f"{len(run.steps) - reused} + {reused}", "steps computed + reused"))
    failures = [step for step in run.steps.values() if step["state"] in ("failed", "stopped")]
    errors = "".join(f'<p class="error"><b>{escape(s["step"])}</b>: {escape(str(s["outputs"].get("error", s["state"])))}</p>' for s in failures)
    return (
        f'<header><p class="kicker">DreamLite pipeline</p><h1>{escape(run.run_id)}</h1>'
        f'<p class="meta"><span class="state {escape(state.split()[0])}">{escape(state)}</span> &nbsp;{escape(" · ".join(fact for fact in facts if fact))}</p>'
        f"{page.tiles(tiles)}{errors}</header>"
    )


def _learned(run: Run) -> str:
    stages = run.stages()
    names = sorted({f"{row['task']}/{row['metric']}" for row in run.evals}, key=lambda name: ("exact" not in name, name.startswith("edit"), name))
    series = {task: run.values(metric) for task, metric in RATES.items() if run.values(metric)}
    chart = charts.stage_lines(stages, series)
    plain = [name for name in names if not _is_part(name)]
    grids = [(title, _rate_grid(run, stages, prefix)) for title, prefix in PARTS.items()]
    more = "".join(f'<div class="card"><h3>{title}</h3>{grid}</div>' for title, grid in grids if grid)
    return page.section(
        "What each stage learned",
        "Every stage answers the same held-out questions; the verifier reads the scene back out of each picture. The best of each row is"
        " bold; ± is half of the 95 % interval, in points.",
        f'<div class="card">{chart}</div>' if chart else "",
        _eval_table(run, stages, plain, _plain_name),
        more,
        _change_cards(run),
    )


def _change_cards(run: Run) -> str:
    """What became of the same questions from stage to stage: exact answers in points, and rewards."""
    exact, rewards = [], []
    for row in run.changes:
        before, stage = (row[end].removeprefix("export_") for end in ("before", "stage"))
        name = f"{before} → {stage}, {row['task']}"
        exact.append((name, *(100 * row[f"exact_{end}"] for end in ("change", "low", "high")), f"{row['mended']} mended, {row['broken']} broken"))
        if row["reward_low"] is not None:
            rewards.append((name, *(row[f"reward_{end}"] for end in ("change", "low", "high")), ""))
    count = "/".join(map(str, sorted({row["pictures"] for row in run.changes})))
    cards = (
        (f"Exact answers from stage to stage, in points, of the same {count} pictures", exact, EXACT_REACH_POINTS, 1),
        ("Mean reward from stage to stage", rewards, REWARD_REACH, 2),
    )
    return "".join(
        f'<div class="card"><h3>{title}</h3><p class="lead">A full dot: the 95 % interval leaves out zero.</p>{_change_chart(*drawn)}</div>'
        for title, *drawn in cards
        if drawn[0]
    )


def _change_chart(rows: Sequence[tuple[str, float, float, float, str]], reach: float, digits: int) -> str:
    words = [f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}) {beside}".replace("-", "−") for _, value, low, high, beside in rows]
    return charts.changes([row[:4] for row in rows], words, reach)


def _is_part(name: str) -> bool:
    return name.startswith(tuple(PARTS.values()))


def _rate_grid(run: Run, stages: Sequence[str], prefix: str) -> str:
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for row in run.evals:
        name = f"{row['task']}/{row['metric']}"
        if name.startswith(prefix):
            part = name.removeprefix(prefix).replace("_", " ")
            found.setdefault(part, {})[row["stage"]] = (row["value"], f"{part} after {row['stage']}: {_interval(row)}, n = {row['n']}")
    return charts.rate_grid(stages, sorted(found.items()))


def _with_margin(row: dict[str, Any]) -> str:
    margin = "" if row["low"] is None else f" ±{100 * (row['high'] - row['low']) / 2:.0f}"
    return f"{row['value']:.1%}{margin}"


def _interval(row: dict[str, Any]) -> str:
    ends = "" if row["low"] is None else f" ({row['low']:.1%} to {row['high']:.1%})"
    return f"{row['value']:.1%}{ends}"


def _plain_name(name: str) -> str:
    task, metric = name.split("/", 1)
    return f"{task}: {metric.removeprefix(task + '_').replace('_', ' ')}"


def _eval_table(run: Run, stages: Sequence[str], names: Sequence[str], label: Any) -> str:
    rows, best = [], []
    for name in names:
        values = run.values(name)
        own = {row["stage"]: row for row in run.evals if f"{row['task']}/{row['metric']}" == name}
        counts = {row["n"] for row in own.values()}
        rate = "exact" in name
        cells = [(_with_margin(own[s]) if rate else number(values[s])) if s in values else "" for s in stages]
        rows.append([label(name), *cells, "/".join(map(str, sorted(counts)))])
        pick = min if any(word in name for word in ("loss", "seconds", "error")) else max
        top = pick(values.values()) if len(set(values.values())) > 1 else None  # of equals none is best
        best.append({index + 1 for index, stage in enumerate(stages) if values.get(stage) == top and top is not None})
    return page.table(["", *(stage.replace("_", " ") for stage in stages), "n"], rows, best)


def _pictures(run: Run) -> str:
    strips = []
    for task in ("generate", "edit"):
        figures = []
        for name, step in run.steps.items():
            folder = step["outputs"].get("directory")
            if not name.startswith("evaluate_") or not folder:
                continue
            for path in sorted(Path(folder).glob(f"grid_{task}*.png")):
                variant = path.stem.removeprefix(f"grid_{task}").strip("_")
                stage = f"{name.removeprefix('evaluate_')}{'_' + variant if variant else ''}"
                value = run.values(RATES[task]).get(stage)
                figures.append(page.picture(path, stage.replace("_", " "), "" if value is None else f"{value:.1%} exact"))
        strips.append(page.strip({"generate": "Prompts", "edit": "Edits: source and answer"}[task], figures))
    return page.section("The pictures", "The same prompts and edits after every stage. Scroll sideways to watch the model learn.", *strips)


def _steps(run: Run) -> str:
    edges = run.lake.query("SELECT child_id, parent_id FROM lineage WHERE child_kind = 'step' AND parent_kind = 'step'").to_pylist()
    own = {step_id(name, row["key"]): name for name, row in run.steps.items()}
    parents: dict[str, set[str]] = {name: set() for name in run.steps}
    for edge in edges:
        child, parent = own.get(edge["child_id"]), own.get(edge["parent_id"])
        if child and parent and child != parent:
            parents[child].add(parent)
    nodes = [Node(name, row["state"], row["seconds"] or 0.0, tuple(sorted(parents[name]))) for name, row in run.steps.items()]
    if not nodes:
        return ""
    rows = [[n.name, n.state, clock(n.seconds), str(run.steps[n.name]["key"])[:12], run.steps[n.name]["owner"]] for n in nodes]
    listing = f"<details><summary>All steps</summary>{page.table(['step', 'state', 'time', 'key', 'computed by'], rows)}</details>"
    total = clock(sum(node.seconds for node in nodes))
    return page.section(
        "The steps",
        f"Each box is a pure function of its inputs, its settings and its code; dashed boxes were reused. Computing all of them took {total}.",
        f'<div class="card">{charts.dag(nodes)}</div>',
        listing,
    )


def _datasets(run: Run) -> dict[str, dict[str, Any]]:
    found = run.steps.get("curate", {}).get("outputs", {}).get("datasets", {})
    return found if isinstance(found, dict) else {}


def _funnel(run: Run) -> str:
    wanted = _datasets(run)
    bars: dict[str, list[tuple[str, int, int]]] = {}
    for row in run.lake.query("SELECT * FROM funnel ORDER BY dataset, position").to_pylist():
        if not wanted or row["dataset"] in wanted:
            bars.setdefault(f"{row['dataset']}, version {row['version']}", []).append((row["rule"], row["rows_in"], row["rejected"]))
    return page.section(
        "From raw rows to datasets",
        "Operators measure, SQL policies decide. Each bar is what was left after a rule; the orange end is what that rule put out.",
        *(page.funnel_bars(name, rules) for name, rules in bars.items()),
    )


def _faults(run: Run) -> str:
    """The table that a data step leaves under an output named '...fault...': planted errors against what filters caught."""
    for row in run.steps.values():
        outputs = row["outputs"]
        for name, value in {**outputs, **(outputs["answer"] if isinstance(outputs.get("answer"), dict) else {})}.items():
            if "fault" not in name:
                continue
            if isinstance(value, str) and value.endswith(".json") and Path(value).is_file():
                value = json.loads(Path(value).read_text())
            if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
                head = list(value[0])
                cells = [[_cell(key, item.get(key)) for key in head] for item in value]
                lead = "Rows of the small world were broken on purpose; this is what the filters made of them."
                return page.section("Planted faults", lead, page.table([key.replace("_", " ") for key in head], cells))
    return ""


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if key in ("precision", "recall") or key.endswith("share") else number(value)
    return "" if value is None else str(value)


def _curves(run: Run) -> str:
    groups: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in run.metrics:
        if row["position"] is not None and row["value"] is not None:
            groups.setdefault((row["step"], row["name"]), []).append((row["position"], row["value"]))
    order = {name: index for index, name in enumerate(run.steps)}
    drawn = [
        charts.curve(f"{step} · {name.replace('_', ' ')}", points)
        for (step, name), points in sorted(groups.items(), key=lambda item: (order.get(item[0][0], 99), item[0][1] != "loss", item[0][1]))
        if len(points) > 1
    ]
    inner = f'<div class="curves">{"".join(drawn)}</div>' if any(drawn) else ""
    return page.section("Training curves", "Faint: as logged. Strong: a moving mean. The number is where it ended.", inner)


def _artifact(run: Run) -> str:
    found = run.artifact()
    if not found:
        return ""
    row, numbers = found
    sizes = [[name, f"{size / 1e6:.3f} MB"] for name, size in sorted(numbers.get("sizes", {}).items(), key=lambda item: -item[1])]
    parity = numbers.get("parity", {})

    def lines(part: str) -> list[list[str]]:
        return [[name.replace("_", " "), f"{v['max_abs']:.1e}", f"{v['psnr_db']:.1f} dB"] for name, v in sorted(parity.get(part, {}).items())]

    head = ["largest difference", "PSNR"]
    record = (numbers.get("quantization") or {}).get("unet_int8", {})
    words = ""
    if record:
        calibration = record.get("calibration", {})
        words = (
            f"int8: {record['weights']} weights, {record['activations']} activations, {record['int8_layers']} layers "
            f"({record['int8_weight_share']:.0%} of all weights), calibrated on {calibration.get('samples')} UNet inputs of "
            f"{calibration.get('rows')} rows at all deployed noise levels; measured on a CPU with {', '.join(record['cpu_flags']) or 'no flags'}."
        )
    return page.section(
        "What ships",
        f"Bundle {row['artifact_id']}: {row['bytes'] / 1e6:.1f} MB, runs with numpy, ONNX Runtime and a tokenizer alone.",
        page.table(["file", "size"], sizes),
        page.table(["graph against torch", *head], lines("graphs")),
        page.table(["latents after all steps", *head], lines("end_to_end")),
        f"<p>{escape(words)}</p>" if words else "",
    )


def _lineage(run: Run) -> str:
    found = run.artifact()
    if not found:
        return ""
    artifact = found[0]["artifact_id"]
    walk = run.lake.query("SELECT kind, id, min(depth) AS depth FROM lineage_of(?) WHERE kind <> 'image' GROUP BY ALL ORDER BY 3, 1, 2", [artifact])
    images = run.lake.query("SELECT count(DISTINCT id) AS n FROM lineage_of(?) WHERE kind = 'image'", [artifact]).column("n")[0].as_py()
    shown = [row for row in walk.to_pylist() if row["kind"] != "step"]
    if not shown:
        return ""
    items = "".join(f"<li><b>{escape(row['kind'])}</b> <code>{escape(row['id'])}</code></li>" for row in shown)
    query = PIXELS_OF.format(artifact=artifact)
    return page.section(
        "Where it came from",
        "From the bundle back to the pixels, as one query over the same lake.",
        f'<div class="card"><ol class="chain">{items}<li><b>image</b> {number(images)} images</li></ol></div>',
        f"<pre>{escape(query)}</pre>",
    )


def _config(run: Run) -> str:
    try:
        text = json.dumps(json.loads(run.row["config_json"] or "{}"), indent=2, sort_keys=True)
    except ValueError:
        text = run.row["config_json"]
    return f"\n<section><details><summary>Configuration</summary><pre>{escape(text)}</pre></details></section><footer>{escape(run.run_id)}</footer>"
