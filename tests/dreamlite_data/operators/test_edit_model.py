"""Models of the real classes, tiny and untrained: loaded by folder, asked for pictures once, the best try kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.chat.local import LocalChatError
from dreamlite_data.images import decode_stored, encode_png
from dreamlite_data.operators.edit import Request, Try
from dreamlite_data.operators.edit_model import EditModelError, PipelineEditor, choose
from dreamlite_data.operators.edit_routes import model_route
from dreamlite_data.pictures import Pictures
from dreamlite_data.responses import Responses
from dreamlite_data.rewards import load_reward
from dreamlite_data.settings import EditModelSettings, RefreshSettings
from tests.dreamlite_data.counting_server import CountingServer, completion
from tests.dreamlite_data.rewards.conftest import short
from tests.trainers.conftest import checkpoints, components  # noqa: F401  (fixtures)

SCENE = scenes.render(scenes.sample_scene(np.random.default_rng(0)))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = ["how well does it follow: {text_prompt}", "how well does it keep: {text_prompt}"]
    return short("editreward_tiny", tmp_path_factory.mktemp("reward"), prompts)


def editor_of(folder: Path, root: Path, tries: int = 1, **changes: object) -> PipelineEditor:
    return PipelineEditor(folder, "w", tries, 2, Pictures(root / "pictures", 64), Responses(root / "responses"), **changes)


def test_the_pipeline_makes_the_picture_that_its_seed_gives(checkpoints: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    request = Request("recolour", "make the red circle blue", ())
    made = editor_of(checkpoints["base"], tmp_path / "a").tries(SCENE, "a" * 64, request)
    assert len(made) == 1 and made[0].target.shape == SCENE.shape and made[0].reject_reason is None
    again, other = (editor_of(checkpoints["base"], tmp_path / image_id).tries(SCENE, image_id * 64, request) for image_id in "ab")
    assert np.array_equal(made[0].target, again[0].target) and not np.array_equal(made[0].target, other[0].target)


def test_no_picture_is_made_and_none_judged_twice(
    checkpoints: dict[str, Path], reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    calls: list[str] = []
    make, judge = PipelineEditor._make, PipelineEditor._judge
    monkeypatch.setattr(PipelineEditor, "_make", lambda self, *args: calls.append("make") or make(self, *args))
    monkeypatch.setattr(PipelineEditor, "_judge", lambda self, *args: calls.append("judge") or judge(self, *args))
    request = Request("recolour", "make the red circle blue", ())

    def run(root: str, tries: int, **changes: object) -> tuple[list[Try], list[str]]:
        calls.clear()
        editor = editor_of(checkpoints["base"], tmp_path / root, tries, reward=reward_folder, reward_weights="r", **changes)
        return editor.tries(SCENE, "a" * 64, request), sorted(calls)

    first, paid = run("one", 2)
    assert paid == ["judge"] * 2 + ["make"] * 2
    again, paid = run("one", 2)
    assert paid == [] and [one.reject_reason for one in again] == [one.reject_reason for one in first]
    assert all(np.array_equal(one.target, other.target) for one, other in zip(first, again, strict=True))
    assert run("one", 3)[1] == ["judge", "make"]  # another recipe pays for its third try only
    assert run("one", 2, min_reward=99.0)[1] == []
    shutil.rmtree(tmp_path / "one" / "pictures")
    assert run("one", 2)[1] == ["make"] * 2  # made anew they are the same, so the reward's answers still hold
    assert run("two", 2)[1] == ["judge"] * 2 + ["make"] * 2  # the negative control: nothing is kept elsewhere


def test_the_best_try_is_kept_and_the_others_are_negatives_with_their_reason(
    checkpoints: dict[str, Path], reward_folder: Path, tmp_path: Path  # noqa: F811
) -> None:
    words = "make the red circle blue"
    with CountingServer(lambda body: completion(f"recolour: {words}")) as server:
        settings = EditModelSettings(
            instructor={"backend": "endpoint", "model": "vlm", "base_url": server.url}, editor=checkpoints["base"], reward=reward_folder,
            tries=3, inference_steps=2,
        )  # fmt: skip
        operator = model_route(settings, {"instructor": "i", "editor": "e", "reward": "r"}, tmp_path)
        answer = operator(pa.table({"image_id": ["a" * 64], "bytes": [encode_png(SCENE)]}))
    assert answer["error"].to_pylist() == [None] and answer["edits"].to_pylist() == [1]
    tables = operator.side_tables(None, answer)
    edits = tables["edits"].to_pylist()
    assert [row["route"] for row in edits] == ["model"] * 3 and sum(not row["rejected"] for row in edits) == 1
    pictures = {row["image_id"]: Image.fromarray(decode_stored(row["bytes"])) for row in tables["images"].to_pylist()}
    targets = [pictures[row["target_image_id"]] for row in edits]
    mu = load_reward(reward_folder).score(targets, [words] * 3, [Image.fromarray(SCENE)] * 3).mu
    assert not edits[int(np.argmax(mu))]["rejected"]
    assert all(row["reject_reason"].startswith("not_best: ") for row in edits if row["rejected"])


def test_choosing() -> None:
    changed, other = 255 - SCENE, np.roll(SCENE, 9, axis=0)
    assert choose(SCENE, [SCENE, changed, other], [9.0, 1.0, 2.0], None) == [
        "no_op: 0.0000 of the pixels changed", "not_best: 1.0000 <= 2.0000", None]  # fmt: skip
    assert choose(SCENE, [changed, other], [1.0, 2.0], 3.0) == ["low_reward: 1.0000 < 3.0000", "low_reward: 2.0000 < 3.0000"]
    assert choose(SCENE, [changed, other], [2.0, 2.0], None)[0] is None  # of equals the earlier
    assert choose(SCENE, [changed], [None], None) == [None]
    assert choose(SCENE, [changed, other], [None, 1.0], None) == ["no_reward: the picture could not be scored", None]


def test_what_is_no_model_is_said_plainly(tmp_path: Path, checkpoints: dict[str, Path]) -> None:  # noqa: F811
    with pytest.raises(EditModelError, match="holds no diffusers pipeline"):
        editor_of(tmp_path, tmp_path).tries(SCENE, "a", Request("add", "add a cat", ()))
    operator = model_route(EditModelSettings(instructor=tmp_path, editor=tmp_path, tries=1), {"instructor": "i", "editor": "e"}, tmp_path)
    with pytest.raises(LocalChatError, match="holds no image-text-to-text model"):  # and not a table full of error rows
        operator(pa.table({"image_id": ["a"], "bytes": [encode_png(SCENE)]}))
    with pytest.raises(ValueError, match="needs an instructor"):
        RefreshSettings(edit_model={"editor": tmp_path})
    with pytest.raises(ValueError, match="tries above 1 needs a reward"):
        RefreshSettings(edit_model={"editor": tmp_path, "instructor": tmp_path})
    with pytest.raises(ValueError, match="the chat backend 'endpoint' also needs base_url"):
        RefreshSettings(edit_model={"editor": tmp_path, "instructor": {"backend": "endpoint", "model": "vlm"}, "tries": 1})
