"""Check that a reward checkpoint is whole and scores as its authors' code does, point by point.
Every point is tried; a failed one says what is wrong, and those that need it are skipped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dreamlite_data.rewards.loader import DROPPED_KEY, network_key
from dreamlite_data.rewards.model import RewardModel, load_reward
from dreamlite_data.rewards.network import PackedText, RewardNetwork, read_config, skeleton
from dreamlite_data.rewards.plan import part_of
from dreamlite_data.rewards.preprocess import normalise_pixels, patchify
from dreamlite_data.rewards.rows import FIELDS, reward_input, score_inputs
from dreamlite_data.rewards.spec import PUBLISHED_SHA256, RewardSpec, read_spec
from dreamlite_data.rewards.stored import RewardCheckpointError, StoredTensor, read_headers, weight_files
from dreamlite_data.rewards.text import RewardTokenizer

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"
SUMS_FILE = "SHA256SUMS"

TOLERANCE = 2e-5
"""Largest difference to a golden score in float32: about three times what our float noise was (rewards.md section 6)."""

LEAST_SHIFT = 1e-3
"""A score has to move by more than this with 3-D positions, else the guard could not tell them from 1-D ones. The tiny
fixtures move by 1.1; positions decide over attention in any trained model."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One point: its name, how it went (OK, WARNING, FAILED or SKIPPED) and what was seen."""

    name: str
    state: str
    detail: str


@dataclasses.dataclass
class _Seen:
    """What earlier points found, for later ones."""

    files: list[Path] = dataclasses.field(default_factory=list)
    header: dict[str, StoredTensor] = dataclasses.field(default_factory=dict)
    network: RewardNetwork | None = None
    spec: RewardSpec | None = None
    model: RewardModel | None = None


def verify_checkpoint(
    model_dir: Path, *, golden: Path | None = None, tolerance: float = TOLERANCE, run: bool = True,
    device: str = "cpu", dtype: torch.dtype = torch.float32, four_bit: bool = False,
) -> Iterator[Check]:  # fmt: skip
    """The points of a checkpoint directory, as they are done. `run` also loads the weights and scores; `golden` is a JSON
    list of rows with the scores that the authors' code gave them (`golden_difference`)."""
    seen = _Seen()
    failed: set[str] = set()

    def point(name: str, needs: tuple[str, ...], check: Callable[[], tuple[str, str]]) -> Check:
        missing = [each for each in needs if each in failed]
        if missing:
            failed.add(name)
            return Check(name, SKIPPED, f"needs '{missing[0]}'")
        try:
            done = Check(name, *check())
        except (ValueError, OSError, RuntimeError) as error:  # also out of memory, and a type that the device lacks
            done = Check(name, FAILED, " ".join(str(error).split()))
        if done.state == FAILED:
            failed.add(name)
        return done

    yield point("files", (), lambda: _files(model_dir, seen))
    yield point("layout", ("files",), lambda: _layout(seen))
    yield point("keys and shapes", ("files",), lambda: _keys(model_dir, seen))
    yield point("kind and prompts", (), lambda: _prompts(model_dir, seen))
    yield point("heads", ("keys and shapes", "kind and prompts"), lambda: _heads(seen))
    yield point("vocabulary and template", ("keys and shapes", "kind and prompts"), lambda: _vocabulary(model_dir, seen))
    yield point("sha256", ("files",), lambda: _hashes(model_dir, seen))
    if not run:
        return
    needed = ("keys and shapes", "heads", "vocabulary and template")
    yield point("loads", needed, lambda: _loads(model_dir, seen, device, dtype, four_bit))
    yield point("1-D positions", ("loads",), lambda: _positions(seen))
    if golden is not None:
        yield point("golden scores", ("loads",), lambda: _golden(seen, golden, tolerance))


def _files(model_dir: Path, seen: _Seen) -> tuple[str, str]:
    seen.files = weight_files(model_dir)
    seen.header = read_headers(seen.files)
    size = sum(path.stat().st_size for path in seen.files)
    return OK, f"{', '.join(path.name for path in seen.files)}: {size / 1e9:.3f} GB, {len(seen.header)} tensors"


def _layout(seen: _Seen) -> tuple[str, str]:
    nested = any(key.startswith(("model.language_model.", "model.visual.")) for key in seen.header)
    flat = any(key.startswith(("model.layers.", "visual.")) for key in seen.header)
    if nested == flat:
        return FAILED, "keys of both layouts, flat and nested" if nested else "keys of neither layout, flat (visual.*) or nested (model.visual.*)"
    return OK, "nested (model.visual.*, as EditReward)" if nested else "flat (visual.*, as HPSv3)"


def _keys(model_dir: Path, seen: _Seen) -> tuple[str, str]:
    seen.network = skeleton(model_dir, seen.header)
    dropped = f"; {DROPPED_KEY} is there and never read" if DROPPED_KEY in seen.header else ""
    return OK, f"all {len(seen.network.state_dict())} keys with the shapes that config.json asks for, none besides{dropped}"


