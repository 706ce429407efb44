"""Damaged inputs of every kind: the right result, or one clear line. tests/bench/fuzz.py draws thousands of them."""
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import fuzz

COUNTS = {"model": 20, "weights": 20, "file": 150, "record": 150, "tokenizer": 100}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_fuzz_damaged_inputs(kind):
    counts, failures = fuzz.run_kind(kind, first=0, n=COUNTS.get(kind, 60))
    assert not failures
    assert counts["right"] or kind == "checkpoint"       # its checksums find every damage
