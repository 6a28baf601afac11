"""On which networks does taking them out work? Each runs in a process of its own, with a limit of
time and memory; a JSON line each, and a table in the end.

    python benchmarks/round_trips.py [--libraries fastai torchvision timm transformers]
        [--networks resnet18 ...] [--checks files sparse folded program onnx] [--seconds 300]

Half of the channels are removed by rank first, but for `folded`; batch norms have the statistics
of a batch. files: `save_pruned`, and `load_pruned` into a freshly built network, which computes the
same bit for bit. sparse: so do `save_sparse` and `load_sparse`, with 90% of the weights zero.
folded: `fold_batchnorm` under random norm statistics, in float64 where code allows it. program:
`export_program`, saved and loaded. onnx: `export_onnx`.
What is in the file already is not run again, but where time ran out; `--seconds 0` runs nothing.
"""

import io
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import coverage
import torch
import zoo
from safetensors.torch import save_file
from torch import nn

from fasterai.coupling.inputs import run_quietly, tensors_in
from fasterai.deploy.export import export_onnx, export_program
from fasterai.deploy.files import load_pruned, save_pruned
from fasterai.deploy.fold import fold_batchnorm, fold_report
from fasterai.deploy.sparse_files import load_sparse, save_sparse
from fasterai.prune.pruner import Pruner


def outputs(model, x):
    with run_quietly(model):
        torch.manual_seed(0)
        return tensors_in(coverage.call(model, x))


def same(a, b):
    """Bit for bit, but that all nans are one."""
    pairs = list(zip(a, b, strict=True))
    return all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)


def apart(a, b):
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.is_floating_point() and x.numel()]
    return coverage.furthest(*zip(*pairs, strict=True))


def smaller(library, name):
    model, inputs = zoo.build(library, name)
    settle(model, inputs(2))
    pruner = Pruner(model, inputs(2))
    pruner.prune_model(0.5)
    return model.eval(), inputs(2), pruner.whole_plan


def settle(model, x):
    """Statistics of batch norms from a batch: with those of the start, deep networks fade out."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for m in norms:
        m.momentum = 1.0
        m.train()
    with suppress(ValueError), torch.no_grad():  # one value a channel has no variance
        coverage.call(model, x)
    model.eval()


def files(library, name):
    model, x, plan = smaller(library, name)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(model, f"{folder}/a", plan)
        fresh = load_pruned(zoo.build(library, name)[0], f"{folder}/a").eval()
    state = fresh.state_dict()
    kept = all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    return {"ok": kept and same(outputs(model, x), outputs(fresh, x))}


def sparse(library, name):
    model, inputs = zoo.build(library, name)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p[torch.rand(p.shape) < 0.9] = 0
    state = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a")
        save_sparse(model, file)
        loaded = load_sparse(file)
        fresh = load_sparse(file, zoo.build(library, name)[0]).eval()
        save_file({k: v.clone().contiguous() for k, v in state.items()}, f"{folder}/dense")
        size = file.stat().st_size / os.path.getsize(f"{folder}/dense")
    kept = loaded.keys() == state.keys() and all(
        torch.equal(v, loaded[k]) for k, v in state.items()
    )
    x = inputs(2)
    return {"ok": kept and same(outputs(model, x), outputs(fresh, x)), "size": round(size, 3)}


def folded(library, name):
    with coverage.shaken(library, name) as (model, x, other, bound):
        table = fold_report(model, x)
        found = apart(outputs(model, other), outputs(fold_batchnorm(model, x), other))
    why = {k: int(v) for k, v in table["reason"].str.slice(0, 90).value_counts().items() if k}
    return {"ok": found < 10 * bound, "apart": found, "norms": len(table), "stay": why}


def program(library, name):
    model, x, _ = smaller(library, name)
    file = io.BytesIO()
    torch.export.save(export_program(model, x), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        found = apart(outputs(model, x), tensors_in(coverage.call(loaded, x)))
    return {"ok": found < 1e-3, "apart": found}


def onnx(library, name):
    model, x, _ = smaller(library, name)
    with tempfile.TemporaryDirectory() as folder:
        return {"ok": True, "apart": export_onnx(model, x, f"{folder}/a.onnx")}


CHECKS = {"files": files, "sparse": sparse, "folded": folded, "program": program, "onnx": onnx}


coverage.CHECKS.update(CHECKS)


def main():
    coverage.measure(__doc__, list(CHECKS), "round_trips")


if __name__ == "__main__":
    main()