def _prompts(model_dir: Path, seen: _Seen) -> tuple[str, str]:
    seen.spec = read_spec(model_dir, read_config(model_dir).model_type)
    found = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in _texts(seen.spec).items()}
    published = PUBLISHED_SHA256[seen.spec.kind]
    other = [name for name in found if found[name] != published.get(name)]
    if not other:
        return OK, f"{seen.spec.kind}; {len(found)} texts are the published ones (sha256)"
    own = f"{', '.join(other)} differ from the published {seen.spec.kind}"
    if (model_dir / "reward_spec.json").exists():
        return WARNING, f"{own}: reward_spec.json sets them; right only for a model that was trained with them"
    return FAILED, f"{own}: this installation is damaged, install the package again"


def _texts(spec: RewardSpec) -> dict[str, str]:
    return {f"prompt {name}": text for name, text in zip(spec.heads, spec.prompts, strict=True)} | {"suffix": spec.suffix}


def _heads(seen: _Seen) -> tuple[str, str]:
    assert seen.network is not None and seen.spec is not None
    if len(seen.network.heads) != len(seen.spec.heads):
        return FAILED, f"{len(seen.network.heads)} heads are stored, {seen.spec.kind} has {len(seen.spec.heads)}"
    stored = {key: each for key, each in seen.header.items() if part_of(key) == "heads"}
    types = sorted({str(each.dtype).removeprefix("torch.") for each in stored.values()})
    parameters = sum(each.elements for each in stored.values())
    detail = f"{len(seen.network.heads)} ({', '.join(seen.spec.heads)}), {parameters:,} parameters in {', '.join(types)}"
    if types != ["float32"]:
        return WARNING, f"{detail}: the authors keep heads in float32, so these were rounded when they were saved"
    return OK, detail


def _vocabulary(model_dir: Path, seen: _Seen) -> tuple[str, str]:
    assert seen.network is not None and seen.spec is not None
    rows = seen.network.backbone.get_input_embeddings().weight.shape[0]
    tokenizer = RewardTokenizer(model_dir, seen.spec, rows)
    opening = tokenizer.tokenizer.decode(tokenizer.opening[0])
    return OK, f"{rows:,} rows, {seen.spec.reward_token} is {tokenizer.reward_id}, image {tokenizer.image_id}; text opens with {opening!r}"


def _hashes(model_dir: Path, seen: _Seen) -> tuple[str, str]:
    sums = model_dir / SUMS_FILE
    if not sums.exists():
        known = ", ".join(f"{path.name} {_sha256(path)[:16]}" for path in seen.files)
        return WARNING, f"no {SUMS_FILE} to compare with (make one with `sha256sum * > {SUMS_FILE}`); {known}"
    wanted: dict[str, str] = {}
    for line in sums.read_text("utf-8").splitlines():
        digest, _, name = line.strip().partition(" ")
        if name:
            wanted[name.lstrip(" *")] = digest
    unlisted = [path.name for path in seen.files if path.name not in wanted]
    if unlisted:
        return FAILED, f"{sums} does not list {', '.join(unlisted)}"
    outside = [name for name in wanted if Path(name).name != name]
    if outside:
        return FAILED, f"{sums}: {outside[0]!r} is no plain file name"
    for name, digest in wanted.items():
        path = model_dir / name
        if not path.exists():
            return FAILED, f"{name} of {SUMS_FILE} is not there; download it again"
        if name != SUMS_FILE and _sha256(path) != digest.lower():
            return FAILED, f"{name} is not the file of {SUMS_FILE}; download it again"
    return OK, f"{len(wanted)} files are those of {SUMS_FILE}"


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _loads(model_dir: Path, seen: _Seen, device: str, dtype: torch.dtype, four_bit: bool) -> tuple[str, str]:
    seen.model = load_reward(model_dir, device, dtype, four_bit=four_bit)
    held = "4 bits" if four_bit else str(dtype).removeprefix("torch.")
    return OK, f"on {device} in {held}; scorer id {seen.model.scorer_id}"


# -- scores


def _positions(seen: _Seen) -> tuple[str, str]:
    assert seen.model is not None
    own, plain, grid = position_scores(seen.model, pattern_image(), "a checkerboard")
    if not np.isfinite([own, plain, grid]).all():
        return FAILED, f"a score is not finite: {own}, {plain}, {grid}"
    if abs(plain - own) > LEAST_SHIFT:
        return FAILED, f"the score {own:.6f} is not that of positions 0..L-1, {plain:.6f}: transformers builds its own"
    if abs(grid - own) <= LEAST_SHIFT:
        return FAILED, f"3-D positions give the score {grid:.6f} too, so positions do not reach the model"
    return OK, f"score {own:.4f} as with positions 0..L-1; the 3-D grid would give {grid:.4f}"


