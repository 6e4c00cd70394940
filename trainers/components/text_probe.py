"""What one linear layer reads from the frozen text encoder's states: colour, shape, size and place of an object, kind of edit.
The diffusion model attends to these states; what a line cannot read there it would have to learn itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dreamlite_data import scenes
from dreamlite_data.scenes.language import object_phrase
from trainers.components.classes import IGNORE, label_columns
from trainers.components.reward_pairs import draw_scene
from trainers.components.text_encoder import OBJECT_FIELDS, turn_end_tokens
from trainers.conditioning import PromptEncoder, as_image

BATCH = 64


def linear_probe(encoder: PromptEncoder, *, seed: int, train_rows: int = 3_072, measured_rows: int = 1_024) -> dict[str, float]:
    """Share of held-out labels that a multinomial logistic regression names, by task and field.

    `generate`: at the end of the phrase about an object, its four attributes. `edit`: at the last word of an instruction, its
    kind and the attributes of the object that it touches, as the source shows them (as it asks for, where it adds one).
    """
    metrics = {}
    for task, states_of in (("generate", _caption_states), ("edit", _instruction_states)):
        learned, held = (
            states_of(encoder, rows, np.random.default_rng((seed, index)), measured)
            for index, (rows, measured) in enumerate(((train_rows, False), (measured_rows, True)))
        )
        for field, labels in learned[1].items():
            probe = _fit(learned[0], labels)
            answers, wanted = probe(held[0]).argmax(-1), held[1][field]
            known = wanted != IGNORE
            metrics[f"{task}_{field}"] = round(float((answers == wanted)[known].float().mean()), 4)
    return metrics


Labelled = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _caption_states(encoder: PromptEncoder, rows: int, rng: np.random.Generator, measured: bool) -> Labelled:
    states, labels = [], []
    for _ in range(rows // BATCH):
        drawn = [draw_scene(rng, measured=measured) for _ in range(BATCH)]
        texts = [scenes.caption(scene, rng) for scene in drawn]
        kept = encoder.generate(texts)
        for row, (scene, text) in enumerate(zip(drawn, texts, strict=True)):
            item = scene.objects[int(rng.integers(len(scene.objects)))]
            words = encoder.tokenizer(f"[Generate]: {text}", return_offsets_mapping=True)
            end = text.index(object_phrase(item)) + len(object_phrase(item)) + len("[Generate]: ")
            place = next(index for index, (_, stop) in enumerate(words["offset_mapping"]) if stop >= end)
            states.append(kept.states[row, place])
            labels.append({name: values.index(getattr(item, name)) for name, values in OBJECT_FIELDS.items()})
    return torch.stack(states), label_columns(labels, list(OBJECT_FIELDS))


def _instruction_states(encoder: PromptEncoder, rows: int, rng: np.random.Generator, measured: bool) -> Labelled:
    states, labels = [], []
    tail = turn_end_tokens(encoder.tokenizer)
    for _ in range(rows // BATCH):
        drawn = [draw_scene(rng, measured=measured) for _ in range(BATCH)]
        edits = [scenes.sample_edit(scene, rng) for scene in drawn]
        texts = [scenes.instruction(edit, scene, rng) for edit, scene in zip(edits, drawn, strict=True)]
        kept = encoder.edit([as_image(scenes.render(scene)) for scene in drawn], list(texts))
        for row, edit in enumerate(edits):
            states.append(kept.states[row, int(kept.mask[row].sum()) - tail - 1])
            item = edit.before or edit.after
            found = {} if item is None else {name: values.index(getattr(item, name)) for name, values in OBJECT_FIELDS.items()}
            labels.append({"kind": scenes.EDIT_KINDS.index(edit.kind)} | found)
    return torch.stack(states), label_columns(labels, ["kind", *OBJECT_FIELDS])


def _fit(states: torch.Tensor, labels: torch.Tensor) -> nn.Linear:
    """Logistic regression with a light ridge, to convergence."""
    states, labels = states[labels != IGNORE], labels[labels != IGNORE]
    probe = nn.Linear(states.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(states), labels) + 1e-5 * (probe.weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe.requires_grad_(False)
