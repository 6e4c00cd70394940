"""Scoring: what is stored, in which batches, that two stages change no byte, and that only what is pending is paid for."""

from __future__ import annotations

import functools
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import trainers
from dreamlite_data import executors, refresh, scenes
from dreamlite_data.lake import Lake
from dreamlite_data.model_settings import ScoringSettings
from dreamlite_data.operators.base import op_version
from dreamlite_data.operators.run import Measurement, measure_pending
from dreamlite_data.operators.score import Score
from dreamlite_data.rewards import RewardModel
from dreamlite_data.rewards.packing import PackedRows
from dreamlite_data.settings import RefreshSettings
from tests.dreamlite_data.conftest import small_settings
from tests.dreamlite_data.rewards import tiny_scorers

REWARDS = {task: Path(trainers.__file__).parent / "components" / "small_world" / "rewards" / task for task in ("generate", "edit")}
HEADS = ("follow_mu", "follow_log_sigma", "quality_mu", "quality_log_sigma")
VERSIONS = {name: name for name in ("ingest", "verify_caption", "verify_edit")}
CAPTIONS, EDITS = 20, 18


def settings_with(**changes: object) -> RefreshSettings:
    return small_settings(**{"ingest": {"rows_per_task": 8}, **changes})


def measured_rows() -> dict[str, list[dict]]:
    """What a refresh has stored of rendered scenes before it scores them: one caption does not match its picture."""
    rng = np.random.default_rng(0)
    tables: dict[str, list[dict]] = {
        name: [] for name in ("images", "captions", "edits", "op_ingest", "op_verify_caption", "op_verify_edit")
    }
    for number in range(CAPTIONS):
        scene, name = scenes.sample_scene(rng), f"{number:02}"
        tables["images"].append({"image_id": name, "bytes": png_of(scenes.render(scene)), "width": 64, "height": 64})
        tables["captions"].append({"caption_id": f"c{name}", "image_id": name, "text": scenes.caption(scene), "style": "provider"})
        tables["op_ingest"].append(
            {
                "subject_id": f"r{name}",
                "op_version": "ingest",
                "source": "world",
                "task": "generate",
                "image_id": name,
                "caption_id": f"c{name}",
            }
        )
        matches = number != 0
        tables["op_verify_caption"].append(
            {"subject_id": f"c{name}", "op_version": "verify_caption", "in_language": True, "matches": matches}
        )
    for number in range(EDITS):
        edit, name = f"e{number:02}", f"{number:02}"
        tables["edits"].append(
            {
                "edit_id": edit,
                "source_image_id": name,
                "target_image_id": f"{number + 1:02}",
                "instruction": "make the circle red",
                "edit_type": "recolour",
            }
        )
        tables["op_ingest"].append({"subject_id": f"t{name}", "op_version": "ingest", "source": "world", "task": "edit", "edit_id": edit})
        tables["op_verify_edit"].append({"subject_id": edit, "op_version": "verify_edit", "in_language": True, "matches": True})
    return tables | {"operator_versions": [{"name": name, "op_version": version, "position": 0} for name, version in VERSIONS.items()]}


