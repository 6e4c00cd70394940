"""Each packaged mapping reads a file of exactly its data set's shape, and each value ends in the column that it belongs to.
A twelfth data set is a YAML file; a mapping that does not fit is refused before anything is read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamlite_data import images as pictures
from dreamlite_data.lake import Lake
from dreamlite_data.operators.ingest import edit_id
from dreamlite_data.sources import mapping as mappings
from tests.dreamlite_data.sources.tables import SIZE_PX, cell, encoded, ingest, picture, rows, write_parquet

EDIT = (
    "SELECT r.source_key, r.notes, e.instruction, e.edit_type, e.session_id, e.turn, e.relation, e.parent_edit_id, e.edit_id, "
    "s.original_sha256 AS source, t.original_sha256 AS target, t.licence, t.origin, t.url FROM op_ingest r JOIN edits e USING (edit_id) "
    "JOIN provenance s ON s.record_id = r.subject_id AND s.role = 'source' JOIN provenance t ON t.record_id = r.subject_id "
    "AND t.role = 'target' WHERE r.error IS NULL ORDER BY r.subject_id"
)


def _sha(number: int) -> str:
    import hashlib

    return hashlib.sha256(picture(number)).hexdigest()


def _edits(lake: Lake, source: dict[str, Any], expected: int) -> list[dict[str, Any]]:
    counts = ingest(lake, {"name": "set", **source})
    assert (counts["records"], counts["failed"], counts["quarantined"]) == (expected, 0, 0)
    found = rows(lake, EDIT)
    assert len(found) == expected
    return found


def _scores(lake: Lake, subject: str) -> dict[str, float]:
    return {row["name"]: row["value"] for row in rows(lake, f"SELECT name, value FROM provider_scores WHERE subject_id = '{subject}'")}


def _forms(lake: Lake) -> list[tuple]:
    return [tuple(row.values()) for row in rows(lake, "SELECT form, text FROM instructions ORDER BY ALL")]


def _jsonl(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _save(folder: Path, name: str, number: int) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def _columns(row: dict[str, Any], *names: str) -> tuple:
    return tuple(row[name] for name in names)


def test_instruct_pix2pix_is_a_folder_per_prompt(lake: Lake, tmp_path: Path) -> None:
    folder = tmp_path / "shard-00" / "0000001"
    for seed in (11, 22):
        _save(folder, f"{seed}_0.jpg", seed)
        _save(folder, f"{seed}_1.jpg", seed + 1)
    prompt = {"caption": "a horse", "edit": "make it a zebra", "output": "a zebra", "url": "https://example.org/horse"}
    (folder / "prompt.json").write_text(json.dumps(prompt))
    _jsonl(folder / "metadata.jsonl", *({"seed": seed, "clip_sim_0": 0.25, "clip_sim_dir": 0.3, "p2p_threshold": 0.5} for seed in (11, 22)))
    found = _edits(lake, {"kind": "sample_folders", "path": tmp_path, "mapping": "instruct_pix2pix"}, 2)
    wanted = ("make it a zebra", _sha(11), _sha(12), "InstructPix2Pix", "MIT", "https://example.org/horse")
    assert _columns(found[0], "instruction", "source", "target", "origin", "licence", "url") == wanted
    assert _scores(lake, found[0]["edit_id"]) == {"clip_sim_0": 0.25, "clip_sim_dir": 0.3}
    assert {row["text"] for row in rows(lake, "SELECT text FROM captions")} == {"a horse", "a zebra"}


def test_instruct_pix2pix_is_read_as_parquet_too(lake: Lake, tmp_path: Path) -> None:
    row = {"original_prompt": "a", "original_image": cell(1), "edit_prompt": "do it", "edited_prompt": "b", "edited_image": cell(2)}
    found = _edits(lake, {"kind": "parquet", "path": write_parquet(tmp_path / "x.parquet", [row]), "mapping": "instruct_pix2pix"}, 1)
    assert _columns(found[0], "instruction", "source", "target") == ("do it", _sha(1), _sha(2))


def test_magicbrush_has_sessions_turns_masks_and_its_canary(lake: Lake, tmp_path: Path) -> None:
    alpha = np.full((SIZE_PX[1], SIZE_PX[0], 4), 255, np.uint8)
    alpha[:4, :6, 3] = 0  # 24 of 384 pixels may change
    mask = {"bytes": encoded(Image.fromarray(alpha)), "path": None}
    lines = [
        {"img_id": "7", "turn_index": turn, "source_img": cell(turn), "mask_img": mask, "instruction": f"turn {turn}", "target_img": cell(turn + 1),
         "canary": "MagicBrush canary 1234"}
        for turn in (1, 2)
    ]  # fmt: skip
    found = _edits(lake, {"kind": "parquet", "path": write_parquet(tmp_path / "x.parquet", lines), "mapping": "magicbrush"}, 2)
    assert [_columns(row, "session_id", "turn", "relation", "licence") for row in found] == [("set/7", 1, "", "CC-BY-4.0"), ("set/7", 2, "", "CC-BY-4.0")]
    in_order = rows(lake, "SELECT session_id, turn, edit_id FROM sessions")
    assert [tuple(row.values()) for row in in_order] == [("set/7", row["turn"], row["edit_id"]) for row in found]
    assert found[0]["target"] == found[1]["source"] and all("canary MagicBrush canary 1234" in row["notes"] for row in found)
    stored = rows(lake, "SELECT * FROM edit_masks")
    assert len(stored) == 2 and {(row["origin"], row["mask_fraction"]) for row in stored} == {("provider", np.float32(24 / 384))}
    with Image.open(io.BytesIO(stored[0]["mask_png"])) as image:
        assert image.mode == "1" and image.size == SIZE_PX and np.asarray(image).sum() == 24 and np.asarray(image)[:4, :6].all()


def test_ultraedit_has_six_scores_and_some_masks(lake: Lake, tmp_path: Path) -> None:
    numbers = {"clip_sim_source": 0.3, "clip_sim_target": 0.31, "clip_sim_dir": 0.2, "clip_sim_image": 0.9, "dinov2_sim": 0.8, "ssim": 0.4}
    white = np.zeros((SIZE_PX[1] * 2, SIZE_PX[0] * 2), np.uint8)  # another size than the target's: it is brought to it
    white[: SIZE_PX[1]] = 255
    base = {**numbers, "source_caption": "s", "target_caption": "t", "edit_prompt": "add a hat", "source_image": cell(1), "edited_image": cell(2)}
    region = {**base, "edit_object": "hat", "mask_image": {"bytes": encoded(Image.fromarray(white)), "path": None}, "idx": 0}
    broken = {**base, "edit_prompt": "add a coat", "edit_object": "coat", "mask_image": {"bytes": b"no image", "path": None}, "idx": 1}
    write_parquet(tmp_path / "region.parquet", [region, broken])
    write_parquet(tmp_path / "free.parquet", [{**base, "edit_prompt": "free", "idx": 5}])
    found = _edits(lake, {"kind": "parquet", "path": tmp_path, "mapping": "ultraedit"}, 3)
    assert all(_scores(lake, row["edit_id"]) == numbers for row in found)
    masks = {row["edit_id"]: row["mask_fraction"] for row in rows(lake, "SELECT edit_id, mask_fraction FROM edit_masks")}
    by_words = {row["instruction"]: row for row in found}
    assert masks == {by_words["add a hat"]["edit_id"]: 0.5}
    assert by_words["add a coat"]["notes"] == "mask_not_an_image" and by_words["free"]["notes"] is None


def test_omniedit_gives_long_and_short_forms_and_keeps_its_types(lake: Lake, tmp_path: Path) -> None:
    line = {
        "omni_edit_id": "task_obj_1", "task": "removal", "src_img": cell(1), "edited_img": cell(2), "width": 24, "height": 16,
        "edited_prompt_list": ["remove hat", "Please take the red hat off his head"], "sc_score_1": 9, "sc_score_2": 8,
        "sc_reasoning": "good", "pq_score": 10, "pq_reasoning": "fine", "o_score": 8.9,
    }  # fmt: skip
    path = write_parquet(tmp_path / "x.parquet", [line, {**line, "task": "a type of tomorrow", "edited_prompt_list": ["one wording"]}])
    found = _edits(lake, {"kind": "parquet", "path": path, "mapping": "omniedit"}, 2)
    assert [_columns(row, "instruction", "edit_type") for row in found] == [
        ("Please take the red hat off his head", "removal"), ("one wording", "a type of tomorrow")
    ]  # fmt: skip
    assert _forms(lake) == [("short", "remove hat")]
    assert _scores(lake, found[0]["edit_id"]) == {"sc_score_1": 9, "sc_score_2": 8, "pq_score": 10, "o_score": 8.9}
    assert found[0]["source_key"] == "00000000:task_obj_1"


def test_imgedit_names_its_images_by_path_below_a_root(lake: Lake, tmp_path: Path) -> None:
    _save(tmp_path / "unpacked", "results/1/original.png", 1)
    _save(tmp_path / "unpacked", "results/1/result.png", 2)
    line = {"input_images": ["results/1/original.png"], "output_images": ["results/1/result.png"], "prompt": "remove the people"}
    path = write_parquet(tmp_path / "Parquet" / "remove_part5.parquet", [line])
    found = _edits(lake, {"kind": "parquet", "path": path.parent, "mapping": "imgedit", "image_root": tmp_path / "unpacked"}, 1)
    assert _columns(found[0], "instruction", "source", "target", "session_id") == ("remove the people", _sha(1), _sha(2), None)


def test_imgedit_multi_turn_is_a_session_per_row(lake: Lake, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        _save(tmp_path, f"r/{number}.png", number)
    turns = [{"input_images": [f"r/{n}.png"], "output_images": [f"r/{n + 1}.png"], "prompt": f"turn {n}"} for n in (1, 2)]
    path = write_parquet(tmp_path / "version_backtracking_part0.parquet", [{"data": turns}])
    found = _edits(lake, {"kind": "parquet", "path": path, "mapping": "imgedit_multi_turn"}, 2)
    assert [_columns(row, "session_id", "turn", "instruction") for row in found] == [("set/00000000", n, f"turn {n}") for n in (1, 2)]
    assert found[0]["target"] == found[1]["source"]


def test_hq_edit_gives_both_directions(lake: Lake, tmp_path: Path) -> None:
    line = {"input": "a cat", "input_image": cell(1), "edit": "turn it into a dog", "inverse_edit": "turn it into a cat", "output": "a dog",
            "output_image": cell(2)}  # fmt: skip
    found = _edits(lake, {"kind": "parquet", "path": write_parquet(tmp_path / "x.parquet", [line]), "mapping": "hq_edit"}, 2)
    forward, back = found
    assert _columns(forward, "instruction", "source", "target", "relation") == ("turn it into a dog", _sha(1), _sha(2), "")
    assert _columns(back, "instruction", "source", "target", "relation") == ("turn it into a cat", _sha(2), _sha(1), "inverse")
    assert back["parent_edit_id"] == forward["edit_id"] == edit_id(_sha(1), _sha(2), "turn it into a dog")
    assert forward["licence"] == back["licence"] == "CC-BY-NC-4.0" and lake.count("images") == 2 and lake.count("captions") == 2


def _pico(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        _save(tmp_path, f"images/{number}.png", number)


def test_pico_banana_has_two_lengths_of_words(lake: Lake, tmp_path: Path) -> None:
    _pico(tmp_path)
    url = "https://farm.example/1_o.jpg"
    line = {"open_image_input_url": url, "text": "Remove the flag and its pole", "output_image": "images/2.png",
            "edit_type": "Remove an existing object", "summarized_text": "Flag removed", "local_input_image": "images/1.png"}  # fmt: skip
    found = _edits(lake, {"kind": "jsonl", "path": _jsonl(tmp_path / "sft.jsonl", line), "mapping": "pico_banana"}, 1)
    assert _columns(found[0], "instruction", "edit_type", "source", "target", "url") == (line["text"], "Remove an existing object", _sha(1), _sha(2), url)
    assert _forms(lake) == [("short", "Flag removed")] and found[0]["licence"] == "CC-BY-NC-ND-4.0"


def test_pico_banana_preferences_pair_the_accepted_try_with_each_rejected_one(lake: Lake, tmp_path: Path) -> None:
    _pico(tmp_path)
    line = {"open_image_input_url": "https://x.example/1", "local_input_image": "images/1.png", "text": "do it", "output_image": "images/2.png",
            "rejected_images": ["images/3.png", "images/4.png"], "edit_type": "t"}  # fmt: skip
    counts = ingest(lake, {"name": "set", "kind": "jsonl", "path": _jsonl(tmp_path / "preference.jsonl", line), "mapping": "pico_banana_preference"})
    assert (counts["records"], counts["failed"]) == (2, 0)
    found = rows(lake, "SELECT * FROM preferences ORDER BY record_id")
    assert [_columns(row, "left_image_id", "right_image_id", "vote") for row in found] == [(_sha(2), _sha(3), "left"), (_sha(2), _sha(4), "left")]
    assert lake.count("edits") == 0


def test_pico_banana_multi_turn_follows_the_files_by_their_ids(lake: Lake, tmp_path: Path) -> None:
    _pico(tmp_path)
    line = {
        "files": [{"id": "edit_turn1", "url": "images/2.png"}, {"id": "edit_turn2", "url": "images/3.png"},
                  {"id": "final_image", "url": "images/4.png"}, {"id": "original_input_image", "url": "images/1.png"}],
        "metadata_edit_turn_prompts": ["first", "second", "third"],
    }  # fmt: skip
    found = _edits(lake, {"kind": "jsonl", "path": _jsonl(tmp_path / "multi-turn.jsonl", line), "mapping": "pico_banana_multi_turn"}, 3)
    steps = [_columns(row, "turn", "instruction", "source", "target") for row in found]
    assert steps == [(1, "first", _sha(1), _sha(2)), (2, "second", _sha(2), _sha(3)), (3, "third", _sha(3), _sha(4))]


def test_gpt_image_edit_keeps_the_set_that_a_row_was_taken_from(lake: Lake, tmp_path: Path) -> None:
    _save(tmp_path, "omniedit/in/1.png", 1)
    _save(tmp_path, "omniedit/out/1.png", 2)
    line = {"dataset_source": "omniedit", "task": "swap", "input": "omniedit/in/1.png", "output": "omniedit/out/1.png", "instruction": "swap it",
            "instruction_type": "complex", "input_description": "a fork"}  # fmt: skip
    found = _edits(lake, {"kind": "jsonl", "path": _jsonl(tmp_path / "metadata.jsonl", line), "mapping": "gpt_image_edit"}, 1)
    assert _columns(found[0], "origin", "edit_type", "licence") == ("GPT-Image-Edit-1.5M/omniedit", "swap", "CC-BY-4.0")


def test_nhr_edit_is_metadata_beside_images(lake: Lake, tmp_path: Path) -> None:
    _save(tmp_path / "train", "images/00/image_1_original.jpg", 1)
    _save(tmp_path / "train", "images/00/image_1_edited_2.jpg", 2)
    line = {"sample_id": "image_1", "source_file_name": "images/00/image_1_original.jpg", "edited_file_name": "images/00/image_1_edited_2.jpg",
            "edit_instruction": "make it snow", "augmented_instructions": ["let snow fall"], "category": "weather", "style": "photo",
            "img_width": 24, "img_height": 16}  # fmt: skip
    _jsonl(tmp_path / "train" / "metadata.jsonl", line)
    found = _edits(lake, {"kind": "jsonl", "path": tmp_path, "mapping": "nhr_edit"}, 1)
    assert _columns(found[0], "instruction", "edit_type", "licence", "target") == ("make it snow", "weather", "Apache-2.0", _sha(2))
    assert _forms(lake) == [("variant", "let snow fall")]


def _x2edit_tar(first: int) -> bytes:
    buffer = io.BytesIO()
    facts = {"instruction": f"edit {first}", "instruction_zh": "改", "task": "删除主体", "score_7b": "[5, 4]", "liqe_score_edit": 3.5, "label": "Kontext"}
    members = {"000000000.1.0.jpg": picture(first), "000000000.2.jpg": picture(first + 1), "000000000.json": json.dumps(facts).encode(),
               "000000000.txt": b"edit"}  # fmt: skip
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def test_x2edit_shards_are_several_tars_one_after_the_other(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(_x2edit_tar(1) + _x2edit_tar(5))  # the same keys twice, and zeros between
    found = _edits(lake, {"kind": "webdataset", "path": tmp_path, "mapping": "x2edit"}, 2)
    assert [_columns(row, "source_key", "instruction", "source", "target", "edit_type") for row in found] == [
        ("000000000", "edit 1", _sha(1), _sha(2), "object/remove"), ("000000000~1", "edit 5", _sha(5), _sha(6), "object/remove")
    ]  # fmt: skip
    assert _scores(lake, found[0]["edit_id"]) == {"score_7b_1": 5, "score_7b_2": 4, "liqe_score_edit": 3.5}
    assert _forms(lake) == [("chinese", "改")] * 2


def test_a_tar_that_is_damaged_behind_its_first_part_is_quarantined(lake: Lake, tmp_path: Path) -> None:
    second = _x2edit_tar(5)
    (tmp_path / "0.tar").write_bytes(_x2edit_tar(1) + second[: len(second) // 8])
    counts = ingest(lake, {"name": "set", "kind": "webdataset", "path": tmp_path, "mapping": "x2edit"})
    assert (counts["records"], counts["quarantined"]) == (0, 1)


def test_editreward_data_goes_to_preferences_with_both_models_scores(lake: Lake, tmp_path: Path) -> None:
    line = {
        "key": "k", "unique_key": "k_0", "pair_index": 0, "instruction": "make it red", "source_img": cell(1), "left_output_image": cell(2),
        "right_output_image": cell(3), "left_model": "ovis_u1", "right_model": "qwen_edit", "left_instruction_following_score": 4,
        "left_quality_aesthetic_score": 2, "left_overall_score": 6, "right_instruction_following_score": 1, "right_quality_aesthetic_score": 3,
        "right_overall_score": 4, "vote_type": "leftvote",
    }  # fmt: skip
    write_parquet(tmp_path / "x.parquet", [line, {**line, "unique_key": "k_1", "right_output_image": None}])
    counts = ingest(lake, {"name": "set", "kind": "parquet", "path": tmp_path, "mapping": "editreward_data"})
    assert (counts["records"], counts["failed"]) == (2, 1)
    row = rows(lake, "SELECT * FROM preferences")[0]
    assert _columns(row, "source_image_id", "left_image_id", "right_image_id", "vote") == (_sha(1), _sha(2), _sha(3), "left")
    assert _columns(row, "left_model", "right_model") == ("ovis_u1", "qwen_edit")
    assert _columns(row, "left_follow", "left_quality", "right_follow", "right_quality") == (4, 2, 1, 3)
    assert _columns(row, "licence", "origin", "record_id") == ("CC-BY-NC-4.0", "EditReward-Data", "set/x.parquet/00000000:k_0")
    assert _scores(lake, row["preference_id"]) == {"left_overall_score": 6, "right_overall_score": 4}
    assert [_columns(row, "task", "error") for row in rows(lake, "SELECT task, error FROM op_ingest ORDER BY subject_id")] == [
        ("preference", None), ("preference", "missing_right")
    ]  # fmt: skip


def test_triplets_of_ones_own_need_plain_names_and_no_more(lake: Lake, tmp_path: Path) -> None:
    for name, number in (("a.jpg", 1), ("b.jpg", 2)):
        _save(tmp_path, name, number)
    _jsonl(tmp_path / "edits.jsonl", {"source": "a.jpg", "target": "b.jpg", "instruction": "make it snow"})
    found = _edits(lake, {"kind": "jsonl", "path": tmp_path, "mapping": "triplets"}, 1)
    assert _columns(found[0], "source", "target", "instruction", "licence") == (_sha(1), _sha(2), "make it snow", None)


def test_every_packaged_mapping_is_tested_here() -> None:
    tested = Path(__file__).read_text()
    assert [name for name in mappings.packaged() if f'"{name}"' not in tested and name != "image_text"] == []


def test_a_twelfth_set_needs_a_yaml_file_and_nothing_else(lake: Lake, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: Mine\norigin: Mine\nlicence: CC0-1.0\nlayouts: [parquet]\ntask: edit\n"
        "images: {source: pair.before, target: pair.after}\ninstruction: words\nsession: film\nturn: step\n"
    )
    line = {"pair": {"before": cell(1), "after": cell(2)}, "words": "go on", "film": 3, "step": 9}
    path = write_parquet(tmp_path / "x.parquet", [line])
    found = _edits(lake, {"kind": "parquet", "path": path, "mapping": str(tmp_path / "mine.yaml")}, 1)
    assert _columns(found[0], "source", "target", "session_id", "turn", "licence") == (_sha(1), _sha(2), "set/3", 9, "CC0-1.0")


def test_a_missing_column_is_refused_before_reading_with_the_nearest_name(lake: Lake, tmp_path: Path) -> None:
    line = {"img_id": "1", "turn_idx": 1, "source_img": cell(1), "mask_img": None, "instruction": "x", "target_img": cell(2)}
    path = write_parquet(tmp_path / "x.parquet", [line])
    with pytest.raises(mappings.MappingError, match=r"'MagicBrush' takes turn from column 'turn_index', which set/x.parquet lacks: did you mean 'turn_idx'"):
        ingest(lake, {"name": "set", "kind": "parquet", "path": path, "mapping": "magicbrush"})
    assert lake.count("op_shard") == 0
    jsonl = _jsonl(tmp_path / "a.jsonl", {"sample_id": "1", "source_file": "a", "edited_file_name": "b", "edit_instruction": "c"})
    with pytest.raises(mappings.MappingError, match="did you mean 'source_file'"):
        ingest(lake, {"name": "set", "kind": "jsonl", "path": jsonl, "mapping": "nhr_edit"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\norigin: x\nlayouts: [parquet]\ntask: edit\nimages: {source: a}\ninstructon: b\n", "did you mean 'instruction'"),
        ("name: [", "is not YAML"),
        ("name: x\norigin: x\nlayouts: [csv]\ntask: edit\nimages: {}\n", "layouts.0"),
    ],
)
def test_a_mapping_that_is_wrong_is_refused_in_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(mappings.MappingError, match=words):
        mappings.load(str(tmp_path / "m.yaml"))


def test_an_unknown_mapping_names_the_nearest_one() -> None:
    with pytest.raises(mappings.MappingError, match="did you mean 'magicbrush'"):
        mappings.load("magic_brush")


def test_paths_that_leave_the_root_are_never_followed(lake: Lake, tmp_path: Path) -> None:
    _save(tmp_path, "secret.png", 1)
    _save(tmp_path / "set", "out.png", 2)
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    base = {"output_image": "out.png", "text": "x", "edit_type": "t", "open_image_input_url": None}
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "a\x00b", "absent.png"]
    _jsonl(tmp_path / "set" / "sft.jsonl", *({**base, "local_input_image": path} for path in outside))
    counts = ingest(lake, {"name": "set", "kind": "jsonl", "path": tmp_path / "set" / "sft.jsonl", "mapping": "pico_banana"})
    assert (counts["records"], counts["failed"]) == (5, 5)
    errors = [row["error"] for row in rows(lake, "SELECT error FROM op_ingest ORDER BY source_key")]
    assert errors == ["unsafe_path", "unsafe_path", "unsafe_path", "unsafe_path", "missing_image_file"]
    assert lake.count("images") == 0


def test_a_masks_bomb_costs_the_mask_and_not_the_triplet() -> None:
    from dreamlite_data.operators.ingest_rows import mask_pixels
    from dreamlite_data.settings import IngestSettings

    with pytest.raises(pictures.BadImage, match="too_large"):
        mask_pixels(picture(1, (400, 400)), "white", SIZE_PX, IngestSettings(max_side_px=64))
