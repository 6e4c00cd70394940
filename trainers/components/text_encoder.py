"""Train the small world's frozen text encoder, of the Qwen3-VL class, before any diffusion model sees it.
A throw-away probe reads the scene that a prompt asks for out of the kept hidden states; the encoder learns to say it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from dreamlite_data import scenes
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
from trainers.pixels import to_tensor
from trainers.processor import SquareImageProcessor

FIELDS = {
    "colour": ["none", *scenes.COLOURS],
    "shape": ["none", *scenes.SHAPES],
    "size": ["none", *scenes.SIZES],
}
GLOBALS = {"background": list(scenes.BACKGROUNDS), "style": list(scenes.STYLES)}
CELLS = len(scenes.POSITIONS)
PATCH_PX = 8
PEAK_RATE = 2e-3


def text_encoder_config(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int = 128, layers: int = 3, vision_layers: int = 2, vision_hidden: int = 96
) -> Qwen3VLConfig:
    """Configuration of the small encoder: 64 px images in 8 px patches, so 16 merged vision tokens."""
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": (len(tokenizer) + 31) // 32 * 32,
            "hidden_size": hidden,
            "intermediate_size": hidden * 5 // 2,
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
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
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


def scene_labels(batch: list[scenes.Scene]) -> dict[str, torch.Tensor]:
    """Class indices of each cell and of the background, shaped like the probe's logits without the last axis."""
    labels = {name: torch.zeros(len(batch), CELLS, dtype=torch.long) for name in FIELDS}
    labels |= {name: torch.zeros(len(batch), dtype=torch.long) for name in GLOBALS}
    for row, scene in enumerate(batch):
        for item in scene.objects:
            for name, values in FIELDS.items():
                labels[name][row, scenes.POSITIONS.index(item.position)] = values.index(getattr(item, name))
        for name, values in GLOBALS.items():
            labels[name][row] = values.index(getattr(scene, name))
    return labels


def build_text_encoder(
    tokenizer: PreTrainedTokenizerFast,
    processor: SquareImageProcessor,
    *,
    phases: tuple[tuple[int, int, int], ...],
    seed: int = 0,
    start: Qwen3VLForConditionalGeneration | None = None,
    log: Callable[[int, dict[str, float]], None],
) -> tuple[Qwen3VLForConditionalGeneration, dict[str, float]]:
    """Train on captions and on instructions with their source image.

    `phases` are (steps, generate rows, edit rows) each with a learning-rate cycle and a fresh probe of its own: captions
    are learned in a few hundred steps, reading a source takes the rest. Returns the encoder and the share of held-out
    prompts whose whole scene the last probe reads from the kept states.
    """
    torch.manual_seed(seed)
    model = (start or Qwen3VLForConditionalGeneration(text_encoder_config(tokenizer))).train()
    for number, (steps, *counts) in enumerate(phases):
        probe = _train_phase(model, tokenizer, steps, dict(zip(("generate", "edit"), counts, strict=True)), (seed, 3, number), log)
    encoder = PromptEncoder(model, tokenizer, processor, "post_norm")
    return model, measure_text_encoder(encoder, probe.eval(), seed=seed + 1_000)


def _train_phase(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    counts: dict[str, int],
    key: tuple[int, ...],
    log: Callable[[int, dict[str, float]], None],
) -> SceneProbe:
    probe = SceneProbe(model.config.text_config.hidden_size)
    drop = check_drop_lengths(tokenizer)
    parameters = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.08)
    rng = np.random.default_rng(key)
    for step in range(steps):
        losses = {}
        for task, count in counts.items():
            inputs, wanted = sample_prompts(task, count, rng, tokenizer)
            states = hidden_states(model, inputs.pop("input_ids"), mask := inputs.pop("attention_mask"), "post_norm", **inputs)
            kept = stack([row[keep.bool()][drop[task] :] for row, keep in zip(states, mask, strict=True)])
            losses[task] = probe_loss(probe(kept), scene_labels(wanted))
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(step + 1, {name: loss.item() for name, loss in losses.items()})
    return probe


def probe_loss(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of cross-entropies; cells that hold an object count four times, for most cells are empty."""
    total = torch.zeros(())
    for name, values in labels.items():
        losses = F.cross_entropy(logits[name].flatten(0, -2), values.flatten(), reduction="none")
        weights = torch.where(values.flatten() > 0, 4.0, 1.0) if name in FIELDS else torch.ones_like(losses)
        total = total + (losses * weights).sum() / weights.sum()
    return total


def sample_prompts(
    task: str,
    count: int,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[dict[str, torch.Tensor], list[scenes.Scene]]:
    """Tokenized prompts of one task and the scenes that they ask for (for an edit: the target)."""
    drawn = [scenes.sample_scene(rng) for _ in range(count)]
    if task == "generate":
        users = [GENERATE_PROMPT.format(scenes.caption(scene, rng)) for scene in drawn]
        inputs = tokenizer([GENERATE_TEMPLATE.replace("{}", user) for user in users], padding=True, return_tensors="pt")
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}, drawn
    edits = [scenes.sample_edit(scene, rng) for scene in drawn]
    users = [EDIT_PROMPT.format(scenes.instruction(edit, scene, rng)) for edit, scene in zip(edits, drawn, strict=True)]
    # The processor's own resizing is left out here: at 64 px it changes next to nothing and costs more than the model.
    image_tokens = "<|image_pad|>" * ((scenes.CANVAS_PX // PATCH_PX // 2) ** 2)
    texts = [EDIT_TEMPLATE.replace("{}", user).replace("<|image_pad|>", image_tokens) for user in users]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    ids = inputs["input_ids"]
    inputs = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    inputs["mm_token_type_ids"] = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    inputs["pixel_values"], inputs["image_grid_thw"] = patchify(np.stack([scenes.render(scene) for scene in drawn]))
    return inputs, [scenes.apply_edit(scene, edit) for scene, edit in zip(drawn, edits, strict=True)]


def patchify(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, H, W, 3] to the processor's patch rows [N * H/8 * W/8, 3 * 2 * 8 * 8] and grids [N, 3], unresized.

    Rows run over 2x2 blocks of patches, as the vision tower merges them; the frame is repeated over time (2).
    """
    count, height, width, _ = images.shape
    rows, columns = height // PATCH_PX, width // PATCH_PX
    blocks = to_tensor(images).reshape(count, 3, rows // 2, 2, PATCH_PX, columns // 2, 2, PATCH_PX)
    patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return patches.reshape(count * rows * columns, -1), torch.tensor([[1, rows, columns]] * count)


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
