"""What every test runs under: one thread, no network, no progress lines, a fixed time zone.
Set before anything heavy is imported, and inherited by the processes that tests start."""

import os

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DREAMLITE_PROGRESS": "0",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "TZ": "UTC",
    }
)

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    """Torch, where a test has loaded it, keeps to one thread: the machine is shared and results must not depend on it."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    yield
