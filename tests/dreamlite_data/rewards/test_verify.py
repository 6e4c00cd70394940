"""A whole checkpoint passes every point; each thing that can be wrong fails its own point and says so."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamlite_data.rewards.network import RewardNetwork
from dreamlite_data.rewards.verify import FAILED, OK, SKIPPED, WARNING, verify_checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
RUN_POINTS = {"loads", "1-D positions", "golden scores"}


def states(folder: Path, **options) -> dict[str, str]:
    return {check.name: check.state for check in verify_checkpoint(folder, **options)}


def details(folder: Path, **options) -> dict[str, str]:
    return {check.name: check.detail for check in verify_checkpoint(folder, **options)}


@pytest.fixture
def own(short_hpsv3_dir, tmp_path) -> Path:
    return Path(shutil.copytree(short_hpsv3_dir, tmp_path / "own"))


def write_sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def change_state(folder: Path, change) -> None:
    state = load_file(folder / "HPSv3.safetensors")
    change(state)
    save_file(state, folder / "HPSv3.safetensors")


@pytest.mark.parametrize("kind", ["hpsv3", "editreward"])
def test_the_golden_checkpoints_pass_with_the_scores_of_the_authors_code(kind):
    found = states(FIXTURES / f"{kind}_tiny", golden=FIXTURES / f"{kind}_expected.json")
    assert set(found.values()) == {OK, WARNING} and found["sha256"] == WARNING  # no sums lie beside them
    assert RUN_POINTS <= found.keys() and all(found[name] == OK for name in RUN_POINTS)


def test_a_golden_score_that_is_off_fails(own, tmp_path):
    shutil.copy(FIXTURES / "image0.png", tmp_path)
    row = {"image": "image0.png", "prompt": "a cat", "mu": 0.0, "log_sigma": 0.0}
    (tmp_path / "golden.json").write_text(json.dumps([row]))
    assert states(own, golden=tmp_path / "golden.json")["golden scores"] == FAILED
    assert states(own, golden=tmp_path / "golden.json", tolerance=1e3)["golden scores"] == OK
    for wrong, words in (([row | {"image": "no.png"}], "row 1"), ([{"image": "image0.png", "prompt": "x"}], "no score"), ({}, "no score"), ([1], "no list")):
        (tmp_path / "golden.json").write_text(json.dumps(wrong))
        (point,) = [check for check in verify_checkpoint(own, golden=tmp_path / "golden.json") if check.name == "golden scores"]
        assert point.state == FAILED and words in point.detail


def test_headers_alone_need_no_weights_loaded(own, monkeypatch):
    monkeypatch.setattr("dreamlite_data.rewards.verify.load_reward", None)
    assert not RUN_POINTS & states(own, run=False).keys()


def test_a_key_that_lacks_fails_and_skips_what_needs_it(own):
    change_state(own, lambda state: state.pop("model.norm.weight"))
    found = states(own)
    assert found["keys and shapes"] == FAILED and "1 missing: backbone.language_model.norm.weight" in details(own)["keys and shapes"]
    assert found["loads"] == found["1-D positions"] == SKIPPED and found["layout"] == OK


def test_rounded_heads_are_a_warning(own):
    assert states(own, run=False)["heads"] == OK
    change_state(own, lambda state: state.update({key: value.bfloat16() for key, value in state.items() if key.startswith("rm_head")}))
    assert states(own, run=False)["heads"] == WARNING and "bfloat16" in details(own, run=False)["heads"]


def test_a_tokenizer_of_another_model_fails(own):
    change_state(own, lambda state: state.update({"model.embed_tokens.weight": state["model.embed_tokens.weight"][:270].contiguous()}))
    assert states(own, run=False)["vocabulary and template"] == FAILED


def test_prompts_are_the_published_ones_or_the_directory_s_own(own):
    assert states(own, run=False)["kind and prompts"] == WARNING
    (own / "reward_spec.json").unlink()
    assert states(own, run=False)["kind and prompts"] == OK
    (own / "reward_spec.json").write_text("{")
    assert "no valid JSON" in details(own, run=False)["kind and prompts"]


def test_a_damaged_package_fails(own, monkeypatch):
    """What a port that strips trailing spaces would hold."""
    (own / "reward_spec.json").unlink()
    spec = json.loads((Path(__file__).parents[3] / "dreamlite_data/rewards/data/hpsv3.json").read_text())
    spec["prompts"] = ["\n".join(line.rstrip() for line in spec["prompts"][0].split("\n"))]
    monkeypatch.setattr("dreamlite_data.rewards.spec.released_spec", lambda kind: spec)
    assert states(own, run=False)["kind and prompts"] == FAILED


def test_hashes_are_compared_with_sha256sums(own):
    write_sums(own)
    assert states(own, run=False)["sha256"] == OK
    config = own / "config.json"
    config.write_text(config.read_text() + " ")
    assert "config.json is not the file" in details(own, run=False)["sha256"]
    (own / "SHA256SUMS").write_text("00  config.json\n")
    assert "does not list HPSv3.safetensors" in details(own, run=False)["sha256"]


def test_two_layouts_at_once_or_none_fail(own):
    change_state(own, lambda state: state.update({"model.visual.merger.ln_q.weight": torch.zeros(1)}))
    found = details(own, run=False)
    assert "both layouts" in found["layout"] and "1 unexpected: " in found["keys and shapes"]


def test_positions_that_do_not_reach_the_model_fail(own, monkeypatch):
    assert states(own)["1-D positions"] == OK
    original = RewardNetwork.hidden_states
    monkeypatch.setattr(RewardNetwork, "hidden_states", lambda self, features, text, positions=None: original(self, features, text))
    assert states(own)["1-D positions"] == FAILED


def test_positions_that_transformers_would_make_itself_fail(own, monkeypatch):
    original = RewardNetwork.hidden_states

    def on_the_grid(self, features, text, positions=None):
        count = int((text.ids == self.config.image_token_id).sum())
        side = int(count**0.5) * 2
        made, _ = self.backbone.get_rope_index(text.ids, (text.ids == self.config.image_token_id).int(), torch.tensor([[1, side, side]]))
        return original(self, features, text, made if positions is None else positions)

    monkeypatch.setattr(RewardNetwork, "hidden_states", on_the_grid)
    assert states(own)["1-D positions"] == FAILED


def test_a_directory_that_is_none_fails_without_an_exception(tmp_path):
    found = states(tmp_path / "nothing")
    assert found["files"] == FAILED and found["loads"] == SKIPPED


def test_the_pattern_image_is_the_same_everywhere():
    from dreamlite_data.rewards.verify import pattern_image

    image = pattern_image()
    assert isinstance(image, Image.Image) and image.size == (448, 448)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "e3499bc441b5d1f9"
