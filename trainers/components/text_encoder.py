"""Train the small world's frozen text encoder, of the Qwen3-VL class, before any diffusion model sees it.
Throw-away heads read the source and the scene that a prompt asks for out of its states; the encoder learns to say both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from dreamlite_data import scenes
from trainers.components.classes import CELLS, FIELDS, GLOBALS, scene_labels
from trainers.components.initialise import initialise_narrow
from trainers.conditioning import (
    EDIT_PROMPT,
    EDIT_TEMPLATE,
    GENERATE_PROMPT,
    GENERATE_TEMPLATE,
    Embeddings,
    PromptEncoder,
    as_image,
    check_drop_lengths,
    hidden_states,
    stack,
)
from trainers.loop import optimizer_step
from trainers.optimizer import Muon
from trainers.pixels import to_tensor
from trainers.processor import SquareImageProcessor

IMAGE_PX, PATCH_PX = 72, 12
"""64 px images are enlarged to 72, so that the 3 x 3 merged visual tokens are the world's 3 x 3 cells (as in the rewards)."""
PEAK_RATE = 2e-3
VISION_STEPS, VISION_ROWS = 400, 48
"""The vision tower learns alone first, in a tenth of the time that all takes; then it rests, and the decoder learns to use it."""
ROWS = {"generate": 8, "edit": 24}
SOURCE_WEIGHT = 0.3
SITE_WEIGHT = 3.0
OBJECT_FIELDS = {"colour": list(scenes.COLOURS), "shape": list(scenes.SHAPES), "size": list(scenes.SIZES), "position": list(scenes.POSITIONS)}
SIDES = ("before", "after")


def text_encoder_config(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int = 128, layers: int = 3, vision_layers: int = 2, vision_hidden: int = 96,
    feed_forward: float = 2.5, deepstack: tuple[int, ...] = (0,),
) -> Qwen3VLConfig:  # fmt: skip
    """Configuration of the small encoder: images of 6 x 6 patches, so 9 merged vision tokens, one a cell. `feed_forward` is in
    units of `hidden`; the states after the vision layers `deepstack` also enter the first decoder layers."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 31) // 32 * 32,
            "hidden_size": hidden,
            "intermediate_size": int(hidden * feed_forward),
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 64,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_hidden * 2,
            "num_heads": vision_hidden // 32,
            "patch_size": PATCH_PX,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": (IMAGE_PX // PATCH_PX) ** 2,
            "deepstack_visual_indexes": list(deepstack),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


class SceneProbe(nn.Module):
    """One query a cell (and one for the background) attends to the kept states; linear heads name what is there."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(CELLS + 1, hidden) * 0.3)
        self.attention = nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(values)) for name, values in (FIELDS | GLOBALS).items()})

    def forward(self, embeddings: Embeddings) -> dict[str, torch.Tensor]:
        """Logits: per field [B, 9, values], per global [B, values]."""
        queries = self.queries.expand(len(embeddings.states), -1, -1)
        read, _ = self.attention(
            queries, embeddings.states, embeddings.states, key_padding_mask=embeddings.mask == 0, need_weights=False
        )
        logits = {name: self.heads[name](read[:, :CELLS]) for name in FIELDS}
        return logits | {name: self.heads[name](read[:, CELLS]) for name in GLOBALS}


class SiteHead(nn.Linear):
    """One linear layer that says, from the state at an instruction's last word, what is asked: the kind of edit, the object that
    it touches as the source shows it (with its place, which only the image tells), and what stands there then."""

    def __init__(self, hidden: int) -> None:
        objects = {name: 1 + len(values) for name, values in OBJECT_FIELDS.items()}
        self.classes = {"kind": len(scenes.EDIT_KINDS)} | {f"{name}_{side}": count for name, count in objects.items() for side in SIDES}
        super().__init__(hidden, sum(self.classes.values()))

    def loss(self, states: torch.Tensor, edits: list[scenes.Edit]) -> torch.Tensor:
        """Mean cross-entropy of states [B, hidden] over the fields; 0 stands for no object."""
        logits = self(states).split(list(self.classes.values()), -1)
        labels = {"kind": [scenes.EDIT_KINDS.index(edit.kind) for edit in edits]}
        for side in SIDES:
            found = [getattr(edit, side) for edit in edits]
            for name, values in OBJECT_FIELDS.items():
                labels[f"{name}_{side}"] = [0 if item is None else 1 + values.index(getattr(item, name)) for item in found]
        losses = [F.cross_entropy(part, torch.tensor(labels[name])) for name, part in zip(self.classes, logits, strict=True)]
        return sum(losses) / len(losses)


