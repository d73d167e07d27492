"""The architectures that are compressed: how each is built, with random weights, and what it is called with."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.analysis.trace import ExampleInput

LARGEST = 100_000_000
"""Parameters above which only a sample of the models is built."""
SAMPLE = ("vgg11", "wide_resnet101_2", "convnext_large")
SIZES = (96, 128, 160, 192, 224)
"""Sides of the square images that are tried in turn, then the model's own."""

TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1 eca_botnext26ts_256 lambda_resnet26t botnet26t_256",
    "byobnet": "mobileone_s1 mobileone_s0 gernet_s repvgg_a0",
    "cait": "cait_xxs24_224 cait_xxs36_224",
    "coat": "coat_tiny coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32 convmixer_1024_20_ks9_p14",
    "convnext": "convnext_zepto_rms convnext_atto_rms convnextv2_atto",
    "cpubone": "cpubone_nano cpubone_t0",
    "crossvit": "crossvit_tiny_240 crossvit_9_240",
    "cspnet": "cs3darknet_focus_s cs3darknet_focus_m cspresnet50",
    "cspnext": "cspnext_tiny cspnext_s",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224 deit_small_patch16_224",
    "densenet": "densenet121 densenet169",
    "dla": "dla46x_c dla46_c",
    "dpn": "dpn48b dpn68",
    "edgenext": "edgenext_xx_small edgenext_x_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0 efficientformerv2_s1",
    "efficientnet": "mobilenetv2_035 mobilenetv2_050 tf_efficientnet_b0"
    " mixnet_s tf_efficientnet_cc_b0_4e efficientnet_b0_gn spnasnet_100 mnasnet_100 fbnetc_100 tinynet_e semnasnet_075",
    "efficientvim": "efficientvim_m1 efficientvim_m1_dist",
    "efficientvit_mit": "efficientvit_b0 efficientvit_b1",
    "efficientvit_msra": "efficientvit_m0 efficientvit_m1",
    "eva": "vit_tiny_patch16_dinov3_qkvb eva02_tiny_patch14_336",
    "fasternet": "fasternet_t0 fasternet_t1",
    "fastvit": "fastvit_t8 fastvit_t12",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny gcvit_xtiny",
    "ghostnet": "ghostnet_050 ghostnetv3_050",
    "hardcorenas": "hardcorenas_b hardcorenas_c",
    "hgnet": "hgnetv2_b0 hgnetv2_b1",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small hrnet_w18_small_v2",
    "iformer": "iformer_t iformer_s",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small lcnetv2_base",
    "levit": "levit_128s levit_128",
    "lowformer": "lowformer_b0 lowformer_b1",
    "mambaout": "mambaout_femto mambaout_kobe",
    "maxxvit": "maxvit_pico_rw_256 coatnet_pico_rw_224 coatnet_nano_rw_224",
    "metaformer": "poolformerv2_s12 poolformerv2_s24",
    "mlp_mixer": "gmlp_ti16_224 gmixer_12_224 mixer_s32_224",
    "mobilenetv3": "mobilenetv3_small_050 lcnet_050 mobilenetv4_conv_small",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0 nf_regnet_b1 nf_resnet26",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0 pvt_v2_b1",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002",
    "repghost": "repghostnet_050 repghostnet_058",
    "repvit": "repvit_m1 repvit_m1_0",
    "res2net": "res2next50 res2net50_26w_4s",
    "resnest": "resnest14d resnest26d",
    "resnet": "resnet10t resnet14t seresnext26d_32x4d ecaresnet26t resnet18 resnext50_32x4d wide_resnet50_2",
    "resnetv2": "resnetv2_18 resnetv2_34 resnetv2_50x1_bit",
    "rexnet": "rexnet_100 rexnet_130",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1 shvit_s2",
    "sknet": "skresnet18 skresnet34",
    "starnet": "starnet_s050 starnet_s100",
    "swiftformer": "swiftformer_xs swiftformer_s",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224 tiny_vit_11m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224 vit_xsmall_patch16_clip_224 vit_base_patch32_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw ese_vovnet19b_slim",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224 xcit_tiny_12_p8_224",
}
"""Module of timm to some of its models: the smallest, and others where they differ in kind."""

_BERT = {
    "vocab_size": 300,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 64,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2}
