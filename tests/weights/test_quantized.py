"""Transformers whose blocks multiply in 8 bits: how far from 16, loaded, converted, planned, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dfa2_jax.pipeline.loaded
import dfa2_jax.sampling.loop as sampling
from dfa2_jax import Pipeline, Plan, PlanError, calibrate
from dfa2_jax.cli import convert, main
from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.nn import attention
from dfa2_jax.nn.attention import Planned
from dfa2_jax.nn.quantize import quantize
from dfa2_jax.nn.streams import Projections
from dfa2_jax.nn.weights import EightBits, Quantized
from dfa2_jax.sampling.loop import denoise_planned
from dfa2_jax.weights.dtypes import PRECISIONS
from dfa2_jax.weights.leaf import Block, Leaf
from dfa2_jax.weights.quantized import Place, quantized_leaves
from dfa2_jax.weights.verify import verify_folder
from pallas_kernels import Device
from pallas_kernels.passes import quantized_rows

CALL = {"height": 64, "width": 64, "max_sequence_length": 16, "progress": False}
FOLDERS = ["tiny_flux_dev", "tiny_sd35"]
NOISE = {"FluxPipeline": (1, 16, 64), "StableDiffusion3Pipeline": (1, 16, 8, 8)}

LARGEST_ERROR = {"float8": 0.05, "int8": 0.025, "int8_weights": 0.012}
"""Bounds of the velocity's error: 1.5 times what SD3.5's tiny model has. FLUX's has half of it."""


def velocity(pipeline, **more):
    """The velocity of one step, from equal noise."""
    noise = np.random.default_rng(0).standard_normal(NOISE[pipeline.pipeline_class]).astype(np.float32)
    call = CALL | {"num_inference_steps": 1, "latents": noise, "output_type": "latent"}
    return noise - pipeline("red", **call, **more).images


@pytest.fixture(scope="module")
def pipelines(request):
    """By folder and dtype, each loaded once."""
    loaded = {}

    def get(name, dtype):
        if (name, dtype) not in loaded:
            loaded[name, dtype] = Pipeline.from_pretrained(request.getfixturevalue(name), dtype=dtype)
        return loaded[name, dtype]

    return get


