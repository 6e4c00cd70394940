"""A checkpoint as the authors' are published, with tiny random parts: stock class names, no dreamlite.json, a model card.
What is derived for it is what would be derived for theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.trainers.conftest import TINY_MODEL
from trainers.model import build_unet

CARD = "---\nlicense: {licence}\npipeline_tag: text-to-image\n---\n# A model\n"


def write_release(components: Path, folder: Path, licence: str | None = "cc-by-nc-4.0", seed: int = 1) -> Path:
    """Write the checkpoint to `folder` and return it."""
    build_unet(TINY_MODEL, 64, 8, seed=seed).save_pretrained(folder / "unet")
    for part in ("vae", "text_encoder", "scheduler", "tokenizer"):
        shutil.copytree(components / part, folder / part)
    (folder / "processor").mkdir()
    config = json.loads((components / "processor" / "processor_config.json").read_text())["image_processor"]
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(config))
    index = {"_class_name": "DreamLitePipeline", "unet": ["diffusers", "DreamLiteUNetModel"], "processor": ["transformers", "Qwen3VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    if licence is not None:
        (folder / "README.md").write_text(CARD.format(licence=licence))
    return folder
