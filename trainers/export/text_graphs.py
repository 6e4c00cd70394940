"""Qwen3-VL as two static ONNX graphs: text only (generate mode) and image + text (edit mode).
The stock vision path cannot be traced (its grid is data); a bundle has one image size, so the grid becomes a constant."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import rotate_half
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids


def _language_tower(encoder: Qwen3VLForConditionalGeneration, hidden_state: str) -> nn.Module:
    """A copy of the text tower whose output is the state the UNet was trained on (post_norm or pre_norm)."""
    tower = copy.deepcopy(encoder.model.language_model).eval().float()
    if hidden_state == "pre_norm":
        # Released v1.0 weights read the last layer before the final RMSNorm; without the norm that is the output.
        tower.norm = nn.Identity()
    return tower


class TextEncoderGraph(nn.Module):
    """input_ids (B, T) int64 and attention_mask (B, T) int64, right padded -> hidden states (B, T, C)."""

    def __init__(self, encoder: Qwen3VLForConditionalGeneration, hidden_state: str) -> None:
        super().__init__()
        self.tower = _language_tower(encoder, hidden_state)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.tower(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class EditLayout:
    """Where the image stands in the edit prompt; fixed, since template and image size are fixed.

    image_start: index of the first image token; image_tokens: how many; grid: (1, rows, columns) of patches.
    """

    image_start: int
    image_tokens: int
    grid: tuple[int, int, int]


class EditEncoderGraph(nn.Module):
    """Hidden states of the edit prompt with its source image.

    pixels (B, 3, H, W) RGB in [0, 1] already at the grid's size; input_ids, attention_mask (B, T) int64, right padded,
    the image tokens at EditLayout's place. Returns (B, T, C). Equal to Qwen3VLModel on the same inputs (tested).
    """

    def __init__(
        self,
        encoder: Qwen3VLForConditionalGeneration,
        hidden_state: str,
        layout: EditLayout,
        token_ids: Tensor,
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        """token_ids (1, T): any prompt in the layout, from which the constant rotary positions are read."""
        super().__init__()
        self.layout = layout
        self.tower = _language_tower(encoder, hidden_state)
        self.visual = copy.deepcopy(encoder.model.visual).eval().float()
        vision = encoder.config.vision_config
        self.patch, self.merge, self.temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        grid = torch.tensor([layout.grid])
        with torch.no_grad():
            index, weight = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=self.visual.num_grid_per_side,
                mode=self.visual.interpolation_mode,
                align_corners=self.visual.interpolation_align_corners,
                spatial_merge_size=self.merge,
                kwargs={},
            )
            place = (self.visual.pos_embed(index) * weight[:, :, None]).sum(1)
            cos, sin = self.visual.rotary_pos_emb(place, get_vision_position_ids(grid, self.merge, kwargs={}))
            kinds = (token_ids == encoder.config.image_token_id).int()
            positions, _ = encoder.model.get_rope_index(token_ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        self.register_buffer("place", place)
        self.register_buffer("cos", cos.unsqueeze(-2).float())
        self.register_buffer("sin", sin.unsqueeze(-2).float())
        self.register_buffer("positions", positions)  # (3, 1, T): time, height, width
        self.register_buffer("mean", torch.tensor(image_mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(image_std).view(1, 3, 1, 1))
        # The stock deepstack step indexes with a boolean mask (a shape that is data); here the place is known.
        self.tower._deepstack_process = lambda states, _mask, visual: self._at_image(states, visual, add=True)

    def _at_image(self, states: Tensor, visual: Tensor, *, add: bool) -> Tensor:
        """Add `visual` (B, N, C) to, or put it in place of, the image tokens of `states` (B, T, C)."""
        start, stop = self.layout.image_start, self.layout.image_start + self.layout.image_tokens
        middle = states[:, start:stop] + visual if add else visual
        return torch.cat([states[:, :start], middle, states[:, stop:]], dim=1)

    def _patches(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, patches, 3 * temporal * patch * patch) in the processor's merge order."""
        _, rows, columns = self.layout.grid
        patch, merge = self.patch, self.merge
        image = (pixels - self.mean) / self.std
        image = image.reshape(-1, 3, rows // merge, merge, patch, columns // merge, merge, patch)
        image = image.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, rows/m, columns/m, m, m, 3, patch, patch
        image = image.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, self.temporal, -1, -1)
        return image.reshape(-1, rows * columns, 3 * self.temporal * patch * patch)

    def _see(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Vision tower on the constant grid: image embeddings (B, N, C) and the deepstack features."""
        visual, count = self.visual, self.layout.grid[1] * self.layout.grid[2]
        weight = visual.patch_embed.proj.weight.flatten(1)
        states = torch.nn.functional.linear(self._patches(pixels), weight, visual.patch_embed.proj.bias) + self.place
        features = []
        for index, block in enumerate(visual.blocks):
            attention = block.attn
            heads, width = attention.num_heads, attention.head_dim
            qkv = attention.qkv(block.norm1(states)).reshape(-1, count, 3, heads, width)
            query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
            query = query * self.cos + rotate_half(query) * self.sin
            key = key * self.cos + rotate_half(key) * self.sin
            scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1)) * attention.scaling
            mixed = torch.matmul(scores.softmax(dim=-1), value.transpose(1, 2)).transpose(1, 2)
            states = states + attention.proj(mixed.reshape(-1, count, heads * width))
            states = states + block.mlp(block.norm2(states))
            if index in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
                features.append(self._merge(merger, states))
        return self._merge(visual.merger, states), features

    def _merge(self, merger: nn.Module, states: Tensor) -> Tensor:
        """The patch merger with a batch axis: (B, patches, C) -> (B, N, out)."""
        wide = merger.hidden_size
        count = self.layout.image_tokens
        if merger.use_postshuffle_norm:
            states = merger.norm(states.reshape(-1, count, wide))
        else:
            states = merger.norm(states).reshape(-1, count, wide)
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(states)))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        visual, features = self._see(pixels)
        embeddings = self._at_image(self.tower.embed_tokens(input_ids), visual, add=False)
        return self.tower(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=self.positions.expand(-1, embeddings.shape[0], -1),
            deepstack_visual_embeds=features,
            use_cache=False,
        ).last_hidden_state
