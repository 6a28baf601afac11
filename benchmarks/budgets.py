"""Budgets that are asked of networks, and what these then cost: a table in Markdown.

Random weights; each plan is carried out on a copy, which is counted by itself and run. Shares are
of the dense network's; the absolute budget is in bytes. "local" takes an equal share of each layer,
"global" what is least important for what it costs.

    python benchmarks/budgets.py [--networks resnet18 bert] [--out FILE]
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path

import torch
import torchvision

from fasterai.core.target import Target
from fasterai.measure.profile import macs, saved_bytes
from fasterai.prune.budget import UnreachableTarget
from fasterai.prune.pruner import Pruner

NETWORKS = [
    *("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet121", "efficientnet_b0"),
    *("convnext_tiny", "vit_b_16", "swin_t", "regnet_y_400mf", "bert", "gpt2"),
]
TARGETS = (Target(macs=0.5), Target(parameters=0.5), Target(bytes=8e6))


def build(name):
    torch.manual_seed(0)
    if name in ("bert", "gpt2"):
        return of_transformers(name), {"input_ids": torch.randint(0, 1000, (1, 64))}
    size = 224 if name == "vit_b_16" else 64
    return getattr(torchvision.models, name)().eval(), torch.randn(1, 3, size, size)


def of_transformers(name):
    """BERT with a classifier, and GPT-2; four layers and few words."""
    import transformers

    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=2000,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
        )
        return transformers.BertForSequenceClassification(config).eval()
    config = transformers.GPT2Config(
        vocab_size=2000, n_embd=256, n_layer=4, n_head=4, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config).eval()


def cost(kind, model, x):
    if kind == "macs":
        return macs(model, x)[""]
    return saved_bytes(model) if kind == "bytes" else sum(p.numel() for p in model.parameters())


def share_reached(pruner, model, x, target, context):
    """What the network costs once cut, as a share of what the target allows; and the seconds."""
    goal, start = target.goal(cost(target.kind, model, x)), time.perf_counter()
    try:
        plan = pruner.plan_for(target, context=context, verify=False)
    except UnreachableTarget as error:
        return f"no less than {error.least / goal:.2f} of it", time.perf_counter() - start
    seconds = time.perf_counter() - start
    smaller = plan.apply(deepcopy(model))
    with torch.no_grad():
        smaller(**x) if isinstance(x, dict) else smaller(x)
    return f"{cost(target.kind, smaller, x) / goal:.4f}", seconds


def row(name):
    model, x = build(name)
    start = time.perf_counter()
    pruner = Pruner(model, x)
    cells, taken = [name], [time.perf_counter() - start]
    for target in TARGETS:
        for context in ("local", "global"):
            said, seconds = share_reached(pruner, model, x, target, context)
            cells.append(said)
            taken.append(seconds)
    return [*cells, f"{taken[0]:.1f} s, {max(taken[1:]):.1f} s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    heads = [f"{t.kind} {t.value:g}, {c}" for t in TARGETS for c in ("local", "global")]
    heads = ["network", *heads, "coupling, slowest plan"]
    lines = [heads, ["---"] * len(heads)]
    for name in args.networks:
        lines.append(row(name))
        print(lines[-1], flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    print(table)
    if args.out:
        args.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
