"""The attribute `weight` of a factorised layer: answered without computing, computed, or refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress import Budget, FactorisedLayer, compress_
from lightning_compress.core.errors import ConfigurationError, NonFiniteWeightError, UnsupportedError
from lightning_compress.layers.factorised import FactorisedLayer as Layer
from lightning_compress.layers.weight import FactorisedWeight
from tests.support.compressing import WEIGHTS_ALONE
from tests.support.zoo import LAYERS, factorised, fitting, normal

EVERY = pytest.mark.parametrize(("name", "kind"), fitting())
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return factorised(nn.Linear(12, 10, bias=False), "svd", (3,))


@pytest.fixture
def computed(monkeypatch):
    """How often the factors are multiplied out."""
    real, calls = Layer.canonical_weight, []

    def counted(self, *args, **kwargs):
        calls.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Layer, "canonical_weight", counted)
    return calls


ASKED = {
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(0), w.size(-1)),
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "layout": lambda w: w.layout,
    "ndim": lambda w: (w.ndim, w.dim(), w.ndimension()),
    "numel": lambda w: (w.numel(), w.nelement(), torch.numel(w)),
    "bytes": lambda w: (w.element_size(), w.itemsize, w.nbytes),
    "flags": lambda w: (w.is_cuda, w.is_meta, w.is_sparse, w.is_quantized, w.is_floating_point(), w.is_complex()),
    "functions": lambda w: (torch.is_floating_point(w), torch.is_tensor(w), isinstance(w, torch.Tensor)),
    "requires_grad": lambda w: w.requires_grad,
    "contiguous": lambda w: w.is_contiguous(),
    "stride": lambda w: w.stride(),
    "len": len,
    "type": lambda w: w.type(),
    "device index": lambda w: w.get_device(),
    "grad": lambda w: w.grad,
    "like": lambda w: (torch.zeros_like(w).tolist(), torch.ones_like(w).stride(), w.new_zeros(2).dtype),
    "detached": lambda w: (w.detach().dtype, w.data.shape, w.data.requires_grad),
    "comparison": lambda w: w.dtype not in (torch.int8, torch.float16),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("question", ASKED)
def test_what_is_asked_of_it_is_answered_without_computing(layer, computed, question, training):
    layer.train(training)
    dense = nn.Linear(12, 10, bias=False).weight
    assert ASKED[question](layer.weight) == ASKED[question](dense)
    assert computed == []


@EVERY
def test_answers_are_those_of_the_computed_weight(name, kind):
    layer = factorised(LAYERS[name].layer(), kind)
    for form in (torch.contiguous_format, torch.channels_last):
        if form == torch.channels_last and len(layer.weight_shape) == 4:
            layer = layer.to(memory_format=form)
        computed, weight = layer.read_weight(), layer.weight
        assert (weight.shape, weight.dtype, weight.stride()) == (computed.shape, computed.dtype, computed.stride())
        assert torch.equal(weight, layer.dense_weight())


def test_weight_of_frozen_factors_asks_for_no_gradient(layer):
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    assert all(factor.requires_grad for factor in layer.factors().values())
    layer.weight.requires_grad = False
    assert not any(factor.requires_grad for factor in layer.factors().values())


USES = {
    "linear": F.linear,
    "matmul": lambda x, w: torch.matmul(x, w.T),
    "operator": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "mT": lambda x, w: x @ w.mT,
    "row by row": lambda x, w: torch.stack([x @ row for row in w], dim=1),
    "chunks": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], dim=1),
    "transpose": lambda x, w: torch.addmm(torch.zeros(10), x, w.transpose(0, 1)),
    "float": lambda x, w: F.linear(x, w.float()),
    "to": lambda x, w: F.linear(x.double(), w.to(torch.float64)).float(),
    "to a device": lambda x, w: F.linear(x, w.to("cpu")),
    "contiguous": lambda x, w: F.linear(x, w.T.contiguous().T),
    "clone": lambda x, w: F.linear(x, w.clone()),
    "sliced": lambda x, w: torch.cat([F.linear(x, w[:4]), F.linear(x, w[4:])], dim=1),
    "reversed": lambda x, w: (w @ x.T).T,
    "arithmetic": lambda x, w: F.linear(x, (2 * w + w - w * 2) / 1),
    "normalised": lambda x, w: F.linear(x, F.normalize(w, dim=1) * w.norm(dim=1, keepdim=True)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use", USES)
def test_gradients_reach_the_factors_through_every_use(layer, use, training):
    layer.train(training)
    x = normal(4, 12, dtype=torch.float32)
    expected = F.linear(x, layer.dense_weight())
    expected.square().sum().backward()
    gradients = [factor.grad.clone() for factor in layer.factors().values()]
    layer.zero_grad()
    got = USES[use](x, layer.weight)
    torch.testing.assert_close(got, expected, **CLOSE)
    got.square().sum().backward()
    for factor, gradient in zip(layer.factors().values(), gradients, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", USES)
def test_detached_it_has_the_numbers_and_no_gradient(layer, use):
    x = normal(4, 12, dtype=torch.float32)
    for weight in (layer.weight.detach(), layer.weight.data):
        got = USES[use](x, weight)
        assert not got.requires_grad
        torch.testing.assert_close(got, F.linear(x, layer.dense_weight()).detach(), **CLOSE)


class OwnLinear(torch.autograd.Function):
    """Takes its tensors as they are, as functions around kernels of one's own do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


