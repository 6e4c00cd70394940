"""The report tells what the lake holds, shows reused steps with their first numbers, and stays self-contained."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamlite_data.lake import Lake
from dreamlite_data.schema import rows_table
from flows import charts
from flows.charts import Node
from flows.report import write_report
from flows.step import step_id

START = datetime(2026, 11, 20, 3, 0, tzinfo=UTC)
STAGES = ("t2i", "edit", "joint", "sft", "refl", "dmd2")
NASTY = '<script src="http://evil.example/x.js">alert(1)</script>'


def step_row(run: str, name: str, offset_s: float, seconds: float, state: str = "done", **outputs: Any) -> dict[str, Any]:
    begun = START + timedelta(seconds=offset_s)
    return {
        "run_id": run, "step": name, "key": name.encode().hex().ljust(64, "0"), "state": state, "started_at": begun,
        "ended_at": begun + timedelta(seconds=seconds), "seconds": seconds, "outputs_json": json.dumps(outputs),
        "metrics_json": "{}", "key_parts_json": "{}",
    }  # fmt: skip


def fill(lake: Lake, folder: Path, run: str) -> None:
    """A whole small run: eight data steps, six stages with evaluations, an export, all linked."""
    rng = np.random.default_rng(0)
    order = ["components", "sources", "ingest", "quality", "caption", "verify", "score", "curate"]
    order += [name for stage in STAGES for name in (stage, f"evaluate_{stage}")] + ["export", "evaluate_export"]
    steps, edges, evals, metrics, checkpoints, answers = [], [], [], [], [], []
    parents: dict[str, list[str]] = {name: [order[index - 1]] for index, name in enumerate(order) if 1 < index < 8}
    parents |= {"sources": [], "components": []}
    at = 0.0
    for index, stage in enumerate(STAGES):
        parents[stage] = ["components", "curate", *([STAGES[index - 1]] if index else [])]
        parents[f"evaluate_{stage}"] = ["components", "curate", stage]
    parents |= {"export": ["dmd2", "curate"], "evaluate_export": ["export"]}
    datasets = {"t2i": {"version": 1, "rows": 7400, "digest": "d1"}, "edit": {"version": 1, "rows": 7100, "digest": "d2"}}
    for name in order:
        outputs: dict[str, Any] = {"directory": str(folder / name)}
        if name == "curate":
            outputs["datasets"] = datasets
            outputs["fault_report"] = [{"fault": "wrong_caption", "planted": 110, "caught": 109, "recall": 109 / 110}]
        if name == "export":
            outputs["artifact_id"] = "artifact-1"
        seconds = {"t2i": 240.0, "edit": 160.0, "dmd2": 95.0}.get(name, 12.0)
        steps.append(step_row(run, name, at, seconds, **outputs))
        at += seconds
        for parent in parents[name]:
            edges.append(_edge("step", _id(name), "step", _id(parent), "input"))
    for index, stage in enumerate(STAGES):
        (folder / f"evaluate_{stage}").mkdir(parents=True)
        for task in ("generate", "edit"):
            picture = rng.integers(0, 256, (96, 160, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"evaluate_{stage}" / f"grid_{task}.png")
        value = 0.35 + 0.1 * index
        evals += [
            _eval(run, stage, "generate", "generate_exact", value), _eval(run, stage, "edit", "edit_exact", value - 0.2),
            _eval(run, stage, "edit", "edit_exact_recolour", value - 0.1), _eval(run, stage, "generate", "velocity_loss", 0.3 - 0.02 * index),
        ]  # fmt: skip
        answers += [
            {"run_id": run, "stage": stage, "task": "generate", "question_id": f"q{number}", "repetition": 0, "exact": number < 35 + 10 * index,
             "reward": 1.0 + 0.1 * index if stage != "dmd2" else None}
            for number in range(100)
        ]  # fmt: skip
        for position in range(0, 1500, 3):
            value = math.exp(-position / 400) + rng.normal() * 0.05
            metrics.append({"run_id": run, "step": stage, "name": "loss", "position": position, "value": value})
        checkpoints.append(("checkpoint", _id(stage), "checkpoint", _id(STAGES[index - 1]) if index else None, "started_from"))
    for variant, loss in (("fp32", 0.0), ("int8", 0.012)):
        evals += [_eval(run, f"export_{variant}", task, f"{task}_exact", 0.8 - loss) for task in ("generate", "edit")]
    edges += [_edge(*row) for row in checkpoints if row[3]]
    edges += [_edge("artifact", "artifact-1", "checkpoint", _id("dmd2"), "exported_from"), _edge("checkpoint", _id("t2i"), "dataset", "t2i@1", "trained_on")]
    numbers = {
        "sizes": {"unet.onnx": 4_000_000, "unet_int8.onnx": 1_300_000},
        "parity": {"graphs": {"unet_fp32_generate": {"max_abs": 1e-6, "psnr_db": 143.0}}, "end_to_end": {"generate_int8": {"max_abs": 0.06, "psnr_db": 54.2}}},
        "quantization": {"unet_int8": {"weights": "int8", "activations": "uint8", "int8_layers": 124, "int8_weight_share": 0.94,
                                       "cpu_flags": ["avx2"], "calibration": {"samples": 256, "rows": 64}}},
    }  # fmt: skip
    policy = [("decodes", 90), ("text_in_language", 400), ("never_used", 0), ("caption_matches", 110)]
    decided = [(rule, n, position) for position, (rule, n) in enumerate(policy)] + [(None, 7400, None)]
    tables: dict[str, list[dict[str, Any]]] = {
        "steps": steps, "lineage": edges, "evals": evals, "eval_answers": answers, "metrics": metrics,
        "artifacts": [{"artifact_id": "artifact-1", "kind": "bundle", "path": "x", "bytes": 9_000_000, "digest": "d", "metrics_json": json.dumps(numbers)}],
        "datasets": [{"name": "t2i", "version": 1, "digest": "d1", "policy_digest": "p", "snapshot": 1, "parent": None, "rows": 7400}],
        "dataset_rows": [{"name": "t2i", "version": 1, "row_id": f"r{i}", "task": "generate", "image_id": f"i{i}", "text": "a", "split": "train"} for i in range(3)],
        "policy_rules": [{"dataset": "t2i", "version": 1, "position": p, "rule": r, "body": "", "parameters": "{}"} for p, (r, _) in enumerate(policy)],
        "decisions": [{"dataset": "t2i", "version": 1, "row_id": f"{rule}{i}", "verdict": "drop" if rule else "keep", "first_rule": rule, "rule_position": position}
                      for rule, n, position in decided for i in range(n)],
    }  # fmt: skip
    _run(lake, run)
    lake.append({name: rows_table(name, rows) for name, rows in tables.items()})


def _run(lake: Lake, run: str, **fields: Any) -> None:
    row = {"run_id": run, "flow": "retrain", "preset": "mini", "config_json": json.dumps({"seed": 0, "note": NASTY}), "git_commit": "0123456789abcdef",
           "started_at": START, "ended_at": START + timedelta(seconds=1000), "state": "done"}  # fmt: skip
    lake.append({"runs": rows_table("runs", [row | fields])})


def _id(name: str) -> str:
    return step_id(name, name.encode().hex().ljust(64, "0"))


def _edge(child_kind: str, child: str, parent_kind: str, parent: str | None, role: str) -> dict[str, Any]:
    return {"child_kind": child_kind, "child_id": child, "parent_kind": parent_kind, "parent_id": parent, "role": role}


def _eval(run: str, stage: str, task: str, metric: str, value: float) -> dict[str, Any]:
    ends = {"low": value - 0.07, "high": value + 0.05} if "exact" in metric else {}
    return {"run_id": run, "stage": stage, "task": task, "metric": metric, "value": value, "n": 192, **ends}


class Page(HTMLParser):
    """Collects what a browser would load, the visible text, and tags left open."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    root = tmp_path_factory.mktemp("lake")
    with Lake(root) as lake:
        fill(lake, root / "files", "retrain-1")
        yield lake


