"""Damages tokenizers and configs and says how their readers took it; shared by test_fuzz.py and benchmarks/fuzz.py."""

import json
import random
import shutil
import tracemalloc
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from mutations import edit_json, mutate
from tokenizer_cases import write_clip_json, write_clip_old, write_t5

from dfa2_jax.encoders.tokenizers import load_tokenizer
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.pipeline.fit import check_fit

PROMPTS = ["a large red circle on the left!", "caf\u00e9 <|endoftext|> \u7ea2\u8272 " + "a" * 60]


PYTHON_BYTES = 500_000
"""What reading may take of Python's memory (164 kB seen): these folders have JSON of up to 5 kB."""


def said(path: Path) -> Any:
    """What a JSON file says, by another reader than ours."""
    return json.loads(path.read_bytes().decode("utf-8-sig"))


class FolderFuzzer:
    """Damages one file of a folder at a time: its bytes or, half of the time, a number or a piece of its JSON."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.folder = random.Random(seed), folder
        files = (path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".txt"))
        self.samples = {path: path.read_bytes() for path in files}
        self.counts, self.peak_bytes = {"read": 0, "refused": 0}, 0
        for path in self.samples:
            self.read(path)

    def read(self, path: Path) -> None:
        """What a user of the folder does.

        Raises:
            CheckpointError: the folder is refused.
            AssertionError: other values were read than the files hold.
        """
        raise NotImplementedError

    def step(self) -> None:
        """One damaged file. Raises whatever reading raises that is no CheckpointError, with the file."""
        path = self.rng.choice(sorted(self.samples))
        good = self.samples[path]
        damage = edit_json if path.suffix == ".json" and self.rng.random() < 0.5 else mutate
        damaged = damage(self.rng, good) if damage is edit_json else mutate(self.rng, good, is_json=True)
        path.write_bytes(damaged)
        tracemalloc.start()
        try:
            self.read(path)
            self.counts["read"] += 1
        except CheckpointError as error:
            assert str(error).strip(), damaged
            self.counts["refused"] += 1
        except BaseException as error:
            error.add_note(f"{path.relative_to(self.folder)}: {damaged!r:.3000}")
            raise
        finally:
            self.peak_bytes = max(self.peak_bytes, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            path.write_bytes(good)
        assert self.peak_bytes <= PYTHON_BYTES, f"{self.peak_bytes} bytes for {path.name} of {len(damaged)}"


class TokenizerFuzzer(FolderFuzzer):
    """CLIP tokenizers of both ages, and T5's."""

    def __init__(self, folder: Path, seed: int):
        writers = {
            "json": lambda to: write_clip_json(to, "!"),
            "old": lambda to: write_clip_old(to, "!"),
            "t5": write_t5,
        }
        for name, write in writers.items():
            (folder / name).mkdir(parents=True)
            write(folder / name)
        super().__init__(folder, seed)

    def read(self, path: Path) -> None:
        tokenizer = load_tokenizer(path.parent)
        ids = tokenizer.encode(PROMPTS, 77)
        assert ids.shape == (2, 77) and ids.dtype == np.int32 and (ids >= 0).all()
        whole, config = path.parent / "tokenizer.json", said(path.parent / "tokenizer_config.json")
        words = said(whole)["model"]["vocab"] if whole.exists() else said(path.parent / "vocab.json")
        if isinstance(words, list):  # T5's: each with its score
            words = {word: number for number, (word, _) in enumerate(words)}
        assert tokenizer.backend.get_vocab(with_added_tokens=False) == words
        assert tokenizer.model_max_length == config["model_max_length"]
        if not (path.parent / "special_tokens_map.json").exists():
            pad = config["pad_token"]
            assert tokenizer.backend.id_to_token(tokenizer.pad_id) == (pad if isinstance(pad, str) else pad["content"])


class ConfigFuzzer(FolderFuzzer):
    """The configs of a pipeline, without its weights and tokenizers."""

    def __init__(self, source: Path, folder: Path, seed: int):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
        super().__init__(folder, seed)

    def read(self, path: Path) -> None:
        checkpoint = open_checkpoint(self.folder)
        checkpoint.check_scheduler()
        check_fit(checkpoint)
        for name, config in checkpoint.configs.items():
            file = said(self.folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json"))
            assert json.dumps(config) == json.dumps(file), name
            if name != "scheduler":
                self.check_fields(checkpoint.config(name), file)

    def check_fields(self, config: Any, file: Mapping[str, Any]) -> None:
        for field in (field.name for field in fields(config) if field.name in file):
            value = file[field]
            assert getattr(config, field) == (tuple(value) if isinstance(value, list) else value), field
