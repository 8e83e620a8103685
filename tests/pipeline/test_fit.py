"""Folders that mix models are refused, with both sizes, before the transformer's weights are read."""

import json
import re
import shutil

import pytest
from damage import edit_json, refuses

from dfa2_jax import Pipeline, convert_checkpoint
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.pipeline.components import Networks
from dfa2_jax.weights.checkpoint import Checkpoint


@pytest.fixture
def no_weights(monkeypatch):
    """The error comes before any work."""

    def load(self, component, dtype=None, place=None):
        raise AssertionError(f"{component} was loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.mark.parametrize(
    ("family", "component", "changes", "message"),
    [
        ("flux", "vae", {"latent_channels": 4}, "vae: latent_channels=4, .* latent channels=16"),
        ("flux", "vae", {"out_channels": 4}, "vae: out_channels=4, but images have 3"),
        ("flux", "text_encoder", {"hidden_size": 48}, "text_encoder: hidden_size=48, .* pooled_projection_dim=32"),
        ("flux", "text_encoder_2", {"d_model": 64}, "text_encoder_2: d_model=64, .* joint_attention_dim=96"),
        ("flux", "transformer", {"in_channels": 16}, "vae: latent_channels=16, .* latent channels=4"),
        (
            "sd35",
            "text_encoder_2",
            {"projection_dim": 64},
            r"text_encoder and text_encoder_2: projection_dim 32 \+ 64=96, .* pooled_projection_dim=80",
        ),
        ("sd35", "text_encoder", {"hidden_size": 80}, "hidden_size adds up to 128, more than .*joint_attention_dim=96"),
        ("sd35", "text_encoder_3", {"d_model": 64}, "text_encoder_3: d_model=64, .* joint_attention_dim=96"),
        ("sd35", "vae", {"latent_channels": 8}, "vae: latent_channels=8, .* latent channels=16"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_widths_that_differ_are_named(family, component, changes, message, tiny_flux_dev, tiny_sd35, tmp_path):
    folder = shutil.copytree({"flux": tiny_flux_dev, "sd35": tiny_sd35}[family], tmp_path / "model")
    edit_json(folder / component / "config.json", **changes)
    with refuses(folder, f"are not of one model: get the folder again.\n.*{message}"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("vae/config.json", {"latent_channels": 4}, "are not of one model: .*\n.*vae: latent_channels=4"),
        ("text_encoder/config.json", {"vocab_size": 20}, "text_encoder has vocab_size=20: they are not of one model"),
    ],
)
def test_what_does_not_fit_is_not_converted(component, changes, message, tiny_flux_dev, tmp_path):
    """Before a byte is written: the converted folder would be found unusable only when it is loaded."""
    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    edit_json(folder / component, **changes)
    with refuses(folder, message):
        convert_checkpoint(folder, tmp_path / "out" / "converted")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
@pytest.mark.usefixtures("no_weights")
def test_a_vocabulary_without_embeddings_is_named(encoder, tiny_flux_dev, tmp_path):
    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    edit_json(folder / encoder / "config.json", vocab_size=20)
    with refuses(folder, rf"{encoder.replace('text_encoder', 'tokenizer')} has \d+ tokens, but {encoder} has .*=20"):
        Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("limit", [78, 10**30])
@pytest.mark.usefixtures("no_weights")
def test_more_tokens_than_positions_are_named(limit, tiny_flux_dev, tmp_path):
    """transformers writes 1e30 where nobody gave a length."""
    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    with refuses(
        folder,
        f"tokenizer_config.json has model_max_length={re.escape(f'{limit:.6g}')}, but text_encoder has .*=77: write 77",
    ):
        Pipeline.from_pretrained(folder)


@pytest.mark.usefixtures("no_weights")
def test_a_learned_token_without_its_embedding_is_named_when_a_prompt_has_it(tiny_flux_dev, tmp_path):
    """A gather would take the last token's embedding for it."""
    folder = shutil.copytree(tiny_flux_dev, tmp_path / "model")
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    size = len(content["model"]["vocab"])
    content["added_tokens"].append({"id": size, "content": "<s0>"} | flags)
    path.write_text(json.dumps(content))
    networks = Networks(open_checkpoint(folder), None)
    with pytest.raises(AssertionError, match="text_encoder was loaded"):
        networks.encode("text_encoder", "tokenizer", ["a circle"], 8)
    with refuses(folder, f"tokenizer makes id {size} of '<s0>', but text_encoder has vocab_size={size}"):
        networks.encode("text_encoder", "tokenizer", ["a <s0> circle"], 8)


@pytest.mark.usefixtures("no_weights")
def test_a_folder_without_encoders_has_nothing_to_fit(tiny_sd35, tmp_path):
    """Half of a pair of encoders is of no use to prompts, but embeddings may be passed."""
    folder = shutil.copytree(tiny_sd35, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3"):
        del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(AssertionError, match="transformer was loaded"):
        Pipeline.from_pretrained(folder)
