"""Models that answer a question about pictures: the one interface to them, and whatever stands behind it.
Whoever asks (captions, edit instructions, judgements) writes a prompt and keeps nothing: answers are cached per call."""

from dreamlite_data.chat.base import ChatModel, Question
from dreamlite_data.chat.endpoint import EndpointChat, EndpointError
from dreamlite_data.chat.local import LocalChat

__all__ = ["ChatModel", "EndpointChat", "EndpointError", "LocalChat", "Question"]
