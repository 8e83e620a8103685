"""What a kernel's machine code takes and does, from ptxas and nvdisasm: no GPU needed."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Loop(NamedTuple):
    """One iteration of an innermost loop, for one thread."""

    instructions: int
    opcodes: Counter[str]

    def per_score(self, scores: int) -> float:
        """Instructions per score element, of which a thread computes `scores` in an iteration: that includes its share
        of loads, products and index arithmetic."""
        return self.instructions / scores


class Kernel(NamedTuple):
    """One compiled kernel."""

    name: str
    warps: int
    registers: int
    """Registers of a thread."""
    most_registers: int
    """Registers of a thread that took those of others (`setmaxnreg`): it computes in a warp-specialised kernel."""
    spill_bytes: int
    """Bytes of a thread that its registers could not hold."""
    shared_bytes: int
    wgmma: int
    """Asynchronous tensor core instructions in PTX (Hopper)."""
    mma: int
    """Synchronous ones."""
    cp_async: int
    """Loads that bypass the registers in PTX."""
    tma: int
    """Copies of whole tiles in PTX (Hopper's tensor memory accelerator), either way."""
    softmax_loops: list[Loop]
    """Loops that take exponentials of scores, in order."""
    ptx: str


def disassemble(ptx: str, threads: dict[str, int], shared: dict[str, int], ptxas: Path, nvdisasm: Path) -> list[Kernel]:
    """Every kernel in a PTX module.

    Args:
        ptx: the module's text.
        threads, shared: of each kernel by name, the threads of a block and the bytes of shared memory of its launch.
        ptxas, nvdisasm: the programs.
    """
    gpu = _first_group(r"\.target (\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "x.ptx"), Path(folder, "x.cubin")
        source.write_text(ptx)
        assemble = [ptxas, "-v", f"--gpu-name={gpu}", source, "-o", cubin]
        report = subprocess.run(assemble, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = []
    for name, facts in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", report, re.S):
        code = _first_group(rf"\.text\.{re.escape(name)}:\n(.*?)(?=\n\.text\.|\Z)", sass, re.S)
        registers = int(_first_group(r"Used (\d+) registers", facts))
        kernels.append(
            Kernel(
                name=name,
                warps=-(-threads[name] // 32),
                registers=registers,
                most_registers=max([registers, *map(int, re.findall(r"setmaxnreg\.inc\D+?32 (\d+)", ptx))]),
                spill_bytes=int(_first_group(r"(\d+) bytes spill stores", facts)),
                shared_bytes=shared[name],
                wgmma=ptx.count("wgmma.mma_async"),
                mma=len(re.findall(r"mma\.sync\.aligned", ptx)),
                cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)),
                tma=ptx.count("cp.async.bulk.tensor"),
                softmax_loops=[loop for loop in innermost_loops(code) if loop.opcodes["MUFU.EX2"] >= 8],
                ptx=ptx,
            )
        )
    return kernels


def innermost_loops(sass: str) -> list[Loop]:
    """The innermost loops in nvdisasm's listing of one function, each from a label to the branch back to it.

    Where a loop waits for a barrier, ptxas puts the retries behind the function's end: here they are other loops.
    """
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    jumps = [
        (labels[target[1]], at) for at, text in enumerate(code) if (target := re.search(r"BRA.*`\((\.L_\w+)", text))
    ]
    back = [(start, stop) for start, stop in jumps if start < stop]
    innermost = [
        (start, stop)
        for start, stop in back
        if not any((a, b) != (start, stop) and start <= a and b <= stop for a, b in back)
    ]
    return [
        Loop(stop + 1 - start, Counter(_opcode(text) for text in code[start : stop + 1])) for start, stop in innermost
    ]


def _opcode(instruction: str) -> str:
    """Without its predicate and modifiers, but for the function that MUFU computes."""
    name = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")
    return ".".join(name[: 2 if name[0] == "MUFU" else 1])


def _first_group(pattern: str, text: str, flags: int = 0) -> str:
    match = re.search(pattern, text, flags)
    if match is None:
        raise ValueError(f"No {pattern!r} in {text[:200]!r}.")
    return match[1]
