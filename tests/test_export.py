"""Networks in other runtimes: the same numbers on any batch, and nothing half-written."""

import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from fastai.vision.learner import create_unet_model
from fastai.vision.models.xresnet import xresnet18
from networks import Residual, TwoHeads, apart, images, make, shake
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from fasterai.coupling.norms import remembered
from fasterai.deploy import export
from fasterai.deploy.comparison import copied
from fasterai.deploy.export import export_onnx, export_program
from fasterai.deploy.sparse_layers import SparseLinear
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


def tokens(n):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 50, (n, 9), generator=generator)


def exactly(model, x):
    """Half of the channels, norms over channels included, zeroed and removed."""
    Sparsifier(model, "filter", example_inputs=x, mixed=True).sparsify_model(0.5)
    Pruner(model, x).prune_model()
    assert any(remembered(m) for m in model.modules())
    return model


def by_rank(model, x):
    return Pruner(model, x).prune_model(0.5)


class Normed(nn.Module):
    """A residual network with group and layer norms."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16))
        self.group, self.layer, self.head = nn.GroupNorm(4, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(self.group(self.a(x)).relu())
        return self.head(self.layer(x.mean((2, 3))))


def vit():
    model = VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # zero at first
    return model


def bert():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.BertConfig(vocab_size=50, intermediate_size=32, **small)
    return transformers.BertForSequenceClassification(config)


CASES = {
    "residual": (Residual, images, by_rank),
    "several outputs": (TwoHeads, images, by_rank),
    "xresnet": (lambda: xresnet18(n_out=4), lambda n: images(n, 32), by_rank),
    "norms that remember": (Normed, images, exactly),
    "vision transformer, norms that remember": (vit, lambda n: images(n, 32), exactly),
    "vision transformer": (vit, lambda n: images(n, 32), by_rank),
    "bert": (bert, tokens, by_rank),
}


def small(case):
    """A pruned network and what it runs on."""
    kind, inputs, cut = CASES[case]
    torch.manual_seed(0)
    return cut(shake(kind()).eval(), inputs(2)), inputs


@torch.no_grad()
def answer(model, *x):
    out = model(*x)
    return out if isinstance(out, torch.Tensor) else dict(out)


def session(file, names, *x):
    """What onnxruntime computes, under the names of the network's outputs."""
    run = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {i.name: t.numpy() for i, t in zip(run.get_inputs(), x, strict=True)}
    out = [torch.from_numpy(y) for y in run.run(None, feed)]
    return out[0] if names is None else dict(zip(names, out, strict=True))


def agree(model, file, *x):
    expected = answer(model, *x)
    names = list(expected) if isinstance(expected, dict) else None
    return apart(expected, session(file, names, *x)) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_computes_the_same_on_any_batch(case, tmp_path):
    model, inputs = small(case)
    assert export_onnx(model, inputs(2), tmp_path / "a.onnx") < 1e-4
    for n in (1, 2, 7):
        assert agree(model, tmp_path / "a.onnx", inputs(n))


ELSEWHERE = """
import sys
import torch
for name, x in torch.load("inputs").items():
    program = torch.export.load(name + ".pt2").module()
    with torch.no_grad():
        out = program(x)
    torch.save(out if isinstance(out, torch.Tensor) else dict(out), name + ".out")
assert not {"fasterai", "fastai", "torchvision", "networks"} & set(sys.modules)
"""


def test_programs_run_where_none_of_our_code_is(tmp_path):
    expected, xs = {}, {}
    for case in ["residual", "several outputs", *(case for case in CASES if "norms" in case)]:
        model, inputs = small(case)
        torch.export.save(export_program(model, inputs(2)), tmp_path / f"{case}.pt2")
        xs[case] = inputs(5)
        expected[case] = answer(model, xs[case])
    torch.save(xs, tmp_path / "inputs")
    here = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-W", "ignore", "-c", ELSEWHERE]
    subprocess.run(command, check=True, cwd=tmp_path, env=here)
    for case, out in expected.items():
        assert apart(out, torch.load(tmp_path / f"{case}.out")) < 1e-5, case


