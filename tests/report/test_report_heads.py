"""What heads look at: masses of hand-made attention, and those of a dense trajectory."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from report_cases import PROMPTS, SIZE

from dfa2_jax import Plan
from dfa2_jax.nn.attention import in_order
from dfa2_jax.options import Options
from dfa2_jax.report import attention_maps
from pallas_kernels import Layout


def hand_made(layout):
    """Queries and keys of five heads: uniform; self; the next but two; the first text token; half text, half self."""
    length, heads, dim = layout.length, 5, layout.length
    q, k = np.zeros((2, length, heads, dim), np.float32), np.zeros((2, length, heads, dim), np.float32)
    k[:] = np.eye(length)[:, None]
    sure = 60 * dim**0.5
    visual, text = np.arange(length)[layout.visual], np.arange(length)[layout.text]
    for place, token in enumerate(visual):
        q[:, token, 1, token] = sure
        q[:, token, 2, visual[(place + 3) % len(visual)]] = sure
        q[:, token, 3, text[0]] = sure
        q[:, token, 4, [token, text[-1]]] = sure
    return jnp.asarray(q), jnp.asarray(k)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_masses_of_hand_made_attention(text_first, rows, monkeypatch):
    layout, windows = Layout(4, 10, text_first), (0, 3, 20)
    monkeypatch.setattr(attention_maps, "WEIGHT_BYTES", 4 * 2 * layout.length * rows)
    masses = np.asarray(attention_maps.masses(*hand_made(layout), windows, layout))
    near = [np.mean([np.sum(np.abs(np.arange(10) - i) <= w) for i in range(10)]) for w in windows]
    uniform = [4 / 14, *(count / 14 for count in near)]
    jump = [0, 0, 0.7, 1]  # three of ten queries wrap around: their key is seven tokens away
    want = [uniform, [0, 1, 1, 1], jump, [1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]
    np.testing.assert_allclose(masses, want, atol=1e-6)


def test_masses_without_text():
    layout = Layout(0, 9, True)
    q = jnp.zeros((1, 9, 2, 4))
    masses = np.asarray(attention_maps.masses(q, q, (1,), layout))
    np.testing.assert_allclose(masses, [[0, 25 / 81]] * 2, rtol=1e-5)


def test_masses_at_every_step_are_those_of_the_dense_trajectory(pipelines):
    pipeline = pipelines("tiny_flux_schnell")
    call = pipeline.prepare(Options(prompt=PROMPTS[0], **SIZE, output_type="latent"))
    plan = Plan.full(call.setting).with_method(2, 1, 0, "arrow(1/4)")
    visual = plan.setting.layers[0].num_visual
    assert attention_maps.windows_of([plan]) == (visual // 8,)
    watched = attention_maps.watch(call, (1, 3, visual), progress=False)
    assert watched.text.shape == plan.choices.shape
    assert np.all(np.diff(watched.near, axis=0) >= 0)
    np.testing.assert_allclose(watched.text + watched.near[-1], 1, atol=1e-5)

    run, state = call.program()
    later = np.asarray(run(state, 0, 2).latents)  # the third step, from what two dense ones left
    attend = attention_maps.Watching((1, 3, visual))
    run, state = replace(call, tokens=later, options=replace(call.options, attend=attend)).program()
    third = in_order(call.layers, run(state, 2, 3).memory)
    np.testing.assert_allclose(watched.text[2], third[..., 0], atol=1e-5)
    assert np.abs(watched.text[1] - third[..., 0]).max() > 1e-3