@pytest.mark.parametrize("name", FOLDERS)
def test_velocities_are_near_those_of_float32(name, pipelines):
    exact, errors = velocity(pipelines(name, None)), []
    for precision in PRECISIONS:
        ours = velocity(pipelines(name, precision))
        errors.append(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
        assert 1e-4 < errors[-1] < LARGEST_ERROR[precision]
    assert sorted(errors, reverse=True) == errors


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_converted_folder_is_what_is_quantised_while_it_is_loaded(precision, tiny_sd35, pipelines, tmp_path, capsys):
    folder = tmp_path / "converted"
    assert convert([str(tiny_sd35), str(folder), "--dtype", precision]) == 0
    pipeline = Pipeline.from_pretrained(folder)
    assert pipeline.precision == precision and precision in repr(pipeline)
    np.testing.assert_array_equal(velocity(pipeline), velocity(pipelines("tiny_sd35", precision)))
    assert verify_folder(folder) == []
    arrays = json.loads((folder / "config.json").read_text())["components"]["transformer"]["arrays"]
    kinds = {(name.split(".")[-3], entry["dtype"]) for name, entry in arrays.items() if name.endswith(".values")}
    modulations = set() if precision == "int8_weights" else {"linear"}
    eight = {"to_qkv", "to_out", "up", "down", *modulations}
    float8 = {"down"} if precision == "float8" else set()
    assert kinds == {(name, "float8_e4m3fn" if name in float8 else "int8") for name in eight}
    with pytest.raises(CheckpointError, match=f"a transformer in {precision}, not in bfloat16: leave dtype out"):
        Pipeline.from_pretrained(folder, dtype="bfloat16")
    assert Pipeline.from_pretrained(folder, dtype=precision).fingerprint == pipeline.fingerprint
    capsys.readouterr()
    arguments = ["--prompt", "red", "--height", "64", "--width", "64", "--steps", "1", "--max-sequence-length", "16"]
    assert main(["sample", str(folder), *arguments, "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out.count(".png") == 1


def test_projections_that_are_spared_change_nothing(pipelines, monkeypatch):
    """Heads that are computed land in their places; 8-bit weights are read in place, so a layer has all branches."""
    pipeline = pipelines("tiny_flux_dev", "float8")
    plan = Plan.full(pipeline.setting(prompt="red", height=64, width=64, max_sequence_length=16, num_inference_steps=4))
    for step, cached in enumerate(([0], [1, 2], [*range(plan.setting.num_heads)]), start=1):
        plan = plan.with_method(step, None, cached, "cached")
    parts, images = [], []

    class Counted(attention.ProjectionBranches):
        def counts(self, num_heads):
            parts.append(self.parts)
            return super().counts(num_heads)

    monkeypatch.setattr(attention, "ProjectionBranches", Counted)
    for skips in (True, False):
        monkeypatch.setattr(sampling, "Planned", lambda _, __, *in_place, skips=skips: Planned(None, skips, *in_place))
        denoise_planned.clear_cache()
        images.append(pipeline("red", plan=plan, progress=False, output_type="latent").images)
    denoise_planned.clear_cache()
    assert set(parts) == {6}
    np.testing.assert_allclose(*images, atol=2e-5)


def test_plans_are_of_a_precision_and_compile_nothing(pipelines, tmp_path):
    """Calibrated on the quantised model; another plan, with other heads, runs the same program."""
    pipeline, plain = pipelines("tiny_flux_dev", "float8"), pipelines("tiny_flux_dev", None)
    plan = calibrate(pipeline, ["red"], **CALL, num_inference_steps=3, delta=10.0, tiles=(16, 16))
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path).setting.precision == "float8" and '"precision": "float8"' in path.read_text()
    planned = pipeline("red", plan=plan, progress=False, output_type="latent")
    dense = pipeline("red", **CALL, num_inference_steps=3, output_type="latent").images
    error = np.linalg.norm(planned.images - dense) / np.linalg.norm(dense)
    assert 0 < error < 0.5
    half = plan.with_method(1, None, [0, 1], "cached").with_method(2, None, None, "full")
    compiled = denoise_planned._cache_size()
    pipeline("red", plan=half, progress=False, output_type="latent")
    assert denoise_planned._cache_size() == compiled
    with pytest.raises(PlanError, match="precision is float8 in the plan and None in the call: load the pipeline with"):
        plain("red", plan=plan, progress=False)


def quantised(module):
    """A copy with 8-bit weights: shapes by `quantize`, arrays by `quantized_leaves`."""
    _, plain = nnx.split(module)
    leaves = {}
    for path, variable in nnx.to_flat_state(plain):
        array = np.asarray(variable[...])
        blocks = [Block(f"layer {i}", i, lambda array=array, i=i: array[i : i + 1]) for i in range(len(array))]
        leaves[path] = Leaf(array.shape, array.dtype, blocks)
    abstract = nnx.eval_shape(lambda: module)
    return abstract, leaves


def stacked_projections(layers=2, width=64, heads=4):
    make = nnx.vmap(lambda rngs: Projections(width, heads, qk_norm=False, dtype=jnp.float32, rngs=rngs))
    return make(nnx.Rngs(0).split(layers))


@pytest.mark.parametrize("precision", ["int8", "int8_weights"])
def test_named_heads_are_the_columns_of_all(precision):
    module = nnx.Dict(attn=stacked_projections())
    abstract, leaves = quantised(module)
    made = quantize(abstract, precision)
    filled = quantized_leaves(leaves, made, abstract)
    graph, state = nnx.split(abstract)
    arrays = []
    for path, variable in nnx.to_flat_state(state):
        if path in filled:
            array = np.concatenate([block.read() for block in filled[path].blocks])
        else:
            array = np.arange(variable.shape[0], dtype=np.int32)
        arrays.append((path, variable.replace(jnp.asarray(array))))
    whole = nnx.merge(graph, nnx.from_flat_state(arrays)).attn
    whole.to_qkv.weight.layer = Place(jnp.int32(1))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 64)), jnp.float32)
    every, some = whole.qkv(x), whole.qkv(x, jnp.array([3, 1], jnp.int32))
    every, some = (jnp.split(projected.heads, 3, axis=2) for projected in (every, some))
    for all_heads, named in zip(every, some, strict=True):
        np.testing.assert_array_equal(np.asarray(named), np.asarray(all_heads)[:, :, [3, 1]])
    kernels = [getattr(module.attn, name).weight.kernel[1] for name in ("to_q", "to_k", "to_v")]
    for ours, kernel in zip(every, kernels, strict=True):
        exact = np.asarray(x @ kernel).reshape(2, 5, 4, 16)
        assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) < 0.015


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_rows_have_the_largest_value_and_no_nan(dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 256)) * 1e4, jnp.bfloat16)
    x = x.at[0, 0].set(0).at[1, 1, 7].set(jnp.finfo(jnp.bfloat16).max)
    values, scale = quantized_rows(x, jnp.dtype(dtype))
    back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)[..., None]
    exact = np.asarray(x, np.float64)
    assert values.dtype == dtype and np.isfinite(back).all() and not back[0, 0].any()
    most = np.abs(exact).max(-1, keepdims=True)
    np.testing.assert_allclose(np.abs(back).max(-1, keepdims=True), most, rtol=1e-6)
    assert (np.abs(back - exact) <= (0.004 if dtype == "int8" else 0.036) * most + 1e-30).all()


