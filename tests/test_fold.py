"""Folded norms: the same numbers with fewer modules, and what must stay as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import ALL, apart, images, make, shake
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

from fasterai.deploy.fold import fold_batchnorm, fold_report

PRECISION = {torch.float32: 1e-5, torch.float64: 1e-12}
NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def norms(model):
    return [m for m in model.modules() if isinstance(m, NORMS)]


def reasons(model, x):
    return dict(fold_report(model, x)[["norm", "reason"]].values)


def folded(model, x, left=0):
    """The folded copy of a shaken network, checked against it on other inputs."""
    shake(model).eval()
    before = copy.deepcopy(model.state_dict())
    small = fold_batchnorm(model, x)
    assert len(norms(small)) == left < len(norms(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = torch.randn(5, *x.shape[1:]).to(x)
    with torch.no_grad():
        assert apart(model(other), small(other)) < PRECISION[x.dtype]
    return small


class Custom(nn.Module):
    """A network whose forward is a function of itself."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


LAYERS = [
    (nn.Linear(6, 8), nn.BatchNorm1d),
    (nn.Conv1d(6, 8, 3), nn.BatchNorm1d),
    (nn.Conv2d(6, 8, 3, groups=2, padding="same", padding_mode="circular"), nn.BatchNorm2d),
    (nn.Conv2d(6, 6, 3, groups=6, stride=2), nn.BatchNorm2d),
    (nn.Conv3d(6, 8, 2), nn.BatchNorm3d),
    (nn.ConvTranspose1d(6, 8, 3, stride=2), nn.BatchNorm1d),
    (nn.ConvTranspose2d(6, 9, 2, groups=3, output_padding=1, stride=2), nn.BatchNorm2d),
    (nn.ConvTranspose3d(6, 8, 2, groups=2), nn.BatchNorm3d),
]


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer, norm", LAYERS, ids=lambda x: getattr(x, "__name__", None) or str(x)
)
def test_every_layer_takes_in_its_norm(layer, norm, bias, dtype):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    if not bias:
        layer.bias = None
    width = getattr(layer, "out_channels", 8)
    places = layer.weight.ndim - 2
    for affine in (True, False):
        model = nn.Sequential(layer, norm(width, affine=affine), nn.ReLU()).to(dtype)
        small = folded(model, torch.randn(3, 6, *[7] * places, dtype=dtype))
        assert isinstance(small[1], nn.Identity) and small[0].bias.shape == (width,)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("kind", ALL)
def test_small_networks_compute_the_same(kind, dtype):
    model, x = make(kind, dtype), images(3).to(dtype)
    table = fold_report(model, x)
    stay = int((table["reason"] != "").sum())
    if len(table) == stay:
        with pytest.warns(UserWarning, match="nothing was folded"):
            small = fold_batchnorm(model, x)
    else:
        small = fold_batchnorm(model, x)
    assert len(norms(small)) == stay
    assert stay == {"Reused": 2, "Dense": 1}.get(kind.__name__, 0)
    assert apart(model(x), small(x)) < PRECISION[dtype]


def test_the_order_is_that_of_the_run():
    model = Custom(
        lambda m, x: F.relu(m.last(m.middle(m.first(m.second(m.third(x)))))),
        last=nn.BatchNorm2d(8),
        first=nn.BatchNorm2d(8),
        second=nn.Conv2d(8, 8, 3),
        third=nn.Conv2d(3, 8, 3),
        middle=nn.Conv2d(8, 8, 1),
    )
    shake(model).eval()
    table = fold_report(model, images())
    assert dict(table[["norm", "into"]].values) == {"last": "middle", "first": "second"}
    folded(model, images())


def two_norms(m, x):
    return m.second(m.conv(F.relu(m.first(m.conv(x)))))


