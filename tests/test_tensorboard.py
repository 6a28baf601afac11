"""What TensorBoard gets to see, through fastai's own callback and any other with a writer."""

import pytest
from fastai.callback.core import Callback
from learners import learner

from fasterai.prune.callback import PruneCallback
from fasterai.sparse.callback import SparsifyCallback


class Writer:
    def __init__(self):
        self.seen = {}

    def add_scalar(self, name, value, step):
        self.seen.setdefault(name, []).append((step, value))


class Writing(Callback):
    def __init__(self):
        self.writer = Writer()


class Widths(Callback):
    order = 90

    def __init__(self):
        self.seen = []

    def after_epoch(self):
        self.seen.append(self.learn.model.c1.out_channels)


def test_widths_and_sparsities_by_layer():
    learn, log, widths = learner(), Writing(), Widths()
    learn.fit(3, cbs=[PruneCallback(0.5), log, widths])
    names = {"stem", "c1", "c2", "c3", "head"}
    assert set(log.writer.seen) == {f"width/{name}" for name in names}
    assert log.writer.seen["width/c1"] == list(zip([8, 16, 24], widths.seen, strict=True))
    assert widths.seen[-1] == 8 and widths.seen[0] > 8

    learn, log = learner(), Writing()
    learn.fit(2, cbs=[SparsifyCallback(0.5, "filter"), log])
    assert set(log.writer.seen) == {f"sparsity/{name}" for name in names - {"head"}}
    for name in names - {"head"}:
        weight = learn.model.get_submodule(name).weight
        step, share = log.writer.seen[f"sparsity/{name}"][-1]
        assert step == 16 and share == (weight == 0).float().mean().item() == 0.5


def test_a_callback_that_does_not_run_gets_nothing():
    learn, log = learner(), Writing()
    log.run = False
    learn.fit(1, cbs=[PruneCallback(0.5), log])
    assert not log.writer.seen


@pytest.mark.parametrize("kind", [SparsifyCallback, PruneCallback])
@pytest.mark.filterwarnings("ignore")
def test_fastais_own_callback(kind, tmp_path):
    pytest.importorskip("tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn, cb = learner(), kind(0.5)
    board = TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)
    learn.fit(2, cbs=[cb, board])
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert set(cb.columns) | {"valid_loss", "accuracy"} <= tags
    assert [e.value for e in events.Scalars("sparsity")][-1] == pytest.approx(cb.reached())
    kind_of = "width/c1" if kind is PruneCallback else "sparsity/c1"
    last = events.Scalars(kind_of)[-1]
    expected = learn.model.c1.out_channels
    if kind is SparsifyCallback:
        expected = (learn.model.c1.weight == 0).float().mean().item()
    assert last.step == 16 and last.value == expected
    assert len(events.Scalars(kind_of)) == 2
