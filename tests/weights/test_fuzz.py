"""Damaged safetensors files, indexes and plans: read as they are, or refused in our own words."""

from mutations import Fuzzer, PlanFuzzer


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
