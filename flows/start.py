"""The first step of a run that starts from a given checkpoint: bring it in, known by its content and not by its place.
Whatever is trained after it has an edge to where it came from."""

from __future__ import annotations

import re
from pathlib import Path

from flows.key import digest, folder_digest, spec_of
from flows.step import Edge, Step, StepContext, StepResult, step_id
from trainers.settings import StartSettings

START = "start"
HUB_TIMEOUT_S = 10.0


def start_step(settings: StartSettings) -> Step:
    """Check the checkpoint, state its facts and link its weights."""

    def run(ctx: StepContext) -> StepResult:
        from trainers.model import PARTS
        from trainers.start import import_checkpoint

        checkpoint, own_id = ctx.directory / "checkpoint", step_id(START, ctx.key)
        facts = import_checkpoint(settings, checkpoint)
        parts = {part: folder_digest(checkpoint / part) for part in PARTS}
        weights = facts.pop("weights")
        content = digest([parts, folder_digest(checkpoint / "unet"), facts, weights["licence"], weights["derived_from_release"]])
        # Named one by one because the folders are links: a checkpoint that was moved away must be missed.
        linked = {part: next((checkpoint / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")}
        return StepResult(
            outputs={"checkpoint": checkpoint, "checkpoint_id": own_id, **linked},
            digests={"checkpoint": content, "parts": digest(parts)},
            lineage=[Edge("checkpoint", own_id, "step", own_id, "made_by"), Edge("checkpoint", own_id, "weights", weights["origin"], "imported_from")],
            rows={"checkpoints": [{"checkpoint_id": own_id, "stage": START, "path": str(checkpoint), "step": 0, "digest": content}]},
        )  # fmt: skip

    return Step(
        START,
        run,
        ("trainers.start",),
        spec=spec_of(settings, ("checkpoint",)),
        external=lambda: {"checkpoint": checkpoint_digest(settings.checkpoint)},
        about=f"Bring in the checkpoint {settings.checkpoint} to start from.",
    )


def checkpoint_digest(model: str) -> str:
    """What tells a checkpoint from another: the content of its folder, or the commit of a hub model (the revision as it is written
    where the hub does not answer)."""

    if Path(model).is_dir():
        return folder_digest(Path(model))
    name, _, revision = model.partition("@")
    if not revision or re.fullmatch(r"[0-9a-f]{40}", revision):
        return model
    import huggingface_hub

    try:
        return f"{name}@{huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S).sha or revision}"
    except Exception:  # no network, no such model: bringing it in will say which
        return model


def join_parts(checkpoint: Path, parts: Path, target: Path) -> Path:
    """A components folder with the model's parts of a checkpoint and the rewards of a parts folder, all of them links."""
    from trainers.model import PARTS

    target.mkdir(parents=True, exist_ok=True)
    for name, folder in [*((part, checkpoint / part) for part in PARTS), ("rewards", parts / "rewards")]:
        (target / name).unlink(missing_ok=True)
        (target / name).symlink_to(folder.resolve(), target_is_directory=True)
    return target
