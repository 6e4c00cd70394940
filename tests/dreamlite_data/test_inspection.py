"""Measurements by models: off and said so by default, paid for once whatever happens, and equal however they ran."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import executors, refresh, schema
from dreamlite_data.chat import EndpointError, endpoint
from dreamlite_data.dataset import open_dataset
from dreamlite_data.lake import Lake
from dreamlite_data.operators.caption_draw import CaptionChoice, draw_probabilities
from dreamlite_data.operators.safety import MissingExtra
from dreamlite_data.policies import read_policy
from dreamlite_data.policies.curate import judge
from dreamlite_data.responses import responses_folder
from dreamlite_data.settings import RefreshSettings
from tests.dreamlite_data.conftest import contents
from tests.dreamlite_data.counting_server import CountingServer, completion, sha256_of_image, words_about_it
from tests.dreamlite_data.operators.tiny_towers import tiny_clip

IMAGES = 6
INSPECTED = ["op_describe", "op_embed", "op_similarity", "op_safety", "op_text", "captions"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noise pictures, every second one with words beside it."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (72, 80, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        if number % 2:
            (folder / f"{number}.txt").write_text(f"noise number {number}")
    return folder


def settings_for(pictures: Path, **changes: object) -> RefreshSettings:
    return RefreshSettings(
        scenes={"t2i_rows": 0, "edit_rows": 0}, photos={"enabled": False},
        extra_sources=({"name": "own", "kind": "folder", "path": pictures},),
        policy={"require_scene_language": False, "min_sharpness": 0.0, "allow_unanimous": ["*"], **changes.pop("policy", {})}, **changes,
    )  # fmt: skip


def asking(server_url: str, styles: tuple[str, ...] = ("tag", "short"), **changes: object) -> list[dict]:
    return [{"backend": "endpoint", "styles": styles, "model": "captioner-7b", "base_url": server_url, "concurrency": 3, **changes}]


Prepared = Callable[[Path], Lake]


def prepare(root: Path, settings: RefreshSettings) -> Lake:
    """A lake in which all is done that comes before the models."""
    lake = Lake(root)
    refresh.write_sources(lake, settings, 0)
    refresh.ingest(lake, settings, executors.local())
    refresh.measure(lake, settings, executors.local(), ["quality", "caption"])
    return lake


@pytest.fixture(scope="module")
def prepared(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Copies of one lake that holds the pictures: making it anew for each test would cost more than the tests."""
    root = tmp_path_factory.mktemp("prepared") / "lake"
    prepare(root, settings_for(pictures)).close()
    return lambda copy: Lake(shutil.copytree(root, copy))


# --- off by default --------------------------------------------------------------------------------------------------


def test_what_is_not_asked_for_is_off_says_so_and_leaves_no_trace(prepared: Prepared, pictures: Path, tmp_path: Path) -> None:
    settings = settings_for(pictures)
    lake = prepared(tmp_path / "lake")
    before = lake.snapshot()
    answer = refresh.measure(lake, settings, executors.local(), ["inspect"])
    assert answer == {
        "safety_off": "refresh.safety asks for nothing", "text_off": "refresh.text.ocr is false",
        "describe_off": "refresh.captions names no styles", "embed_off": "refresh.embed.model is null",
        "similarity_off": "refresh.embed.model is null",
    }  # fmt: skip
    assert lake.snapshot() == before
    rows = lake.query("SELECT similarity, nsfw, faces, watermark, text_fraction FROM t2i_records").to_pylist()
    assert len(rows) == IMAGES and all(set(row.values()) == {None} for row in rows)


