"""torch's attentions as contenders of `benchmarks.attention`."""

import os
from functools import partial
from typing import Any

import numpy as np

from pallas_kernels import FULL


def add_torch(ready: Any) -> None:
    """torch's SDPA, and FlexAttention with the same masks (compiled once for all of them).

    Args:
        ready: `benchmarks.attention.Contenders`, to which calls are added.
    """
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        ready.failed["torch"] = str(error)
        return
    if not os.environ.get("TRITON_CACHE_DIR"):  # jax-triton empties it on import, and torch.compile then fails
        os.environ.pop("TRITON_CACHE_DIR", None)
    device = "cuda" if ready.on_gpu else "cpu"
    q, k, v = (
        torch.from_numpy(np.array(x, np.float32))
        .to(device=device, dtype=getattr(torch, ready.shape.dtype))
        .transpose(1, 2)
        .contiguous()
        for x in ready.qkv
    )
    plans, layout, length = ready.plans, ready.shape.layout, ready.shape.layout.length
    text = torch.zeros(length, dtype=torch.bool, device=device)
    text[layout.text] = True
    torch._dynamo.reset()  # else it stops compiling at the eighth set of shapes and masks
    compiled = torch.compile(flex_attention, dynamic=False)
    # Not compiled, it makes all of the mask first.
    make_mask = torch.compile(create_block_mask) if ready.on_gpu else create_block_mask

    def back(out: Any) -> Any:
        return out.transpose(1, 2).double().cpu().numpy()

    with torch.no_grad():
        sdpa = torch.nn.functional.scaled_dot_product_attention
        ready.add("torch SDPA", partial(sdpa, q, k, v), plans["full"], back)
        for name in ("full", "V/16", "V/64", "mixed"):
            window = torch.as_tensor(np.where(plans[name] == FULL, length, plans[name]), device=device)

            def kept(b: Any, h: Any, i: Any, j: Any, window: Any = window) -> Any:
                return text[i] | text[j] | ((i - j).abs() <= window[h])

            try:
                mask = make_mask(kept, 1, ready.shape.heads, length, length, device=device)
            except Exception as error:
                ready.failed[f"FlexAttention {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            ready.add(f"FlexAttention {name}", partial(compiled, q, k, v, block_mask=mask), plans[name], back)
