"""`dfa2 verify`, and what sampling does with a folder that changed."""

import numpy as np
import pytest
from mutations import sample_plan

from dfa2_jax import Pipeline, cli, convert_checkpoint
from dfa2_jax.commands import again
from dfa2_jax.pipeline.loaded import Loaded

SIZES = ["--height", "64", "--width", "64", "--steps", "1", "--max-sequence-length", "16", "--quiet"]


@pytest.fixture
def damaged(tiny_flux_schnell, tmp_path):
    """A converted folder with one flipped bit in the transformer."""
    folder = convert_checkpoint(tiny_flux_schnell, tmp_path / "converted")
    chunk = folder / "weights" / "transformer" / "proj_out.weight.kernel.value" / "0.0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    return folder


@pytest.mark.usefixtures("cache")
def test_a_flipped_bit_is_named_and_loaded_only_on_request(damaged, tmp_path, monkeypatch, capsys):
    assert cli.main(["verify", str(damaged), "--quiet"]) == 2
    assert "transformer.proj_out.weight.kernel, chunk 0.0, has changed" in capsys.readouterr().err

    sample = ["sample", str(damaged), "--prompt", "red", "--out", str(tmp_path / "images"), *SIZES]
    assert cli.main(sample) == 2
    printed = capsys.readouterr()
    assert "proj_out.weight.kernel" in printed.err and not printed.out

    # Loaded all the same. A constant image is written, told of, and no success.
    monkeypatch.setattr(
        Loaded, "decode", lambda self, latents, **_: np.full((len(latents), 1, 64, 64, 3), 0.5, np.float32)
    )
    assert cli.main([*sample, "--no-verify"]) == 1
    assert (tmp_path / "images" / "red-seed0-0.png").is_file()


def test_what_is_whole_is_verified(tiny_flux_schnell, tmp_path, capsys):
    folder = convert_checkpoint(tiny_flux_schnell, tmp_path / "converted")
    assert cli.main(["verify", str(folder), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


LOADS = {
    "sample": ["--prompt", "red", "--out", "out"],
    "calibrate": ["--prompts", "prompts.txt", "--out", "plan.json"],
    "report": ["--prompts", "prompts.txt", "--plan", "plan.json", "--out", "out"],
    "again": [],
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("command", LOADS)
def test_every_command_that_loads_a_folder_can_leave_out_its_checksums(command, tmp_path, monkeypatch):
    loads = []

    def load(folder, *, verify=True, **options):
        loads.append((folder, verify))
        raise ValueError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    monkeypatch.setattr(again, "read_metadata", lambda image: {})
    monkeypatch.setattr(again, "options_again", lambda made, plan: None)
    (tmp_path / "prompts.txt").write_text("red")
    sample_plan(0).save(tmp_path / "plan.json")
    words = [command, *(["image.png"] if command == "again" else []), "folder", *LOADS[command]]
    assert cli.main(words) == 2 and cli.main([*words, "--no-verify"]) == 2
    assert loads == [("folder", True), ("folder", False)]