def test_gradients_reach_the_factors_through_autograd_functions_of_ones_own(layer):
    x = normal(4, 12, dtype=torch.float32).requires_grad_()
    found = []
    for function in (lambda: F.linear(x, layer.dense_weight()), lambda: OwnLinear.apply(x, layer.weight)):
        output = function()
        wanted = [x, *layer.factors().values()]
        found.append((output, *torch.autograd.grad(output.square().sum(), wanted)))
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_with_the_weight_as_an_argument(layer, reentrant):
    x = normal(4, 12, dtype=torch.float32).requires_grad_()
    F.linear(x, layer.dense_weight()).square().sum().backward()
    gradients = [factor.grad.clone() for factor in layer.factors().values()]
    layer.zero_grad()
    checkpoint(F.linear, x, layer.weight, use_reentrant=reentrant).square().sum().backward()
    for factor, gradient in zip(layer.factors().values(), gradients, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-4, atol=1e-4)


def test_functional_call_and_transforms(layer):
    x = normal(4, 12, dtype=torch.float32)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return F.linear(x, self.layer.weight).square().sum()

    model = Reads()
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda values: torch.func.functional_call(model, values, x))(parameters)
    expected = torch.autograd.grad(model(x), list(parameters.values()))
    for own, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.vmap(lambda row: layer.weight @ row)(x), F.linear(x, layer.dense_weight()), **CLOSE
    )


# --- kept in eval


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_eval_it_is_multiplied_out_once_until_a_factor_changes(layer, computed, context):
    layer.eval()
    x = normal(4, 12, dtype=torch.float32)
    with context():
        first = F.linear(x, layer.weight)
        for _ in range(3):
            assert torch.equal(F.linear(x, layer.weight), first)
        assert len(computed) == 1
    with torch.no_grad():
        next(iter(layer.factors().values())).mul_(2)
    with context():
        torch.testing.assert_close(F.linear(x, layer.weight), 2 * first, **CLOSE)
        assert len(computed) == 2


def test_in_training_and_with_gradients_nothing_is_kept(layer, computed):
    x = normal(4, 12, dtype=torch.float32)
    F.linear(x, layer.weight)
    layer.eval()
    F.linear(x, layer.weight)
    assert layer._product is None
    assert len(computed) == 2


def test_merged_layers_and_reads_share_one_product(layer, computed):
    layer.eval()
    layer.merged = True
    x = normal(4, 12, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(F.linear(x, layer.weight), layer(x))
    assert len(computed) == 1


def test_what_is_kept_is_counted_by_nobody(layer):
    layer.eval()
    x = normal(4, 12, dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        F.linear(x, layer.weight)
    assert counted.get_total_flops() == 2 * 4 * 12 * 10


@pytest.mark.parametrize("merged", [True, False])
def test_product_made_under_autocast_is_in_full_precision(layer, merged):
    layer.eval()
    layer.merged = merged
    x = normal(4, 12, dtype=torch.float32)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x) if merged else layer.weight + 0
        assert layer._product is not None
        assert torch.equal(layer.weight, layer.dense_weight())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.weight.clone().dtype == torch.float32  # as a Parameter


def test_factor_that_is_computed_itself_is_read_anew(layer):
    nn.utils.parametrizations.weight_norm(layer[0])
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer.weight, layer.dense_weight())
        layer[0].parametrizations.weight.original0.mul_(2)
        assert torch.equal(layer.weight, layer.dense_weight())


