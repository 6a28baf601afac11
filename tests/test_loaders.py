"""Loaders as fastai makes them of folders, tables and texts, wherever one is taken."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image
from scoring import mean_of
from torch import nn

from fasterai.audit.batch_norms import bn_drift, recalibrate_bn
from fasterai.audit.classes import class_audit
from fasterai.audit.sensitivity import sensitivity
from fasterai.distill.callback import DistillCallback
from fasterai.prune.pruner import Pruner
from fasterai.prune.search import particle_search
from fasterai.report.sweep import sweep
from fasterai.score.criteria import apoz, taylor, taylor_maps
from fasterai.score.oracle import oracle
from fasterai.score.report import criteria_report
from fasterai.score.score import score
from fasterai.sparse.callback import SparsifyCallback


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for i in range(8):
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def from_folder(photos):
    return ImageDataLoaders.from_folder(
        photos, valid_pct=0.5, seed=0, item_tfms=Resize(10), bs=4, num_workers=0
    )


def from_block(photos):
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=RandomSplitter(0.5, seed=0),
        item_tfms=Resize(10),
    )
    return block.dataloaders(photos, bs=4, num_workers=0)


@pytest.mark.parametrize("make", [from_folder, from_block])
def test_images(make, photos):
    dls = make(photos)
    learn = Learner(dls, small(), nn.CrossEntropyLoss(), metrics=accuracy)
    model, loss = learn.model, learn.loss_func
    plain = [tuple(t.as_subclass(torch.Tensor).cpu() for t in batch) for batch in dls.valid]
    first, second = (score(model, x, apoz, progress=False) for x in (dls.valid, plain))
    weight = model[0].weight
    assert torch.equal(first(weight, "0.weight"), second(weight, "0.weight"))
    for dl in (dls.train, dls.valid):
        score(model, dl, [taylor, taylor_maps], loss_func=loss, progress=False)
        recalibrate_bn(model, dl)
        bn_drift(model, dl)
    assert class_audit(model, model, dls.valid, progress=False).table["class"].tolist() == [
        "cat",
        "dog",
    ]
    assert sensitivity(learn, progress=False).metric == "accuracy"
    found = oracle(model, dls.valid, loss_func=loss, progress=False)
    assert len(found.table()) == 10 and found.loss == pytest.approx(mean_of(model, plain, loss))
    criteria_report(model, dls.valid, [apoz], loss_func=loss, progress=False)
    pruner = Pruner(model, dls.one_batch()[0])
    few = {"particles": 2, "rounds": 1, "progress": False}
    particle_search(pruner, dls.valid, 0.5, loss_func=loss, **few)
    assert len(sweep(learn, [0.5], 1, progress=False).table) == 2


def test_an_empty_loader():
    """fastai looks at its first item to tell inputs from targets."""
    items = [(torch.randn(3, 10, 10), 0)] * 4
    empty, model = DataLoaders.from_dsets(items, [], bs=4, device="cpu").valid, small()
    for call in (
        lambda: score(model, empty, apoz, progress=False),
        lambda: class_audit(model, model, empty, progress=False),
        lambda: bn_drift(model, empty),
        lambda: oracle(model, empty, loss_func=nn.CrossEntropyLoss(), progress=False),
    ):
        with pytest.raises(ValueError, match="the loader gave no batch"):
            call()


def test_several_loaders_are_not_one(photos):
    with pytest.raises(TypeError, match=r"pass dls.train or dls.valid, not both"):
        score(small(), from_folder(photos), apoz)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_tables():
    """Class numbers come in a column."""
    rows = np.random.default_rng(0)
    table = pd.DataFrame({"a": rows.integers(0, 3, 64), "x": rows.normal(size=64)})
    table["y"] = table["x"] > 0
    dls = TabularDataLoaders.from_df(
        table, procs=[Categorify, Normalize], cat_names=["a"], cont_names=["x"], y_names="y",
        y_block=CategoryBlock(), valid_idx=list(range(32)), bs=8,
    )  # fmt: skip
    learn = tabular_learner(dls, layers=[8, 6], metrics=accuracy)
    assert dls.valid.one_batch()[-1].shape[1:] == (1,)
    found = sensitivity(learn, progress=False)
    assert found.metric == "accuracy"
    with learn.no_bar(), learn.no_logging():
        assert found.dense == pytest.approx(learn.validate()[1])
    audit = class_audit(learn, learn.model, progress=False)
    share = np.average(audit.table["before"], weights=audit.table["size"])
    assert share == pytest.approx(found.dense)
    score(learn.model, dls.train, taylor, loss_func=learn.loss_func, progress=False)
    assert bn_drift(learn.model, dls.valid)["shift"].min() > 0.01
    recalibrate_bn(learn.model, dls.valid)
    drift = bn_drift(learn.model, dls.valid)
    assert drift["shift"].max() < 1e-5 and drift["spread"].max() < 1 + 1e-5


def test_whole_numbers_to_come_near_to():
    """In a column they are classes only where the network gives a score for each."""
    batches = [(torch.randn(8, 3), torch.randint(0, 5, (8, 1)))]
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1))

    def loss(out, y):
        return (out - y).square().mean()

    found = sensitivity(model, batches, loss_func=loss, progress=False)
    assert found.metric == "loss"
    with torch.no_grad():
        assert found.dense == pytest.approx(float(loss(model(batches[0][0]), batches[0][1])))


def texts():
    """A text classifier whose layers keep what they computed, and which gives a tuple."""
    config = {**awd_lstm_clas_config, "emb_sz": 6, "n_hid": 8, "n_layers": 2}
    torch.manual_seed(0)
    model = get_text_classifier(AWD_LSTM, 20, 2, config=config)
    items = [(torch.randint(1, 20, (9,)), i % 2) for i in range(16)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu")
    return Learner(
        dls, model, nn.CrossEntropyLoss(), metrics=accuracy, cbs=[ModelResetter(), RNNCallback()]
    )


def test_models_that_keep_what_they_computed_are_copied():
    learn = texts()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        learn.fit(1, cbs=DistillCallback())
    assert len(sweep(learn, [0.5], 1, progress=False).table) == 2


def test_recurrent_layers_are_sparsified_while_they_train():
    learn = texts()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=SparsifyCallback(0.5))
    parameters = dict(learn.model.named_parameters())
    weights = {k: p for k, p in parameters.items() if "weight_ih" in k or "weight_hh" in k}
    assert len(weights) == 4
    for name, p in weights.items():
        assert int((p == 0).sum()) == p.numel() // 2, name


def test_a_loss_that_cannot_take_a_tuple():
    learn = texts()
    call = {"loss_func": learn.loss_func, "progress": False}
    for go in (
        lambda: score(learn.model, learn.dls.train, taylor, **call),
        lambda: oracle(learn.model, learn.dls.valid, **call),
        lambda: sensitivity(learn, metric="loss", progress=False),
    ):
        with pytest.raises(ValueError, match=r"gives a tuple.*lambda out, y: loss\(out\[0\], y\)"):
            go()

    def first(out, y):
        return learn.loss_func(out[0], y)

    score(learn.model, learn.dls.train, taylor, loss_func=first, progress=False)


class ByKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x, mask=None):
        return self.b(self.a(x * mask[:, None]).relu())


def test_inputs_by_keywords_and_a_target():
    x, mask, y = torch.randn(6, 8), torch.rand(6), torch.arange(6) % 3
    model, call = ByKeywords(), {"loss_func": nn.CrossEntropyLoss(), "progress": False}
    named = [({"mask": mask, "x": x}, y)]
    kept = [
        Pruner(model, (x, mask)).plan_for(0.5, criteria=score(model, dl, taylor, **call)).kept
        for dl in (named, [(x, mask, y)])
    ]
    assert kept[0] == kept[1] and kept[0]
    assert sensitivity(model, named, progress=False).metric == "accuracy"
