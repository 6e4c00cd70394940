"""The chat model that settings name, and the name of its weights.
Nothing is loaded and no server is asked here: that waits for the first open question."""

from __future__ import annotations

from dreamlite_data.chat.base import ChatModel
from dreamlite_data.chat.endpoint import EndpointChat
from dreamlite_data.chat.local import LocalChat
from dreamlite_data.model_settings import ChatSettings
from dreamlite_data.sources.base import DigestCache
from dreamlite_data.weights import weights_digest


def chat_model(backend: ChatSettings, weights: str) -> ChatModel:
    """The model behind `backend`; `weights` is its digest as `chat_weights` gives it. Raises EndpointError where the key of an
    endpoint is not in the environment."""
    assert backend.model is not None  # the settings of both backends demand one
    if backend.backend == "endpoint":
        assert backend.base_url is not None
        return EndpointChat(
            backend.model, backend.base_url, key_variable=backend.key_variable, timeout_s=backend.timeout_s,
            attempts=backend.attempts, concurrency=backend.concurrency,
        )  # fmt: skip
    return LocalChat(backend.model, weights, revision=backend.revision, batch=backend.batch_images)


def chat_weights(backend: ChatSettings, digests: DigestCache, setting: str) -> str:
    """Digest of the weights behind `backend`; '' for an endpoint, whose model is known by name alone. `setting` is named in
    errors. Raises WeightsError."""
    if backend.backend != "transformers" or backend.model is None:
        return ""
    return weights_digest(backend.model, backend.revision, digests, f"{setting}.model")
