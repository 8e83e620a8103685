"""Tokens beside a vocabulary: ids are those of transformers, however the files write them."""

import json
import random

import pytest
import transformers
from tokenizer_cases import clip_files, write_clip_json, write_clip_old, write_t5

from dfa2_jax.encoders.tokenizers import Tokenizer

FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
ADDED = ("<s0>", "<s1>", "<Cat Toy>", "circle", "caf\u00e9")
TEXTS = [
    "a <s0><s1> circle",
    "x<s1>y <S0> <cat toy>,<Cat Toy>  <Cat Toy>s",
    "circles Circle circle",
    "CAF\u00c9 caf\u00e9 cafe\u0301",
    "<|startoftext|> a ! <|endoftext|> <|ENDOFTEXT|> <|STARTOFTEXT|> !",
    "<mask> [EXTRA]extra [extra]",
]


def token(rng, text):
    """With some of the flags: what is absent has a default, which may depend on another."""
    return {"content": text} | {name: rng.random() < 0.5 for name in FLAGS if rng.random() < 0.7}


def draw_folder(rng, folder):
    """A CLIP folder with learned tokens, in one of the ways of transformers 4 and 5."""
    folder.mkdir()
    write_clip_old(folder, rng.choice(["<|endoftext|>", "!"]))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = json.loads((folder / "special_tokens_map.json").read_text())
    added = rng.sample(ADDED, rng.randrange(1, len(ADDED) + 1))
    first = len(clip_files()[0])
    numbers = {text: first + number for number, text in enumerate(added)}
    if rng.random() < 0.4:
        special["mask_token"] = rng.choice(["<mask>", "<s0>"])
    if rng.random() < 0.4:
        rng.choice([special, config])["additional_special_tokens"] = ["[EXTRA]", rng.choice(ADDED)]
    if rng.random() < 0.5:
        (folder / "added_tokens.json").write_text(json.dumps(numbers))
    if rng.random() < 0.5:
        decoder = {number: token(rng, text) for text, number in numbers.items()}
        for text in ("<|startoftext|>", "<|endoftext|>"):
            decoder[clip_files()[0][text]] = token(rng, text)
        config["added_tokens_decoder"] = dict(rng.sample(sorted(decoder.items()), len(decoder)))
        config |= {name: "<|endoftext|>" for name in ("eos_token", "unk_token")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.mark.parametrize("seed", range(12))
def test_learned_tokens_have_the_ids_of_transformers(seed, tmp_path):
    rng = random.Random(seed)
    for number in range(5):
        draw_folder(rng, folder := tmp_path / str(number))
        theirs = transformers.CLIPTokenizer.from_pretrained(folder)
        want = theirs(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
        files = {path.name: path.read_text() for path in folder.glob("*s*.json")}
        assert Tokenizer.load(folder).encode(TEXTS).tolist() == want, files


SAVED = {"clip": (lambda folder: write_clip_json(folder, "!"), transformers.CLIPTokenizer)}
SAVED["t5"] = (write_t5, transformers.T5TokenizerFast)


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_tokenizer_keeps_its_learned_tokens(name, tmp_path):
    """In tokenizer.json, and in a tokenizer_config.json that was edited later."""
    write, kind = SAVED[name]
    write(tmp_path)
    tokenizer = kind.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<s0>", transformers.AddedToken("<Cat Toy>", lstrip=True, normalized=False)])
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    decoder = {number: token.__getstate__() for number, token in tokenizer.added_tokens_decoder.items()}
    late = transformers.AddedToken("circle", single_word=True).__getstate__()
    for more in ({}, {"added_tokens_decoder": decoder | {len(tokenizer): late}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
        theirs = kind.from_pretrained(tmp_path)
        want = theirs(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
        assert len(tokenizer) - 1 in want[1] and (len(tokenizer) in want[0]) == bool(more)
        assert Tokenizer.load(tmp_path).encode(TEXTS, 77).tolist() == want
