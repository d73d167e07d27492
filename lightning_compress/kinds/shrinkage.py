"""Second moments as estimates: how far samples can be trusted, and what unseen ones will show.

Positions of one image are not independent, so a sample here is one input of the model with all its positions.
The covariance of what enters a layer is shrunk towards a multiple of the identity by the share α that is
expected to bring it nearest to the true one (Ledoit and Wolf 2004, "A well-conditioned estimator for
large-dimensional covariance matrices", with the second moment of a sample in the place of x xᵀ); the mean is
left as it is. With many samples α goes to 0 and nothing changes.

A rank's error on the samples that its factors were fitted to is too small. `Folds` keeps the second moments of a
layer's outputs W x over parts of the samples, so that the error of every rank is measured on the part that was
left out of its fit, from matrices of the size (out, out) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.kinds.base import Floats

FOLDS = 4
"""Parts of the samples, each of which judges what is fitted to the others."""
MOST_OUTPUTS = 1024
"""Outputs of a layer that folds keep; of more they keep so many random combinations."""
LARGE = 1024
"""From this many inputs on sums are kept in single precision too: half of the memory."""
DOUBLE = 256
"""Below this many inputs moments are worked out in double precision: it costs little there."""


@dataclass(frozen=True)
class Estimate:
    """A second moment from samples.

    Attributes:
        second: E[x xᵀ] with its covariance shrunk, (groups, D, D) float64.
        mean: E[x], (groups, D).
        samples: Number of independent ones.
        shrinkage: α, the largest of the groups.
        folds: What judges the error of every rank, None if unknown.
    """

    second: Tensor
    mean: Tensor
    samples: int
    shrinkage: float
    folds: Folds | None


@dataclass(frozen=True)
class UnseenErrors:
    """How errors grow from the samples that a fit has seen to others.

    They are those of the SVD of a layer's outputs at every rank. Another kind whose fit expects the same error is
    taken to lose as much on unseen samples.

    Attributes:
        expected: What fits expect, rising, (n,).
        unseen: What other samples then show, rising, (n,).
        spread: Its standard error over the parts, (n,).
    """

    expected: Floats
    unseen: Floats
    spread: Floats

    def at(self, errors: Floats) -> Floats:
        """Returns what is to be expected on unseen samples where fits expect these errors; none stays none."""
        grown: Floats = np.where(errors > 0, np.maximum(np.interp(errors, self.expected, self.unseen), errors), 0.0)
        return grown

    def spread_at(self, error: float) -> float:
        """Returns the standard error of `at` for the error that a fit expects."""
        return float(np.interp(error, self.expected, self.spread)) if error > 0 else 0.0

    @staticmethod
    def mean(curves: Sequence[UnseenErrors]) -> UnseenErrors:
        """Returns the mean of several groups' curves."""
        values = [(c.expected, c.unseen, c.spread) for c in curves]
        return UnseenErrors(*(np.mean(each, axis=0) for each in zip(*values, strict=True)))


@dataclass(frozen=True)
class Folds:
    """Second moments of a layer's outputs without its bias, over parts of the samples.

    Of layers with many outputs they are of random combinations of these (see `MOST_OUTPUTS`), and errors are then
    those without the root G^½.

    Attributes:
        products: E[y yᵀ] of each part, (parts, groups, out, out) float64.
        means: E[y], (parts, groups, out).
        weights: Share of the samples in each part, (parts,).
        identity: m W Wᵀ, what the shrunk part of the covariance becomes, (groups, out, out).
        shrinkage: α of all parts but one, (parts, groups).
    """

    products: Tensor
    means: Tensor
    weights: Tensor
    identity: Tensor
    shrinkage: Tensor

    def group(self, index: int) -> Folds:
        """Returns those of one group of several."""
        one = slice(index, index + 1)
        return Folds(
            self.products[:, one], self.means[:, one], self.weights, self.identity[one], self.shrinkage[:, one]
        )

    def errors(self, root: Tensor | None) -> UnseenErrors:
        """Returns the errors of every rank of a projection of the outputs, each part judging the fit to the others.

        Args:
            root: G^½ of the one group, (out, out), None for the identity.
        """
        parts = [self._of_part(part, root) for part in range(len(self.weights))]
        weights = self.weights.numpy()[:, None]
        expected, unseen = (_tails((weights * np.stack(each)).sum(axis=0)) for each in zip(*parts, strict=True))
        curves = np.stack([_tails(own) for _, own in parts])
        spread = curves.std(axis=0, ddof=1) / len(curves) ** 0.5
        return UnseenErrors(
            np.append(expected[::-1], 1.0),
            np.append(np.maximum.accumulate(unseen[::-1]), 1.0),
            np.append(spread[::-1], 0.0),
        )

    def _of_part(self, part: int, root: Tensor | None) -> tuple[Floats, Floats]:
        """Returns energies of the components fitted to all parts but one: in those, and in that one, (out,) each."""
        others = self.weights * (torch.arange(len(self.weights)) != part)
        share = others / others.sum()
        mean = share @ self.means[:, 0]
        outer, alpha = mean[:, None] * mean, self.shrinkage[part, 0]
        product = torch.einsum("f,foi->oi", share, self.products[:, 0])
        fitted, held_out = (1 - alpha) * (product - outer) + alpha * self.identity[0] + outer, self.products[part, 0]
        if root is not None and len(root) == len(fitted):
            fitted, held_out = root @ fitted @ root, root @ held_out @ root
        values, basis = torch.linalg.eigh((fitted + fitted.T) / 2)
        energies = ((held_out @ basis) * basis).sum(dim=0)
        return values.clamp_min(0).flip(0).numpy(), energies.flip(0).numpy()


