"""Networks that people use, with random weights and small inputs, by the library they come from.

Each entry is a function that returns a network in eval mode and its inputs for a batch size.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

import torch

FASTAI = [
    "xresnet18",
    "xresnet34",
    "xresnet50",
    "xresnet18_deep",
    "xresnet50_deep",
    "xresnet34_deeper",
    "xse_resnet18",
    "xse_resnet50",
    "xse_resnext18",
    "xse_resnext50",
    "xresnext18",
    "xresnext50",
    "vision_resnet18",
    "vision_resnet50",
    "vision_squeezenet1_0",
    "vision_densenet121",
    "vision_vgg16_bn",
    "vision_convnext_tiny",
    "vision_efficientnet_b0",
    "unet_resnet18",
    "unet_resnet34",
    "unet_xresnet34",
    "tabular",
    "awd_lstm",
    "awd_lstm_classifier",
]
TIMM_BODIES = {"convnext_tiny", "efficientnet_b0"}
GIANTS = {"regnet_y_128gf", "vit_h_14"}


def images(*shape):
    return lambda n: (torch.randn(n, *shape),)


def fastai(name):
    from fastai.tabular.model import TabularModel
    from fastai.text.models import awdlstm
    from fastai.text.models.core import get_language_model, get_text_classifier
    from fastai.vision import all as vision

    kind, _, rest = name.partition("_")
    if name.startswith("awd"):
        config = dict(awdlstm.awd_lstm_lm_config, emb_sz=40, n_hid=64, n_layers=2)
        if name == "awd_lstm":
            model = get_language_model(awdlstm.AWD_LSTM, 200, config=config)
        else:
            config = dict(awdlstm.awd_lstm_clas_config, emb_sz=40, n_hid=64, n_layers=2)
            model = get_text_classifier(awdlstm.AWD_LSTM, 200, 3, seq_len=10, config=config)
        return model, lambda n: (torch.randint(2, 200, (n, 20)),)
    if name == "tabular":
        model = TabularModel([(10, 6), (7, 5)], 4, 3, layers=[64, 32])
        return model, lambda n: (torch.randint(0, 7, (n, 2)), torch.randn(n, 4))
    if kind == "vision":
        if rest in TIMM_BODIES:
            model, _ = vision.create_timm_model(rest, 5, pretrained=False)
            return model, images(3, 64, 64)
        arch = getattr(vision, rest)
        return vision.create_vision_model(arch, 5, pretrained=False), images(3, 64, 64)
    if kind == "unet":
        arch = getattr(vision, rest)
        return vision.create_unet_model(arch, 4, (64, 64), pretrained=False), images(3, 64, 64)
    return getattr(vision, name)(n_out=10), images(3, 64, 64)


def torchvision_names():
    from torchvision import models

    return [n for n in models.list_models() if "quantized" not in n and n not in GIANTS]


def torchvision(name):
    from torchvision import models

    module = inspect.getmodule(models.get_model_builder(name)).__name__
    known = {"weights": None}
    if "detection" in module or "segmentation" in module:
        known["weights_backbone"] = None
    if "detection" in module and "ssd" not in name:
        known |= {"min_size": 128, "max_size": 160}
    if "detection" in module:  # without a threshold random weights find something, too
        known |= {"box_score_thresh" if "rcnn" in name else "score_thresh": 0.0}
    if name in ("googlenet", "inception_v3"):
        known["init_weights"] = False
    model = models.get_model(name, **known)
    if "detection" in module:
        return model, detection
    if "optical_flow" in module:
        return model, lambda n: (torch.rand(n, 3, 128, 128), torch.rand(n, 3, 128, 128))
    if "video" in module:
        shape = (
            (3, 16, 224, 224)
            if "mvit" in name
            else (3, 16, 112, 112)
            if "s3d" not in name
            else (3, 16, 224, 224)
        )
        return model, images(*shape)
    if "segmentation" in module:
        return model, images(3, 64, 64)
    size = (
        299
        if "inception" in name
        else 224
        if any(k in name for k in ("vit", "swin", "max"))
        else 96
    )
    return model, images(3, size, size)


def detection(n):
    return ([torch.rand(3, 128, 128) for _ in range(n)],)


def detection_targets(n):
    one = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    one["masks"] = torch.ones(1, 128, 128, dtype=torch.uint8)
    one["keypoints"] = torch.rand(1, 17, 3)
    return [dict(one) for _ in range(n)]


SMALL = """test_ atto femto pico nano xxs xx_small _n_ tiny _t xs x_small mini
    small _s_ lite 050 018 18
    t0 b0 _0"""


def timm_names():
    """One small model of every module file of timm.models."""
    import timm
    import timm.models

    found = {}
    for module in pkgutil.iter_modules(timm.models.__path__):
        names = timm.list_models(module=module.name)
        if names and not module.name.startswith("_"):
            found[module.name] = min(names, key=_smallness)
    return list(found.values())


def _smallness(name):
    marks = SMALL.split()
    rank = next((i for i, m in enumerate(marks) if m in name), len(marks))
    return rank, len(name), name


def timm(name):
    import timm as lib

    model = lib.create_model(name, pretrained=False)
    config = model.default_cfg
    channels, size, _ = config["input_size"]
    if size > 128:
        size = _smaller(model, config, channels) or size
    return model, images(channels, size, size)


def _smaller(model, config, channels):
    """A smaller image that the network takes, if any."""
    smallest = (config.get("min_input_size") or (3, 0, 0))[1]
    if config.get("fixed_input_size"):
        return None
    for size in sorted({max(128, smallest), max(224, smallest)}):
        try:
            with torch.no_grad():
                model.eval()(torch.randn(1, channels, size, size))
            return size
        except Exception:
            continue
    return None


TRANSFORMERS = [
    "bert",
    "distilbert",
    "roberta",
    "electra",
    "vit",
    "deit",
    "beit",
    "dinov2",
    "swin",
    "convnext",
    "resnet",
    "segformer",
    "gpt2",
    "llama",
    "qwen2",
    "opt",
    "t5",
    "whisper",
    "clip",
    "mistral",
]


def transformers(name):
    import transformers as hf

    text = {"vocab_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = dict(text, hidden_size=64, intermediate_size=128)
    image = {"image_size": 32, "patch_size": 8}
    vit = dict(
        image, num_hidden_layers=2, num_attention_heads=4, hidden_size=64, intermediate_size=128
    )
    decoder = dict(bert, num_key_value_heads=2)
    pixels, ids = images(3, 32, 32), lambda n: (torch.randint(3, 200, (n, 12)),)
    kinds = {
        "bert": ("BertForSequenceClassification", bert, ids),
        "distilbert": (
            "DistilBertForSequenceClassification",
            {"vocab_size": 200, "dim": 64, "n_heads": 4, "n_layers": 2, "hidden_dim": 128},
            ids,
        ),
        "roberta": ("RobertaForSequenceClassification", bert, ids),
        "electra": ("ElectraForSequenceClassification", dict(bert, embedding_size=32), ids),
        "vit": ("ViTForImageClassification", vit, pixels),
        "deit": ("DeiTForImageClassification", vit, pixels),
        "beit": ("BeitForImageClassification", vit, pixels),
        "dinov2": (
            "Dinov2ForImageClassification",
            dict(vit, mlp_ratio=2),
            pixels,
        ),
        "swin": (
            "SwinForImageClassification",
            dict(
                image_size=64,
                patch_size=4,
                embed_dim=32,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
            ),
            images(3, 64, 64),
        ),
        "convnext": (
            "ConvNextForImageClassification",
            dict(hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 2, 1]),
            images(3, 64, 64),
        ),
        "resnet": (
            "ResNetForImageClassification",
            dict(hidden_sizes=[32, 64, 64, 128], depths=[1, 1, 1, 1], embedding_size=32),
            images(3, 64, 64),
        ),
        "segformer": (
            "SegformerForImageClassification",
            dict(
                hidden_sizes=[16, 32, 32, 64],
                depths=[1, 1, 1, 1],
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=32,
            ),
            images(3, 64, 64),
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            dict(vocab_size=200, n_embd=64, n_layer=2, n_head=4, n_positions=64),
            ids,
        ),
        "llama": ("LlamaForCausalLM", decoder, ids),
        "qwen2": ("Qwen2ForCausalLM", decoder, ids),
        "mistral": ("MistralForCausalLM", dict(decoder, tie_word_embeddings=True), ids),
        "opt": (
            "OPTForCausalLM",
            dict(
                vocab_size=200,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=128,
                word_embed_proj_dim=64,
                max_position_embeddings=64,
            ),
            ids,
        ),
        "t5": (
            "T5ForConditionalGeneration",
            dict(vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
            lambda n: {
                "input_ids": torch.randint(3, 200, (n, 12)),
                "decoder_input_ids": torch.randint(3, 200, (n, 7)),
            },
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            dict(
                vocab_size=200,
                d_model=64,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=128,
                decoder_ffn_dim=128,
                max_source_positions=50,
                num_mel_bins=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            ),
            lambda n: {
                "input_features": torch.randn(n, 16, 100),
                "decoder_input_ids": torch.randint(3, 200, (n, 7)),
            },
        ),
        "clip": (
            "CLIPModel",
            dict(
                text_config=dict(bert, max_position_embeddings=32, eos_token_id=1),
                vision_config=vit,
                projection_dim=32,
            ),
            lambda n: {
                "input_ids": torch.randint(3, 200, (n, 12)),
                "pixel_values": torch.randn(n, 3, 32, 32),
            },
        ),
    }
    kind, config, inputs = kinds[name]
    kind = getattr(hf, kind)
    return kind(kind.config_class(**config)), inputs


LIBRARIES: dict[str, Callable] = {
    "fastai": fastai,
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
}


def names(library):
    if library == "torchvision":
        return torchvision_names()
    if library == "timm":
        return timm_names()
    return FASTAI if library == "fastai" else TRANSFORMERS


def build(library, name):
    torch.manual_seed(0)
    model, inputs = LIBRARIES[library](name)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():  # a head that begins at zero hides all before it
            torch.nn.init.normal_(p, std=0.02)
    return model.eval(), inputs


def preload(library):
    """Import once what the networks of a library need, before processes are forked."""
    for module in {
        "fastai": ["fastai.vision.all", "fastai.text.models.core", "fastai.tabular.model"],
        "torchvision": ["torchvision"],
        "timm": ["timm"],
        "transformers": ["transformers"],
    }[library]:
        importlib.import_module(module)
