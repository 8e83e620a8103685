"""Conversion of a video model."""

import numpy as np
from convert_cases import assert_equal_weights

from dfa2_jax import Pipeline
from dfa2_jax.cli import convert as main
from dfa2_jax.families.registry import open_checkpoint


def test_a_converted_video_model_gives_equal_latents(tiny_cogvideox_15, pipelines, tmp_path):
    assert main([str(tiny_cogvideox_15), str(tmp_path / "out")]) == 0
    arguments = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "progress": False}
    first, second = (
        pipeline("a red ring", **arguments, output_type="latent")
        for pipeline in (pipelines("tiny_cogvideox_15"), Pipeline.from_pretrained(tmp_path / "out"))
    )
    np.testing.assert_array_equal(first.frames, second.frames)
    assert first.metadata["fingerprint"] == second.metadata["fingerprint"]
    assert_equal_weights(open_checkpoint(tmp_path / "out"), open_checkpoint(tiny_cogvideox_15), "vae")