@pytest.mark.parametrize(("changes", "extra"), [({"safety": {"nsfw": True}}, "nsfw"), ({"text": {"ocr": True}}, "ocr")])
def test_an_extra_that_is_missing_stops_the_refresh_before_it_starts(
    tmp_path: Path, pictures: Path, changes: dict, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dreamlite_data.operators.safety.find_spec", lambda name: None)
    settings, lake = settings_for(pictures, **changes), Lake(tmp_path / "lake")
    for step in (
        lambda: refresh.write_sources(lake, settings, 0),
        lambda: refresh.ingest(lake, settings, executors.local()),
        lambda: refresh.measure(lake, settings, executors.local(), ["quality"]),
    ):
        with pytest.raises(MissingExtra, match=rf"pip install 'dreamlite-pipeline\[{extra}\]'"):
            step()
    assert lake.count("op_ingest") == 0
    refresh.ingest(lake, settings_for(pictures), executors.local())  # without the wish it runs
    assert lake.count("op_ingest") == IMAGES


def test_a_rule_about_what_is_not_measured_is_refused() -> None:
    for policy, said in [({"max_nsfw": 0.3}, "refresh.safety.nsfw"), ({"min_similarity": 0.2}, "refresh.embed.model")]:
        with pytest.raises(ValueError, match=f"decides by what {said} measures, which is off"):
            RefreshSettings(policy=policy)


# --- captions --------------------------------------------------------------------------------------------------------


def test_each_picture_is_described_once_in_each_style(prepared: Prepared, pictures: Path, tmp_path: Path) -> None:
    with CountingServer() as server:
        settings = settings_for(pictures, captions=asking(server.url))
        lake = prepared(tmp_path / "lake")
        counts = refresh.measure(lake, settings, executors.local(), ["describe"])
        assert counts == {"describe_rows": 2 * IMAGES, "describe_failed": 0} and server.answered == 2 * IMAGES
        assert set(refresh.measure(lake, settings, executors.local(), ["describe"]).values()) == {0}
        more = settings_for(pictures, captions=asking(server.url, ("tag", "short", "dense"), concurrency=1))
        assert refresh.measure(lake, more, executors.local(), ["describe"])["describe_rows"] == IMAGES
        assert server.answered == 3 * IMAGES  # another style costs its own calls only
    asked = Counter(sha256_of_image(body) for body, _ in server.asked)
    assert set(asked.values()) == {3} and len(asked) == IMAGES
    rows = lake.query(
        "SELECT d.subject_id, d.style, d.prompt_id, c.text, c.captioner FROM current_describe d JOIN captions c ON c.caption_id = d.caption_id"
    ).to_pylist()
    assert len(rows) == 3 * IMAGES and {row["captioner"] for row in rows} == {"captioner-7b"}
    assert all(row["text"].split()[1] == row["subject_id"][:8] and row["prompt_id"] == f"{row['style']}-1" for row in rows)


def test_a_captioner_that_was_replaced_writes_no_captions_any_more(prepared: Prepared, pictures: Path, tmp_path: Path) -> None:
    lake, versions = prepared(tmp_path / "lake"), []
    with CountingServer() as server:
        for model in ("first", "second", "first"):
            refresh.measure(lake, settings_for(pictures, captions=asking(server.url, ("short",), model=model)), executors.local(), ["describe"])
            (current,) = lake.query("SELECT op_version, count(*) AS n FROM current_describe GROUP BY ALL").to_pylist()
            assert current["n"] == IMAGES
            versions.append(current["op_version"])
        assert versions[0] == versions[2] != versions[1] and server.answered == 2 * IMAGES  # the first came back without a call
    refresh.measure(lake, settings_for(pictures), executors.local(), ["describe"])
    assert lake.count("current_describe") == 0 and lake.count("op_describe") == 2 * IMAGES


def test_another_lake_with_the_answers_of_this_one_pays_nothing(prepared: Prepared, pictures: Path, tmp_path: Path) -> None:
    with CountingServer() as server:
        settings = settings_for(pictures, captions=asking(server.url))
        first = prepared(tmp_path / "first")
        refresh.measure(first, settings, executors.local(), ["describe"])
        second = prepared(tmp_path / "second")
        shutil.copytree(responses_folder(first.files), responses_folder(second.files))
        refresh.measure(second, settings, executors.local(), ["describe"])
        assert server.answered == 2 * IMAGES
    assert contents(second, INSPECTED) == contents(first, INSPECTED)


def test_a_failed_call_is_a_row_and_only_a_passing_failure_is_tried_again(
    prepared: Prepared, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.001)
    with CountingServer() as server:
        settings = settings_for(pictures, captions=asking(server.url, ("short",), attempts=1, tries=2))
        lake = prepared(tmp_path / "lake")
        busy, refused = lake.query("SELECT image_id FROM images ORDER BY image_id LIMIT 2")["image_id"].to_pylist()
        replies = {busy: (503, b"busy", {}), refused: completion("I cannot describe this.")}
        server.reply = lambda body: replies.get(sha256_of_image(body)) or words_about_it(body)
        assert refresh.measure(lake, settings, executors.local(), ["describe"]) == {"describe_rows": IMAGES, "describe_failed": 2, "retries": 1}
        errors = {row["subject_id"]: row["error"] for row in lake.query("SELECT * FROM op_describe WHERE error IS NOT NULL").to_pylist()}
        assert "answered 503" in errors[busy] and errors[refused] == "the model refused: I cannot describe this."
        # Second night: the busy one alone, and for the last time.
        assert refresh.measure(lake, settings, executors.local(), ["describe"]) == {"describe_rows": 1, "describe_failed": 1}
        assert set(refresh.measure(lake, settings, executors.local(), ["describe"]).values()) == {0}
        assert server.answered == IMAGES + 1 and lake.count("op_describe") == IMAGES


def test_a_server_that_is_down_ends_the_refresh_with_a_sentence(prepared: Prepared, pictures: Path, tmp_path: Path) -> None:
    with CountingServer(lambda body: (401, b"who are you", {})) as server:
        settings = settings_for(pictures, captions=asking(server.url))
        lake = prepared(tmp_path / "lake")
        with pytest.raises(EndpointError, match="refused the key"):
            refresh.measure(lake, settings, executors.local(), ["describe"])
        assert lake.count("op_describe") == 0


KILLED = """
import sys
from dreamlite_data import executors, refresh
from dreamlite_data.lake import Lake
from dreamlite_data.settings import RefreshSettings
refresh.measure(Lake(sys.argv[1]), RefreshSettings.model_validate_json(sys.argv[2]), executors.local(), ["describe"])
"""


@pytest.mark.parametrize("cache_kept", [True, False])
def test_a_killed_refresh_pays_for_no_caption_twice(prepared: Prepared, pictures: Path, tmp_path: Path, cache_kept: bool) -> None:
    before_kill, styles = 8, ("tag", "short")
    with CountingServer(hold_after=before_kill) as server:
        settings = settings_for(pictures, captions=asking(server.url, styles))
        lake = prepared(tmp_path / "lake")
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(lake.root), settings.model_dump_json()])
        server.wait_until_held(3)  # all three connections wait: the eight answers before are in
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        server.release()
        assert lake.count("op_describe") == IMAGES  # the first style was committed, the second is lost but for its answers
        if not cache_kept:
            shutil.rmtree(responses_folder(lake.files))
        refresh.measure(lake, settings, executors.local(), ["describe"])
        assert lake.count("op_describe") == IMAGES * len(styles)
        lost = 0 if cache_kept else before_kill - IMAGES
        assert server.answered == IMAGES * len(styles) + lost
        # Nothing shows that it was ever killed.
        calm = prepared(tmp_path / "calm")
        refresh.measure(calm, settings, executors.local(), ["describe"])
    assert contents(calm, INSPECTED) == contents(lake, INSPECTED)


