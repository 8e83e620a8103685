"""Training the video model in the box, in small: it learns and resumes, and diffusers reads what it exports."""

from importlib import import_module

import jax
import numpy as np
import pytest

from dfa2_jax import Pipeline
from dfa2_jax.families.registry import networks as known_networks
from dfa2_jax.families.registry import open_checkpoint

pytest.importorskip("toy", reason="toy/ is beside the tests in a checkout alone")
checkpoint = import_module("toy.checkpoint")
networks = import_module("toy.networks")
result = import_module("toy.result")
scenes = import_module("toy.video_scenes")
train = import_module("toy.train")
autoencoder = import_module("toy.video_autoencoder")
flow = import_module("toy.video_flow")
model = import_module("toy.video_model")
video_train = import_module("toy.video_train")
evaluate = import_module("toy.video_evaluate")

# Exporting needs diffusers; and one environment is enough for a script of the repository, which takes minutes.
pytestmark = [pytest.mark.long, pytest.mark.checkout, pytest.mark.torch]

STEPS = 40
CAPTION = "a red star moves slowly left on a blue background"
CALL = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 4, "guidance_scale": 4.0}


def smoke(out, **options):
    return train.train(
        video_train.PRESETS["smoke"](),
        out,
        task=video_train.VIDEOS,
        unit="steps",
        total=STEPS,
        warm_up=4,
        quiet=True,
        **options,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A state and the progress that led there, in two slices; the first ends in the second phase."""
    out = tmp_path_factory.mktemp("video")
    smoke(out, amount=23)
    return smoke(out)


def test_losses_fall(whole):
    state, progress = whole
    assert progress.calls == {"vae": 16, "12 tokens": 24} and progress.slices == 2
    for stage in progress.calls:
        losses = [entry["loss"] for entry in progress.log if entry["stage"] == stage]
        assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses
    assert state.latents[0] == 0 and state.latents[1] > 0


def test_schedule():
    planned = video_train.PRESETS["gpu"]()
    assert sum(stage.share for stage in planned) == pytest.approx(1)
    assert {part.frames for stage in planned for part in stage.parts} == {model.FRAMES}
    assert max(part.pixels for stage in planned for part in stage.parts) == 4 * model.LATENT_SIDE


def test_gates_start_at_zero():
    """Parameters are told by their names, which are the library's: another name would train otherwise, unseen."""
    first = {name: checkpoint.named(networks.initial(name, 0, model.configs)) for name in model.configs()}
    kernels = {name: leaf for name, leaf in first["transformer"].items() if name.endswith("kernel")}
    blocks = {f"transformer_blocks.norm{n}.linear.weight.kernel" for n in (1, 2)}
    ends = {"norm_out.linear.weight.kernel", "proj_out.weight.kernel"}
    assert {name for name, leaf in kernels.items() if not leaf.any()} == blocks | ends
    query = first["transformer"]["transformer_blocks.attn.to_q.weight.kernel"]
    assert np.std(query) == pytest.approx(model.WIDTH**-0.5, rel=0.05)
    scales = {name: leaf for name, leaf in first["vae"].items() if name.endswith("conv_y.bias")}
    assert len(scales) > 10 and all((leaf == 1).all() for leaf in scales.values())


def test_the_training_step_computes_what_the_library_does(whole):
    """Chunks and patches are written anew for tracers, convolutions as products."""
    from dfa2_jax.sampling.tokens import VideoPatches

    latents = np.random.RandomState(0).normal(size=(2, 3, 4, 6, 16)).astype(np.float32)
    want = VideoPatches(2).pack(latents.transpose(0, 4, 1, 2, 3))
    np.testing.assert_array_equal(flow.patchify(jax.numpy.asarray(latents)), want)

    setup = networks.Setup(video_train.VIDEOS, jax.numpy.float32, "xla", None, 1)
    params = perturbed(whole[0]).vae.ema["vae"]
    video = jax.random.uniform(jax.random.key(1), (1, 17, 16, 16, 3), minval=-1)
    mean, _ = jax.jit(lambda x: autoencoder.moments(setup, params, x))(video)
    decoded = jax.jit(lambda z: autoencoder.decoded(setup, params, z))(mean)

    class_name, config = model.configs()["vae"]
    spec = known_networks()[class_name]
    vae = networks.nnx.merge(networks.graph_of("vae", jax.numpy.float32, model.configs), params)
    assert spec.config(config).scaling_factor == 1
    first, cache = vae.encode_first(video[:, :9])
    after, _ = vae.encode_next(video[:, 9:], cache)
    np.testing.assert_allclose(mean, np.concatenate([first, after], 1), rtol=1e-3, atol=1e-3)
    first, cache = vae.decode_first(mean[:, :3])
    after, _ = vae.decode_next(mean[:, 3:], cache)
    np.testing.assert_allclose(decoded, np.concatenate([first, after], 1), rtol=1e-3, atol=1e-3)


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
    return folder


@pytest.fixture(scope="module")
def folder(left, tmp_path_factory):
    pytest.importorskip("diffusers")
    import torch

    from toy.video_export import export

    return export(left, tmp_path_factory.mktemp("toy") / "folder", torch.float32)


def test_a_result_draws_what_its_export_draws(left, folder):
    videos = [
        Pipeline(opened)(CAPTION, seed=3, output_type="np", progress=False, **CALL).frames
        for opened in (evaluate.open_video_result(left), open_checkpoint(folder))
    ]
    assert videos[0].shape == (1, 17, 32, 32, 3)
    np.testing.assert_allclose(*videos, atol=1e-5)


def test_the_export_is_small(folder):
    floats = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    others = sum(path.stat().st_size for path in folder.rglob("*.json"))
    assert floats / 2 + others < 8e6


def test_diffusers_reads_the_export_and_draws_the_same(folder):
    import torch
    from diffusers import CogVideoXPipeline

    theirs = CogVideoXPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    length = {"max_sequence_length": model.T5_LENGTH}
    want = theirs(CAPTION, generator=generator, output_type="np", **length, **CALL).frames
    ours = Pipeline.from_pretrained(folder)(CAPTION, seed=3, output_type="np", progress=False, **CALL).frames
    assert np.std(want) > 0.02
    np.testing.assert_allclose(ours, want, atol=1e-3)


def test_ids_of_the_training_are_those_of_the_folder(folder):
    from transformers import AutoTokenizer

    held_out = scenes.split()[2]
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    captions = [*(scene.caption for scene in scenes.held_out()), ""]
    want = theirs(captions, padding="max_length", truncation=True, max_length=model.T5_LENGTH).input_ids
    tables = video_train.tables()
    np.testing.assert_array_equal(tables["ids"][[*held_out, len(tables["numbers"])]], want)
