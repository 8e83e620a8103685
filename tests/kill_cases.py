"""Kills commands at random moments, looks at what stays, and runs them again; shared by tests/io/test_kills.py and
benchmarks/kills.py.

    python tests/kill_cases.py MODELS WORK CASE=COUNT [SEED]   # a line of JSON for each kill

MODELS holds the folders of tests/tiny.py. A kill is SIGKILL. Commands run in forks of a process that has imported
everything and has started nothing, so that the moments fall into the work.
"""

import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from mutations import sample_plan
from PIL import Image

from dfa2_jax import cli, conversion  # noqa: F401 (forks find it imported)
from dfa2_jax.io.digest import digest_of
from dfa2_jax.plan.plan import Plan
from dfa2_jax.weights.verify import verify_folder

SIZE = ["--height", "64", "--width", "64", "--steps", "4", "--max-sequence-length", "16", "--quiet"]
HEADS = ["--delta", "0.4", "--tiles", "16", "16"]
PROMPTS = ["a large red circle", "a small green star"]


@dataclass(frozen=True)
class Case:
    """One command on an empty folder.

    run: gives the exit code.
    compiled: the first run compiles, and is no measure.
    transient: files that a killed run may leave by their own names, and the next one removes.
    """

    run: Callable[[Path], int]
    compiled: bool = True
    transient: tuple[str, ...] = ()


def cases(models: Path, work: Path) -> dict[str, Case]:
    """By name."""
    prompts, plan = work / "prompts.txt", work / "plan.json"
    prompts.write_text("\n".join(PROMPTS))
    flux = str(models / "flux-dev")
    given = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    found = ["--prompts", str(prompts)]

    def calibrate(folder: Path, *budget: str) -> int:
        return cli.main(["calibrate", flux, *found, "--out", str(folder / "plan.json"), *budget, *SIZE])

    reported = [*found, "--plan", str(plan), "--seed", "0"]
    return {
        "plan": Case(lambda folder: save_plans(folder / "plan.json"), compiled=False),
        "convert": Case(lambda folder: cli.convert([str(work / "source"), str(folder / "model")]), compiled=False),
        "sample": Case(lambda folder: cli.main(["sample", flux, *given, "--out", str(folder), *SIZE])),
        "calibrate": Case(lambda folder: calibrate(folder, *HEADS), transient=("plan.json.progress",)),
        "calibrate steps": Case(lambda folder: calibrate(folder, "--speedup", "2"), transient=("plan.json.progress",)),
        "report": Case(lambda folder: cli.main(["report", flux, *reported, "--out", str(folder), "--quiet"])),
    }


@cache
def plans() -> list[Plan]:
    return [sample_plan(number, 40) for number in range(8)]


def save_plans(path: Path) -> int:
    for plan in plans() * 4:
        plan.save(path)
    return 0


def contents(folder: Path, hidden: bool = False) -> Iterator[tuple[str, str]]:
    """Names and digests of what a folder shows. Numbers in names, pixels' packing, times and dates are left out.

    Raises:
        Exception: something is not whole.
    """
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and (hidden or not name.startswith(".")):
            yield re.sub(r"-\d+\.png$", ".png", name), digest(path)


def digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".png":
        with Image.open(path) as image:
            return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
    if path.name == "_CHECKPOINT_METADATA":  # has the time
        data = str(sorted(json.loads(data))).encode()
    if path.name == "report.json":
        rows = json.loads(data)["rows"]
        data = json.dumps([row.get("metrics") for row in rows]).encode()
    if path.name == "report.html":
        data = data[-20:]  # it has times, and is named when it is whole
    if path.name == "plan.json":
        data = Plan.load(path).digest.encode()
    if data.startswith(b"dfa2-calibration"):  # whole records count, and the next run says what they are worth
        return "progress"
    if path.suffix == ".progress":
        content = json.loads(data)
        assert content.pop("digest") == digest_of(content)
        return "progress"
    return hashlib.sha256(data).hexdigest()


