"""A new family is one registry call: it samples, calibrates, saves a plan and samples by it."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from toy_family.family import ToyFamily
from toy_family.transformer import ToyConfig, ToyTransformer

from dfa2_jax import CheckpointError, Pipeline, Plan, calibrate, convert_checkpoint
from dfa2_jax.families import registry

CONFIG = {
    "in_channels": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 12,
}  # fmt: skip
CALL = {"height": 64, "width": 96, "num_inference_steps": 4}


@pytest.fixture(scope="module", autouse=True)
def known():
    registry.register(ToyFamily)
    yield
    del registry.FAMILIES[ToyFamily.pipeline_class]


def write_safetensors(path, arrays):
    """The format's own words: a JSON header with offsets, then the bytes."""
    header, offset = {}, 0
    for name, array in arrays.items():
        span = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in arrays.values()))


def torch_arrays(model):
    """Parameters of a model under the keys and in the layouts of torch, block by block."""
    arrays = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        key, value = ".".join(map(str, path)), np.asarray(leaf[...], np.float32)
        key = key.replace("weight.kernel", "weight").replace("norm_q.scale", "norm_q.weight")
        key = key.replace("norm_k.scale", "norm_k.weight")
        turn = (lambda x: np.ascontiguousarray(x.T)) if key.endswith("weight") else np.ascontiguousarray
        if key.startswith("blocks."):
            arrays |= {key.replace("blocks.", f"blocks.{i}.", 1): turn(block) for i, block in enumerate(value)}
        else:
            arrays[key] = turn(value)
    return arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As diffusers' `save_pretrained` would write it."""
    folder = tmp_path_factory.mktemp("toy")
    index = {"_class_name": "ToyPipeline", "transformer": ["toy", "ToyModel"], "scheduler": ["toy", "ToyScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for name, file, content in (
        ("transformer", "config.json", CONFIG),
        ("scheduler", "scheduler_config.json", {"kind": "two step"}),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(json.dumps(content))
    model = ToyTransformer(ToyConfig.from_json(CONFIG), dtype=np.float32, rngs=nnx.Rngs(0))
    write_safetensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", torch_arrays(model))
    return folder


def test_the_toy_s_own_solver_and_tokens_run_in_the_loop(folder):
    """Against a loop in NumPy over the model's forward."""
    pipeline = Pipeline.from_pretrained(folder)
    noise = np.random.default_rng(0).standard_normal((1, 4, 8, 12)).astype(np.float32)
    got = pipeline("red", **CALL, latents=noise, output_type="latent", progress=False).images

    from dfa2_jax.options import Options
    from dfa2_jax.sampling.sinusoid import sinusoid

    call = pipeline.prepare(Options(prompt="red", latents=noise, output_type="latent", **CALL))
    model = nnx.merge(pipeline.transformer.graph, pipeline.transformer.params)
    x, last = noise.transpose(0, 3, 2, 1).reshape(1, -1, 4), None
    for sigma, following in zip(call.schedule.sigmas[:-1], call.schedule.sigmas[1:], strict=True):
        velocity = np.asarray(model(x, sinusoid(np.float32([1000 * sigma])), call.inputs.conditions)[0])
        ahead = velocity if last is None else 1.5 * velocity - 0.5 * last
        x, last = x + (following - sigma) * ahead, velocity
    want = x.reshape(1, 12, 8, 4).transpose(0, 3, 2, 1)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_solver_of_its_own_is_no_plan_of_steps(folder):
    with pytest.raises(ValueError, match="a plan of steps moves x as Euler's steps do. Pass delta="):
        calibrate(Pipeline.from_pretrained(folder), ["red"], **CALL)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_toy_calibrates_and_samples_by_its_plan(folder, tmp_path, scale):
    pipeline, arguments = Pipeline.from_pretrained(folder), CALL | {"guidance_scale": scale}
    plan = calibrate(pipeline, ["red", "blue"], **arguments, delta=1.0, windows=(4,), tiles=(4, 4), progress=False)
    assert plan.density((4, 4)) < 1
    plan.save(tmp_path / "plan.json")
    options = {"output_type": "latent", "progress": False}
    dense = pipeline("green", **arguments, **options).images
    planned = pipeline("green", plan=Plan.load(tmp_path / "plan.json"), guidance_scale=scale, **options).images
    full = pipeline("green", plan=Plan.full(plan.setting), guidance_scale=scale, **options).images
    np.testing.assert_array_equal(full, dense)
    moved = np.linalg.norm(planned - dense) / np.linalg.norm(dense)
    assert 0 < moved < 0.5


def test_the_toy_converts(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "converted", "bfloat16")
    pipeline = Pipeline.from_pretrained(tmp_path / "converted")
    assert pipeline.fingerprint == Pipeline.from_pretrained(folder).fingerprint
    kernel = jax.tree.leaves(pipeline.transformer.params)[0]
    np.testing.assert_array_equal(kernel, np.asarray(kernel).astype(ml_dtypes.bfloat16).astype(np.float32))


def test_what_the_toy_refuses_is_refused(folder, tmp_path):
    pipeline = Pipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="no skip-layer guidance"):
        pipeline("red", skip_guidance_layers=[1], **CALL, output_type="latent")
    with pytest.raises(ValueError, match="no pooled text"):
        embeds = {"prompt_embeds": np.zeros((1, 8, 12)), "pooled_prompt_embeds": np.zeros((1, 3))}
        pipeline(**embeds, **CALL, output_type="latent")
    other = tmp_path / "other"
    (other / "scheduler").mkdir(parents=True)
    (other / "model_index.json").write_text((folder / "model_index.json").read_text())
    (other / "transformer").symlink_to(folder / "transformer")
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps({"kind": "euler"}))
    with pytest.raises(CheckpointError, match="kind='euler' is not 'two step'"):
        Pipeline.from_pretrained(other)


def test_a_class_that_is_no_family_is_refused():
    with pytest.raises(TypeError, match=r"Half lacks \['cfg_scale', 'check', .* of families.base.Family"):
        registry.register(type("Half", (), {"pipeline_class": "HalfPipeline"}))
    assert "HalfPipeline" not in registry.FAMILIES


def test_a_family_without_clip_refuses_clip_skip(folder):
    with pytest.raises(ValueError, match="clip_skip=1, but a ToyPipeline has no CLIP encoder"):
        Pipeline.from_pretrained(folder).encode_prompt([["a"]], clip_skip=1)
