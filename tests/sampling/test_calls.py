"""The model owns the order of its attention layers: each has one place in one stack."""

import numpy as np
import pytest
from real_shapes import PUBLISHED

from dfa2_jax.families.registry import networks
from dfa2_jax.nn.attention import by_stack, in_order, stacks

EXPECTED = {
    "SD3-medium": ["joint.0", "joint.1", "joint.23"],
    "SD3.5-medium": ["joint.0", "attn2.0", "joint.1", "attn2.12", "joint.13", "joint.23"],
    "SD3.5-large": ["joint.0", "joint.37"],
    "FLUX.1-dev": ["double.0", "double.18", "single.0", "single.37"],
}
LAYERS = {"SD3-medium": 24, "SD3.5-medium": 24 + 13, "SD3.5-large": 38, "FLUX.1-dev": 19 + 38}
SCATTERED = PUBLISHED["SD3.5-medium"].config | {"num_layers": 7, "dual_attention_layers": (0, 3, 6)}


def config_of(name):
    published = PUBLISHED[name]
    return networks()[published.class_name].config(published.config)


def names(config):
    """The names of all attention layers in order, after a look at where each lies."""
    layers = config.calls(5, 64)
    for stack, numbers in stacks(layers).items():
        assert [layers[number].place for number in numbers] == list(range(len(numbers)))
        assert len({layers[number].layout for number in numbers}) == 1, f"{stack} holds layers of two lengths"
    blocks = [layer.block for layer in layers]
    assert blocks == sorted(blocks) and {*blocks} == {*range(blocks[-1] + 1)}
    np.testing.assert_array_equal(in_order(layers, by_stack(layers, np.arange(len(layers)))), np.arange(len(layers)))
    return [layer.name for layer in layers]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_has_one_place(name):
    layers = names(config_of(name))
    assert len(layers) == len(set(layers)) == LAYERS[name]
    places = [layers.index(wanted) for wanted in EXPECTED[name]]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(layers) - 1


def test_dual_blocks_anywhere():
    layers = names(networks()["SD3Transformer2DModel"].config(SCATTERED))
    assert layers == [
        *("joint.0", "attn2.0", "joint.1", "joint.2", "joint.3", "attn2.3"),
        *("joint.4", "joint.5", "joint.6", "attn2.6"),
    ]


def test_text_is_where_the_model_puts_it():
    sd35, flux = (
        {layer.name: layer.layout for layer in config_of(name).calls(5, 64)} for name in ("SD3.5-medium", "FLUX.1-dev")
    )
    assert (sd35["joint.3"].num_text, sd35["attn2.3"].num_text, sd35["joint.3"].text_first) == (5, 0, False)
    assert flux["double.3"] == flux["single.12"] and flux["double.3"].text_first
