"""Reads a mobile checkpoint (diffusers layout + dreamlite.json) and states every fact a bundle must carry.
A fact that is missing or contradicts another stops the export with one sentence, before any graph is traced."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from trainers.conditioning import EDIT_PROMPT, EDIT_TEMPLATE, ENCODER_INPUT_PX, GENERATE_PROMPT, GENERATE_TEMPLATE, HiddenState
from trainers.export.schedule import deployed_sigmas
from trainers.model import latent_scale, read_json

FACT_KEYS = ("hidden_state", "size_px", "drop_generate", "drop_edit", "encoder_image_px")
IMAGE_TOKEN = "<|image_pad|>"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "processor", "scheduler")


@dataclass(frozen=True)
class Vision:
    """How a source image becomes vision tokens: squeezed to `resize_px`, then to `grid_px`, cut in patches."""

    resize_px: int
    grid_px: tuple[int, int]
    patch_px: int
    merge: int
    temporal: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, rows, columns) of patches."""
        return 1, self.grid_px[0] // self.patch_px, self.grid_px[1] // self.patch_px

    @property
    def tokens(self) -> int:
        """Image tokens in the prompt: patches after merging."""
        return self.grid[1] * self.grid[2] // self.merge**2


@dataclass(frozen=True)
class Source:
    """Facts of one checkpoint. Sizes in px; `latent_px` is the panel's latent side; `scale` px per latent cell."""

    directory: Path
    hidden_state: str
    size_px: int
    scale: int
    latent_channels: int
    text_width: int
    drop_generate: int
    drop_edit: int
    vision: Vision
    scheduler: dict[str, Any]
    digest: str
    weights: dict[str, Any]
    """Origin and licence of the weights that the checkpoint was trained from; empty where it was trained from scratch."""
    vae_scaling: float = 1.0
    vae_shift: float = 0.0

    @property
    def latent_px(self) -> int:
        return self.size_px // self.scale

    def sigmas(self, steps: int) -> list[float]:
        """The deployed noise levels for `steps` Euler steps at this size, ending in 0."""
        return deployed_sigmas(self.scheduler, self.latent_px * self.latent_px // 4, steps)

    def prompts(self) -> dict[str, Any]:
        """Prompt strings and drop lengths as the manifest carries them."""
        return {
            "generate_template": GENERATE_TEMPLATE,
            "generate_prompt": GENERATE_PROMPT,
            "generate_drop_tokens": self.drop_generate,
            "edit_template": EDIT_TEMPLATE,
            "edit_prompt": EDIT_PROMPT,
            "edit_drop_tokens": self.drop_edit,
            "image_token": IMAGE_TOKEN,
        }


def directory_digest(directory: Path) -> str:
    """sha256 over the relative paths and bytes of all files below `directory`, in path order."""
    total = hashlib.sha256()
    for path in sorted(item for item in directory.rglob("*") if item.is_file()):
        total.update(path.relative_to(directory).as_posix().encode() + b"\0")
        with path.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def read_source(checkpoint: Path, steps: int | None = None) -> Source:
    """Facts of the checkpoint directory. ValueError in one sentence when a part or fact is missing or impossible.

    steps: the number of Euler steps asked for; a checkpoint that says it was distilled for another number is refused.
    """
    checkpoint = Path(checkpoint)
    missing = [part for part in PARTS if not (checkpoint / part).is_dir()]
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(missing)}/; export needs a complete checkpoint directory.")
    facts = read_json(checkpoint / "dreamlite.json")
    absent = [key for key in FACT_KEYS if key not in facts]
    if absent:
        raise ValueError(f"{checkpoint / 'dreamlite.json'} lacks {', '.join(absent)}; save the checkpoint again to add it.")
    distilled = facts.get("distilled_steps", steps)
    if steps is not None and distilled != steps:
        what = "was never distilled" if distilled is None else f"was distilled for {distilled} steps"
        raise ValueError(f"{checkpoint} {what}, export.steps is {steps}; a bundle runs the student's own steps without guidance.")
    if facts["hidden_state"] not in get_args(HiddenState):
        raise ValueError(
            f"{checkpoint / 'dreamlite.json'} says hidden_state '{facts['hidden_state']}'; known are pre_norm and post_norm."
        )
    scheduler = read_json(checkpoint / "scheduler" / "scheduler_config.json")
    if not scheduler.get("use_dynamic_shifting") or scheduler.get("time_shift_type", "exponential") != "exponential":
        raise ValueError(
            f"{checkpoint / 'scheduler'} does not use exponential dynamic shifting, which the mobile student is "
            "distilled for; use a scheduler with use_dynamic_shifting: true."
        )
    vae = read_json(checkpoint / "vae" / "config.json")
    encoder = read_json(checkpoint / "text_encoder" / "config.json")
    scale = latent_scale(vae)
    size = int(facts["size_px"])
    if size % (2 * scale):
        raise ValueError(f"size_px is {size} in dreamlite.json; it must be a multiple of {2 * scale} px.")
    return Source(
        directory=checkpoint,
        hidden_state=facts["hidden_state"],
        size_px=size,
        scale=scale,
        latent_channels=int(vae["latent_channels"]),
        text_width=int(encoder["text_config"]["hidden_size"]),
        drop_generate=int(facts["drop_generate"]),
        drop_edit=int(facts["drop_edit"]),
        vision=_read_vision(checkpoint, int(facts["encoder_image_px"])),
        scheduler=scheduler,
        digest=directory_digest(checkpoint),
        weights=facts.get("weights", {}),
        vae_scaling=float(vae.get("scaling_factor", 1.0)),
        vae_shift=float(vae.get("shift_factor") or 0.0),
    )


def _read_vision(checkpoint: Path, stated_px: int) -> Vision:
    folder = checkpoint / "processor"
    path = next((folder / name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} holds no preprocessor_config.json or processor_config.json.")
    config = read_json(path)
    config = config.get("image_processor", config)
    bounds = config["size"]
    factor = config["patch_size"] * config["merge_size"]
    grid = smart_resize(ENCODER_INPUT_PX, ENCODER_INPUT_PX, factor, bounds["shortest_edge"], bounds["longest_edge"])
    if grid[0] != stated_px:
        raise ValueError(
            f"{path} turns the source into {grid[0]} px, but dreamlite.json says encoder_image_px {stated_px}; "
            "the UNet was trained with one of them, so mend the other."
        )
    return Vision(
        resize_px=ENCODER_INPUT_PX,
        grid_px=grid,
        patch_px=config["patch_size"],
        merge=config["merge_size"],
        temporal=config["temporal_patch_size"],
        mean=tuple(config["image_mean"]),
        std=tuple(config["image_std"]),
    )
