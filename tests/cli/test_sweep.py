"""Summaries of folders of runs, from reports made by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import os

import pytest

from lightning_compress.cli import jobs
from lightning_compress.cli.objectives import is_smaller_better, main_metric, objectives_of
from lightning_compress.cli.read_report import read_report
from lightning_compress.cli.records import FAILED, FINISHED, KILLED, RUNNING, JobRecord
from lightning_compress.cli.report import Figures, Report, Round
from lightning_compress.cli.sweep import read_sweep, to_csv, to_markdown, write_sweep
from lightning_compress.cli.sweep_callback import main
from lightning_compress.cli.sweep_plot import _front, _Point
from lightning_compress.core.costs import Costs
from lightning_compress.core.errors import ConfigurationError, DataNotFoundError
from lightning_compress.core.plan import LayerPlan, Plan
from lightning_compress.core.settings import Budget

DENSE = Costs(10_000, 200_000, 40_000)


def report_of(params, accuracy, latency=0.001, kind="svd"):
    after = Costs(params, 20 * params, 4 * params)
    layer = LayerPlan("fc", "Linear", kind, (2,), (100, 100), 0.1, 10_000, params, 200_000, 20 * params)
    plan = Plan(layers=(layer,), dense=DENSE, compressed=after, budget=Budget(params=params / 10_000), method="exact")
    times = (latency, None if latency is None else 100.0)
    return Report(
        plan,
        Figures(DENSE, *(None, None) if latency is None else (0.002, 50.0), {"accuracy": 0.9, "loss": 0.5}),
        Figures(after, *times, {"accuracy": accuracy - 0.1, "loss": 0.7}),
        Figures(after, *times, {"accuracy": accuracy, "loss": 0.6}),
        {"search": 1.0},
        plan.budget,
    )


def put(folder, number, status, *overrides, report=None, reason=None, **more):
    place = folder / str(number)
    place.mkdir(parents=True)
    if report is not None:
        report.save(place)
    JobRecord(status, f"key{number}", overrides, {}, reason, **more).save(place)


@pytest.fixture
def sweep(tmp_path):
    """Budgets 0.5, 0.3 and an impossible one, each with two kinds; one was killed, one vanished."""
    folder = tmp_path / "sweep"
    budget = "compression.budget.params={}".format
    for number, params, kind, accuracy in ((0, 5_000, "auto", 0.89), (1, 5_000, "svd", 0.88), (2, 3_000, "auto", 0.8)):
        overrides = (budget(params / 10_000), f"compression.kinds={kind}", "dense.epochs=2")
        put(folder, number, FINISHED, *overrides, report=report_of(params, accuracy), seconds=3.0)
    for number, status, process, reason in (
        (3, KILLED, None, "ended by SIGKILL"),
        (4, FAILED, None, "InfeasibleBudgetError: no plan | keeps it"),
        (10, RUNNING, 2**22 + 1, None),
    ):
        put(folder, number, status, budget(0.0005), "dense.epochs=2", reason=reason, process=process)
    return folder


def test_runs_are_read_by_number_with_how_they_ended(sweep):
    found = read_sweep(sweep)
    assert [run.name for run in found.runs] == ["0", "1", "2", "3", "4", "10"]
    assert [run.status for run in found.runs] == [FINISHED] * 3 + [KILLED, FAILED, "unfinished"]
    assert found.runs[-1].reason == "its process was stopped before it was done"
    assert found.metric == "accuracy"


def test_a_run_whose_process_lives_is_running_and_one_without_a_record_is_unfinished(sweep):
    put(sweep, 11, RUNNING, process=os.getpid())
    (sweep / "12" / ".hydra").mkdir(parents=True)
    (sweep / "12" / ".hydra" / "overrides.yaml").write_text("- compression.budget.params=0.1\n- seed=1\n")
    *_, running, unfinished = read_sweep(sweep).runs
    assert (running.status, running.reason) == (RUNNING, f"process {os.getpid()} is at work")
    assert (unfinished.status, unfinished.reason) == ("unfinished", "it left no report")
    assert unfinished.overrides == ("compression.budget.params=0.1", "seed=1")


def test_best_run_of_each_budget_is_the_most_accurate_one(sweep):
    best = read_sweep(sweep).best()
    assert {budget: run.name for budget, run in best.items()} == {"params <= 50 %": "0", "params <= 30 %": "2"}
    worst = read_sweep(sweep, "loss").best()
    assert list(worst) == list(best)


def test_csv_has_a_line_for_each_run_with_numbers_in_full(sweep):
    rows = list(csv.DictReader(io.StringIO(to_csv(read_sweep(sweep)))))
    assert [row["run"] for row in rows] == ["0", "1", "2", "3", "4", "10"]
    assert (rows[0]["params"], rows[0]["kept_params"], rows[0]["fine_tuned_accuracy"]) == ("5000", "0.5", "0.89")
    assert (rows[1]["compression.kinds"], rows[1]["kept_latency"], rows[1]["seconds"]) == ("svd", "0.5", "3.0")
    assert "dense.epochs" not in rows[0]  # the same in all
    assert (rows[4]["reason"], rows[4]["params"]) == ("InfeasibleBudgetError: no plan | keeps it", "")


def test_markdown_has_best_finished_and_unfinished_runs_with_reasons(sweep):
    text = to_markdown(read_sweep(sweep))
    assert (
        "3 of 6 finished, 1 failed, 1 killed, 1 unfinished. Dense: accuracy 0.9000, 10,000 parameters, 2.000 ms."
        in text
    )
    assert "| 0 | params <= 50 % | auto | 50.0 % | 50.0 % | 50.0 % | 0.7900 | 0.8900 | -0.0100 |" in text
    assert "| 4 | failed | compression.budget.params=0.0005 | InfeasibleBudgetError: no plan \\| keeps it |" in text
    assert text.index("## Best accuracy") < text.index("## Finished") < text.index("## Not finished")
    assert "?" not in text


def test_a_latency_that_is_missing_is_a_question_mark_with_what_to_do(tmp_path):
    put(tmp_path, 0, FINISHED, report=report_of(5_000, 0.8, latency=None), disturbed=True)
    text = to_markdown(read_sweep(tmp_path))
    assert "| ? |" in text
    assert "`lightning-compress-sweep FOLDER` measures what is missing, one run at a time." in text
    assert "The searches themselves timed layers while other jobs ran" in text


def test_command_writes_tables_and_plot_again(sweep, capsys):
    pytest.importorskip("matplotlib")
    for name in ("sweep.csv", "sweep.md", "pareto.png"):
        (sweep / name).unlink(missing_ok=True)
    main([str(sweep), "--no-measure"])
    assert (sweep / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (sweep / "sweep.md").read_text("utf-8") == to_markdown(read_sweep(sweep))
    assert (sweep / "sweep.csv").read_text("utf-8") == to_csv(read_sweep(sweep))
    printed = " ".join(capsys.readouterr().out.split())
    assert "run 3 killed (compression.budget.params=0.0005): ended by SIGKILL" in printed


def test_folder_without_runs_is_refused_with_what_was_given(tmp_path, capsys):
    with pytest.raises(DataNotFoundError, match="no run is in"):
        read_sweep(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert repr(str(tmp_path)) in capsys.readouterr().err


def test_sweep_without_a_finished_run_has_tables_and_no_plot(tmp_path):
    put(tmp_path, 0, FAILED, "seed=1", reason="BudgetError: no")
    names = [path.name for path in write_sweep(read_sweep(tmp_path))]
    assert names == ["sweep.csv", "sweep.md"]
    assert "0 of 1 finished, 1 failed." in (tmp_path / "sweep.md").read_text("utf-8")


def test_report_is_read_back_as_it_was_saved(tmp_path):
    report = report_of(5_000, 0.8)
    rounds = [Round(Budget(params=0.7), 0, report.zero_shot), Round(Budget(params=0.5), 3, report.fine_tuned)]
    for number, each in enumerate(
        (report, report_of(5_000, 0.8, latency=None), dataclasses.replace(report, rounds=rounds))
    ):
        each.save(tmp_path / str(number))
        found = read_report(tmp_path / str(number))
        assert found.as_dict() == each.as_dict()
        assert found.plan == each.plan


@pytest.mark.parametrize(("sign", "expected"), [(1, [0, 1, 3]), (-1, [0])])
def test_front_holds_what_no_other_point_beats(sign, expected):
    points = [_Point(*pair, None) for pair in ((1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (4.0, 0.9))]
    assert [points.index(point) for point in _front(points, sign)] == expected


def test_objectives_are_metrics_or_kept_fractions_in_the_order_asked_for():
    report = report_of(5_000, 0.8)
    assert objectives_of(report, None) == (0.8,)
    assert objectives_of(report, "loss") == (0.6,)
    assert objectives_of(report, ["accuracy", "params", "latency"]) == (0.8, 0.5, 0.5)
    with pytest.raises(ConfigurationError, match=r"optimized_metric='acuracy': .*Did you mean 'accuracy'"):
        objectives_of(report, "acuracy")
    with pytest.raises(ConfigurationError, match="optimized_metric='latency': it was not measured"):
        objectives_of(report_of(5_000, 0.8, latency=None), "latency")


def test_main_metric_is_an_accuracy_else_the_first_that_is_no_loss():
    assert main_metric(["test/loss", "test/f1", "test/acc"]) == "test/acc"
    assert main_metric(["test/loss", "test/f1"]) == "test/f1"
    assert main_metric(["loss"]) == "loss"
    assert [name for name in ("accuracy", "loss", "test/mse", "params", "f1") if is_smaller_better(name)] == [
        *("loss", "test/mse", "params")
    ]


@pytest.mark.parametrize(
    ("threads", "platform", "gpus", "way"),
    [
        (1, "linux", 0, "fork"),
        (2, "linux", 0, "forkserver"),
        (1, "darwin", 0, "forkserver"),
        (1, "linux", 1, "forkserver"),
    ],
)
def test_jobs_are_copies_of_this_process_where_that_is_safe(monkeypatch, threads, platform, gpus, way):
    monkeypatch.setattr(jobs.threading, "active_count", lambda: threads)
    monkeypatch.setattr(jobs.sys, "platform", platform)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert jobs._context().get_start_method() == way
