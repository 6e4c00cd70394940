"""What EditReward's shared prefix saves: tokens, counted with the real tokenizer, and time."""

from __future__ import annotations

import pytest

from dreamlite_data.rewards import load_reward
from dreamlite_data.rewards.spec import RewardSpec, released_spec
from dreamlite_data.rewards.text import RewardTokenizer, split_common
from tests.benchmarks.conftest import Bench
from tests.dreamlite_data.rewards.qwen_tokenizer import FIXTURES, cached_qwen_tokenizer

pytestmark = pytest.mark.benchmark

INSTRUCTION = "replace the red apples in the bowl with oranges and keep everything else as it is"
IMAGE_TOKENS = 256


def test_shared_prefix_saves_tokens(bench: Bench, request: pytest.FixtureRequest) -> None:
    """Counted with the published prompts and the real tokenizer; the vision tower runs once instead of twice besides."""
    tokenizer = RewardTokenizer(cached_qwen_tokenizer(request.config), RewardSpec.model_validate(released_spec("editreward")), 151_658)
    trunk = len(tokenizer.trunk([IMAGE_TOKENS] * 2))
    (branches,) = tokenizer.branches([INSTRUCTION])
    common, rest = split_common(branches)
    plain = sum(trunk + len(branch) for branch in branches)
    shared = trunk + len(common) + sum(map(len, rest))
    assert trunk + len(common) == 551
    bench("editreward_shared_prefix_saves_percent", 100 * (1 - shared / plain), 25, higher_is_better=True)


def test_shared_prefix_saves_time(bench: Bench) -> None:
    """The tiny checkpoint with the published prompts: its tokenizer spells letters, so less is shared than with the real one."""
    files = [FIXTURES / f"image{index % 4}.png" for index in range(2)]
    model = load_reward(FIXTURES / "editreward_tiny")
    times = {}
    for share in (True, False):
        model.share_prefix = share
        times[share] = bench.best_of(2, lambda: model.score(files, [INSTRUCTION] * 2, files[::-1]))
    bench("editreward_shared_prefix_time_ratio", times[True] / times[False], 1.0)
