from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from damage import edit_json, refuses
from flax import nnx
from llama_cases import checkpoint_of, encoder_of, open_again
from lowering import assert_highest_precision, lower_for_cuda
from safetensors.numpy import load_file, save_file
from torch_models import redraw, relative_error

from dfa2_jax.encoders.llama import LlamaConfig, LlamaEncoder
from dfa2_jax.encoders.specs import LEFT_OUT
from dfa2_jax.pipeline.fit import check_fit
from dfa2_jax.weights.safetensors import Tensor

# Five layers, of which three are read; an epsilon and a base of rotary positions that no default hides.
SIZES = dict(
    vocab_size=140,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=5,
    num_attention_heads=4,
    rms_norm_eps=1e-2,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
HEADS = {
    "grouped": dict(num_key_value_heads=2),
    "own": dict(num_key_value_heads=4, head_dim=16),  # whose widths do not add up to hidden_size
}
NUM_TOKENS, LENGTHS = 351, (351, 120, 97)
CROP = 95


@cache
def reference(heads: str = "grouped", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config = transformers.LlamaConfig(**SIZES, **HEADS[heads])
    return redraw(transformers.LlamaModel(config)).to(dtype)


@pytest.fixture
def folder(tmp_path):
    """In several shards."""
    checkpoint_of(reference(), tmp_path, max_shard_size="60KB")
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 2
    return tmp_path


def token_ids() -> np.ndarray:
    """Prompts of several lengths, padded on the right (0)."""
    ids = np.random.default_rng(0).integers(1, 140, (len(LENGTHS), NUM_TOKENS))
    return np.where(np.arange(NUM_TOKENS) < np.array(LENGTHS)[:, None], ids, 0)


def torch_output(model: torch.nn.Module) -> list[torch.Tensor]:
    """The states of each prompt that HunyuanVideo reads: cropped, without padding."""
    ids = torch.tensor(token_ids())
    mask = (torch.arange(NUM_TOKENS) < torch.tensor(LENGTHS)[:, None]).long()
    with torch.no_grad():
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
    return [row[CROP:length] for row, length in zip(states, LENGTHS, strict=True)]


def output(model: LlamaEncoder) -> list[jax.Array]:
    states = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(token_ids()))
    return [row[CROP:length] for row, length in zip(states, LENGTHS, strict=True)]


@pytest.mark.parametrize("heads", HEADS)
def test_equals_transformers(heads, tmp_path):
    ours, theirs = output(encoder_of(reference(heads), tmp_path)), torch_output(reference(heads))
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    print(heads, errors)
    assert all(error <= 2e-6 for error in errors), errors


def test_bfloat16_is_as_near_as_torch(tmp_path):
    exact, rounded = torch_output(reference()), torch_output(reference(dtype=torch.bfloat16))
    ours = output(encoder_of(reference(), tmp_path, "bfloat16"))
    assert ours[0].dtype == jnp.bfloat16
    for a, b, c in zip(ours, rounded, exact, strict=True):
        error, torch_error = relative_error(a, c), relative_error(b, c)
        print(f"{error=:.2e} {torch_error=:.2e}")
        assert error <= 1.1 * torch_error


def test_float32_asks_for_ieee_products(tmp_path):
    model = encoder_of(reference(), tmp_path)
    assert_highest_precision(lower_for_cuda(lambda model, ids: model(ids), model, jnp.asarray(token_ids())))


def test_the_last_layers_are_neither_made_nor_read(folder, monkeypatch):
    read, array = set(), Tensor.array
    monkeypatch.setattr(Tensor, "array", lambda self: read.add(self.key) or array(self))
    checkpoint = open_again(folder)
    model = checkpoint.load("text_encoder", "float32")
    keys = set(checkpoint.tensors("text_encoder"))
    unread = {key for key in keys if key.startswith(("layers.3.", "layers.4."))} | {"norm.weight"}
    assert len(unread) == 2 * 9 + 1 and read == keys - unread
    shapes = [leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model)) if path[0] == "layers"]
    assert len(shapes) == 9 and {shape[0] for shape in shapes} == {5 - LEFT_OUT}


