"""Training rows made from the small world: in memory, encoded by given parts, or in a small lake.
The batches come from the same code as those of a real one."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dreamlite_data import scenes
from dreamlite_data.lake import Lake
from trainers.conditioning import PromptEncoder, as_image
from trainers.data import Row, TrainingRows, state_key
from trainers.model import latent_scale
from trainers.pixels import to_tensor


class SceneRows(TrainingRows):
    """`count` rows of each task, alternating."""

    def __init__(self, count: int, vae, encoder: PromptEncoder, seed: int = 0) -> None:  # noqa: ANN001
        rng = np.random.default_rng(seed)
        self.size_px, self.rows, images = 64, [], {}
        self.side = 64 // latent_scale(vae.config)
        for index in range(count):
            scene = scenes.sample_scene(rng)
            edit = scenes.sample_edit(scene, rng)
            images[f"s{index}"], images[f"t{index}"] = (
                scenes.render(scene),
                scenes.render(scenes.apply_edit(scene, edit)),
            )
            changed = np.abs(images[f"s{index}"].astype(int) - images[f"t{index}"]).max(-1) > 8
            mask = changed.reshape(8, 8, 8, 8).mean((1, 3)) * 255
            self.rows += [
                Row(f"g{index}", "generate", f"s{index}", None, scenes.caption(scene, rng), None, None),
                Row(f"e{index}", "edit", f"t{index}", f"s{index}", scenes.instruction(edit, scene, rng), edit.kind, mask.round().astype(np.uint8).tobytes()),
            ]
        self.by_task = {task: [i for i, row in enumerate(self.rows) if row.task == task] for task in ("generate", "edit")}
        self.latents, self.states = _Memory(), _Memory()
        with torch.no_grad():
            names = list(images)
            for start in range(0, len(names), 64):
                part = names[start : start + 64]
                pixels = to_tensor(np.stack([images[name] for name in part]))
                self.latents.values |= zip(part, vae.encoder(pixels).flatten(1), strict=True)
        for start in range(0, len(self.rows), 64):
            part = self.rows[start : start + 64]
            for text in (True, False):
                generate = [row for row in part if row.task == "generate"]
                edits = [row for row in part if row.task == "edit"]
                found = encoder.generate([row.text if text else None for row in generate]).rows()
                found += encoder.edit(
                    [as_image(images[row.source_image_id]) for row in edits], [row.text if text else None for row in edits]
                ).rows()
                keys = [state_key(row, row.text if text else None) for row in generate + edits]
                self.states.values |= zip(keys, found, strict=True)


class _Memory:
    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def get(self, keys):  # noqa: ANN001, ANN201
        return [self.values[key].float() for key in keys]


def caption_lake(root: Path) -> None:
    """A lake with the dataset t2i@1: twelve scenes and their captions."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"images": [], "dataset_rows": [], "datasets": [{"name": "t2i", "version": 1, "digest": "d", "rows": 12}]}
    for number in range(12):
        scene = scenes.sample_scene(rng)
        Image.fromarray(scenes.render(scene)).save(file := io.BytesIO(), "PNG")
        payload = file.getvalue()
        image_id = hashlib.sha256(payload).hexdigest()
        rows["images"].append({"image_id": image_id, "bytes": payload, "mime": "image/png", "width": 64, "height": 64, "size_bytes": len(payload)})
        rows["dataset_rows"].append({"name": "t2i", "version": 1, "row_id": f"r/{number}", "task": "generate", "image_id": image_id,
                                     "text": scenes.caption(scene, rng), "weight": 1.0, "split": "train"})  # fmt: skip
    with Lake(root) as lake:
        lake.append(rows)