class Named(nn.Module):
    """Gives a dict, some of whose keys are names of inputs and of operations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x, mask):
        h = self.a(x).relu() * mask
        return {"logits": self.b(h), "x": h, "relu": (h + 1, h - 1)}


def test_inputs_and_outputs_of_a_file_have_names(tmp_path):
    def names(model, *x):
        export_onnx(model.eval(), x, tmp_path / "a.onnx")
        run = onnxruntime.InferenceSession(tmp_path / "a.onnx")
        found = [
            [(v.name, v.shape[0]) for v in some] for some in (run.get_inputs(), run.get_outputs())
        ]
        assert {n for some in found for _, n in some} == {"batch"}
        return [[name for name, _ in some] for some in found]

    x, mask = torch.randn(2, 4), torch.ones(2, 3)
    taken, given = names(make(Named), x, mask)
    assert taken == ["x", "mask"] and len(set(given)) == 4
    assert given[0] == "logits" and given[1] not in taken and given[2:] == ["relu_0", "relu_1"]
    assert names(make(TwoHeads), images(2))[1] == ["boxes", "classes"]
    assert names(nn.Sequential(nn.Linear(4, 3)), x) == [["input"], ["output"]]


def test_a_program_has_tensors_of_its_own():
    model, x = make(Residual), images(3)
    program, before = export_program(model, x[:1]).module(), answer(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert apart(before, answer(program, x)) < 1e-6


def test_networks_that_fastai_makes():
    """Whose layers cast to its own tensors."""
    torch.manual_seed(0)
    model = create_unet_model(resnet18, 2, (32, 32), pretrained=False).eval()
    program = export_program(model, images(2, 32)).module()
    x = images(3, 32)
    assert apart(answer(model, x), answer(program, x)) < 1e-5
    assert type(answer(program, x)) is torch.Tensor


def test_caches_of_language_models_are_left_out(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    export_onnx(model, tokens(2), tmp_path / "a.onnx")
    for n in (1, 4):
        with torch.no_grad():
            expected = model(tokens(n)).logits
        assert apart(expected, session(tmp_path / "a.onnx", None, tokens(n))) < 1e-5
    assert model.config.use_cache and model(tokens(1)).past_key_values is not None


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, scale=1, other=None, *, mask=None, many=()):
        x = self.a(x) * scale - self.b(other)
        y = sum(many, x).masked_fill(mask, 0)
        return {"y": y, "again": y, "mask": mask, "parts": (x, [y.sum(1)])}


@pytest.mark.parametrize("reverse", [False, True])
def test_inputs_and_outputs_of_many_forms(reverse, tmp_path):
    torch.manual_seed(0)
    model = Several().eval()
    inputs = {"x": torch.randn(2, 4), "other": torch.randn(2, 4), "scale": 3}
    inputs |= {"mask": torch.rand(2, 3) < 0.5, "many": [torch.randn(2, 3), torch.randn(2, 1)]}
    if reverse:
        inputs = dict(reversed(inputs.items()))
    export_onnx(model, inputs, tmp_path / "a.onnx")
    program = export_program(model, inputs).module()
    out, expected = program(**inputs), model(**inputs)
    assert out.keys() == expected.keys() and apart(expected["y"], out["y"]) < 1e-6


class Indexed(nn.Module):
    """Takes indices as floats: random numbers make no sense to it."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.table(x.long()))


def test_networks_that_take_no_random_inputs(tmp_path):
    x = torch.tensor([1.0, 4.0, 2.0])
    model = Indexed().eval()
    with pytest.raises(IndexError):
        model(torch.tensor([-3.0]))
    export_onnx(model, x, tmp_path / "a.onnx")
    assert agree(model, tmp_path / "a.onnx", x[:1])