@pytest.mark.thorough
def test_the_small_world_is_described_without_any_weights(tmp_path: Path) -> None:
    settings = RefreshSettings(
        scenes={"t2i_rows": 24, "edit_rows": 4, "fault_share": 0.0}, photos={"enabled": False},
        captions=[{"backend": "scene", "styles": ["tag", "short", "medium", "dense"]}],
    )  # fmt: skip
    lake = prepare(tmp_path / "lake", settings)
    plain = refresh.measure(lake, settings, executors.local(), ["verify"])
    rows = lake.query("SELECT row_id, caption_id FROM t2i_records ORDER BY ALL").to_pylist()
    counts = refresh.measure(lake, settings, executors.local(), ["describe"])
    assert counts["describe_rows"] == 4 * 24 and counts["describe_failed"] == 0 and plain["verify_caption_failed"] == 0
    assert lake.query("SELECT row_id, caption_id FROM t2i_records ORDER BY ALL").to_pylist() == rows  # providers' words still come first
    choices = lake.query("SELECT image_id, count(*) AS n, sum(probability) AS total FROM caption_choices GROUP BY ALL").to_pylist()
    assert len(choices) >= 24 and all(row["total"] == 1.0 for row in choices)
    assert {row["n"] for row in choices if row["n"] > 1} >= {6}  # provider, scene and four styles


