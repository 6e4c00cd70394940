"""What models and readers say of an edit reaches its rule; what is off stays unevaluated; nothing is asked, or decoded, twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dreamlite_data import executors, refresh, schema
from dreamlite_data.chat import endpoint
from dreamlite_data.lake import Lake
from dreamlite_data.operators import verify
from dreamlite_data.operators.run import withdraw_passing_failures
from dreamlite_data.settings import RefreshSettings
from tests.dreamlite_data.counting_server import CountingServer, completion
from tests.dreamlite_data.operators.tiny_towers import tiny_clip

EDITS = 16


def settings_for(**changes: object) -> RefreshSettings:
    return RefreshSettings(scenes={"t2i_rows": 0, "edit_rows": EDITS, "fault_share": 0.0}, photos={"enabled": False}, **changes)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of edits, measured and judged with nothing configured."""
    lake, settings = Lake(tmp_path_factory.mktemp("checks") / "lake"), settings_for()
    refresh.write_sources(lake, settings, 0)
    refresh.ingest(lake, settings, executors.local())
    refresh.measure(lake, settings, executors.local(), ["quality", "caption", "verify_caption", "verify_edit"])
    lake.close()
    return lake.root


@pytest.fixture
def lake(verified: Path, tmp_path: Path) -> Lake:
    return Lake(shutil.copytree(verified, tmp_path / "lake"))


def measured(lake: Lake, settings: RefreshSettings, *names: str) -> dict:
    return refresh.measure(lake, settings, executors.local(), names or ("verify_edit",))


def coverage(lake: Lake, measure: str) -> int:
    """How many triplets a condition was not evaluated of."""
    rows = lake.query("SELECT sum(not_evaluated) AS n FROM condition_coverage WHERE measure = $measure", {"measure": measure})
    return int(rows["n"][0].as_py() or 0)


def test_the_detector_is_on_and_the_rest_is_counted_as_not_evaluated(lake: Lake) -> None:
    rows = lake.query("SELECT * FROM current_verify_triplet").to_pylist()
    assert len(rows) == EDITS and {row["verdict"] for row in rows} == {"pass"}
    assert not any("object_in_target" in row["not_evaluated"] for row in rows)
    clip = [row for row in rows if "clip_target" in row["not_evaluated"]]
    assert clip and coverage(lake, "clip_target") == len(clip)
    asked = [row for row in rows if row["rule"] in ("attribute/colour", "scene/background")]
    assert asked and coverage(lake, "vqa_yes") == len(asked)
    assert "bytes" not in " ".join(lake.query_read_only("EXPLAIN SELECT * FROM condition_coverage")["explain_value"].to_pylist())


