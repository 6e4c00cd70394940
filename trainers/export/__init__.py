"""Checkpoint in, phone bundle out: ONNX graphs, int8, manifest, a runner without torch, and its evaluation.
Names load on first use, so that importing the runner never imports torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ExportSettings": "settings",
    "Runner": "runner",
    "evaluate_bundle": "evaluate",
    "export_bundle": "bundle",
    "verify_bundle": "verify",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
