"""Provide the frozen parts of a run: the packaged ones, a folder of the user's, or parts trained here and now.
`record.json` beside each packaged part says in which steps it was made and what it reaches."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from dreamlite_data.executors import LocalExecutor
from dreamlite_data.inference import worker_threads
from dreamlite_data.progress import Progress
from trainers.components.captioner import build_captioner, measure_captioner
from trainers.components.reward import build_reward
from trainers.components.reward_measure import pair_accuracy
from trainers.components.storage import store_half, unpack
from trainers.components.text_encoder import IMAGE_PX, PATCH_PX, VISION_STEPS, build_text_encoder
from trainers.components.text_probe import linear_probe
from trainers.components.tokenizer import build_processor, build_tokenizer
from trainers.components.vae import build_vae, measure_vae
from trainers.conditioning import PromptEncoder
from trainers.flow import SCHEDULER_CONFIG
from trainers.settings import ComponentsSettings

PACKAGED = Path(__file__).parent / "small_world"
FOLDERS = ("vae", "text_encoder", "tokenizer", "processor", "scheduler", "rewards/generate", "rewards/edit")
"""What a run needs. The captioner serves the data engine's chat and is no part of the model."""
CHAINS = (("vae",), ("text_encoder", "captioner"), ("rewards/generate",), ("rewards/edit",))
"""What can be trained side by side, the longest first; the captioner takes the text encoder's eyes."""
PARTS = tuple(name for chain in CHAINS for name in chain)
TARGETS = {
    "vae": {"scenes_read": 0.98},
    "text_encoder": {f"{task}_{field}": 0.99 for task, field in (
        ("generate", "colour"), ("generate", "shape"), ("generate", "position"), ("edit", "colour"), ("edit", "shape"), ("edit", "kind")
    )},
    "captioner": {"caption_exact": 0.95, "difference_exact": 0.85},
    "rewards/generate": {"pair_accuracy": 0.95},
    "rewards/edit": {"follow_accuracy": 0.92, "quality_accuracy": 0.92},
}  # fmt: skip
"""What each part must reach on held-out scenes."""
MEASURED_SEED = 1_000
Log = Callable[[int, dict[str, float]], None]


def build_components(settings: ComponentsSettings, output: Path, folders: Sequence[str] = FOLDERS) -> Path:
    """Return a folder with (at least) `folders`: all of vae/, text_encoder/, tokenizer/, processor/, scheduler/, rewards/{generate,edit}/.

    Raises ValueError where a folder of the user's lacks a part, naming all that are missing.
    """
    if settings.source == "train":
        needed = [name for name in PARTS if name in folders]
        return _unpacked(build_parts(output / "trained", settings, needed), output / "components", folders)
    source = PACKAGED if settings.source == "packaged" else Path(settings.source).expanduser().resolve()
    missing = [name for name in folders if not (source / name).is_dir()]
    if missing:
        raise ValueError(f"components.source {source} lacks {', '.join(missing)}: give a complete folder, `packaged` or `train`")
    if settings.source != "packaged":
        return source
    return _unpacked(source, output / "components", folders)


def build_parts(output: Path, settings: ComponentsSettings, only: Sequence[str] = PARTS, workers: int = 1) -> Path:
    """Train the parts `only` that `output` does not hold yet, `workers` at a time in processes of one thread each: weights do not
    depend on how many. Each part is recorded when it is done, so a killed build goes on with those it was at.

    Raises ValueError for a part that there is not, and where the captioner has no text encoder to take its eyes from.
    """
    if unknown := [name for name in only if name not in PARTS]:
        raise ValueError(f"there is no part {', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(output / "tokenizer")
    processor = build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX)
    processor.save_pretrained(output / "processor")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIG).save_pretrained(output / "scheduler")
    missing = [[name for name in chain if name in only and not (output / name / "record.json").is_file()] for chain in CHAINS]
    with LocalExecutor(workers) as executor:
        for _ in executor.map(functools.partial(_build_chain, output, settings), [chain for chain in missing if chain]):
            pass
    return output


def _build_chain(output: Path, settings: ComponentsSettings, chain: Sequence[str]) -> None:
    """Train, store, measure and record the parts of one chain, one after the other."""
    steps = {
        "vae": settings.vae_steps, "text_encoder": settings.text_encoder_steps, "captioner": settings.captioner_steps,
        "rewards/generate": settings.reward_steps, "rewards/edit": settings.reward_steps,
    }  # fmt: skip
    for name in chain:
        started = time.monotonic()
        first = VISION_STEPS if name == "text_encoder" else 0
        with worker_threads(), _logged(name, first + steps[name]) as log:
            told = _train(name, output / name, steps[name], settings.seed, log)
        record = {"steps": steps[name], "seed": settings.seed, "seconds": round(time.monotonic() - started), "torch": torch.__version__}
        store_half(output / name)
        write_record(output / name, record | told | {"held_out": measure_part(output, name)})


def measure_part(folder: Path, name: str) -> dict[str, float]:
    """What a part of a parts folder reaches on held-out scenes, measured on its files as they are loaded by everybody."""
    if name == "vae":
        return measure_vae(AutoencoderTiny.from_pretrained(folder / name, torch_dtype=torch.float32).eval(), seed=MEASURED_SEED)
    if name == "text_encoder":
        return linear_probe(PromptEncoder.load(folder, "post_norm"), seed=MEASURED_SEED)
    if name == "captioner":
        return measure_captioner(folder / name, seed=MEASURED_SEED)
    return pair_accuracy(folder / name, rows=400, seed=MEASURED_SEED)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """`record.json` of one part."""
    (folder / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")


def _unpacked(source: Path, target: Path, folders: Sequence[str]) -> Path:
    """What a run needs of `source`, and no more: a new captioner must not train a model anew."""
    for name in folders:
        unpack(source / name, target / name)
    return target


def _train(name: str, folder: Path, steps: int, seed: int, log: Log) -> dict[str, Any]:
    """Train one part and save it in float32; returns what only training can tell."""
    if name == "vae":
        build_vae(steps=steps, seed=seed, log=log).save_pretrained(folder)
        return {}
    if name == "text_encoder":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer")
        processor = build_processor(tokenizer, image_px=IMAGE_PX, patch_px=PATCH_PX)
        model, told = build_text_encoder(tokenizer, processor, steps=steps, seed=seed, log=log)
        model.save_pretrained(folder)
        return {"own_probe": told}
    if name == "captioner":
        if not (folder.parent / "text_encoder" / "config.json").is_file():
            raise ValueError(f"the captioner sees with the text encoder's eyes, but {folder.parent} holds no text_encoder: build it first")
        seeing = Qwen3VLForConditionalGeneration.from_pretrained(folder.parent / "text_encoder", dtype=torch.float32).model.visual
        build_captioner(folder, seeing, steps=steps, seed=seed, log=log)
        return {}
    return build_reward("edit" if name.endswith("edit") else "generate", folder, steps=steps, seed=seed, log=log)


class _logged(Progress):  # noqa: N801 - used as a function
    """A progress bar that hands a trainer its log function."""

    def __init__(self, label: str, steps: int) -> None:
        super().__init__(label, total=steps, unit="steps")

    def __enter__(self) -> Log:  # type: ignore[override]
        super().__enter__()

        def log(step: int, metrics: dict[str, float]) -> None:
            self.advance(step - self.done, **{name: round(value, 4) for name, value in metrics.items()})

        return log
