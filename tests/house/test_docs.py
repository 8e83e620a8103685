"""README.md and docs/: blocks of code run, tables are current, links lead somewhere, sentences are short.

A comment before a block says how it is tested:

    <!-- run -->                              as it stands
    <!-- run with: FLUX.1-dev=tiny_flux_dev 2048=64 -->   with other values: a fixture of conftest.py, or text
    <!-- not run: installs packages -->       not at all, and why

Blocks of a page run in their order, in one folder and one Python namespace, as a reader would run them.
"""

import re
import shlex
import struct
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from checkout import ROOT

from dfa2_jax.families.registry import FAMILIES

pages_module = pytest.importorskip("benchmarks.pages", reason="benchmarks/ is beside the tests in a checkout alone")

pytestmark = pytest.mark.checkout

RUN = [ROOT / "README.md", ROOT / "assets/package.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*RUN, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

FENCE = re.compile(
    r"(?P<marker>^<!-- [^\n]*? -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
MARKER = re.compile(r"<!-- (?:(?P<run>run)(?: with: (?P<values>.+?))?|not run: (?P<reason>.+?)) -->")


def name_of(page):
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    values: dict[str, str] | None
    """What is replaced, and by what; None: it is not run."""
    reason: str | None

    @property
    def place(self):
        return f"{name_of(self.page)}:{self.line}"


def blocks(page, text=None):
    """The page's blocks of code.

    Raises:
        ValueError: a block has no marker.
    """
    text = page.read_text() if text is None else text
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start("language")) + 1
        marker = MARKER.fullmatch((fence["marker"] or "").strip())
        if marker is None:
            raise ValueError(f"{page.name}:{line} needs a marker on the line before it: {MARKER.pattern}")
        pairs = [pair.split("=", 1) for pair in shlex.split(marker["values"] or "")]
        values = {old: new for old, new in pairs} if marker["run"] else None
        found.append(Block(page, line, fence["language"], fence["code"], values, marker["reason"]))
    return found


class Session:
    """Runs the blocks of one page."""

    def __init__(self, folder, request):
        self.folder, self.request = folder, request
        self.names = {"__name__": "__page__"}
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        self.scripts = {name: entry.split(":") for name, entry in scripts.items()}

    def run(self, block):
        code = block.code
        for old in block.values:
            assert old in code, f"{block.place}: the marker replaces {old!r}, which the block does not hold"
        if block.values:  # all at once: what one puts there, no other replaces
            longest_first = sorted(map(re.escape, block.values), key=len, reverse=True)
            code = re.sub("|".join(longest_first), lambda found: self.value(block.values[found[0]]), code)
        if block.language == "python":
            exec(compile("\n" * block.line + code, block.place, "exec"), self.names)
        else:
            for command in commands(code):
                self.shell(command, block.place)

    def value(self, text):
        return str(self.request.getfixturevalue(text)) if text.startswith("tiny_") else text

    def shell(self, command, place):
        """Our own commands run in this process: importing JAX takes longer than they do."""
        program, *arguments = shlex.split(command, comments=True)
        if program in self.scripts:
            module, function = self.scripts[program]
            status = getattr(import_module(module), function)(arguments)
        else:
            status = subprocess.run(["bash", "-ec", command], cwd=self.folder).returncode
        assert status == 0, f"{place}: {command!r} ended with exit code {status}"


def commands(code):
    """The commands of a block of shell: one a line, which may go on after a backslash."""
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture
def session(tmp_path, monkeypatch, request):
    """A folder of the page's own; what a command line sets in JAX is put back, and so are the families."""
    import matplotlib

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["dfa2"])
    matplotlib.use("Agg")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before, families = {name: getattr(jax.config, name) for name in names}, dict(FAMILIES)
    yield Session(tmp_path, request)
    for name, value in before.items():
        jax.config.update(name, value)
    FAMILIES.clear()
    FAMILIES.update(families)


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_blocks_run(page, session, no_shape_checks):
    for block in blocks(page):
        if block.values is not None:
            session.run(block)


LEFT_OUT = {
    ("README.md", "pip install"): "fetches packages from the network",
    ("README.md", "make demo"): "each makes an environment of its own, from the network",
    ("assets/package.md", "pip install"): "fetches packages from the network",
    ("docs/devices.md", "import jax"): "needs a launcher; tests/parallel/test_processes.py runs two processes",
    ("docs/devices.md", "srun"): "needs a launcher; tests/parallel/test_processes.py runs two processes",
    ("docs/index.md", "pip install"): "fetches packages from the network",
    ("docs/index.md", "dfa2 demo"): "samples for a minute; tests/commands/test_demo.py runs it",
    (
        "docs/pictures.md",
        "pipeline = Pipeline",
    ): "no tiny folder is of this kind; tests/pipeline/test_fill.py makes one",
    (
        "docs/lora.md",
        "from dfa2_jax",
    ): "needs a published LoRA; tests/pipeline/test_lora.py loads and unloads files in every spelling",
    ("docs/lora.md", "dfa2 sample"): "needs a published LoRA; tests/pipeline/test_lora.py runs both commands",
    ("docs/paper.md", "python -m benchmarks.ablations"): "takes an hour on two CPU cores",
    ("docs/toy-model.md", "dfa2 demo --prompt"): "samples for a minute; tests/commands/test_demo.py runs it",
    ("docs/toy-model.md", "dfa2 demo --video"): "samples for a minute; tests/commands/test_demo.py runs it",
    ("docs/video.md", "dfa2 sample"): "needs a published folder; tests/commands/test_videos.py runs the command",
    ("CONTRIBUTING.md", "make test"): "each makes an environment of its own, from the network; CI runs them",
    ("CONTRIBUTING.md", "python -m benchmarks.pages"): "tests/house/test_docs.py checks the same",
    ("CONTRIBUTING.md", "python -m toy.train"): "trains for half an hour on a GPU",
    ("CONTRIBUTING.md", "dfa2 calibrate"): "takes minutes, and rewrites a file of the package",
}
"""Why a block is not run, by its page and how it begins. The page's marker says the same: one more is a decision."""