class CellHead(nn.Linear):
    """One linear layer that names, from one visual token a cell, what lies there and on which background."""

    def __init__(self, hidden: int) -> None:
        self.classes = {name: len(values) for name, values in (FIELDS | GLOBALS).items()}
        super().__init__(hidden, sum(self.classes.values()))

    def loss(self, tokens: torch.Tensor, batch: list[scenes.Scene]) -> torch.Tensor:
        """Cross-entropy of tokens [B * 9, hidden] against the scenes they were made from."""
        logits = self(tokens.view(len(batch), CELLS, -1)).split(list(self.classes.values()), -1)
        labels = scene_labels(batch)
        shared = {name: labels[name].unsqueeze(1).expand(-1, CELLS) for name in GLOBALS}
        return probe_loss(dict(zip(self.classes, logits, strict=True)), labels | shared)


def build_text_encoder(
    tokenizer: PreTrainedTokenizerFast,
    processor: SquareImageProcessor,
    *,
    steps: int,
    seed: int = 0,
    log: Callable[[int, dict[str, float]], None],
) -> tuple[Qwen3VLForConditionalGeneration, dict[str, float]]:
    """Train the vision tower for `VISION_STEPS`, then `steps` of everything on captions and on instructions with sources; `log` counts both.

    Returns the encoder and the share of held-out prompts whose whole scene the probe reads from the kept states.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(text_encoder_config(tokenizer)).train()
    initialise_narrow(model, leave=model.lm_head)
    hidden = model.config.text_config.hidden_size
    probe, seen, known, site = SceneProbe(hidden), CellHead(hidden), CellHead(hidden), SiteHead(hidden)
    modules = (model, probe, seen, known, site)
    optimizer = Muon(*modules, learning_rate=PEAK_RATE, weight_decay=0.01)
    rng = np.random.default_rng((seed, 3))

    def update(losses: dict[str, torch.Tensor], rate: float) -> None:
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer_step(optimizer, [part for module in modules for part in module.parameters()], 1.0, rate)

    for step in range(VISION_STEPS):
        batch = [scenes.sample_scene(rng) for _ in range(VISION_ROWS)]
        patches, grids = patchify(np.stack([scenes.render(scene) for scene in batch]))
        losses = {"vision": seen.loss(torch.cat(model.model.get_image_features(patches, grids).pooler_output), batch)}
        update(losses, PEAK_RATE * min(1.0, (step + 1) / 50) * (1 - 0.5 * step / VISION_STEPS))
        if (step + 1) % 20 == 0:
            log(step + 1, {name: loss.item() for name, loss in losses.items()})
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_(name.startswith("deepstack"))  # these merge early features into the decoder, which only now learns
    drop, tail = check_drop_lengths(tokenizer), turn_end_tokens(tokenizer)
    for step in range(steps):
        losses = {}
        for task, count in ROWS.items():
            prompts = sample_prompts(task, count, rng, tokenizer)
            inputs = dict(prompts.inputs)
            ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
            states = hidden_states(model, ids, mask, "post_norm", **inputs)
            kept = stack([row[keep.bool()][drop[task] :] for row, keep in zip(states, mask, strict=True)])
            losses[task] = probe_loss(probe(kept), scene_labels(prompts.wanted))
            if prompts.sources:
                losses["source"] = SOURCE_WEIGHT * known.loss(states[ids == model.config.image_token_id], prompts.sources)
                last = states[torch.arange(len(states)), mask.sum(1) - tail - 1]
                losses["site"] = SITE_WEIGHT * site.loss(last, prompts.edits)
        update(losses, PEAK_RATE * min(1.0, (step + 1) / 50) * max(0.01, 1 - step / steps))
        if (step + 1) % 20 == 0 or step + 1 == steps:
            log(VISION_STEPS + step + 1, {name: loss.item() for name, loss in losses.items()})
    encoder = PromptEncoder(model, tokenizer, processor, "post_norm")
    return model, measure_text_encoder(encoder, probe.eval(), seed=seed + 1_000)


def probe_loss(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of cross-entropies; cells that hold an object count four times, for most cells are empty."""
    total = torch.zeros(())
    for name, values in labels.items():
        losses = F.cross_entropy(logits[name].flatten(0, -2), values.flatten(), reduction="none")
        weights = torch.where(values.flatten() > 0, 4.0, 1.0) if name in FIELDS else torch.ones_like(losses)
        total = total + (losses * weights).sum() / weights.sum()
    return total


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenized prompts of one task, the scenes that they ask for (for an edit: the target) and, for edits, the sources and what
    is to be done to them."""

    inputs: dict[str, torch.Tensor]
    wanted: list[scenes.Scene]
    sources: list[scenes.Scene]
    edits: list[scenes.Edit]


def sample_prompts(task: str, count: int, rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """`count` freshly drawn prompts of one task."""
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    if task == "generate":
        users = [GENERATE_PROMPT.format(scenes.caption(scene, rng)) for scene in drawn]
        inputs = tokenizer([GENERATE_TEMPLATE.replace("{}", user) for user in users], padding=True, return_tensors="pt")
        return Prompts({name: inputs[name] for name in ("input_ids", "attention_mask")}, drawn, [], [])
    edits = [scenes.sample_edit(scene, rng) for scene in drawn]
    users = [EDIT_PROMPT.format(scenes.instruction(edit, scene, rng)) for edit, scene in zip(edits, drawn, strict=True)]
    texts = [EDIT_TEMPLATE.replace("{}", user).replace("<|image_pad|>", "<|image_pad|>" * CELLS) for user in users]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    inputs["pixel_values"], inputs["image_grid_thw"] = patchify(np.stack([scenes.render(scene) for scene in drawn]))
    return Prompts(inputs, [scenes.apply_edit(scene, edit) for scene, edit in zip(drawn, edits, strict=True)], drawn, edits)


def turn_end_tokens(tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens that follow a prompt's last word in both templates: the end of the turn and the head of the answer's."""
    return len(tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)


