"""Where scores stand in their buckets: exact counts, on a lake whose every score is written by hand."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from dreamlite_data.lake import Lake
from dreamlite_data.policies.committed import check_sql
from dreamlite_data.policies.curate import judge
from dreamlite_data.policies.policy import read_policy

SIZES = {"wide": (1280, 720), "square": (512, 512)}
COUNTS = {("lake_a", "wide"): 20, ("lake_a", "square"): 7, ("lake_b", "square"): 10}
EDITS = {"add": 10, "remove": 5}


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """37 captions in three buckets and 15 edits in two, scored so that every bucket has its own range of scores."""
    rng = np.random.default_rng(0)
    tables: dict[str, list[dict]] = {name: [] for name in ("images", "captions", "op_ingest", "scores", "edits", "dataset_rows")}
    for offset, ((source, shape), count) in enumerate(COUNTS.items()):
        for place, mu in enumerate(rng.permutation(count) + 100.0 * offset):
            name = f"{source}-{shape}-{place:02}"
            tables["images"].append({"image_id": name, "bytes": b"", "width": SIZES[shape][0], "height": SIZES[shape][1]})
            tables["captions"].append({"caption_id": f"c-{name}", "image_id": name, "text": "a circle", "style": "provider"})
            tables["op_ingest"].append(
                {
                    "subject_id": f"r-{name}",
                    "op_version": "i",
                    "source": source,
                    "task": "generate",
                    "image_id": name,
                    "caption_id": f"c-{name}",
                }
            )
            tables["scores"].append({"subject_id": f"c-{name}", "op_version": "g", "task": "generate", "scorer_id": "hpsv3-x", "mu": mu})
            tables["scores"].append({"subject_id": f"c-{name}", "op_version": "p", "task": "generate", "scorer_id": "clip-x", "mu": -mu})
            tables["dataset_rows"].append(
                {"name": "t2i", "version": 1, "row_id": f"r-{name}", "task": "generate", "image_id": name, "split": "train"}
            )
    for offset, (kind, count) in enumerate(EDITS.items()):
        for place, mu in enumerate(rng.permutation(count) - 50.0 * offset):
            name = f"{kind}-{place:02}"
            tables["edits"].append(
                {
                    "edit_id": f"e-{name}",
                    "source_image_id": "lake_a-wide-00",
                    "target_image_id": "lake_a-wide-01",
                    "instruction": kind,
                    "edit_type": kind,
                }
            )
            tables["op_ingest"].append(
                {"subject_id": f"r-{name}", "op_version": "i", "source": "lake_a", "task": "edit", "edit_id": f"e-{name}"}
            )
            tables["scores"].append({"subject_id": f"e-{name}", "op_version": "e", "task": "edit", "scorer_id": "editreward-x", "mu": mu})
            tables["dataset_rows"].append(
                {"name": "edit", "version": 1, "row_id": f"r-{name}", "task": "edit", "image_id": "lake_a-wide-01", "split": "train"}
            )
    failed = {"subject_id": "c-lake_b-square-00", "op_version": "g0", "task": "generate", "mu": 1e9}  # of a version that no longer holds
    tables["scores"].append(failed)
    lake = Lake(tmp_path_factory.mktemp("ranked"))
    versions = {"ingest": "i", "score_generate": "g", "score_generate_clip": "p", "score_edit": "e"}
    lake.append(
        {**tables, "operator_versions": [{"name": name, "op_version": version, "position": 0} for name, version in versions.items()]}
    )
    return lake


def top(lake: Lake, share: float, scorer: str = "reward") -> dict[tuple[str, str], int]:
    rows = lake.query(
        "SELECT source, bucket, count(*) AS n FROM score_ranks WHERE top_share <= $q AND scorer = $scorer GROUP BY ALL",
        {"q": share, "scorer": scorer},
    ).to_pylist()
    return {(row["source"], row["bucket"]): row["n"] for row in rows}


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.35, 0.5, 1.0])
def test_the_top_share_of_every_bucket_has_floor_qn_rows(ranked: Lake, share: float) -> None:
    sizes = {
        ("lake_a", "16:9 512 px"): 20,
        ("lake_a", "1:1 512 px"): 7,
        ("lake_b", "1:1 512 px"): 10,
        ("lake_a", "add"): 10,
        ("lake_a", "remove"): 5,
    }
    wanted = {bucket: int(share * count + 1e-9) for bucket, count in sizes.items()}
    assert top(ranked, share) == {bucket: count for bucket, count in wanted.items() if count}


def test_positions_follow_the_scores_of_their_scorer(ranked: Lake) -> None:
    rows = ranked.query("SELECT * FROM score_ranks ORDER BY task, scorer, source, bucket, position").to_pylist()
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["scorer"], row["source"], row["bucket"]), []).append(row)
    assert len(groups) == 3 + 3 + 2
    for group in groups.values():
        assert [row["position"] for row in group] == list(range(1, len(group) + 1)) and {row["bucket_rows"] for row in group} == {
            len(group)
        }
        assert [row["mu"] for row in group] == sorted((row["mu"] for row in group), reverse=True)
        z = np.array([row["z"] for row in group])
        assert z.mean() == pytest.approx(0, abs=1e-9) and z.std(ddof=1) == pytest.approx(1)
    best = {row["subject_id"] for row in rows if row["position"] == 1 and row["task"] == "generate" and row["scorer"] == "reward"}
    worst = {row["subject_id"] for row in rows if row["position"] == row["bucket_rows"] and row["scorer"] == "clip"}
    assert best == worst  # the other scorer was written upside down


def test_quantiles_are_those_of_the_bucket(ranked: Lake) -> None:
    row = ranked.query("SELECT * FROM score_quantiles WHERE source = 'lake_b' AND scorer = 'reward'").to_pylist()[0]
    values = np.arange(10) + 200.0
    assert (row["bucket"], row["n"], row["mean"], row["p50"]) == (
        "1:1 512 px",
        10,
        pytest.approx(values.mean()),
        pytest.approx(np.median(values)),
    )
    assert row["p05"] == pytest.approx(np.quantile(values, 0.05)) and row["p90"] == pytest.approx(np.quantile(values, 0.9))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((64, 64), "1:1 64 px"), ((1024, 1024), "1:1 1024 px"), ((1023, 1024), "1:1 512 px"), ((1024, 512), "2:1 512 px"), ((512, 1024), "1:2 512 px"),
     ((1920, 1080), "16:9 1024 px"), ((800, 600), "4:3 512 px"), ((600, 900), "2:3 512 px"), ((5000, 100), "2:1 512 px"), ((768, 1024), "3:4 512 px")],
)  # fmt: skip
def test_buckets_take_the_nearest_aspect(ranked: Lake, size: tuple[int, int], bucket: str) -> None:
    sql = "SELECT aspect_bucket($w, $h) || ' ' || size_bucket($w, $h) AS bucket"
    assert ranked.query(sql, {"w": size[0], "h": size[1]})["bucket"][0].as_py() == bucket


def test_the_example_policy_keeps_the_best_of_each_bucket(ranked: Lake) -> None:
    file = Path(str(resources.files("dreamlite_data.policies").joinpath("examples/best_of_bucket.sql")))
    policy = read_policy("sft", file.read_text("utf-8"), str(file))
    parameters = {"t2i_version": 1, "edit_version": 1, "sft_share": 0.2}
    check_sql(ranked, policy, parameters, str(file))
    judged, outcome = judge(ranked, policy, parameters)
    kept = [row for row in judged.to_pylist() if row["verdict"] == "keep"]
    assert len(judged) == 52 and outcome[0][1:] == (52, 52 - 10)
    counted: dict[str, int] = {}
    for row in kept:
        bucket = row["row_id"].rsplit("-", 1)[0]
        counted[bucket] = counted.get(bucket, 0) + 1
    assert counted == {"r-lake_a-wide": 4, "r-lake_a-square": 1, "r-lake_b-square": 2, "r-add": 2, "r-remove": 1}
    first_out = judged.to_pylist()[[row["first_rule"] for row in judged.to_pylist()].index("best_of_its_bucket")]
    assert first_out["margin"] == pytest.approx(0.2 - first_out["top_share"])  # by how much it missed
