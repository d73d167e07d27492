"""What Lightning's model summaries show of a module that is compressed when its fit starts."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelSummary

from tests.support.compressing import compress
from tests.support.fitting import QUIET, count
from tests.support.nets import DENSE_PARAMETERS, TinyTask

pytestmark = QUIET


class Seen(ModelSummary):
    """Notes the parameters that a summary shows."""

    def __init__(self):
        super().__init__()
        self.totals = []

    def summarize(self, summary_data, total_parameters, *args, **kwargs):
        self.totals.append(total_parameters)


@pytest.mark.parametrize("first", ["summary", "compress"])
def test_last_summary_is_that_of_the_compressed_module(make_trainer, loader, first):
    summary, task = Seen(), TinyTask()
    callbacks = [summary, compress()] if first == "summary" else [compress(), summary]
    make_trainer(*callbacks, enable_model_summary=True).fit(task, loader)
    assert count(task) < DENSE_PARAMETERS
    assert summary.totals == ([DENSE_PARAMETERS] if first == "summary" else []) + [count(task)]


def test_summary_that_lightning_adds_comes_after_the_swap(make_trainer, loader, monkeypatch):
    totals = []
    for cls in (ModelSummary, *ModelSummary.__subclasses__()):
        monkeypatch.setattr(cls, "summarize", staticmethod(lambda data, total, *_, **__: totals.append(total)))
    task = TinyTask()
    make_trainer(compress(), enable_model_summary=True).fit(task, loader)
    assert totals == [count(task)]
    assert totals[0] < DENSE_PARAMETERS


def test_a_module_that_is_compressed_already_is_summarised_once(make_trainer, loader):
    task = TinyTask()
    make_trainer(compress()).fit(task, loader)
    summary = Seen()
    make_trainer(summary, compress(), enable_model_summary=True).fit(task, loader)
    assert summary.totals == [count(task)]
