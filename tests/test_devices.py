"""The whole way on every device there is: zero, train, remove, compare, train on."""

import copy

import pytest
import torch
from networks import ALL, DEVICES, apart, images, loss_of, make

from fasterai.deploy.files import load_pruned, save_pruned
from fasterai.measure.profile import compare
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context", ["local", "global"])
@pytest.mark.parametrize("kind", ALL)
def test_the_whole_way(kind, context, device):
    model, x = make(kind).to(device).train(), images(4).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sparsifier = Sparsifier(model, "filter", context, example_inputs=x)
    for share in (0.25, 0.5):
        sparsifier.sparsify_model(share)
        loss_of(model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.apply()
    zeros = sum(int(g.zeroed().sum()) * g.width for g in sparsifier._groups)
    sparse = copy.deepcopy(model.eval())
    pruner = Pruner(model, x)
    pruner.prune_model()
    assert pruner.plan.removed == zeros > 0 and len(pruner.kept()) == 0
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert apart(sparse(x), model(x)) < 1e-5
    assert all(p.device.type == device for p in model.parameters())
    table = compare({"sparse": sparse, "pruned": model}, x, seconds=0.02)
    assert table["macs"].iloc[1] < table["macs"].iloc[0]
    loss_of(model.train()(x)).backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ALL)
def test_plans_and_files_go_from_device_to_device(kind, device, tmp_path):
    model, x = make(kind).to(device), images(4)
    copies = {d: copy.deepcopy(model).to(d) for d in DEVICES}
    Sparsifier(model, "filter", example_inputs=x.to(device)).sparsify_model(0.5)
    for other in copies.values():
        other.load_state_dict(model.state_dict())
    pruner = Pruner(model, x.to(device))
    pruner.prune_model()
    save_pruned(model, tmp_path / "a", pruner.whole_plan)
    for where, other in copies.items():
        pruner.plan.apply(other)
        loaded = load_pruned(make(kind, seed=1).to(where), tmp_path / "a")
        for p, q, r in zip(*(m.parameters() for m in (model, other, loaded)), strict=True):
            assert q.device.type == r.device.type == where
            assert torch.equal(p.cpu(), q.cpu()) and torch.equal(p.cpu(), r.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_a_sparsifier_follows_its_model(device):
    model = make(ALL[0])
    sparsifier = Sparsifier(model, example_inputs=images())
    sparsifier.sparsify_model(0.5)
    model.to(device)
    with torch.no_grad():
        model.a.weight.fill_(1.0)
    sparsifier.apply()
    assert int((model.a.weight == 0).sum()) == model.a.weight.numel() // 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("context", ["local", "global"])
def test_weights_come_back_in_a_model_that_moved(context, device):
    model = make(ALL[0])
    sparsifier = Sparsifier(model, context=context, example_inputs=images(), regrow=True)
    sparsifier.sparsify_model(0.3)
    model.to(device)
    sparsifier.sparsify_model(0.6)
    sparsifier.regrow_model(0.3)
    covered = sum(m.numel() for m in sparsifier.masks.values())
    assert abs(sparsifier.reached() - 0.3) * covered <= len(sparsifier.masks)
    sparsifier.regrow_model(0.0)
    assert all(bool(m.all()) for m in sparsifier.masks.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("granularity", ["2:4", "o/3 i/2", "row"])
def test_granularities_choose_the_same_on_every_device(granularity, device):
    masks = []
    for where in ("cpu", device):
        sparsifier = Sparsifier(make(ALL[0]).to(where), granularity, layers=["a", "b", "fc1"])
        sparsifier.sparsify_model(0.3)
        masks.append({k: m.cpu() for k, m in sparsifier.masks.items()})
    assert all(torch.equal(m, masks[1][k]) for k, m in masks[0].items())
    assert sum(int((m == 0).sum()) for m in masks[1].values()) > 0
