"""Training the model in the box, in small: it learns and resumes exactly, and diffusers reads what it exports."""

import json
from importlib import import_module

import jax
import numpy as np
import pytest

from dfa2_jax import Pipeline, Plan
from dfa2_jax.families.registry import open_checkpoint

pytest.importorskip("toy", reason="toy/ is beside the tests in a checkout alone")
checkpoint = import_module("toy.checkpoint")
flow = import_module("toy.flow")
model = import_module("toy.model")
networks = import_module("toy.networks")
result = import_module("toy.result")
scenes = import_module("toy.scenes")
stages = import_module("toy.stages")
train = import_module("toy.train")

# Exporting needs diffusers; and one environment is enough for a script of the repository, which takes a minute.
pytestmark = [pytest.mark.long, pytest.mark.checkout, pytest.mark.torch]

STEPS = 40
CAPTION = "a large red circle on the left of a blue background"


def smoke(out, **options):
    return train.train(stages.PRESETS["smoke"](), out, unit="steps", total=STEPS, warm_up=4, quiet=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A state and the progress that led there, in one slice."""
    return smoke(tmp_path_factory.mktemp("whole"))


def test_losses_fall(whole):
    _, progress = whole
    assert progress.calls == {"vae": 16, "16 tokens": 24}
    for stage in progress.calls:
        losses = [entry["loss"] for entry in progress.log if entry["stage"] == stage]
        assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses


def test_two_slices_are_one_bit_for_bit(whole, tmp_path):
    smoke(tmp_path, amount=23)
    state, progress = smoke(tmp_path)
    want, at_once = whole
    assert progress.slices == 2
    assert [entry["loss"] for entry in progress.log] == [entry["loss"] for entry in at_once.log]
    ours, theirs = checkpoint.named(state), checkpoint.named(want)
    assert ours.keys() == theirs.keys() and len(ours) > 500
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_another_unit_is_refused(whole, tmp_path):
    checkpoint.save(tmp_path, *whole)
    with pytest.raises(ValueError, match="counts steps from seed 0, not seconds"):
        train.train(stages.PRESETS["smoke"](), tmp_path, unit="seconds", total=1.0, quiet=True)


def test_schedule():
    planned = stages.PRESETS["gpu"]()
    assert sum(stage.share for stage in planned) == pytest.approx(1)
    names = [stages.stage_at(planned, fraction)[0].name for fraction in (0, 0.149, 0.151, 0.44, 0.77, 1.0)]
    assert names == ["vae", "vae", "64 tokens", "256 tokens", "1,024 tokens", "1,024 tokens"]
    rates = [stages.stage_at(planned, fraction)[1] for fraction in np.linspace(0.1501, 1, 50)]
    assert rates[0] == stages.PEAK["flow"] and rates[-1] < 1e-9 and (np.diff(rates) <= 0).all()
    for stage in planned:
        for part in stage.parts:
            assert (part.pixels // 8) ** 2 <= model.TABLE_SIDE**2


def test_gates_start_at_zero_and_t5s_queries_small():
    """Parameters are told by their names, which are the library's: another name would train otherwise, unseen."""
    first = {name: checkpoint.named(networks.initial(name, 0)) for name in ("transformer", "text_encoder_3")}
    kernels = {name: leaf for name, leaf in first["transformer"].items() if name.endswith("kernel")}
    blocks = {f"segments.{n}.{stream}.norm.linear.weight.kernel" for n in range(3) for stream in ("visual", "text")}
    ends = {"norm_out.linear.weight.kernel", "proj_out.weight.kernel"}
    assert {name for name, leaf in kernels.items() if not leaf.any()} == blocks | ends
    q, k = (first["text_encoder_3"][f"layers.attention.{name}.weight.kernel"] for name in "qk")
    assert np.std(q) == pytest.approx(np.std(k) / 4, rel=0.05)


def test_the_training_step_computes_what_the_library_does(whole):
    """Patches and timesteps are written anew for tracers, text is put together in a batch."""
    from dfa2_jax.sampling.sinusoid import sinusoid
    from dfa2_jax.sampling.tokens import ROW_COLUMN_CHANNEL, patchify

    latents = np.random.RandomState(0).normal(size=(2, 4, 6, 16)).astype(np.float32)
    want = patchify(latents.transpose(0, 3, 1, 2), 2, ROW_COLUMN_CHANNEL)
    np.testing.assert_array_equal(flow.patchify(jax.numpy.asarray(latents)), want)
    sigma = np.linspace(0, 1, 33, dtype=np.float32)
    ours = flow.traced_sinusoid(jax.numpy.asarray(1000 * sigma))
    np.testing.assert_allclose(ours, sinusoid(1000 * sigma), atol=2e-3)


def perturbed(state):
    """Zero-initialised gates hide errors."""
    random = np.random.RandomState(0)
    move = lambda x: x + (0.3 * np.std(x) + 0.03) * random.normal(size=x.shape).astype(x.dtype)  # noqa: E731
    vae, flow = (weights._replace(ema=jax.tree.map(move, weights.ema)) for weights in (state.vae, state.flow))
    return state._replace(vae=vae, flow=flow)


@pytest.fixture(scope="module")
def left(whole, tmp_path_factory):
    """What `--result` writes."""
    folder = tmp_path_factory.mktemp("result")
    state, progress = whole
    result.write_result(folder, perturbed(state), progress)
    files = [path for path in folder.iterdir()]
    assert len(files) <= 8 and max(path.stat().st_size for path in files) < 16 * 2**20
    assert json.loads((folder / "log.json").read_text())["steps"] == {"vae": 16, "flow": 24}
    return folder


@pytest.fixture(scope="module")
def folder(left, tmp_path_factory):
    pytest.importorskip("diffusers")
    import torch

    from toy.export import export

    return export(left, tmp_path_factory.mktemp("toy") / "folder", torch.float32)


def test_a_result_draws_what_its_export_draws(left, folder):
    arguments = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3, "progress": False}
    images = [
        Pipeline(opened)(CAPTION, output_type="np", **arguments).images
        for opened in (result.open_result(left), open_checkpoint(folder))
    ]
    np.testing.assert_allclose(*images, atol=1e-6)


