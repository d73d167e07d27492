"""The jobs of a multirun: each in a process of its own, recorded, and done once.

A job that fails or is killed ends alone, under every launcher: its folder says why, and its neighbours go on.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from lightning_compress.cli.config import settings_of
from lightning_compress.cli.engines import is_alone
from lightning_compress.cli.identity import key_of_job
from lightning_compress.cli.parts import find_own_modules
from lightning_compress.cli.records import FAILED, FINISHED, KILLED, RUNNING, JobRecord
from lightning_compress.cli.run_log import log, show
from lightning_compress.core.errors import LightningCompressError

EARLIER = ".earlier"
"""Folder of a sweep for finished jobs whose place another one took; they are found there by their keys."""

Work = Callable[[DictConfig, Path, bool], tuple[float, ...]]
"""Does a whole job of a configuration in a folder; whether its times are measured then. Returns what a sweeper gets."""


def run_job(cfg: DictConfig, work: Work) -> float | tuple[float, ...] | None:
    """Runs one job of a multirun.

    Args:
        cfg: Its configuration, as Hydra composed it; HydraConfig has the rest.
        work: What it does; a function of a module.

    Returns:
        What a sweeper gets: a number, or several; None if the job did not finish.
    """
    find_own_modules()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    name = f"job {folder.name}"
    overrides = tuple(str(override) for override in hydra_config.overrides.task)
    try:
        config = settings_of(cfg)
    except LightningCompressError as error:
        JobRecord(FAILED, "", overrides, reason=f"{type(error).__name__}: {error}").save(folder)
        return _result(folder, name)
    key = key_of_job(cfg, folder)
    sweep = Path(hydra_config.sweep.dir).resolve()
    with FileLock(folder / ".lock"):
        if _is_done(folder, key, sweep):
            show(f"[bold]{escape(name)}[/] was finished before")
        else:
            alone = is_alone(hydra_config)
            disturbed = not alone and config["compression"].get("target") is not None
            _start(cfg, folder, JobRecord(RUNNING, key, overrides, config, disturbed=disturbed), work, alone=alone)
    return _result(folder, name)


def _result(folder: Path, name: str) -> float | tuple[float, ...] | None:
    """Returns what a sweeper gets of a job that has ended; says why there is nothing."""
    record = JobRecord.load(folder)
    if record is None or record.status != FINISHED or record.values is None:
        status = record.status if record else "failed"
        show(f"[bold red]{escape(name)} {status}:[/] {escape(_reason(record))}", error=True)
        return None
    return record.values[0] if len(record.values) == 1 else record.values or None


def _reason(record: JobRecord | None) -> str:
    return (record.reason if record else None) or "it left no record"


def _start(cfg: DictConfig, folder: Path, record: JobRecord, work: Work, *, alone: bool) -> None:
    """Runs the job in a process of its own and records how it ended."""
    start = time.perf_counter()
    context = _context()
    record.save(folder)
    full = OmegaConf.to_container(HydraConfig.instance().cfg)  # plain, as classes of plugins cannot be pickled
    child = _Child(cfg, full, folder, record, work, alone)
    process = context.Process(target=child.do, name=f"job {folder.name}")
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join(5)
        raise
    seconds = time.perf_counter() - start
    found = JobRecord.load(folder) or record
    if found.status == RUNNING:
        found = replace(found, status=KILLED, reason=_how_it_ended(process.exitcode))
    replace(found, seconds=seconds, process=None).save(folder)


def _context() -> Any:
    """Returns how processes are made: as copies of one that has imported all there is and computes nothing itself.

    That is this process where it has no other threads, as one that holds a lock would leave it locked in the copy, and
    no GPU, whose driver a copy cannot use; else a server that imports everything once more.
    """
    import torch  # noqa: PLC0415

    if sys.platform == "linux" and threading.active_count() == 1 and not torch.cuda.device_count():
        return multiprocessing.get_context("fork")
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method("spawn", force=True)  # joblib's workers have one that is not known elsewhere
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_compress.cli.app"])
    return context


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}" + (", perhaps for lack of memory" if code == -9 else "")  # noqa: PLR2004
    return f"its process ended with status {code} before it was done"


@dataclass(frozen=True)
class _Child:
    """What the process of a job needs; `hydra` is Hydra's own part of the configuration, as plain values."""

    cfg: DictConfig
    hydra: Any
    folder: Path
    record: JobRecord
    work: Work
    alone: bool

    def do(self) -> None:
        """Does the job and records how it ended; runs in its own process."""
        _end_with_parent()
        self._be_as_in_hydra()
        folder, record = self.folder, replace(self.record, process=os.getpid())
        record.save(folder)
        try:
            values = self.work(self.cfg, folder, self.alone)
        except KeyboardInterrupt:
            os._exit(130)  # the process that waits for this one says so
        except LightningCompressError as error:
            log(f"{type(error).__name__}: {error}", error=True)
            replace(record, status=FAILED, reason=f"{type(error).__name__}: {error}").save(folder)
        except Exception as error:
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            logging.getLogger(__name__).exception("the job failed")
            text = " ".join(str(error).split())
            replace(record, status=FAILED, reason=f"{type(error).__name__}: {text} (see error.txt)").save(folder)
        else:
            replace(record, status=FINISHED, values=values).save(folder)

    def _be_as_in_hydra(self) -> None:
        schema = OmegaConf.structured(HydraConf, flags={"struct": False})  # plugins add keys of their own
        full = OmegaConf.create({"hydra": OmegaConf.merge(schema, self.hydra["hydra"])})
        _share_cores(full)
        setup_globals()
        find_own_modules()
        HydraConfig.instance().set_config(full)
        configure_log(full.hydra.job_logging, full.hydra.verbose)


def _end_with_parent() -> None:
    """Lets this process end when the one that waits for it is gone, so that a killed sweep leaves none behind."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _share_cores(full: DictConfig) -> None:
    """Takes as many threads as the launcher gives each job, where it says so."""
    import torch  # noqa: PLC0415

    threads = full.hydra.launcher.get("cpus_per_task") or os.environ.get("OMP_NUM_THREADS")
    if threads:
        torch.set_num_threads(int(threads))


def _is_done(folder: Path, key: str, sweep: Path) -> bool:
    """Returns whether a finished job of this key lies in the folder, bringing it there from another of the sweep."""
    record = JobRecord.load(folder)
    if record is not None and record.status == FINISHED:
        if record.key == key:
            return True
        _put_aside(folder, sweep / EARLIER / record.key)
    for other in (sweep / EARLIER / key, *sorted(sweep.glob("*"))):
        found = JobRecord.load(other) if other.resolve() != folder.resolve() else None
        if found is not None and (found.key, found.status) == (key, FINISHED):
            shutil.copytree(other, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".hydra", ".lock"))
            return True
    _clear(folder)
    return False


def _put_aside(folder: Path, place: Path) -> None:
    if not place.exists():
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns(".hydra", ".lock"))


def _clear(folder: Path) -> None:
    """Removes what a job that was not finished left, but what Hydra has just written."""
    for name in ("report.json", "report.md", "report.html", "plan.json", "plan.png", "error.txt", "job.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("compressed", "logs", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
