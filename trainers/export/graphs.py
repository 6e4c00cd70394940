"""Turns the parts of a checkpoint into ONNX graphs with flat inputs, a free batch axis and no traces of this machine.
Never touches the training model: each wrapper works on a deep copy, and every rewrite is exact (parity is tested)."""

from __future__ import annotations

import ast
import copy
import logging
import warnings
from pathlib import Path

import onnx
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

OPSET = 18
MAX_BATCH = 63
"""diffusers' upsampler takes another path from batch 64 on, so the exported batch axis stays below it."""

UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "encoder_attention_mask", "time_ids")


class FoldedAttention:
    """Attention processor with query heads folded into the query length.

    With one key/value head, (B, N, H*D) seen as (B, N*H, D) needs only 3-D products, no repeat of keys and values
    and no transposes: the same numbers as DreamLiteAttnProcessor2_0 in a graph that phone compilers accept.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, C), encoder_hidden_states (B, M, C') or None, attention_mask an additive (B, 1, M)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        length = hidden_states.shape[1]
        query = attn.to_q(hidden_states)
        inner = query.shape[-1]
        width = inner // attn.heads
        query = query.view(-1, length, attn.heads, width)
        key = attn.to_k(context).view(-1, context.shape[1], 1, width)
        value = attn.to_v(context)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        query = query.reshape(-1, length * attn.heads, width)
        scores = torch.bmm(query, key.squeeze(2).transpose(1, 2)) * width**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask
        mixed = torch.bmm(scores.softmax(dim=-1), value).view(-1, length, inner)
        mixed = attn.to_out[0](mixed)
        if attn.residual_connection:
            mixed = mixed + hidden_states
        return mixed / attn.rescale_output_factor


class UNetGraph(nn.Module):
    """Velocity of the in-context UNet from five flat tensors.

    sample (B, 4, h, 2w) is [noisy target | condition] side by side; timestep (B,) = 1000 * sigma;
    encoder_hidden_states (B, S, C); encoder_attention_mask (B, S) int64, 1 keeps; time_ids (B, 2) = (width, height)
    of one panel in px. Returns (B, 4, h, 2w): only the left half is the velocity.
    """

    def __init__(self, unet: DreamLiteUNetModel) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).eval().float()
        for name, module in self.unet.named_modules():
            if isinstance(module, Attention):
                width = module.to_q.out_features // module.heads
                if module.to_k.out_features != width:
                    raise ValueError(
                        f"unet {name} has {module.to_k.out_features // width} key/value heads; "
                        "export folds multi-query attention and needs a UNet trained with num_kv_heads=1."
                    )
                module.set_processor(FoldedAttention())

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs={"time_ids": time_ids},
            return_dict=False,
        )[0]


class VaeEncoderGraph(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] to the latent (B, 4, H/8, W/8) that the UNet sees."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.vae = copy.deepcopy(vae).eval().float()

    def forward(self, image: Tensor) -> Tensor:
        # The stock pipelines feed encoder output as it is (scaling 1, shift 0 for TAESDXL) and so do we.
        return self.vae.encoder(image)


class VaeDecoderGraph(nn.Module):
    """Latent (B, 4, h, w) to an image (B, 3, 8h, 8w), about in [-1, 1]; the runner clamps."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.vae = copy.deepcopy(vae).eval().float()

    def forward(self, latent: Tensor) -> Tensor:
        shift = getattr(self.vae.config, "shift_factor", 0.0) or 0.0
        return self.vae.decoder(latent / self.vae.config.scaling_factor + shift)


def write_graph(module: nn.Module, inputs: dict[str, Tensor], output: str, path: Path) -> None:
    """Export `module` to ONNX at `path` with the batch axis (0) of every input free up to MAX_BATCH.

    The file holds no stack traces, source paths or exporter notes. Raises ValueError naming the part on failure.
    """
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = {name: {0: batch} for name in inputs}
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module.eval(), (), kwargs=inputs, dynamic_shapes=shapes, strict=False)
            result = torch.onnx.export(
                program,
                (),
                kwargs=inputs,
                dynamo=True,
                input_names=list(inputs),
                output_names=[output],
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    model = result.model_proto
    _name_nodes_by_layer(model)
    for item in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in item.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = "batch"
    save_clean(model, path)


def _name_nodes_by_layer(model: onnx.ModelProto) -> None:
    """Name each node after the layer it came from ('down_blocks.0.resnets.0.conv1.pointwise/Conv'), once each.

    The exporter keeps the layer in metadata that we drop; the names stay readable for quantization and for people.
    """
    seen: dict[str, int] = {}
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "[]")
        layers = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
        name = f"{layers[-1] if layers else 'graph'}/{node.op_type}"
        seen[name] = seen.get(name, 0) + 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def save_clean(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` without doc strings and metadata, which hold absolute source paths and a third of a small file."""
    model.ClearField("metadata_props")
    model.doc_string = ""
    model.graph.ClearField("metadata_props")
    model.graph.doc_string = ""
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        item.ClearField("metadata_props")
    for tensor in model.graph.initializer:
        tensor.doc_string = ""
        tensor.ClearField("metadata_props")
    for function in model.functions:
        function.doc_string = ""
        function.ClearField("metadata_props")
        for node in function.node:
            node.doc_string = ""
            node.ClearField("metadata_props")
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
