"""Weights of a run that a training starts from: taken once, after a checkpoint is restored."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from flowkit.blockwise import BlockwiseMLP
from flowkit.modules import (
    AveragedWeights,
    BlockwiseFlowMatching,
    ConditionalFlowMatching,
    MeanFlowMatching,
    Straightening,
)
from flowkit.nn import MLP

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning",
    "ignore:.*does not have many workers.*:UserWarning",
    "ignore:.*no `val_dataloader`.*:UserWarning",
    "ignore:.*in eval mode at the start.*:UserWarning",
    "ignore:every stack must get gradients.*:UserWarning",
)
PAIRS = {"x0": torch.zeros(4, 2), "x1": torch.ones(4, 2), "taught_by": "a run"}
STUDENTS = {
    "straightening": lambda start=None: Straightening(MLP((2,), width=8), start),
    "mean_flow": lambda start=None: MeanFlowMatching(MLP((2,), width=8, num_times=2), start=start),
    "blockwise": lambda start=None: BlockwiseFlowMatching(
        BlockwiseMLP((2,), edges=2, width=8), start=start
    ),
}


def fit(module, folder, batch=PAIRS, steps=1, checkpoint=None):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[AveragedWeights()],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = DataLoader([batch], batch_size=None)  # a step is an epoch
    trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=checkpoint and True)
    return trainer


@pytest.mark.parametrize("name", STUDENTS)
def test_a_resumed_training_needs_its_start_no_more(name, tmp_path):
    with pytest.raises(FileNotFoundError):
        fit(STUDENTS[name](tmp_path / "gone"), tmp_path)
    file = tmp_path / "one.ckpt"
    fit(STUDENTS[name](), tmp_path).save_checkpoint(file)
    fit(whole := STUDENTS[name](), tmp_path, steps=3, checkpoint=file)
    fit(resumed := STUDENTS[name](tmp_path / "gone"), tmp_path, steps=3, checkpoint=file)
    for key, value in whole.state_dict().items():
        assert resumed.state_dict()[key].equal(value)


def test_only_a_trainer_has_the_teacher_of_a_loaded_student_loaded(tmp_path, monkeypatch):
    teacher, taken = ConditionalFlowMatching(MLP((2,), width=8)), []
    teacher.sample_shape = (2,)
    monkeypatch.setattr(
        "flowkit.modules.straightening.load_run", lambda place: taken.append(place) or teacher
    )
    batch, file = {"x1": torch.ones(4, 2)}, tmp_path / "one.ckpt"
    fit(STUDENTS["straightening"]("hub:a/b"), tmp_path, batch).save_checkpoint(file)
    assert taken == ["hub:a/b"]
    student = STUDENTS["straightening"]("hub:a/c")
    student.on_load_checkpoint(torch.load(file, weights_only=True))
    with pytest.raises(RuntimeError, match="batch must hold x0 where there is no teacher, got"):
        student.loss(batch)
    assert student.loss(PAIRS)["loss"] > 0
    assert taken == ["hub:a/b"]
    fit(student, tmp_path, batch, steps=2, checkpoint=file)
    assert taken == ["hub:a/b", "hub:a/c"]
