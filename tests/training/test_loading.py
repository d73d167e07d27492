"""Checkpoints of compressed modules loaded without a trainer."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_compress import CompressedCheckpointMixin, load_compressed_checkpoint
from tests.support.compressing import compress
from tests.support.fitting import QUIET, factorised, require_same_state
from tests.support.nets import TinyTask
from tests.support.resuming import dense_checkpoint

pytestmark = QUIET


class Sized(TinyTask):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net.fc1, self.net.fc2 = nn.Linear(16, width), nn.Linear(width, 4)


class Mixed(CompressedCheckpointMixin, Sized):
    pass


@pytest.fixture
def compressed(make_trainer, loader, tmp_path):
    def make(cls, *, weights_only=False):
        task = cls(24)
        trainer = make_trainer(compress())
        trainer.fit(task, loader)
        trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=weights_only)
        return task, tmp_path / "small.ckpt"

    return make


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_loads_by_the_mixin_and_by_the_helper(make_trainer, loader, tmp_path, compressed, weights_only):
    task, path = compressed(Mixed, weights_only=weights_only)
    for loaded in (Mixed.load_from_checkpoint(path), load_compressed_checkpoint(Mixed, path)):
        require_same_state(loaded, task)
        assert type(loaded) is Mixed
    plain, path = compressed(Sized, weights_only=weights_only)
    loaded = load_compressed_checkpoint(Sized, path, map_location="cpu")
    assert type(loaded) is Sized
    assert loaded.hparams.width == 24
    require_same_state(loaded, plain)


def test_loaded_modules_keep_their_plan_in_later_checkpoints(make_trainer, loader, tmp_path, compressed):
    _, path = compressed(Mixed)
    for number, loaded in enumerate((Mixed.load_from_checkpoint(path), load_compressed_checkpoint(Sized, path))):
        trainer = make_trainer()
        trainer.fit(loaded, loader)
        later = tmp_path / f"later{number}.ckpt"
        trainer.save_checkpoint(later)
        require_same_state(load_compressed_checkpoint(Sized, later), loaded)
        trainer.test(loaded, loader, ckpt_path=later, verbose=False)


def test_mixin_and_callback_go_together(make_trainer, loader, tmp_path, compressed):
    task, path = compressed(Mixed)
    fresh = Mixed(24)
    make_trainer(compress(), max_epochs=2).fit(fresh, loader, ckpt_path=path)
    make_trainer().test(Mixed(24), loader, ckpt_path=path, verbose=False)
    assert factorised(fresh) == factorised(task)


def test_dense_checkpoints_load_as_before(make_trainer, loader, tmp_path):
    task = Sized(24)
    path = dense_checkpoint(make_trainer, loader, tmp_path, task)
    for loaded in (Mixed.load_from_checkpoint(path), load_compressed_checkpoint(Sized, path)):
        require_same_state(loaded, task)


def test_plain_class_says_which_factors_it_does_not_know(compressed):
    _, path = compressed(Sized)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*net\.fc1\.reduce\.weight"):
        Sized.load_from_checkpoint(path)