_VIT = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "image_size": 64,
    "patch_size": 16,
}
_T5 = {"vocab_size": 300, "d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4}
_BART = {
    "vocab_size": 300,
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "decoder_ffn_dim": 192,
}
_WHISPER = {**_BART, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 40, "pad_token_id": 0}
_WAV2VEC2 = {
    **_BERT,
    "conv_dim": (48, 48, 48),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
_MAMBA = {"vocab_size": 300, "hidden_size": 96, "num_hidden_layers": 2, "state_size": 8}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}

TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "albert": ("AlbertModel", {**_BERT, "embedding_size": 48}, "tokens"),
    "bart": ("BartModel", _BART, "tokens both"),
    "beit": ("BeitModel", _VIT, "image"),
    "bert": ("BertModel", _BERT, "tokens"),
    "bert masked language model": ("BertForMaskedLM", _BERT, "tokens"),
    "bloom": ("BloomForCausalLM", {"vocab_size": 300, "hidden_size": 96, "n_layer": 2, "n_head": 4}, "tokens"),
    "clip": ("CLIPModel", {"text_config": _BERT, "vision_config": _VIT, "projection_dim": 48}, "image and tokens"),
    "convnext": ("ConvNextModel", {"hidden_sizes": [24, 48, 96, 96], "depths": [1, 1, 2, 1]}, "image"),
    "deberta v2": ("DebertaV2Model", _BERT, "tokens"),
    "distilbert": (
        "DistilBertModel",
        {"vocab_size": 300, "dim": 96, "n_layers": 2, "n_heads": 4, "hidden_dim": 192},
        "tokens",
    ),
    "electra": ("ElectraModel", {**_BERT, "embedding_size": 48}, "tokens"),
    "falcon": ("FalconForCausalLM", _BERT, "tokens"),
    "gemma": ("GemmaForCausalLM", {**_LLAMA, "head_dim": 24}, "tokens"),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 300, "n_embd": 96, "n_layer": 2, "n_head": 4}, "tokens"),
    "gpt neox": ("GPTNeoXForCausalLM", _BERT, "tokens"),
    "hubert": ("HubertModel", _WAV2VEC2, "audio"),
    "llama": ("LlamaForCausalLM", _LLAMA, "tokens"),
    "mamba": ("MambaForCausalLM", _MAMBA, "tokens"),
    "mamba 2": (
        "Mamba2ForCausalLM",
        {**_MAMBA, "num_heads": 8, "head_dim": 24, "n_groups": 2, "chunk_size": 8},
        "tokens",
    ),
    "mistral": ("MistralForCausalLM", _LLAMA, "tokens"),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}, "tokens"),
    "opt": (
        "OPTForCausalLM",
        {
            "vocab_size": 300,
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 192,
            "word_embed_proj_dim": 48,
        },
        "tokens",
    ),
    "phi": ("PhiForCausalLM", _BERT, "tokens"),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA, "tokens"),
    "qwen2 moe": ("Qwen2MoeForCausalLM", {**_LLAMA, **_MOE, "num_experts": 4}, "tokens"),
    "roberta": ("RobertaModel", _BERT, "tokens"),
    "segformer": ("SegformerForSemanticSegmentation", {"hidden_sizes": [16, 32, 64, 96]}, "image"),
    "siglip": ("SiglipModel", {"text_config": _BERT, "vision_config": _VIT}, "image and tokens"),
    "swin": ("SwinModel", {"image_size": 64, "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4]}, "image"),
    "t5": ("T5ForConditionalGeneration", _T5, "tokens both"),
    "vit": ("ViTForImageClassification", _VIT, "image"),
    "wav2vec2": ("Wav2Vec2ForCTC", _WAV2VEC2, "audio"),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER, "spectrogram"),
    "xlnet": (
        "XLNetLMHeadModel",
        {"vocab_size": 300, "d_model": 96, "n_layer": 2, "n_head": 4, "d_inner": 192},
        "tokens",
    ),
}
"""Name to class, settings of its configuration, and what it is called with."""


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        library: "torchvision", "timm" or "transformers".
        name: What the library calls it; for transformers a key of `TRANSFORMERS`.
        family: The module of the library that it is from.
    """

    library: str
    name: str
    family: str


@dataclass(frozen=True)
class Specimen:
    """A built model.

    Attributes:
        model: In eval mode, with random weights.
        example: Arguments of its forward pass.
        heads: Submodules whose outputs are compared too, as the model's own depend on which boxes it finds.
    """

    model: nn.Module
    example: ExampleInput
    heads: tuple[str, ...] = ()


def list_entries(libraries: list[str]) -> list[Entry]:
    """Returns every architecture of some libraries, in a fixed order."""
    listed: dict[str, Callable[[], list[Entry]]] = {
        "torchvision": _list_torchvision,
        "timm": lambda: [Entry("timm", name, family) for family, names in TIMM.items() for name in names.split()],
        "transformers": lambda: [Entry("transformers", name, name.split()[0]) for name in TRANSFORMERS],
    }
    return [entry for library in libraries for entry in listed[library]()]


def build(entry: Entry, seed: int = 0) -> Specimen:
    """Returns an architecture with random weights; the global random state is that of the seed afterwards."""
    torch.manual_seed(seed)
    makers = {"torchvision": _build_torchvision, "timm": _build_timm, "transformers": _build_transformers}
    specimen = makers[entry.library](entry)
    specimen.model.eval()
    _wake(specimen.model)
    return specimen


def _wake(model: nn.Module) -> None:
    """Draws anew, from N(0, 0.1²), every parameter that is constant and near 0.

    Many networks start with branches, heads or biases of zero, behind which no difference would show.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.detach().flatten()
            if parameter.is_floating_point() and len(flat) and abs(flat[0]) <= 0.01 and bool((flat == flat[0]).all()):  # noqa: PLR2004
                parameter.normal_(0.0, 0.1)


