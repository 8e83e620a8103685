"""Llama's tokenizer.json. transformers 5.23 builds other steps than the file says, so that the file itself is asked."""

import logging
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizer_cases import write_llama

from dfa2_jax.encoders.tokenizers import Tokenizer

PROMPTS = [
    "",
    " \t\n ",
    "a large red circle on the left",
    "A Large RED circle, isn't it?! 12345 of them\n\n  indented",
    "caf\u00e9 cafe\u0301 \u7ea2\u8272\u7684\u5706 \U0001f469\u200d\U0001f680",
    "<|start_header_id|>user<|end_header_id|>\n\na blue circle<|eot_id|>",
    "<pad> <|begin_of_text|> <s> [INST]",
    "red " * 200,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


@pytest.mark.parametrize("max_length", [351, 20, 1])
def test_ids_and_lengths_are_those_of_the_file(folder, max_length):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length)
    backend.enable_padding(length=max_length, pad_id=backend.token_to_id("<pad>"), pad_token="<pad>")
    ids, lengths = Tokenizer.load(folder).encode_counted(PROMPTS, max_length)
    wanted = backend.encode_batch(PROMPTS)
    np.testing.assert_array_equal(ids, [encoding.ids for encoding in wanted])
    np.testing.assert_array_equal(lengths, [sum(encoding.attention_mask) for encoding in wanted])
    assert set(ids[:, 0]) == {backend.token_to_id("<|begin_of_text|>")}
    np.testing.assert_array_equal(ids, Tokenizer.load(folder).encode(PROMPTS, max_length))


def test_an_end_that_the_text_brings_is_cut_with_it(folder, caplog):
    tokenizer = Tokenizer.load(folder)
    backend, text = tokenizer.backend, "a red circle on the left"
    whole = backend.encode(text + "<|eot_id|>").ids
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        fitting, lengths = tokenizer.encode_counted([text + "<|eot_id|>", " red"], len(whole))
        assert fitting[0].tolist() == whole and lengths.tolist() == [len(whole), 2] and not caplog.records
        cut, lengths = tokenizer.encode_counted([text + "<|eot_id|>"], len(whole) - 2)
    assert cut[0].tolist() == whole[:-2] and lengths == len(whole) - 2
    (record,) = caplog.records
    assert f"has {len(whole)} tokens and was cut to {len(whole) - 2}" in record.getMessage()
    assert repr(" left<|eot_id|>") in record.getMessage()
