"""Compression on two processes of the CPU (gloo): see ddp_fits.py for the fits, which run once for all tests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_compress.core.errors import DivergedRanksError, UnsupportedError
from lightning_compress.core.parallel import Processes, current_processes, from_first, shared_map, sharing_work
from tests.support import ddp_fits
from tests.support.compressing import DEFAULTS, compress, compressed_model
from tests.support.nets import TinyTask

slow = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader.")
SCRIPT = Path(__file__).parents[1] / "support" / "ddp_fits.py"
TIMEOUT = 600
TRAINED = [
    "plain", "defaults", "freezing", "distillation", "frozen_layer",
    "unused", "averaging", "rounds", "resume", "shared",
]  # fmt: skip


def run_two(folder, *cases, launcher=()):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, cwd=folder, check=False
    )
    paths = [folder / f"rank{rank}.pt" for rank in range(2)]
    assert all(path.is_file() for path in paths), done.stdout[-3000:] + done.stderr[-3000:]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two(tmp_path_factory.mktemp("ddp"))


@pytest.fixture
def results(ranks):
    def of(case):
        found = [rank[case] for rank in ranks]
        assert not any("traceback" in one for one in found), found
        return found

    return of


def same(first, second) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@slow
@pytest.mark.parametrize("case", TRAINED)
def test_ranks_are_identical_and_trained_at_the_end(results, case):
    first, second = results(case)
    parameters = set(first["epochs"][-1])
    for ours, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert same(ours, theirs)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in parameters)
    assert first["layers"] == second["layers"]
    assert sum(layer.kind != "dense" for layer in first["layers"]) >= 2
    assert first["kept"] <= 0.4
    assert first["losses"] != second["losses"]  # other data
    assert len(first["losses"]) == 4 * len(first["epochs"])
    assert first["wrapped"] in ("TinyTask", "NoNorm", "OwnLoss")  # the trainer unwraps it at the end


@slow
def test_two_ranks_reach_the_weights_of_one_process_with_the_doubled_batch(results):
    pair = results("plain")
    task = ddp_fits.task_of(ddp_fits.NoNorm)
    alone = ddp_fits.fit(task, compress(), batch_size=8, devices=1, precision="64-true")
    assert alone["layers"] == pair[0]["layers"]
    for ours, theirs in zip(alone["epochs"], pair[0]["epochs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    moved = max(float((alone["epochs"][1][name] - value).abs().max()) for name, value in alone["epochs"][0].items())
    assert moved > 1e-3  # so that the tolerance says something
    mean = torch.tensor([one["losses"] for one in pair], dtype=torch.float64).mean(dim=0)
    torch.testing.assert_close(torch.tensor(alone["losses"], dtype=torch.float64), mean, rtol=1e-10, atol=0)


@slow
def test_defaults_give_all_ranks_the_plan_of_one_process_for_the_first_ranks_module(results):
    first, second = results("defaults")
    assert not same(first["start"], second["start"])  # each rank had made a module of its own
    task = TinyTask()
    task.load_state_dict(first["start"])
    callback = compress(method="continuous", kinds="auto", **DEFAULTS)
    done = compressed_model(task, callback.budget, example_input=torch.zeros(1, 3, 8, 8), method="continuous")
    assert first["layers"] == second["layers"] == done.plan.layers
    assert first["healing"]
    assert not second["healing"]  # only the first rank repairs


@slow
def test_decompositions_and_synthetic_inputs_are_shared_out(results):
    first, second = results("shared")
    assert (first["inputs"], second["inputs"]) == (2, 2)
    assert {*first["tables"]} & {*second["tables"]} == set()
    assert sorted(first["tables"] + second["tables"]) == [f"net.{n}" for n in ("conv1", "conv2", "fc1", "fc2", "point")]
    assert first["tables"]
    assert second["tables"]


@slow
def test_freezing_and_unfreezing_by_the_schedule(results):
    first, _ = results("freezing")
    frozen, after = first["epochs"]
    still = [name for name in frozen if name in first["start"]]
    assert {"net.norm.weight", "net.fc2.weight"} <= {*still}
    for name in frozen:
        if name in first["start"]:
            assert torch.equal(frozen[name], first["start"][name]), name
        assert not torch.equal(after[name], frozen[name]), name


@slow
def test_layers_frozen_by_the_user_stay_frozen(results):
    first, _ = results("frozen_layer")
    moved = {name for name, value in first["epochs"][0].items() if not torch.equal(value, first["epochs"][1][name])}
    assert moved == {name for name in first["epochs"][0] if not name.startswith("net.conv2.")}
    assert len(moved) < len(first["epochs"][0])


@slow
def test_resume_is_identical_on_both_ranks(results):
    for rank in results("resume"):
        whole = rank["whole"]
        assert rank["losses"] == whole["losses"][4:]
        assert all(torch.equal(rank["state"][name], value) for name, value in whole["epochs"][-1].items())


@slow
def test_an_unreachable_budget_fails_on_both_ranks_and_leaves_them_dense(results):
    for rank in results("bad_budget"):
        assert rank["error"] == "InfeasibleBudgetError"
        assert "no plan keeps params <= 1 %: the smallest reachable is params=0." in rank["message"]
        assert list(rank["state"]) == list(TinyTask().state_dict())


@slow
def test_a_failure_of_one_rank_is_raised_on_both(results):
    for rank in results("failure_of_the_second"):
        *outside, share = rank["found"]
        assert [(one["error"], one["message"]) for one in outside] == [
            ("MemoryError", f"no memory at {what}") for what in ("the example input", "the search", "the end")
        ]
        assert share["share"] == {"error": "KeyError", "message": "'item 1 fails on rank 1'"}
        assert list(rank["state"]) == list(TinyTask().state_dict())


@slow
def test_ranks_that_do_different_things_are_an_error_on_both(results):
    for rank in results("out_of_step"):
        assert rank["error"] == DivergedRanksError.__name__
        assert "rank 0 is at decomposing layers, source weight, rank 1 is at synthetic inputs." in rank["message"]


@slow
def test_torchrun(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    first, second = (one["plain"] for one in run_two(tmp_path, "plain", launcher=launcher))
    assert same(first["epochs"][-1], second["epochs"][-1])
    assert first["layers"] == second["layers"]


# --- without a second process -----------------------------------------------------------------


class Part(Processes):
    """A rank whose peers' answers are given."""

    def __init__(self, rank, others) -> None:
        self.rank, self.size, self.others = rank, len(others) + 1, others

    def exchange(self, what, own):
        return [*self.others[: self.rank], own, *self.others[self.rank :]]


