"""Damages files and says how their readers took it; shared by test_fuzz.py and benchmarks/fuzz.py."""

import json
import random
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dfa2_jax.calibration.resume import FIELDS, Checkpointed
from dfa2_jax.io.digest import digest_of
from dfa2_jax.io.errors import CheckpointError
from dfa2_jax.plan.method import Method, PlanError
from dfa2_jax.plan.plan import Plan
from dfa2_jax.plan.setting import AttentionLayer, CalibrationRecord, Density, Setting, StepCalibration, UnfittedRun
from dfa2_jax.weights.safetensors import open_weights

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"
SLACK_BYTES = 32_000
"""For what does not grow with the file: records of tensors, messages of 200 characters, tracebacks (13 kB seen)."""

RESUME_BYTES = 200_000
"""For a file of progress of 1 kB: JSON's objects, arrays, a message (58 kB seen)."""

NUMBERS = [b"0", b"1", b"-1", b"00", b"1e9", b"1.5", b"255", b"65536", b"4294967296", b"9999999999999999", b"9" * 400]
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"null",
    b"true",
    b"NaN",
    b"[" * 3000,
    b'{"a":' * 600,
    b'"\xc3\xa9"',
]
TOKENS += [b'"__metadata__":{}', b'"dtype":"F32"', b'"\\ud800"', b"\x00", b"\xff\xfe", b"../", b"/etc/passwd", b"\n"]


def write_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Two valid folders, of one file and of an index with two shards, as bytes by file name."""
    from safetensors.numpy import save

    rng = np.random.default_rng(0)
    tensors = {f"blocks.{i}.weight": rng.standard_normal((4, 3 + i), np.float32) for i in range(4)}
    tensors |= {"half": np.ones((2, 0, 3), np.float16), "scalar": np.array(7, np.int64)}
    names = ["a.safetensors", "b.safetensors"]
    placed = {key: names[number % 2] for number, key in enumerate(tensors)}
    shards = {name: save({key: tensors[key] for key in tensors if placed[key] == name}) for name in names}
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode()
    samples = {"single": {SINGLE: save(tensors, {"format": "pt"})}, "sharded": {INDEX: index, **shards}}
    for name, files in samples.items():
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    return samples


def text_end(data: bytes, is_json: bool) -> int:
    """Where the JSON ends: most of the damage goes there, as the weights may hold anything."""
    return len(data) if is_json else 8 + int.from_bytes(data[:8], "little")


def edit_json(rng: random.Random, text: bytes) -> bytes:
    """Another number, or a piece of the structure moved, doubled or gone."""
    kind = rng.randrange(4)
    if kind == 0 and (numbers := list(re.finditer(rb"\d+", text))):
        hit = rng.choice(numbers)
        near = str(max(0, int(hit.group()) + rng.choice((-8, -4, -1, 1, 4, 8)))).encode()
        return text[: hit.start()] + rng.choice([*NUMBERS, near]) + text[hit.end() :]
    if kind == 1:
        strings = list(re.finditer(rb'"[^"]*"', text))
        hit, other = rng.choice(strings), rng.choice(strings)
        return text[: hit.start()] + other.group() + text[hit.end() :]
    pieces = list(re.finditer(rb'\{[^{}]*\}|\[[^\[\]]*\]|"[^"]*":', text))
    hit, other = rng.choice(pieces), rng.choice(pieces)
    new = b"" if kind == 2 else other.group()
    return text[: hit.start()] + new + text[hit.end() :]


def mutate(rng: random.Random, data: bytes, is_json: bool) -> bytes:
    """One to three changes; the length of the header is put right in half of the cases."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        end = text_end(data, is_json)
        end = end if 0 < end <= len(data) else len(data)
        at = rng.randrange(end if rng.random() < 0.7 else len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + rng.choice((1, 1, 8, 40)) :]
        elif kind == 3 and rng.random() < 0.2:
            data = data[:at]
        else:
            begin = 0 if is_json else 8
            text = data[begin:end]
            try:
                text = edit_json(rng, text)
            except IndexError:  # nothing left to choose from
                text = text[:-1]
            head = b"" if is_json else len(text).to_bytes(8, "little")
            data = head + text + data[end:]
        if not data:
            return data
        if not is_json and kind in (1, 2) and rng.random() < 0.5:
            length = max(0, end - 8 + (len(rng.choice(TOKENS)) if rng.random() < 0.1 else 0))
            data = length.to_bytes(8, "little") + data[8:]
    return data


