"""The fine-tuning of the factors: what is in force from `on_fit_start` to the end of a fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from lightning_compress.compress import Compression
from lightning_compress.core.settings import Budget
from lightning_compress.surgery.swap import Replacement
from lightning_compress.training.distill import Distillation, Teacher
from lightning_compress.training.first_batch_check import FirstBatchCheck
from lightning_compress.training.fit_state import Shadows, factor_layers
from lightning_compress.training.optimizers import OptimizersBefore, exchange_parameters_, held_by
from lightning_compress.training.rounds import compress_again_
from lightning_compress.training.running_fit import RunningFit
from lightning_compress.training.schedule import PhaseTracker, ScaledSteps, drop_gradients, trained_in


class FineTuning:
    """One fine-tuning; made once the factors are in the optimizers.

    From then on the learning rates are scaled and the layers watched. `start` begins the schedule and the
    distillation, `stop` removes everything.

    Args:
        fit: The fit it is part of.
        replacements: The layers that were replaced.
        phases: Where the fit stands in its schedule.
        teacher: What to distil from; None for no distillation.
        compress: Compresses the module, made dense again, down to the budget of a round, in place.
        shadows: Where the wrapped training step is put on the module.
        require_used: Whether every factor must get a gradient in the first batch.
    """

    def __init__(
        self,
        fit: RunningFit,
        replacements: Sequence[Replacement],
        *,
        phases: PhaseTracker,
        teacher: Teacher | None,
        compress: Callable[[Budget], Compression],
        shadows: Shadows,
        require_used: bool,
    ) -> None:
        self._fit, self._phases, self._teacher, self._shadows = fit, phases, teacher, shadows
        self._compress = compress
        self._require_used = require_used
        self._distillation: Distillation | None = None
        self._check = self._first_batch_check(replacements)
        self._scaled: ScaledSteps | None = None
        if phases.scales:
            self._scaled = ScaledSteps(
                fit.optimizers,
                lambda: _factors(fit.module),
                scale=lambda: phases.scale(fit.step),
                rest=lambda: phases.phase.lr_scale,
            )

    def start(self) -> None:
        """Enters the schedule, unless the fit goes on within it, and wraps the training step with the distillation."""
        if not self._phases.begun:
            self._phases.begin(self._fit.epoch, self._fit.step)
        self._require_time()
        if self._teacher is None:
            return
        module, phases = self._fit.module, self._phases
        self._teacher.module.to(module.device)
        manual = not module.automatic_optimization
        self._distillation = self._teacher.wrap(
            module,
            module.training_step,
            module.log,
            enabled=lambda: phases.phase.distill is not False,
            manual=manual,
        )
        self._shadows.put(module, "training_step", self._distillation.step)
        if manual:
            self._shadows.put(module, "manual_backward", self._distillation.backward(module.manual_backward))

    def follow_schedule(self, *, boundary: bool) -> None:
        """Enters the next phase if the one before is over, with a round of compression if it asks for one.

        Args:
            boundary: Whether an epoch is about to begin.
        """
        if self._phases.phase.endless:
            return
        where = self._fit.epoch, self._fit.step
        if not self._phases.over(*where, boundary=boundary):
            return
        with contextlib.ExitStack() as undo:
            undo.callback(self._phases.load, self._phases.state())
            phase = self._phases.advance(*where)
            self._fit.log({"compress/phase": self._phases.state()["phase"]})
            if phase.budget is not None:
                self.next_round(phase.budget)
            undo.pop_all()

    def next_round(self, budget: Budget) -> None:
        """Searches again on the weights as they are now; optimizers keep the state of everything that stays.

        Raises:
            Exception: As a compression, `exchange_parameters_` or a logger does; module and optimizers are then as they
                were.
        """
        fit, module = self._fit, self._fit.module
        fit.require_no_averages()
        with contextlib.ExitStack() as undo:  # of all that comes, logging too
            undo.callback(OptimizersBefore(fit.optimizers).put_back_)
            again = compress_again_(module, lambda _: self._compress(budget))
            undo.callback(again.undo_, module)
            exchange_parameters_(fit.optimizers, again.exchanges)
            fit.exchanged()
            fit.structure_changed()
            if self._scaled is not None:
                self._scaled.refresh()
            if self._distillation is not None:
                self._distillation.attach()
            self._check.stop()
            self._check = self._first_batch_check(again.done.replacements)
            fit.log_plan(again.done, self._phases.round)
            undo.pop_all()

    def after_backward(self) -> None:
        """Notes which factors have a gradient, until the first batch is over."""
        self._check.look(backward=True)

    def before_step(self) -> None:
        """Notes the gradients likewise, and drops those of what the phase does not train."""
        self._check.look()
        phase, module = self._phases.phase, self._fit.module
        if phase.train != "all":
            drop_gradients(module.parameters(), keep=trained_in(phase, module, _factors(module)))

    def after_batch(self) -> None:
        """Checks after the first batch that the factorised layers are the ones in use and get gradients.

        Raises:
            OrphanParameterError: If not.
        """
        self._check.check()
        if self._scaled is not None:
            self._fit.module.log("compress/lr_scale", self._scaled.scale)

    def after_epoch(self) -> None:
        """Shows the schedule the metrics of an epoch, if it waits for one and there was a validation.

        Raises:
            ConfigurationError: If the one that it waits for is not among them.
        """
        if self._phases.phase.until_plateau is not None and self._fit.validated:
            self._phases.observe(self._fit.metrics())

    def _require_time(self) -> None:
        """Warns where the fit is too short for all rounds of compression."""
        fit, waiting = self._fit, self._phases.budgets[1]
        needed = self._phases.epochs_to_last_round(fit.epoch, fit.steps_per_epoch)
        if waiting and needed >= fit.epochs_left:
            fit.warn(
                f"the fit is too short for its schedule: compression to {waiting[-1]} begins after {needed:g} epochs "
                f"at the earliest, and {fit.epochs_left:g} are left. Raise max_epochs, shorten the phases, or go on "
                "later with fit(ckpt_path=...)."
            )

    def finish(self) -> None:
        """Warns at the end of a fit that did not come to its last round."""
        reached, waiting = self._phases.budgets
        if waiting:
            self._fit.warn(
                f"the fit ended in round {len(reached)} of {len(reached) + len(waiting)}: the module keeps "
                f"{reached[-1]}, and was not compressed to {waiting[-1]}, as its schedule has it."
            )

    def stop(self) -> None:
        """Removes all hooks; the shadows are removed by whoever made them."""
        for part in (self._distillation, self._scaled):
            if part is not None:
                part.detach()
        self._check.stop()

    def _first_batch_check(self, replacements: Sequence[Replacement]) -> FirstBatchCheck:
        factors: dict[str, nn.Parameter] = {}
        if self._require_used:
            module = self._fit.module
            held = set().union(*map(held_by, self._fit.optimizers))
            own = {id(factor) for factor in _factors(module)} & held
            factors = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in own}
        return FirstBatchCheck(replacements, factors)


def _factors(module: nn.Module) -> list[nn.Parameter]:
    return [cast(nn.Parameter, factor) for m in factor_layers(module) for factor in m.factors().values()]