def test_work_is_done_once_each_and_put_in_order():
    items, work = list("abcdef"), [1, 5, 1, 3, 1, 1]
    done, parts = [], []
    for rank in range(3):
        kept = []

        class Recording(Part):
            def exchange(self, what, own, kept=kept):
                kept.append(own)
                return [{i: item * 2 for i, item in enumerate(items)}]

        with sharing_work(Recording(rank, [None, None])):
            assert shared_map("items", lambda item: done.append(item) or item * 2, items, work) == [
                "aa", "bb", "cc", "dd", "ee", "ff",
            ]  # fmt: skip
        parts.append({items[i] for i in kept[0]})
        assert all(value == items[i] * 2 for i, value in kept[0].items())
    assert sorted(done) == items
    assert parts[0] == {"b"}  # five units
    assert [sum(work[items.index(item)] for item in part) for part in parts] == [5, 4, 3]


def test_alone_everything_is_done_here_and_errors_are_the_functions():
    assert (current_processes().rank, current_processes().size) == (0, 1)
    assert shared_map("items", str, [3, 1, 2]) == ["3", "1", "2"]
    assert from_first("it", 7) == 7
    with pytest.raises(ZeroDivisionError):
        shared_map("items", lambda x: 1 / x, [1, 0])


def test_the_first_ranks_value_and_the_others_errors_reach_this_one():
    with sharing_work(Part(1, ["theirs"])):
        assert current_processes().rank == 1
        assert from_first("it", None) == "theirs"
    assert current_processes().size == 1
    with sharing_work(Part(0, [KeyError("there")])), pytest.raises(KeyError, match="there"):
        shared_map("items", str, [1, 2])


def test_one_process_under_ddp_is_that_of_one_device(make_trainer, loader):
    tasks, callbacks = [TinyTask()], [compress(), compress()]
    tasks.append(copy.deepcopy(tasks[0]))
    torch.manual_seed(0)
    make_trainer(callbacks[0], precision="64-true").fit(tasks[0], loader)
    try:
        torch.manual_seed(0)
        settings = {"strategy": "ddp", "devices": 1, "use_distributed_sampler": False}  # else in another order
        make_trainer(callbacks[1], precision="64-true", **settings).fit(tasks[1], loader)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert callbacks[0].plan.layers == callbacks[1].plan.layers
    # gradients are sums in another order: nothing in float64, but Adam makes much of them in float32 where they are 0
    torch.testing.assert_close(tasks[1].state_dict(), tasks[0].state_dict(), rtol=1e-8, atol=1e-10)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_train_a_copy_are_refused(make_trainer, unchanged, strategy):
    trainer, task = make_trainer(compress(), strategy=strategy, devices=2), TinyTask()
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=r"DDPStrategy with spawned or forked.*Use strategy='ddp' in a script"):
        compress().setup(trainer, task, "fit")
    before.check()


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_refused_with_the_way_that_works(make_trainer, unchanged, strategy):
    trainer, task = make_trainer(), TinyTask()
    # Lightning accepts some of them on a GPU only, so it is put in place by hand
    trainer._accelerator_connector.strategy = getattr(L.pytorch.strategies, strategy)()
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=rf"{strategy}: it shards.*inside configure_model.*apply_plan_\("):
        compress().setup(trainer, task, "fit")
    before.check()
