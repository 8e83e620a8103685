"""HunyuanVideo's text states, from prompts on, equal those of the pipeline of diffusers."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as diffusers
from llama_cases import checkpoint_of
from tokenizer_cases import write_llama
from torch_models import redraw, relative_error

from dfa2_jax.encoders.tokenizers import Tokenizer
from dfa2_jax.families.hunyuanvideo.prompts import CROP_START, TEMPLATE, crop, templated
from dfa2_jax.pipeline.components import Networks

PROMPTS = ["a red circle {on} the left", "", "a small blue circle on the left " * 20]


def test_the_template_is_that_of_diffusers():
    assert {"template": TEMPLATE, "crop_start": CROP_START} == diffusers.DEFAULT_PROMPT_TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, [TEMPLATE, *PROMPTS])
    return folder


def test_what_is_cropped_are_the_words_before_the_prompt(folder):
    """Where every word of the template is a token, as in Llama 3's vocabulary of 128,000."""
    start, end = TEMPLATE.split("{}")
    backend = Tokenizer.load(folder).backend
    assert len(backend.encode(start).ids) == CROP_START
    assert [len(backend.encode(text).ids) for text in templated([""])] == [CROP_START + 1] and end == "<|eot_id|>"


def test_states_and_lengths_equal_those_of_the_pipeline(folder, tmp_path):
    tokenizer = Tokenizer.load(folder)
    shutil.copytree(folder, tmp_path / "tokenizer")
    sizes = dict(vocab_size=tokenizer.backend.get_vocab_size(), hidden_size=32, intermediate_size=48)
    heads = dict(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    llama = redraw(transformers.LlamaModel(transformers.LlamaConfig(**sizes, **heads)))
    as_the_file = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", padding_side="right"
    )
    pipeline = SimpleNamespace(text_encoder=llama, tokenizer=as_the_file, _execution_device="cpu")
    with torch.no_grad():
        wanted, mask = diffusers.HunyuanVideoPipeline._get_llama_prompt_embeds(
            pipeline, PROMPTS, diffusers.DEFAULT_PROMPT_TEMPLATE, max_sequence_length=40
        )
    networks = Networks(checkpoint_of(llama, tmp_path), "float32")
    asked = "text_encoder", "tokenizer", templated(PROMPTS), CROP_START + 40
    states, lengths = crop(*networks.encode(*asked, counted=True))
    np.testing.assert_array_equal(states, networks.encode(*asked)[:, CROP_START:])
    np.testing.assert_array_equal(lengths, mask.sum(1))
    assert states.shape == wanted.shape == (3, 40, 32) and lengths[1] == 1 and lengths[2] == 40
    for ours, theirs, length in zip(states, wanted, lengths, strict=True):
        assert relative_error(ours[:length], theirs[:length]) <= 1e-5


def test_a_text_without_a_prompt_is_refused():
    states = np.zeros((2, 100, 4), np.float32)
    with pytest.raises(ValueError, match="makes 95 tokens of a templated prompt, but the first CROP_START=95"):
        crop(states, np.int32([99, 95]))
