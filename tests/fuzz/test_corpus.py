"""Every input of the corpus, and a few mutations of each, without a sanitizer: regressions."""

import importlib
import random
from itertools import islice

import pytest
from fuzz import HERE, ROOT, TARGETS, mutations, seeds

INPUTS = [path for target in TARGETS for folder in seeds(target) for path in folder.iterdir()]


def target_of(path):
    name = path.parent.name
    return importlib.import_module(f"target_{name if name in TARGETS else 'codec'}")


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_fuzz_input_of_the_corpus_finds_nothing(path):
    target_of(path).one(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_mutations_find_nothing(name):
    target = importlib.import_module(f"target_{name}")
    inputs = [path.read_bytes() for folder in seeds(name) for path in folder.iterdir()]
    damaged = mutations(inputs, target.repair, random.Random(name))
    for data in islice(damaged, len(inputs), len(inputs) + 500):
        target.one(data)


def test_fuzz_corpus_stays_small():
    corpus = [path for path in (HERE / "corpus").rglob("*") if path.is_file()]
    assert {path.parent.name for path in corpus} == set(TARGETS)
    assert sum(path.stat().st_size for path in corpus) < 200_000
    assert (ROOT / "tests" / "fuzz" / "_driver.cc").exists()
