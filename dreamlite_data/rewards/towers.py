"""CLIP score, PickScore and HPSv2.1: the cosine of an image and its text in one embedding space, each on its own scale.
The first two are folders of transformers' CLIPModel; HPSv2.1 is a state dict of open_clip, mapped key by key."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dreamlite_data.rewards.open_clip_layout import clip_state
from dreamlite_data.rewards.square_scorer import SquarePacker, SquareScorer
from dreamlite_data.rewards.squares import Square, read_square
from dreamlite_data.rewards.stored import RewardCheckpointError
from dreamlite_data.rewards.strict import fill, find_file, read_state

CLIP_SCORE_SCALE = 100.0
"""A CLIP score is the cosine times 100, as in op_similarity."""


class ClipScore(SquareScorer):
    """100 cos(image, text) of a CLIP-class model."""

    kind = "clip"

    def mu(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return self.scale() * self.cosine(pixels, ids)

    def scale(self) -> Tensor | float:
        return CLIP_SCORE_SCALE

    def cosine(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """[B]. No attention mask: text is causal, and what stands after the end token is never read."""
        image = self.network.get_image_features(pixel_values=pixels).pooler_output
        text = self.network.get_text_features(input_ids=ids).pooler_output
        return nn.functional.cosine_similarity(image.float(), text.float(), dim=-1)


class PickScore(ClipScore):
    """exp(logit scale) cos(image, text) of a CLIP ViT-H/14 that was trained on people's choices (arXiv 2305.01569); about 20."""

    kind = "pickscore"

    def scale(self) -> Tensor:
        return self.network.logit_scale.float().exp()


class HpsV2(ClipScore):
    """cos(image, text) of HPSv2.1 (arXiv 2306.09341); about 0.2 to 0.3. Its images keep their aspect and are padded."""

    kind = "hpsv2"

    def scale(self) -> float:
        return 1.0


def load_clip_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    """A two-tower model in transformers' layout, strictly: RewardCheckpointError lists what does not fit."""
    from transformers import AutoModel

    network, found = AutoModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    problems = [
        f"{name.removesuffix('_keys')}: {', '.join(sorted(map(str, found[name])))}"
        for name in ("missing_keys", "unexpected_keys")
        if found[name]
    ]
    if problems:
        raise RewardCheckpointError(f"{folder}: the weights do not fit config.json ({'; '.join(problems)})")
    if not hasattr(network, "get_image_features"):
        raise RewardCheckpointError(
            f"{folder} is a {type(network).__name__}, which has no image tower to score with; give a CLIP or SigLIP model"
        )
    return network.requires_grad_(False).eval()


def load_open_clip(folder: Path, dtype: torch.dtype) -> nn.Module:
    """HPSv2.1's `.pt` in the CLIPModel that config.json describes (that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K)."""
    from transformers import CLIPModel

    path = find_file(folder, ("*.pt", "*.pth", "*.safetensors"), "the checkpoint of HPSv2.1")
    with torch.device("meta"):
        network = CLIPModel(_clip_config(folder))
    fill(network, clip_state(read_state(path)), path, dtype=dtype)
    return network


def clip_packer(folder: Path, kind: str) -> SquarePacker:
    """Decoding and tokenizing for these three, without a weight."""
    config = _clip_config(folder)
    square = Square(config.vision_config.image_size, "pad") if kind == HpsV2.kind else read_square(folder)
    return SquarePacker(square, config.vision_config.patch_size, load_tokenizer(folder), config.text_config.max_position_embeddings)


def load_tokenizer(folder: Path):  # noqa: ANN201 - a transformers tokenizer, imported when it is needed
    """The tokenizer of a scorer's folder. Raises RewardCheckpointError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RewardCheckpointError(
            f"{folder} has no tokenizer ({error}): copy the tokenizer files of the model that this scorer was trained from"
        ) from error


def _clip_config(folder: Path):  # noqa: ANN202
    from transformers import AutoConfig, CLIPConfig

    if not (Path(folder) / "config.json").exists():
        raise RewardCheckpointError(
            f"{folder} has no config.json: copy it, with the tokenizer files, from the CLIP model that this scorer was trained from"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not isinstance(config, CLIPConfig):
        raise RewardCheckpointError(f"{folder}/config.json describes a {config.model_type!r}, not a CLIP model")
    return config
