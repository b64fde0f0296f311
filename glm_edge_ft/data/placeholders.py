"""Images in a prompt: the run of placeholder tokens that the checkpoint's own template renders for each.

The model puts one vector of the image in the place of each placeholder, so their numbers must be equal. For the
released models they are 578: 24 x 24 vectors of the image, one before and one after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.template import ChatTemplate, OffsetTokenizer, TemplateRefusal
from glm_edge_ft.errors import ProblemList, UserError

RELEASED_PLACEHOLDERS = 578
IMAGE_TURN_TOKENS = 584
"""Tokens of a turn with one image and no text in the released models, stop token included: what it costs at least.

`<|user|>`, a line break, 578 placeholders, a line break, `<|assistant|>`, a line break, `<|user|>`. Where the template
writes no line break before `<|assistant|>` it is one less.
"""
_IMAGE_PART = {"type": "image", "image": "path/to/image.jpg"}
_OWN_TOKENIZER = "use a GLM-Edge-V checkpoint with the tokenizer and the config.json that came with it"


@dataclass(frozen=True)
class ImageSettings:
    """What the encoding needs to know about images."""

    placeholder_id: int  # the token that stands for a vector of an image (`boi_token_id` of the checkpoint's config)
    placeholders_per_image: int  # the number of the model's vectors of an image
    max_images: int = 1  # of a conversation; 0: chat data for the language part of a vision checkpoint

    @property
    def image_turn_tokens(self) -> int:
        """What a turn with one image costs at least (`IMAGE_TURN_TOKENS` for the released models)."""
        return self.placeholders_per_image + IMAGE_TURN_TOKENS - RELEASED_PLACEHOLDERS


class PlaceholderCounter:
    """Finds placeholders in a conversation's text and in its ids."""

    def __init__(
        self, settings: ImageSettings, template: ChatTemplate, tokenizer: OffsetTokenizer, max_input_length: int
    ) -> None:
        """Compare what the template renders for an image with the settings, and the settings with the budget.

        Raises:
            UserError: the tokenizer has no such placeholder, the template renders another number of them, or
                `max_input_length` is below the cost of one image.
        """
        self.settings = settings
        self._text = tokenizer.backend.id_to_token(settings.placeholder_id) or ""
        problems = ProblemList()
        if not self._text:
            what = f"the tokenizer has no token {settings.placeholder_id}, which config.json names as boi_token_id"
            problems.add("MODEL", what, _OWN_TOKENIZER)
        else:
            self._check_template(template, tokenizer, problems)
        if settings.max_images > 0 and max_input_length < settings.image_turn_tokens:
            tokens = settings.image_turn_tokens
            what = f"{max_input_length} tokens are too few: a turn with one image and no text takes {tokens}"
            problems.add("max_input_length", what, f"set it to {tokens} and the length of the text, or more")
        problems.raise_if_any()

    def _check_template(self, template: ChatTemplate, tokenizer: OffsetTokenizer, problems: ProblemList) -> None:
        try:
            text = template.render([{"role": "user", "content": [_IMAGE_PART]}])
        except TemplateRefusal as refusal:
            problems.add("MODEL", f"the chat template cannot render an image: {refusal}", _OWN_TOKENIZER)
            return
        count, expected = (
            tokenizer.encode(text).ids.count(self.settings.placeholder_id),
            self.settings.placeholders_per_image,
        )
        if count != expected:
            what = (
                f"the chat template renders {count} times {self._text} for an image, the model makes {expected} vectors"
            )
            problems.add("MODEL", what, f"{_OWN_TOKENIZER}, or state its number as image_placeholder_tokens")

    def check_text(self, conversation: Conversation) -> None:
        """Raise UserError if a text holds the placeholder, which the model would take for a piece of an image."""
        problems = ProblemList()
        for index, message in enumerate(conversation.messages):
            if any(self._text in text for text in message.texts):
                problems.add(
                    f"{conversation.place}: messages[{index}]",
                    f"the text holds the image placeholder token {self._text}",
                    f"remove it from the text; an image is a part of its own: {_IMAGE_PART}",
                )
        problems.raise_if_any()

    def check_ids(self, place: str, images: int, ids: Sequence[int]) -> None:
        """Raise UserError if the ids of a conversation with so many images do not hold one run for each of them."""
        count, expected = ids.count(self.settings.placeholder_id), images * self.settings.placeholders_per_image
        if count != expected:
            raise UserError.single(
                place,
                f"{images} images take {expected} image placeholder tokens, the chat template renders {count}",
                "does the template leave the image out at this place, or does a key of the row hold the placeholder?",
            )

    def whole_images(self, ids: Sequence[int]) -> int:
        """Return how many images have all of their placeholders in `ids`."""
        return ids.count(self.settings.placeholder_id) // self.settings.placeholders_per_image

    def without_partial_image(self, ids: list[int]) -> list[int]:
        """Return ids whose beginning was cut off without what is left of an image that was cut in two."""
        left = ids.count(self.settings.placeholder_id) % self.settings.placeholders_per_image
        return ids[ids.index(self.settings.placeholder_id) + left :] if left else ids
