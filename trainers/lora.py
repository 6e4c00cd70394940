"""LoRA adapters on the UNet: add one, train it alone, merge it, and save it as diffusers loads it.
A network without an adapter trains whole; copies of one with an adapter share the weights that stand still."""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DreamLiteUNetModel
from safetensors.torch import save_file
from torch import nn

from trainers.settings import LoraSettings

ADAPTER = "default"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
METADATA_KEY = "lora_adapter_metadata"
"""File and metadata key that diffusers looks for (loaders/lora_base.py)."""
PREFIX = "unet"
"""What names the network in the file, as in every adapter of a diffusers pipeline with a UNet: `load_lora_adapter(..., prefix="unet")`."""


def add_lora(unet: DreamLiteUNetModel, settings: LoraSettings, seed: int) -> None:
    """Freeze `unet` and give it an adapter that changes nothing yet (arXiv 2106.09685: A drawn by `seed`, B zero).

    Raises ValueError for a target that no layer is called by, or that an adapter cannot be put on.
    """
    from peft import LoraConfig

    _check_targets(unet, settings.target_modules)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha or settings.rank, target_modules=list(settings.target_modules))
    with torch.random.fork_rng(devices=()):  # drawn on the CPU; every GPU would be forked too
        torch.manual_seed(seed)
        unet.add_adapter(config, ADAPTER)


def _check_targets(unet: nn.Module, targets: tuple[str, ...]) -> None:
    layers = {name: module for name, module in unet.named_modules() if name}
    for target in targets:
        found = {name: module for name, module in layers.items() if name == target or name.endswith(f".{target}")}
        if not found:
            near = difflib.get_close_matches(target, {part for name in layers for part in name.split(".") if not part.isdigit()}, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"lora.target_modules names {target!r}, but no layer of the UNet is called so{hint}")
        for name, module in found.items():
            grouped = getattr(module, "groups", 1) > 1
            if not isinstance(module, (nn.Linear, nn.Conv2d)) or grouped:
                what = "a depthwise convolution" if grouped else f"a {type(module).__name__}"
                raise ValueError(f"lora.target_modules names {target!r}, but {name} is {what}: choose linear layers or plain convolutions")


def has_adapter(unet: nn.Module) -> bool:
    """Whether a network carries an adapter."""
    return bool(getattr(unet, "peft_config", None))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train: all, or of a network with an adapter the adapter's."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes in a module, by name: its state without the parameters that are frozen."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in module.state_dict().items() if name not in frozen}


def load_trained_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load what `trained_state` gave. Raises ValueError where it is of another network."""
    missing, unexpected = module.load_state_dict(state, strict=False)
    lost = set(missing) & trained_state(module).keys()
    if lost or unexpected:
        named = ", ".join(sorted([*lost, *unexpected])[:3])
        raise ValueError(f"the saved state is of another network or adapter ({named}): remove it to begin anew")


def frozen_copy(unet: DreamLiteUNetModel) -> DreamLiteUNetModel:
    """The network as it is without its adapter, frozen: a reference that costs no weights where there is an adapter."""
    copied = _copy(unet).requires_grad_(False).eval()
    if has_adapter(copied):
        copied.unload_lora()
    return copied


def trainable_copy(unet: DreamLiteUNetModel) -> DreamLiteUNetModel:
    """A network of the same values to train on its own. With an adapter, only that is copied."""
    copied = _copy(unet).train()
    return copied if has_adapter(copied) else copied.requires_grad_(True)


def _copy(unet: DreamLiteUNetModel) -> DreamLiteUNetModel:
    # What `memo` holds is taken as its own copy: the weights below an adapter never change.
    shared = [parameter for parameter in unet.parameters() if not parameter.requires_grad] if has_adapter(unet) else []
    return copy.deepcopy(unet, {id(parameter): parameter for parameter in shared})


def merge_lora(unet: DreamLiteUNetModel) -> None:
    """Fold the adapter into the weights (W <- W + alpha / rank B A), so that a plain network remains."""
    unet.fuse_lora(adapter_names=[ADAPTER])
    unet.unload_lora()


def save_lora(unet: DreamLiteUNetModel, folder: Path, weights: dict[str, Any] | None = None) -> Path:
    """Write the adapter to `folder`/pytorch_lora_weights.safetensors, which diffusers loads into the same base network:
    `pipeline.unet.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="unet")`. `weights` says where
    the base came from and under which licence, and is kept in the file. Returns the file."""
    from peft.utils import get_peft_model_state_dict

    tensors = {f"{PREFIX}.{name}": value.contiguous() for name, value in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}
    config = {f"{PREFIX}.{name}": _plain(value) for name, value in unet.peft_config[ADAPTER].to_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{ADAPTER_FILE}.partial"
    metadata = {"format": "pt", METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    if weights:
        origin = Path(weights["origin"])
        metadata["base"] = origin.name if origin.is_absolute() else str(origin)  # an adapter is given away: no path of this machine
    if weights and weights["licence"]:
        metadata["licence"] = weights["licence"]
    save_file(tensors, partial, metadata)
    return partial.rename(folder / ADAPTER_FILE)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value
