"""One random-weight checkpoint of the small world's layout and one bundle of it per test session, whatever the number of workers.
Tracing the five graphs is the slow part, and every test only reads the result."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from dreamlite_data import scenes
from trainers.components.tokenizer import build_processor, build_tokenizer
from trainers.export.bundle import export_bundle
from trainers.export.settings import ExportSettings

SETTINGS = ExportSettings(sequence_tokens=64, calibration_rows=4, parity_rows=2, evaluate_rows=8, scan_rows=1)


def tiny_unet() -> DreamLiteUNetModel:
    return DreamLiteUNetModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj_rms",
        addition_embed_type="time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=32,
        ff_mult=3,
        num_kv_heads=1,
        use_linear_projection=True,
        use_sep_conv=True,
    )


def tiny_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "max_position_embeddings": 1024,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config)


def build_checkpoint(directory: Path, *, hidden_state: str = "post_norm", seed: int = 0) -> Path:
    """Write a complete mobile checkpoint under `directory` and return it."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encoder = tiny_text_encoder(tokenizer).eval()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    unet = tiny_unet()
    # Fresh norms are all-ones; random gains make pre_norm and post_norm states truly different.
    with torch.no_grad():
        encoder.model.language_model.norm.weight.uniform_(0.5, 1.5)
    for name, part in {"unet": unet, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer}.items():
        part.save_pretrained(directory / name)
    build_processor(tokenizer, image_px=64, patch_px=16).save_pretrained(directory / "processor")
    FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    ).save_pretrained(directory / "scheduler")

    facts = {
        "hidden_state": hidden_state,
        "size_px": 64,
        "drop_generate": 34,
        "drop_edit": 64,
        "encoder_image_px": 64,
    }
    (directory / "dreamlite.json").write_text(json.dumps(facts, indent=2))
    index = {
        "_class_name": "DreamLiteMobilePipeline",
        "unet": ["diffusers", "DreamLiteUNetModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return directory


def calibration_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` generate and `count` edit rows of the small world, in turn."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        scene = scenes.sample_scene(rng)
        edit = scenes.sample_edit(scene, rng)
        rows.append({"id": f"t2i@1/{len(rows)}", "task": "generate", "text": scenes.caption(scene, rng)})
        rows.append({"id": f"edit@1/{len(rows)}", "task": "edit", "text": scenes.instruction(edit, scene, rng), "image": scenes.render(scene)})
    return rows


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the session's xdist workers share; the first one that needs something makes it, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "export_session"
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    return folder


def made_once(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned, as JSON, in whichever process was first."""
    with open(f"{folder}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        answer = Path(f"{folder}.json")
        if not answer.is_file():
            answer.write_text(json.dumps(make()))
        return json.loads(answer.read_text())


@pytest.fixture(scope="session")
def checkpoint(shared: Path) -> Path:
    """A random-weight mobile checkpoint directory."""
    return Path(made_once(shared / "checkpoint", lambda: {"path": str(build_checkpoint(shared / "checkpoint"))})["path"])


@pytest.fixture(scope="session")
def exported(shared: Path, checkpoint: Path) -> dict[str, Any]:
    """What export_bundle returned; its bundle directory is under 'bundle'."""
    return made_once(shared / "export", lambda: export_again(checkpoint, shared / "export"))


def export_again(checkpoint: Path, output: Path) -> dict[str, Any]:
    """The session's export, into `output`."""
    return export_bundle(checkpoint, SETTINGS, output, calibration=calibration_rows(8), lineage={"checkpoint_id": "dmd2-test"})


@pytest.fixture(scope="session")
def bundle(exported: dict[str, Any]) -> Path:
    """The bundle directory; tests must not change it."""
    return Path(exported["bundle"])


@pytest.fixture(scope="session")
def small_export() -> tuple[ExportSettings, list[dict[str, Any]]]:
    """Settings of the session's bundle and one calibration row per task."""
    return SETTINGS, calibration_rows(1)
