"""The compute part of `dreamlite plan`: from a configuration to tables of work, memory and disk for given GPUs.
What cannot be known before the data is there (how many rows, how wide the text encoder) is taken as published, and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.config import STAGES, PipelineConfig
from trainers.components.build import PACKAGED
from trainers.compute import Cluster, Network, disk_rows, memory_rows, work_rows
from trainers.model import latent_scale, unet_config

PUBLISHED_ROWS = {"generate": 20_000_000, "edit": 1_740_000}
"""Images and edit triplets that the authors trained on (arXiv 2603.28713)."""
PUBLISHED_TEXT_WIDTH, PUBLISHED_LATENT_SCALE = 2048, 8
"""Hidden size of Qwen3-VL-2B, and pixels of a latent of TAESDXL, for where the frozen parts are not on this machine yet."""


def compute_tables(
    config: PipelineConfig, cluster: Cluster, images: int | None, edits: int | None, note: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """{title: rows}. `images` and `edits` are the rows to cache; None takes the scenes of the small world, or what was published."""
    stages = {name: settings for name in STAGES if (settings := getattr(config.train, name)) is not None}
    folder = PACKAGED if config.components.source in ("packaged", "train") else Path(config.components.source)
    network = _network(config, folder, note)
    scenes = config.refresh.scenes
    rows = {"generate": images or scenes.t2i_rows, "edit": edits or scenes.edit_rows}
    for task, count in rows.items():
        if not count:
            rows[task] = PUBLISHED_ROWS[task]
            note(f"rows of {task}: {rows[task]:,}, as published; say --{'images' if task == 'generate' else 'edits'} for yours")
    on = f"{cluster.count} x {cluster.gpu} at {cluster.utilisation:.0%} of its peak"
    return {
        f"work of {on}: a ceiling, not a promise": work_rows(stages, network, cluster),
        f"memory of one {cluster.gpu}, {cluster.memory_bytes / 1e9:.0f} GB usable": memory_rows(
            stages, network, cluster, config.exec.train.shard_rewards
        ),
        "disk": disk_rows(stages, network, rows, folder),
    }


def _network(config: PipelineConfig, folder: Path, note: Callable[[str], None]) -> Network:
    encoder, vae = folder / "text_encoder" / "config.json", folder / "vae" / "config.json"
    if not (encoder.is_file() and vae.is_file()):
        note(f"no frozen parts at {folder}: planning with those that were published (Qwen3-VL-2B, TAESDXL)")
        side = config.model.size_px // PUBLISHED_LATENT_SCALE
        return Network(unet_config(config.model, PUBLISHED_TEXT_WIDTH, side), config.model.size_px, PUBLISHED_LATENT_SCALE)
    width = json.loads(encoder.read_text())["text_config"]["hidden_size"]
    parts = json.loads(vae.read_text())
    latent_px = latent_scale(parts)
    return Network(
        unet_config(config.model, width, config.model.size_px // latent_px), config.model.size_px, latent_px,
        tuple(parts["decoder_block_out_channels"]), tuple(parts["num_decoder_blocks"]),
    )  # fmt: skip
