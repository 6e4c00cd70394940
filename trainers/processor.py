"""The processor of an edit prompt without its video half, which would need torchvision.
A module of its own because checkpoints name it: diffusers imports it when a stock pipeline loads one."""

from __future__ import annotations

# diffusers looks for the name of a loadable base class in the module that defines a part.
from transformers import ProcessorMixin, Qwen3VLProcessor

__all__ = ["ProcessorMixin", "SquareImageProcessor"]


class SquareImageProcessor(Qwen3VLProcessor):
    """A `Qwen3VLProcessor` without its video half, which would need torchvision."""

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):  # noqa: ANN001, ANN003
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are saved and loaded: no video processor."""
        return ["image_processor", "tokenizer"]

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
        """Accept a missing video processor; the others are checked as usual."""
        return type(None) if argument is None else super().check_argument_for_proper_class(argument_name, argument)
