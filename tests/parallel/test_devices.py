"""`Pipeline.from_pretrained(folder, devices=...)`: the same images, and errors before any work."""

import jax
import numpy as np
import pytest

from dfa2_jax import Method, Pipeline, Plan, calibrate
from dfa2_jax.calibration.attends import moments
from dfa2_jax.calibration.attention_share import StepShares
from dfa2_jax.calibration.heads import HeadRuns
from dfa2_jax.nn.attention import Dense, Planned
from dfa2_jax.options import Options
from dfa2_jax.parallel.mesh import DeviceMesh, devices_named
from dfa2_jax.pipeline.components import Component
from pallas_kernels import Device

CALL = {
    "prompt": ["a red box", "two green balls"],
    "height": 48,
    "width": 80,
    "num_inference_steps": 3,
    "max_sequence_length": 13,
    "output_type": "latent",
    "progress": False,
}
GUIDED = {"guidance_scale": 4.0, "negative_prompt": "fog"}
SKIPPING = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}


CALIBRATION = {name: value for name, value in CALL.items() if name not in ("prompt", "output_type")} | GUIDED


def close(x, wanted):
    x, wanted = np.asarray(x, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(x - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.fixture(scope="module")
def sd35(tiny_sd35):
    return [Pipeline.from_pretrained(tiny_sd35, devices=devices) for devices in (None, 4)]


def test_skip_layer_guidance_and_callbacks_see_nothing_of_devices(sd35):
    def halved(pipeline, step, timestep, shown):
        return {"latents": shown["latents"] * 0.5} if step == 1 else None

    one, many = (x(**CALL | GUIDED | SKIPPING, callback_on_step_end=halved).images for x in sd35)
    close(many, one)


def test_devices_share_images_when_the_batch_is_odd(sd35):
    call = CALL | GUIDED | {"prompt": ["a red box", "two green balls", "a tree"]}
    one, many = (x(**call).images for x in sd35)
    close(many, one)


def test_a_plan_is_the_same_file_on_any_number_of_devices(sd35, tmp_path):
    one, many = sd35
    setting = one.setting(**CALL | GUIDED)
    assert setting == many.setting(**CALL | GUIDED)
    full = Plan.full(setting)
    choices = np.random.default_rng(0).integers(0, 3, full.choices.shape).astype(np.uint8)
    choices[0] = 0
    plan = Plan(setting, (*full.methods, Method("cached"), Method.arrow(4)), choices)
    plan.save(tmp_path / "plan.json")
    close(many(**CALL | GUIDED, plan=Plan.load(tmp_path / "plan.json")).images, one(**CALL | GUIDED, plan=plan).images)


@pytest.mark.parametrize(
    "budget",
    [
        {"speedup": 1.5, "heads": "full"},
        {"speedup": 1.3, "heads": "only", "windows": (4,), "tiles": (8, 8), "attention_share": 1.0},
        {"delta": 0.4, "windows": (4,), "tiles": (8, 8), "attention_chunk": 2},
        pytest.param({"delta": 0.4}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_calibration_on_several_devices_finds_the_plan_of_one(sd35, budget):
    one, many = (calibrate(x, CALL["prompt"], **CALIBRATION, **budget) for x in sd35)
    np.testing.assert_array_equal(one.choices, many.choices)
    assert one.nodes == many.nodes and one.methods == many.methods
    np.testing.assert_allclose(one.coefficients, many.coefficients, rtol=1e-4, atol=1e-5)
    assert budget.get("heads") == "full" or (one.choices > 0).any()
    if "delta" in budget:
        np.testing.assert_allclose(one.calibration.errors, many.calibration.errors, rtol=1e-4, atol=1e-6)


def test_heads_of_one_prompt_are_measured_where_its_tokens_are_whole(tiny_flux_schnell):
    """Two devices share its 15 visual tokens and pad them, which no error may see."""
    call = {**CALIBRATION, "guidance_scale": 0.0, "delta": 0.4, "windows": (2,), "tiles": (8, 8)}
    del call["negative_prompt"]
    plans = [
        calibrate(Pipeline.from_pretrained(tiny_flux_schnell, devices=n), ["a red box"], **call) for n in (None, 2)
    ]
    np.testing.assert_array_equal(*(plan.choices for plan in plans))
    np.testing.assert_allclose(*(plan.calibration.errors for plan in plans), rtol=1e-4, atol=1e-6)


def test_a_program_sees_one_mesh(sd35):
    """cuDNN's attention refuses two. Weights are loaded for a mesh that shares tokens; this call's has four rows."""
    _, many = sd35
    call = many.prepare(Options(**CALL | GUIDED))
    given = call.params, call.put(call.inputs), call.start(Planned(), call.mesh).memory
    assert {x.sharding.mesh for x in jax.tree.leaves(given)} == {call.mesh.devices}
    before, after = (jax.tree.leaves(x) for x in (many.transformer.params, call.params))
    assert {x.sharding.mesh for x in before} != {call.mesh.devices}
    for x, y in zip(before, after, strict=True):
        pointers = [[shard.data.unsafe_buffer_pointer() for shard in z.addressable_shards] for z in (x, y)]
        assert pointers[0] == pointers[1]


def test_a_loop_over_devices_compiles_once(tiny_sd35, bars):
    """The first step's latents lie where those of later ones do."""
    many = Pipeline.from_pretrained(tiny_sd35, devices=4)
    many(**CALL | GUIDED | {"progress": True, "num_inference_steps": 4})
    assert dict(bars)["denoise"] == 0


def test_each_device_tries_every_method_on_its_own_prompts(sd35, monkeypatch):
    seen = []

    def watched(candidates, dense, unpadded):
        seen.append(len(dense))
        return moments(candidates, dense, unpadded)

    monkeypatch.setattr("dfa2_jax.calibration.attends.moments", watched)
    calibrate(sd35[1], CALL["prompt"], **CALIBRATION, delta=0.4, windows=(2,), tiles=(8, 8))  # traced here alone
    assert {*seen} == {1}  # of two prompts and both sides of guidance


def test_torch_rounding_rounds_on_every_device(tiny_flux_dev):
    options = {"dtype": "bfloat16", "torch_rounding": True}
    call = CALL | {"prompt": "a red box"}
    one, many = (
        np.asarray(Pipeline.from_pretrained(tiny_flux_dev, devices=n, **options)(**call).images) for n in (None, 2)
    )
    assert np.linalg.norm(one - many) < 0.02 * np.linalg.norm(one)
    np.testing.assert_array_equal(many.astype(jax.numpy.bfloat16).astype(np.float32), many)


@pytest.mark.parametrize(("height", "share"), [(48, 6), (64, 2)])
def test_images_leave_the_vae_as_on_one_device(sd35, height, share, monkeypatch):
    """Four devices have no equal shares of 6 lines of latents; of 8 they have."""
    decoded, run = [], Component.__call__

    def watched(self, *args, **options):
        decoded.extend(args if options.get("method") == "decode" else ())
        return run(self, *args, **options)

    monkeypatch.setattr(Component, "__call__", watched)
    one, many = (x(**CALL | {"output_type": "np", "height": height}).images for x in sd35)
    np.testing.assert_allclose(many, one, atol=1e-4)
    alone, shared = decoded[0], decoded[-1]
    assert isinstance(alone, np.ndarray) and len(shared.devices()) == 4
    assert shared.sharding.shard_shape(shared.shape)[1] == share


def test_weights_lie_whole_on_every_device(sd35):
    _, many = sd35
    for leaf in jax.tree.leaves(many.transformer.params):
        assert len(leaf.devices()) == 4 and leaf.is_fully_replicated


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_weights_and_compute_the_same(tiny_sd35, sd35, devices):
    many = Pipeline.from_pretrained(tiny_sd35, devices=devices, shard_weights=True)
    leaves = jax.tree.leaves(many.transformer.params)
    shared = [x for x in leaves if not x.is_fully_replicated]
    assert sum(x.size for x in shared) > 0.8 * sum(x.size for x in leaves)
    assert all(x.addressable_shards[0].data.size * devices == x.size for x in shared)
    close(many(**CALL | GUIDED).images, sd35[0](**CALL | GUIDED).images)
    t5 = jax.tree.leaves(many.networks["text_encoder_3"].params)
    assert sum(not x.is_fully_replicated for x in t5) > len(t5) / 3


def test_heads_are_measured_with_whole_weights_alone(tiny_sd35):
    many = Pipeline.from_pretrained(tiny_sd35, devices=2, shard_weights=True)
    with pytest.raises(ValueError, match="heads='full'"):
        calibrate(many, ["a red box"], speedup=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "needs several devices"), ({"devices": 2, "dtype": "int8"}, "not of int8: choose one of both")],
)
def test_weights_that_nobody_can_share_are_refused_before_they_are_read(tiny_sd35, options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tiny_sd35, shard_weights=True, **options)


@pytest.mark.parametrize("devices", [0, 9, -1, True, "two", "", []])
def test_devices_that_are_not_there_are_named_before_any_work(tmp_path, devices):
    with pytest.raises(ValueError, match="devices=.*cpu:7|devices=.*id=7"):
        devices_named(devices)


def test_a_device_twice_is_refused():
    with pytest.raises(ValueError, match="different ones"):
        devices_named([jax.devices()[0]] * 2)


@pytest.mark.parametrize(("devices", "count"), [(None, 0), (3, 3), ("all", 8)])
def test_devices_are_a_number_or_all(devices, count):
    assert devices_named(devices) == tuple(jax.devices()[:count])
    assert devices_named(jax.devices()[2:4]) == tuple(jax.devices()[2:4])


def test_one_other_device_runs_everything_there(tiny_flux_schnell):
    pipeline = Pipeline.from_pretrained(tiny_flux_schnell, devices=[jax.devices()[3]])
    call = CALL | {"prompt": "a red box"}
    close(pipeline(**call).images, Pipeline.from_pretrained(tiny_flux_schnell)(**call).images)
    assert {d.id for x in jax.tree.leaves(pipeline.transformer.params) for d in x.devices()} == {3}


def test_more_devices_than_heads_are_refused(tiny_flux_schnell):
    pipeline = Pipeline.from_pretrained(tiny_flux_schnell, devices=8)
    with pytest.raises(ValueError, match="8 devices, a batch of 1: 8 would share 4 heads"):
        pipeline(**CALL | {"prompt": "a red box"})


def test_an_own_attend_is_refused(sd35):
    with pytest.raises(ValueError, match="runs on one device, not on 4"):
        sd35[1](**CALL, attend=Dense())


def test_memory_is_counted_per_device(sd35, monkeypatch):
    one, many = sd35
    heads = {"delta": None, "speedup": 1.5, "heads": "only", "attention_share": 1.0, "windows": (4,), "tiles": (8, 8)}
    sizes = [x.prepare(Options(**CALL | GUIDED)).memory_shapes() for x in sd35]
    whole = sum(x.size * 4 for x in sizes[0].values())
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: 2 * whole // max(1, len(devices)) - 1)
    for pipeline, words in ((one, "images of"), (many, "on each of 4 devices")):
        with pytest.raises(MemoryError, match=words):
            calibrate(pipeline, CALL["prompt"], **CALIBRATION, **heads)
    room = {0: 2 * whole, 4: 2 * whole // 4}
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: room[len(devices)])
    call = many.prepare(Options(**CALL | GUIDED))
    HeadRuns(call, (), StepShares(1.0, 0.0), (8, 8)).check_memory()
    plan = Plan.full(many.setting(**CALL | GUIDED))
    monkeypatch.setattr("dfa2_jax.sampling.memory.free_bytes", lambda devices: 1000)
    with pytest.raises(MemoryError, match="on each of 4 devices"):
        many(**CALL | GUIDED, plan=plan)


def test_one_of_several_gpus_runs_a_program_of_its_own(sd35, monkeypatch):
    """Kernels that XLA cannot split are chosen there, too."""
    one, _ = sd35
    options = Options(**CALL | GUIDED)
    assert one.prepare(options).mesh is None
    wanted = one(**CALL | GUIDED).images
    monkeypatch.setattr("dfa2_jax.pipeline.call.gpu_kind", lambda: "cuda")
    mesh = one.prepare(options).mesh
    assert mesh is not None and mesh.devices.size == 1
    np.testing.assert_array_equal(one(**CALL | GUIDED).images, wanted)


def test_a_kernel_inside_a_mesh_has_one_device():
    counts = []

    def body(x):
        counts.append(Device.current().count)
        return x

    mesh = DeviceMesh.of(jax.devices()[:4], 2)
    jax.jit(jax.shard_map(body, mesh=mesh.devices, in_specs=mesh.whole.spec, out_specs=mesh.whole.spec))(np.zeros(4))
    assert counts[-1] == 1 and Device.current().count == jax.device_count() == 8
    with jax.set_mesh(mesh.devices):
        assert Device.current().count == 4