@pytest.fixture(scope="module")
def html(lake: Lake, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(lake, "retrain-1", tmp_path_factory.mktemp("report")).read_text(encoding="utf-8")


def test_page_loads_nothing_and_escapes_everything(html: str) -> None:
    page = Page(html)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert page.loads and all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert not re.search(r"url\(|@import", html)
    assert NASTY not in html and json.dumps(NASTY)[1:-1] in page.text  # shown as text in the configuration


def test_numbers_reach_the_page(html: str) -> None:
    text = Page(html).text
    for expected in ("85.0%", "65.0%", "78.8%", "1.30 MB", "1.0e-06", "54.2 dB", "wrong_caption", "99.1%", "retrain-1", "preset mini"):
        assert expected in text, expected
    assert "−400" in text and "92.5% of what was offered" in text and "never_used" in text
    assert html.count("data:image/png") == 12
    assert html.count('class="curve"') == 6
    assert "3 images" in text and _id("t2i") in text and "t2i@1" in text


def test_a_breakdown_is_a_grid_of_rates_with_their_intervals(html: str) -> None:
    assert "Edits, by kind" in html and "recolour after dmd2: 75.0% (68.0% to 80.0%), n = 192" in html
    assert "Edits: the instruction followed" not in html  # nothing was measured by part: no empty card
    assert "85.0% ±6" in html and "edit: exact recolour" not in html


def test_changes_are_drawn_from_each_stage_to_the_next_and_never_across(html: str) -> None:
    text = Page(html).text
    assert html.count('<g class="change up">') == 9  # five of exact answers, four of rewards: the last stage has none
    assert "of the same 100 pictures" in text and text.count("10 mended, 0 broken") == 5 and "20 mended" not in text
    assert text.index("t2i → edit, generate") < text.index("refl → dmd2, generate") and "+0.10 (+0.10 to +0.10)" in text


def test_every_step_is_a_box_with_its_time(html: str) -> None:
    svg = html[html.index('<svg class="dag"') : html.index("</svg>", html.index('<svg class="dag"'))]
    assert svg.count('class="node done"') == 22
    assert "4 min 00 s" in svg and "nan" not in svg


def test_reused_steps_show_the_run_that_computed_them(lake: Lake, tmp_path: Path) -> None:
    """A second run that skipped everything shows the same numbers and pictures, and says that nothing was computed."""
    rows = lake.query("SELECT * FROM steps WHERE run_id = 'retrain-1'").to_pylist()
    again = []
    for row in rows:
        outputs = json.loads(row["outputs_json"]) | {"done_by": "retrain-1"}
        again.append(row | {"run_id": "retrain-2", "state": "skipped", "seconds": 0.0, "outputs_json": json.dumps(outputs)})
    _run(lake, "retrain-2", started_at=START + timedelta(days=1), ended_at=START + timedelta(days=1, seconds=2))
    lake.append({"steps": rows_table("steps", again)})
    text = write_report(lake, "retrain-2", tmp_path).read_text(encoding="utf-8")
    assert "0 + 22" in Page(text).text and "4 min 00 s" in Page(text).text
    assert text.count("data:image/png") == 12 and text.count('class="curve"') == 6
    assert "85.0%" in text


def test_a_failed_run_says_why_and_leaves_out_the_rest(lake: Lake, tmp_path: Path) -> None:
    _run(lake, "retrain-3", state="failed")
    failed = step_row("retrain-3", "t2i", 0, 3.0, "failed", error=f"ValueError: {NASTY}", directory=str(tmp_path / "gone"))
    lake.append({"steps": rows_table("steps", [failed])})
    html = write_report(lake, "retrain-3", tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert "ValueError" in page.text and NASTY not in html and page.open == []
    assert "What ships" not in html and "The pictures" not in html


def test_an_unknown_run_is_refused_with_the_known_ones(lake: Lake, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retrain-1"):
        write_report(lake, "nope", tmp_path)
    assert not list(tmp_path.iterdir())


def test_shortcut_edges_are_left_out() -> None:
    nodes = [Node("a", "done", 1), Node("b", "done", 1, ("a",)), Node("c", "done", 1, ("a", "b"))]
    assert charts._reduced(nodes) == [("a", "b"), ("b", "c")]


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(0.0, 1.0), (1.0, 1.0)], [(i, math.inf if i == 3 else i) for i in range(2000)]])
def test_curves_survive_odd_values(points: list[tuple[float, float]]) -> None:
    drawn = charts.curve("loss", points)
    assert "nan" not in drawn and "inf" not in drawn and len(drawn) < 20_000
    assert bool(drawn) == any(math.isfinite(y) for _, y in points)
