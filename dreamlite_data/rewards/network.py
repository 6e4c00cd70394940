"""The network of a reward model: a Qwen-VL backbone from transformers and one MLP head per prompt.
Scoring, ReFL and the training of small-world rewards all run this forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, Qwen2_5_VLModel, Qwen2VLModel

from dreamlite_data.rewards.four_bit import make_four_bit
from dreamlite_data.rewards.loader import head_widths, key_problems, load_weights, vocabulary_rows
from dreamlite_data.rewards.stored import RewardCheckpointError, StoredTensor, misfits, read_headers, weight_files

BACKBONES = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel}
TRUNK = 0
PADDING = -1
HEAD_DROPOUT = 0.05  # HPSv3's ranknet head; active in training only
HEAD_LAYERS = 3


@dataclasses.dataclass(frozen=True)
class PackedText:
    """A batch of token sequences, each a trunk (images and what all prompts share) followed by branches (one per
    prompt) that see the trunk and themselves, never one another.

    `ids`, `positions`, `branch`: int64 [B, L]; `branch` is 0 on the trunk, 1.. on branches, -1 on padding.
    Positions restart after the trunk for every branch, so a branch scores as if it stood alone.
    `reward_index`: int64 [B, K], where branch k's reward token stands.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    reward_index: Tensor

    @classmethod
    def pack(cls, rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], padding_id: int) -> PackedText:
        """Pack (trunk ids, ids of each branch) rows, padded on the right; every row has the same number of branches."""
        shape = (len(rows), max(len(trunk) + sum(map(len, branches)) for trunk, branches in rows))
        ids, positions, branch = np.full(shape, padding_id), np.zeros(shape, np.int64), np.full(shape, PADDING)
        reward_index = np.zeros((len(rows), len(rows[0][1])), np.int64)
        for row, (trunk, branches) in enumerate(rows):
            stop = 0
            for member, part in enumerate([trunk, *branches]):
                start, stop = stop, stop + len(part)
                first = 0 if member == TRUNK else len(trunk)
                ids[row, start:stop], branch[row, start:stop] = part, member
                positions[row, start:stop] = np.arange(first, first + len(part))
                if member != TRUNK:
                    reward_index[row, member - 1] = stop - 1
        return cls(*map(torch.from_numpy, (ids, positions, branch, reward_index)))

    def to(self, device: torch.device | str) -> PackedText:
        """The same batch on `device`."""
        return PackedText(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def attention_mask(self) -> Tensor | None:
        """Bool [B, 1, L, L], True where a query (dim 2) may see a key. None for a single branch: there plain causal
        attention is the same, because padding stands to the right."""
        if self.reward_index.shape[1] == 1:
            return None
        length = self.ids.shape[1]
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        return (causal & ((key == TRUNK) | (key == query)))[:, None]


def make_head(widths: list[int]) -> nn.Sequential:
    """HPSv3's `ranknet` head (3,687,474 parameters at widths 3584, 1024, 16, 2); the last two are mu and log sigma."""
    hidden, wide, narrow, outputs = widths
    return nn.Sequential(
        nn.Linear(hidden, wide), nn.ReLU(), nn.Dropout(HEAD_DROPOUT),
        nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, outputs),
    )  # fmt: skip