def test_follows_the_factors_as_a_parameter_follows_its_optimizer(layer):
    weight, detached = layer.weight, layer.weight.detach()
    with torch.no_grad():
        for factor in layer.factors().values():
            factor.mul_(3)
    assert torch.equal(weight, layer.dense_weight())
    assert torch.equal(detached, layer.dense_weight())


# --- copies, compilers, torch's own layers


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda weight: pickle.loads(pickle.dumps(weight)),
        lambda weight: torch.from_numpy(weight.detach().numpy().copy()),
        lambda weight: torch.tensor(weight.tolist()),
        lambda weight: nn.Parameter(weight.detach().clone()),
    ],
)
def test_copies_are_plain_tensors_of_their_own(layer, copied):
    found = copied(layer.weight)
    assert type(found) in {torch.Tensor, nn.Parameter}
    torch.testing.assert_close(found.detach(), layer.dense_weight().detach())
    with torch.no_grad():
        found.zero_()
    assert bool(layer.weight.any())


def test_saved_weight_is_loaded_without_the_library(layer):
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.dense_weight())


def test_layers_that_have_read_their_weight_are_copied(layer):
    layer.eval()
    with torch.no_grad():
        expected = layer.weight + 0
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, expected)
        assert other.weight.layer is other


class LikeT5(nn.Module):
    """Looks at the dtype of its last layer, and puts what it multiplies in it."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        x = F.relu(self.wi(x))
        weight = self.wo.weight
        if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype and weight.dtype != torch.int8:  # noqa: PLR1714
            x = x.to(weight.dtype)
        return self.wo(x)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_model_that_looks_at_the_dtype_has_the_macs_of_its_plan(computed, context):
    torch.manual_seed(0)
    model, x = LikeT5().eval(), torch.randn(4, 12)
    plan = compress_(
        model, Budget(macs=0.5), example_input=x, method="exact", kinds="svd", target=None, **WEIGHTS_ALONE
    )
    assert isinstance(model.wo, FactorisedLayer)
    computed.clear()
    with context(), FlopCounterMode(display=False) as counted:
        model(x)
    assert counted.get_total_flops() == 2 * 4 * plan.compressed.macs
    assert computed == []
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


class Reads(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        weight = self.layer.weight
        if x.dtype != weight.dtype:
            x = x.to(weight.dtype)
        return F.linear(x, F.normalize(weight, dim=1)) + self.layer(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")  # torch's own
def test_code_that_reads_it_is_compiled_exported_and_traced(layer):
    model, x = Reads(layer), normal(4, 12, dtype=torch.float32)
    for training in (True, False):
        model.train(training)
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for other in (compiled, torch.export.export(model, (x,)).module(), torch.jit.trace(model, x)):
            torch.testing.assert_close(other(x), expected, **CLOSE)
        compiled(x).sum().backward()
        assert all(factor.grad is not None for factor in layer.factors().values())
        layer.zero_grad()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at that of its inputs
@pytest.mark.parametrize("given", [lambda weight: weight, lambda weight: weight.T.T], ids=["weight", "view"])
def test_compiled_functions_that_are_given_it_run_it_uncompiled(layer, backend, given):
    x = normal(4, 12, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, weight: F.linear(x, weight).square().sum(), backend=backend)
    F.linear(x, layer.dense_weight()).square().sum().backward()
    gradients = [factor.grad.clone() for factor in layer.factors().values()]
    layer.zero_grad()
    compiled(x, given(layer.weight)).backward()
    for factor, gradient in zip(layer.factors().values(), gradients, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_encoder_layers_of_torch_run_their_factors(fast, gradients):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    compress_(model, Budget(params=0.8), exclude="*self_attn*", kinds="svd", method="exact", **WEIGHTS_ALONE)
    factors = [m for m in model.modules() if isinstance(m, FactorisedLayer)]
    x = torch.randn(2, 5, 16)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    expected = model(x)
    model.eval()
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.set_grad_enabled(gradients):
            got = model(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert factors
    assert all(factor._product is None for factor in factors)  # torch's fast path would have multiplied them out


# --- writes

FILLS = {
    **{name: getattr(nn.init, name) for name in ("zeros_", "ones_", "normal_", "uniform_", "eye_", "orthogonal_")},
    **{name: getattr(nn.init, name) for name in ("kaiming_normal_", "kaiming_uniform_", "xavier_normal_")},
    **{name: getattr(nn.init, name) for name in ("xavier_uniform_", "trunc_normal_")},
    "constant_": lambda w: nn.init.constant_(w, 1.0),
    "sparse_": lambda w: nn.init.sparse_(w, 0.5),
}
WRITES = {
    **{f"init.{name}": (lambda layer, fill=fill: fill(layer.weight)) for name, fill in FILLS.items()},
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(10, 12)),
    "clamp_": lambda layer: layer.weight.clamp_(min=0),
    "mul_": lambda layer: layer.weight.mul_(2),
    "normal_": lambda layer: layer.weight.normal_(),
    "add_": lambda layer: torch.Tensor.add_(layer.weight, 1),
    "augmented": lambda layer: layer.weight.__imul__(2),
    "item": lambda layer: layer.weight.__setitem__(0, 0.0),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(10, 12)),
    "data.clamp_": lambda layer: layer.weight.data.clamp_(min=0),
    "data.item": lambda layer: layer.weight.data.__setitem__((slice(None), 0), 0.0),
    "detach.mul_": lambda layer: layer.weight.detach().mul_(2),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros(10, 12)),
    "grad =": lambda layer: setattr(layer.weight, "grad", torch.zeros(10, 12)),
    "row": lambda layer: layer.weight[0].zero_(),
    "rows": lambda layer: layer.weight.data[2:4].fill_(1),
    "transposed": lambda layer: layer.weight.T.mul_(2),
    "flat": lambda layer: layer.weight.data.view(-1)[3:].zero_(),
    "chunk": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "out=": lambda layer: torch.mul(torch.ones(10, 12), 2, out=layer.weight),
    "inplace=": lambda layer: F.relu(layer.weight, inplace=True),
    "relu_": lambda layer: torch.relu_(layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2),
    "max_norm": lambda layer: F.embedding(torch.tensor([1]), layer.weight, max_norm=0.1),
    "hook": lambda layer: layer.weight.register_hook(lambda gradient: gradient),
    "retain_grad": lambda layer: layer.weight.retain_grad(),
    "below autograd": lambda layer: Overwrites.apply(layer.weight),
    "weight = tensor": lambda layer: setattr(layer, "weight", torch.zeros(10, 12)),
    "weight = Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(10, 12))),
    "weight = None": lambda layer: setattr(layer, "weight", None),
    "register_parameter": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.zeros(10, 12))),
    "Parameter(weight)": lambda layer: nn.Parameter(layer.weight),
    "Parameter(weight.T)": lambda layer: nn.Parameter(layer.weight.T),
}


class Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        with torch._C.DisableTorchFunctionSubclass():
            return weight.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_writing_is_an_error_that_says_what_to_do(layer, write, training, context):
    layer.train(training)
    state = copy.deepcopy(layer.state_dict())
    weight, parameters = layer.dense_weight().detach().clone(), list(layer.parameters())
    message = (
        r"on the weight of a factorised Linear \(svd, ranks \(3,\), weight \(10, 12\)\): .* would be lost. Keep the "
        r"layer dense with exclude, write by layer.set_weight_\(weight\), which refits the factors, or work on a copy"
    )
    with context(), pytest.raises(UnsupportedError, match=message):
        WRITES[write](layer)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert all(now is before for now, before in zip(layer.parameters(), parameters, strict=True))
    with torch.no_grad():
        assert torch.equal(layer.weight, weight)


def test_arrays_of_it_are_read_only(layer):
    layer.eval()
    array = layer.weight.detach().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_writing_from_it_is_none_to_it(layer):
    other = torch.zeros(10, 12)
    with torch.no_grad():
        other.copy_(layer.weight)
        other.lerp_(layer.weight, 0.5)
        torch.add(layer.weight, 0, out=other)
    assert torch.equal(other, layer.dense_weight())
    dense = nn.Linear(12, 10)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        dense.weight[0] = layer.weight[1]
    assert torch.equal(dense.weight[1:], layer.dense_weight()[1:])


def test_projection_of_an_unfused_layer_refuses_too():
    model = nn.Sequential(nn.LSTM(12, 12))
    compress_(model, Budget(params=0.7), kinds="svd", method="exact", **WEIGHTS_ALONE)
    with pytest.raises(UnsupportedError, match=r"zero_ on the weight of a factorised Linear"), torch.no_grad():
        model[0].weight_ih_l0.zero_()


def test_parameters_of_an_unfused_layer_are_set_on_its_projections():
    model = nn.Sequential(nn.LSTM(12, 12))
    compress_(model, Budget(params=0.9), include="0.ih_l0", kinds="svd", method="exact", **WEIGHTS_ALONE)
    parameter = nn.Parameter(torch.zeros(48, 12))
    model[0].weight_hh_l0 = parameter
    assert model[0].hh_l0.weight is model[0].weight_hh_l0 is parameter
    bias = nn.Parameter(torch.zeros(48))
    model[0].bias_ih_l0 = bias
    assert model[0].ih_l0.bias is bias
    with pytest.raises(UnsupportedError, match="an assignment on the weight of a factorised Linear"):
        model[0].weight_ih_l0 = parameter


# --- set_weight_


@EVERY
def test_set_weight_fits_the_factors_as_a_new_layer_would(name, kind):
    dense, other = LAYERS[name].layer(0), LAYERS[name].layer(7)
    layer, expected = factorised(dense, kind), factorised(other, kind)
    factors = layer.factors()
    layer.set_weight_(other.weight)
    assert all(factor is factors[key] for key, factor in layer.factors().items())
    torch.testing.assert_close(layer.dense_weight(), expected.dense_weight(), rtol=1e-6, atol=1e-6)
    padding = getattr(other, "padding_idx", None)
    assert padding is None or kind == "tt_embedding" or not bool(layer.weight[padding].any())
    assert all(factor.requires_grad for factor in layer.factors().values())


def test_set_weight_to_what_the_factors_can_hold_is_exact(layer):
    wanted = (normal(10, 3) @ normal(3, 12, seed=1)).float()
    layer.eval()
    with torch.no_grad():
        layer.weight + 0  # kept until now
        layer.set_weight_(wanted)
        torch.testing.assert_close(layer.weight + 0, wanted, **CLOSE)


def test_prototypes_are_normalised_through_set_weight(layer):
    with torch.no_grad():
        layer.set_weight_(F.normalize(layer.weight, dim=1))
    norms = layer.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(10), **CLOSE)  # scaling rows keeps the rank


def test_set_weight_keeps_a_first_factor_that_others_use():
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in "qk"})
    shared = factorise_jointly(model)
    first, (q, k) = shared[0][0].weight.detach().clone(), shared
    other = k.dense_weight().detach().clone()
    wanted = torch.randn(16, 4) @ first
    q.set_weight_(wanted)
    assert torch.equal(q[0].weight, first)
    assert torch.equal(k.dense_weight(), other)
    torch.testing.assert_close(q.dense_weight(), wanted, **CLOSE)


def factorise_jointly(model):
    from lightning_compress import LayerPlan, Plan, apply_plan_
    from lightning_compress.core.costs import Costs

    costs = Costs(1, None, 4)
    layers = tuple(LayerPlan(n, "Linear", "svd", (4,), (16, 16), 0.5, 10, 5, joint_with="q") for n in "qk")
    apply_plan_(model, Plan(layers, costs, costs))
    assert model["q"][0].weight is model["k"][0].weight
    return model["q"], model["k"]


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.zeros(12, 10), ConfigurationError, r"a tensor of shape \(10, 12\), got shape \(12, 10\)"),
        ([1.0], ConfigurationError, r"a tensor of shape \(10, 12\), got list"),
        (torch.zeros(10, 12, dtype=torch.int64), ConfigurationError, "floating-point numbers, got one of torch.int64"),
        (torch.zeros(10, 12, device="meta"), ConfigurationError, "got one on the meta device, without values"),
        (torch.full((10, 12), float("nan")), NonFiniteWeightError, "holds 120 NaN or infinite values of 120"),
    ],
)
def test_set_weight_refuses_what_is_no_weight(layer, unchanged, weight, error, message):
    before = unchanged(layer)
    with pytest.raises(error, match=f"set_weight_: .*{message}"):
        layer.set_weight_(weight)
    before.check()


def test_bias_that_is_set_is_held_by_the_last_factor():
    layer = factorised(nn.Linear(12, 10), "svd", (3,))
    bias = nn.Parameter(torch.ones(10))
    layer.bias = bias
    assert layer.bias is layer[-1].bias is bias
    assert list(layer.state_dict()) == ["reduce.weight", "expand.weight", "expand.bias"]
    assert isinstance(layer.weight, FactorisedWeight)
