"""Arrow attention as one Triton kernel that jax-triton launches: for Ampere and Ada once JAX drops Pallas's Triton.

A program takes one tile of queries of one head, all of text or all of visual tokens. It walks its keys as the "triton"
kernel does. One loop without masks visits text and the inside of the band. A loop with masks visits the band's edges
and ragged ends. Text queries see every key; the programs of all heads' text tiles come first.
"""

import math
import threading
import warnings
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import jax_triton as jt
import numpy as np
import triton
import triton.language as tl  # pyright: ignore[reportMissingImports] of an extra
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float
from triton.runtime import interpreter  # pyright: ignore[reportMissingImports] of an extra

from pallas_kernels.backends.base import Device, Problem
from pallas_kernels.backends.triton.tiles import Tiles
from pallas_kernels.layout import CACHED, FULL
from pallas_kernels.mask import EVERYTHING, UNSEEN

FULL, CACHED = tl.constexpr(FULL), tl.constexpr(CACHED)
EVERYTHING, UNSEEN = tl.constexpr(EVERYTHING), tl.constexpr(UNSEEN)

CAPABILITY = {"hopper": 90, "ampere": 80}
"""By generation, of GPUs that programs are compiled for where they are not."""

INTERPRETING = threading.Lock()
"""Triton's interpreter keeps the program that it runs in a global, and patches `triton.language` meanwhile."""


