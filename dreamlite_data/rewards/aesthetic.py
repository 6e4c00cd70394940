"""How pleasing an image is, from an image tower's embedding of length 1 and a few linear layers.
Own code for two families of released heads: LAION's on CLIP ViT-L/14 (768 wide) and those on SigLIP so400m (1152 wide)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dreamlite_data.rewards.square_scorer import SquarePacker, SquareScorer
from dreamlite_data.rewards.squares import read_square
from dreamlite_data.rewards.stored import RewardCheckpointError
from dreamlite_data.rewards.strict import find_file, read_state
from dreamlite_data.rewards.towers import load_clip_folder

HEAD_FILES = ("*.pth", "*.pt", "aesthetic_head.safetensors")


class AestheticNetwork(nn.Module):
    """A two-tower model, of which only the image tower is used, and the head."""

    def __init__(self, tower: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.tower, self.head = tower, head


class Aesthetic(SquareScorer):
    """A number on the scale of the head's training, 1 to 10 for both families. The text is not looked at."""

    kind = "aesthetic"

    def mu(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        embedding = self.network.tower.get_image_features(pixel_values=pixels).pooler_output.float()
        return self.network.head(nn.functional.normalize(embedding, dim=-1))[:, 0]


def head_of(state: Mapping[str, Tensor], where: Path) -> nn.Sequential:
    """The linear layers of a stored head in their order. The released heads have no activation between them, and dropout,
    which leaves gaps in the numbers, is off in scoring. Raises RewardCheckpointError where the layers do not chain to one number."""
    layers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(r"(?:[a-z_]+\.)*(\d+)\.(weight|bias)", key)
        if found is None:
            raise RewardCheckpointError(f"{where}: {key} is no weight or bias of a numbered linear layer; give the head alone")
        layers.setdefault(int(found[1]), {})[found[2]] = value.float()
    head, width = nn.Sequential(), None
    for place, parts in sorted(layers.items()):
        if set(parts) != {"weight", "bias"} or parts["weight"].ndim != 2 or width not in (None, parts["weight"].shape[1]):
            raise RewardCheckpointError(f"{where}: layer {place} does not follow on the one before it")
        width = parts["weight"].shape[0]
        linear = nn.Linear(*reversed(parts["weight"].shape), device="meta")
        linear.load_state_dict(parts, assign=True)
        head.append(linear)
    if width != 1:
        raise RewardCheckpointError(f"{where}: the last layer gives {width} numbers instead of one")
    return head.requires_grad_(False).eval()


def load_aesthetic(folder: Path, dtype: torch.dtype) -> AestheticNetwork:
    """The network of a folder with a CLIP or SigLIP model in transformers' layout and the head's file beside it."""
    path = find_file(folder, HEAD_FILES, "the aesthetic head")
    head, tower = head_of(read_state(path), path), load_clip_folder(folder, dtype)
    width = getattr(tower.config, "projection_dim", None) if tower.config.model_type == "clip" else tower.config.vision_config.hidden_size
    if head[0].in_features != width:
        raise RewardCheckpointError(
            f"{path} was trained on embeddings of {head[0].in_features} numbers, the model in {folder} gives {width}"
        )
    return AestheticNetwork(tower, head)


def aesthetic_packer(folder: Path) -> SquarePacker:
    """Decoding without a weight. LAION's head was trained with torchvision's crop, which rounds where transformers cuts off."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").exists():
        raise RewardCheckpointError(f"{folder} has no config.json: put the CLIP or SigLIP model that the head was trained on there")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return SquarePacker(read_square(folder, "round"), config.vision_config.patch_size)