def test_a_layer_that_runs_twice():
    parts = {"conv": nn.Conv2d(3, 3, 3), "first": nn.BatchNorm2d(3), "second": nn.BatchNorm2d(3)}
    why = reasons(Custom(two_norms, **parts).eval(), images())
    assert why == dict.fromkeys(["first", "second"], "other norms read what conv makes")
    once = Custom(
        lambda m, x: m.first(m.conv(x)) + m.conv(x), conv=parts["conv"], first=parts["first"]
    )
    assert reasons(once.eval(), images()) == {"first": "something else reads what conv makes"}


def test_a_layer_and_a_norm_that_run_twice_together():
    block = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    folded(Custom(lambda m, x: m.block(m.block(x)), block=block), images())


def test_a_norm_that_serves_two_layers():
    model = Custom(
        lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)),
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(3, 4, 3, bias=False),
        norm=nn.BatchNorm2d(4),
    )
    assert fold_report(model.eval(), images())["into"].tolist() == ["a, b"]
    folded(model, images())


def test_a_norm_that_also_serves_what_is_no_layer_stays():
    model = Custom(
        lambda m, x: m.norm(m.a(x)) + m.norm(x), a=nn.Conv2d(3, 3, 1), norm=nn.BatchNorm2d(3)
    )
    assert reasons(model.eval(), images()) == {
        "norm": "no conv or linear layer makes what it reads"
    }


READ_ELSEWHERE = {
    "a sum": lambda m, x: m.norm(y := m.conv(x)) + y,
    "an output": lambda m, x: (m.norm(y := m.conv(x)), y),
    "a view in the output": lambda m, x: (m.norm(y := m.conv(x)), y.flatten(1)),
    "a write into a view": lambda m, x: (y := m.conv(x), y.view(-1).mul_(2), m.norm(y))[2],
    "before": lambda m, x: (y := m.conv(x), y.relu().sum() + m.norm(y))[1],
}


def test_what_was_written_over_is_not_what_the_layer_made():
    parts = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    model = Custom(lambda m, x: m.norm(F.relu_(m.conv(x))), **parts)
    assert reasons(model.eval(), images()) == {
        "norm": "no conv or linear layer makes what it reads"
    }


