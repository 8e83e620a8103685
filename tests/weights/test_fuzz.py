"""Damaged weights, plans, tokenizers, configs and progress: read as they are, or refused in our own words."""

import pytest
from folder_mutations import ConfigFuzzer, TokenizerFuzzer
from mutations import Fuzzer, PlanFuzzer, ResumeFuzzer


def test_damaged_weights_are_read_alike_or_refused(tmp_path):
    fuzzer = Fuzzer(tmp_path, seed=0)
    for _ in range(2000):
        fuzzer.step()
    assert fuzzer.counts["refused"] > 1000 and fuzzer.counts["read"] > 50  # both ends are reached


def test_damaged_plans_are_read_as_they_are_or_refused(tmp_path):
    fuzzer = PlanFuzzer(tmp_path, seed=0)
    for _ in range(2000):
        fuzzer.step()
    assert fuzzer.counts["refused"] > 1000 and fuzzer.counts["read"] > 50


def test_damaged_tokenizers_are_read_as_they_are_or_refused(tmp_path):
    fuzzer = TokenizerFuzzer(tmp_path, seed=0)
    for _ in range(100):
        fuzzer.step()
    assert fuzzer.counts["refused"] > 30 and fuzzer.counts["read"] > 15


@pytest.mark.usefixtures("no_shape_checks")
def test_damaged_configs_are_read_as_they_are_or_refused(tiny_sd35, tmp_path):
    fuzzer = ConfigFuzzer(tiny_sd35, tmp_path / "model", seed=0)
    for _ in range(100):
        fuzzer.step()
    assert fuzzer.counts["refused"] > 30 and fuzzer.counts["read"] > 15


def test_damaged_progress_is_read_as_it_is_or_refused(tmp_path):
    fuzzer = ResumeFuzzer(tmp_path, seed=0)
    for _ in range(300):
        fuzzer.step()
    assert fuzzer.counts["refused"] > 100 and fuzzer.counts["read"] > 15