def test_a_hidden_value_cannot_exceed_its_bound():
    """Not even where a token lies along a row of the weights."""
    rng = np.random.default_rng(0)
    weight = Quantized(2, 128, 256, dtype=jnp.int8, out_dtype=jnp.float32, weights_alone=False)
    rows = jnp.asarray(rng.standard_normal((2, 256, 128)), jnp.float32)
    weight.values[...], weight.scale[...] = quantized_rows(rows, jnp.int8)
    weight.length[...] = jnp.linalg.norm(rows, axis=2).max(axis=1)
    weight.layer = Place(jnp.int32(1))
    longest = int(jnp.linalg.norm(rows[1], axis=1).argmax())
    x = jnp.stack([rows[1, longest], rows[1, 0] * 0.1])[None]
    activations = EightBits(*quantized_rows(x, jnp.int8), jnp.linalg.norm(x, axis=2).max(axis=1))
    hidden = weight.gelu(activations, None, jnp.float8_e4m3fn)
    assert isinstance(hidden, EightBits)
    assert 448 / 1.25 < np.abs(np.asarray(hidden.values, np.float32)).max() < 448
    exact = np.asarray(jax.nn.gelu(x @ rows[1].T, approximate=True))
    back = np.asarray(hidden.values, np.float32) * np.asarray(hidden.scale)[..., None]
    assert np.linalg.norm(back - exact) / np.linalg.norm(exact) < 0.04


def test_weights_that_are_not_finite_are_named():
    abstract, leaves = quantised(nnx.Dict(attn=stacked_projections()))
    path = ("attn", "to_k", "weight", "kernel")
    bad = np.asarray(leaves[path].blocks[1].read()).copy()
    bad[0, 3, 5] = np.inf
    leaves[path].blocks[1] = Block("model.safetensors: to_k.weight", 1, lambda: bad)
    filled = quantized_leaves(leaves, quantize(abstract, "int8"), abstract)
    with pytest.raises(CheckpointError, match=r"model.safetensors: to_k.weight holds NaN or infinity"):
        filled["attn", "to_qkv", "weight", "scale"].blocks[1].read()


def test_files_that_cannot_be_are_refused(tiny_flux_dev, tmp_path):
    folder = tmp_path / "converted"
    convert_checkpoint(tiny_flux_dev, folder, dtype="int8")
    scale = next(folder.rglob("*.weight.scale.value/0.0"))
    scale.write_bytes(bytes(scale.stat().st_size))
    with pytest.raises(CheckpointError, match="scale.value holds scales that are not positive"):
        Pipeline.from_pretrained(folder, verify=False)
    config = json.loads((folder / "config.json").read_text())
    del config["digest"]
    config["precision"] = "int4"
    (folder / "config.json").write_text(json.dumps(config | {"digest": digest_of(config)}))
    with pytest.raises(CheckpointError, match="precision='int4'"):
        Pipeline.from_pretrained(folder)


def test_a_gpu_without_float8_says_int8(tiny_flux_dev, monkeypatch):
    old = Device(name="NVIDIA A100-SXM4-80GB", capability=8.0)
    monkeypatch.setattr(dfa2_jax.pipeline.loaded.Device, "current", lambda: old)
    with pytest.raises(ValueError, match=r"capability 8.9 \(Ada, Hopper\), this one has 8.0: use dtype='int8'"):
        Pipeline.from_pretrained(tiny_flux_dev, dtype="float8")
    with pytest.raises(
        ValueError, match="dtype='float4' is none of float32, bfloat16, float16, float8, int8, int8_wei"
    ):
        Pipeline.from_pretrained(tiny_flux_dev, dtype="float4")


def test_t5_may_have_weights_of_8_bits(tiny_sd35, pipelines, tmp_path, capsys):
    """A converted folder's, too, whatever its transformer is in; CLIPs stay as they are."""
    plain = pipelines("tiny_sd35", None)
    small = Pipeline.from_pretrained(tiny_sd35, text_encoder_dtype="int8_weights")
    texts = [["a red circle"]] * 3
    (exact, pooled), (ours, same) = ((x.text, x.pooled) for x in (one.encode_prompt(texts) for one in (plain, small)))
    clip = pipelines("tiny_sd35", None).networks.config("text_encoder").max_position_embeddings
    np.testing.assert_array_equal(same, pooled)
    np.testing.assert_array_equal(ours[:, :clip], exact[:, :clip])
    t5, wanted = np.asarray(ours[:, clip:], np.float64), np.asarray(exact[:, clip:], np.float64)
    assert 1e-4 < np.linalg.norm(t5 - wanted) / np.linalg.norm(wanted) < 0.02
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(small.networks["text_encoder_3"].params)}
    assert kinds == {"int8", "int32", "float32"}
    folder = tmp_path / "converted"
    convert_checkpoint(tiny_sd35, folder, dtype="int8")
    both = Pipeline.from_pretrained(folder, text_encoder_dtype="int8_weights")
    np.testing.assert_array_equal(both.encode_prompt(texts).text, ours)
    arguments = ["--prompt", "red", "--height", "64", "--width", "64", "--steps", "1", "--max-sequence-length", "16"]
    arguments += ["--text-encoder-dtype", "int8_weights", "--out", str(tmp_path), "--quiet"]
    assert main(["sample", str(tiny_sd35), *arguments]) == 0
    image = capsys.readouterr().out.strip()
    assert main(["again", image, "--out", str(tmp_path / "again.png"), "--quiet"]) == 0
    with pytest.raises(
        ValueError, match="text_encoder_dtype='int8' is none of float32, bfloat16, float16, int8_weights"
    ):
        Pipeline.from_pretrained(tiny_sd35, text_encoder_dtype="int8")
