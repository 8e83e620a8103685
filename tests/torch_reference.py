"""DiTFastAttnV2 inside diffusers: its attention processors, with the token rule as a dense mask and per-head reuse."""

from unittest.mock import patch

import torch
from torch.nn import functional

FULL, CACHED = -1, -2


class Run:
    """One sampling run. Whoever runs it says which step it is at."""

    def __init__(self, half_windows, over_time, frames):
        self.half_windows = torch.as_tensor(half_windows)  # [steps, layers, heads]
        self.over_time = torch.zeros_like(self.half_windows) if over_time is None else torch.as_tensor(over_time)
        self.frames = frames
        self.step = 0

    def next_step(self, pipeline, step, timestep, tensors):
        """A diffusers `callback_on_step_end`."""
        self.step = step + 1
        return tensors


class PlannedProcessor:
    """A diffusers attention processor whose softmax follows a run's plan; projections stay the wrapped one's.

    Args:
        inner: the processor that is replaced.
        layer: number of the attention layer, in order of execution.
        text: positions of the text tokens, a slice.
    """

    def __init__(self, inner, run, layer, text):
        self.inner, self.run, self.layer, self.text = inner, run, layer, text
        self.attention = functional.scaled_dot_product_attention
        self.at, self.previous = (0, -1), {}  # step and forward of it; outputs by forward: true CFG has two a step

    def __call__(self, *args, image_rotary_emb=None, **kwargs):
        """diffusers' `Attention` drops arguments that a processor does not name."""
        if image_rotary_emb is not None:
            kwargs["image_rotary_emb"] = image_rotary_emb
        with patch.object(functional, "scaled_dot_product_attention", self.attend):
            return self.inner(*args, **kwargs)

    def attend(self, query, key, value, attn_mask=None, **kwargs):  # [B, N, T, H]
        half_window = self.run.half_windows[self.run.step, self.layer]
        is_text = torch.zeros(key.shape[2], dtype=torch.bool)
        is_text[self.text] = True
        position = torch.arange(key.shape[2]).repeat(key.shape[1], 1)
        visual = position[0, ~is_text]
        over_time = visual.reshape(self.run.frames, -1).T.flatten().argsort() + visual[0]
        is_over_time = self.run.over_time[self.run.step, self.layer].bool()
        position[:, ~is_text] = torch.where(is_over_time[:, None], over_time, visual)
        near = (position[:, :, None] - position[:, None]).abs() <= half_window[:, None, None]
        kept = near | is_text[:, None] | is_text | (half_window == FULL)[:, None, None]
        if attn_mask is not None:  # of text's padding, which is no key
            kept = kept & attn_mask
        out = self.attention(query, key, value, attn_mask=kept)
        step, forward = self.at
        self.at = self.run.step, forward + 1 if step == self.run.step else 0
        if self.run.step > 0:
            out = torch.where((half_window == CACHED)[:, None, None], self.previous[self.at[1]], out)
        self.previous[self.at[1]] = out
        return out


def follow_plan(pipeline, half_windows, layouts, over_time=None, frames=1):
    """Make a diffusers SD3, FLUX, CogVideoX or HunyuanVideo pipeline follow a plan.

    Args:
        half_windows: int [steps, layers, heads].
        layouts: of each attention layer in order of execution, with a slice `text`.
        over_time: bool [steps, layers, heads], of heads whose band runs over row, column and frame.
        frames: of visual tokens.

    Returns:
        The run: its `next_step` must be the call's `callback_on_step_end`.
    """
    run, transformer = Run(half_windows, over_time, frames), pipeline.transformer
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    names = "attn", "attn1", "attn2"  # CogVideoX has attn1 alone, and SD3.5 attn2 in some blocks
    modules = [getattr(block, name) for block in blocks for name in names if getattr(block, name, None) is not None]
    for layer, (module, layout) in enumerate(zip(modules, layouts, strict=True)):
        inner = getattr(module.processor, "inner", module.processor)  # of an earlier run
        module.set_processor(PlannedProcessor(inner, run, layer, layout.text))
    return run
