"""Plans of heads and of steps for video models."""

import pytest

from dfa2_jax import Plan, calibrate

PROMPTS = ["a red ring", "a small star"]
CALL = {"height": 32, "width": 48, "num_inference_steps": 3, "progress": False}
"""Calibration takes nine frames, as many as the tiny model makes."""


@pytest.mark.parametrize("budget", [{"speedup": 2.0}, {"psnr": 40.0}, {}], ids=str)
def test_a_plan_of_steps_is_refused_where_noise_is_added(budget, pipelines):
    with pytest.raises(ValueError, match=r"CogVideoXDPMScheduler.*[Pp]ass .*delta="):
        calibrate(pipelines("tiny_cogvideox_5b"), PROMPTS, **CALL, scheduler="CogVideoXDPMScheduler", **budget)


@pytest.mark.parametrize("scheduler", [None, "CogVideoXDPMScheduler"])
def test_heads_are_planned_and_the_plan_serves_calls_of_its_frames(scheduler, pipelines, tmp_path):
    pipeline = pipelines("tiny_cogvideox_5b")
    plan = calibrate(pipeline, PROMPTS, **CALL, scheduler=scheduler, delta=0.5, windows=(2,), tiles=(8, 8))
    assert plan.setting.num_frames == 9 and plan.setting.pipeline_class == "CogVideoXPipeline"
    assert plan.setting.scheduler == scheduler or scheduler is None
    assert plan.choices.shape == (3, 3, 4) and not plan.choices[0].any() and plan.choices[1:].any()
    assert plan.calibration.num_prompts == 2 and plan.calibration.guidance_scale == 6.0
    plan.save(tmp_path / "plan.json")
    assert '"num_frames": 9' in (tmp_path / "plan.json").read_text()
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan and read.digest == plan.digest
    read.check(pipeline.setting(prompt=PROMPTS, **CALL, scheduler=scheduler, num_frames=9))
    output = pipeline(PROMPTS, plan=read, output_type="latent", progress=False)
    assert output.frames.shape == (2, 3, 4, 4, 6) and output.metadata["plan"] == plan.digest
    assert output.metadata["density"] < 1 and output.metadata["num_frames"] == 9


def test_steps_of_ddim_are_planned(pipelines, tmp_path):
    pipeline = pipelines("tiny_cogvideox_5b")
    plan = calibrate(pipeline, PROMPTS[:1], **CALL | {"num_inference_steps": 6}, speedup=2.0, heads="full")
    assert len(plan.nodes) == 3 and plan.setting.num_frames == 9
    plan.save(tmp_path / "plan.json")
    output = pipeline(PROMPTS[0], plan=Plan.load(tmp_path / "plan.json"), output_type="latent", progress=False)
    assert output.frames.shape == (1, 3, 4, 4, 6) and output.metadata["num_nodes"] == 3
