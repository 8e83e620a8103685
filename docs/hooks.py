"""What MkDocs does beyond its plugins: links out of docs/, and docstrings that are filled when they are imported."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from inspect import cleandoc
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

OUTSIDE = re.compile(r"(?<=\]\()\.\./(?P<path>[^)#]+)(?=\))")
"""The target of a link that leaves docs/, as it works on a code host."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Files of the repository that pages link to, such as committed measurements, become part of the site."""
    linked = {path for page in files.documentation_pages() for path in OUTSIDE.findall(page.content_string)}
    for path in sorted(linked):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return OUTSIDE.sub(r"repository/\g<path>", markdown)


class DescribedOptions(griffe.Extension):
    """Griffe reads source, where `dfa2_jax.options.described` has not yet filled the docstring's line `{options}`."""

    def __init__(self) -> None:
        self.options = load(ROOT / "dfa2_jax" / "options.py")

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        groups = [re.fullmatch(r"described\((.*)\)", str(decorator.value)) for decorator in func.decorators]
        for group in filter(None, groups):
            assert func.docstring is not None
            names = [getattr(self.options, name.strip()) for name in group[1].split(",")]

            def described() -> None: ...

            described.__doc__ = indent(func.docstring.value, " " * 8)  # as in a method
            func.docstring.value = cleandoc(self.options.described(*names)(described).__doc__)


def load(path: Path) -> ModuleType:
    """A module of ours by its file: the site's environment lacks JAX."""
    sys.path.insert(0, str(ROOT))
    spec = spec_from_file_location(f"{path.stem}_of_ours", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
