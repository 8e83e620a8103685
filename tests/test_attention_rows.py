"""The model owns the split of attention calls into segment rows: every call is in one place, in order of execution."""

from itertools import chain

import pytest
from real_shapes import PUBLISHED

from dfa2_jax.families.registry import networks

EXPECTED = {
    "SD3-medium": ["joint.0", "joint.1", "joint.23"],
    "SD3.5-medium": ["joint.0", "attn2.0", "joint.1", "attn2.12", "joint.13", "joint.23"],
    "SD3.5-large": ["joint.0", "joint.37"],
    "FLUX.1-dev": ["double.0", "double.18", "single.0", "single.37"],
}
CALLS = {"SD3-medium": 24, "SD3.5-medium": 24 + 13, "SD3.5-large": 38, "FLUX.1-dev": 19 + 38}
SCATTERED = PUBLISHED["SD3.5-medium"].config | {"num_layers": 7, "dual_attention_layers": (0, 3, 6)}


def config_of(name):
    published = PUBLISHED[name]
    return networks()[published.class_name].config(published.config)


def check(config):
    layers, rows = list(config.attention_layers(5, 64)), config.attention_rows
    assert sorted(chain.from_iterable(chain.from_iterable(rows))) == list(range(len(layers)))
    for first, second in rows:
        assert len(second) in (0, len(first))
        assert [layers[number].split(".")[0] for number in second] == ["attn2"] * len(second)
        assert all(a + 1 == b for a, b in zip(first, second, strict=False))  # a block's attn2 follows its joint one
        blocks = [int(layers[number].split(".")[1]) for number in first]
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    return layers


@pytest.mark.parametrize("name", EXPECTED)
def test_every_call_has_one_row(name):
    layers = check(config_of(name))
    assert len(layers) == len(set(layers)) == CALLS[name]
    places = [layers.index(wanted) for wanted in EXPECTED[name]]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(layers) - 1


def test_dual_blocks_anywhere():
    layers = check(networks()["SD3Transformer2DModel"].config(SCATTERED))
    assert layers == [
        *("joint.0", "attn2.0", "joint.1", "joint.2", "joint.3", "attn2.3"),
        *("joint.4", "joint.5", "joint.6", "attn2.6"),
    ]


def test_text_is_where_the_model_puts_it():
    sd35, flux = (config_of(name).attention_layers(5, 64) for name in ("SD3.5-medium", "FLUX.1-dev"))
    assert (sd35["joint.3"].num_text, sd35["attn2.3"].num_text, sd35["joint.3"].text_first) == (5, 0, False)
    assert flux["double.3"] == flux["single.12"] and flux["double.3"].text_first
