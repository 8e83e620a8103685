"""The folder that a conversion writes: what config.json says of every array, and who checks it."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from convert_cases import assert_equal_weights, edit_config, leaves

from dfa2_jax.conversion import convert_checkpoint
from dfa2_jax.families.registry import open_checkpoint
from dfa2_jax.io.errors import CheckpointError


@pytest.fixture(scope="module")
def converted(tiny_flux_dev, tmp_path_factory):
    return convert_checkpoint(tiny_flux_dev, tmp_path_factory.mktemp("converted") / "flux-dev")


@pytest.fixture(scope="module")
def half(tiny_flux_dev, tmp_path_factory):
    """In bfloat16."""
    return convert_checkpoint(tiny_flux_dev, tmp_path_factory.mktemp("half") / "flux-dev", "bfloat16")


def test_dtypes_agree_between_the_routes_and_keep_the_fingerprint(tiny_flux_dev, half):
    source, converted = open_checkpoint(tiny_flux_dev), open_checkpoint(half)
    assert converted.fingerprint == source.fingerprint
    assert converted.stored_dtype("transformer") == jnp.bfloat16
    assert_equal_weights(converted, source, "transformer", "bfloat16")


def test_config_says_what_was_converted(tiny_flux_dev, half):
    config = json.loads((half / "config.json").read_text())
    transformer = config["components"]["transformer"]
    assert transformer["class"] == "FluxTransformer2DModel" and config["format_version"] == 2
    assert {array["dtype"] for array in transformer["arrays"].values()} == {"bfloat16"}
    stored = open_checkpoint(tiny_flux_dev).leaves("transformer")
    shapes = {".".join(map(str, path)): list(leaf.shape) for path, leaf in stored.items()}
    assert {name: array["shape"] for name, array in transformer["arrays"].items()} == shapes
    assert "arrays" not in config["components"]["scheduler"]
    assert set(config["versions"]) == {"dfa2-jax", "jax", "orbax-checkpoint"}


ARRAY = "transformer_blocks.text.ff.up.weight.kernel"


@pytest.fixture
def edited(converted, tmp_path):
    """A copy of a converted folder, config.json changed by `change(config, arrays of the transformer)`."""

    def edit(change):
        folder = shutil.copytree(converted, tmp_path / "edited folder", dirs_exist_ok=True)
        edit_config(folder, lambda config: change(config, config["components"]["transformer"]["arrays"]))
        return folder

    return edit


def test_one_array_may_have_another_type(converted, half, edited):
    path, name = tuple(ARRAY.split(".")), f"{ARRAY}.value"
    rounded = json.loads((half / "config.json").read_text())["components"]["transformer"]["arrays"][ARRAY]
    mixed = edited(lambda _, arrays: arrays.update({ARRAY: rounded}))
    shutil.rmtree(mixed / "weights" / "transformer" / name)
    shutil.copytree(half / "weights" / "transformer" / name, mixed / "weights" / "transformer" / name)
    checkpoint = open_checkpoint(mixed)
    assert checkpoint.stored_dtype("transformer") == jnp.float32, "the type of most of it"
    ours, exact = leaves(checkpoint, "transformer"), leaves(open_checkpoint(converted), "transformer")
    for key, leaf in exact.items():
        rounded = leaf[...].astype(jnp.bfloat16).astype(jnp.float32) if key == path else leaf[...]
        np.testing.assert_array_equal(ours[key][...], rounded, err_msg=str(key))


CHANGES = {
    "another type": (lambda _, arrays: arrays[ARRAY].update(dtype="float16"), "holds float32 .* expected float16"),
    "another shape": (lambda _, arrays: arrays[ARRAY].update(shape=[2, 64]), r"\[2, 64\] in config.json, .2, 64, 256"),
    "missing": (lambda _, arrays: arrays.pop(ARRAY), f"1 arrays missing in config.json: {ARRAY}"),
    "unknown": (lambda _, arrays: arrays.update(extra=arrays[ARRAY]), "1 arrays without a parameter: extra"),
    "no type": (lambda _, arrays: arrays[ARRAY].pop("dtype"), f"transformer.{ARRAY} has an unusable entry .dtype=None"),
    "no such type": (lambda _, arrays: arrays[ARRAY].update(dtype="int3"), "dtype='int3' is not one of"),
    "no shape": (lambda _, arrays: arrays[ARRAY].update(shape=[2, -1]), r"shape=\[2, -1\] is not a list of sizes"),
    "no checksums": (lambda _, arrays: arrays[ARRAY].pop("sha256"), "sha256=None is not a list .*dfa2-convert"),
    "no checksum": (lambda _, arrays: arrays[ARRAY].update(sha256=["0"]), "sha256=..0.. is not a list of checksums"),
    "too few": (lambda _, arrays: arrays[ARRAY]["sha256"].append("0" * 64), "3 checksums, which do not divide"),
    "no object": (lambda _, arrays: arrays.update({ARRAY: "float32"}), "unusable entry .'float32' is not an object"),
    "no digest": (lambda config, _: config.pop("digest"), "no digest: .* carries no checksums. Remove"),
    "format 1": (
        lambda config, _: config.update(format_version=1),
        r"format_version=1; this version reads .*, 2. Remove the folder .* `dfa2-convert SRC '.*edited folder'`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_config_and_arrays_must_agree(case, edited):
    change, message = CHANGES[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(edited(change)).load("transformer")


def test_what_a_later_version_says_of_an_array_is_no_fault(edited):
    folder = edited(lambda _, arrays: arrays[ARRAY].update(crc32c="00000000"))
    assert open_checkpoint(folder).leaves("transformer")