def read(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor."""
    arrays = {key: tensor.array() for key, tensor in open_weights(folder).items()}
    return {key: (array.dtype.name, array.shape, array.tobytes()) for key, array in arrays.items()}


def reference(files: dict[str, bytes]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What safetensors' own reader makes of the same bytes."""
    from safetensors import deserialize

    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
    found = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            for key, tensor in deserialize(data):
                kind = tensor["dtype"]
                width = {"I": "int", "U": "uint"}
                dtype = names.get(kind) or (width[kind[0]] + kind[1:] if kind[0] in width else kind)
                found[key] = (dtype, tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


class Fuzzer:
    """Damages the samples, one file at a time, and counts what came of it."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.folder, self.samples = random.Random(seed), folder, write_samples(folder)
        self.counts = {"refused": 0, "read": 0}
        self.peak_above_twice = dict.fromkeys(self.samples, 0)
        for name, files in self.samples.items():  # imports and caches are made before memory is counted
            assert read(folder / name) == reference(files)

    def step(self) -> None:
        """One damaged file. Raises AssertionError, with the file, if it is taken in a wrong way."""
        sample = self.rng.choice(sorted(self.samples))
        name = self.rng.choice(sorted(self.samples[sample]))
        damaged = mutate(self.rng, self.samples[sample][name], name == INDEX)
        path = self.folder / sample / name
        path.unlink()  # not overwritten: maps of the old file may be open
        path.write_bytes(damaged)
        files = self.samples[sample] | {name: damaged}
        try:
            self.check(sample, files)
        except BaseException as error:
            error.add_note(f"{name} of the {sample} sample: {damaged!r:.3000}")
            raise
        finally:
            path.unlink()
            path.write_bytes(self.samples[sample][name])

    def check(self, sample: str, files: dict[str, bytes]) -> None:
        tracemalloc.start()
        try:
            found = {key: tensor.array() for key, tensor in open_weights(self.folder / sample).items()}
        except CheckpointError:
            found = None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        above = peak - 2 * sum(map(len, files.values()))
        self.peak_above_twice[sample] = max(self.peak_above_twice[sample], above)
        assert above <= SLACK_BYTES, f"{peak} bytes allocated, {above} above twice the files"
        self.counts["refused" if found is None else "read"] += 1
        if found is not None:  # what is taken must be what the reference reader takes, and equal
            got = {key: (array.dtype.name, array.shape, array.tobytes()) for key, array in found.items()}
            assert got == reference(files)


class PlanFuzzer:
    """Damages a plan's file, in its bytes or, with the digest made good, in its fields."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.path = random.Random(seed), folder / "plan.json"
        self.plans = []
        for plan in (sample_plan(seed), step_plan()):
            plan.save(self.path)
            self.plans.append((plan, self.path.read_bytes()))
        self.counts = {"read": 0, "refused": 0}

    def step(self) -> None:
        """One more.

        Raises:
            AssertionError: a plan was read that is not what its file says.
            Exception: reading ended in another way than a plan or a `PlanError`.
        """
        by_bytes, (whole, good) = self.rng.random() < 0.4, self.rng.choice(self.plans)
        data = mutate(self.rng, good, is_json=True) if by_bytes else self._edited(good)
        self.path.write_bytes(data)
        try:
            plan = Plan.load(self.path)
        except PlanError:
            self.counts["refused"] += 1
            return
        self.counts["read"] += 1
        assert not by_bytes or plan == whole, "a damaged file was read as another plan"
        plan.save(self.path)
        assert Plan.load(self.path) == plan
        plan.half_windows(), plan.density(), plan.cost(0.5)
        if plan.step_calibration is not None:
            assert len(plan.resolve(speedup=1.0).nodes) == plan.setting.num_inference_steps

    def _edited(self, good: bytes) -> bytes:
        content = json.loads(good)
        for _ in range(self.rng.choice([1, 1, 2, 5])):
            holder = content
            while isinstance(holder, dict | list) and holder:
                key = self.rng.choice([*(holder if isinstance(holder, dict) else range(len(holder)))])
                if not isinstance(holder[key], dict | list) or not holder[key] or self.rng.random() < 0.2:
                    self._edit(holder, key)
                    break
                holder = holder[key]
        if "digest" in content and self.rng.random() < 0.95:
            content["digest"] = self._digest(content)
        return json.dumps(content).encode()

    def _digest(self, content: dict[str, Any]) -> str:
        return digest_of(
            {name: value for name, value in content.items() if name not in ("format", "version", "digest")}
        )

    def _edit(self, holder: Any, key: Any) -> None:
        values = [
            0,
            1,
            -1,
            2**40,
            10**400,
            1.5,
            float("nan"),
            float("inf"),
            None,
            True,
            "",
            "f",
            "cached",
            "1",
            [],
            {},
            [1],
            "x" * 300,
        ]
        kind = self.rng.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[self.rng.choice(["digest", "steps", "extra", "f", "joint.0"])] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], str) and holder[key]:
            place = self.rng.randrange(len(holder[key]))
            holder[key] = (
                holder[key][:place] + self.rng.choice("fcabz01é") + holder[key][place + self.rng.randrange(2) :]
            )
        else:
            holder[key] = self.rng.choice(values)


