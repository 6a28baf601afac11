"""Files, folds and exports of the networks that people use, each in a process of its own."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CHECKS = ["files", "sparse", "folded", "program", "onnx"]


@pytest.fixture
def round_trips(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("round_trips")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", CHECKS)
def test_a_network_with_shuffled_channels(check, round_trips):
    assert getattr(round_trips, check)("torchvision", "shufflenet_v2_x0_5")["ok"]


# What cannot be done, and why.
KNOWN = {
    ("fastai", "awd_lstm"): {"program", "onnx"},  # its hidden state is a list that it replaces
    ("fastai", "awd_lstm_classifier"): {"program", "onnx"},  # the batch that goes on is counted
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["fastai", "torchvision", "timm", "transformers"])
def test_every_network(library, round_trips, tmp_path):
    pytest.importorskip(library)
    names = round_trips.zoo.names(library)
    found = round_trips.coverage.trips(library, names, CHECKS, tmp_path / "lines")
    assert found
    failed = [f for f in found if not f["ok"]]
    assert not [f for f in failed if f["check"] not in KNOWN.get((library, f["network"]), ())]
