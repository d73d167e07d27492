"""The callback `Compress`: its settings, and what it does in which of Lightning's hooks."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from typing_extensions import Unpack, override

from lightning_compress.analysis.statistics import require_inputs
from lightning_compress.analysis.trace import ExampleInput
from lightning_compress.compress import Compression, compress_model_
from lightning_compress.core.checks import require_flag, with_known_keywords
from lightning_compress.core.effort import Effort, EffortName
from lightning_compress.core.fine_tuning import Distill, Schedule
from lightning_compress.core.parallel import from_first
from lightning_compress.core.plan import Plan
from lightning_compress.core.progress import Progress
from lightning_compress.core.settings import Budget, Objective, Patterns, SearchKeywords, SearchSettings
from lightning_compress.core.workers import Parallel
from lightning_compress.kinds.registry import resolve_kinds
from lightning_compress.search.api import search_with_statistics
from lightning_compress.search.strategies import strategy_of
from lightning_compress.surgery.swap import Replacement
from lightning_compress.training.checkpoint import (
    RestoringCallback,
    configure_as_dense,
    install_shadows,
    require_same_layout,
)
from lightning_compress.training.checks import check_schedule, plan_of_factorised
from lightning_compress.training.distill import Teacher
from lightning_compress.training.distributed import require_supported
from lightning_compress.training.fine_tuning import FineTuning
from lightning_compress.training.fit_state import (
    FitState,
    FromCheckpoint,
    FromDenseCheckpoint,
    Shadows,
    factor_layers,
    rebuilt_teacher,
)
from lightning_compress.training.optimizers import (
    OptimizersBefore,
    exchange_parameters_,
    exchanges_of,
    optimizer_layout,
)
from lightning_compress.training.payload import Payload
from lightning_compress.training.plain import plain
from lightning_compress.training.restoring import Restoration
from lightning_compress.training.rounds import make_dense_, reconcile_
from lightning_compress.training.running_fit import RunningFit
from lightning_compress.training.schedule import PhaseTracker


class Compress(RestoringCallback):
    """Searches the ranks when a fit starts, puts factorised layers in, and fine-tunes them.

    Add it to any Trainer; the model, its optimizers and its data stay as they are:

        trainer = L.Trainer(max_epochs=10, callbacks=[Compress(Budget(params=0.2))])
        trainer.fit(model, datamodule)

    A fit of a module that is compressed already (a second `fit`) only fine-tunes. Checkpoints hold the
    plan, so `fit(ckpt_path=...)`, `test(ckpt_path="best")` and the like rebuild the structure.

    Args:
        budget: Upper bounds, a `Budget` or a mapping such as `{"params": 0.2}`.
        method, …, parallel: The fields of `SearchSettings`.
        heal: Whether to repair the factors on synthetic inputs before fine-tuning, see `compress_`.
        calibration: Batches of real inputs, instead of synthetic ones; the plan then says it is not data-free.
        schedule: Warm-up, freezing, or phases and rounds, a `Schedule` or a mapping; None for none of these.
        distill: Distillation from the dense model, a `Distill`, a mapping, or "logits" or "layers"; None for off.
        example_input: A tensor, a tuple or dict of arguments of `forward`, or a shape with its
            batch dimension. By default the module's `example_input_array`, else the shape of
            the first batch of the training data (only its shape is used).
        require_used: Whether a factor that the first batch sends no gradient to is an error; false for
            models that use some of their layers only in some batches, such as mixtures of experts.

    Attributes:
        settings: `**settings` as one `SearchSettings`.
        plan: The plan of the last round of the last fit; None before the first.
        seconds: How long each part of that compression took.

    Raises:
        ConfigurationError: If an argument has a wrong type, name or value.
        UnsupportedError: In `setup`, for strategies and callbacks that it cannot work with.
    """

    @with_known_keywords("Compress")
    def __init__(
        self,
        budget: Budget | Mapping[str, Any],
        *,
        method: str = "continuous",
        objective: Objective = "auto",
        kinds: str | Sequence[str] = "auto",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        overrides: Mapping[str, Any] | None = None,
        rank_multiple: int = 1,
        seed: int | None = 0,
        effort: EffortName | Effort | None = None,
        target: Any = "torch",
        time_limit: float | None = None,
        parallel: Parallel = "threads",
        heal: bool = True,
        calibration: Iterable[Any] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        distill: Distill | Mapping[str, Any] | None = None,
        example_input: ExampleInput | None = None,
        require_used: bool = True,
    ) -> None:
        self.budget, seed = Budget.from_value(plain(budget)), cast(int, seed)
        layers = plain(kinds), plain(include), plain(exclude), plain(overrides)
        own = effort, plain(target), time_limit, parallel
        self.settings = SearchSettings(method, objective, *layers, rank_multiple, seed, *own)
        strategy_of(self.settings)
        resolve_kinds(self.settings.kinds)
        self.heal, self.calibration, self.require_used = heal, calibration, require_used
        self.schedule = Schedule.from_value(plain(schedule))
        self.distill = Distill.from_value(plain(distill))
        self.example_input = plain(example_input)
        self._check_settings()
        if self.schedule.budgets and isinstance(calibration, Iterator):  # every round looks at it
            self.calibration = list(calibration)
        self.plan: Plan | None = None
        self.seconds: Mapping[str, float] = {}
        self._state = FitState(PhaseTracker(self.schedule))  # of one fit, until the next one
        self._left: FromCheckpoint | FromDenseCheckpoint | None = None  # from loading a checkpoint to on_fit_start
        self._fine_tuning: FineTuning | None = None  # from on_fit_start to the end of the fit
        self._undo = contextlib.ExitStack()  # what a checkpoint changed, until the first batch
        self._shadows = Shadows()

    def _check_settings(self) -> None:
        """Checks the settings that no class of its own checks, and that they fit together."""
        for name in ("heal", "require_used"):
            require_flag(name, getattr(self, name))
        require_inputs(self.example_input, self.calibration)
        check_schedule(self.schedule, self.budget, self.distill)

    @classmethod
    def arguments(cls) -> list[str]:
        """Returns the names of all arguments."""
        return list(inspect.signature(cls.__init__).parameters)[1:]

    def plan_for(
        self,
        model: nn.Module,
        example_input: ExampleInput | None = None,
        *,
        progress: Progress | None = None,
        **changes: Unpack[SearchKeywords],
    ) -> Plan:
        """Returns the plan that a fit of this model would apply; the model is not changed.

        Args:
            model: A dense module.
            example_input: See `search_ranks`; None for the callback's own.
            progress: Called with what is being done and the fraction done.
            **changes: Other settings than the callback's own.

        Raises:
            LightningCompressError: As `search_ranks`.
        """
        example = example_input if example_input is not None else self.example_input
        settings = SearchSettings.of(
            {**vars(self.settings), **changes}, owner="plan_for", beside=("example_input", "progress")
        )
        return search_with_statistics(
            model, self.budget, settings, example_input=example, progress=progress, spare_frozen=True
        )[0]

    # --- hooks -------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work and arranges that checkpoints carry the plan."""
        require_supported(trainer)
        self.optimizers_before = trainer.optimizers
        if stage == TrainerFn.FITTING.value:
            self._end_fit()  # one that a tuner broke off without a word
            self._state = FitState(PhaseTracker(self.schedule))
        install_shadows(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on from a checkpoint, fine-tunes a module that is factorised already, or compresses a dense one."""
        fit = RunningFit(trainer, pl_module)
        left, self._left = self._left, None
        if isinstance(left, FromCheckpoint):
            self._go_on(fit, left)
        elif factor_layers(pl_module):
            self._take_as_factorised(fit)
        else:
            self._compress_dense(fit, left)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the schedule and the distillation."""
        self._undo.pop_all()  # dropped, not called
        if self._fine_tuning is not None:
            self._fine_tuning.start()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the next phase if the one before is over, with a round of compression if it asks for one."""
        if self._fine_tuning is not None:
            self._follow_schedule(self._fine_tuning, boundary=True)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Does the same for phases whose length is in steps."""
        if self._fine_tuning is not None:
            self._follow_schedule(self._fine_tuning, boundary=False)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes which factors have a gradient, until the first batch is over."""
        if self._fine_tuning is not None:
            self._fine_tuning.after_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keeps what the phase of the schedule does not train as it is."""
        if self._fine_tuning is not None:
            self._fine_tuning.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks after the first batch that the factorised layers are the ones in use and get gradients."""
        if self._fine_tuning is not None:
            self._fine_tuning.after_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the schedule the metrics of the epoch, where there was a validation."""
        if self._fine_tuning is not None:
            self._fine_tuning.after_epoch()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes everything that was only for the fit."""
        if self._fine_tuning is not None:
            self._fine_tuning.finish()
        self._end_fit()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does the same after an error or Ctrl-C; before the first batch the module becomes what it was."""
        self._undo.close()
        self._end_fit()

    def _end_fit(self) -> None:
        self._left = None
        self._undo.pop_all()  # dropped, not called
        if self._fine_tuning is not None:
            self._fine_tuning.stop()
            self._fine_tuning = None
        self._shadows.remove()

    def _follow_schedule(self, fine_tuning: FineTuning, *, boundary: bool) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(vars(self).update, plan=self.plan, seconds=self.seconds)
            fine_tuning.follow_schedule(boundary=boundary)
            undo.pop_all()

    # --- the three ways into a fit -------------------------------------------------------------

    def _go_on(self, fit: RunningFit, left: FromCheckpoint) -> None:
        """Goes on from the checkpoint of a compressed run, which has given the module its structure."""
        self._undo.callback(OptimizersBefore(fit.optimizers).put_back_)
        exchange_parameters_(fit.optimizers, left.exchanges)
        fit.restore_finetuning(left.frozen)
        if left.layout is not None:
            require_same_layout(left.layout, optimizer_layout(fit.optimizers, fit.module))
        self._fine_tune(fit, left.replacements, left.teacher)

    def _take_as_factorised(self, fit: RunningFit) -> None:
        """Takes a module that is factorised already as it is: it is trained without schedule and distillation."""
        example = self._example_input(fit) if self.budget.needs_example_input else None
        plan = plan_of_factorised(fit.module, self.budget, self.distill, example)
        self.plan = self.plan or plan

    def _compress_dense(self, fit: RunningFit, left: FromDenseCheckpoint | None) -> None:
        """Compresses a dense module, and hands the factors to the optimizers; an error leaves it dense."""
        fit.require_no_averages()
        teacher = Teacher(fit.module, self.distill) if self.distill is not None else None
        with contextlib.ExitStack() as undo:  # of all that comes, logging too
            undo.callback(vars(self).update, plan=self.plan, seconds=self.seconds)
            undo.callback(OptimizersBefore(fit.optimizers).put_back_)
            if left is not None:
                exchange_parameters_(fit.optimizers, left.exchanges)
                fit.restore_finetuning(None)
            done = self._compress(fit, (*self.schedule.budgets, self.budget)[0])
            undo.callback(done.undo_, fit.module)
            self._state.teacher = teacher.fingerprint if teacher is not None else None
            before = [[list(group["params"]) for group in o.param_groups] for o in fit.optimizers]
            exchange_parameters_(fit.optimizers, exchanges_of(done.replacements))
            fit.exchanged()
            if left is not None:
                left.carry_states_(before, fit.optimizers)
            fit.structure_changed()
            self._fine_tune(fit, done.replacements, teacher)
            fit.log_plan(done, 1)
            undo.pop_all()
        fit.summarise_again(self)

    def _compress(self, fit: RunningFit, budget: Budget) -> Compression:
        """Compresses the dense module of a fit in place: at its start, and in every later round the merged one."""
        done = fit.compress(
            lambda progress: compress_model_(
                fit.module,
                budget,
                self.settings,
                example_input=from_first("the example input", self._example_input(fit)),
                calibration=self.calibration,
                heal=self.heal,
                progress=progress,
                spare_frozen=not fit.unfreezes,
            )
        )
        self.plan, self.seconds = done.plan, done.seconds
        return done

    def _example_input(self, fit: RunningFit) -> ExampleInput | None:
        return fit.example_input(self.example_input, needed=self.budget.needs_example_input)

    def _fine_tune(self, fit: RunningFit, replacements: Sequence[Replacement], teacher: Teacher | None) -> None:
        self._fine_tuning = FineTuning(
            fit,
            replacements,
            phases=self._state.phases,
            teacher=teacher,
            compress=functools.partial(self._compress, fit),
            shadows=self._shadows,
            require_used=self.require_used,
        )

    # --- checkpoints ---------------------------------------------------------------------------

    @override
    def restore(self, pl_module: LightningModule, payload: Payload, restoration: Restoration) -> None:
        """Rebuilds the factorised structure from a checkpoint, before its weights are loaded.

        Args:
            pl_module: The module, dense or factorised, in the way of this checkpoint or of another round.
            payload: What the checkpoint holds.
            restoration: Undoes it; of a fit, until its first batch.

        Raises:
            ResumeError: If the dense teacher cannot be rebuilt from the module as it is, or the schedule is another.
            PlanError: If the plan does not fit the module.
        """
        restoration.add_undo(vars(self).update, plan=self.plan, seconds=self.seconds)
        if pl_module.trainer.state.fn != TrainerFn.FITTING:
            restoration.rebuilt(reconcile_(pl_module, payload.plan))
            self.plan = payload.plan
            return
        teacher = rebuilt_teacher(pl_module, self.distill, payload) if self.distill is not None else None
        self._undo.callback(restoration.undo)
        restoration.add_undo(setattr, self, "_state", FitState(PhaseTracker(self.schedule)))
        self._state.load(payload, teacher)
        rebuilt = reconcile_(pl_module, payload.plan)
        restoration.rebuilt(rebuilt)
        self.plan = payload.plan
        shells = rebuilt.replacements
        self._left = FromCheckpoint(shells, rebuilt.exchanges, payload.optimizers, teacher, payload.frozen)
        configure = functools.partial(configure_as_dense, pl_module, pl_module.configure_optimizers, shells)
        self._shadows.put(pl_module, "configure_optimizers", configure)

    @override
    def restore_dense(self, pl_module: LightningModule, checkpoint: dict[str, Any], restoration: Restoration) -> None:
        """Makes the module dense if it is not, and keeps the checkpoint: its optimizer states are to be carried over.

        Args:
            pl_module: The module.
            checkpoint: That of a dense run; its optimizer states are rewritten before they are loaded.
            restoration: Undoes it until the first batch.
        """
        rebuilt = make_dense_(pl_module)
        if rebuilt.merged is not None:
            self._undo.callback(restoration.undo)
            restoration.rebuilt(rebuilt)
        self._left = FromDenseCheckpoint(checkpoint, rebuilt.exchanges)

    @override
    def extend_payload(self, payload: dict[str, Any]) -> None:
        """Adds the plan as it was found, where the schedule stands, and the teacher's fingerprint."""
        payload.update(self._state.payload())
        if self.plan is not None:
            payload["plan"] = self.plan.to_json()
