"""What distinguishes one reward model from another: its kind, prompts, heads and pixel budget, all data.
The released models' specs ship as JSON; a checkpoint directory may override any field with `reward_spec.json`."""

from __future__ import annotations

import difflib
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dreamlite_data.rewards.stored import RewardCheckpointError

SPEC_FILE = "reward_spec.json"
PROMPT_FIELD = "{text_prompt}"
PREPROCESSING_VERSION = 1
"""Raise it when ids or pixels change for the same input: it is a part of every `scorer_id`."""

_SUFFIX_SHA256 = "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"
PUBLISHED_SHA256 = {
    "hpsv3": {
        "prompt overall": "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a",
        "suffix": _SUFFIX_SHA256,
    },
    "editreward": {
        "prompt follow": "da5bfc26898cc8e0e534a29675ad78c3462d331b7feaebf13bae5aa50195864f",
        "prompt quality": "89bbc5c2ac1bbea9c45a0fde298e9a97d1c079170a30780392c577fc1cd8d286",
        "suffix": _SUFFIX_SHA256,
    },
}
"""sha256 of the texts in the authors' repositories (HPSv3 `dataset/data_collator_qwen.py`, EditReward
`dataset/prompts.py`). A stripped trailing space changes ids and scores, which happened to a published port."""

KIND_OF_ARCHITECTURE = {"qwen2_vl": "hpsv3", "qwen2_5_vl": "editreward"}


class RewardSpec(BaseModel):
    """One reward model's contract.

    `prompts[i]` is read by head i, `heads[i]` names what it judges; the score is the mean over heads (EditReward's
    `pooling_strategy: mean`). `suffix` ends the text and holds the reward token; what follows that token cannot
    influence a causal model and is dropped. `min_px`/`max_px` bound the area after resizing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["hpsv3", "editreward"]
    heads: tuple[str, ...] = Field(min_length=1)
    images: Literal[1, 2]
    prompts: tuple[str, ...] = Field(min_length=1)
    suffix: str
    min_px: int = Field(gt=0)
    max_px: int = Field(gt=0)
    reward_token: str = "<|Reward|>"
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _consistent(self) -> RewardSpec:
        if len(self.prompts) != len(self.heads):
            raise ValueError(f"{len(self.prompts)} prompts for {len(self.heads)} heads: one prompt per head is needed")
        for prompt in self.prompts:
            if prompt.count(PROMPT_FIELD) != 1:
                raise ValueError(f"a prompt must hold {PROMPT_FIELD} exactly once: {prompt!r}")
        if self.suffix.count(self.reward_token) != 1:
            raise ValueError(f"the suffix must hold {self.reward_token!r} exactly once: {self.suffix!r}")
        if self.min_px > self.max_px:
            raise ValueError(f"min_px {self.min_px} is greater than max_px {self.max_px}")
        return self

    def text(self, prompt: str, head: int) -> str:
        """The one text segment that stands between the last image and the reward token of `head`."""
        return self.prompts[head].replace(PROMPT_FIELD, prompt) + self.suffix.split(self.reward_token)[0]

    def digest(self) -> str:
        """sha256 of every field and of the preprocessing version."""
        fields = self.model_dump(mode="json") | {"preprocessing": PREPROCESSING_VERSION}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def released_spec(kind: str) -> dict[str, object]:
    """The fields of a released model's spec, as shipped in this package's `data/` folder."""
    return json.loads((resources.files("dreamlite_data.rewards") / "data" / f"{kind}.json").read_text("utf-8"))


def _read_overrides(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RewardCheckpointError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise RewardCheckpointError(f"{path} must hold an object with fields of the spec, not {type(found).__name__}")
    return found


def read_spec(model_dir: Path, architecture: str) -> RewardSpec:
    """The spec of a checkpoint directory: the released one of its architecture, with the overrides of
    `reward_spec.json` where that file exists. Raises RewardCheckpointError on an unknown field or a bad value."""
    path = Path(model_dir) / SPEC_FILE
    overrides = _read_overrides(path)
    kind = overrides.get("kind", KIND_OF_ARCHITECTURE.get(architecture))
    if kind not in KIND_OF_ARCHITECTURE.values():
        raise RewardCheckpointError(
            f"{model_dir}: no reward model is known for architecture {architecture!r} and kind {kind!r}; "
            f"known kinds are {sorted(KIND_OF_ARCHITECTURE.values())}"
        )
    for name in overrides:
        if name not in RewardSpec.model_fields:
            close = difflib.get_close_matches(name, RewardSpec.model_fields, n=1)
            raise RewardCheckpointError(
                f"{path}: unknown field {name!r}" + (f", did you mean {close[0]!r}?" if close else "")
            )
    try:
        return RewardSpec.model_validate(released_spec(str(kind)) | overrides)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "spec"
        raise RewardCheckpointError(f"{path}: {where}: {first['msg']}") from error
