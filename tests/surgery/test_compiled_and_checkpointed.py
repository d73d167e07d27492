"""Models whose parts are compiled or checkpointed are searched and healed as the plain ones."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

from lightning_compress import Budget, FactorisedLayer
from lightning_compress.analysis.moments import output_moments
from lightning_compress.analysis.trace import inference
from lightning_compress.core.compat import activations_kept, uncompiled
from lightning_compress.core.errors import CompressionWarning
from lightning_compress.surgery.distillation import affordable_steps
from tests.support.compressing import compressed_model
from tests.support.healing import Case, images_like, statistics_on
from tests.support.nets import Conv, run_in

VECTOR = (1, 24)
SETTINGS = {"budget": Budget(params=0.5), "example_input": VECTOR, "target": None}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        layers = (nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 32))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Checkpointed(Mlp):
    reentrant = False

    def forward(self, x):
        return self.head(torch.tanh(checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)))


class Reentrant(Checkpointed):
    reentrant = True


def trained(make):
    torch.manual_seed(0)
    model = make()
    for _ in range(10):
        model(1 + 2 * torch.rand(32, 24))
    return model


def compiled(model):
    model.body = torch.compile(model.body, backend="eager")
    return model


def compiled_in_place(model):
    model.body.compile(backend="eager")
    return model


def compiled_within(model):
    return nn.Sequential(torch.compile(model, backend="eager"))


@pytest.fixture
def reference(try_only):
    try_only(inputs=64, input_steps=5, descent_steps=4, healing_steps=20)
    model = trained(Mlp)
    return model, compressed_model(model, **SETTINGS)


OTHER_FORMS = {
    "torch.compile": lambda: compiled(trained(Mlp)),
    "module.compile": lambda: compiled_in_place(trained(Mlp)),
    "all of it": lambda: compiled_within(trained(Mlp)),
    "checkpointed": lambda: trained(Checkpointed),
    "checkpointed, reentrant": lambda: trained(Reentrant),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # the reentrant way, when it is run
@pytest.mark.parametrize("which", OTHER_FORMS)
def test_the_result_is_that_of_the_plain_model(reference, which):
    plain, expected = reference
    model = OTHER_FORMS[which]()
    done = compressed_model(model, **SETTINGS)
    assert done.plan.objective == expected.plan.objective == "moments"
    assert [(p.kind, p.ranks) for p in done.plan.layers] == [(p.kind, p.ranks) for p in expected.plan.layers]
    assert done.healing.skipped is None
    assert done.healing.after == pytest.approx(expected.healing.after, rel=1e-4)
    for own, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_compiled_parts_run_uncompiled_for_a_while():
    model, seen = compiled(trained(Mlp)), []
    forward = model.body.forward
    with uncompiled(model), uncompiled(model):
        model.body._orig_mod[0].register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            model.eval()(torch.randn(VECTOR))
        assert model.body.forward is not forward
    assert model.body.forward is forward
    assert seen == [1]


def test_copies_made_meanwhile_are_compiled():
    model = compiled(trained(Mlp))
    with inference(model):
        copied = copy.deepcopy(model)
    assert type(copied.body) is type(model.body)
    assert copied.body.forward is not copied.body._orig_mod


# --- checkpointed activations


def counting():
    runs = []

    def function(x):
        runs.append(torch.is_grad_enabled())
        return torch.tanh(x) ** 2

    return runs, function


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_not_run_again_meanwhile_and_are_afterwards(reentrant):
    runs, function = counting()
    for times in (1, 2):
        x = torch.ones(3, requires_grad=True)
        runs.clear()
        if times == 1:
            with activations_kept():
                y = checkpoint.checkpoint(function, x, use_reentrant=reentrant)
        else:
            y = checkpoint.checkpoint(function, x, use_reentrant=reentrant)
        y.sum().backward()
        assert len(runs) == times
        torch.testing.assert_close(x.grad, 2 * x.tanh() * (1 - x.tanh() ** 2))


def test_other_threads_go_on_checkpointing():
    runs, function = counting()

    def elsewhere():
        checkpoint.checkpoint(function, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()

    with activations_kept():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(runs) == 2
    assert checkpoint._checkpoint_hook.__module__ == checkpoint.CheckpointFunction.__module__ == checkpoint.__name__


def test_gradients_of_the_outputs_are_those_of_the_plain_model():
    plain, other = trained(Mlp), trained(Checkpointed)
    batches, names = [((torch.randn(8, 24),), {})], ["body.0", "body.4", "head"]
    expected, found = (output_moments(model, batches, names) for model in (plain, other))
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


# --- layers that are called otherwise in the two models, or unseen


class Routed(nn.Module):
    """Each sample goes to one of two layers by what the first one makes of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.stem = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x):
        x = self.stem(x)
        right = x[:, 0] > 0
        out = torch.zeros_like(x)
        out[right] = self.first(x[right])
        out[~right] = self.second(x[~right])
        return out


def test_layers_that_values_route_to_are_healed(try_only):
    try_only(inputs=64, descent_steps=4, healing_steps=40)
    torch.manual_seed(1)
    done = compressed_model(Routed(), Budget(params=0.6), example_input=VECTOR, target=None)
    assert done.healing.skipped is None
    assert done.healing.after <= done.healing.before


class Unseen(Conv):
    def forward(self, x):
        x = torch.relu(self.conv1.forward(x))
        return self.head.forward(torch.relu(self.conv2.forward(x)).mean(dim=(2, 3)))


def test_layers_that_no_hook_sees_are_not_distilled_and_a_warning_says_so():
    dense = run_in(Conv())
    batches = [((args[0][:, :, :5, :5],), kwargs) for args, kwargs in images_like(4)]
    case = Case(dense, statistics_on(dense, batches))
    assert any(isinstance(m, FactorisedLayer) for m in case.model.modules())
    assert affordable_steps(dense, case.model, case.replacements, batches, 40) == (40, None)
    dense.__class__ = case.model.__class__ = Unseen
    with pytest.warns(CompressionWarning, match="no hook sees the factorised layers run"):
        steps, skipped = affordable_steps(dense, case.model, case.replacements, batches, 40)
    assert steps == 0
    assert "no hook" in skipped


def test_no_warning_of_compilation_reaches_the_user(try_only):
    try_only(inputs=32, input_steps=2, descent_steps=2, healing_steps=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed_model(compiled(trained(Mlp)), **SETTINGS)
