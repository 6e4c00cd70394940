"""Provide the frozen parts of a run: the packaged ones, a folder of the user's, or parts trained here and now.
`record.json` beside each packaged part says in which steps it was made and to which result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dreamlite_data.progress import Progress
from trainers.components.reward import build_reward
from trainers.components.text_encoder import IMAGE_PX, PATCH_PX, build_text_encoder
from trainers.components.tokenizer import build_processor, build_tokenizer
from trainers.components.vae import build_vae
from trainers.flow import SCHEDULER_CONFIG
from trainers.settings import ComponentsSettings

PACKAGED = Path(__file__).parent / "small_world"
FOLDERS = ("vae", "text_encoder", "tokenizer", "processor", "scheduler", "rewards/generate", "rewards/edit")


def build_components(settings: ComponentsSettings, output: Path) -> Path:
    """Return a folder with vae/, text_encoder/, tokenizer/, processor/, scheduler/ and rewards/{generate,edit}/.

    Raises ValueError where a folder of the user's lacks a part, naming all that are missing.
    """
    if settings.source == "train":
        return train_components(settings, output / "components")
    source = PACKAGED if settings.source == "packaged" else Path(settings.source).expanduser().resolve()
    missing = [name for name in FOLDERS if not (source / name).is_dir()]
    if missing:
        raise ValueError(f"components.source {source} lacks {', '.join(missing)}: give a complete folder, `packaged` or `train`")
    if settings.source != "packaged":
        return source
    target = output / "components"
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def train_components(settings: ComponentsSettings, output: Path) -> Path:
    """Train every part that `output` does not hold yet: each is saved when it is done, so a killed run goes on."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output / "tokenizer")
    processor = build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX)
    processor.save_pretrained(output / "processor")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(output / "scheduler")
    if not (output / "vae" / "record.json").is_file():
        with _logged("VAE", settings.vae_steps) as log:
            vae, metrics = build_vae(steps=settings.vae_steps, seed=settings.seed, log=log)
        vae.save_pretrained(output / "vae")
        _record(output / "vae", settings.vae_steps, settings.seed, metrics)
    if not (output / "text_encoder" / "record.json").is_file():
        with _logged("text encoder", settings.text_encoder_steps) as log:
            encoder, metrics = build_text_encoder(
                tokenizer, processor, steps=settings.text_encoder_steps, seed=settings.seed, log=log
            )
        encoder.save_pretrained(output / "text_encoder")
        _record(output / "text_encoder", settings.text_encoder_steps, settings.seed, metrics)
    for task in ("generate", "edit"):
        if not (output / "rewards" / task / "record.json").is_file():
            build_reward(
                task, output / "rewards" / task, seed=settings.seed, steps=settings.reward_steps, threads=torch.get_num_threads()
            )
    return output


class _logged(Progress):  # noqa: N801 - used as a function
    """A progress bar that hands a trainer its log function."""

    def __init__(self, label: str, steps: int) -> None:
        super().__init__(label, total=steps, unit="steps")

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:  # type: ignore[override]
        super().__enter__()

        def log(step: int, metrics: dict[str, float]) -> None:
            self.advance(step - self.done, **{name: round(value, 4) for name, value in metrics.items()})

        return log


def _record(folder: Path, steps: int, seed: int, metrics: dict[str, float]) -> None:
    record = {"steps": steps, "seed": seed, "torch": torch.__version__, "held_out": metrics}
    (folder / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True))