class RewardNetwork(nn.Module):
    """Backbone and heads. `config` is the transformers config with the checkpoint's true vocabulary size."""

    def __init__(self, config: PreTrainedConfig, widths: list[list[int]]) -> None:
        super().__init__()
        if config.model_type not in BACKBONES:
            raise RewardCheckpointError(f"no reward backbone for {config.model_type!r}, only {sorted(BACKBONES)}")
        self.backbone = BACKBONES[config.model_type]._from_config(config, attn_implementation="sdpa")
        self.heads = nn.ModuleList(make_head(each) for each in widths)
        self.four_bit = False

    @property
    def config(self) -> PreTrainedConfig:
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return self.heads[0][0].weight.device

    def image_features(self, patches: list[Tensor], grids: list[tuple[int, int]]) -> Tensor:
        """Visual tokens [sum of tokens, hidden] of images given as patches [rows * columns, D] and (rows, columns)."""
        visual = self.backbone.visual
        grid = torch.tensor([(1, *each) for each in grids], device=self.device)
        pixels = torch.cat(patches).to(self.device, visual.patch_embed.proj.weight.dtype)
        return visual(pixels, grid_thw=grid).pooler_output

    def hidden_states(self, features: Tensor, text: PackedText, positions: Tensor | None = None) -> Tensor:
        """Final hidden states [B, L, hidden]. `features` fill the image tokens in order.

        Positions are 0, 1, 2, ... on all three rotary axes, images included: both reward models were trained without
        the 3-D image grid, and the grid gives other scores. `positions` [3, B, L] replaces them in tests only.
        """
        embedded = self.backbone.get_input_embeddings()(text.ids)
        where = text.ids == self.config.image_token_id
        if int(where.sum()) != features.shape[0]:
            raise ValueError(f"{int(where.sum())} image tokens in the text for {features.shape[0]} visual features")
        embedded = embedded.masked_scatter(where[..., None], features.to(embedded.dtype))
        if positions is None:
            positions = text.positions[None].expand(3, -1, -1)
        return self.backbone.language_model(
            inputs_embeds=embedded, position_ids=positions, attention_mask=text.attention_mask(), use_cache=False
        ).last_hidden_state

    def forward(self, features: Tensor, text: PackedText, positions: Tensor | None = None) -> Tensor:
        """(mu, log sigma) in float32 [B, K, 2]. Branch k is read by head k, or by the only head where there is one."""
        hidden = self.hidden_states(features, text, positions)
        rows = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        with torch.autocast(hidden.device.type, enabled=False):  # the heads are float32 also in a caller's autocast
            rewards = hidden[rows, text.reward_index].float()
            if len(self.heads) == 1:
                return self.heads[0](rewards)
            return torch.stack([head(rewards[:, index]) for index, head in enumerate(self.heads)], dim=1)


def skeleton(model_dir: Path, header: dict[str, StoredTensor]) -> RewardNetwork:
    """The network of a checkpoint directory without weights (on the meta device), every key and shape checked.

    Raises RewardCheckpointError where config.json is missing or does not fit the stored weights, listing every key.
    """
    config = read_config(model_dir)
    widths = head_widths(header)
    if not widths:
        raise RewardCheckpointError(f"{model_dir}: no reward head among the weights (looked for rm_head.* and rm_heads.*)")
    for each in widths:
        if len(each) != HEAD_LAYERS + 1:
            raise RewardCheckpointError(f"{model_dir}: a reward head has {HEAD_LAYERS} linear layers, here one has {len(each) - 1}")
    config.text_config.vocab_size = vocabulary_rows(header, Path(model_dir))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, None)  # unused here, and the base's ids may lie past a shrunk vocabulary
    with torch.device("meta"):
        network = RewardNetwork(config, widths)
    if listed := misfits(key_problems(network, header)):
        raise RewardCheckpointError(
            f"{model_dir}: the weights do not fit config.json ({listed}); "
            "use the config.json of the base model that this checkpoint was trained from"
        )
    return network


def read_config(model_dir: Path) -> PreTrainedConfig:
    """The transformers config of a checkpoint directory; no code from the directory is run."""
    path = Path(model_dir) / "config.json"
    if not path.exists():
        raise RewardCheckpointError(f"{model_dir} has no config.json; copy it from the base model")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardCheckpointError(f"{path} is no config of a known model: {str(error).splitlines()[0]}") from error
    if config.model_type not in BACKBONES:
        raise RewardCheckpointError(f"{path}: no reward backbone for {config.model_type!r}, only {sorted(BACKBONES)}")
    return config


def load_network(model_dir: Path, device: str | torch.device, dtype: torch.dtype, *, four_bit: bool = False) -> RewardNetwork:
    """Build and fill the network of a checkpoint directory; frozen, in eval mode. `four_bit` quantises the decoder.

    Raises RewardCheckpointError where config.json or the weights are missing or do not fit one another.
    """
    files = weight_files(model_dir)
    network = skeleton(model_dir, read_headers(files))
    if four_bit:
        make_four_bit(network, dtype)
    load_weights(network, files, device=device, dtype=dtype)
    # Rotary frequencies are no parameters: computed anew, outside the meta device.
    backbone, config = network.backbone, network.config
    for owner, name, part in (
        (backbone.language_model, "rotary_emb", config.text_config),
        (backbone.visual, "rotary_pos_emb", config.vision_config),
    ):
        setattr(owner, name, type(getattr(owner, name))(part).to(device))
    left = [name for name, value in [*network.named_parameters(), *network.named_buffers()] if value.is_meta]
    if left:
        raise RewardCheckpointError(f"{model_dir}: {', '.join(left)} could not be materialised")
    return network.requires_grad_(False).eval()