def patchify(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, 64, 64, 3] to the processor's patch rows [N * 36, 3 * 2 * 12 * 12] and grids [N, 3].

    Rows run over 2x2 blocks of patches, as the vision tower merges them; the frame is repeated over time (2). One bicubic
    resizing stands for the processor's two, which give next to the same pixels and cost more than the model.
    """
    pixels = F.interpolate(to_tensor(images), size=(IMAGE_PX, IMAGE_PX), mode="bicubic").clamp(-1, 1)
    count, side = len(images), IMAGE_PX // PATCH_PX
    blocks = pixels.reshape(count, 3, side // 2, 2, PATCH_PX, side // 2, 2, PATCH_PX)
    patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return patches.reshape(count * side * side, -1), torch.tensor([[1, side, side]] * count)


@torch.no_grad()
def measure_text_encoder(encoder: PromptEncoder, probe: SceneProbe, *, seed: int, count: int = 512) -> dict[str, float]:
    """Share of held-out prompts of each task whose scene the probe reads without one mistake."""
    rng = np.random.default_rng((seed, 4))
    metrics = {}
    for task in ("generate", "edit"):
        right = 0
        for _ in range(count // 64):
            drawn = [scenes.sample_scene(rng) for _ in range(64)]
            if task == "generate":
                kept, wanted = encoder.generate([scenes.caption(scene, rng) for scene in drawn]), drawn
            else:
                edits = [scenes.sample_edit(scene, rng) for scene in drawn]
                texts = [scenes.instruction(edit, scene, rng) for edit, scene in zip(edits, drawn, strict=True)]
                kept = encoder.edit([as_image(scenes.render(scene)) for scene in drawn], list(texts))
                wanted = [scenes.apply_edit(scene, edit) for scene, edit in zip(drawn, edits, strict=True)]
            logits, labels = probe(kept), scene_labels(wanted)
            exact = torch.ones(64, dtype=torch.bool)
            for name, values in labels.items():
                exact &= (logits[name].argmax(-1) == values).reshape(64, -1).all(-1)
            right += int(exact.sum())
        metrics[f"{task}_scene_exact"] = right / (count // 64 * 64)
    return metrics