def test_blocks_that_do_not_run_are_listed_with_the_reason():
    found = [block for page in PAGES for block in blocks(page) if block.values is None]
    for block in found:
        begins = [key for key in LEFT_OUT if key[0] == name_of(block.page) and block.code.startswith(key[1])]
        assert len(begins) == 1, f"{block.place} is not run: run it, or say in LEFT_OUT why it cannot"
        assert block.reason == LEFT_OUT[begins[0]], block.place
    assert len(found) == len(LEFT_OUT), "LEFT_OUT lists a block that is run or gone"


def test_a_block_without_a_marker_is_refused():
    code = "```python\nprint(1)\n```\n"
    for before in ("", "text\n", "<!-- a comment -->\n", "<!-- run -->\n\n", "<!-- not run: -->\n"):
        with pytest.raises(ValueError, match="needs a marker"):
            blocks(Path("page.md"), before + code)
    assert blocks(Path("page.md"), "<!-- run with: a=b -->\n" + code)[0].values == {"a": "b"}


WRONG = {
    "python": "<!-- run -->\n```python\n1 / 0\n```\n",
    "ours": "<!-- run -->\n```bash\ndfa2 plan show absent.json\n```\n",
    "shell": "<!-- run -->\n```bash\nfalse\n```\n",
    "marker": "<!-- run with: a=b -->\n```python\n```\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_wrong_block_fails(text, session):
    (block,) = blocks(ROOT / "page.md", text)
    with pytest.raises((AssertionError, ZeroDivisionError)):
        session.run(block)


@pytest.mark.parametrize("page", pages_module.pages(), ids=name_of)
def test_tables_are_current(page):
    assert page.read_text() == pages_module.written(page), f"{name_of(page)}: run `python -m benchmarks.pages`"


def test_every_table_is_on_a_page():
    shown = {found["name"] for page in pages_module.pages() for found in pages_module.REGION.finditer(page.read_text())}
    assert shown == {*pages_module.TABLES}


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MODULE = re.compile(r"python3?(?:\.\d+)? -m ((?:benchmarks|toy)\.[a-z_]+)")
FILE = re.compile(r"`((?:benchmarks|dfa2_jax|docs|assets|pallas_kernels|tests|toy)/[\w./-]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page):
    """As code hosts and MkDocs make them from headings."""
    titles = HEADING.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in LINK.findall(text):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        assert there.is_file(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(there), f"{name_of(page)} links to {link}: no such heading"
    for module in MODULE.findall(text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"{name_of(page)} names {module}"
    for file in FILE.findall(text):
        assert (ROOT / file).exists(), f"{name_of(page)} names {file}"


def test_the_site_lists_every_page():
    listed = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_box_holds_a_transformer_of_5_million_parameters():
    data = (ROOT / "dfa2_jax/demo/toy-sd35/transformer/diffusion_pytorch_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert (len(data) - 8 - length) / 2 == pytest.approx(5e6, rel=0.02)  # float16


# Prose: subject first, one idea a sentence (CONTRIBUTING.md). What can be counted is counted.


def sentences(text):
    """Sentences of paragraphs, items of lists and captions; without code, tables, headings and comments. Code and links
    count as the words that a reader sees; colons and semicolons do not end a sentence."""
    for pattern in (r"^ *```.*?^ *```$", r"<!-- table: .*?<!-- end of table -->", r"<!--.*?-->"):
        text = re.sub(pattern, "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(#|\||:::).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *([-*]|\d+\.) +", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = text.replace("*", "")
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])[\"'`)]*\s+", " ".join(paragraph.split())):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if words:
                yield len(words), sentence


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_are_short(page):
    long = [sentence for words, sentence in sentences(page.read_text()) if words > 25]
    assert not long, f"{name_of(page)}: more than 25 words: {long}"


def test_sentences_are_counted():
    text = (
        "# Not this\n\nOne two *three*. Four [five six](seven.md) `eight nine`!\n\n- ten: eleven;\n  twelve\n\n| no |\n"
    )
    assert [words for words, _ in sentences(text)] == [3, 5, 3]
