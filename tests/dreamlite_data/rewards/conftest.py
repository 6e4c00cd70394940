"""Tiny reward checkpoints for the tests: the golden ones, and the same with one-line prompts for tests in seconds.
Each test gets a copy of the golden pictures where it needs files."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dreamlite_data.rewards import RewardModel, load_reward

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it brings
    yield
    torch.set_num_threads(before)


def short(name: str, to: Path, prompts: list[str]) -> Path:
    own = Path(shutil.copytree(FIXTURES / name, to / name))
    (own / "reward_spec.json").write_text(json.dumps({"prompts": prompts, "min_px": 50176, "max_px": 50176}))
    return own


@pytest.fixture(scope="session")
def short_hpsv3_dir(tmp_path_factory) -> Path:
    return short("hpsv3_tiny", tmp_path_factory.mktemp("rewards"), ["rate: {text_prompt}"])


@pytest.fixture(scope="session")
def short_hpsv3(short_hpsv3_dir) -> RewardModel:
    return load_reward(short_hpsv3_dir)


@pytest.fixture(scope="session")
def short_editreward_dir(tmp_path_factory) -> Path:
    prompts = ["how well does it follow: {text_prompt}", "how well does it keep: {text_prompt}"]
    return short("editreward_tiny", tmp_path_factory.mktemp("rewards"), prompts)


@pytest.fixture(scope="session")
def short_editreward(short_editreward_dir) -> RewardModel:
    return load_reward(short_editreward_dir)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with the four golden images, where a test may add files of its own."""
    for each in FIXTURES.glob("image*.png"):
        shutil.copy(each, tmp_path)
    return tmp_path