def test_a_language_model_with_old_frequencies_loads_as_its_body(tmp_path):
    """Keys with the prefix and a head, as LlamaForCausalLM saves them."""
    whole = transformers.LlamaForCausalLM(reference().config)
    whole.model.load_state_dict(reference().state_dict())
    (tmp_path / "whole").mkdir()
    checkpoint = checkpoint_of(whole, tmp_path / "whole")
    file = tmp_path / "whole" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    assert {"lm_head.weight", "model.norm.weight"} < set(tensors)
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for layer in range(5)}
    save_file(tensors, file)
    (tmp_path / "body").mkdir()
    states = [nnx.state(checkpoint.load("text_encoder")), nnx.state(encoder_of(reference(), tmp_path / "body"))]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layers.5.input_layernorm.weight", "unknown keys: layers.5.input_layernorm.weight"),
        ("layers.0.self_attn.q_proj.bias", "unknown keys: layers.0.self_attn.q_proj.bias"),
        ("layers.4.self_attn.q_norm.weight", "unknown keys: layers.4.self_attn.q_norm.weight"),
        ("model.embed_tokens.weight", "duplicate keys: .*embed_tokens.weight"),
    ],
)
def test_keys_that_are_not_a_llamas_are_named(key, message, tmp_path):
    checkpoint_of(reference(), tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {key: np.ones(48, np.float32)}, file)
    with refuses(tmp_path, message):
        open_again(tmp_path).load("text_encoder")


def test_a_layer_that_is_read_must_be_there(tmp_path):
    checkpoint_of(reference(), tmp_path)
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["layers.2.mlp.up_proj.weight"], tensors["layers.3.mlp.up_proj.weight"]
    save_file(tensors, file)
    with refuses(tmp_path, "1 missing parameters: layers.mlp.up_proj.weight.kernel, layer 2"):
        open_again(tmp_path).load("text_encoder")


def test_a_width_that_is_not_the_transformers_is_named(tmp_path):
    check_fit(checkpoint_of(reference(), tmp_path))
    edit_json(tmp_path / "transformer" / "config.json", joint_attention_dim=64)
    with refuses(tmp_path, "text_encoder: hidden_size=48, but the transformer's joint_attention_dim=64"):
        check_fit(open_again(tmp_path))


def test_fields_left_out_have_transformers_defaults():
    ours, theirs = LlamaConfig.from_json({"model_type": "llama"}), transformers.LlamaConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.num_attention_heads, ours.key_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.size, ours.rope_theta) == (theirs.head_dim, theirs.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 7.0, "rope_scaling": None},
        {"rope_theta": 7.0},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
        {"rope_theta": 7.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_the_base_of_positions_is_where_both_ages_of_transformers_write_it(fields):
    assert LlamaConfig.from_json(fields).rope_theta == 7.0
    assert transformers.LlamaConfig(**fields).rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but only 'silu' is implemented"),
        ({"attention_bias": True}, "attention_bias=True, but only False"),
        ({"mlp_bias": True}, "mlp_bias=True, but only False"),
        ({"sliding_window": 4096}, "sliding_window=4096, but only None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling has rope_type='llama3', but only",
        ),
        ({"rope_parameters": {"type": "linear"}}, "rope_parameters has rope_type='linear', but only 'default'"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not an object"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide .*num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must divide"),
        ({"hidden_size": 50}, "hidden_size=50 must be a multiple of .*num_attention_heads=4"),
        ({"head_dim": 5}, "a head's size 5 must be even"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0 must be more than 0"),
        ({"rms_norm_eps": 2.0}, "rms_norm_eps=2.0 is not from 0 to 1"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 must be more than left_out=2"),
    ],
)
def test_what_a_config_cannot_be_is_named(changes, message, tmp_path):
    checkpoint_of(reference(), tmp_path)
    edit_json(tmp_path / "text_encoder" / "config.json", **changes)
    with refuses(tmp_path, f"unusable config.json: .*{message}"):
        open_again(tmp_path).load("text_encoder")