def _tails(energies: Floats) -> Floats:
    total = energies.sum()
    if not total > 0:
        return np.zeros(len(energies))
    errors: Floats = np.clip(1 - energies.cumsum() / total, 0.0, 1.0)
    return errors


class SampleSums:
    """What is summed over the samples of one layer, of which `estimate` is made.

    All is summed about a point near the mean, so that the spread of the samples is that of their covariances.

    Args:
        first: Some samples, (groups, B, P, D), whose mean is that point; they are not added yet.
        weight: (groups, out, D), whose outputs the folds are of; None for none.
        centred: Whether the covariance is shrunk; else the second moment about 0.
    """

    def __init__(self, first: Tensor, weight: Tensor | None = None, *, centred: bool = True) -> None:
        groups, _, _, size = first.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=first.device)

        self._centred = centred
        self._shift = first.mean(dim=(1, 2)).double() if centred else zeros(groups, size)
        self._second, self._squares = zeros(groups, size, size), zeros(groups)
        if size >= LARGE and first.dtype == torch.float32:
            self._second = self._second.float()
        self._sums = [zeros(groups, size) for _ in range(FOLDS)]
        self._counts = [0] * FOLDS
        self._weight = weight.to(first.device, torch.float64) if weight is not None else None
        self._products = [zeros(groups, w.shape[1], w.shape[1]) for w in [self._weight] * FOLDS if w is not None]

    def add(self, rows: Tensor) -> None:
        """Adds samples.

        Args:
            rows: (groups, B, P, D): B samples of P positions each.
        """
        rows = rows if rows.shape[-1] >= DOUBLE and rows.dtype == torch.float32 else rows.double()
        rows = rows - self._shift[:, None, None, :].to(rows)
        positions = rows.shape[2]
        for fold, part in enumerate(_parts(rows, sum(self._counts))):
            if part.shape[1] == 0:
                continue
            flat = part.flatten(1, 2)  # (groups, n, D)
            own = (flat.mT @ flat).div_(positions)
            self._second += own
            self._sums[fold] += flat.sum(dim=1).double() / positions
            self._counts[fold] += part.shape[1]
            if self._weight is not None:
                self._products[fold] += _product(self._weight, flat, own, positions)
        self._squares += _squared_norms(rows).double()

    def estimate(self) -> Estimate:
        """Returns the second moment with its covariance shrunk, and what judges the error of every rank."""
        samples = sum(self._counts)
        second = self._second.double() / samples
        offset = torch.stack(self._sums).sum(dim=0) / samples if self._centred else torch.zeros_like(self._shift)
        squares = second.square().sum(dim=(1, 2))
        covariance = second.sub_(offset[:, :, None] * offset[:, None, :])
        scale = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)
        size = covariance.shape[-1]
        spread = (self._squares / samples - squares).clamp_min(0)  # of one sample
        known = covariance.square().sum(dim=(1, 2)) - size * scale.square()  # ‖C − m I‖²
        alpha = _shrinkage(spread, known, samples, samples)
        estimate, mean = shrunk(covariance, alpha[:, None, None]), self._shift + offset
        if self._centred:
            estimate += mean[:, :, None] * mean[:, None, :]
        alphas = [_shrinkage(spread, known, samples, samples - count) for count in self._counts]
        folds = self._folds(scale, torch.stack(alphas))
        return Estimate(estimate.cpu(), mean.cpu(), samples, float(alpha.max()), folds)

    def _folds(self, scale: Tensor, alphas: Tensor) -> Folds | None:
        """Returns what judges the error of every rank, None without a weight or with fewer samples than `FOLDS`.

        Args:
            scale: Mean variance, (groups,).
            alphas: Without each part, (parts, groups).
        """
        weight = self._weight
        if weight is None or min(self._counts) == 0:
            return None
        counts = torch.tensor(self._counts, dtype=torch.float64, device=weight.device)
        about, products = (weight @ self._shift[:, :, None])[..., 0], []  # (groups, out)
        means = torch.stack([(weight @ (s / n)[:, :, None])[..., 0] for s, n in zip(self._sums, counts, strict=True)])
        for product, mean, count in zip(self._products, means, counts, strict=True):
            crossed = mean[:, :, None] * about[:, None, :]
            products.append(product / count + crossed + crossed.mT + about[:, :, None] * about[:, None, :])
        identity = scale[:, None, None] * (weight @ weight.mT)
        parts = torch.stack(products), means + about, counts / counts.sum(), identity, alphas
        return Folds(*(part.cpu() for part in parts))