def arrow_attention(problem: Problem[Array], tiles: Tiles, *, interpret: bool) -> Float[Array, "*L B T N H"]:
    q, layout, cache, layer = problem.q, problem.layout, problem.cache, problem.layer
    batch, _, heads, dim = q.shape
    constants = {
        **{"NUM_TEXT": layout.num_text, "NUM_VISUAL": layout.num_visual, "TEXT_FIRST": layout.text_first},
        **{"BATCH": batch, "HEADS": heads, "DIM": dim, "SCALE": dim**-0.5 * math.log2(math.e)},
        **{"ROWS": tiles.rows, "KEYS": tiles.keys, "STACKED": layer is not None},
        "PADDED": problem.text_length is not None,
    }
    row_tiles = -(-layout.num_text // tiles.rows) - (-layout.num_visual // tiles.rows)
    programs = row_tiles * batch * heads

    @sequential_vmap
    def launch(*args: Array) -> Array:
        out = jax.ShapeDtypeStruct(args[-1].shape, args[-1].dtype)
        if interpret:
            return jax.pure_callback(partial(_interpret, programs, constants), out, *args)
        return jt.triton_call(  # pyright: ignore[reportAttributeAccessIssue] without the extra it is this file
            *args,
            kernel=_arrow_attention,
            out_shape=out,
            grid=programs,
            name="arrow_attention_jax_triton",
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            compute_capability=_capability(),
            input_output_aliases={7: 0},
            **constants,
        )

    return launch(
        jnp.zeros((), jnp.int32) if layer is None else layer,
        *(problem.order, problem.windows),
        problem.order if problem.text_length is None else problem.text_length,
        *(q, problem.k, problem.v),
        jnp.full(q.shape, jnp.nan, q.dtype) if cache is None else cache,
    )


def _capability() -> int:
    """Compute capability of the GPU that programs are for, times ten."""
    device = Device.current()
    return CAPABILITY.get(device.generation or "") or round(10 * float(device.capability or 0))


@triton.jit  # pyright: ignore[reportAttributeAccessIssue] without the extra it is triton.py
@no_type_check  # the tests' shape checks would wrap it, and Triton reads its source
def _arrow_attention(
    layer,
    order,
    half_window,
    text_length,  # anything where not PADDED
    q,
    k,
    v,
    _,  # the cache: the output's buffer
    out,
    NUM_TEXT: tl.constexpr,
    NUM_VISUAL: tl.constexpr,
    TEXT_FIRST: tl.constexpr,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STACKED: tl.constexpr,
    PADDED: tl.constexpr,
):
    TEXT: tl.constexpr = 0 if TEXT_FIRST else NUM_VISUAL
    VISUAL: tl.constexpr = NUM_TEXT if TEXT_FIRST else 0
    LENGTH: tl.constexpr = NUM_TEXT + NUM_VISUAL
    TEXT_TILES: tl.constexpr = (NUM_TEXT + ROWS - 1) // ROWS
    VISUAL_TILES: tl.constexpr = (NUM_VISUAL + ROWS - 1) // ROWS

    program = tl.program_id(0)
    is_text = program < TEXT_TILES * BATCH * HEADS
    rest = program - tl.where(is_text, 0, TEXT_TILES * BATCH * HEADS)
    tiles = tl.where(is_text, TEXT_TILES, VISUAL_TILES)
    pair = rest // tiles
    head = tl.load(order + pair // BATCH)
    b = pair % BATCH
    window = tl.load(half_window + head)
    if window == CACHED:
        return
    window = tl.where(is_text | (window == FULL), EVERYTHING, window)
    num_text = NUM_TEXT
    if PADDED:
        num_text = tl.load(text_length + b)

    base = (b.to(tl.int64) * LENGTH * HEADS + head) * DIM
    dims = tl.arange(0, DIM)[None, :]
    first_row = (rest % tiles) * ROWS
    last_row = first_row + ROWS - 1
    rows = tl.where(is_text, TEXT, VISUAL) + first_row + tl.arange(0, ROWS)
    exist = (rows < tl.where(is_text, TEXT + NUM_TEXT, VISUAL + NUM_VISUAL))[:, None]
    at_rows = rows[:, None] * (HEADS * DIM) + dims
    q_tile = tl.load(q + base + at_rows, mask=exist, other=0.0)

    # `mask.band`, whose values are not negative: // rounds towards zero here
    start = tl.maximum(first_row - window, 0) // KEYS
    stop = (tl.minimum(last_row + window + 1, NUM_VISUAL) + KEYS - 1) // KEYS
    inner_start = (tl.maximum(last_row - window, 0) + KEYS - 1) // KEYS
    inner_start = tl.minimum(tl.maximum(inner_start, start), stop)
    inner_stop = tl.minimum(first_row + window + 1, NUM_VISUAL) // KEYS
    inner_stop = tl.minimum(tl.maximum(inner_stop, inner_start), stop)
    inside = inner_stop - inner_start

    values = tl.full((ROWS, DIM), 0.0, tl.float32)
    highest = tl.full((ROWS,), UNSEEN, tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    for masked in tl.static_range(2):
        if masked:
            text_first = TEXT + num_text // KEYS * KEYS
            text_steps = num_text // KEYS * KEYS < num_text
            text_steps = tl.where(text_steps, 1, 0)
            steps = text_steps + stop - start - inside
            visual_tile = start
        else:
            text_first = TEXT
            text_steps = num_text // KEYS
            steps = text_steps + inside
            visual_tile = inner_start
        for step in range(steps):
            of_text = step < text_steps
            tile = visual_tile + step - text_steps
            if masked:
                tile += tl.where(tile >= inner_start, inside, 0)
            keys = tl.where(of_text, text_first + step * KEYS, VISUAL + tile * KEYS) + tl.arange(0, KEYS)
            at_keys = keys[:, None] * (HEADS * DIM) + dims
            if masked:
                end = tl.where(of_text, TEXT + num_text, VISUAL + NUM_VISUAL)
                k_tile = tl.load(k + base + at_keys, mask=(keys < end)[:, None], other=0.0)
                v_tile = tl.load(v + base + at_keys, mask=(keys < end)[:, None], other=0.0)
            else:
                k_tile = tl.load(k + base + at_keys)
                v_tile = tl.load(v + base + at_keys)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
            if masked:
                # One unsigned comparison for least <= keys <= most, as `triton.softmax.within`
                width = tl.where(of_text, EVERYTHING, window)
                least = rows - width
                most = tl.minimum(rows + width, end - 1)
                offset = (keys[None, :] - least[:, None]).to(tl.uint32)
                scores = tl.where(offset <= (most - least).to(tl.uint32)[:, None], scores, UNSEEN)
            # `tl.max` and `tl.sum` are this; Triton's interpreter runs them only where all of Triton is interpreted
            tile_highest = tl.reduce(scores, 1, tl.standard._elementwise_max)
            new = tl.maximum(highest, tile_highest * SCALE)
            decay = tl.exp2(highest - new)
            weights = tl.exp2(scores * SCALE - new[:, None])
            values = values * decay[:, None]
            values = tl.dot(weights.to(v_tile.dtype), v_tile, values, input_precision="ieee")
            total = total * decay + tl.reduce(weights, 1, tl.standard._sum_combine)
            highest = new

    out += base
    if STACKED:
        out += tl.load(layer).to(tl.int64) * (BATCH * LENGTH * HEADS * DIM)
    tl.store(out + at_rows, (values / total[:, None]).to(out.dtype.element_ty), mask=exist)


def _interpret(programs: int, constants: dict[str, Any], *args: Any) -> np.ndarray:
    """Run the kernel in Triton's interpreter. The interpreter multiplies bfloat16 as integers: it gets float32 here."""
    arrays = [np.array(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype) for x in args]
    pointers = []
    for array in arrays:
        kind = tl.pointer_type(getattr(tl, array.dtype.name))
        pointers.append(tl.tensor(interpreter.TensorHandle(np.array([array.ctypes.data], np.uint64), kind), kind))
    run, builder = interpreter.InterpretedFunction(_arrow_attention.fn).rewrite(), interpreter.interpreter_builder
    with INTERPRETING, warnings.catch_warnings(action="ignore"):  # the largest of NaNs only
        patches = interpreter._patch_lang(run)
        try:
            # Its own takes the int of an array [1], which numpy 2.5 refuses
            patches.set_attr(tl.tensor, "__index__", lambda scalar: scalar.handle.data.item())
            builder.set_grid_dim(programs, 1, 1)
            for program in range(programs):
                builder.set_grid_idx(program, 0, 0)
                run(*pointers, pointers[-1], **constants)
        finally:
            patches.restore()
    return arrays[-1].astype(args[-1].dtype)
