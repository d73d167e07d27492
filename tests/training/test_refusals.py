"""What Compress refuses, when it is made and in a fit, which leaves the module as it was."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelPruning

from lightning_compress import Budget, Compress
from lightning_compress.core.errors import BudgetError, ConfigurationError, ExampleInputError, UnsupportedError
from tests.support.compressing import compress
from tests.support.fitting import QUIET
from tests.support.nets import TinyNet, TinyTask

pytestmark = QUIET


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"budget": 0.2}, BudgetError, r"budget=0\.2: expected a Budget or a mapping, as in Budget\(params=0\.2\)"),
        ({"budget": {"parameters": 0.2}}, ConfigurationError, r"unknown key 'parameters'.*Did you mean 'params'"),
        ({"kinds": "svdd"}, ConfigurationError, r"'svdd'.*Did you mean.*svd"),
        ({"method": "exactly"}, ConfigurationError, r"'exactly' is unknown\. Did you mean 'exact'\?"),
        (
            {"objective": "end_to_end", "method": "exact"},
            ConfigurationError,
            r"objective='end_to_end' is nothing for method='exact'.*that take it: 'continuous'",
        ),
        ({"objective": "weights"}, ConfigurationError, r"objective='weights' is unknown\. Did you mean 'weight'\?"),
        ({"rank_multiple": 0}, ConfigurationError, r"rank_multiple=0: expected a whole number of at least 1"),
        ({"seed": -1}, ConfigurationError, r"seed=-1: expected a whole number of at least 0"),
        ({"schedule": {"warmup": 3}}, ConfigurationError, r"schedule: unknown key 'warmup'.*'warmup_steps'"),
        ({"distill": {"weights": 1}}, ConfigurationError, r"distill: unknown key 'weights'.*'weight'"),
    ],
)
def test_wrong_argument_is_refused_when_the_callback_is_made(settings, error, said):
    with pytest.raises(error, match=said):
        Compress(**{"budget": Budget(params=0.5), **settings})


class OtherCompress(Compress):
    @property
    def state_key(self) -> str:  # Lightning itself refuses two callbacks of one state key
        return "other"


def pruning():
    return ModelPruning("l1_unstructured", amount=0.5)


PRUNING = r"does not support ModelPruning in the same fit.*in a later fit"


REFUSED = {
    "example input": (
        lambda: [compress(example_input=(1, 4, 8, 8))],
        ExampleInputError,
        r"fails on example_input \(1, 4, 8, 8\).*Shapes include the batch",
    ),
    "budget": (
        lambda: [compress(0.01)],
        BudgetError,
        r"no plan keeps params <= 1 %: the smallest reachable is params=0\.\d+",
    ),
    "include": (
        lambda: [compress(include="net.convolution1")],
        ConfigurationError,
        r"include: 'net\.convolution1' matches no layer.*'net\.conv1'",
    ),
    "overrides": (
        lambda: [compress(overrides={"net.fc1": {"rank": 3}})],
        ConfigurationError,
        r"overrides\['net\.fc1'\]: unknown key 'rank'.*max_rank",
    ),
    "submodule": (
        lambda: [compress(distill={"module": "model"})],
        ConfigurationError,
        r"Distill\(module='model'\): TinyTask has no such submodule.*: net",
    ),
    "block": (
        lambda: [compress(distill={"blocks": ["net.norms"]})],
        ConfigurationError,
        r"'net\.norms' is no submodule\. Did you mean 'net\.norm'",
    ),
    "pruning behind": (lambda: [compress(), pruning()], UnsupportedError, PRUNING),
    "pruning before": (lambda: [pruning(), compress()], UnsupportedError, PRUNING),
    "another Compress": (
        lambda: [compress(), OtherCompress(Budget(macs=0.5))],
        UnsupportedError,
        r"more than one Compress callback: use one, its budget may",
    ),
}


@pytest.mark.parametrize(("callbacks", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_refusal_leaves_the_module_dense(make_trainer, loader, unchanged, callbacks, error, said):
    task = TinyTask()
    before = unchanged(task.net)
    with pytest.raises(error, match=said):
        make_trainer(*callbacks()).fit(task, loader)
    task.net.train()  # the trainer itself may have set no mode yet
    before.check()


@pytest.mark.parametrize(
    ("budget", "settings", "said"),
    [
        ({"params": 0.1}, {}, r"already factorised.*40\.0 %.*params <= 10 %.*start from the dense module"),
        ({"bytes": 0.1}, {}, r"already factorised.*bytes <= 10 %.*start from the dense module"),
        ({"params": 0.4}, {"distill": {}}, r"distill= needs the dense module as its teacher.*already factorised"),
    ],
)
def test_factorised_module_that_cannot_be_taken_as_it_is_is_left_alone(
    make_trainer, loader, unchanged, budget, settings, said
):
    task = TinyTask()
    make_trainer(compress()).fit(task, loader)
    before = unchanged(task)
    with pytest.raises(UnsupportedError, match=said):
        make_trainer(Compress(budget, **settings)).fit(task, loader)
    before.check()


# --- Lightning's other package ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("enter", ["fit", "test"])
def test_a_trainer_of_the_other_package_is_named(loader, tmp_path, unchanged, enter):
    other = pytest.importorskip("pytorch_lightning")
    module = other_task(other)
    before = unchanged(module.net)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    trainer = other.Trainer(max_epochs=1, callbacks=[compress()], enable_checkpointing=False, **settings)
    said = r"the trainer is of the package pytorch_lightning, Compress of lightning\.pytorch.*import the Trainer"
    with pytest.raises(UnsupportedError, match=said):
        getattr(trainer, enter)(module, loader)
    before.check_all_but_values()


def other_task(other):
    class OtherTask(other.LightningModule):
        forward, training_step, test_step = TinyTask.forward, TinyTask.training_step, TinyTask.test_step
        configure_optimizers = TinyTask.configure_optimizers

    module = OtherTask.__new__(OtherTask)
    other.LightningModule.__init__(module)
    module.net, module.configure = TinyNet(), None
    return module


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "ModelPruning", "BackboneFinetuning"])
def test_a_callback_of_the_other_package_that_has_to_be_known_is_named(make_trainer, loader, unchanged, name):
    other = pytest.importorskip("pytorch_lightning")
    arguments = {"StochasticWeightAveraging": (0.1,), "ModelPruning": ("l1_unstructured",)}.get(name, ())
    task = TinyTask()
    before = unchanged(task.net)
    callback = getattr(other.callbacks, name)(*arguments)
    said = rf"the callback {name} is of the package pytorch_lightning.*: import {name} from lightning\.pytorch"
    with pytest.raises(UnsupportedError, match=said):
        make_trainer(compress(), callback).fit(task, loader)
    before.check_all_but_values()
