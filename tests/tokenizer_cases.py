"""Tokenizers of a few merges, in the files of both libraries and ages."""

import json
from collections.abc import Sequence
from pathlib import Path

import transformers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

CORPUS = [f"a {size} {colour} circle on the left" for size in ("small", "large") for colour in ("red", "blue", "green")]


def clip_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in CLIP's order: bytes, bytes at a word's end, merges, start, end."""
    backend = Backend(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+"), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    order = alphabet + [byte + "</w>" for byte in alphabet] + [a + b for a, b in merges]
    order = list(dict.fromkeys(order)) + ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(order)}, merges


def write_clip_json(folder: Path, pad_token: str) -> None:
    vocab, merges = clip_files()
    transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77).save_pretrained(
        folder
    )


def write_clip_old(folder: Path, pad_token: str) -> None:
    """The files of the published SD3 and FLUX.1 folders, special tokens as dicts and as strings."""
    vocab, merges = clip_files()
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start = dict(content="<|startoftext|>", lstrip=False, normalized=True, rstrip=False, single_word=False)
    config = dict(
        tokenizer_class="CLIPTokenizer",
        model_max_length=77,
        pad_token=pad_token,
        bos_token={"__type": "AddedToken"} | start,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    specials = dict(bos_token=start, eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=pad_token)
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))


def write_t5(folder: Path) -> None:
    backend = Backend(models.Unigram())
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=letters,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocab = [tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"]]
    transformers.T5TokenizerFast(vocab=vocab, extra_ids=2, model_max_length=512).save_pretrained(folder)


# Meta's pattern (meta-llama/llama3, tokenizer.py): contractions, words with what is before them, up to three digits.
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_NAMES = "begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"
LLAMA_SPECIAL = [*(f"<|{name}|>" for name in LLAMA_NAMES), "<pad>"]


def llama_backend(texts: Sequence[str]) -> Backend:
    """Llama 3's kind, which has the words of `texts` as tokens and puts a begin before each text."""
    backend = Backend(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([words, whole]), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(LLAMA_SPECIAL)
    begin = LLAMA_SPECIAL[0]
    template = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, backend.token_to_id(begin))],
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return backend


def write_llama(folder: Path, texts: Sequence[str] = CORPUS) -> None:
    """The files of such a tokenizer."""
    llama_backend(texts).save(str(folder / "tokenizer.json"))
    names = {"bos_token": LLAMA_SPECIAL[0], "eos_token": "<|end_of_text|>", "pad_token": "<pad>"}
    config = names | {"tokenizer_class": "LlamaTokenizer", "model_max_length": 10**30, "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
