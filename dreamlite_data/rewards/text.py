"""Prompts to token ids: the image part from the checkpoint's own chat template, the user's words as one plain segment.
A prompt that spells `<|Reward|>` or `<|image_pad|>` is tokenized as ordinary letters, so nobody can inject a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dreamlite_data.rewards.spec import RewardSpec
from dreamlite_data.rewards.stored import RewardCheckpointError

_MARK = "@@text@@"
_IMAGE_TOKEN = "<|image_pad|>"


class RewardTokenizer:
    """Token ids of a reward model's input.

    `opening` is what stands before the text: system line and image slots as the checkpoint's chat template writes
    them (the system line differs between bases and changes the score, so it is never hard-coded).
    """

    def __init__(self, model_dir: Path, spec: RewardSpec, rows: int) -> None:
        self.spec = spec
        tokenizer = _read_tokenizer(model_dir)
        if spec.reward_token not in tokenizer.get_vocab():
            tokenizer.add_tokens([spec.reward_token], special_tokens=True)
        if len(tokenizer) != rows:
            raise RewardCheckpointError(
                f"{model_dir}: the tokenizer has {len(tokenizer)} tokens with {spec.reward_token} but the checkpoint "
                f"{rows} embedding rows; use the tokenizer of the base model this checkpoint was trained from"
            )
        self.tokenizer = tokenizer
        self.reward_id = tokenizer.convert_tokens_to_ids(spec.reward_token)
        self.image_id = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
        self.padding_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.opening = self._opening(model_dir)

    def _opening(self, model_dir: Path) -> list[list[int]]:
        """Ids around the image slots: `images` + 1 pieces."""
        content = [{"type": "image"}] * self.spec.images + [{"type": "text", "text": _MARK}]
        template = self.tokenizer.chat_template
        separate = Path(model_dir) / "chat_template.json"
        if template is None and separate.exists():
            template = json.loads(separate.read_text("utf-8"))["chat_template"]
        if template is None:
            raise RewardCheckpointError(f"{model_dir} has no chat template; copy chat_template.json from the base model")
        written = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=template, tokenize=False
        )
        pieces = written.split(_MARK)[0].split(_IMAGE_TOKEN)
        if len(pieces) != self.spec.images + 1:
            raise RewardCheckpointError(
                f"{model_dir}: the chat template writes {len(pieces) - 1} image slots before the text, "
                f"{self.spec.images} needed"
            )
        return [self.tokenizer(piece).input_ids if piece else [] for piece in pieces]

    def trunk(self, image_tokens: list[int]) -> list[int]:
        """Opening with `image_tokens[i]` image tokens in slot i."""
        ids = list(self.opening[0])
        for count, piece in zip(image_tokens, self.opening[1:], strict=True):
            ids += [self.image_id] * count + piece
        return ids

    def branches(self, prompts: list[str]) -> list[list[list[int]]]:
        """For every prompt, the ids of each head's text, up to and with the reward token."""
        texts = [self.spec.text(prompt, head) for prompt in prompts for head in range(len(self.spec.heads))]
        # One segment: byte pairs merge across the border between instruction and prompt.
        ids = self.tokenizer(texts, split_special_tokens=True, add_special_tokens=False).input_ids if texts else []
        ids = [[*each, self.reward_id] for each in ids]
        heads = len(self.spec.heads)
        return [ids[start : start + heads] for start in range(0, len(ids), heads)]


def _read_tokenizer(model_dir: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise RewardCheckpointError(
            f"{model_dir}: no tokenizer can be read ({str(error).splitlines()[0]}); copy tokenizer.json and tokenizer_config.json "
            "(or vocab.json and merges.txt) from the base model"
        ) from error


def split_common(branches: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Move the ids that all branches start with into the trunk: EditReward's two prompts share 551 of some 920 tokens,
    and the shared ones then run through the decoder once."""
    if len(branches) == 1:
        return [], branches
    shortest = min(map(len, branches)) - 1  # the reward token stays in its branch
    common = 0
    while common < shortest and len({branch[common] for branch in branches}) == 1:
        common += 1
    return branches[0][:common], [branch[common:] for branch in branches]