@pytest.mark.parametrize("how", READ_ELSEWHERE)
def test_what_something_else_reads_stays(how):
    model = Custom(READ_ELSEWHERE[how], conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    assert reasons(model.eval(), images()) == {"norm": "something else reads what conv makes"}


def test_views_between_layer_and_norm():
    flat = Custom(
        lambda m, x: m.norm(m.fc(x).flatten(0, 1)).view(len(x), 5, 8),
        fc=nn.Linear(6, 8),
        norm=nn.BatchNorm1d(8),
    )
    folded(flat, torch.randn(4, 5, 6))
    turned = Custom(
        lambda m, x: m.norm(m.fc(x).transpose(1, 2)),
        fc=nn.Linear(6, 8, bias=False),
        norm=nn.BatchNorm1d(8),
    )
    folded(turned, torch.randn(4, 5, 6))
    across = Custom(lambda m, x: m.norm(m.fc(x)), fc=nn.Linear(6, 5), norm=nn.BatchNorm1d(5))
    why = reasons(across.eval(), torch.randn(4, 5, 6))
    assert why == {"norm": "its channels are not those that fc makes"}


class Activated(nn.BatchNorm2d):
    """A norm that carries its activation, as timm's do."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubling(nn.BatchNorm2d):
    """A norm that does what no submodule tells."""

    def forward(self, x):
        return super().forward(x) * 2


def test_norms_of_other_kinds():
    small = folded(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4)), images())
    assert isinstance(small[1], nn.SiLU)
    frozen = FrozenBatchNorm2d(4)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(frozen, name).uniform_(0.5, 1.5)
    folded(nn.Sequential(nn.Conv2d(3, 4, 3), frozen), images())
    instance = nn.InstanceNorm2d(4, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), instance).eval()
    assert isinstance(fold_batchnorm(model, images())[1], nn.Identity)
    for norm, why in (
        (Doubling(4), "it does more than to scale and shift channels"),
        (nn.BatchNorm2d(4, track_running_stats=False), "it keeps no running statistics"),
    ):
        assert reasons(nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval(), images()) == {"1": why}


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def test_weights_that_are_not_the_layers_own_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", Doubled())
    model.eval()
    assert "computes its weight in each run" in reasons(model, images())["1"]
    a, b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    b.weight = a.weight
    tied = nn.Sequential(a, nn.BatchNorm2d(3), b).eval()
    assert reasons(tied, images()) == {"1": "0 shares a parameter with 2"}
    read = Custom(
        lambda m, x: m.norm(m.conv(x)) + m.conv.weight.mean(),
        conv=nn.Conv2d(3, 4, 3),
        norm=nn.BatchNorm2d(4),
    )
    assert reasons(read.eval(), images()) == {
        "norm": "other operations read the parameters of conv"
    }


def test_hooks_see_what_they_saw():
    for place, why in ((0, "hooks are registered on 0"), (1, "hooks are registered on it")):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        model[place].register_forward_hook(lambda *_: None)
        assert reasons(model, images()) == {"1": why}


def test_code_that_goes_around_the_modules_is_found_out():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    shake(model)

    def forward(m, x):
        x = m.body(x)
        return x * m.body[3].running_mean.sum()  # an Identity has none

    looking = Custom(forward, body=model).eval()
    table = fold_report(looking, images())
    assert table["reason"][0] == "" and "without it the network breaks" in table["reason"][1]
    folded(looking, images(), left=1)


def test_what_did_not_run_stays():
    model = Custom(lambda m, x: m.a(x), a=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)).eval()
    assert reasons(model, images()) == {"norm": "it did not run on the example inputs"}


def test_norms_that_take_turns_stay():
    """One for each domain, of which the example shows one."""
    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
    model = Custom(lambda m, x: m.norms[0](m.a(x)), a=nn.Conv2d(3, 4, 3), norms=norms).eval()
    found = reasons(model, images())
    assert found["norms.0"] == "it may take turns with norms.1, which did not run"


def test_a_network_in_training_mode_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    with pytest.raises(ValueError, match=r"1 is in training mode.*model.eval\(\)"):
        fold_batchnorm(model, images())
    with pytest.raises(TypeError, match=r"torch.nn.Module"):
        fold_batchnorm("resnet18", images())
    with pytest.raises(ValueError, match="on the meta device has no numbers"):
        fold_batchnorm(model.eval().to("meta"), images().to("meta"))


def test_a_wrapped_network_is_folded_inside():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    small = fold_batchnorm(torch.compile(model, backend="eager"), images())
    assert isinstance(small, nn.Sequential) and isinstance(small[1], nn.Identity)


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
    model[0].weight.requires_grad_(False)
    before = [dict(vars(m)) for m in model.modules()]
    small = fold_batchnorm(model, images())
    assert [dict(vars(m)) for m in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert not small[0].weight.requires_grad and not small[0].bias.requires_grad
    assert set(small.state_dict()) == {"0.weight", "0.bias"}


def test_channels_last_and_half_precision():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    shake(model).to(memory_format=torch.channels_last)
    small = fold_batchnorm(model, images())
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    half = copy.deepcopy(model).bfloat16()
    small = fold_batchnorm(half, images().bfloat16())
    assert small[0].bias.dtype == torch.bfloat16
    assert apart(half(images().bfloat16()), small(images().bfloat16())) < 0.05


FAMILIES = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "googlenet"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_networks(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    left = sum(r != "" for r in reasons(shake(model).eval(), x).values())
    assert left == {"googlenet": 2}.get(name, 0)  # its auxiliary heads do not run in eval mode
    folded(model, x, left)


def test_what_takes_a_norms_place_is_in_its_mode():
    class Activated(nn.BatchNorm2d):
        def __init__(self, *after):
            super().__init__(8)
            self.after = nn.Sequential(*after)

        def forward(self, x):
            return self.after(super().forward(x))

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), Activated(nn.ReLU(), nn.Tanh())
    )
    small = folded(model, images(2))
    assert not any(m.training for m in small.modules())
    assert fold_report(small, images(2)).empty
