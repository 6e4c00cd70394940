"""The plan agrees with what really happens: operations counted by torch, memory watched while scoring, 4-bit weights weighed."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dreamlite_data.rewards import load_reward
from dreamlite_data.rewards.loader import released_key, vocabulary_rows
from dreamlite_data.rewards.model import RewardModel
from dreamlite_data.rewards.network import RewardNetwork, read_config
from dreamlite_data.rewards.packing import batches
from dreamlite_data.rewards.plan import (
    RowShape,
    loaded_bytes,
    make_plan,
    row_flops,
    row_shapes,
    weight_rows,
    working_bytes,
)
from dreamlite_data.rewards.rows import RewardInput
from dreamlite_data.rewards.stored import StoredTensor, read_headers, weight_files

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = {"hpsv3": "short_hpsv3", "editreward": "short_editreward"}


@pytest.fixture(params=KINDS)
def model(request) -> RewardModel:
    return request.getfixturevalue(KINDS[request.param])


def inputs(model: RewardModel, names: list[str]) -> list[RewardInput]:
    paths = [FIXTURES / f"{name}.png" for name in names]
    return [RewardInput(path, "a red cat", paths[0] if model.spec.images == 2 else None) for path in paths]


def score(model: RewardModel, rows: list[RewardInput]):
    sources = [row.source for row in rows] if model.spec.images == 2 else None
    return model.score([row.image for row in rows], [row.prompt for row in rows], sources)


def test_shapes_are_those_that_scoring_makes(model):
    rows = inputs(model, ["image0", "image1", "image3"])
    shapes = list(row_shapes(model.tokenizer, model.network.config, model.spec, rows))
    assert [shape.length for shape in shapes] == score(model, rows).tokens.tolist()
    unreadable = RewardInput(FIXTURES / "none.png", "x", rows[0].source)
    assert list(row_shapes(model.tokenizer, model.network.config, model.spec, [unreadable])) == []


@pytest.mark.parametrize("name", ["image0", "image2"])  # squares, and windows cut at the border
def test_operations_are_those_that_torch_counts(model, name):
    """Eager attention, for torch does not count the fused kernel on the CPU."""
    header = read_headers(weight_files(model.model_dir))
    rows = inputs(model, [name])
    (shape,) = row_shapes(model.tokenizer, model.network.config, model.spec, rows)
    eager = load_reward(model.model_dir)
    for part in (eager.network.backbone.language_model, eager.network.backbone.visual):
        part.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        score(eager, rows)
    found = row_flops(header, eager.network.config, shape)
    assert sum(found.values()) == pytest.approx(counter.get_total_flops(), rel=1e-9)


class Memory(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, list | tuple) else (out,):
            if isinstance(each, torch.Tensor):
                self._watch(each.untyped_storage())
        return out

    def _watch(self, storage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.known or not size:
            return
        self.known.add(place)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, place, size)

    def _freed(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.held -= size


def widened(model: RewardModel, folder: Path) -> RewardModel:
    """The tiny checkpoint with a decoder and a tower as wide, for their tokens, as in the 7 B model."""
    own = Path(shutil.copytree(model.model_dir, folder / "wide"))
    settings = json.loads((own / "config.json").read_text())
    wide = {"hidden_size": 256, "intermediate_size": 1280, "num_attention_heads": 8, "num_key_value_heads": 2}
    for part in (settings, settings.get("text_config", {})):
        part.update(wide, rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]})
    own_width = {"embed_dim": 96, "hidden_size": 256, "mlp_ratio": 4} if model.kind == "hpsv3" else {
        "hidden_size": 96, "out_hidden_size": 256, "intermediate_size": 256,
    }  # fmt: skip
    settings["vision_config"].update(own_width)
    (own / "config.json").write_text(json.dumps(settings))
    config = read_config(own)
    config.text_config.vocab_size = vocabulary_rows(read_headers(weight_files(own)), own)
    torch.manual_seed(0)
    network = RewardNetwork(config, [[256, 32, 16, 2]] * len(model.spec.heads))
    (path,) = weight_files(own)
    save_file({released_key(key, kind=model.kind): value.contiguous() for key, value in network.state_dict().items()}, path)
    return load_reward(own)


def test_peak_memory_is_near_the_one_that_is_seen(model, tmp_path):
    wide = widened(model, tmp_path)
    rows = inputs(wide, ["image0"] * 6)
    shapes = list(row_shapes(wide.tokenizer, wide.network.config, wide.spec, rows))
    score(wide, rows[:1])
    with Memory() as seen:
        score(wide, rows)
    planned = working_bytes(wide.network.config, shapes, element_bytes=4)
    assert 0.7 < planned / seen.peak < 1.5, (planned, seen.peak)


def test_batches_hold_rows_and_tokens_within_their_bounds():
    lengths = [5, 20_000, 30, 10, 17_000, 30]
    assert batches(lengths, 2) == [[0, 3], [2, 5], [4], [1]]


def test_dropped_and_quantised_weights_are_counted_as_such():
    header = {
        "lm_head.weight": StoredTensor((100, 10), torch.bfloat16), "rm_head.0.weight": StoredTensor((4, 10), torch.float32),
        "model.layers.0.mlp.up_proj.weight": StoredTensor((128, 64), torch.float32), "model.norm.weight": StoredTensor((10,), torch.bfloat16),
        "visual.blocks.0.mlp.fc1.weight": StoredTensor((20, 10), torch.bfloat16),
    }  # fmt: skip
    assert loaded_bytes(header, four_bit=False) == 40 * 4 + 2 * (8192 + 10 + 200)
    assert loaded_bytes(header, four_bit=True) == 40 * 4 + 2 * (10 + 200) + 4096 + 128 + 2
    rows = {row["part"]: row for row in weight_rows(header)}
    assert rows["lm_head (dropped)"]["bf16_gb"] == 0 and rows["lm_head (dropped)"]["stored_gb"] == 2000 / 1e9
    assert (rows["decoder"]["parameters"], rows["decoder"]["stored_as"]) == (8202, "bfloat16, float32")


def test_a_gpu_too_small_says_so(short_hpsv3):
    header = read_headers(weight_files(short_hpsv3.model_dir))
    huge = header | {"visual.merger.extra": StoredTensor((20, 10**9), torch.bfloat16)}
    shape = RowShape(((16, 16),), 100, (20,))
    fits = {row["gpu"]: row["fits_bf16"] for row in make_plan(huge, short_hpsv3.network.config, [shape], 10, 1).gpus}
    assert fits["L4"] == "no" and fits["L40S"] == "yes"
