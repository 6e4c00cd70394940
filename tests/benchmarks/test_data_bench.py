"""What data costs: rows per second of ingest and measurement, a refresh with nothing to do, and questions to a lake of a million rows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dreamlite_data import executors, refresh
from dreamlite_data.images import decode_stored
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings

pytestmark = pytest.mark.benchmark

ROWS = 1_000_000
QUESTIONS = {
    "funnel": "SELECT * FROM funnel",
    "why_dropped": "SELECT rule, count(*) AS n, avg(margin) AS margin FROM why_dropped GROUP BY rule ORDER BY n DESC",
    "dataset_split": "SELECT split, count(*) FROM dataset_rows WHERE name = 't2i' AND version = 1 GROUP BY split",
    "blurred_by_source": "SELECT source, count(*) FROM op_ingest i JOIN current_quality q ON q.subject_id = i.image_id "
    "WHERE q.sharpness < 0.1 GROUP BY source",
    "worst_samples": "SELECT row_id, text, sharpness FROM samples WHERE sharpness < 0.001 ORDER BY sharpness LIMIT 20",
    "images_of_artifact": "SELECT kind, count(*) FROM lineage_of('phone') GROUP BY kind",
}  # fmt: skip


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """A million records with everything measured and decided, generated in SQL. Image bytes are small, but never needed."""
    lake = Lake(tmp_path_factory.mktemp("million"))
    numbers = f"range({ROWS}) t(n)"
    statements = [
        f"INSERT INTO images SELECT sha256('i' || n), encode('x'), 'image/png', 64, 64, 1 FROM {numbers}",
        f"INSERT INTO captions SELECT sha256('c' || n), sha256('i' || n), 'provider', 'a caption of ' || n, 'provider', 'v' FROM {numbers}",
        "INSERT INTO op_ingest BY NAME SELECT 'r' || n AS subject_id, 'v' AS op_version, 's' || n % 5 AS source, 'scenes' AS domain, "
        f"'generate' AS task, sha256('i' || n) AS image_id, sha256('c' || n) AS caption_id FROM {numbers}",
        "INSERT INTO op_quality BY NAME SELECT sha256('i' || n) AS subject_id, 'v' AS op_version, CAST(hash(n) % 1000000 AS FLOAT) / 1000000 "
        f"AS sharpness FROM {numbers}",
        "INSERT INTO op_duplicates BY NAME SELECT sha256('i' || n) AS subject_id, 'v' AS op_version, sha256('i' || n) AS group_id, "
        f"'first' AS kind, 0 AS distance FROM {numbers}",
        f"INSERT INTO op_caption BY NAME SELECT sha256('i' || n) AS subject_id, 'v' AS op_version FROM {numbers}",
        f"INSERT INTO op_verify_caption SELECT sha256('c' || n), 'v', true, n % 20 > 0, NULL, NULL FROM {numbers}",
        "INSERT INTO operator_versions SELECT unnest(['ingest', 'quality', 'duplicates', 'caption', 'verify_caption']), 'v', '{}', 0",
        "INSERT INTO datasets VALUES ('t2i', 1, 'd', 'p', 1, NULL, 0)",
        "INSERT INTO dataset_rows BY NAME SELECT 't2i' AS name, 1 AS version, 'r' || n AS row_id, 'generate' AS task, "
        f"sha256('i' || n) AS image_id, CASE WHEN n % 20 = 1 THEN 'heldout' ELSE 'train' END AS split FROM {numbers} WHERE n % 20 > 0",
        "INSERT INTO policy_rules SELECT 't2i', 1, unnest([0, 1]), unnest(['ingested', 'caption_matches_image']), '', ''",
        "INSERT INTO decisions BY NAME SELECT 't2i' AS dataset, 1 AS version, 'r' || n AS row_id, CASE WHEN n % 20 = 0 THEN 'drop' ELSE 'keep' "
        "END AS verdict, CASE WHEN n % 20 = 0 THEN 'caption_matches_image' END AS first_rule, CASE WHEN n % 20 = 0 THEN 1 END AS rule_position "
        f"FROM {numbers}",
        "INSERT INTO lineage VALUES ('artifact', 'phone', 'checkpoint', 'c', 'r'), ('checkpoint', 'c', 'dataset', 't2i@1', 'r')",
    ]
    for statement in statements:
        lake.write(lambda connection, sql=statement: connection.execute(sql) and None)
    return lake


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_to_a_million_rows(bench, million: Lake, name: str) -> None:
    answer = million.query_read_only(QUESTIONS[name])
    assert len(answer)
    bench(f"query_{name}_1m_s", bench.best_of(3, lambda: million.query_read_only(QUESTIONS[name])), 1.0)


def test_finding_nothing_pending_in_a_million_rows(bench, million: Lake) -> None:
    from dreamlite_data.operators.run import pending

    subjects = "SELECT image_id FROM images"
    assert len(pending(million, subjects, "op_quality", "v")) == 0
    bench("nothing_pending_1m_s", bench.best_of(3, lambda: pending(million, subjects, "op_quality", "v")), 1.0)


def test_the_cost_of_measuring_against_decoding_alone(bench, tmp_path: Path) -> None:
    settings = RefreshSettings(scenes={"t2i_rows": 2000, "edit_rows": 0, "fault_share": 0.0}, photos={"enabled": False})
    lake, executor = Lake(tmp_path), executors.local()
    refresh.write_sources(lake, settings, 0)
    started = time.process_time()
    refresh.ingest(lake, settings, executor)
    ingest_s = time.process_time() - started
    payloads = lake.query("SELECT bytes FROM images")["bytes"].to_pylist()
    started = time.process_time()
    for payload in payloads:
        decode_stored(payload)
    decode_s = time.process_time() - started
    bench("ingest_cpu_over_decode", ingest_s / decode_s, 8.0)
    started = time.process_time()
    refresh.measure(lake, settings, executor, ["quality"])
    bench("quality_cpu_over_decode", (time.process_time() - started) / decode_s, 12.0)
    bench("ingest_rows_per_s", len(payloads) / ingest_s, 1000, higher_is_better=True)


def test_a_refresh_with_nothing_to_do(bench, tmp_path: Path) -> None:
    settings = RefreshSettings(scenes={"t2i_rows": 1000, "edit_rows": 500}, photos={"enabled": False})
    lake, executor = Lake(tmp_path), executors.local()

    def run() -> None:
        refresh.write_sources(lake, settings, 0)
        refresh.ingest(lake, settings, executor)
        refresh.measure(lake, settings, executor, ["quality", "caption", "verify"])
        refresh.curate(lake, settings, 0)

    run()
    bench("refresh_nothing_new_s", bench.best_of(2, run), 5.0)
