"""The parts of a checkpoint as torch modules that a phone can have: flat inputs, static shapes, folded attention.
Every target (ONNX, Core ML, ExecuTorch) starts here; each module is a copy, the checkpoint's own is never touched."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel
from torch import Tensor, nn

from trainers.export.parity import TorchReference
from trainers.export.rewrites import average_norms, fold_attention, split_gates
from trainers.export.settings import ExportSettings
from trainers.export.source import Source
from trainers.export.text_graphs import EditEncoderGraph, EditLayout, TextEncoderGraph

ENCODERS = ("edit_encoder", "text_encoder")
GRAPHS = ("unet", *ENCODERS, "vae_decoder", "vae_encoder")
"""The parts of a bundle, from the slowest to trace to the fastest."""

UNET_INPUTS = ("sample", "timestep", "encoder_hidden_states", "encoder_attention_mask", "time_ids")


class UNetGraph(nn.Module):
    """Velocity of the in-context UNet from five flat tensors.

    sample (B, 4, h, 2w) is [noisy target | condition] side by side; timestep (B,) = 1000 * sigma;
    encoder_hidden_states (B, S, C); encoder_attention_mask (B, S) int64, 1 keeps; time_ids (B, 2) = (width, height)
    of one panel in px. Returns (B, 4, h, 2w): only the left half is the velocity.
    delegable: also express norms and gates in what a delegate without them (XNNPACK) can take.
    """

    def __init__(self, unet: DreamLiteUNetModel, *, delegable: bool = False) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).eval().float()
        fold_attention(self.unet)
        if delegable:
            average_norms(self.unet)
            split_gates(self.unet)

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


@dataclass(frozen=True)
class Part:
    """A module to export: `inputs` are example tensors by argument name, in order; `output` names the one result."""

    module: nn.Module
    inputs: dict[str, Tensor]
    output: str


def part_names(settings: ExportSettings) -> list[str]:
    """The parts that these settings put into a bundle, in the order of `GRAPHS`."""
    return [name for name in GRAPHS if settings.text_encoder or name not in ENCODERS]


def prepare_part(
    name: str, source: Source, reference: TorchReference, settings: ExportSettings, *, batch: int, delegable: bool = False
) -> Part:
    """One of `GRAPHS` with example inputs of `batch` rows and otherwise the bundle's own static shapes.

    delegable: see `UNetGraph`. ValueError when the prompt template alone is longer than the graph.
    """
    side, channels, length = source.latent_px, source.latent_channels, settings.sequence_tokens
    if name == "unet":
        inputs = (
            torch.zeros(batch, channels, side, 2 * side),
            torch.full((batch,), 500.0),
            torch.zeros(batch, length, source.text_width),
            torch.ones(batch, length, dtype=torch.int64),
            torch.full((batch, 2), float(source.size_px)),
        )
        return Part(UNetGraph(reference.unet, delegable=delegable), dict(zip(UNET_INPUTS, inputs, strict=True)), "velocity")
    if name == "vae_encoder":
        return Part(VaeEncoderGraph(reference.vae), {"image": torch.zeros(batch, 3, source.size_px, source.size_px)}, "latent")
    if name == "vae_decoder":
        return Part(VaeDecoderGraph(reference.vae), {"latent": torch.zeros(batch, channels, side, side)}, "image")
    if name == "text_encoder":
        ids, mask = _token_rows(reference, source.prompts()["generate_template"], source.drop_generate + length, batch)
        graph = TextEncoderGraph(reference.encoder.text_encoder, source.hidden_state)
        return Part(graph, {"input_ids": ids, "attention_mask": mask}, "hidden_states")
    prompts, vision, encoder = source.prompts(), source.vision, reference.encoder.text_encoder
    template = prompts["edit_template"].replace(prompts["image_token"], prompts["image_token"] * vision.tokens)
    ids, mask = _token_rows(reference, template, source.drop_edit + length, batch)
    places = (ids[0] == encoder.config.image_token_id).nonzero().flatten()
    layout = EditLayout(int(places[0]), vision.tokens, vision.grid)
    graph = EditEncoderGraph(encoder, source.hidden_state, layout, ids[:1], list(vision.mean), list(vision.std))
    inputs = {"pixels": torch.zeros(batch, 3, *vision.grid_px), "input_ids": ids, "attention_mask": mask}
    return Part(graph, inputs, "hidden_states")


def _token_rows(reference: TorchReference, template: str, length: int, batch: int) -> tuple[Tensor, Tensor]:
    tokens = reference.encoder.tokenizer([template.replace("{}", "")] * batch, return_tensors="pt")["input_ids"]
    if tokens.shape[1] > length:
        raise ValueError(
            f"the empty prompt alone has {tokens.shape[1]} tokens, the graph holds {length}; raise export.sequence_tokens."
        )
    pad = length - tokens.shape[1]
    ids = nn.functional.pad(tokens, (0, pad), value=reference.encoder.tokenizer.pad_token_id)
    mask = nn.functional.pad(torch.ones_like(tokens), (0, pad))
    return ids, mask
