"""Checkpoints of compressed modules loaded without a trainer."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from packaging.version import Version
from torch import nn

from lightning_compress import CompressedCheckpointMixin, apply_plan_, load_compressed_checkpoint
from lightning_compress.core.errors import WeightsError
from lightning_compress.layers.factorised import HINT
from lightning_compress.surgery.save import load_weights_
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


# --- what a class says that does not know ----------------------------------------------------------------------

HELP = (
    r"Unexpected key\(s\) in state_dict: \"[\w.]+lightning_compress: this is a compressed Sized, .*"
    r"load_compressed_checkpoint\(Sized, path\) or with CompressedCheckpointMixin as the first base of Sized "
    r"\(and weights_only=False where"
)


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@pytest.mark.parametrize("weights_only", [False, True])
def test_plain_class_says_how_to_load_a_compressed_checkpoint(compressed, weights_only):
    task, path = compressed(Sized, weights_only=weights_only)
    with pytest.raises(RuntimeError, match=HELP) as raised:
        Sized.load_from_checkpoint(path)
    assert "net.fc1.reduce.weight" in str(raised.value)
    with pytest.warns(UserWarning, match=r"not in the model state dict but in the checkpoint: .*load_compressed_check"):
        Sized.load_from_checkpoint(path, strict=False)
    assert not any(HINT in name for name in task.state_dict())


def test_plain_class_in_a_trainer_without_the_callback_says_so_too(make_trainer, loader, compressed):
    _, path = compressed(Sized)
    with pytest.raises(RuntimeError, match=HELP):
        make_trainer().test(Sized(24), loader, ckpt_path=path)


class Attentive(TinyTask):
    """Its only factorised layers are projections of an attention layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.net.fc1, self.net.fc2 = nn.Identity(), nn.Linear(16, 4)
        self.net.point = nn.Identity()

    def forward(self, x):
        tokens = self.net.conv2(self.net.conv1(x)).flatten(2).transpose(1, 2)
        return self.net.fc2(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(dim=1))


def test_hint_beside_unfused_layers(make_trainer, loader, tmp_path):
    task, path = Attentive(), tmp_path / "attention.ckpt"
    trainer = make_trainer(compress(0.8, include="attention.*"))
    trainer.fit(task, loader)
    assert all("attention" in name for name in factorised(task))
    trainer.save_checkpoint(path)
    require_same_state(load_compressed_checkpoint(Attentive, path), task)
    fresh = Attentive()
    make_trainer(compress(0.8)).test(fresh, loader, ckpt_path=path, verbose=False)
    require_same_state(fresh, task)
    with pytest.raises(RuntimeError, match=r"load_compressed_checkpoint\(Attentive, path\)"):
        Attentive.load_from_checkpoint(path)


def test_weights_of_a_checkpoint_load_by_hand_into_a_compressed_module(compressed):
    task, path = compressed(Sized)
    state = torch.load(path, weights_only=True)["state_dict"]
    assert HINT in next(iter(state))
    for names in (state, {name.removeprefix("net."): value for name, value in state.items()}):
        whole = Sized(24)
        apply_plan_(whole, task.trainer.callbacks[0].plan)
        before = list(names)
        (whole if names is state else whole.net).load_state_dict(names)
        require_same_state(whole, task)
        assert list(names) == before
    whole = Sized(24)
    apply_plan_(whole, task.trainer.callbacks[0].plan)
    load_weights_(whole, path)
    require_same_state(whole, task)


class Renaming(Sized):
    """Looks at every weight when it loads a checkpoint."""

    def on_load_checkpoint(self, checkpoint) -> None:
        self.seen = list(checkpoint["state_dict"])


def test_own_hooks_see_weights_alone(make_trainer, loader, compressed):
    task, path = compressed(Renaming)
    fresh = Renaming(24)
    make_trainer(compress()).test(fresh, loader, ckpt_path=path, verbose=False)
    assert fresh.seen == load_compressed_checkpoint(Renaming, path).seen == list(task.state_dict())


class Setting:
    """A hyper-parameter that is no primitive."""


class WithObject(TinyTask):
    def __init__(self, setting=None) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.skipif(Version(L.__version__) < Version("2.6"), reason="Lightning unpickles anything")
def test_checkpoint_of_other_objects_names_weights_only(make_trainer, loader, tmp_path):
    task, path = WithObject(Setting()), tmp_path / "object.ckpt"
    trainer = make_trainer(compress())
    trainer.fit(task, loader)
    trainer.save_checkpoint(path)
    with pytest.raises(
        WeightsError, match=r"object\.ckpt' with weights_only=True: .*who wrote it, pass weights_only=False"
    ):
        load_compressed_checkpoint(WithObject, path)
    require_same_state(load_compressed_checkpoint(WithObject, path, weights_only=False), task)
