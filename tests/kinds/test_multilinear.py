"""tensorly computes in a backend of our own, and leaves that of everyone else alone."""

from __future__ import annotations

import threading

import pytest
import tensorly
import torch
from tensorly import tenalg
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor

from lightning_compress.kinds import multilinear
from lightning_compress.kinds.multilinear import in_bases, mode_basis, tensorly_backend
from lightning_compress.kinds.registry import DECOMPOSITIONS
from tests.support.zoo import normal

KINDS = {"tucker2": (3, 2), "cp": (4,), "cp3": (4,), "tt": (2, 3, 2)}
BACKENDS = ["numpy", "pytorch"]


@pytest.fixture(autouse=True)
def _backend_as_it_was():
    yield
    tensorly.set_backend("numpy")
    tenalg.set_backend("core")


def in_thread(function, *args):
    """What a function returns in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def backends():
    return tensorly.get_backend(), tenalg.get_backend()


def fitted(kind):
    weight = normal(6, 5, 3, 3)
    factors = DECOMPOSITIONS[kind].factorise(weight, KINDS[kind])
    return [torch.from_numpy(DECOMPOSITIONS[kind].profile(weight).errors), *factors.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algebra", ["core", "einsum"])
def test_fit_is_the_same_whatever_backend_is_set_and_leaves_it_set(kind, backend, algebra):
    expected = fitted(kind)
    tensorly.set_backend(backend)
    tenalg.set_backend(algebra)
    for got in (fitted(kind), in_thread(fitted, kind)):
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert backends() == in_thread(backends) == (backend, algebra)


@pytest.mark.parametrize("kind", ["tucker2", "cp3"])
@pytest.mark.parametrize(("ours", "theirs"), [BACKENDS, BACKENDS[::-1]])
def test_backend_that_one_thread_has_for_itself_stays_its_own(kind, ours, theirs):
    """After `tensorly.backend_context` that of the thread would be the one of the whole process."""
    tensorly.set_backend(theirs)

    def own():
        tensorly.set_backend(ours, local_threadsafe=True)
        return fitted(kind), tensorly.get_backend()

    _, left = in_thread(own)
    assert left == ours
    assert tensorly.get_backend() == in_thread(tensorly.get_backend) == theirs


def test_backend_set_elsewhere_during_a_fit_changes_nothing_here_and_is_kept(monkeypatch):
    expected = fitted("cp3")
    product, inside = multilinear.tenalg.multi_mode_dot, []

    def interrupted(*args, **settings):
        in_thread(tensorly.set_backend, "numpy")
        in_thread(tenalg.set_backend, "einsum")
        inside.append(backends())
        return product(*args, **settings)

    tensorly.set_backend("pytorch")
    monkeypatch.setattr(multilinear.tenalg, "multi_mode_dot", interrupted, raising=False)
    got = fitted("cp3")
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert set(inside) == {("pytorch", "core")}
    assert in_thread(backends) == ("numpy", "einsum")


def test_backend_is_restored_after_an_error():
    before = backends()

    def fails():
        with tensorly_backend("pytorch"):
            assert backends() == ("pytorch", "core")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert backends() == before


def test_tensor_in_its_mode_bases_is_its_higher_order_svd():
    tensor = normal(4, 6, 3)
    bases = [mode_basis(tensor, mode) for mode in range(3)]
    core = in_bases(tensor, bases, range(3))
    for mode in range(3):
        rows = core.movedim(mode, 0).flatten(1)
        gram = rows @ rows.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-10)
        assert bool((gram.diagonal().diff() <= 0).all())
    with tensorly_backend("pytorch"):
        torch.testing.assert_close(tucker_to_tensor((core, bases)), tensor)
    assert in_bases(tensor, [bases[1][:, :2]], [1]).shape == (4, 2, 3)


def test_product_of_the_factors_is_that_of_tensorly():
    shape = (6, 5, 3, 3)
    cp, tucker = (DECOMPOSITIONS[kind].factorise(normal(*shape), KINDS[kind]) for kind in ("cp", "tucker2"))
    reduce, axis0, axis1 = (cp[name].flatten(1).T for name in ("reduce", "axis0", "axis1"))
    bases = [tucker["expand"].flatten(1), tucker["reduce"].flatten(1).T, *[torch.eye(3).double()] * 2]
    with tensorly_backend("pytorch"):
        products = cp_to_tensor((None, [cp["expand"].flatten(1), reduce, axis0, axis1]))
        tuckers = tucker_to_tensor((tucker["core"], bases))
    torch.testing.assert_close(DECOMPOSITIONS["cp"].dense_weight(cp, shape), products)
    torch.testing.assert_close(DECOMPOSITIONS["tucker2"].dense_weight(tucker, shape), tuckers)
