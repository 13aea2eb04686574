"""The list of mutants is alive: each of them still changes one line that tests are named for."""

import ast
import functools

import pytest
from mutants import ROOT, read_mutants


@functools.cache
def names_of_tests(file):
    """The names of the tests in a file, without importing it."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in read_mutants()}))
def test_a_mutant_changes_one_line_and_its_tests_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for mutant in read_mutants():
        if mutant.file == file:
            changed = mutant.applied(text)
            assert changed != text, mutant
            ast.parse(changed)
            for test in mutant.tests:
                path, _, name = test.partition("::")
                assert name.partition("[")[0] in names_of_tests(path), f"{mutant}: {test}"


def test_there_are_enough_mutants():
    assert len(read_mutants()) >= 151
