"""What HunyuanVideo's Llama is asked: a prompt inside an instruction, whose states are then cropped away."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

# The model was trained with this text: diffusers 0.42.1, HunyuanVideoPipeline's DEFAULT_PROMPT_TEMPLATE.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)

CROP_START = 95
"""Tokens before the prompt: the begin of the text, and the template's. Llama is given so many more than are kept."""


def templated(prompts: Iterable[str]) -> list[str]:
    """The texts that Llama's tokenizer reads, one for each prompt."""
    return [TEMPLATE.format(prompt) for prompt in prompts]


def crop(
    states: Shaped[Any, "B T D"], lengths: Int[np.ndarray, " B"]
) -> tuple[Shaped[Any, "B kept D"], Int[np.ndarray, " B"]]:
    """States and numbers of tokens without the template's first `CROP_START`.

    Args:
        states: Llama's, of templated prompts.
        lengths: tokens of each that are no padding.

    Raises:
        ValueError: a text is not longer than what is cropped, so that no state of its prompt is left.
    """
    if (shortest := int(lengths.min())) <= CROP_START:
        raise ValueError(
            f"The tokenizer makes {shortest} tokens of a templated prompt, but the first {CROP_START=} are the "
            "template's: the folder's tokenizer is not Llama 3's, get it again."
        )
    return states[:, CROP_START:], lengths - CROP_START
