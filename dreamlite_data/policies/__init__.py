"""Policies decide which measured rows make a dataset: SQL files with named rules, in the order they are tried."""

from __future__ import annotations

from dreamlite_data.policies.policy import Policy, PolicyError, Rule, read_policy

__all__ = ["Policy", "PolicyError", "Rule", "read_policy"]
