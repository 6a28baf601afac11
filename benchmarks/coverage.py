"""On which networks does pruning work? Each runs in a process of its own, with a limit of time
and memory; a JSON line each, and a table in the end. The same is asked of torch-pruning, which is
helped: it is told which layers make the outputs, and how many heads attention layers have.

    python benchmarks/coverage.py [--libraries fastai torchvision timm transformers]
        [--networks resnet18 ...] [--checks ranked exact budget peer] [--seconds 300]
        [--out lines.jsonl]

What is in the file already is not run again, but where time ran out; `--seconds 0` runs nothing.

ranked: `prune_model(0.5)` removes half of every axis that is not pinned, at least 5% of the
parameters; the eval outputs keep their shapes; another batch trains. exact: half of every free
axis is zeroed under random norm statistics and removed; how far outputs are apart, float64.
Networks that insist on float32 are compared in that.
budget: 70% of the MACs and of the parameters are asked for; what the network then costs, as a share
of what is allowed, "local" (an equal share of each layer) and "global".
peer: torch-pruning cuts half of the channels; the same demands.
"""

import argparse
import json
import multiprocessing
import resource
import time
import warnings
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
import zoo
from arms import HERE
from torch import nn
from torch.utils._pytree import tree_map

from fasterai.coupling.inputs import tensors_in


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def shapes(model, x):
    with torch.no_grad():
        torch.manual_seed(0)
        return [tuple(t.shape) for t in tensors_in(call(model.eval(), x))]


def call(model, x):
    return model(**x) if isinstance(x, dict) else model(*x)


def trains(model, library, inputs):
    """A step on another batch size."""
    x = inputs(3)
    model.train().requires_grad_(True)
    if isinstance(x, tuple) and isinstance(x[0], list):
        x = (*x, zoo.detection_targets(3))
    out = call(model, x)
    losses = [
        t.float().mean() for t in tensors_in(out) if t.is_floating_point() and t.requires_grad
    ]
    sum(losses).backward()
    model.zero_grad()
    model.eval()


def detects(x):
    return isinstance(x, tuple) and isinstance(x[0], list)