# --- embeddings and what follows -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("towers") / "tiny-clip"))


def test_captions_are_compared_with_their_images_and_drawn_by_it(
    prepared: Prepared, pictures: Path, tmp_path: Path, towers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CountingServer(lambda body: completion("a red circle" if "tags" in str(body) else "a small blue square on the photo")) as server:
        settings = settings_for(pictures, captions=asking(server.url), embed={"model": towers}, safety={"faces": True})
        lake = prepared(tmp_path / "lake")
        counts = refresh.measure(lake, settings, executors.local(), ["inspect"])
        assert counts["embed_rows"] == IMAGES and counts["similarity_rows"] == 2 * IMAGES + IMAGES // 2 and counts["safety_rows"] == IMAGES
        assert counts["embed_failed"] == counts["similarity_failed"] == counts["safety_failed"] == 0
        refresh.measure(lake, settings, executors.local(), ["verify"])
        monkeypatch.setattr("dreamlite_data.operators.embed.encoder", None)  # nothing new: no model is touched
        again = refresh.measure(lake, settings, executors.local(), ["inspect"])
        assert {value for value in again.values() if not isinstance(value, str)} == {0}
    records = lake.query("SELECT * FROM t2i_records ORDER BY row_id").to_pylist()
    described = [row for row in records if row["style"] == "described"]
    assert len(described) == IMAGES // 2 and len(records) == IMAGES + IMAGES // 2
    assert all(row["faces"] == 0 for row in records)
    scores = {row["subject_id"]: row["similarity"] for row in lake.query("SELECT * FROM current_similarity").to_pylist()}
    by_image: dict[str, list[dict]] = {}
    for row in lake.query("SELECT * FROM caption_choices ORDER BY caption_id").to_pylist():
        by_image.setdefault(row["image_id"], []).append(row)
    for row in described:
        of_image = {choice["caption_id"]: scores[choice["caption_id"]] for choice in by_image[row["image_id"]]}
        assert len(of_image) == 2 and row["caption_id"] == max(of_image, key=of_image.get) and row["similarity"] == max(of_image.values())
    for rows in by_image.values():
        wanted = draw_probabilities([CaptionChoice(row["caption_id"], row["style"], row["text"], row["clip_score"]) for row in rows])
        assert [row["probability"] for row in rows] == pytest.approx(wanted.tolist(), abs=1e-12)
    # A picture without words of its own comes into the dataset by its best caption, and a rule may ask for more.
    kept = {row["name"]: row["rows"] for row in refresh.curate(lake, settings, 0)}
    assert kept["t2i"] == IMAGES
    similarities = sorted(row["similarity"] for row in records if row["text"])
    middle = (similarities[2] + similarities[3]) / 2
    strict = settings_for(pictures, captions=settings.captions, embed={"model": towers}, policy={"min_similarity": middle})
    assert {row["name"]: row["rows"] for row in refresh.curate(lake, strict, 0)}["t2i"] == 3
    rules = lake.query("SELECT DISTINCT rule FROM why_dropped WHERE dataset = 't2i'")["rule"].to_pylist()
    assert sorted(rules) == ["has_caption", "words_fit_image"]
    assert len(open_dataset(lake, "t2i")) == 3


@pytest.mark.thorough
def test_tasks_processes_and_their_number_change_no_byte(prepared: Prepared, pictures: Path, tmp_path: Path, towers: str) -> None:
    with CountingServer() as server:
        wanted = {"captions": asking(server.url), "embed": {"model": towers}, "safety": {"faces": True}}
        one = prepared(tmp_path / "one")
        refresh.measure(one, settings_for(pictures, **wanted), executors.local(), ["inspect"])
        cut = settings_for(pictures, **wanted, ingest={"rows_per_task": 2})
        two = prepared(tmp_path / "two")
        with executors.local(2) as executor:
            refresh.measure(two, cut, executor, ["inspect"])
            assert executor.started == 1
    assert contents(two, INSPECTED) == contents(one, INSPECTED)


@pytest.mark.thorough
@pytest.mark.slow
def test_ray_changes_no_byte_and_pays_for_no_call_that_is_kept(prepared: Prepared, pictures: Path, tmp_path: Path, towers: str) -> None:
    with CountingServer() as server:
        wanted = {"captions": asking(server.url), "embed": {"model": towers}, "ingest": {"rows_per_task": 2}}
        one = prepared(tmp_path / "one")
        refresh.measure(one, settings_for(pictures, **wanted), executors.local(), ["inspect"])
        two = prepared(tmp_path / "two")
        shutil.copytree(responses_folder(one.files), responses_folder(two.files))
        with executors.ray(2) as executor:
            refresh.measure(two, settings_for(pictures, **wanted), executor, ["inspect"])
        assert server.answered == 2 * IMAGES
    assert contents(two, INSPECTED) == contents(one, INSPECTED)


def test_an_edit_is_as_unsafe_as_the_worse_of_its_images_and_unknown_where_one_is(lake: Lake) -> None:
    scores = {"calm": 0.1, "bare": 0.9, "not looked at": None}
    pairs = [("calm", "bare"), ("bare", "calm"), ("calm", "calm"), ("calm", "not looked at"), ("not looked at", "bare")]
    ingested = [{"subject_id": f"{a}>{b}", "op_version": "g", "task": "edit", "edit_id": f"{a}>{b}", "source": "own"} for a, b in pairs]
    edits = [{"edit_id": f"{a}>{b}", "source_image_id": a, "target_image_id": b} for a, b in pairs]
    safety = [{"subject_id": name, "op_version": "s", "nsfw": score} for name, score in scores.items()]
    versions = [{"name": name, "op_version": version, "position": 0} for name, version in (("safety", "s"), ("ingest", "g"))]
    rows = {"op_ingest": ingested, "edits": edits, "op_safety": safety, "operator_versions": versions}
    lake.append({name: schema.rows_table(name, table) for name, table in rows.items()})
    found = {row["row_id"]: row["nsfw"] for row in lake.query("SELECT row_id, nsfw FROM edit_records").to_pylist()}
    assert found == {
        "calm>bare": pytest.approx(0.9), "bare>calm": pytest.approx(0.9), "calm>calm": pytest.approx(0.1), "calm>not looked at": None,
        "not looked at>bare": None,
    }  # fmt: skip
    # A null does not pass a rule that is on.
    settings = RefreshSettings(policy={"max_nsfw": 0.5, "require_scene_language": False}, safety={"nsfw": True})
    parameters = refresh.policy_parameters(lake, settings, 0) | {"sources": ["own"]}
    judged, _ = judge(lake, read_policy("edit"), parameters)
    verdicts = {row["row_id"]: "no_nudity" in row["failed"] for row in judged.to_pylist()}
    assert verdicts == {name: score is None or score > 0.5 for name, score in found.items()}


@pytest.mark.parametrize("view", ["caption_choices", "t2i_records", "current_describe"])
def test_the_views_read_no_image_bytes(lake: Lake, view: str) -> None:
    assert "bytes" not in " ".join(lake.query_read_only(f"EXPLAIN SELECT * FROM {view}")["explain_value"].to_pylist())
    assert len(lake.query(f"SELECT * FROM {view}")) == 0
