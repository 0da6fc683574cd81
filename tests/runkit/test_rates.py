"""The rates that a device reaches: what is computed from times. No time is asserted."""

import torch

from periln.runkit import rates

CPU = torch.device("cpu")


def test_the_shortest_call_counts_and_the_first_does_not(monkeypatch):
    clock, calls = [0.0], []

    def work():
        calls.append(len(calls))
        clock[0] += [0.25, 4.0, 2.0, 8.0][calls[-1]]

    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock[0])
    assert rates.seconds_of(CPU, work, repeats=3) == 2.0
    assert len(calls) == 4


def test_on_a_cpu_the_product_is_in_fp32(monkeypatch):
    seen = []

    def seconds_of(device, work):
        seen.append(work())
        return 0.5

    monkeypatch.setattr(rates, "seconds_of", seconds_of)
    assert rates.attainable_flops(CPU, torch.float16) == 2 * 1536**3 / 0.5
    assert seen[0].dtype == torch.float32 and seen[0].shape == (1536, 1536)
