"""Plans of heads and of steps for video models."""

import numpy as np
import pytest

from dfa2_jax import Pipeline, Plan, calibrate
from dfa2_jax.calibration.journal import Journal
from dfa2_jax.calibration.resume import Checkpointed
from dfa2_jax.calibration.steps import StepRuns, Trajectory
from dfa2_jax.options import Options
from dfa2_jax.plan.orders import lies

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


WIDE = {"windows": (2, 4), "tiles": (2, 2), "num_inference_steps": 6, "delta": 1.0, "c": None}
"""Heads take arrows of both orders."""


def test_an_interrupted_calibration_goes_on_with_outputs_in_the_native_order(pipelines, tmp_path, monkeypatch):
    pipeline, path = pipelines("tiny_cogvideox_5b"), tmp_path / "progress"
    whole = calibrate(pipeline, PROMPTS[:1], **CALL | WIDE)
    added = Checkpointed.add

    def interrupted(self, picks, errors):
        added(self, picks, errors)
        if self.steps == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointed, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, PROMPTS[:1], **CALL | WIDE, resume=path)
    monkeypatch.setattr(Checkpointed, "add", added)
    resumed = calibrate(pipeline, PROMPTS[:1], **CALL | WIDE, resume=path)
    assert lies(whole)[3].any(), "outputs of both orders are remembered where it goes on"
    np.testing.assert_array_equal(resumed.choices, whole.choices)
    np.testing.assert_allclose(resumed.calibration.errors, whole.calibration.errors, rtol=1e-3, atol=1e-5)


def test_devices_that_share_tokens_try_the_native_order(tiny_cogvideox_5b):
    many = Pipeline.from_pretrained(tiny_cogvideox_5b, devices=4)
    plan = calibrate(many, PROMPTS[:1], **CALL | WIDE | {"num_inference_steps": 3})
    assert [str(method) for method in plan.methods] == ["full", "cached", "arrow(1/2)", "arrow(1/4)"]
    with pytest.raises(
        ValueError, match="orders=.* different ones of .'native',., which devices that share tokens have"
    ):
        calibrate(many, PROMPTS[:1], **CALL | WIDE, orders=("time",))


def test_a_plan_says_how_guidance_changes(pipelines):
    pipeline = pipelines("tiny_cogvideox_5b")
    plan = Plan.full(pipeline.setting(prompt=PROMPTS, **CALL, use_dynamic_cfg=True))
    assert plan.setting.use_dynamic_cfg and plan.digest != Plan.full(pipeline.setting(prompt=PROMPTS, **CALL)).digest
    scales = [
        pipeline.prepare(Options(prompt=PROMPTS, plan=plan, **given)).inputs.guidance.scale
        for given in ({}, {"use_dynamic_cfg": True})
    ]
    np.testing.assert_array_equal(*scales)
    assert len({*scales[0][:3]}) == 3
    constant = Plan.full(pipeline.setting(prompt=PROMPTS, **CALL))
    with pytest.raises(ValueError, match="use_dynamic_cfg is False in the plan and True in the call"):
        pipeline(PROMPTS, plan=constant, use_dynamic_cfg=True, progress=False)


def test_a_plan_of_images_is_refused_as_one(pipelines, tiny_sd35):
    image = Plan.full(Pipeline.from_pretrained(tiny_sd35).setting(prompt="a box", height=64, width=64))
    with pytest.raises(ValueError, match="the plan is of a StableDiffusion3Pipeline, and this is a CogVideoXPipeline"):
        pipelines("tiny_cogvideox_5b")("a box", plan=image)


def test_frames_of_a_dense_run_are_those_of_a_call(pipelines):
    """Calibration's latents are flow matching's, and become the call's again."""
    pipeline = pipelines("tiny_cogvideox_5b")
    call = pipeline.prepare(Options(prompt=PROMPTS, **CALL | {"num_inference_steps": 5}))
    runs = StepRuns(call, Journal(None, ""), progress=False)
    frames = np.stack(list(runs.pixels(Trajectory.dense(runs).latents[-1])))
    wanted = pipeline(PROMPTS, **CALL | {"num_inference_steps": 5}, output_type="np").frames
    np.testing.assert_allclose(frames, wanted, atol=1e-3)