def few_outputs(weight: Tensor) -> Tensor:
    """Returns a weight (groups, out, D) with its outputs in at most `MOST_OUTPUTS` random orthogonal combinations."""
    groups, outputs, _ = weight.shape
    if outputs <= MOST_OUTPUTS:
        return weight
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(outputs, MOST_OUTPUTS, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(drawn)[0].mT.to(weight.device)
    return torch.stack([basis @ weight[group].double() for group in range(groups)])


def shrunk(covariance: Tensor, share: Tensor | float) -> Tensor:
    """Returns (1 − α) C + α m I with m the mean variance, of covariances C (…, D, D) and shares α."""
    variances = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None]
    found = (1 - share) * covariance
    found.diagonal(dim1=-2, dim2=-1).add_((share[..., 0] if isinstance(share, Tensor) else share) * variances)
    return found


def _product(weight: Tensor, flat: Tensor, second: Tensor, positions: int) -> Tensor:
    """Returns W (Σ x xᵀ / P) Wᵀ, (groups, out, out), by the shorter way."""
    if flat.shape[1] >= flat.shape[2]:
        return (weight.to(second) @ second @ weight.to(second).mT).double()
    outputs = flat @ weight.to(flat).mT  # fewer rows than inputs
    return (outputs.mT @ outputs).double() / positions


def _shrinkage(spread: Tensor, known: Tensor, samples: int, of: int) -> Tensor:
    """Returns α, (groups,); 1 for a single sample, which says nothing of its spread.

    Args:
        spread: Mean of ‖C_i − C‖² over the samples, (groups,).
        known: ‖C − m I‖² of the estimate C, (groups,).
        samples: Number that C is from.
        of: Number of samples like these that α is asked for.
    """
    if samples < 2:  # noqa: PLR2004
        return torch.ones_like(known)
    true = (known - spread / samples).clamp_min(0)
    noise = spread / max(1, of)
    return torch.where(noise > 0, noise / (true + noise).clamp_min(1e-300), torch.zeros_like(noise)).clamp(0, 1)


def _parts(rows: Tensor, seen: int) -> list[Tensor]:
    """Returns the samples, (groups, B, P, D), in `FOLDS` parts; single ones go to one after the other."""
    count = rows.shape[1]
    sizes = [count // FOLDS + ((fold - seen) % FOLDS < count % FOLDS) for fold in range(FOLDS)]
    return list(torch.split_with_sizes(rows, sizes, dim=1))


def _squared_norms(rows: Tensor) -> Tensor:
    """Returns Σ_i ‖X_iᵀ X_i / P‖²_F over the samples, (groups,), from the smaller of the two Gram matrices."""
    _, _, positions, size = rows.shape
    gram = rows @ rows.mT if positions <= size else rows.mT @ rows
    return (gram / positions).square().sum(dim=(1, 2, 3))