class ResumeFuzzer(PlanFuzzer):
    """Damages a calibration's file of progress, in its bytes or, with the digest made good, in its fields."""

    def __init__(self, folder: Path, seed: int):
        self.rng, self.path = random.Random(seed), folder / "plan.json.progress"
        plan = sample_plan(seed, steps=4)
        self.empty = replace(plan, choices=np.zeros_like(plan.choices))
        errors = np.random.default_rng(seed).random((3, 4, 3), np.float32)
        for _ in range(2):
            Checkpointed.read(self.path, "sha256:0", self.empty).add(plan.choices[1].astype(int) - 1, errors)
        self.good = self.path.read_bytes()
        self.counts, self.peak_bytes = {"read": 0, "refused": 0}, 0

    def step(self) -> None:
        """One more.

        Raises:
            AssertionError: other findings were read than the file holds, or much memory was taken.
            Exception: reading ended in another way than with findings or a `ValueError` of ours.
        """
        by_bytes = self.rng.random() < 0.4
        data = mutate(self.rng, self.good, is_json=True) if by_bytes else self._edited(self.good)
        self.path.write_bytes(data)
        tracemalloc.start()
        try:
            again = Checkpointed.read(self.path, "sha256:0", self.empty)
        except ValueError as error:
            assert "remove it to start anew" in str(error), repr(error)
            self.counts["refused"] += 1
            return
        finally:
            self.peak_bytes = max(self.peak_bytes, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert self.peak_bytes <= RESUME_BYTES, f"{self.peak_bytes} bytes for a file of {len(data)}"
        self.counts["read"] += 1
        said = json.loads(data.decode("utf-8-sig"))
        got = {"picks": again.picks, "spent": [[*layers] for layers in again.spent]}
        assert json.dumps(got) == json.dumps({"picks": said["picks"], "spent": floats(said["spent"])}), data
        again.filled(self.empty).half_windows()

    def _digest(self, content: dict[str, Any]) -> str:
        return digest_of({name: content.get(name) for name in FIELDS})


def floats(numbers: list[list[float]]) -> list[list[float]]:
    """As JSON has no integers: 1 is 1.0."""
    return [[float(number) if type(number) is int else number for number in layer] for layer in numbers]


def sample_plan(seed: int, steps: int = 3) -> Plan:
    """A plan of two joint layers and one that sees no text, four heads, with everything that a file can hold."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        AttentionLayer(name=name, num_text=text, num_visual=64, text_first=False)
        for name, text in (("joint.0", 8), ("attn2.0", 0), ("joint.1", 8))
    )
    setting = Setting(
        pipeline_class="StableDiffusion3Pipeline", weights="0123456789abcdef", scheduler="Euler",
        sigmas=tuple(np.linspace(1, 0, steps + 1).tolist()), height=128, width=128, doubled_batch=True, num_heads=4,
        layers=layers,
    )  # fmt: skip
    calibration = CalibrationRecord(
        dtype="float32",
        prompts_sha256="sha256:0", num_prompts=2, seed=0, guidance_scale=7.0, delta=0.4, c=None,
        candidates=("cached", "arrow(1/8)"), tiles=(16, 16), versions={"jax": "0.10.2"},
        predicted_density=Density(exact=0.5, tiles=0.6), errors=((0.0, 0.1, 0.2),) * steps,
    )  # fmt: skip
    choices = rng.integers(4, size=(steps, 3, 4), dtype=np.uint8)
    choices[0] = 0
    return Plan(setting, tuple(map(Method, ("full", "cached", "arrow(1/8)", "arrow(1/32)"))), choices, calibration)


def step_plan(steps: int = 9) -> Plan:
    """A plan of `sample_plan`'s call, heads in full, as a calibration of steps leaves it: four nodes."""
    setting = sample_plan(0, steps).setting
    time, generator = np.linspace(0, 1, steps), np.random.default_rng(0)
    basis = np.stack([np.cos(number * 2 * time) for number in range(4)], axis=1)
    velocities = basis @ generator.normal(size=(4, 50))
    gram = (velocities @ velocities.T / 50).tolist()
    unfitted = tuple(UnfittedRun(predicted_error=1 / x, measured_psnr=kept) for x, kept in ((1e2, 32.5), (1e4, 54.5)))
    record = StepCalibration(
        prompts_sha256="sha256:0", num_prompts=2, seed=0, guidance_scale=7.0, dtype="float32",
        versions={"jax": "0.10.2"},
        gram=tuple(map(tuple, gram)), growth=tuple(np.linspace(4, 1, steps + 1).tolist()),
        unfitted=unfitted,
        predicted_error=0.0, measured_error=None,
    )  # fmt: skip
    return replace(Plan.full(setting), step_calibration=record).resolve(speedup=steps / 4)
