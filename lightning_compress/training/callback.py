"""The Lightning callback: hooks and wiring only. The one module that knows the Trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import Progress as RichProgress
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import Unpack, override

from lightning_compress.analysis.trace import ExampleInput, is_shape, trace
from lightning_compress.compress import Compression, compress_model_
from lightning_compress.core.errors import (
    BudgetError,
    ConfigurationError,
    ExampleInputError,
    ResumeError,
    UnsupportedError,
)
from lightning_compress.core.fine_tuning import Distill, Schedule
from lightning_compress.core.parallel import from_first
from lightning_compress.core.plan import Plan, percent
from lightning_compress.core.progress import Progress, silent
from lightning_compress.core.settings import Budget, SearchKeywords, SearchSettings
from lightning_compress.kinds.registry import resolve_kinds
from lightning_compress.layers.factorised import FactorisedLayer
from lightning_compress.search.api import search_ranks
from lightning_compress.search.strategies import strategy_of
from lightning_compress.surgery.embodied import embodied_plan
from lightning_compress.surgery.merge import merge_layers_
from lightning_compress.surgery.swap import Replacement
from lightning_compress.training.averages import restart_averages
from lightning_compress.training.checkpoint import (
    RestoringCallback,
    configure_as_dense,
    install_shadows,
    plan_in,
    require_same_layout,
)
from lightning_compress.training.distill import Distillation, Teacher
from lightning_compress.training.distributed import require_supported, rewrap, shared_compression
from lightning_compress.training.first_batch_check import Liveness
from lightning_compress.training.optimizers import (
    Exchange,
    carried_states,
    exchange_parameters_,
    exchanges_of,
    optimizer_layout,
)
from lightning_compress.training.rounds import compress_again_, exchanges_between, reconcile_
from lightning_compress.training.schedule import Course, ScaledSteps, drop_gradients, trained_in


class Compress(RestoringCallback):
    """Searches the ranks in `on_fit_start`, swaps in factorised layers, and fine-tunes them.

    Add it to any Trainer; the model, its optimizers and its data stay as they are:

        trainer = L.Trainer(max_epochs=10, callbacks=[Compress(Budget(params=0.2))])
        trainer.fit(model, datamodule)

    A fit of an already compressed module (a second `fit`) only fine-tunes. Checkpoints hold the
    plan, so `fit(ckpt_path=...)`, `test(ckpt_path="best")` and the like rebuild the structure.

    Args:
        budget: Upper bounds, a `Budget` or a mapping such as `{"params": 0.2}`.
        heal: Whether to repair the factors on synthetic inputs before fine-tuning, see `compress_`.
        calibration: Batches of real inputs, in the place of synthetic ones; the plan then says that it
            is not data-free.
        schedule: Warm-up, freezing, or phases and rounds, a `Schedule` or a mapping; None for neither.
        distill: Distillation from the dense model, a `Distill`, a mapping, or "logits" or "layers"; None for off.
        example_input: A tensor, a tuple or dict of arguments of `forward`, or a shape with its
            batch dimension. By default the module's `example_input_array`, else the shape of
            the first batch of the training data (only its shape is used).
        require_used: Whether a factor that the first batch sends no gradient to is an error; false for
            models that use some layers in some batches only, such as mixtures of experts.
        **settings: The fields of `SearchSettings`: method, objective, kinds, include, exclude, overrides,
            rank_multiple, seed.

    Attributes:
        settings: Those as one `SearchSettings`.
        plan: The plan of the last fit, None before; of its last round.
        seconds: How long each part of its compression took.

    Raises:
        ConfigurationError: If an argument has a wrong type, name or value.
        UnsupportedError: In `setup`, for strategies and callbacks this version cannot serve.
    """

    def __init__(
        self,
        budget: Budget | Mapping[str, Any],
        *,
        heal: bool = True,
        calibration: Iterable[Any] | None = None,
        schedule: Schedule | Mapping[str, Any] | None = None,
        distill: Distill | Mapping[str, Any] | None = None,
        example_input: ExampleInput | None = None,
        require_used: bool = True,
        **settings: Unpack[SearchKeywords],
    ) -> None:
        self.budget = Budget.from_value(_plain(budget))
        self.settings = SearchSettings.of(_plain(settings), owner="Compress", beside=self.arguments())
        strategy_of(self.settings)
        resolve_kinds(self.settings.kinds)
        for name, value in (("heal", cast(Any, heal)), ("require_used", cast(Any, require_used))):
            if not isinstance(value, bool):
                msg = f"{name}={value!r}: expected true or false."
                raise ConfigurationError(msg)
        self.heal, self.calibration, self.require_used = heal, calibration, require_used
        self.schedule = Schedule.from_value(_plain(schedule))
        self.distill = Distill.from_value(_plain(distill))
        _require_fitting(self.schedule, self.budget, self.distill)
        if self.schedule.budgets and isinstance(calibration, Iterator):  # every round looks at it
            self.calibration = list(calibration)
        self.example_input = _plain(example_input)
        self.plan: Plan | None = None
        self.seconds: Mapping[str, float] = {}
        self._restored: tuple[Replacement, ...] | None = None
        self._exchanges: tuple[Exchange, ...] = ()
        self._dense_checkpoint: dict[str, Any] | None = None
        self._course = Course(self.schedule)
        self._saved_layout: list[dict[str, Any]] | None = None
        self._scheduled = False
        self._shadowed = _Shadowed()
        self._teacher: Teacher | None = None
        self._fingerprint: str | None = None
        self._distillation: Distillation | None = None
        self._scaled: ScaledSteps | None = None
        self._liveness: Liveness | None = None

    @classmethod
    def arguments(cls) -> list[str]:
        """Returns the names of all arguments, the fields of `SearchSettings` among them."""
        own = [name for name in inspect.signature(cls).parameters if name != "settings"]
        return [*own, *(field.name for field in dataclasses.fields(SearchSettings))]

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
            model: A module, dense.
            example_input: See `search_ranks`; None for the callback's own.
            progress: Called with what is being done and the fraction done.
            **changes: Other settings than the callback's own.

        Raises:
            LightningCompressError: As `search_ranks`.
        """
        return search_ranks(
            model,
            self.budget,
            example_input=example_input if example_input is not None else self.example_input,
            progress=progress,
            **{**vars(self.settings), **changes},
        )

    # --- hooks -------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work and arranges that checkpoints carry the plan."""
        require_supported(trainer)
        self.optimizers_before = trainer.optimizers
        self._restored = self._saved_layout = self._fingerprint = self._dense_checkpoint = None
        self._exchanges, self._scheduled = (), False
        if stage == TrainerFn.FITTING.value:
            self._course = Course(self.schedule)
        install_shadows(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches, swaps, and hands the factors to the optimizers."""
        done: Compression | None = None
        if self._restored is not None:
            replacements, self._restored = self._restored, None
            exchanges, self._exchanges = self._exchanges, ()
        elif _factor_layers(pl_module):
            self._fine_tune_only(trainer, pl_module)
            return
        else:
            teacher = Teacher(pl_module, self.distill) if self.distill is not None else None
            exchange_parameters_(trainer.optimizers, self._exchanges)
            done = self._compress(trainer, pl_module, (*self.schedule.budgets, self.budget)[0])
            replacements, exchanges = done.replacements, tuple(exchanges_of(done.replacements))
            self._use_teacher(teacher)
            _log_plan(trainer, done, 1)
        before = [[list(group["params"]) for group in o.param_groups] for o in trainer.optimizers]
        try:
            exchange_parameters_(trainer.optimizers, exchanges)
            if self._dense_checkpoint is not None:
                checkpoint, self._dense_checkpoint = self._dense_checkpoint, None
                states = carried_states(checkpoint["optimizer_states"], before, trainer.optimizers)
                checkpoint["optimizer_states"] = states
        except BaseException:
            if done is not None:
                done.undo_(pl_module)
            raise
        if done is not None:
            self._structure_changed(trainer, pl_module)
        if self._saved_layout is not None:
            saved, self._saved_layout = self._saved_layout, None
            require_same_layout(saved, optimizer_layout(trainer.optimizers, pl_module))
        self._start_fine_tuning(trainer, pl_module, replacements)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the schedule, and wraps the training step with the distillation loss."""
        if self._scheduled and not self._course.begun:
            self._course.begin(trainer.current_epoch, trainer.global_step)
        if self._teacher is None:
            return
        self._teacher.module.to(pl_module.device)
        manual = not pl_module.automatic_optimization
        step = pl_module.training_step
        self._distillation = self._teacher.wrap(
            pl_module, step, pl_module.log, enabled=lambda: self._course.phase.distill is not False, manual=manual
        )
        self._shadowed.put(pl_module, "training_step", self._distillation.step)
        if manual:
            backward = self._distillation.backward(pl_module.manual_backward)
            self._shadowed.put(pl_module, "manual_backward", backward)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the next phase where the one before has ended, with a round of compression if it asks for one."""
        self._follow_schedule(trainer, pl_module, boundary=True)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Likewise for phases whose length is in steps."""
        self._follow_schedule(trainer, pl_module, boundary=False)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes which factors have a gradient, until the first batch is over."""
        if self._liveness is not None:
            self._liveness.look(backward=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks after the first batch that the factorised layers are the ones in use and get gradients."""
        if self._liveness is not None and self._liveness.check():
            self._liveness = None
        if self._scaled is not None:
            pl_module.log("compress/lr_scale", self._scaled.scale)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keeps still what the phase of the schedule does not train."""
        if self._liveness is not None:
            self._liveness.look()
        phase = self._course.phase
        if self._scheduled and phase.train != "all":
            drop_gradients(pl_module.parameters(), keep=trained_in(phase, pl_module, _factors(pl_module)))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the schedule the metrics of the epoch, where there was a validation."""
        if not self._scheduled or self._course.phase.until_plateau is None:
            return
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._course.observe(trainer.strategy.broadcast(seen))  # all ranks go on together, as the first one sees it

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes everything that was only for the fit."""
        self._stop_fine_tuning(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise after an error or Ctrl-C."""
        self._stop_fine_tuning(pl_module)

    # --- parts of on_fit_start -----------------------------------------------------------------

    def _compress(self, trainer: Trainer, pl_module: nn.Module, budget: Budget) -> Compression:
        """Compresses a dense module in place: at the start, and in every later round the merged one."""
        module = cast(LightningModule, pl_module)

        def compress(progress: Progress) -> Compression:
            return compress_model_(
                pl_module,
                budget,
                self.settings,
                example_input=from_first("the example input", self._example_input(trainer, module)),
                calibration=self.calibration,
                heal=self.heal,
                progress=progress,
            )

        with _progress(trainer) as progress:
            done = shared_compression(trainer, module, lambda: compress(progress))
        self.plan, self.seconds = done.plan, done.seconds
        return done

    def _structure_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets everything follow that was made for the layers before: DDP's wrapper, averaged copies."""
        rewrap(trainer, pl_module)
        restart_averages(trainer, pl_module)

    def _fine_tune_only(self, trainer: Trainer, pl_module: LightningModule) -> None:
        example = self._example_input(trainer, pl_module) if "macs" in self.budget.limits() else None
        plan = embodied_plan(pl_module, example)
        for resource, limit in self.budget.limits().items():
            kept = plan.kept[resource]
            if kept is None or kept > limit:
                msg = (
                    f"the module is already factorised with {percent(kept)} of its {resource} kept, the budget is "
                    f"{self.budget}: start from the dense module to compress it further."
                )
                raise UnsupportedError(msg)
        if self.distill is not None:
            msg = "distill= needs the dense module as its teacher: the module given to fit is already factorised."
            raise UnsupportedError(msg)
        self.plan = self.plan or plan
        rank_zero_info(
            f"Compress: the module is already factorised ({percent(plan.kept['params'])} of its parameters "
            "kept); fine-tuning."
        )

    def _example_input(self, trainer: Trainer, pl_module: LightningModule) -> ExampleInput | None:
        given = self.example_input if self.example_input is not None else pl_module.example_input_array
        if given is not None:
            return cast(ExampleInput, given if is_shape(given) else trainer.precision_plugin.convert_input(given))
        shape = _first_batch_shape(trainer)
        if shape is None:
            return None
        if "macs" not in self.budget.limits():  # a guess that is not needed must do no harm
            try:
                trace(pl_module, shape)
            except ExampleInputError:
                return None
        rank_zero_info(f"Compress: example input of shape {shape} taken from the training data (its shape alone).")
        return shape

    def _start_fine_tuning(
        self, trainer: Trainer, pl_module: LightningModule, replacements: Sequence[Replacement]
    ) -> None:
        self._scheduled = True
        self._watch(trainer, pl_module, replacements)
        if self._course.scales:
            course = self._course
            self._scaled = ScaledSteps(
                trainer.optimizers,
                lambda: _factors(pl_module),
                scale=lambda: course.scale(trainer.global_step),
                rest=lambda: course.phase.lr_scale,
            )

    def _watch(self, trainer: Trainer, pl_module: LightningModule, replacements: Sequence[Replacement]) -> None:
        factors: dict[str, nn.Parameter] = {}
        if self.require_used:
            held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
            own = {id(factor) for factor in _factors(pl_module)} & held
            factors = {name: p for name, p in pl_module.named_parameters() if p.requires_grad and id(p) in own}
        if self._liveness is not None:
            self._liveness.stop()
        self._liveness = Liveness(replacements, factors)

    def _follow_schedule(self, trainer: Trainer, pl_module: LightningModule, *, boundary: bool) -> None:
        if not self._scheduled or self._course.phase.endless:
            return
        where = trainer.current_epoch, trainer.global_step
        if not self._course.over(*where, boundary=boundary):
            return
        phase = self._course.advance(*where)
        for logger in trainer.loggers:
            logger.log_metrics({"compress/phase": self._course.state()["phase"]}, step=trainer.global_step)
        if phase.budget is not None:
            self._start_round(trainer, pl_module, phase.budget)

    def _start_round(self, trainer: Trainer, pl_module: LightningModule, budget: Budget) -> None:
        """Searches again on the weights as they are now; optimizers keep the state of everything that stays."""
        again = compress_again_(pl_module, lambda model: self._compress(trainer, model, budget))
        try:
            exchange_parameters_(trainer.optimizers, again.exchanges)
        except BaseException:
            again.undo_(pl_module)
            raise
        self._structure_changed(trainer, pl_module)
        if self._scaled is not None:
            self._scaled.refresh()
        if self._distillation is not None:
            self._distillation.attach()
        self._watch(trainer, pl_module, again.done.replacements)
        _log_plan(trainer, again.done, self.schedule.budgets.index(budget) + 1)

    def _stop_fine_tuning(self, pl_module: LightningModule) -> None:
        for part in (self._distillation, self._scaled):
            if part is not None:
                part.detach()
        if self._liveness is not None:
            self._liveness.stop()
        for name in ("training_step", "manual_backward", "configure_optimizers"):
            self._shadowed.restore(pl_module, name)
        self._scheduled = False
        self._teacher = self._distillation = self._scaled = self._liveness = None

    # --- checkpoints ---------------------------------------------------------------------------

    @override
    def restore(self, pl_module: LightningModule, payload: Mapping[str, Any]) -> None:
        """Rebuilds the factorised structure from a checkpoint, before its weights are loaded.

        Args:
            pl_module: The module, dense or factorised, in this way or that of another round.
            payload: What the checkpoint holds under `CHECKPOINT_KEY`.

        Raises:
            ResumeError: If the dense teacher cannot be rebuilt from the module as it is.
            PlanError: If the plan cannot be read or does not fit the module.
        """
        fitting = pl_module.trainer.state.fn == TrainerFn.FITTING
        plan = plan_in(payload)
        teacher = self._rebuilt_teacher(pl_module, payload) if fitting and self.distill is not None else None
        replacements, exchanges = reconcile_(pl_module, plan)
        self.plan = plan
        if fitting:
            self._use_teacher(teacher)
            self._exchanges = exchanges
            self._restore_course(payload)
            self._restored, self._saved_layout = replacements, payload.get("optimizers")
            configure = functools.partial(configure_as_dense, pl_module, pl_module.configure_optimizers, replacements)
            self._shadowed.put(pl_module, "configure_optimizers", configure)

    def _restore_course(self, payload: Mapping[str, Any]) -> None:
        if payload.get("schedule") is not None:
            self._course.load(payload["schedule"])
        else:  # of a version without phases: what it had began with the fit
            self._course.begin(0, 0)

    @override
    def restore_dense(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the module dense if it is not, and keeps the checkpoint: its optimizer states are to be carried over.

        Args:
            pl_module: The module.
            checkpoint: The one of a dense run; its optimizer states are rewritten before they are loaded.
        """
        if _factor_layers(pl_module):
            self._exchanges = tuple(exchanges_between(merge_layers_(pl_module), ()))
        if "optimizer_states" in checkpoint:
            self._dense_checkpoint = checkpoint

    @override
    def extend_payload(self, payload: dict[str, Any]) -> None:
        """Adds the plan as it was found, where the schedule stands, and the teacher's fingerprint."""
        if self._course.begun:
            payload["schedule"] = self._course.state()
        if self.plan is not None:
            payload["plan"] = self.plan.to_json()
        if self._fingerprint is not None:
            payload["teacher"] = self._fingerprint

    def _use_teacher(self, teacher: Teacher | None) -> None:
        self._teacher = teacher
        self._fingerprint = teacher.fingerprint if teacher is not None else None

    def _rebuilt_teacher(self, pl_module: LightningModule, payload: Mapping[str, Any]) -> Teacher:
        advice = "Give fit the dense module with the weights it had when the compression began."
        if _factor_layers(pl_module):
            msg = f"the module is already factorised, so the dense teacher cannot be rebuilt from it. {advice}"
            raise ResumeError(msg)
        convert = pl_module.trainer.precision_plugin.convert_module  # the first run's teacher was converted too
        teacher = Teacher(pl_module, cast(Distill, self.distill), convert=convert)
        if teacher.fingerprint != payload.get("teacher"):
            msg = f"the module's weights are not those of the teacher the checkpoint was distilled from. {advice}"
            raise ResumeError(msg)
        return teacher


class _Shadowed:
    """Attributes replaced on a module's instance for the time of a fit, put back afterwards."""

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}

    def put(self, pl_module: LightningModule, name: str, value: Any) -> None:
        self._before.setdefault(name, pl_module.__dict__.get(name))
        setattr(pl_module, name, value)

    def restore(self, pl_module: LightningModule, name: str) -> None:
        if name in self._before:
            before = self._before.pop(name)
            if before is None:
                pl_module.__dict__.pop(name, None)
            else:
                setattr(pl_module, name, before)


def _factor_layers(module: nn.Module) -> list[FactorisedLayer]:
    return [m for m in module.modules() if isinstance(m, FactorisedLayer)]


def _factors(module: nn.Module) -> list[nn.Parameter]:
    return [cast(nn.Parameter, factor) for m in _factor_layers(module) for factor in m.factors().values()]


def _plain(value: Any) -> Any:
    """Returns plain dicts and lists for containers of another class, such as those of Hydra's configurations."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _require_fitting(schedule: Schedule, budget: Budget, distill: Distill | None) -> None:
    """Checks that the schedule fits the other settings."""
    for number, phase in enumerate(schedule.phases):
        if phase.distill and distill is None:
            msg = f"phase {number} of the schedule has distill=true: say what to distil, as in distill='logits'."
            raise ConfigurationError(msg)
    for last in schedule.budgets[-1:]:
        limits = last.limits()
        if any(limits.get(name, math.inf) > limit for name, limit in budget.limits().items()) or not budget.limits():
            msg = f"the schedule ends at {last}, which does not keep the budget of the callback, {budget}."
            raise BudgetError(msg)


@contextlib.contextmanager
def _progress(trainer: Trainer) -> Iterator[Progress]:
    """Shows one bar while the search runs, if the trainer shows bars at all."""
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", True) or not trainer.is_global_zero:
        yield silent
        return
    with RichProgress(transient=True) as progress:
        task = progress.add_task("Compress", total=1.0)
        yield lambda what, done: progress.update(task, description=f"Compress: {what}", completed=done)


def _log_plan(trainer: Trainer, done: Compression, number: int) -> None:
    """Sends sizes and plan to the loggers and a summary to the console."""
    plan = done.plan
    dense = len(plan.layers) - len(plan.factorised)
    rank_zero_info(
        f"Compress: {plan.summary()}\n{len(plan.factorised)} layers factorised, {dense} left dense; "
        "print(callback.plan) lists them with the reasons."
    )
    sizes = {
        f"compress/{resource}{suffix}": float(value)
        for suffix, values in (("", vars(plan.compressed)), ("_dense", vars(plan.dense)), ("_kept", plan.kept))
        for resource, value in values.items()
        if value is not None
    }
    sizes["compress/round"] = float(number)
    if done.healing is not None:
        sizes["compress/distance_before_healing"] = done.healing.before
        sizes["compress/distance_after_healing"] = done.healing.after
    sizes |= {f"compress/seconds/{part}": seconds for part, seconds in done.seconds.items()}
    for name, value in (("search_seconds", plan.seconds), ("optimality_gap", plan.optimality_gap)):
        if value is not None:
            sizes[f"compress/{name}"] = value
    layers = {p.name: p.kind if p.is_dense else f"{p.kind} {p.ranks}, error {p.error:.4f}" for p in plan.layers}
    for logger in trainer.loggers:
        logger.log_metrics(sizes, step=trainer.global_step)
        logger.log_hyperparams({"compress": {"budget": str(plan.budget), "method": plan.method, "layers": layers}})


def _first_batch_shape(trainer: Trainer) -> tuple[int, ...] | None:
    """Returns the shape of the first input of a training batch of one, None if it is no float tensor.

    The first item of the data set is collated by itself: no loader is iterated, no worker
    started and no generator moved.
    """
    source = getattr(trainer.fit_loop, "_data_source", None)
    if source is None or not source.is_defined():
        return None
    with isolate_rng():
        loader = source.dataloader()
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            return None
        if isinstance(loader.dataset, IterableDataset):
            return None
        batch = loader.collate_fn([loader.dataset[0]])
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim == 0:
        return None
    return tuple(first.shape)