def test_the_export_is_what_was_trained_and_small(folder, whole):
    pipeline = Pipeline.from_pretrained(folder)
    trained = checkpoint.named(perturbed(whole[0]).flow.ema["transformer"])
    loaded = checkpoint.named(pipeline.transformer.params)
    assert trained.keys() == loaded.keys()
    for name, leaf in trained.items():
        np.testing.assert_array_equal(leaf, loaded[name], err_msg=name)
    floats = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    others = sum(path.stat().st_size for path in folder.rglob("*.json"))
    assert floats / 2 + others < 12e6


def test_diffusers_reads_the_export_and_draws_the_same(folder):
    import torch
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 4.0}
    want = theirs(CAPTION, generator=torch.Generator().manual_seed(3), output_type="np", **arguments).images
    ours = Pipeline.from_pretrained(folder)(CAPTION, seed=3, output_type="np", progress=False, **arguments).images
    assert np.std(want) > 0.02
    np.testing.assert_allclose(ours, want, atol=1e-3)


def test_ids_of_the_training_are_those_of_the_folder(folder):
    from transformers import AutoTokenizer

    prompts = [*(scene.caption for scene in scenes.held_out()[:20]), "", "un chat noir, 2 étoiles", "red!"]
    ids = model.token_ids(prompts)
    for encoder, ours in ids.items():
        name = encoder.replace("text_encoder", "tokenizer")
        theirs = AutoTokenizer.from_pretrained(folder / name)
        want = theirs(prompts, padding="max_length", truncation=True, max_length=ours.shape[1]).input_ids
        np.testing.assert_array_equal(ours, want, err_msg=name)
    full, empty = model.token_ids([CAPTION]), model.token_ids([""])
    for encoder, ids in full.items():  # a word is one token; only CLIP-L pads with the token that ends a prompt
        changed = (ids != empty[encoder]).sum()
        assert changed == len(CAPTION.split()) + (encoder != "text_encoder"), encoder


def test_a_plan_says_the_length_of_t5_whatever_clip_takes(folder):
    pipeline = Pipeline.from_pretrained(folder)
    arguments = {"prompt": CAPTION, "height": 64, "width": 64, "num_inference_steps": 2}
    plan = Plan.full(pipeline.setting(**arguments, max_sequence_length=40))
    assert {layer.num_text for layer in plan.setting.layers} == {model.CLIP_LENGTH + 40, 0}
    planned = pipeline(CAPTION, plan=plan, output_type="latent", progress=False).images
    dense = pipeline(**arguments, max_sequence_length=40, output_type="latent", progress=False).images
    np.testing.assert_allclose(planned, dense, atol=1e-4)