def test_the_network_stays_as_it_was(tmp_path):
    model, x = make(Residual).train(), images(4)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    model.head.weight.requires_grad_(False)
    model(x).sum().backward()
    before = [dict(vars(m)) for m in model.modules()]
    state, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    numbers = torch.random.get_rng_state()
    export_onnx(model, x, tmp_path / "a.onnx")
    assert [dict(vars(m)) for m in model.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(numbers, torch.random.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()
    assert agree(model.eval(), tmp_path / "a.onnx", x)
    assert model.training is False and os.listdir(tmp_path) == ["a.onnx"]


class Windows(nn.Module):
    """Attention within each of several windows: queries of five dimensions."""

    def __init__(self, **how):
        super().__init__()
        self.qkv, self.how = nn.Linear(8, 24), how

    def forward(self, x):  # (N, windows, positions, channels)
        q, k, v = self.qkv(x).unflatten(3, (3, 2, 4)).permute(3, 0, 4, 1, 2, 5)
        return nn.functional.scaled_dot_product_attention(q, k, v, **self.how).mean((1, 3))


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_attention_of_any_number_of_dimensions(how, tmp_path):
    torch.manual_seed(0)
    model, x = Windows(**how).eval(), torch.randn(2, 3, 5, 8)
    assert export_onnx(model, x, tmp_path / "a.onnx") < 1e-5
    assert agree(model, tmp_path / "a.onnx", torch.randn(7, 3, 5, 8))


class Flat(nn.Module):
    """Fixes its batch."""

    def forward(self, x):
        return x.reshape(2, -1)


class Choosing(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_fixed_batch_is_told_and_can_be_asked_for(tmp_path):
    x = images(2)
    with pytest.raises(ValueError, match="dynamic_batch=False fixes the batch size"):
        export_onnx(Flat(), x, tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)
    export_onnx(Flat(), x, tmp_path / "a.onnx", dynamic_batch=False)
    assert agree(Flat(), tmp_path / "a.onnx", x)
    one = images(1)
    program = export_program(make(Residual), one, dynamic_batch=False)
    assert program.module()(one).shape == (1, 4)
    with pytest.raises(ValueError, match="cannot follow the network on .2, 3, 16, 16.*"):
        export_program(Choosing(), x)


def test_networks_are_copied_that_keep_what_they_computed():
    """As those with weight dropout do, once they ran with gradients."""
    model = nn.Linear(3, 2)
    model.kept = [model.weight * 2]
    twin = copied(model)
    assert torch.equal(twin.kept[0], model.kept[0]) and not twin.kept[0].requires_grad
    assert twin.weight is not model.weight and twin.kept[0] is not model.kept[0]
    assert model.kept[0].requires_grad


CALLS = []


class Counting(nn.Module):
    def forward(self, x):
        CALLS.append(1)
        return x * len(CALLS)


def test_nothing_is_written_that_computes_something_else(tmp_path):
    file = tmp_path / "a.onnx"
    file.write_text("before")
    with pytest.raises(RuntimeError, match="onnxruntime computes something else"):
        export_onnx(Counting(), images(), file)
    with pytest.raises(RuntimeError, match="the program computes something else"):
        export_program(Counting(), images())
    assert file.read_text() == "before" and os.listdir(tmp_path) == ["a.onnx"]


class Picks(nn.Module):
    def __init__(self, counts):
        super().__init__()
        self.layer, self.counts = nn.Linear(6, 4), counts

    def forward(self, x):
        y = self.layer(x)
        if self.counts:
            CALLS.append(1)
        return y, y.argmax(1) + len(CALLS), y > 0


def test_whole_numbers_among_the_outputs_must_agree(tmp_path):
    x = torch.randn(5, 6)
    assert export_onnx(Picks(counts=False), x, tmp_path / "a.onnx") < 1e-5
    with pytest.raises(RuntimeError, match="something else: 100% of the whole numbers or bools"):
        export_program(Picks(counts=True), x)


def test_a_folder_is_told_before_anything_is_run(tmp_path):
    CALLS.clear()
    with pytest.raises(IsADirectoryError, match="is a folder: name a file in it"):
        export_onnx(Counting(), images(), tmp_path)
    assert not CALLS


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_must_agree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(make(Residual), images(), tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)


def test_what_onnxruntime_cannot_run_is_told(tmp_path):
    model = make(Residual).bfloat16()
    with pytest.raises(RuntimeError, match="onnxruntime cannot run the network on .*bfloat16"):
        export_onnx(model, images().bfloat16(), tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)
    half = images().bfloat16()
    assert apart(model(half), export_program(model, half).module()(half)) < 0.05


def test_what_has_no_program_is_told(tmp_path):
    sparse = nn.Sequential(SparseLinear(nn.Linear(8, 8)), nn.Linear(8, 2)).eval()
    for written in (export_program, lambda *a: export_onnx(*a, tmp_path / "a.onnx")):
        with pytest.raises(ValueError, match="'0' multiplies with a sparse matrix"):
            written(sparse, torch.randn(2, 8))
        with pytest.raises(ValueError, match="meta device"):
            written(nn.Linear(8, 2, device="meta").eval(), torch.randn(2, 8))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_told_at_once(tmp_path, monkeypatch):
    model, x = make(Residual), images()
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere for a.onnx"):
        export_onnx(model, x, tmp_path / "nowhere" / "a.onnx")
    with pytest.raises(TypeError, match="example_inputs must be a tensor"):
        export_onnx(model, "x", tmp_path / "a.onnx")
    with pytest.raises(TypeError, match="torch.nn.Module"):
        export_onnx("resnet18", x, tmp_path / "a.onnx")
    monkeypatch.setattr(export, "find_spec", lambda name: None if "onnx" in name else name)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        export_onnx(model, x, tmp_path / "a.onnx")
    assert not os.listdir(tmp_path)


LONG = {
    "fastai": ["vision_resnet18", "vision_squeezenet1_0", "vision_convnext_tiny", "tabular"],
    "torchvision": ["mobilenet_v3_small", "densenet121", "googlenet", "shufflenet_v2_x0_5"],
    "timm": ["efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224", "resnest14d"],
    "transformers": ["bert", "vit", "swin", "gpt2", "llama", "t5", "whisper", "clip"],
}


@pytest.mark.long
@pytest.mark.parametrize("library, name", [(k, n) for k, some in LONG.items() for n in some])
def test_networks_that_people_use(library, name, tmp_path, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    zoo = importlib.import_module("zoo")
    model, inputs = zoo.build(library, name)
    x = inputs(2)
    Pruner(model, x).prune_model(0.5)
    assert export_onnx(model, x, tmp_path / "a.onnx") < 1e-4