def ranked(library, name):
    from fasterai.prune.pruner import Pruner

    model, inputs = zoo.build(library, name)
    x = inputs(2)
    expected, before = shapes(model, x), parameters(model)
    begin = time.perf_counter()
    pruner = Pruner(model, x)
    analysed = time.perf_counter() - begin
    axes = pruner._axes
    goal = [a.size - a.blocks * min(round(0.5 * a.bundles), a.size // a.blocks - 1) for a in axes]
    pruner.prune_model(0.5)
    seconds = time.perf_counter() - begin
    after = parameters(model)
    short = [a.name for a, g in zip(pruner.plan.axes, goal, strict=True) if a.after != g]
    same = detects(x) or shapes(model, x) == expected
    trains(model, library, inputs)
    pinned = {}
    for a in axes:
        for pin in a.pins:
            if pin is not None:
                pinned[pin[:90]] = pinned.get(pin[:90], 0) + 1
    return {
        "ok": bool(same and not short and after <= 0.95 * before),
        "parameters": round(after / before, 3),
        "million": round(before / 1e6, 1),
        "axes": len(axes),
        "free": sum(a.bundles > 0 for a in axes),
        "short": short[:5],
        "shapes": same,
        "analysed": round(analysed, 2),
        "seconds": round(seconds, 2),
        "kept": sorted(set(pruner.kept()["reason"].str.slice(0, 200)))[:12] if short else [],
        "pinned": dict(sorted(pinned.items(), key=lambda kv: -kv[1])[:5]),
    }


def shake(model):
    """Random norm statistics and affine values, so that nothing is neutral."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            nn.init.normal_(m.running_mean, 0, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
        kinds = nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm
        if isinstance(m, kinds) and m.weight is not None:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.3)


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def outputs(model, x):
    """What has numbers to compare."""
    torch.manual_seed(0)
    with torch.no_grad():
        found = tensors_in(call(model.eval(), x))
    return [t for t in found if t.is_floating_point() and t.numel()]


def furthest(a, b):
    """The largest difference, relative to the largest number of its tensor."""
    found = [0.0]
    for p, q in zip(a, b, strict=True):
        differ = torch.where(p == q, 0.0, (p - q).abs()).nan_to_num(nan=torch.inf)
        found.append(float(differ.max() / p.abs().max().clamp(min=1e-30)))
    return max(found)


@contextmanager
def shaken(library, name):
    """A network in double precision, two inputs, and by how much outputs may be apart."""
    model, inputs = zoo.build(library, name)
    shake(model)
    given = [tree_map(double, inputs(2)) for _ in range(2)]
    bound, default = 1e-10, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # code that makes tensors follows it
    try:
        try:
            shapes(model.double(), given[0])
        except (RuntimeError, ValueError):  # it insists on single precision
            torch.set_default_dtype(torch.float32)
            model.float()
            given, bound = [inputs(2), inputs(2)], 1e-5
        yield model, *given, bound
    finally:
        torch.set_default_dtype(default)


def exact(library, name):
    with shaken(library, name) as found:
        return zeroed_and_removed(*found)


def zeroed_and_removed(model, x, other, bound):
    from fasterai.deploy.comparison import copied
    from fasterai.prune.pruner import Pruner
    from fasterai.sparse.choose import NothingToSparsify
    from fasterai.sparse.sparsifier import Sparsifier

    before = parameters(model)
    begin = time.perf_counter()
    try:
        sparsifier = Sparsifier(model, "filter", example_inputs=x)
    except NothingToSparsify as error:  # it says why
        return {"ok": True, "groups": 0, "why": [str(error)[:200]]}
    sparsifier.sparsify_model(0.5)
    groups = sum(g.free for g in sparsifier._groups)
    sparse = copied(model)
    pruner = Pruner(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.prune_model()
    seconds = time.perf_counter() - begin
    apart, seen = 0.0, 0
    for z in (x, other):
        expected = outputs(sparse, z)
        apart = max(apart, furthest(expected, outputs(model, z)))
        seen += sum(t.numel() for t in expected)
        if bound == 1e-5:  # iterations add up what rounding does: as the last bit of an input does
            moved = tree_map(lambda t: t.nextafter(t + 1) if t.is_floating_point() else t, z)
            bound = max(bound, furthest(expected, outputs(sparse, moved)))
    return {
        "ok": seen > 0 and apart <= bound,
        "apart": apart,
        "bound": bound,
        "groups": groups,
        "parameters": round(parameters(model) / before, 3),
        "left": len(pruner.kept()),
        "why": sorted({r[:90] for r in pruner.kept()["reason"]})[:4],
        "seconds": round(seconds, 2),
    }


def budget(library, name):
    from fasterai.core.copies import copied
    from fasterai.core.target import Target
    from fasterai.measure.profile import macs
    from fasterai.prune.budget import UnreachableTarget
    from fasterai.prune.pruner import Pruner

    model, inputs = zoo.build(library, name)
    x = inputs(2)
    pruner = Pruner(model, x)
    costs = {"macs": lambda network: macs(network, x)[""], "parameters": parameters}
    shares, least = {}, {}
    for (kind, cost), context in product(costs.items(), ("local", "global")):
        target, key = Target(**{kind: 0.7}), f"{kind}, {context}"
        try:
            plan = pruner.plan_for(target, context=context, verify=False)
        except UnreachableTarget as error:
            least[key] = round(error.least / cost(model), 3)
            continue
        smaller = plan.apply(copied(model))
        shares[key] = round(cost(smaller) / target.goal(cost(model)), 4)
    ok = all(share <= 1 for share in shares.values()) and all(n > 0.7 for n in least.values())
    return {"ok": ok, "shares": shares, "least": least}


def peer(library, name):
    import torch_pruning as tp

    from fasterai.coupling.analysis import analyse
    from fasterai.coupling.inputs import Inputs

    model, inputs = zoo.build(library, name)
    x = inputs(2)
    expected, before = shapes(model, x), parameters(model)
    outputs = set(analyse(model, Inputs.fitting(model, x)).outputs)
    modules = dict(model.named_modules())
    heads = {
        child: m.num_heads
        for m in modules.values()
        if isinstance(getattr(m, "num_heads", None), int)
        for child in m.children()
        if isinstance(child, nn.Linear)
    }
    begin = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model,
        x if isinstance(x, dict) else x if len(x) > 1 else x[0],
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[modules[n] for n in outputs if n in modules],
        num_heads=heads,
        output_transform=lambda out: sum(t.float().sum() for t in tensors_in(out)),
    )
    pruner.step()
    seconds = time.perf_counter() - begin
    after = parameters(model)
    same = detects(x) or shapes(model, x) == expected
    trains(model, library, inputs)
    return {
        "ok": bool(same and after <= 0.95 * before),
        "parameters": round(after / before, 3),
        "seconds": round(seconds, 2),
    }


OUT_OF_TIME = {"ok": False, "error": "out of time"}
CHECKS = {"ranked": ranked, "exact": exact, "budget": budget, "peer": peer}


def child(check, library, name, gigabytes, threads, send):
    warnings.simplefilter("ignore")
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(threads)
    try:
        found = CHECKS[check](library, name)
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        found = {
            "ok": False,
            "error": f"{type(error).__name__}: {str(error)[:400]}",
            "at": f"{where.filename.rpartition('/')[2]}:{where.lineno}",
        }
    send.send(found)


def run(jobs, seconds, gigabytes, workers, out):
    context = multiprocessing.get_context("fork")
    waiting, running, found = list(jobs), [], []
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(*job, gigabytes, 1, send))
            process.start()
            send.close()
            running.append((job, process, receive, time.monotonic()))
        time.sleep(0.05)
        for item in list(running):
            job, process, receive, begin = item
            late = time.monotonic() - begin > seconds
            if not (receive.poll() or late or not process.is_alive()):
                continue
            result = OUT_OF_TIME if late else {"ok": False, "error": "died"}
            try:
                if receive.poll():
                    result = receive.recv()
            except EOFError:
                pass
            process.kill()
            process.join()
            running.remove(item)
            line = dict(zip(("check", "library", "network"), job, strict=True), **result)
            found.append(line)
            print(json.dumps(line), file=out, flush=True)
    return found


def table(found):
    print("| library | check | works | of |")
    print("| --- | --- | --- | --- |")
    for library, check in dict.fromkeys((f["library"], f["check"]) for f in found):
        mine = [f for f in found if (f["library"], f["check"]) == (library, check)]
        print(f"| {library} | {check} | {sum(f['ok'] for f in mine)} | {len(mine)} |")
    print()
    for f in found:
        if not f["ok"]:
            why = str(f.get("error") or f).splitlines()[0].partition(" from /")[0][:200]
            print(f"- {f['check']} {f['library']} {f['network']}: {why}")


def measure(about, checks, name):
    """What the command line asks for, and a table."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--libraries", nargs="+", default=list(zoo.LIBRARIES))
    parser.add_argument("--networks", nargs="+")
    parser.add_argument("--checks", nargs="+", default=checks)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--gigabytes", type=float, default=24)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"{name}.jsonl")
    args = parser.parse_args()
    how = {"seconds": args.seconds, "gigabytes": args.gigabytes, "workers": args.workers}
    found = []
    for library in args.libraries:
        found += trips(library, args.networks or zoo.names(library), args.checks, args.out, **how)
    table(found)


def trips(library, names, checks, file, seconds=300, gigabytes=24, workers=2):
    """A line for each check of each network, those that the file knows and those that are new."""
    jobs = [(check, library, name) for name in names for check in checks]
    lines = file.read_text().splitlines() if file.exists() else []
    known = {(f["check"], f["library"], f["network"]): f for f in map(json.loads, lines)}
    jobs_left = [j for j in jobs if known.get(j, OUT_OF_TIME).get("error") == "out of time"]
    if jobs_left and seconds:
        zoo.preload(library)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            for found in run(jobs_left, seconds, gigabytes, workers, out):
                known[found["check"], found["library"], found["network"]] = found
    return [known[job] for job in jobs if job in known]


if __name__ == "__main__":
    measure(__doc__, list(CHECKS), "coverage")