def test_embeddings_judge_without_a_decode_and_once(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(embed={"model": str(tiny_clip(tmp_path / "towers"))})
    measured(lake, settings, "embed")
    monkeypatch.setattr(verify, "decode_stored", None)  # the measures are there: no picture is opened again
    counts = measured(lake, settings)
    assert counts["edit_similarity_rows"] == counts["verify_triplet_rows"] == EDITS and counts["verify_edit_rows"] == 0
    assert counts["edit_similarity_failed"] == counts["verify_triplet_failed"] == 0
    assert coverage(lake, "clip_target") == coverage(lake, "clip_direction") == 0
    vectors = {row["subject_id"]: np.asarray(row["vector"]) for row in lake.query("SELECT * FROM current_embed").to_pylist()}
    judged = lake.query(
        "SELECT e.source_image_id, e.target_image_id, s.clip_target, s.clip_direction, a.text AS before, b.text AS after FROM edits e "
        "JOIN current_edit_similarity s ON s.subject_id = e.edit_id JOIN current_caption a ON a.subject_id = e.source_image_id "
        "JOIN current_caption b ON b.subject_id = e.target_image_id"
    ).to_pylist()
    from dreamlite_data.operators.embed import encoder

    towers, directed = encoder(settings.embed.model, None, 16), 0
    for row in judged:
        source, target = (vectors[row[name]] for name in ("source_image_id", "target_image_id"))
        before, after = (towers.texts([row[name]])[0] for name in ("before", "after"))
        assert row["clip_target"] == pytest.approx(float(target @ after), abs=1e-6)
        length = np.linalg.norm(target - source) * np.linalg.norm(after - before)
        if length < 1e-6:  # this tiny model reads some pairs of captions as the same: there is no way between them
            assert row["clip_direction"] is None
        else:
            directed += 1
            assert row["clip_direction"] == pytest.approx(float((target - source) @ (after - before) / length), abs=1e-4)
    assert directed > EDITS / 2
    monkeypatch.setattr("dreamlite_data.operators.embed.encoder", None)
    assert not any(value for value in measured(lake, settings).values() if not isinstance(value, str))
    # Switched off again, the first judgement holds, and costs nothing.
    assert measured(lake, settings_for())["verify_triplet_rows"] == 0 and coverage(lake, "clip_target") > 0


def test_a_question_is_asked_last_once_and_only_where_nothing_cheaper_failed(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    rule = "rule IN ('attribute/colour', 'scene/background')"
    lake.write(lambda connection: connection.execute(  # one of them with a change where none belongs
        f"UPDATE op_triplet_measures SET outside_fraction = 0.5 WHERE subject_id = (SELECT min(subject_id) FROM op_triplet_measures WHERE {rule})"
    ))  # fmt: skip
    asked = lake.query(f"SELECT count(*) AS n FROM op_triplet_measures WHERE {rule}")["n"][0].as_py() - 1
    assert asked >= 3
    with CountingServer(lambda body: completion("Yes, it does.")) as server:
        judge = {"backend": "endpoint", "model": "judge-7b", "base_url": server.url, "attempts": 1}
        replies = iter([(503, b"busy", {}), completion("no"), completion("perhaps")])
        server.reply = lambda body: next(replies, completion("Yes, it does."))
        settings = settings_for(judge={**judge, "concurrency": 1})
        counts = measured(lake, settings)
        assert counts["edit_question_rows"] == asked + 1 and counts["edit_question_failed"] == 2 and server.answered == asked
        [skipped] = lake.query("SELECT skipped FROM op_edit_question WHERE skipped IS NOT NULL")["skipped"].to_pylist()
        assert skipped.startswith("outside_fraction 0.5000 > ")
        images = [part for part in server.asked[0][0]["messages"][0]["content"] if part["type"] == "image_url"]
        assert len(images) == 2 and images[0] != images[1]
        verdicts = {row["verdict"]: row["n"] for row in lake.query("SELECT verdict, count(*) AS n FROM current_verify_triplet GROUP BY ALL").to_pylist()}
        # 'no' fails and so does the spoilt one; the busy one and the useless answer leave the condition unevaluated.
        assert verdicts == {"pass": EDITS - 2, "fail": 2} and coverage(lake, "vqa_yes") == 2 + 1
        # The next night asks the busy one alone and judges it anew; 'perhaps' is an answer, if a useless one.
        before = server.answered
        counts = measured(lake, settings)
        assert (counts["edit_question_rows"], counts["verify_triplet_rows"], server.answered - before) == (1, 1, 1)
        assert coverage(lake, "vqa_yes") == 1 + 1
        assert not any(measured(lake, settings).values()) and server.answered == before + 1
        # Another lake that has these answers pays nothing.
        lake.write(lambda connection: [connection.execute(f"DELETE FROM {table}") for table in ("op_edit_question", "op_verify_triplet")])
        measured(lake, settings)
        assert server.answered == before + 1


@pytest.mark.slow
def test_words_that_were_read_reach_the_rules_of_text(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    from dreamlite_data.operators.verify_cases import truth_photos
    from dreamlite_data.operators.verify_truth_photos import text_truth

    folder = tmp_path / "rows"
    folder.mkdir()
    cases = [case for case in text_truth(truth_photos(1, 2)) if case.edit_type == "text_replace" and case.fault in ("", "wrong_value")]
    lines = []
    for number, case in enumerate(cases):
        for role, pixels in (("source", case.source), ("target", case.target)):
            Image.fromarray(pixels).save(folder / f"{number}_{role}.png")
        lines.append(json.dumps({
            "source": f"{number}_source.png", "target": f"{number}_target.png", "words": case.instruction, "kind": case.edit_type,
        }))  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(lines))
    mapping = tmp_path / "ours.yaml"
    mapping.write_text(
        "name: ours\norigin: ours\nlicence: CC0-1.0\nlayouts: [jsonl]\ntask: edit\nimages: {source: source, target: target}\n"
        "instruction: words\nedit_type: kind\n"
    )
    settings = RefreshSettings(
        scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False}, text={"ocr": True},
        extra_sources=[{"name": "ours", "kind": "jsonl", "path": folder / "rows.jsonl", "mapping": str(mapping)}],
    )  # fmt: skip
    lake = Lake(tmp_path / "lake")
    refresh.ingest(lake, settings, executors.local())
    measured(lake, settings, "quality", "text", "caption", "verify_edit")
    rows = lake.query(
        "SELECT t.verdict, t.failed, t.not_evaluated, t.rule FROM current_verify_triplet t ORDER BY len(t.failed)"
    ).to_pylist()
    assert [row["rule"] for row in rows] == ["text/replace"] * 2
    assert rows[0]["verdict"] == "pass" and not {"text_before", "text_after", "text_gone"} & set(rows[0]["not_evaluated"])
    assert rows[1]["failed"] == ["text_after 0.0000 < 1.0000"]


def test_a_question_that_may_be_asked_again_opens_the_verdict_that_was_given_without_it(lake: Lake) -> None:
    def rows(table: str, subjects: dict[str, dict]) -> pa.Table:
        return schema.rows_table(table, [{"subject_id": subject, "op_version": "now", **said} for subject, said in subjects.items()])

    lake.append({
        "op_edit_question": rows("op_edit_question", {"busy": {"retry": True, "error": "timed out"}, "answered": {"yes": True}}),
        "op_verify_triplet": rows("op_verify_triplet", {"busy": {"verdict": "pass"}, "answered": {"verdict": "pass"}}),
    })  # fmt: skip

    def subjects(table: str) -> list[str]:
        return lake.query(f"SELECT subject_id FROM {table} WHERE op_version = 'now' ORDER BY 1")["subject_id"].to_pylist()

    withdraw_passing_failures(lake, "op_edit_question", "earlier", followed_by=("op_verify_triplet",))
    assert subjects("op_edit_question") == ["answered", "busy"]  # of another version: not ours
    withdraw_passing_failures(lake, "op_edit_question", "now", followed_by=("op_verify_triplet",))
    assert subjects("op_edit_question") == subjects("op_verify_triplet") == ["answered"]