def _list_torchvision() -> list[Entry]:
    models: Any = importlib.import_module("torchvision.models")
    entries = []
    for name in models.list_models():
        parts = models.get_model_builder(name).__module__.split(".")
        family = parts[2] if len(parts) > 3 else parts[-1]  # noqa: PLR2004
        size = models.get_model_weights(name).DEFAULT.meta["num_params"]
        if family != "quantization" and (size <= LARGEST or name in SAMPLE):
            entries.append(Entry("torchvision", name, family))
    return entries


def _build_torchvision(entry: Entry) -> Specimen:
    models: Any = importlib.import_module("torchvision.models")
    settings: dict[str, Any] = {"weights": None}
    if entry.family in {"detection", "segmentation"}:
        settings["weights_backbone"] = None
    if entry.name in {"googlenet", "inception_v3"}:
        settings["init_weights"] = False
    if "rcnn" in entry.name:
        settings.update(min_size=96, max_size=128, box_score_thresh=0.0, box_detections_per_img=4)
    elif entry.family == "detection" and "ssd" not in entry.name:
        settings.update(min_size=96, max_size=128)
    model = models.get_model(entry.name, **settings).eval()
    if entry.family == "detection":
        heads = ("backbone", "rpn.head" if "rcnn" in entry.name else "head")
        return Specimen(model, ([torch.rand(3, 96, 128)],), heads)
    if entry.family == "optical_flow":
        return Specimen(model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)))
    if entry.family == "video":
        frames = 16 if "mvit" in entry.name or entry.name == "s3d" else 4
        return Specimen(model, _image_for(model, 224, (3, frames)))
    return Specimen(model, _image_for(model, 224, (3,)))


def _build_timm(entry: Entry) -> Specimen:
    timm: Any = importlib.import_module("timm")
    model = timm.create_model(entry.name, pretrained=False).eval()
    channels, *_, side = model.pretrained_cfg.get("input_size", (3, 224, 224))
    return Specimen(model, _image_for(model, side, (channels,)))


def _image_for(model: nn.Module, own: int, leading: tuple[int, ...]) -> Tensor:
    """Returns an image, or a clip, of the smallest size that the model takes."""
    for side in dict.fromkeys((*(side for side in SIZES if side < own), own)):
        image = torch.randn(1, *leading, side, side)
        try:
            with torch.no_grad():
                model(image)
        except Exception:
            if side == own:
                raise
        else:
            return image
    raise AssertionError


def _build_transformers(entry: Entry) -> Specimen:
    transformers: Any = importlib.import_module("transformers")
    class_name, settings, kind = TRANSFORMERS[entry.name]
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**settings)).eval()
    tokens, image = torch.randint(3, 290, (1, 12)), torch.randn(1, 3, 64, 64)
    inputs: Mapping[str, dict[str, Tensor]] = {
        "tokens": {"input_ids": tokens},
        "tokens both": {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]},
        "image": {"pixel_values": image},
        "image and tokens": {"input_ids": tokens, "pixel_values": image},
        "audio": {"input_values": torch.randn(1, 1600)},
        "spectrogram": {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": tokens[:, :7]},
    }
    return Specimen(model, inputs[kind])


@contextlib.contextmanager
def recorded(model: nn.Module, names: tuple[str, ...]) -> Iterator[list[Any]]:
    """Collects the outputs of some submodules while the context lasts."""
    found: list[Any] = []
    handles = [model.get_submodule(n).register_forward_hook(lambda *call: found.append(call[-1])) for n in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
