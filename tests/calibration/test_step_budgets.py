"""What is asked of a calibration of steps, and what it says of a budget, a file or an option that it cannot use."""

import numpy as np
import pytest
from pipeline_cases import PROMPTS

from dfa2_jax import Plan, calibrate
from dfa2_jax.calibration.steps import StepRuns, Trajectory, fit
from dfa2_jax.pipeline.call import Call
from dfa2_jax.plan.steps import Nodes

CALL = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 4,
    "max_sequence_length": 16,
    "guidance_scale": 4.0,
    "progress": False,
}


@pytest.fixture(scope="module")
def plan(pipelines):
    return calibrate(pipelines("tiny_sd35"), PROMPTS, **CALL)


def test_no_budget_is_half_of_the_steps(plan):
    assert len(plan.nodes) == 2


def test_a_plan_of_every_step_is_the_dense_run_wherever_it_comes_from(plan, pipelines, caplog):
    """Its steps are Euler's, it keeps no outputs of heads, and it serves other sizes."""
    pipeline = pipelines("tiny_sd35")
    plans = [calibrate(pipeline, PROMPTS, **CALL, **budget) for budget in ({"speedup": 1.0}, {"psnr": 100.0})]
    size = {"height": 96, "prompt": PROMPTS[0], "output_type": "latent", "progress": False}
    dense = pipeline(**CALL | size).images
    assert caplog.text.count("psnr=100: every step runs") == 1
    for every in (*plans, plan.resolve(speedup=1.0), plan.resolve(psnr=100.0)):
        assert every.runs_every_step and every.step_calibration.psnr == 120 and not Call.remembers(every)
        np.testing.assert_array_equal(pipeline(**size, plan=every).images, dense)
    assert plans[0].step_calibration.measured_error == 0 and plans[0] == plans[1]
    ran = [pipeline(**size, plan=one).metadata["num_nodes"] for one in (plan, plans[0])]
    assert ran == [2, plan.setting.num_inference_steps]
    assert caplog.text.count("psnr=100: every step runs") == 2
    by_hand = Plan.full(plan.setting)
    np.testing.assert_array_equal(pipeline(**size, plan=by_hand, guidance_scale=4.0).images, dense)


@pytest.mark.parametrize("other", [{"prompts": PROMPTS[::-1]}, {"seed": 1}, {"guidance_scale": 3.0}], ids=str)
def test_progress_is_of_one_calibration(other, pipelines, tmp_path):
    """Records know latents alone: velocities of another prompt would be taken for these."""
    path, options = tmp_path / "progress", {"prompts": PROMPTS} | CALL
    calibrate(pipelines("tiny_sd35"), **options, resume=path)
    with pytest.raises(ValueError, match="remove it to start anew"):
        calibrate(pipelines("tiny_sd35"), **options | other, resume=path)


@pytest.mark.parametrize(
    ("name", "value"), [("speedup", 0.5), ("speedup", 5.0), ("psnr", float("nan")), ("psnr", -5.0)]
)
def test_a_bad_budget_is_refused_before_any_work(name, value, pipelines, monkeypatch):
    monkeypatch.setattr("dfa2_jax.calibration.calibrate.prepared", lambda *_: pytest.fail("prompts were encoded"))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        calibrate(pipelines("tiny_sd35"), PROMPTS, **CALL, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_inference_steps": 1},
            "speedup=2.0 must be from 1 to 1 for 1 steps. No budget was given, and speedup=2 is",
        ),
        (
            {"heads": "only", "attention_share": 0.2},
            r"(?s)speedup=2.0 must be from 1 to 1\.\d+: .* No budget was given",
        ),
    ],
)
def test_a_default_budget_that_cannot_be_is_said_to_be_one(options, message, pipelines):
    with pytest.raises(ValueError, match=message):
        calibrate(pipelines("tiny_sd35"), PROMPTS, **CALL | options)


def test_a_refused_limit_keeps_what_ran_and_says_so(pipelines, tmp_path, monkeypatch):
    pipeline, path = pipelines("tiny_sd35"), tmp_path / "progress"
    options = CALL | {"target": "converged", "heads": "full", "resume": path}
    with pytest.raises(
        ValueError, match=f"Ask for less, .* {path} keeps what ran, for another psnr; remove it to take"
    ):
        calibrate(pipeline, PROMPTS, **options, psnr=90.0)
    monkeypatch.setattr(StepRuns, "_run", lambda *_: pytest.fail("the network ran"))
    assert len(calibrate(pipeline, PROMPTS, **options, speedup=1.0).nodes) == 4


def test_options_of_heads_that_are_not_planned_are_named(pipelines, caplog, monkeypatch):
    monkeypatch.setattr("dfa2_jax.calibration.calibrate.WORTHWHILE", 1.0)
    calibrate(pipelines("tiny_sd35"), PROMPTS, **CALL, windows=(4,))
    assert "windows are of no effect: attention takes" in caplog.text
    caplog.clear()
    calibrate(pipelines("tiny_sd35"), PROMPTS, **CALL, windows=(4,), attention_share=0.5)
    assert "windows are of no effect: attention takes 0.50 of a step, as attention_share says" in caplog.text


def test_velocities_that_are_parallel_leave_euler_s_move():
    """Two equal ones have no best weights of their own."""
    sigmas = np.linspace(1, 0, 5)
    velocity = np.random.default_rng(0).standard_normal((1, 4, 2)).astype(np.float32)
    latents = np.stack([velocity * (sigma - 1) for sigma in sigmas]).astype(np.float32)
    target = Trajectory(latents, np.stack([velocity] * 4))
    nodes, x = fit(target, sigmas, Nodes((0, 1, 2), np.zeros((3, 2)), 0.0), lambda *_: velocity)
    np.testing.assert_allclose(nodes.coefficients[2], [-0.5, 0], atol=1e-6)
    np.testing.assert_allclose(x, latents[-1], atol=1e-6)


def test_what_is_edited_stays_so(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(
        path.read_text().replace('"num_prompts":2', '"num_prompts":64').replace('"num_prompts": 2', '"num_prompts": 64')
    )
    signed = Plan.sign(path)
    assert signed.step_calibration.num_prompts == 64 and signed.edited
    assert signed.resolve(speedup=4.0).edited and plan.for_weights("sha256:0").resolve(speedup=2.0).edited
    assert not plan.resolve(speedup=4.0).edited


def test_a_budget_may_be_numpy_s(plan, no_shape_checks):
    assert plan.resolve(speedup=np.float32(2)) == plan.resolve(speedup=2.0)


@pytest.mark.parametrize("shares", [(5.0,), (float("nan"),), (-0.1,), (0.7, 0.4)])
def test_shares_of_a_step_are_checked(plan, shares):
    with pytest.raises(ValueError, match="must be shares of a step"):
        plan.cost(*shares)


@pytest.mark.parametrize("name", ["measured_error", "measured_psnr"])
def test_what_a_run_measured_is_there_whole(plan, name):
    record = plan.step_calibration.model_dump() | {name: None}
    with pytest.raises(ValueError, match="both are there, or both null"):
        type(plan.step_calibration).model_validate(record)
