"""Orders of tokens in plans: names, tables, refusals."""

import numpy as np
import pytest

from dfa2_jax import Method, Plan
from dfa2_jax.plan.method import PlanError
from dfa2_jax.plan.orders import lies, orders
from dfa2_jax.plan.setting import AttentionLayer, Setting

LAYER = AttentionLayer(name="block.0", num_text=3, num_visual=24, text_first=True)
VIDEO = Setting(
    pipeline_class="CogVideoXPipeline", weights="w", scheduler="CogVideoXDDIMScheduler",
    sigmas=(1.0, 0.8, 0.6, 0.4, 0.1), height=32, width=48, doubled_batch=True, num_heads=3, layers=(LAYER,),
    num_frames=13, token_frames=4,
)  # fmt: skip
METHODS = tuple(map(Method, ("full", "cached", "arrow(1/4)", "arrow(1/4, time)")))


def plan(*choices):
    return Plan(VIDEO, METHODS, np.array(choices, np.uint8)[:, None])


@pytest.mark.parametrize("name", ["arrow(1/8,time)", "arrow(1/8, native)", "arrow(1/8, Time)", "cached, time", "time"])
def test_an_order_has_one_spelling(name):
    with pytest.raises(PlanError, match=r"arrow\(1/f, time\)"):
        Method(name)
    assert Method.arrow(8, "time").name == "arrow(1/8, time)" and Method.arrow(8, "native").name == "arrow(1/8)"
    assert [method.order for method in METHODS] == ["native", "native", "native", "time"]
    assert Method.arrow(8, "time").half_window(160) == Method.arrow(8).half_window(160) == 10


def test_a_reused_output_lies_as_it_was_written():
    made = plan([0, 0, 0], [3, 1, 2], [1, 1, 3], [1, 3, 1])
    assert orders(made)[:, 0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert lies(made)[:, 0].tolist() == [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]]


def test_orders_survive_a_file(tmp_path):
    made = plan([0, 0, 0], [3, 1, 2], [1, 1, 3], [1, 3, 1])
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.methods == METHODS and loaded.digest == made.digest
    np.testing.assert_array_equal(orders(loaded), orders(made))
    assert loaded.density() == made.density() < 1


def test_tokens_of_one_frame_have_no_order_over_time():
    image = VIDEO.model_copy(update={"token_frames": 1, "num_frames": None})
    with pytest.raises(PlanError, match=r"methods: arrow\(1/4, time\) run over time, and the visual tokens are of one"):
        Plan(image, METHODS, np.zeros((4, 1, 3), np.uint8))


def test_frames_are_equal():
    with pytest.raises(ValueError, match="token_frames=5, but block.0 has 24 visual tokens, which are no such equal"):
        Setting(**VIDEO.model_dump() | {"token_frames": 5})


def test_files_of_images_say_nothing_of_frames():
    image = VIDEO.model_copy(update={"token_frames": 1, "num_frames": None})
    assert {"token_frames", "num_frames"} <= {*VIDEO.content()} and not {"token_frames", "num_frames"} & {
        *image.content()
    }
