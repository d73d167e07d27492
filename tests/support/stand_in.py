"""A device whose times are known, in the place of the clock."""

from __future__ import annotations

import numpy as np

from lightning_compress.analysis.latency import table
from lightning_compress.analysis.latency.bench import PRESERVED, TorchBench
from lightning_compress.analysis.latency.prediction import stage_work
from lightning_compress.analysis.latency.turns import Reading
from lightning_compress.core.plan import DENSE
from lightning_compress.search.candidates import dense_macs

PER_MAC = 1e-9
REST = 1e-6
"""Seconds of everything but the layers."""


class StandIn:
    """Times proportional to MACs, by memory format and kind."""

    def __init__(self, monkeypatch):
        self.reset()
        self.real = {}
        monkeypatch.setattr(table, "processor", lambda: "stand-in")  # other tables than those of processes with a clock
        for name, stand_in in {
            "_formats": lambda bench: tuple(self.formats),
            "dense": lambda bench: self._dense(bench),  # noqa: PLW0108 (a bound method would not be given the bench)
            "unfused": lambda bench, memory_format: self._dense(bench)[memory_format],
            "whole": lambda bench, *form: self._whole(bench, *form),  # noqa: PLW0108
            "parts": lambda bench, *form: self._parts(bench, *form),  # noqa: PLW0108
        }.items():
            self.real[name] = getattr(TorchBench, name)
            monkeypatch.setattr(TorchBench, name, stand_in)

    def reset(self):
        self.formats = {PRESERVED: 1.0}
        self.kinds = {}
        self.whole_factor = self.merged_factor = 1.0
        self.spread = 0.0
        self.asked = []

    def _dense(self, bench):
        self.asked.append("dense")
        layers = sum(dense_macs(layer) for layer in bench.layers.values())
        return {name: Reading(factor * (REST + PER_MAC * layers), self.spread) for name, factor in self.formats.items()}

    def _parts(self, bench, forms, memory_format):
        self.asked.append("parts")
        factor, found = self.formats[memory_format], {}
        for name, form in forms.items():
            layer = bench.layers[name]
            if form.kind == DENSE:
                found[name] = [factor * PER_MAC * max(1, dense_macs(layer))]
            else:
                work = stage_work(layer, form.kind, np.array([form.ranks]))[:, 0, 1]
                own = factor * self.kinds.get(form.kind, 1.0)
                found[name] = [*(own * PER_MAC * max(1.0, macs) for macs in work), 1e-12]
        return found

    def _whole(self, bench, forms, memory_format):
        self.asked.append("whole")
        dense = self._parts(
            bench, {name: form._replace(kind=DENSE, ranks=()) for name, form in forms.items()}, memory_format
        )
        run = {name: form._replace(kind=DENSE, ranks=()) if form.merged else form for name, form in forms.items()}
        own = self._parts(bench, run, memory_format)
        own.update({name: [self.merged_factor * sum(own[name])] for name, form in forms.items() if form.merged})
        saved = sum(sum(dense[name]) - self.whole_factor * sum(own[name]) for name in forms)
        return Reading(self._dense(bench)[memory_format].seconds - saved, self.spread)