@pytest.fixture(scope="module")
def unscored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small lake with everything but scores; tests score copies of it."""
    folder = tmp_path_factory.mktemp("unscored") / "lake"
    with Lake(folder) as lake:
        lake.append(measured_rows())
    return folder


def copy_of(folder: Path, to: Path) -> Lake:
    return Lake(shutil.copytree(folder, to))


@pytest.fixture(scope="module")
def scored(unscored: Path, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """The lake with the scores of both rewards, in tasks of 8 rows."""
    lake = copy_of(unscored, tmp_path_factory.mktemp("scored") / "lake")
    refresh.score(lake, settings_with(), executors.local(), REWARDS)
    return lake


def scores_of(lake: Lake) -> list[dict]:
    return lake.query("SELECT * FROM scores ORDER BY ALL").to_pylist()


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    return png_of(np.full((64, 64, 3), colour, np.uint8))


def rows_of(payloads: list[bytes], texts: list[str | None], sources: list[bytes] | None = None) -> pa.Table:
    columns = {"subject_id": [f"s{number}" for number in range(len(texts))], "text": texts, "image_bytes": payloads}
    return pa.table({name: pa.array(values) for name, values in (columns | ({"source_bytes": sources} if sources else {})).items()})


# --- what is stored --------------------------------------------------------------------------------------------------


def test_an_edit_s_heads_are_stored_beside_their_mean(scored):
    rows = scored.query("SELECT * FROM scores WHERE task = 'edit'").to_pylist()
    assert len(rows) == EDITS
    for row in rows:
        assert row["error"] is None and row["n_tokens"] > 0
        assert row["mu"] == pytest.approx((row["follow_mu"] + row["quality_mu"]) / 2, abs=1e-5)
        assert row["log_sigma"] == pytest.approx((row["follow_log_sigma"] + row["quality_log_sigma"]) / 2, abs=1e-5)
    assert any(abs(row["follow_mu"] - row["quality_mu"]) > 0.1 for row in rows)


def test_a_caption_s_reward_has_one_head(scored):
    rows = scored.query("SELECT * FROM scores WHERE task = 'generate'").to_pylist()
    assert len(rows) == CAPTIONS - 1  # without the caption that does not match
    assert all(row[name] is None for row in rows for name in HEADS)
    assert all(row["mu"] is not None and row["n_tokens"] > 0 for row in rows)


def test_a_row_that_cannot_be_scored_says_why_and_the_rest_go_on():
    rows = rows_of([png(), b"not an image", png()], ["a red circle", "a red circle", None])
    answer = Score("generate", REWARDS["generate"], "w")(rows)
    assert answer["subject_id"].to_pylist() == ["s0", "s1", "s2"]
    errors = answer["error"].to_pylist()
    assert errors[0] is None and "UnidentifiedImageError" in errors[1] and "not text" in errors[2]
    assert answer["mu"].null_count == answer["log_sigma"].null_count == answer["n_tokens"].null_count == 2
    broken_source = Score("edit", REWARDS["edit"], "w")(rows_of([png()] * 2, ["make it blue"] * 2, [png(), png()[:40]]))
    assert broken_source["error"][0].as_py() is None and broken_source["error"][1].as_py() is not None
    assert broken_source["follow_mu"].null_count == 1


# --- batches ---------------------------------------------------------------------------------------------------------


def packed_of(lengths: list[int]) -> PackedRows:
    count = len(lengths)
    return PackedRows(
        np.arange(count), np.empty(0, np.uint8), np.zeros((count, 1, 2), np.int32), np.empty(0, np.int32),
        np.stack([np.asarray(lengths, np.int32), np.zeros(count, np.int32)], 1), (None,) * count,
    )  # fmt: skip


@pytest.mark.parametrize("budget", [1, 100, 777, 10_000])
def test_batches_fill_the_token_budget_and_never_pass_it(budget):
    lengths = np.random.default_rng(budget).integers(20, 400, 64).tolist()
    batches = packed_of(lengths).batches(budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(64))  # every row once
    padded = [len(batch) * max(lengths[row] for row in batch) for batch in batches]
    assert all(tokens <= budget or len(batch) == 1 for tokens, batch in zip(padded, batches, strict=True))
    for batch, following in zip(batches, batches[1:], strict=False):  # no batch could have taken the next row too
        assert (len(batch) + 1) * lengths[following[0]] > budget


def test_batches_count_tokens_and_not_rows(monkeypatch):
    sizes: list[tuple[int, int]] = []
    score_batch = RewardModel._score_batch

    def counted(self, packed, batch):
        sizes.append((len(batch), len(batch) * int(packed.n_tokens[batch].max())))
        return score_batch(self, packed, batch)

    monkeypatch.setattr(RewardModel, "_score_batch", counted)
    texts = ["red"] * 14 + ["a large red circle at the top on a blue background and " * 8] * 4
    rows = rows_of([png()] * 18, texts)
    found = {}
    for budget in (250, 500):
        sizes.clear()
        found[budget] = Score("generate", REWARDS["generate"], "w", ScoringSettings(batch_tokens=budget))(rows)
        assert all(tokens <= budget or count == 1 for count, tokens in sizes) and sum(count for count, _ in sizes) == 18
        assert len({count for count, _ in sizes}) > 1  # short rows stand in larger batches
    np.testing.assert_allclose(found[250]["mu"].to_numpy(), found[500]["mu"].to_numpy(), rtol=0, atol=2e-5)
    assert op_version(Score("generate", REWARDS["generate"], "w", ScoringSettings(batch_tokens=250))) == op_version(
        Score("generate", REWARDS["generate"], "w")
    )


# --- two stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_packed_rows_cross_to_another_process_and_change_no_byte(task):
    payloads, texts = [png((number * 20, 30, 200)) for number in range(5)] + [b"bad"], ["a red circle"] * 6
    rows = rows_of(payloads, texts, [png()] * 6 if task == "edit" else None)
    operator = Score(task, REWARDS[task], "w")
    prepared = operator.prepare(rows)
    stored = pickle.dumps(prepared["packed"])
    assert b"PIL" not in stored and payloads[0] not in stored  # plain arrays, and no file of an image
    assert operator.infer({**prepared, "packed": pickle.loads(stored)}).equals(operator(rows))


def test_preparing_loads_no_model(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("dreamlite_data.operators.score.scorer", refuse)
    assert len(Score("generate", REWARDS["generate"], "w").prepare(rows_of([png()], ["a red circle"]))["packed"].rows) == 1


def test_two_processes_give_the_bytes_of_one(scored, unscored, tmp_path):
    lake = copy_of(unscored, tmp_path / "lake")
    with executors.local(2) as executor:
        refresh.score(lake, settings_with(), executor, REWARDS)
        assert executor.started == 1
    assert scores_of(lake) == scores_of(scored)


@pytest.mark.thorough
def test_an_actor_on_a_gpu_gives_the_bytes_of_one_process(scored, unscored, tmp_path, monkeypatch):
    import ray

    ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", str(Path(trainers.__file__).parents[1]))  # where the workers find the package
    # A GPU in Ray's books only: the actor is placed by it and computes on the CPU.
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    try:
        lake, settings = copy_of(unscored, tmp_path / "lake"), settings_with(scoring={"num_gpus": 1.0})
        executor = executors.ray(2)
        answer = refresh.score(lake, settings, executor, REWARDS)
        assert answer["edit_rows"] > 8 and scores_of(lake) == scores_of(scored)
        again = refresh.score(lake, settings, executor, REWARDS)
        assert again["edit_rows"] == again["generate_rows"] == 0
    finally:
        ray.shutdown()


# --- only what is pending --------------------------------------------------------------------------------------------


def test_a_second_run_packs_and_scores_nothing(scored, monkeypatch):
    before, snapshot = scores_of(scored), scored.snapshot()

    def refuse(*_: object) -> None:
        raise AssertionError("work without need")

    monkeypatch.setattr(Score, "prepare", refuse)
    monkeypatch.setattr(Score, "infer", refuse)
    answer = refresh.score(scored, settings_with(), executors.local(), REWARDS)
    assert set(answer.values()) == {0} and scores_of(scored) == before and scored.snapshot() == snapshot


def test_an_interrupted_run_goes_on_where_it_stopped(scored, unscored, tmp_path, monkeypatch):
    lake = copy_of(unscored, tmp_path / "lake")
    calls, infer = [], Score.infer

    def breaks(self, prepared):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prepared["subjects"]))
        return infer(self, prepared)

    monkeypatch.setattr(Score, "infer", breaks)
    with pytest.raises(KeyboardInterrupt):
        refresh.score(lake, settings_with(), executors.local(), REWARDS)
    assert len(scores_of(lake)) == sum(calls) == 16
    monkeypatch.setattr(Score, "infer", infer)
    answer = refresh.score(lake, settings_with(), executors.local(), REWARDS)
    whole, resumed = scores_of(scored), scores_of(lake)
    assert answer["generate_rows"] + answer["edit_rows"] == len(whole) - 16
    assert [row["subject_id"] for row in resumed] == [row["subject_id"] for row in whole]
    np.testing.assert_allclose([row["mu"] for row in resumed], [row["mu"] for row in whole], rtol=0, atol=2e-5)


def test_scores_of_an_older_lake_stay_valid(unscored, tmp_path):
    lake = copy_of(unscored, tmp_path / "lake")
    refresh.score(lake, settings_with(), executors.local(), REWARDS)
    before = lake.query("SELECT subject_id, op_version, mu FROM scores ORDER BY ALL").to_pylist()
    for column in (*HEADS, "n_tokens"):  # the table as it was made before heads were stored
        lake.write(functools.partial(_drop_column, column))
    lake.close()
    again = Lake(tmp_path / "lake")
    answer = refresh.score(again, settings_with(), executors.local(), REWARDS)
    assert set(answer.values()) == {0}
    assert again.query("SELECT subject_id, op_version, mu FROM scores ORDER BY ALL").to_pylist() == before
    assert again.query("SELECT count(*) AS n FROM scores WHERE follow_mu IS NOT NULL")["n"][0].as_py() == 0


def _drop_column(column: str, connection) -> None:
    connection.execute(f"ALTER TABLE scores DROP COLUMN {column}")


def test_the_key_holds_weights_and_precision_alone():
    # Of the operator as it was before: scores that a lake holds are found again by this key.
    plain = Score("generate", REWARDS["generate"], "w")
    assert plain.config() == {"weights": "w"} and plain.name == "score_generate" and plain.version == 1
    half = Score("generate", REWARDS["generate"], "w", ScoringSettings(dtype="bfloat16", num_gpus=1))
    assert op_version(half) != op_version(plain)
    assert half.resources == {"num_cpus": 1.0, "num_gpus": 1.0} and plain.resources == {"num_cpus": 1.0}


# --- further scorers -------------------------------------------------------------------------------------------------


def test_further_scorers_fill_the_same_table_and_leave_the_reward_alone(unscored, tmp_path):
    folders = {"clip": tmp_path / "clip", "aesthetic": tmp_path / "aesthetic"}
    for folder in folders.values():
        folder.mkdir()
        tiny_scorers.tiny_clip_model(folder)
    tiny_scorers.save_laion_head(folders["aesthetic"], tiny_scorers.laion_head(12))
    further = [
        {"kind": "clip", "model": folders["clip"]},
        {"kind": "aesthetic", "model": folders["aesthetic"], "tasks": ["generate", "edit"]},
    ]
    lake = copy_of(unscored, tmp_path / "lake")
    refresh.score(lake, settings_with(), executors.local(), REWARDS)
    rewards = {
        view: lake.query(f"SELECT row_id, reward FROM {view} ORDER BY row_id").to_pylist() for view in ("t2i_records", "edit_records")
    }
    answer = refresh.score(lake, settings_with(scoring={"further": further}), executors.local(), REWARDS)
    assert answer["generate_rows"] == answer["edit_rows"] == 0
    counts = lake.query("SELECT task, count(*) AS n FROM current_scores GROUP BY task").to_pylist()
    counts = {row["task"]: row["n"] for row in counts}
    assert (
        answer["generate_clip_rows"] == answer["generate_aesthetic_rows"] == counts["generate"]
        and answer["edit_aesthetic_rows"] == counts["edit"]
    )
    for view, before in rewards.items():
        assert lake.query(f"SELECT row_id, reward FROM {view} ORDER BY row_id").to_pylist() == before
    found = lake.query("SELECT DISTINCT task, scorer FROM scorer_scores ORDER BY ALL").to_pylist()
    assert [(row["task"], row["scorer"]) for row in found] == [
        ("edit", "aesthetic"), ("edit", "reward"), ("generate", "aesthetic"), ("generate", "clip"), ("generate", "reward"),
    ]  # fmt: skip
    again = refresh.score(lake, settings_with(scoring={"further": further}), executors.local(), REWARDS)
    assert set(again.values()) == {0}


def test_a_scorer_of_captions_is_refused_for_edits_and_twice():
    with pytest.raises(ValueError, match="'clip' compares an image with its caption.*take 'aesthetic'"):
        ScoringSettings(further=[{"kind": "clip", "model": "x", "tasks": ["edit"]}])
    with pytest.raises(ValueError, match=r"asks twice for clip \(generate\)"):
        ScoringSettings(further=[{"kind": "clip", "model": "x"}, {"kind": "clip", "model": "y"}])


def test_measure_pending_runs_a_staged_operator_in_stages(scored, monkeypatch):
    used = []
    executor = executors.local()
    staged = executor.map_stages

    def watched(first, second, tasks, resources):
        used.append((first.__name__, second.__name__))
        return staged(first, second, tasks, resources)

    monkeypatch.setattr(executor, "map_stages", watched)
    make = functools.partial(Score, "generate", REWARDS["generate"], "other weights")
    subjects = "SELECT DISTINCT caption_id AS subject_id, text, image_id FROM t2i_records WHERE matches ORDER BY 1 LIMIT 3"
    before = scored.count("scores")
    counts = measure_pending(scored, Measurement(make, subjects, {"image_bytes": "image_id"}), executor, 2)
    assert counts == {"rows": 3, "failed": 0} and used == [("prepare_task", "infer_task")]
    scored.write(lambda connection: connection.execute("DELETE FROM scores WHERE op_version = $version", {"version": op_version(make())}))
    scored.write(
        lambda connection: connection.execute("DELETE FROM operator_versions WHERE op_version = $version", {"version": op_version(make())})
    )
    assert scored.count("scores") == before
