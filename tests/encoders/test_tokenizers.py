import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from checkout import ROOT
from tokenizer_cases import write_clip_json, write_clip_old, write_t5

from dfa2_jax.encoders.tokenizers import Tokenizer

PROMPTS = [
    "",
    " \t\n ",
    "a large red circle on the left of a blue background",
    "Hello, WORLD!!! it's 2024 & we'll see...",
    "!",
    "caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m \u017fharp \u0130stanbul",
    "\u7ea2\u8272\u7684\u5706 \u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u0643\u0631\u0629",
    "emoji \U0001f600\U0001f469\u200d\U0001f680 \u2764\ufe0f",
    "tabs\tand\nnewlines  and\u00a0no-break\u3000spaces",
    "<|startoftext|> <|endoftext|> </s> <pad> <extra_id_0>",
    "under_score x2y 3/4 a-b \u2014 \u201cquoted\u201d",
    "red " * 200,
    "large circle! " * 60 + "tail",
]


WRITERS = {
    "clip_l": (lambda folder: write_clip_json(folder, "<|endoftext|>"), transformers.CLIPTokenizer),
    "bigg": (lambda folder: write_clip_json(folder, "!"), transformers.CLIPTokenizer),
    "clip_l_old": (lambda folder: write_clip_old(folder, "<|endoftext|>"), transformers.CLIPTokenizer),
    "bigg_old": (lambda folder: write_clip_old(folder, "!"), transformers.CLIPTokenizer),
    "t5": (write_t5, transformers.T5TokenizerFast),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in WRITERS}
    for name, (write, _) in WRITERS.items():
        write(made[name])
    return made


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("max_length", [77, 256, 20])
def test_equals_transformers(folders, name, max_length):
    theirs = WRITERS[name][1].from_pretrained(folders[name])
    wanted = theirs(PROMPTS, padding="max_length", max_length=max_length, truncation=True, return_tensors="np")
    ours = Tokenizer.load(folders[name])
    for prompt, row, want in zip(PROMPTS, ours.encode(PROMPTS, max_length), wanted.input_ids, strict=True):
        np.testing.assert_array_equal(row, want, err_msg=repr(prompt))
    assert ours.model_max_length == theirs.model_max_length


def test_pads_differ(folders):
    ids = {name: Tokenizer.load(folders[name]).encode(["red!", "red"]) for name in ("clip_l_old", "bigg_old", "t5")}
    assert ids["clip_l_old"].shape == (2, 77) and ids["t5"].shape == (2, 512)
    end = ids["clip_l_old"][1, 2]
    assert set(ids["clip_l_old"][1, 2:]) == {end}
    assert ids["bigg_old"][1, 2] == end and set(ids["bigg_old"][1, 3:]) == {0}
    assert ids["bigg_old"][0, 2] == 0 != ids["clip_l_old"][0, 2]  # "!" is bigG's pad token, also inside a prompt
    assert set(ids["t5"][1, -400:]) == {0}


@pytest.mark.parametrize(
    "name, cut", [("clip_l_old", "circle ! tail"), ("bigg", "circle !tail"), ("t5", "circle! tail")]
)
def test_cut_text_is_logged(folders, name, cut, caplog):
    """The text that diffusers names: what lies beyond the limit, the end token aside."""
    tokenizer = Tokenizer.load(folders[name])
    fits, tail = "red " * 40, "circle! tail"
    unpadded = WRITERS[name][1].from_pretrained(folders[name])
    limit = len(unpadded(fits).input_ids)
    with caplog.at_level(logging.WARNING, "dfa2_jax"):
        tokenizer.encode([fits, "", fits], limit)
        assert not caplog.records
        tokenizer.encode(["red", fits + tail], limit)
    (record,) = caplog.records
    assert record.name == "dfa2_jax" and record.levelno == logging.WARNING
    length = len(unpadded(fits + tail).input_ids)
    removed = unpadded.batch_decode(np.array([unpadded(fits + tail).input_ids])[:, limit - 1 : -1])[0]
    message = record.getMessage()
    assert f"{folders[name].name}: the text has {length} tokens and was cut to {limit}" in message
    assert repr(removed) in message and removed.split() == cut.split()


def test_needs_neither_torch_nor_transformers(folders):
    code = (
        "import sys; from dfa2_jax.encoders.tokenizers import Tokenizer;"
        "Tokenizer.load(sys.argv[1]).encode(['red'], 77);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folders["clip_l_old"])], check=True, cwd=ROOT)


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer_config\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512, "pad_token": None}))
    with pytest.raises(
        FileNotFoundError,
        match=r"neither tokenizer\.json nor spiece\.model nor vocab\.json.*\['tokenizer_config\.json'\]",
    ):
        Tokenizer.load(tmp_path)
    write_clip_old(tmp_path, "!")
    for missing in ("pad_token", "model_max_length"):
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            config = json.loads((tmp_path / file).read_text())
            config.pop(missing, None)
            (tmp_path / file).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"tokenizer_config.json lacks '{missing}'"):
            Tokenizer.load(tmp_path)
        write_clip_old(tmp_path, "!")
    write_clip_old(tmp_path, "[PAD]")
    with pytest.raises(ValueError, match=r"special token '\[PAD\]' is not among the 5\d\d tokens"):
        Tokenizer.load(tmp_path)
