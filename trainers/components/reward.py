"""Train the small world's reward models from scratch: HPSv3's class for generation, EditReward's class for edits.
The ranking loss is the published one; throw-away heads on every word and image token make it learn in minutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2VLConfig

from dreamlite_data.rewards.loader import released_key
from dreamlite_data.rewards.network import PackedText, RewardNetwork
from dreamlite_data.rewards.preprocess import normalised_from_tensor, patchify
from dreamlite_data.rewards.spec import SPEC_FILE, RewardSpec, released_spec
from dreamlite_data.rewards.text import RewardTokenizer, split_common
from trainers.components import reward_pairs
from trainers.components.classes import IGNORE, label_columns
from trainers.components.initialise import initialise_narrow
from trainers.components.reward_pairs import BACKGROUNDS, COLOURS, DEGRADATIONS, POSITIONS, SHAPES, SIZES, STYLES, Picture, Row
from trainers.components.tokenizer import build_tokenizer
from trainers.loop import optimizer_step
from trainers.optimizer import Muon

Kind = Literal["generate", "edit"]
Log = Callable[[int, dict[str, float]], None]

PATCH_PX, MERGE, TEMPORAL = 12, 2, 2
IMAGE_PX = 72
"""64 px images are enlarged to 72, so that the 3 x 3 merged visual tokens are the world's 3 x 3 cells: an object then
lies on one token. With 16 tokens of 16 px each object is cut into up to four, and shapes stay unlearnt for minutes."""
TOKENS = (IMAGE_PX // PATCH_PX // MERGE) ** 2
HIDDEN, LAYERS, VISION_HIDDEN, VISION_LAYERS = 128, 4, 96, 2
HEAD_WIDTHS = [HIDDEN, 64, 16, 2]
LEARNING_RATE = 3e-3
VISION_SHARE = 0.15
"""Share of the steps that the vision tower learns alone, at a third of the cost; then it rests, and the decoder learns to use it."""
GROUPS = {"generate": 12, "edit": 12}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
"""No system line and no turns: a sequence of some 40 tokens instead of 800."""

SPECS = {
    "generate": {"kind": "hpsv3", "prompts": ["{text_prompt}"], "suffix": "\n<|Reward|>"},
    "edit": {
        "kind": "editreward",
        "prompts": ["{text_prompt}\nfollowed", "{text_prompt}\nkept"],
        "suffix": "\n<|Reward|>",
    },
}
"""Both of the edit model's prompts open with the instruction, so images and instruction run through the decoder once."""

CONTENT = {"colour": 1 + len(COLOURS), "shape": 1 + len(SHAPES), "size": 1 + len(SIZES)}
WORLD = {"background": len(BACKGROUNDS), "style": len(STYLES)}
FAULT = {"fault": 1 + len(DEGRADATIONS)}
BEFORE = {f"{name}_before": count for name, count in (CONTENT | WORLD).items()}
PROBES: dict[str, dict[str, dict[str, int]]] = {
    "generate": {
        "vision": CONTENT | WORLD | FAULT,
        "image": CONTENT | {"cell": 1 + len(POSITIONS)},
        "site": CONTENT | WORLD,
        "reward": {"wrong_cells": 4, "wrong_background": 2, "wrong_style": 2} | FAULT,
    },
    "edit": {
        "vision": CONTENT | WORLD | FAULT,
        "image": CONTENT | {"cell": 1 + len(POSITIONS), "changed": 2} | {f"{name}_before": count for name, count in CONTENT.items()},
        "site": CONTENT | WORLD | BEFORE | {"place": 1 + len(POSITIONS), "target_place": 1 + len(POSITIONS)},
        "reward": {"asked": 3, "rest": 4} | FAULT,
    },
}
"""What the throw-away heads read, and where: visual tokens, image tokens after the decoder, the end of each statement,
the reward token. Values are class counts."""


