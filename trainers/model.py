"""The UNet from an explicit configuration, and a checkpoint folder in diffusers layout.
The class defaults of diffusers build another network: nothing here relies on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from safetensors import SafetensorError

from trainers.flow import SCHEDULER_CONFIG
from trainers.settings import ModelSettings

OFFICIAL_PARAMETERS = 389_968_388
PARTS = ("vae", "text_encoder", "tokenizer", "processor", "scheduler")
"""What a UNet was trained with and cannot work without; each is a folder of a checkpoint."""
FACTS_FILE = "dreamlite.json"


def unet_config(settings: ModelSettings, text_width: int, side: int) -> dict[str, Any]:
    """Keyword arguments of `DreamLiteUNetModel`: `text_width` is the encoder's hidden size, `side` a panel's in latents."""
    shared = {
        "in_channels": 4,
        "out_channels": 4,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "num_kv_heads": 1,
        "qk_norm": "rms_norm",
        "ff_mult": 3,
        "use_sep_conv": True,
        "use_linear_projection": True,
        "encoder_hid_dim": text_width,
        "encoder_hid_dim_type": "text_proj_rms",
        "addition_embed_type": "time",
        "num_mid_layers": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
    }
    if settings.preset == "official":  # the released dreamlite.json
        return shared | {
            "sample_size": side,
            "block_out_channels": (256, 512, 896),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 4),
            "attention_head_dim": (4, 8, 14),  # head COUNTS, as diffusers names them; every head is 64 wide
            "down_block_types": (
                "CrossAttnDownRemoveSelfAttnBlock2D",
                "CrossAttnDownRemoveSelfAttnBlock2D",
                "CrossAttnDownBlock2D",
            ),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpRemoveSelfAttnBlock2DV1", "UpBlock2D"),
            "norm_num_groups": 32,
            "cross_attention_dim": 2304,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 512,
        }
    levels = len(settings.channels)
    # Self-attention copies from the right panel. A pair of 8 x 16 latents is short enough for it at every level; the official
    # network, with 128 x 256, keeps it below full resolution and has no attention at all in its last block.
    down, up = ("CrossAttnDownBlock2D",) * levels, ("CrossAttnUpBlock2D",) * levels
    if not settings.attention_at_full_resolution:
        down, up = ("CrossAttnDownRemoveSelfAttnBlock2D", *down[1:]), (*up[:-1], "UpBlock2D")
    return shared | {
        "sample_size": side,
        "block_out_channels": settings.channels,
        "layers_per_block": settings.layers,
        "transformer_layers_per_block": (1,) * levels,
        "attention_head_dim": tuple(width // settings.head_width for width in settings.channels),
        "down_block_types": down,
        "up_block_types": up,
        "norm_num_groups": 16,
        "cross_attention_dim": text_width,
        "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 64,
    }


def build_unet(settings: ModelSettings, text_width: int, side: int, seed: int = 0) -> DreamLiteUNetModel:
    """A fresh UNet with seeded weights."""
    with torch.random.fork_rng(devices=()):  # drawn on the CPU; every GPU would be forked too
        torch.manual_seed(seed)
        return DreamLiteUNetModel(**unet_config(settings, text_width, side))


def load_unet(checkpoint: Path) -> DreamLiteUNetModel:
    """The UNet of a checkpoint folder, float32. Raises ValueError where its files are damaged or do not fit each other."""
    try:
        return DreamLiteUNetModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{checkpoint / 'unet'} cannot be read ({str(error).splitlines()[0]}): train that stage again or name another") from None


def load_vae(folder: Path) -> AutoencoderTiny:
    """The frozen VAE of a components or checkpoint folder, float32."""
    vae = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32, use_safetensors=True)
    return vae.eval().requires_grad_(False)


def latent_scale(vae_config: Mapping[str, Any]) -> int:
    """Pixels a latent cell is wide: 8 for the released VAE and for the small world's."""
    return 2 ** (len(vae_config["encoder_block_out_channels"]) - 1)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; raises ValueError with its name where it is missing or not valid."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is not whole") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


def load_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself beyond its weights; raises ValueError with the file's name where it is missing."""
    path = folder / FACTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {FACTS_FILE}: it is not a checkpoint of this project")
    return read_json(path)


def save_checkpoint(
    unet: DreamLiteUNetModel, components: Path, output: Path, *, facts: dict[str, Any], distilled: bool
) -> None:
    """Write `output` so that the stock `DreamLitePipeline` (or, `distilled`, `DreamLiteMobilePipeline`) loads it.

    Written beside the target and renamed, so a killed process leaves no half checkpoint.
    """
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    unet.save_pretrained(staging / "unet")
    for part in PARTS:
        shutil.copytree(components / part, staging / part)
    write_facts(staging, facts, distilled)
    shutil.rmtree(output, ignore_errors=True)
    staging.rename(output)


def write_facts(folder: Path, facts: dict[str, Any], distilled: bool) -> None:
    """What a checkpoint folder says of its parts: model_index.json to the stock pipelines, dreamlite.json to us."""
    index = {
        "_class_name": "DreamLiteMobilePipeline" if distilled else "DreamLitePipeline",
        "_diffusers_version": "0.42.1",
        "processor": ["trainers.processor", "SquareImageProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "DreamLiteUNetModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / FACTS_FILE).write_text(json.dumps(facts | {"scheduler": SCHEDULER_CONFIG}, indent=2, sort_keys=True))
