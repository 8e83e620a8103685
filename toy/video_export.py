"""What a training of videos left, as a complete diffusers folder in float16.

    python -m toy.video_export build/video-result dfa2_jax/demo/toy-cogvideox

Needs torch, diffusers and transformers (the `test` extra). diffusers pads prompts to 226 tokens unless it is told
`max_sequence_length=32`, which is what the model was trained on.
"""

from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from transformers import T5TokenizerFast

from toy.export import network, run, write_pipeline
from toy.result import read_arrays
from toy.video_model import SCHEDULER, T5_LENGTH, config, configs, pieces


def export(result: Path, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    arrays = read_arrays(result)
    kinds = {name: (class_name, config(name, arrays)) for name, (class_name, _) in configs().items()}
    pipeline = CogVideoXPipeline(
        **{name: network(name, kind, arrays) for name, kind in kinds.items()},
        scheduler=CogVideoXDDIMScheduler(**SCHEDULER),
        tokenizer=T5TokenizerFast(vocab=pieces(), model_max_length=T5_LENGTH, extra_ids=0),
    )
    return write_pipeline(pipeline, folder, dtype)


if __name__ == "__main__":
    run(export, __doc__)
