"""Runs the jobs of a multirun as Ray tasks.

hydra-ray-launcher does the same, but pins cloudpickle 2.2.1, with which newer versions of joblib cannot be installed,
and needs the clients of AWS; this one needs Ray alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


class RayLauncher(Launcher):
    """Launches each job as a Ray task; one whose worker dies returns nothing, and the others go on.

    Args:
        num_cpus: Cores of each job.
        num_gpus: GPUs of each job; may be a fraction.
        init: Arguments of `ray.init`, where no Ray runs yet.
    """

    def __init__(self, num_cpus: float = 1, num_gpus: float = 0, init: Mapping[str, Any] | None = None) -> None:
        self.num_cpus, self.num_gpus = num_cpus, num_gpus
        self.init: dict[str, Any] = {str(key): value for key, value in _plain(init).items()}
        self.job: tuple[HydraContext, DictConfig, TaskFunction] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Takes what each job needs."""
        self.job = (hydra_context, config, task_function)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs and returns what they returned, in their order."""
        import ray  # noqa: PLC0415, an extra

        assert self.job is not None
        setup_globals()
        config = self.job[1]
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        Path(str(config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        own = not ray.is_initialized()
        if own:
            ray.init(**{"include_dashboard": False, "log_to_driver": True, **self.init})
        try:
            task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0)(_execute)
            state, shared = Singleton.get_state(), ray.put(self.job)
            log.info("Ray is launching %d jobs", len(job_overrides))
            waiting = []
            for number, overrides in enumerate(job_overrides, initial_job_idx):
                log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
                waiting.append(task.remote(number, list(overrides), shared, state))
            return [_result(reference) for reference in waiting]
        finally:
            if own:
                ray.shutdown()


def _plain(node: Any) -> dict[Any, Any]:
    return dict(cast(Any, OmegaConf.to_container(node))) if OmegaConf.is_config(node) else dict(node or {})


def _result(reference: Any) -> JobReturn:
    import ray  # noqa: PLC0415

    try:
        found: JobReturn = ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        log.error("a worker died: %s", error)
        found = JobReturn(status=JobStatus.COMPLETED)
        found.return_value = None
    return found


def _execute(
    number: int, overrides: list[str], job: tuple[HydraContext, DictConfig, TaskFunction], state: dict[Any, Any]
) -> JobReturn:
    """Runs one job in a worker."""
    context, config, task_function = job
    setup_globals()
    Singleton.set_state(state)
    sweep_config = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(sweep_config):
        sweep_config.hydra.job.id = f"{sweep_config.hydra.job.name}_{number}"
        sweep_config.hydra.job.num = number
    return run_job(
        hydra_context=context,
        config=sweep_config,
        task_function=task_function,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
