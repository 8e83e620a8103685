"""Strict JAX, no network, and the tiny diffusers folders. Imports none of our packages: the typing hook comes first."""

import functools
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# Modules that import torch at their top cannot even be collected without it: `-m "not torch"` leaves them out.
NEED_TORCH = re.compile(r"^(import|from) (torch|torch_models|torch_reference|diffusers|tiny)\b", re.MULTILINE)


@functools.cache
def left_out(config):
    """Only where the command says so: with torch missing and no `-m "not torch"`, the run fails."""
    if "not torch" not in config.option.markexpr:
        return []
    return sorted(file for file in Path(__file__).parent.rglob("test_*.py") if NEED_TORCH.search(file.read_text()))


def pytest_ignore_collect(collection_path, config):
    return True if collection_path in left_out(config) else None


def pytest_terminal_summary(terminalreporter, config):
    if files := left_out(config):
        terminalreporter.write_line(f"left out by -m 'not torch': {', '.join(file.name for file in files)}")


RUNS_LONGER = ("test_search", "test_checkpoint", "test_demo")
"""Modules whose programs run longer than they compile."""


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """LLVM's optimizations are half of what compiling takes. Models of a few kilobytes and interpreted kernels are done
    sooner without. The search and the model in the box are slower; a program for a GPU is what its test is about."""
    slow = request.path.parent.name == "toy_model" or request.path.stem in RUNS_LONGER
    quick = not slow and "aot" not in request.path.stem
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def no_shape_checks():
    """As a user runs it, without the typing hook: what a public function says to wrong input is then its own."""
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def compilations():
    """The list of backend compilations since the test began."""
    seen = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A compilation cache of the test's own, and JAX's configuration put back after it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    yield tmp_path / "cache" / "dfa2_jax" / "xla"
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def bars(compilations, monkeypatch):
    """For each bar that has been closed, its title and the programs that were compiled while it stood."""
    from tqdm import tqdm

    seen, begin, end = [], tqdm.__init__, tqdm.close

    def begun(self, *args, **options):
        begin(self, *args, **options)
        self.before = len(compilations)

    def ended(self):
        if not self.disable:
            seen.append((self.desc.removesuffix(": "), len(compilations) - self.before))
        end(self)

    monkeypatch.setattr(tqdm, "__init__", begun)
    monkeypatch.setattr(tqdm, "close", ended)
    return seen


def _tiny(name):
    @pytest.fixture(scope="session")
    def folder(tmp_path_factory):
        """A complete diffusers folder; `DFA2_TINY` names a folder of ready ones, for environments without torch."""
        if made := os.environ.get("DFA2_TINY"):
            return Path(made).resolve() / name
        import tiny

        return tiny.write(name, tmp_path_factory.mktemp("tiny") / name)

    return folder


@pytest.fixture(scope="session")
def pipelines(request):
    """By the fixture of a folder: what each has compiled serves every test. Tests leave them as they are."""
    from dfa2_jax import Pipeline

    return functools.cache(lambda name: Pipeline.from_pretrained(request.getfixturevalue(name)))


tiny_sd3 = _tiny("sd3")
tiny_sd35 = _tiny("sd35")
tiny_flux_dev = _tiny("flux-dev")
tiny_flux_schnell = _tiny("flux-schnell")
tiny_cogvideox_2b = _tiny("cogvideox-2b")
tiny_cogvideox_5b = _tiny("cogvideox-5b")
tiny_cogvideox_15 = _tiny("cogvideox-15")
tiny_hunyuanvideo = _tiny("hunyuanvideo")
