"""Headers say what the files hold, whatever the format; a file that is damaged or could run code is refused in one sentence."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamlite_data.rewards.stored import (
    RewardCheckpointError,
    StoredTensor,
    read_headers,
    stored_tensors,
    weight_files,
)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    loaded = load_file(FIXTURES / "editreward_tiny" / "model.safetensors")
    return {key: value.bfloat16() if key.startswith("model.visual.") else value for key, value in loaded.items()}


def save_sharded(state: dict[str, torch.Tensor], folder: Path) -> None:
    names, shards = sorted(state), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for number, shard in enumerate(shards):
        save_file({name: state[name] for name in names[number::2]}, folder / shard)
    index = {"weight_map": {name: shards[place % 2] for place, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["safetensors", "sharded", "pth", "wrapped_pth"])
def test_headers_and_tensors_are_those_of_the_state_dict(tmp_path, state, form):
    if form == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    elif form == "sharded":
        save_sharded(state, tmp_path)
    else:
        torch.save({"model": state} if form == "wrapped_pth" else state, tmp_path / "model.pth")
    files = weight_files(tmp_path)
    assert read_headers(files) == {key: StoredTensor(tuple(value.shape), value.dtype) for key, value in state.items()}
    read = dict(stored_tensors(files))
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in state)


def test_a_header_is_read_without_the_tensors(tmp_path):
    """Of a file that claims 16 GB there is nothing on the disk but the header, and that is enough."""
    header = json.dumps({"visual.big": {"dtype": "BF16", "shape": [2**33], "data_offsets": [0, 2**34]}}).encode()
    path = tmp_path / "HPSv3.safetensors"
    with path.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + 2**34)
    assert read_headers([path])["visual.big"].size_bytes == 2**34


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pth_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    torch.save({"model.norm.weight": Payload(tmp_path / "ran")}, tmp_path / "model.pth")
    with pytest.raises(RewardCheckpointError, match="could run code"):
        read_headers(weight_files(tmp_path))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "model.pth", weights_only=False)  # the control: the same file does run it elsewhere
    assert (tmp_path / "ran").exists()


def test_what_cannot_be_read_is_one_sentence_with_the_file_and_the_way_to_mend_it(tmp_path, state):
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    old = tmp_path / "old.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    pickled = tmp_path / "pickled.pth"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    numbers = tmp_path / "numbers.pth"
    torch.save({"model": {"step": 3}}, numbers)
    listed = tmp_path / "list.pth"
    torch.save([torch.zeros(1)], listed)
    for path, words in (
        (cut, "download it again"), (old, "save it again"), (pickled, "save it again"), (numbers, "'step' is no tensor"), (listed, "'list' is no tensor"),
    ):  # fmt: skip
        with pytest.raises(RewardCheckpointError, match=words) as caught:
            read_headers([path])
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_shards_must_be_there_inside_the_folder_and_hold_a_key_once(tmp_path, state):
    save_sharded(state, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    map_ = json.loads(index.read_text())["weight_map"]
    for changed, words in (({"a": "../../etc/passwd"}, "plain file names"), ({"a": "model-00003.safetensors"}, "not there"), ([], "no index")):
        index.write_text(json.dumps({"weight_map": map_ | changed} if isinstance(changed, dict) else changed))
        with pytest.raises(RewardCheckpointError, match=words):
            weight_files(tmp_path)
    index.write_text(json.dumps({"weight_map": map_}))
    first, second = weight_files(tmp_path)
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(RewardCheckpointError, match="in another shard too"):
        read_headers([first, second])
