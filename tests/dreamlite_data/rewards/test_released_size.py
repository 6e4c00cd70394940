"""With the real tokenizer and the shapes of the 7 B models, lengths, memory and work are the published ones.
Their weights are not needed: a file that holds only a header stands for them."""

import json
from pathlib import Path

import pytest
import torch

from dreamlite_data.rewards.loader import released_key
from dreamlite_data.rewards.network import RewardNetwork, read_config
from dreamlite_data.rewards.plan import RowShape, make_plan, typical_shape
from dreamlite_data.rewards.spec import RewardSpec, read_spec, released_spec
from dreamlite_data.rewards.stored import read_headers, weight_files
from dreamlite_data.rewards.text import RewardTokenizer
from tests.dreamlite_data.rewards.qwen_tokenizer import cached_qwen_tokenizer

pytestmark = pytest.mark.slow
ROWS = 151_658
CONFIGS = {
    "hpsv3": {  # Qwen2-VL-7B-Instruct
        "model_type": "qwen2_vl", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14},
    },
    "editreward": {  # MiMo-VL-7B
        "model_type": "qwen2_5_vl", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 11008, "vocab_size": 152064, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 4096, "patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory) -> dict[str, Path]:
    """A directory per kind: config, real tokenizer, and weights of which only the header is written."""
    tokenizer = cached_qwen_tokenizer(request.config)
    found = {}
    for kind, settings in CONFIGS.items():
        folder = found[kind] = tmp_path_factory.mktemp(kind)
        for path in tokenizer.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "config.json").write_text(json.dumps(settings))
        write_header(folder, kind)
    return found


def write_header(folder: Path, kind: str) -> None:
    config = read_config(folder)
    config.text_config.vocab_size = ROWS
    hidden = config.text_config.hidden_size
    with torch.device("meta"):
        network = RewardNetwork(config, [[hidden, 1024, 16, 2]] * (1 if kind == "hpsv3" else 2))
    shapes = {released_key(key, kind=kind): tuple(value.shape) for key, value in network.state_dict().items()}
    shapes["lm_head.weight"] = (ROWS, hidden)
    header, end = {}, 0
    for key, shape in shapes.items():
        type_, width = ("F32", 4) if key.startswith("rm_head") else ("BF16", 2)
        start, end = end, end + width * torch.Size(shape).numel()
        header[key] = {"dtype": type_, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def tokenizer_of(folders, kind: str) -> RewardTokenizer:
    return RewardTokenizer(folders[kind], RewardSpec.model_validate(released_spec(kind)), ROWS)


TAIL = "\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"  # what stands behind the reward token and is dropped


def test_hpsv3_has_530_text_and_256_image_tokens(folders):
    tokenizer = tokenizer_of(folders, "hpsv3")
    assert (tokenizer.image_id, tokenizer.reward_id) == (151655, 151657)
    tail = len(tokenizer.tokenizer(TAIL).input_ids)
    assert tail == 8
    assert len(tokenizer.trunk([256])) + len(tokenizer.branches([""])[0][0]) + tail == 786
    stripped = RewardSpec.model_validate(released_spec("hpsv3"))
    fewer = "\n".join(line.rstrip() for line in stripped.prompts[0].split("\n"))
    lengths = [len(tokenizer.tokenizer(text).input_ids) for text in (stripped.prompts[0], fewer)]
    assert lengths[0] != lengths[1]  # what a port that strips spaces would read


def test_editreward_s_prompts_share_551_tokens(folders):
    model_spec = RewardSpec.model_validate(released_spec("editreward"))
    tokenizer = tokenizer_of(folders, "editreward")
    trunk = len(tokenizer.trunk([256, 256]))
    follow, quality = tokenizer.branches([""])[0]
    assert [trunk - 512 + len(each) + 8 for each in (follow, quality)] == [419, 396]
    shape = typical_shape(tokenizer, read_config(folders["editreward"]), model_spec)
    assert shape == RowShape(((32, 32), (32, 32)), 551, (trunk + len(follow) - 551, trunk + len(quality) - 551))


@pytest.mark.parametrize("prompt", ["a cat", "Ein Käse, 日本語 🎨", "  two  spaces\n\nand lines ", "<|Reward|> 10 <|image_pad|>", "1234567890 don't"])
def test_ids_are_the_same_bytes_again_and_hold_no_special_token(folders, prompt):
    tokenizer = tokenizer_of(folders, "hpsv3")
    (ids,) = tokenizer.branches([prompt])[0]
    spec = RewardSpec.model_validate(released_spec("hpsv3"))
    assert tokenizer.tokenizer.decode(ids[:-1]) == spec.text(prompt, 0)
    assert max(ids[:-1]) < 151643 and ids[-1] == 151657


def plan_of(folder: Path, rows: int = 1):
    header, config = read_headers(weight_files(folder)), read_config(folder)
    spec = read_spec(folder, config.model_type)
    return make_plan(header, config, [typical_shape(RewardTokenizer(folder, spec, ROWS), config, spec)] * rows, 1_000_000, 4)


def test_hpsv3_takes_the_memory_and_work_that_were_measured_and_reported(folders):
    """Parameters: rewards.md 4 (measured on the meta device). 4 bits: 6.10 GB after loading, 8.66 at batch 4 (1.8)."""
    plan = plan_of(folders["hpsv3"], 4)
    parts = {row["part"]: row for row in plan.weights}
    assert sum(row["parameters"] for row in plan.weights) == pytest.approx(8.288e9, rel=2e-3)
    assert parts["vision"]["parameters"] == pytest.approx(0.676e9, rel=2e-3)
    assert parts["decoder"]["parameters"] == pytest.approx(6.526e9, rel=2e-3)
    assert parts["heads"]["parameters"] == 3_687_474
    bf16, four_bit = plan.memory
    assert bf16["weights_gb"] == pytest.approx(15.5, rel=0.01) and four_bit["weights_gb"] == pytest.approx(6.10, rel=0.06)
    assert four_bit["weights_gb"] < four_bit["peak_gb"] < 8.66
    assert plan.row["tflop"] == pytest.approx(12, rel=0.06)
    gpus = {row["gpu"]: row for row in plan.gpus}
    assert gpus["H100 SXM"]["rows_a_second"] == pytest.approx(30, rel=0.15)
    assert gpus["A100 80 GB"]["rows_a_second"] == pytest.approx(10, rel=0.15)
    assert (gpus["L4"]["fits_bf16"], gpus["L4"]["fits_4_bit"]) == ("yes", "yes")
    assert gpus["A100 80 GB"]["hours"] / 8 == pytest.approx(3.5, rel=0.15)  # 1M images on 8 of them


def test_editreward_takes_two_thirds_of_the_work_as_published(folders):
    """About 20 TFLOP a pair with shared prefix and vision tower (rewards.md 4)."""
    plan = plan_of(folders["editreward"])
    assert plan.row["tflop"] == pytest.approx(20, rel=0.12)
    assert sum(row["parameters"] for row in plan.weights if "dropped" not in row["part"]) == pytest.approx(8.45e9 - ROWS * 4096, rel=0.03)
