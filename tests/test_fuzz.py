"""Damaged safetensors files and indexes: read as the reference reader does, or refused in our own words."""

from mutations import Fuzzer


def test_damaged_weights_are_read_alike_or_refused(tmp_path):
    fuzzer = Fuzzer(tmp_path, seed=0)
    for _ in range(2000):
        fuzzer.step()
    assert fuzzer.counts["refused"] > 1000 and fuzzer.counts["read"] > 50  # both ends are reached
