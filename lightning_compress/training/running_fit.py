"""A running fit as the compression sees it: its optimizers, its example input, where it shows and logs what is done."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelSummary
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.optim import Optimizer

from lightning_compress.analysis.trace import ExampleInput, is_shape, trace
from lightning_compress.compress import Compression
from lightning_compress.core.errors import CompressionWarning, ExampleInputError
from lightning_compress.core.progress import Progress, bar
from lightning_compress.training.averages import require_no_averages, restart_averages
from lightning_compress.training.compat import callbacks_of, rename_groups, training_data
from lightning_compress.training.distributed import rewrap, shared_compression
from lightning_compress.training.finetuning import thaw_
from lightning_compress.training.first_batch import guesses, shapes_of_first_batch


class RunningFit:
    """The trainer and the module of a fit, and all that is asked of the trainer while the module is compressed.

    Args:
        trainer: Of a supported strategy, see `require_supported`; its optimizers are set up.
        module: What it trains.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self.module = module
        self._guessed: tuple[ExampleInput | None, list[str]] | None = None

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those of the trainer."""
        return self._trainer.optimizers

    @property
    def epoch(self) -> int:
        """Index of the epoch that runs or is about to begin."""
        return self._trainer.current_epoch

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self._trainer.global_step

    @property
    def unfreezes(self) -> bool:
        """Whether a callback will let frozen parameters be trained."""
        return any(isinstance(callback, BaseFinetuning) for callback in callbacks_of(self._trainer))

    @property
    def epochs_left(self) -> float:
        """Epochs until the limits of the trainer, infinite without any."""
        epochs, steps = self._trainer.max_epochs, self._trainer.max_steps
        by_epochs = epochs - self.epoch if epochs is not None and epochs >= 0 else math.inf
        return min(by_epochs, (steps - self.step) / self.steps_per_epoch if steps >= 0 else math.inf)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in an epoch at most, infinite if unknown: the module may take them itself."""
        batches = self._trainer.num_training_batches
        if not self.module.automatic_optimization or math.isinf(batches):
            return math.inf
        return max(1, math.ceil(batches / self._trainer.accumulate_grad_batches))

    @property
    def validated(self) -> bool:
        """Whether an epoch that ends now is one with a validation."""
        return (self.epoch + 1) % (self._trainer.check_val_every_n_epoch or 1) == 0

    def metrics(self) -> dict[str, float]:
        """Returns what was logged in an epoch, as the first rank sees it: all go on together."""
        seen = {name: float(value) for name, value in self._trainer.callback_metrics.items()}
        return self._trainer.strategy.broadcast(seen)

    def warn(self, message: str) -> None:
        """Warns once for all ranks, unless the fit is but a trial run."""
        if not cast(Any, self._trainer).fast_dev_run:
            rank_zero_warn(message, category=CompressionWarning, stacklevel=8)

    def compress(self, function: Callable[[Progress], Compression]) -> Compression:
        """Runs a compression of the module that shows its progress, on all ranks with the same result.

        Raises:
            Exception: As `shared_compression`.
        """
        with self._progress() as progress:
            return shared_compression(self._trainer.strategy, self.module, lambda: function(progress))

    def require_no_averages(self) -> None:
        """Refuses to change the structure beside an average that could not follow.

        Raises:
            UnsupportedError: If a callback keeps one.
        """
        require_no_averages(self._trainer, self.module)

    def restore_finetuning(self, frozen: Collection[str] | None) -> None:
        """Lets finetuning callbacks put back the groups they had added, and thaws what they had thawed.

        They do the former in their own `on_fit_start`, which may come later, and the latter never: in the epoch that it
        was due in alone.

        Args:
            frozen: The parameters that were not trained when the checkpoint was saved; None if unknown.
        """
        for callback in callbacks_of(self._trainer):
            if isinstance(callback, BaseFinetuning):
                BaseFinetuning.on_fit_start(callback, self._trainer, self.module)
        if frozen is not None and self.unfreezes and thaw_(self.module, frozen):
            rewrap(self._trainer.strategy, self.module)

    def exchanged(self) -> None:
        """Lets finetuning callbacks note the names of the parameters that are in the groups now."""
        for callback in callbacks_of(self._trainer):
            if isinstance(callback, BaseFinetuning):
                rename_groups(callback, self.module, self.optimizers)

    def structure_changed(self) -> None:
        """Lets everything follow that was made for the layers before: DDP's wrapper, averaged copies."""
        rewrap(self._trainer.strategy, self.module)
        restart_averages(self._trainer, self.module)

    def example_input(self, given: ExampleInput | None, *, needed: bool) -> ExampleInput | None:
        """Returns an example input: the given one, the module's own, or one of the shapes of a training batch.

        Args:
            given: A tensor, arguments, or a shape; None to look for one.
            needed: Whether the compression cannot do without.

        Raises:
            ExampleInputError: If it cannot, and there is none, with the reason for each guess.
        """
        example = given if given is not None else self.module.example_input_array
        if example is not None:
            return self._converted(example)
        if self._guessed is None:
            with isolate_rng():
                self._guessed = self._guess()
        example, reasons = self._guessed
        if example is None:
            msg = (
                f"no example input could be made of the training data: {'; '.join(reasons)}. Set "
                "self.example_input_array in the module's __init__, or pass Compress(example_input=…), a shape such as "
                "(1, 3, 224, 224) or the arguments of forward."
            )
            if needed:
                raise ExampleInputError(msg)
            rank_zero_info(f"Compress: {msg}")
        return example

    def _guess(self) -> tuple[ExampleInput | None, list[str]]:
        """Returns an example input that the module takes, of a training batch's shapes, and why others were not."""
        reasons: list[str] = []
        try:
            batch = shapes_of_first_batch(training_data(self._trainer))
        except ExampleInputError as error:
            return None, [str(error)]
        for what, guess in guesses(batch, self.module.forward):
            example = self._converted(guess)
            try:
                trace(self.module, example)
            except ExampleInputError as error:
                reasons.append(f"with {what}, {error}".rstrip("."))
                continue
            rank_zero_info(f"Compress: example input from the training data, {what} (shapes alone).")
            return example, reasons
        return None, reasons or ["a batch is neither a tensor nor a tuple or dict of tensors"]

    def _converted(self, example: ExampleInput) -> ExampleInput:
        """Returns an example input in the precision of the trainer."""
        return cast(
            ExampleInput, example if is_shape(example) else self._trainer.precision_plugin.convert_input(example)
        )

    def log(self, values: Mapping[str, float]) -> None:
        """Sends numbers to the loggers."""
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(values), step=self.step)

    def log_plan(self, done: Compression, number: int) -> None:
        """Sends sizes and plan to the loggers and a summary to the console.

        Args:
            done: What was done to the module.
            number: That of the round, from 1.
        """
        plan = done.plan
        dense = len(plan.layers) - len(plan.factorised)
        rank_zero_info(
            f"Compress: {plan.summary()}\n{len(plan.factorised)} layers factorised, {dense} left dense; "
            "print(callback.plan) lists them with the reasons."
        )
        layers = {p.name: p.kind if p.is_dense else f"{p.kind} {p.ranks}, error {p.error:.4f}" for p in plan.layers}
        settings = {"compress": {"budget": str(plan.budget), "method": plan.method, "layers": layers}}
        sizes = _numbers_of(done, number)
        for logger in self._trainer.loggers:
            logger.log_metrics(sizes, step=self.step)
            logger.log_hyperparams(settings)

    def summarise_again(self, owner: Callback) -> None:
        """Lets model summaries that came before the compression, and printed the dense module, print what is there now.

        Args:
            owner: The callback that compresses; summaries behind it come after the swap anyway.
        """
        callbacks = callbacks_of(self._trainer)
        before = [c for c in callbacks[: callbacks.index(owner)] if isinstance(c, ModelSummary)]
        if before:
            rank_zero_info("Compress: the model summary above is that of the dense module, this one of the compressed:")
        for summary in before:
            summary.on_fit_start(self._trainer, self.module)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress]:
        """Shows one bar while the search runs, if the trainer shows bars at all."""
        own = self._trainer.progress_bar_callback
        enabled = own is not None and getattr(own, "is_enabled", True)
        with bar(shown_at_all=enabled and self._trainer.is_global_zero) as progress:
            yield progress


def _numbers_of(done: Compression, number: int) -> dict[str, float]:
    """Returns what the loggers get to know of a compression."""
    plan = done.plan
    numbers = {
        f"compress/{resource}{suffix}": float(value)
        for suffix, values in (("", vars(plan.compressed)), ("_dense", vars(plan.dense)), ("_kept", plan.kept))
        for resource, value in values.items()
        if value is not None
    }
    numbers["compress/round"] = float(number)
    if done.healing is not None:
        numbers["compress/distance_before_healing"] = done.healing.before
        numbers["compress/distance_after_healing"] = done.healing.after
    numbers |= {f"compress/seconds/{part}": seconds for part, seconds in done.seconds.items()}
    for name, value in (("search_seconds", plan.seconds), ("optimality_gap", plan.optimality_gap)):
        if value is not None:
            numbers[f"compress/{name}"] = value
    return numbers
