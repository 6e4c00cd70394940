"""What scoring costs over the network itself: the whole operator against a bare loop of forward passes over the same batches.
CPU seconds of one thread, both sides in turn in one run, so that a busy machine slows both."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import trainers
from dreamlite_data import scenes
from dreamlite_data.operators.score import Score, scorer
from dreamlite_data.rewards import RewardModel, load_reward
from dreamlite_data.rewards.network import PackedText
from dreamlite_data.rewards.packing import PackedRows
from dreamlite_data.rewards.preprocess import normalise_pixels, patchify
from tests.dreamlite_data.rewards.conftest import FIXTURES
from tests.dreamlite_data.rewards.test_plan import widened

pytestmark = pytest.mark.benchmark

REWARDS = Path(trainers.__file__).parent / "components" / "small_world" / "rewards"
ROWS, TURNS = 128, 3


def table(task: str) -> pa.Table:
    """Rendered scenes with their captions, as they lie in a lake."""
    rng = np.random.default_rng(0)
    drawn = [scenes.sample_scene(rng) for _ in range(ROWS)]
    payloads = []
    for scene in drawn:
        buffer = io.BytesIO()
        Image.fromarray(scenes.render(scene)).save(buffer, "PNG")
        payloads.append(buffer.getvalue())
    columns = {
        "subject_id": [f"{number:04}" for number in range(ROWS)],
        "text": [scenes.caption(scene) for scene in drawn],
        "image_bytes": payloads,
    }
    return pa.table(columns | ({"source_bytes": payloads[1:] + payloads[:1]} if task == "edit" else {}))


def inputs(model: RewardModel, packed: PackedRows, batch: np.ndarray) -> tuple[list[torch.Tensor], list[tuple[int, int]], PackedText]:
    """What the network takes, ready: patches, grids, text."""
    images = packed.images_of(batch)
    values = [normalise_pixels(pixels, model.spec.image_mean, model.spec.image_std)[None] for pixels in images]
    patches = [patchify(each, model.patch, model.merge, model.temporal)[0] for each in values]
    grids = [(pixels.shape[0] // model.patch, pixels.shape[1] // model.patch) for pixels in images]
    return patches, grids, PackedText.pack(packed.texts_of(batch), model.tokenizer.padding_id)


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def overhead(task: str, folder: Path, rows: pa.Table) -> float:
    """CPU seconds of the operator over those of the network alone, the best of some turns each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        operator = Score(task, folder, "w")
        model: RewardModel = scorer("reward", str(folder), "float32", False)
        packed = operator.prepare(rows)["packed"]
        batches = packed.batches(operator.settings.batch_tokens)
        ready = [inputs(model, packed, batch) for batch in batches]
        found: dict[int, np.ndarray] = {}

        def bare() -> None:
            with torch.inference_mode():
                for number, (patches, grids, text) in enumerate(ready):
                    found[number] = model.network(model.network.image_features(patches, grids), text).numpy()

        answer = operator(rows)  # warms both
        bare()
        np.testing.assert_array_equal(
            np.concatenate([found[number].mean(1)[:, 0] for number in range(len(batches))]),
            answer["mu"].to_numpy()[np.concatenate(batches)],
        )
        times = [(cpu_s(lambda: operator(rows)), cpu_s(bare)) for _ in range(TURNS)]
        return min(whole for whole, _ in times) / min(loop for _, loop in times)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_operator_over_a_bare_forward_loop(bench, task: str, tmp_path: Path) -> None:
    """Pictures and prompts of the released length; layers a sixteenth as wide as those of the 7 B models, and two of them instead
    of 28, so that their share is far smaller than it will be."""
    name = {"generate": "hpsv3", "edit": "editreward"}[task]
    wide = widened(load_reward(FIXTURES / f"{name}_tiny"), tmp_path)
    payloads = [(FIXTURES / f"image{number}.png").read_bytes() for number in range(4)]
    columns = {
        "subject_id": [f"{number:04}" for number in range(4)],
        "text": [f"picture {number} of a red circle left of a blue square" for number in range(4)],
        "image_bytes": payloads,
    }
    rows = pa.table(columns | ({"source_bytes": payloads[1:] + payloads[:1]} if task == "edit" else {}))
    bench(f"score_operator_to_forward_loop_{name}", overhead(task, wide.model_dir, rows), 1.1)


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_operator_over_the_small_world_reward(bench, task: str) -> None:
    """A network of a million parameters takes 4 ms a row, so that decoding and tokenizing show."""
    bench(f"score_operator_to_forward_loop_small_world_{task}", overhead(task, REWARDS / task, table(task)), 1.25)
