"""Backends: a new one takes one call, and each does what the protocol says."""

import inspect
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import draw

from pallas_kernels import CACHED, Layout, arrow_attention, arrow_implementation, nested_arrow_attention, register
from pallas_kernels.backends import base, registry
from pallas_kernels.backends.reference import attention
from pallas_kernels.devices import PREFERENCE, choose

LAYOUT = Layout(3, 17, text_first=True)
COMPUTES = {"arrow": base.ComputesArrows, "nested": base.ComputesNested, "dense": base.ComputesDense}


class Toy:
    """Arrows and nested windows of float32, by the plain mask."""

    interpretable = False

    def __init__(self):
        self.problems = []

    def lacks(self, problem, device):
        assert isinstance(device, base.Device)
        return None if problem.dtype == jnp.float32 else f"a toy has no {problem.dtype.name}"

    def arrow(self, problem, *, interpret):
        self.problems.append(problem)
        return attention(problem.q, problem.k, problem.v, problem.windows, problem.layout, problem.cache)

    def nested(self, problem, half_windows, *, interpret):
        self.problems.append(problem)
        windows = [*half_windows, jnp.int32(-1)]
        return jnp.stack([attention(problem.q, problem.k, problem.v, w[None], problem.layout, None) for w in windows])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))  # the test's registrations end with it
    backend = Toy()
    register("mine", backend)
    return backend


def test_one_call_adds_a_backend(toy):
    q, k, v, cache = (draw((2, LAYOUT.length, 2, 8), seed) for seed in range(4))
    windows, order = jnp.array([CACHED, 4], jnp.int32), jnp.array([1, 0], jnp.int32)
    options = {"layout": LAYOUT, "cache": cache, "head_order": order}
    got = jax.jit(lambda w: arrow_attention(q, k, v, w, **options, implementation="mine"))(windows)
    np.testing.assert_allclose(got, arrow_attention(q, k, v, windows, **options), atol=1e-6)
    (problem,) = toy.problems
    assert problem.operation == "arrow" and problem.layout == LAYOUT
    assert problem.cache.shape == cache.shape and problem.head_order.shape == order.shape and problem.layer is None

    ladder = jnp.array([1, 6], jnp.int32)
    one_head = [x[:, :, :1] for x in (q, k, v)]
    got = nested_arrow_attention(*one_head, ladder, layout=LAYOUT, implementation="mine")
    np.testing.assert_allclose(got, nested_arrow_attention(*one_head, ladder, layout=LAYOUT), atol=1e-6)
    assert [problem.operation for problem in toy.problems] == ["arrow", "nested"]


@pytest.mark.usefixtures("toy")
def test_a_backend_refuses_with_its_own_reason():
    q, window = draw((1, LAYOUT.length, 1, 8), dtype=jnp.bfloat16), jnp.ones(1, jnp.int32)
    for call in (arrow_attention, nested_arrow_attention):
        with pytest.raises(NotImplementedError, match="'mine': a toy has no bfloat16; pass implementation='blockwise'"):
            call(q, q, q, window, layout=LAYOUT, implementation="mine")


@pytest.mark.usefixtures("toy")
def test_what_a_backend_has_no_method_for_is_refused():
    q = draw((1, LAYOUT.length, 1, 8))
    with pytest.raises(NotImplementedError, match="'mine' computes arrows; for dense attention pass None"):
        arrow_attention(q, q, q, layout=LAYOUT, implementation="mine")
    with pytest.raises(ValueError, match="interpret=True is for the kernels.*'triton'.*not 'mine'"):
        arrow_attention(q, q, q, jnp.ones(1, jnp.int32), layout=LAYOUT, implementation="mine", interpret=True)
    with pytest.raises(ValueError, match="'yours' is not one of .*'mine'"):
        arrow_attention(q, q, q, layout=LAYOUT, implementation="yours")


@pytest.mark.usefixtures("toy", "no_shape_checks")
def test_only_backends_are_registered():
    with pytest.raises(ValueError, match="'yours' must have `interpretable` and `lacks`.*got <class .object.>"):
        register("yours", object)


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_every_backend_satisfies_the_protocol(name):
    """`isinstance` sees the names of methods alone; here are their arguments and types."""
    backend = registry.backend_named(name)
    computed = [operation for operation, protocol in COMPUTES.items() if isinstance(backend, protocol)]
    assert computed, f"{name} computes nothing"
    assert isinstance(backend.interpretable, bool)
    for method in ("lacks", *computed):
        protocol = getattr(COMPUTES[computed[0] if method == "lacks" else method], method)
        _, *wanted = map(str, inspect.signature(protocol).parameters.values())  # without self
        assert [*map(str, inspect.signature(getattr(backend, method)).parameters.values())] == wanted


def test_the_last_choice_can_do_everything_anywhere():
    assert PREFERENCE.keys() == COMPUTES.keys() == {*get_args(base.Operation)}
    for operation, names in PREFERENCE.items():
        assert all(isinstance(registry.backend_named(name), COMPUTES[operation]) for name in names)
        token = jax.ShapeDtypeStruct((1, 1, 1, 7), jnp.float64)
        problem = base.Problem(operation=operation, q=token, k=token, v=token, layout=Layout(0, 1, True))
        assert registry.backend_named(names[-1]).lacks(problem, base.Device(name="anything")) is None


def test_a_backend_that_cannot_be_imported_is_passed_over(monkeypatch):
    """A default exists where files are missing, and a call by name says which."""
    gone = dict(registry.BACKENDS) | {"mosaic": "pallas_kernels.backends.gone:Gone"}
    monkeypatch.setattr(registry, "BACKENDS", gone)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        choice = arrow_implementation(jnp.bfloat16, 64)
    assert choice.implementation == "triton" and "'mosaic' cannot be imported: No module named" in choice.why
    q = draw((1, LAYOUT.length, 1, 64))
    with pytest.raises(ImportError, match="backends.gone"):
        arrow_attention(q, q, q, jnp.ones(1, jnp.int32), layout=LAYOUT, implementation="mosaic")


class Everywhere(Toy):
    """Lacks nothing, and is the fastest on GPUs of one generation."""

    def lacks(self, problem, device):
        return None

    def merit(self, problem, device):
        return "for Ampere" if device.generation == "ampere" else None


@pytest.mark.parametrize(("gpu", "chosen"), [("NVIDIA A100-SXM4-80GB", "mine"), ("NVIDIA H200", "blockwise")])
def test_a_backend_says_itself_where_it_is_the_default(gpu, chosen, toy, monkeypatch):
    register("mine", Everywhere())
    monkeypatch.setitem(PREFERENCE, "arrow", ("mine", "blockwise"))
    token = jax.ShapeDtypeStruct((1, 1, 1, 64), jnp.bfloat16)
    problem = base.Problem(operation="arrow", q=token, k=token, v=token, layout=Layout(0, 1, True))
    why = {"mine": "for Ampere", "blockwise": "'mine' is slower here"}
    assert choose(problem, base.Device(name=gpu)) == (chosen, why[chosen])
    register("mine", Toy())  # one that declares nothing is the default wherever it lacks nothing
    missing = choose(problem, base.Device(name=gpu))
    assert missing == ("blockwise", "a toy has no bfloat16")