def in_fork(
    work: Callable[[], int], errors: Path, seconds: float | None = None, watched: Path | None = None
) -> tuple[int, float, float]:
    """Run `work` in a fork, and kill it after so many seconds; with `watched`, seconds since that folder has something.

    Returns:
        The exit code (-9 where it was killed), all seconds, and those since something was in `watched`.
    """
    begin = begun = time.perf_counter()
    if not (pid := os.fork()):
        code = 70
        try:
            for descriptor, target in ((0, os.devnull), (1, os.devnull), (2, errors)):
                os.dup2(os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    descriptor = os.pidfd_open(pid)
    while watched is not None and not os.listdir(watched) and not select.select([descriptor], [], [], 0.001)[0]:
        begun = time.perf_counter()
    if not select.select([descriptor], [], [], seconds)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(descriptor)
    code, end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.perf_counter()
    return code, end - begin, end - begun


class Killer:
    """Kills one case many times.

    reference: by name, the digests that its content may have: those of an unbroken run.
    seconds: of an unbroken run.
    writing: of those, since something was in the folder.
    """

    def __init__(self, name: str, case: Case, work: Path, seed: int):
        self.name, self.case, self.work, self.rng = name, case, work, random.Random(seed)
        self.folder, self.errors = work / name, work / "stderr"
        self._begin()
        for _ in range(1 + case.compiled):
            self._begin()
            run = in_fork(lambda: case.run(self.folder), self.errors, watched=self.folder)
            code, self.seconds, self.writing = run
            assert code == 0, self.errors.read_text()
        self.reference = {key: {found} for key, found in contents(self.folder, hidden=True)}
        if name == "plan":
            self.reference["plan.json"] |= {hashlib.sha256(plan.digest.encode()).hexdigest() for plan in plans()}

    def kill(self) -> dict[str, Any]:
        """At one more moment: what was left, and what was wrong then or after the next run.

        Half of the moments are of the whole run, half of the time in which it writes. A run that ended before its
        moment is no kill: another moment is drawn.
        """
        code = 0
        while code != -9:
            self._begin()
            watched = self.rng.choice([None, self.folder])
            moment = self.rng.uniform(0, self.seconds if watched is None else self.writing)
            code, *_ = in_fork(lambda: self.case.run(self.folder), self.errors, moment, watched)
        left = len([name for name in os.listdir(self.folder) if name.startswith(".")])
        row: dict[str, Any] = {"case": self.name, "seconds": round(moment, 3), "while_writing": watched is not None}
        row |= {"left": left, "seconds_unbroken": round(self.seconds, 2)}
        try:
            complete = self._check(dict(contents(self.folder))) and self.name == "convert"
            again, *_ = in_fork(lambda: self.case.run(self.folder), self.errors)
            assert again == (2 if complete else 0), f"exit code {again}: {self.errors.read_text()[-500:]}"
            after = dict(contents(self.folder, hidden=True))
            assert self._check(after), f"missing: {self.reference.keys() - after.keys()}"
            assert after.keys() == self.reference.keys(), f"left behind: {after.keys() - self.reference.keys()}"
        except Exception as error:
            row["fault"] = f"{type(error).__name__}: {error}"
        return row

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def _check(self, found: dict[str, str]) -> bool:
        """What is there is as in an unbroken run; and whether all is there."""
        for name, value in found.items():
            if name not in self.case.transient:
                assert value in self.reference[name], f"{name} is another than of an unbroken run"
        if (self.folder / "model").exists():  # in a fork: TensorStore aborts those of a process that it has worked in
            code, *_ = in_fork(lambda: len(verify_folder(self.folder / "model")), self.errors)
            assert code == 0, self.errors.read_text()
        return self.reference.keys() <= found.keys()


def prepare(models: Path, work: Path, name: str) -> Case:
    """A case, and what it needs: made once, in forks, so that this process starts nothing."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "xla")  # of its own: JAX's writes are killed, too
    jax.config.update("jax_compilation_cache_dir", str(work / "xla"))
    if not (work / "source").exists():
        from damage import copy_model

        copy_model(models / "flux-schnell", work / "source")
    made = cases(models, work)
    if name == "report" and not (work / "plan.json").exists():
        arguments = ["--prompts", str(work / "prompts.txt"), "--out", str(work / "plan.json"), *HEADS]
        command = ["calibrate", str(models / "flux-dev"), *arguments, *SIZE]
        code, *_ = in_fork(lambda: cli.main(command), work / "stderr")
        assert code == 0, (work / "stderr").read_text()
    return made[name]


def main() -> None:
    models, work = map(Path, sys.argv[1:3])
    (name, count), seed = sys.argv[3].split("="), int(sys.argv[4]) if len(sys.argv) > 4 else 0
    killer = Killer(name, prepare(models, work, name), work, seed)
    for _ in range(int(count)):
        print(json.dumps(killer.kill()), flush=True)


if __name__ == "__main__":
    main()