def pattern_image(size_px: int = 448) -> Image.Image:
    """An RGB image that every machine makes alike: two gradients and a checkerboard."""
    ramp = np.linspace(0, 255, size_px).astype(np.uint8)
    across, down = np.broadcast_to(ramp, (size_px, size_px)), np.broadcast_to(ramp[:, None], (size_px, size_px))
    squares = (np.indices((size_px, size_px)) // 32).sum(0) % 2 * 255
    return Image.fromarray(np.stack([across, down, squares.astype(np.uint8)], axis=-1))


def position_scores(model: RewardModel, image: Image.Image, prompt: str) -> tuple[float, float, float]:
    """mu of the first head: as scoring gives it, with explicit positions 0..L-1, and with Qwen-VL's 3-D image grid."""
    pixels = model.packer.pixels(image)
    grid = (pixels.shape[0] // model.patch, pixels.shape[1] // model.patch)
    values = normalise_pixels(pixels, model.spec.image_mean, model.spec.image_std)[None]
    patches, images = patchify(values, model.patch, model.merge, model.temporal)[0], model.spec.images
    trunk = model.tokenizer.trunk([grid[0] * grid[1] // model.merge**2] * images)
    branch = model.tokenizer.branches([prompt])[0][0]
    text = PackedText.pack([(trunk, [branch])], model.tokenizer.padding_id).to(model.network.device)
    counted = torch.arange(len(trunk) + len(branch), device=model.network.device).expand(3, 1, -1)
    with torch.inference_mode():
        features = model.network.image_features([patches] * images, [grid] * images)
        on_grid, _ = model.network.backbone.get_rope_index(
            text.ids.cpu(), (text.ids == model.tokenizer.image_id).int().cpu(), torch.tensor([[1, *grid]] * images)
        )

        def first_head(positions: torch.Tensor | None) -> float:
            hidden = model.network.hidden_states(features, text, positions)[0, text.reward_index[0, 0]]
            return float(model.network.heads[0](hidden.float())[0])

        return first_head(None), first_head(counted), first_head(on_grid.to(model.network.device))


def _golden(seen: _Seen, golden: Path, tolerance: float) -> tuple[str, str]:
    assert seen.model is not None
    worst, where, count = golden_difference(seen.model, golden)
    detail = f"{count} scores, largest difference {worst:.2e} ({where}), allowed {tolerance:.0e}"
    return (OK if worst <= tolerance else FAILED), detail


def golden_difference(model: RewardModel, golden: Path) -> tuple[float, str, int]:
    """(largest difference, where, number of scores compared) between `model` and a golden file.

    The file is a JSON list of rows with the keys of `rewards score` (images relative to the file) and the scores: `mu` and
    `log_sigma`, or `mean` [mu, log sigma], or `heads` with such a pair for each. Raises RewardCheckpointError on another
    form.
    """
    try:
        rows = json.loads(golden.read_text("utf-8"))
        inputs = [reward_input(row, FIELDS[model.kind], golden.parent) for row in rows]
        wanted = [_golden_scores(row, model.head_names) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RewardCheckpointError(f"{golden} is no list of rows with images, words and scores ({type(error).__name__}: {error})") from error
    if not any(wanted):
        raise RewardCheckpointError(f"{golden} holds no score; each row needs mu and log_sigma, or heads")
    worst, where, count = 0.0, "", 0
    for number, (scores, expected) in enumerate(zip(score_inputs(model, inputs), wanted, strict=True), 1):
        if "error" in scores:
            raise RewardCheckpointError(f"{golden}, row {number}: {scores['error']}")
        for name, value in expected.items():
            count += 1
            difference = abs(scores[name] - value)
            if not difference <= worst:  # also where it is no number
                worst, where = difference, f"row {number}, {name}"
    return worst, where or "none", count


def _golden_scores(row: dict[str, Any], heads: tuple[str, ...]) -> dict[str, float]:
    found = {name: float(row[name]) for name in ("mu", "log_sigma") if name in row}
    if "mean" in row:
        found["mu"], found["log_sigma"] = map(float, row["mean"])
    for name, (mu, log_sigma) in zip(heads, row["heads"], strict=True) if "heads" in row else ():
        prefix = f"{name}_" if len(heads) > 1 else ""
        found |= {f"{prefix}mu": float(mu), f"{prefix}log_sigma": float(log_sigma)}
    return found


def key_rows(header: dict[str, StoredTensor]) -> list[dict[str, Any]]:
    """Every stored key with part, shape, type and the name it has in our network, in the order of names."""
    return [
        {
            "key": key, "part": part_of(key), "shape": "x".join(map(str, stored.shape)), "type": str(stored.dtype).removeprefix("torch."),
            "loaded_as": network_key(key) or "dropped",
        }
        for key, stored in sorted(header.items())
    ]  # fmt: skip
