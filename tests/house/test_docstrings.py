"""Sentences of docstrings and comments are short, and docstrings begin with their subject (CONTRIBUTING.md).

The source is parsed, not imported.
"""

import ast
import io
import re
import tokenize
from inspect import cleandoc
from pathlib import Path

import pytest
from checkout import ROOT

import dfa2_jax
import pallas_kernels

FOLDERS = [Path(package.__file__).parent for package in (dfa2_jax, pallas_kernels)]
FOLDERS += [FOLDERS[0].parent / "convert", ROOT / "benchmarks", ROOT / "toy", ROOT / "tests"]
FILES = [path for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]

LONGEST = 25
"""Words a sentence."""

HEADING = re.compile(r"(Args|Returns|Raises|Yields|Attributes):")
ENTRY = re.compile(r"(?:    )?[\w*.`]+(?:, [\w*.`]+)*: (?=\S)")
"""The names in a table of arguments, errors or attributes; they are no words of the sentence."""
ITEM = re.compile(r"\s*(?:- |\d+\. )")


def docstrings(source):
    """Line and text of every string that stands alone: docstrings, and those below constants and fields."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, cleandoc(node.value.value)


def comments(source):
    """First line and text of every comment; comments on lines that follow each other are one."""
    column, found = None, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, (line, start) = token.string.lstrip("# "), token.start
            if found and (line, start) == (found[-1][0] + len(found[-1][1]), column):
                found[-1][1].append(text)
            else:
                found.append((line, [text]))
            column = start if token.line.strip().startswith("#") else None
    return [(line, " ".join(texts)) for line, texts in found]


def paragraphs(text):
    """Texts whose sentences belong together: entries of tables and items of lists begin one, and code is left out."""
    for part in re.split(r"\n\s*\n", text):
        lines, in_table, found = part.split("\n"), False, [""]
        if lines[0].startswith("    "):
            continue  # code
        for line in lines:
            if HEADING.fullmatch(line):
                in_table = True
                continue
            in_table = in_table and line.startswith("    ")
            if match := ITEM.match(line) or ENTRY.match(line):
                line, found = line[match.end() :], [*found, ""]
            found[-1] += f" {line.strip()}"
        yield from found


def sentences(text):
    """Their words and they themselves; colons and semicolons do not end a sentence."""
    for paragraph in paragraphs(text):
        for sentence in re.split(r"(?<=[.!?])[\"'`)]*\s+", paragraph):
            if count := sum(re.search(r"\w", word) is not None for word in sentence.split()):
                yield count, sentence.strip()


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-3:]))
def test_docstrings_and_comments_are_prose(path):
    source = path.read_text()
    for line, text in (*docstrings(source), *comments(source)):
        long = [sentence for words, sentence in sentences(text) if words > LONGEST]
        assert not long, f"{path.name}:{line}: more than {LONGEST} words: {long}"
        assert not text.startswith("Of "), f"{path.name}:{line} has no subject, which comes first: {text!r:.80}"


EXAMPLE = '''
"""One two. Three
four five: six.

    code is = not(counted).

- an item
- another item of five words
"""
# One two three. Four
# five.
def f():  # six
    # seven
    """Seven.

    Args:
        x, y: eight words
            nine. Ten.
        z: `f(x)` eleven twelve.

    Raises:
        ValueError: thirteen.
    """
'''


def test_words_are_counted():
    counts = [[words for words, _ in sentences(text)] for _, text in docstrings(EXAMPLE)]
    assert counts == [[2, 4, 2, 5], [1, 3, 1, 3, 1]]
    assert [[words for words, _ in sentences(text)] for _, text in comments(EXAMPLE)] == [[3, 2], [1], [1]]
