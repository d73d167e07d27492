"""Every error this library raises on purpose, as one tree.

LightningCompressError
├── ConfigurationError (also a ValueError)
│   ├── BudgetError
│   │   └── InfeasibleBudgetError
│   └── SelectionError
├── ModelError
│   ├── NothingToFactoriseError
│   ├── NonFiniteWeightError
│   ├── ExampleInputError
│   └── ForwardMismatchError
├── PlanError
│   ├── PlanFormatError
│   └── PlanMismatchError
├── TrainingError
│   ├── UnsupportedError (also a NotImplementedError)
│   ├── OrphanParameterError
│   ├── DivergedRanksError
│   ├── DistillationError
│   └── ResumeError
└── ResourceError
    ├── WorkersLostError
    ├── DataNotFoundError
    ├── WeightsError
    ├── OutputFolderError
    └── TargetError
"""


class LightningCompressError(Exception):
    """Root of the tree: catch this to catch everything the library raises on purpose."""


class CompressionWarning(UserWarning):
    """Something was left out or replaced by the next best; the message says what and why."""


class ConfigurationError(LightningCompressError, ValueError):
    """An argument or a configuration key has a wrong type, value or name."""


class BudgetError(ConfigurationError):
    """A budget is not a kept fraction in (0, 1], or budgets contradict each other."""


class InfeasibleBudgetError(BudgetError):
    """No plan meets the budget; the message states the smallest reachable one."""


class SelectionError(ConfigurationError):
    """An include, exclude or override pattern matches no layer, or leaves none."""


class ModelError(LightningCompressError):
    """The model itself cannot be worked on."""


class NothingToFactoriseError(ModelError):
    """The model holds no layer that can be factorised; the message lists the reasons."""


class NonFiniteWeightError(ModelError):
    """A parameter holds NaN or infinite values."""


class ExampleInputError(ModelError):
    """The example input is missing, of a wrong type, or the model fails on it."""


class ForwardMismatchError(ModelError):
    """With factorised layers the model's code runs another computation: the swap is undone; the message says where."""


class PlanError(LightningCompressError):
    """A plan cannot be read or applied."""


class PlanFormatError(PlanError):
    """A plan file is damaged, foreign, or written by a newer version."""


class PlanMismatchError(PlanError):
    """A plan names layers, shapes or ranks that the model does not have."""


class TrainingError(LightningCompressError):
    """Compression inside a Lightning fit cannot proceed."""


class UnsupportedError(TrainingError, NotImplementedError):
    """A feature or combination that this version refuses instead of doing it wrongly."""


class OrphanParameterError(TrainingError):
    """A factor would never be trained, or an optimizer holds a parameter the model lost."""


class DivergedRanksError(TrainingError):
    """The processes of a distributed fit hold different parameters or do different things."""


class DistillationError(TrainingError):
    """The distillation loss cannot be computed from what the training step did."""


class ResumeError(TrainingError):
    """A checkpoint does not fit the model, the callback or the optimizers."""


class ResourceError(LightningCompressError):
    """A file, a folder or a worker is missing, unreadable or unwritable."""


class WorkersLostError(ResourceError):
    """Worker after worker that a layer was sent to was lost."""


class DataNotFoundError(ResourceError):
    """A data set is in none of the places that were searched."""


class WeightsError(ResourceError):
    """A weights file is missing, unreadable, or does not fit the model."""


class OutputFolderError(ResourceError):
    """The output folder cannot be created or written."""


class TargetError(ResourceError):
    """The target cannot be measured on: it fails, returns no time, is too noisy, or its table lacks what is needed."""