def reward_config(kind: Kind, tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig | Qwen2_5_VLConfig:
    """Configuration of a small reward model: 9 image tokens, one a cell."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision = {"depth": VISION_LAYERS, "num_heads": 4, "patch_size": PATCH_PX, "spatial_merge_size": MERGE,
              "temporal_patch_size": TEMPORAL}  # fmt: skip
    ids = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
           "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}  # fmt: skip
    if kind == "generate":
        vision |= {"embed_dim": VISION_HIDDEN, "hidden_size": HIDDEN, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    vision |= {"hidden_size": VISION_HIDDEN, "out_hidden_size": HIDDEN, "intermediate_size": 2 * VISION_HIDDEN,
               "window_size": IMAGE_PX, "fullatt_block_indexes": list(range(VISION_LAYERS))}  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def ranking_loss(better: Tensor, worse: Tensor, points: int = 16) -> Tensor:
    """HPSv3's uncertainty loss of pairs [N, 2] of (mu, log sigma): the mean of -logsigmoid(z) for z normal with mean
    mu_b - mu_w and variance sigma_b^2 + sigma_w^2."""
    sigma = (torch.exp(2 * better[:, 1].clamp(-5, 3)) + torch.exp(2 * worse[:, 1].clamp(-5, 3))).sqrt()
    return -normal_mean(F.logsigmoid, better[:, 0] - worse[:, 0], sigma, points).mean()


def normal_mean(function: Callable[[Tensor], Tensor], mean: Tensor, sigma: Tensor, points: int = 16) -> Tensor:
    """E[function(z)] for z normal with these means and deviations, [N]. The original draws 1000 samples; Gauss-Hermite is exact."""
    nodes, weights = np.polynomial.hermite.hermgauss(points)
    z = mean[:, None] + 2**0.5 * sigma[:, None] * torch.tensor(nodes, dtype=mean.dtype)
    return (function(z) * torch.tensor(weights / np.pi**0.5, dtype=z.dtype)).sum(1)


def preferred_pairs(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Indices into the flattened [rows, branches] scores, (better, worse): same group, same head, no more mistakes and
    no more spoilt, and strictly less of one."""
    group = np.repeat([row.group for row in rows], len(rows[0].head))
    fault = np.repeat([row.fault > 0 for row in rows], len(rows[0].head)).astype(int)
    head = np.concatenate([row.head for row in rows])
    wrong = np.concatenate([row.wrong for row in rows])
    same = (group[:, None] == group) & (head[:, None] == head)
    not_worse = (wrong[:, None] <= wrong) & (fault[:, None] <= fault)
    strictly = (wrong[:, None] < wrong) | (fault[:, None] < fault)
    better, worse = np.nonzero(same & not_worse & strictly)
    return torch.from_numpy(better), torch.from_numpy(worse)


class Trainee(nn.Module):
    """A reward network under training with its throw-away heads."""

    def __init__(self, kind: Kind, tokenizer: RewardTokenizer, spec: RewardSpec) -> None:
        super().__init__()
        self.kind, self.tokenizer, self.spec = kind, tokenizer, spec
        self.network = RewardNetwork(reward_config(kind, tokenizer.tokenizer), [HEAD_WIDTHS] * len(spec.heads))
        initialise_narrow(self.network.backbone)
        self.probes = nn.ModuleDict(
            {site: nn.Linear(HIDDEN, sum(classes.values())) for site, classes in PROBES[kind].items()}
        )

    def losses(self, pictures: list[Picture], rows: list[Row]) -> dict[str, Tensor]:
        """Ranking loss and one cross-entropy per probe site of a batch."""
        with torch.no_grad():
            features = self.features(pictures)
        text, sites = self.pack(rows)
        shown = features[torch.tensor([row.pictures for row in rows])].flatten(0, 2)
        hidden = self.network.hidden_states(shown, text)
        rewards = hidden[torch.arange(len(rows))[:, None], text.reward_index]
        scores = self.heads(rewards, rows)
        better, worse = preferred_pairs(rows)
        losses = {"rank": ranking_loss(scores[better], scores[worse])}
        if self.kind == "edit":
            losses["rank"] = losses["rank"] + self.mean_ranking(scores, rows)
        in_image = hidden[text.ids == self.tokenizer.image_id]
        losses["image"] = self.probe("image", in_image, _image_labels(pictures, rows))
        found = [(row, place, labels) for row, place, labels in sites if labels]
        at = hidden[torch.tensor([each[0] for each in found]), torch.tensor([each[1] for each in found])]
        losses["site"] = self.probe("site", at, label_columns([each[2] for each in found], PROBES[self.kind]["site"]))
        verdicts = label_columns([each for row in rows for each in row.verdict], PROBES[self.kind]["reward"])
        losses["reward"] = self.probe("reward", rewards.flatten(0, 1), verdicts)
        return losses

    def vision_loss(self, pictures: list[Picture]) -> dict[str, Tensor]:
        """The vision tower's own loss, at a third of the cost of all."""
        features = self.features(pictures).flatten(0, 1)
        return {"vision": self.probe("vision", features, _vision_labels(pictures))}

    def heads(self, rewards: Tensor, rows: list[Row]) -> Tensor:
        """(mu, log sigma) of every branch, flattened to [rows * branches, 2]."""
        if self.kind == "generate":
            return self.network.heads[0](rewards).flatten(0, 1)
        both = [head(rewards[:, index]) for index, head in enumerate(self.network.heads)]
        return torch.stack(both, 1).flatten(0, 1)

    def mean_ranking(self, scores: Tensor, rows: list[Row]) -> Tensor:
        """Ranking loss of the mean over heads, which is what EditReward is trained on and what its score is."""
        total = [
            Row(row.pictures, row.prompts[:1], [0], [sum(row.wrong)], row.group, row.fault, [], []) for row in rows
        ]
        better, worse = preferred_pairs(total)
        mean = scores.view(len(rows), -1, 2).mean(1)
        return ranking_loss(mean[better], mean[worse])

    def features(self, pictures: list[Picture]) -> Tensor:
        """Visual tokens [pictures, 9, hidden]."""
        pixels = torch.from_numpy(np.stack([each.pixels for each in pictures])).permute(0, 3, 1, 2) / 255
        spec = self.spec
        values = normalised_from_tensor(
            pixels, PATCH_PX * MERGE, spec.min_px, spec.max_px, spec.image_mean, spec.image_std
        )
        patches = patchify(values, PATCH_PX, MERGE, TEMPORAL)
        grid = (IMAGE_PX // PATCH_PX, IMAGE_PX // PATCH_PX)
        return self.network.image_features(list(patches), [grid] * len(pictures)).view(len(pictures), TOKENS, HIDDEN)

    def pack(self, rows: list[Row]) -> tuple[PackedText, list[tuple[int, int, dict[str, int]]]]:
        """Token sequences as scoring builds them, and (row, position, labels) of every statement's end."""
        texts = [self.spec.text(text, head) for row in rows for text, head in zip(row.prompts, row.head, strict=True)]
        coded = self.tokenizer.tokenizer(
            texts, split_special_tokens=True, add_special_tokens=False, return_offsets_mapping=True
        )
        packed, sites, number = [], [], 0
        for index, row in enumerate(rows):
            trunk = self.tokenizer.trunk([TOKENS] * len(row.pictures))
            branches = [[*coded.input_ids[number + each], self.tokenizer.reward_id] for each in range(len(row.prompts))]
            common: list[int] = []
            if self.kind == "edit":
                common, branches = split_common(branches)
            start = len(trunk) + len(common)
            for each, branch in enumerate(branches):
                begins = [begin for begin, _ in coded.offset_mapping[number + each]]
                for end, labels in row.sites[each]:
                    place = next((i for i, begin in enumerate(begins) if begin >= end), len(begins))
                    if place >= len(common):
                        sites.append((index, start + place - len(common), labels))
                    elif each == 0:
                        sites.append((index, len(trunk) + place, labels))
                start += len(branch)
            packed.append((trunk + common, branches))
            number += len(row.prompts)
        return PackedText.pack(packed, self.tokenizer.padding_id), sites

    def probe(self, site: str, states: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy over the site's fields; an object counts four times, for most places are empty."""
        classes = PROBES[self.kind][site]
        logits = dict(zip(classes, self.probes[site](states).split(list(classes.values()), -1), strict=True))
        total = states.new_zeros(())
        for name, values in labels.items():
            weight = torch.where(values == IGNORE, 0.0, torch.where((values > 0) & (name in CONTENT or name in ("cell", "changed")), 4.0, 1.0))
            loss = F.cross_entropy(logits[name], values, ignore_index=IGNORE, reduction="none")
            total = total + (loss * weight).sum() / weight.sum().clamp(min=1)
        return total / len(labels)


def _token_labels(picture: Picture) -> np.ndarray:
    labels = reward_pairs.token_labels(picture.scene)
    return np.full_like(labels, IGNORE) if picture.fault else labels


def _vision_labels(pictures: list[Picture]) -> dict[str, Tensor]:
    """Labels of each visual token: the object on it and the background behind it."""
    table = np.stack([_token_labels(each) for each in pictures])
    labels = {name: torch.from_numpy(table[..., index]).flatten() for index, name in enumerate(CONTENT)}
    for name, values in (("background", BACKGROUNDS), ("style", STYLES)):
        each = [IGNORE if picture.fault else values.index(getattr(picture.scene, name)) for picture in pictures]
        labels[name] = torch.tensor(each).repeat_interleave(table.shape[1])
    labels["fault"] = torch.tensor([picture.fault for picture in pictures]).repeat_interleave(table.shape[1])
    return labels


def _image_labels(pictures: list[Picture], rows: list[Row]) -> dict[str, Tensor]:
    """Labels of each image token in the decoder: its object and cell, and for an edit what the source had there."""
    tables = [_token_labels(each) for each in pictures]
    now = np.stack([tables[index] for row in rows for index in row.pictures])
    names = [*CONTENT, "cell"]
    labels = {name: torch.from_numpy(now[..., index]).flatten() for index, name in enumerate(names)}
    if len(rows[0].pictures) == 2:
        before = np.stack(
            [tables[row.pictures[0]] if number else np.full_like(tables[0], IGNORE) for row in rows for number in (0, 1)]
        )
        labels |= {f"{name}_before": torch.from_numpy(before[..., i]).flatten() for i, name in enumerate(CONTENT)}
        content = slice(len(CONTENT))
        changed = (now[..., content] != before[..., content]).any(-1)
        unknown = (now[..., content] == IGNORE).any(-1) | (before[..., content] == IGNORE).any(-1)
        labels["changed"] = torch.from_numpy(np.where(unknown, IGNORE, changed)).flatten()
    return labels


def prepare(kind: Kind, output: Path) -> Trainee:
    """Write tokenizer and spec to `output` and build the untrained network on them."""
    tokenizer = build_tokenizer()
    spec = RewardSpec.model_validate(released_spec(SPECS[kind]["kind"]) | SPECS[kind] | {"min_px": IMAGE_PX**2, "max_px": IMAGE_PX**2})
    tokenizer.add_tokens([spec.reward_token], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output)
    own = spec.model_dump(mode="json", include={"kind", "prompts", "suffix", "min_px", "max_px"})
    (output / SPEC_FILE).write_text(json.dumps(own, indent=2) + "\n", "utf-8")
    return Trainee(kind, RewardTokenizer(output, spec, len(tokenizer)), spec)


def build_reward(
    kind: Kind,
    output: Path,
    *,
    steps: int,
    seed: int = 0,
    log: Log = lambda step, metrics: None,
) -> dict[str, Any]:
    """Train a reward model from scratch and save it so that `load_reward` reads it.

    Returns how it was trained and the curve of its losses.
    """
    if kind not in SPECS:
        raise ValueError(f"no reward is called {kind!r}: choose one of {sorted(SPECS)}")
    torch.manual_seed(seed)
    trainee = prepare(kind, Path(output)).train()
    curve = train(trainee, steps=steps, seed=seed, log=log)
    save(trainee, Path(output))
    parameters = sum(each.numel() for each in trainee.network.parameters())
    return {"kind": kind, "groups": GROUPS[kind], "learning_rate": LEARNING_RATE, "parameters": parameters, "curve": curve}


def train(trainee: Trainee, *, steps: int, seed: int, log: Log) -> list[dict[str, float]]:
    """Run the schedule; returns the logged losses."""
    draw = reward_pairs.generate_batch if trainee.kind == "generate" else reward_pairs.edit_batch
    optimizer = Muon(trainee, learning_rate=LEARNING_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    parameters = list(trainee.parameters())
    curve: list[dict[str, float]] = []
    running: dict[str, float] = {}
    for step in range(1, steps + 1):
        # Keyed by step, so that the data of a step does not depend on how a run was cut.
        pictures, rows = draw(GROUPS[trainee.kind], np.random.default_rng((seed, step)))
        # Seeing first: the decoder has nothing to bind before the visual tokens name what they show.
        losses = trainee.vision_loss(pictures) if step <= steps * VISION_SHARE else trainee.losses(pictures, rows)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer_step(optimizer, parameters, 1.0, LEARNING_RATE * min(1.0, step / 50) * max(0.01, 1 - step / steps))
        for name, value in losses.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        if step % 100 == 0 or step == steps:
            metrics = {name: round(value, 4) for name, value in running.items()}
            curve.append({"step": step, **metrics})
            log(step, metrics)
    return curve


def save(trainee: Trainee, output: Path) -> None:
    """Weights in the released checkpoint's layout and file name, and config.json."""
    kind = trainee.spec.kind
    state = {released_key(key, kind=kind): value.contiguous() for key, value in trainee.network.state_dict().items()}
    save_file(state, output / ("HPSv3.safetensors" if kind == "hpsv3" else "model.safetensors"))
    trainee.network.config.save_pretrained(output)
