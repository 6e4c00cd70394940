"""The real tokenizer of Qwen2-VL, built from the ranks in the wheel of `dashscope` (Apache-2.0), for tests of true lengths.
Install it with `pip install --no-deps dashscope==2.0.2`; its code is never imported."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

FIXTURES = Path(__file__).parent / "fixtures"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Qwen2's tokenizer.json
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def ranks_file() -> Path:
    """The file of ranks; skips the test where the wheel is not installed."""
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        pytest.skip("needs the ranks of Qwen's tokenizer: pip install --no-deps dashscope==2.0.2")
    return Path(found.origin).parent / "resources" / "qwen.tiktoken"


def write_qwen_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of Qwen2-VL to `folder`."""
    lines = (line.split() for line in ranks_file().read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [(spelled(left), spelled(right)) for token in by_rank for left, right in _halves(token, ranks)]
    tokenizer = Tokenizer(models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copy(FIXTURES / "hpsv3_tiny" / "chat_template.json", folder)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every two tokens that make up `token`: byte pairs of ranks merge whatever two parts spell a token (tiktoken's rule)."""
    cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
    return [(left, right) for left, right in cuts if left in ranks and right in ranks]


def cached_qwen_tokenizer(config: pytest.Config) -> Path:
    """The folder that `write_qwen_tokenizer` fills, kept in pytest's cache: making it takes half a minute."""
    made = Path(config.cache.mkdir("qwen2_vl_tokenizer")) / "made"
    if not made.exists():
        own = Path(tempfile.mkdtemp(dir=made.parent))
        write_qwen_tokenizer(own)
        try:
            own.rename(made)
        except OSError:  # another process was faster
            shutil.rmtree(own)
    return made
