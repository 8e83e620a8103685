"""Whole loops by plans at published shapes, compiled for several H200s: what is exchanged, and what stays."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from real_shapes import compile_planned

from dfa2_jax.parallel.dealing import BRANCHES
from dfa2_jax.parallel.mesh import DeviceMesh
from dfa2_jax.pipeline.components import call
from dfa2_jax.vae.image import AutoencoderConfig, AutoencoderKL
from pallas_kernels.inspect import aot
from pallas_kernels.inspect.hlo import collectives, uses_of_stacks

STEPS = """
%small (p.1: bf16[4,8]) -> bf16[4,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %one.1 = bf16[4,8]{1,0} all-to-all(%p.1), replica_groups=[2,4]<=[8], dimensions={0}
}
%large (p.2: bf16[4,8]) -> bf16[4,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %start.1 = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}) all-to-all-start(%p.2), replica_groups=mesh['r'=2,'t'=4] {'t'}
  %done.1 = bf16[4,8]{1,0} all-to-all-done(%start.1)
  ROOT %two = bf16[4,8]{1,0} all-to-all(%done.1), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}
%layers (s.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s.1), index=0
  %x.1 = bf16[4,8]{1,0} get-tuple-element(%s.1), index=1
  %y = bf16[4,8]{1,0} conditional(%i, %x.1, %x.1), branch_computations={%large, %small}
  ROOT %next = (s32[], bf16[4,8]{1,0}) tuple(%i, %y)
}
%steps (s.2: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s.2 = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %inner = (s32[], bf16[4,8]{1,0}) while(%s.2), condition=%c, body=%layers, TRIP_COUNT
}
ENTRY %main (x: bf16[4,8]) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %gathered = bf16[4,8]{1,0} all-gather(%x), replica_groups=mesh['r'=2,'t'=4] {'r'}, dimensions={0}
  %init = (s32[], bf16[4,8]{1,0}) tuple(%zero, %gathered)
  ROOT %outer = (s32[], bf16[4,8]{1,0}) while(%init), condition=%c, body=%steps
}"""
KNOWN = 'backend_config={"known_trip_count":{"n":"6"}}'


def test_exchanges_of_a_step_are_counted_in_the_branch_that_sends_most():
    gather, *swaps = collectives(STEPS.replace("TRIP_COUNT", KNOWN))
    assert gather[:1] + gather[2:] == ("all-gather", 2, 1, False) and gather.sent_bytes == 4 * 8 * 2 // 2
    assert [swap[:1] + swap[2:] for swap in swaps] == [("all-to-all", 4, 6, True)] * 2
    assert [swap.sent_bytes for swap in swaps] == [6 * 4 * 8 * 2 * 3 // 4] * 2


def test_exchanges_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match=r"inner exchanges bf16\[4,8\] an unknown number of times"):
        collectives(STEPS.replace(", TRIP_COUNT", ""))
    told = collectives(STEPS.replace(", TRIP_COUNT", ""), unknown=6)
    assert told == collectives(STEPS.replace("TRIP_COUNT", KNOWN))
    with pytest.raises(ValueError, match="gathered: exchanges of the kind all-reduce are not counted"):
        collectives(STEPS.replace("TRIP_COUNT", KNOWN).replace("all-gather", "all-reduce"))


def test_a_target_keeps_shares_of_arrays():
    """A CPU's devices stand for GPUs."""
    mesh = DeviceMesh.of(jax.devices()[:2], 1)
    share, whole = (jax.ShapeDtypeStruct((1, 1, 4), np.float32, sharding=where) for where in (mesh.memory, None))
    found = aot.Target("two", mesh.devices).abstract((share, whole, np.zeros(3)))
    assert [one.sharding for one in found] == [mesh.memory, mesh.whole, mesh.whole]


def shared(struct):
    """One device's shape of an array, as HLO writes it."""
    return f"bf16[{','.join(map(str, struct.sharding.shard_shape(struct.shape)))}]"


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "shape", "layers"), [("FLUX.1-dev", (1, 2), 19 + 38), ("SD3.5-large", (2, 2), 38)], ids=lambda x: str(x)
)
def test_devices_exchange_heads_and_keep_their_memory(name, shape, layers):
    rows, tokens = shape
    mesh, memory, compiled = compile_planned(name, 1024, rows * tokens)
    assert (mesh.rows, mesh.tokens) == shape
    leaves = jax.tree.leaves(memory)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // (rows * tokens)
    assert nbytes <= compiled.alias_bytes < 1.1 * nbytes, "of each device's share, and latents"

    stacks = {shared(leaf) for leaf in leaves}
    assert all(f"= {stack}" in compiled.hlo for stack in stacks), "not as they are looked for"
    made, reads = uses_of_stacks(compiled.hlo, stacks)
    assert made == {}, "a stack of memory is copied or made anew"
    assert max(reads.values()) == 1, "a block reads more than its own outputs"

    found = collectives(compiled.hlo)
    wanted = Counter({("all-to-all", tokens): 2 * layers})  # queries, keys and values; outputs
    wanted += Counter(("all-gather", count) for count in shape if count > 1)  # the prediction
    for in_loop in (False, True):  # the dense step, and one by a plan
        counts = Counter()
        for one in found:
            counts[one.kind, one.devices] += one.times if one.in_loop == in_loop else 0
        assert +counts == wanted

    kernels = re.findall(r'custom_call_target="(mosaic_gpu\w*)"', compiled.hlo)
    assert len(kernels) >= BRANCHES * len(leaves), "an arrow kernel for each number of heads"


@pytest.mark.aot
def test_two_devices_decode_an_image_in_little_more_than_half_of_the_memory():
    published = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
    config = AutoencoderConfig(**published, use_quant_conv=False, use_post_quant_conv=False)
    vae = nnx.eval_shape(lambda: AutoencoderKL(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

    def temp_bytes(devices):
        target = aot.target("h200", devices)
        mesh = DeviceMesh.of([*target.mesh.devices.flat], 1)
        target = aot.Target("h200", mesh.devices)
        graph, params = nnx.split(vae)
        lines = NamedSharding(mesh.devices, mesh.of_image((1, 128, 128, 16)))
        image = jax.ShapeDtypeStruct((1, 128, 128, 16), np.float32, sharding=lines)
        (params,) = target.abstract((params,))
        return aot.compile_for(target, call, graph, params, image, method="decode").temp_bytes

    assert temp_bytes(2) < 0.6 * temp_bytes(1)
