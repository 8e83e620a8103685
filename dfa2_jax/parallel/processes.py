"""Several processes that run one command: found by their launcher's variables, compared, and led by the first."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dfa2_jax.io.atomic import replacing

BY_HAND = "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"
SLURM = "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"
OPEN_MPI = "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"


def launched(variables: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, of a launcher's variables; None: there is one process.

    JAX reads Slurm's and Open MPI's variables by itself.

    Raises:
        ValueError: some of `BY_HAND` lack the others, or are no numbers.
    """
    if _count(variables, "WORLD_SIZE") > 1 and "RANK" in variables:
        if missing := [name for name in BY_HAND if not variables.get(name)]:
            raise ValueError(
                f"RANK={variables['RANK']} and WORLD_SIZE={variables['WORLD_SIZE']} are set, and {missing} are not: "
                "set all of them, or none."
            )
        local = variables.get("LOCAL_RANK")
        return {
            "coordinator_address": f"{variables['MASTER_ADDR']}:{variables['MASTER_PORT']}",
            "num_processes": _count(variables, "WORLD_SIZE"),
            "process_id": _count(variables, "RANK"),
            "local_device_ids": None if local is None else [_count(variables, "LOCAL_RANK")],
            "cluster_detection_method": "deactivate",
        }
    for names, count in ((SLURM, "SLURM_NTASKS"), (OPEN_MPI, "OMPI_COMM_WORLD_SIZE")):
        if {*names} <= {*variables} and _count(variables, count) > 1:
            return {}
    return None


def _count(variables: Mapping[str, str], name: str) -> int:
    value = variables.get(name, "1")
    if not value.isdecimal():
        raise ValueError(f"{name}={value!r:.100} must be a number.")
    return int(value)


def join() -> bool:
    """Starts `jax.distributed` where a launcher started several processes. No device may be open yet.

    Returns:
        Whether there are several.

    Raises:
        OSError: the others cannot be reached.
        ValueError: as `launched`.
    """
    arguments = launched(os.environ)
    if arguments is None:
        return False
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which ends a command
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        raise OSError(f"The launcher's other processes cannot be reached: {error!s:.300}") from error
    return True


def is_first() -> bool:
    """Whether this process writes, and speaks for all."""
    return jax.process_index() == 0


def said_by_first(content: bytes) -> bytes:
    """What the first process passes, at every process."""
    if jax.process_count() == 1:
        return content
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    own = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8).tobytes()


def of_first(x: np.ndarray) -> np.ndarray:
    """The first process's array, where each has one of that shape and may have rounded it its own way."""
    return x if jax.process_count() == 1 else np.frombuffer(said_by_first(x.tobytes()), x.dtype).reshape(x.shape)


def said_by_all(content: bytes) -> list[bytes]:
    """What each process passes, at every process."""
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(content)], np.int32))).reshape(-1)
    own = np.zeros(sizes.max(), np.uint8)
    own[: len(content)] = np.frombuffer(content, np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own)).reshape(len(sizes), -1)
    return [one[:size].tobytes() for one, size in zip(every, sizes, strict=True)]


def check_alike(facts: Mapping[str, Any]) -> None:
    """Whether all processes were told the same.

    Args:
        facts: what all must have in common, by a name that users know; "error": why one cannot begin.

    Raises:
        ValueError: they were not: which facts, and both values; or one cannot begin. Every process raises it.
    """
    if jax.process_count() == 1:
        return
    first, *others = (json.loads(said) for said in said_by_all(json.dumps(facts, default=str).encode()))
    for number, error in enumerate(one.get("error") for one in (first, *others)):
        if error is not None:
            raise ValueError(f"Process {number} cannot begin: {error:.500}")
    for number, other in enumerate(others, 1):
        if differing := [name for name in first | other if first.get(name) != other.get(name)]:
            values = "; ".join(f"{name}: {first.get(name)!s:.100} and {other.get(name)!s:.100}" for name in differing)
            raise ValueError(f"Processes 0 and {number} make one batch, and differ in {values}. Start them alike.")


@contextmanager
def progress_of_first(path: Path) -> Iterator[Path]:
    """The file where a process keeps its progress: `path` at the first one.

    The others go on from the first one's, too, in a file of their own that does not stay.
    """
    content = said_by_first(path.read_bytes() if is_first() and path.exists() else b"")
    if is_first():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / path.name
        if content:
            with replacing(own) as file:
                file.write(content)
        yield own
