"""The zoo: every torchvision classification model and timm architectures from many families, with image sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from vision import timm, torchvision

CLASSES = 10


@dataclass(frozen=True)
class Entry:
    """One architecture: how to build it with random weights, and the images it is tried on."""

    name: str
    library: str
    build: Callable
    size: int
    batch: int = 2
    options: dict = field(default_factory=dict)

    def model(self):
        torch.manual_seed(0)
        return self.build(self.name, num_classes=CLASSES, **self.options)

    def __str__(self):
        return f"{self.library}-{self.name}"


# ---- torchvision ---------------------------------------------------------------------------------------------------

# The smallest image a model takes; 64 where any size will do, and more for the deepest, which batch norm over few
# values makes too sensitive to compare anything.
TORCHVISION_SIZES = {
    "alexnet": 63, "googlenet": 128, "inception_v3": 107, "maxvit_t": 224, "vit_b_16": 32, "vit_l_16": 32,
    "vit_h_14": 28, "vgg": 32, "squeezenet": 47, "swin": 32, "convnext": 32, "regnet_x": 96,
}  # fmt: skip


def _torchvision_entry(name):
    size = next((s for prefix, s in TORCHVISION_SIZES.items() if name.startswith(prefix)), 64)
    options = {"weights": None}
    if name == "inception_v3":
        options |= {"aux_logits": False, "init_weights": False}  # the auxiliary head needs 299 pixels
    if name == "googlenet":
        options |= {"init_weights": False}
    if name.startswith("vit"):
        options |= {"image_size": size}
    return Entry(name, "torchvision", torchvision.models.get_model, size, options=options)


TORCHVISION = [_torchvision_entry(name) for name in torchvision.models.list_models(module=torchvision.models)]

# ---- timm ----------------------------------------------------------------------------------------------------------

# One or two members of each family with convolutions, the smaller ones: name -> image size, or (size, options).
TIMM_SIZES = {
    "resnet18d": 64, "resnet26t": 64, "seresnext26d_32x4d": 64, "ecaresnet26t": 64, "resnetblur18": 64,
    "resnetv2_50x1_bit": 64, "skresnet18": 64, "resnest14d": 64, "res2net50_26w_4s": 64, "selecsls42b": 96,
    "tf_efficientnet_b0": 64, "efficientnet_es": 64, "mixnet_s": 64, "fbnetc_100": 64, "mnasnet_small": 64,
    "mobilenetv3_small_100": 64, "tf_mobilenetv3_small_minimal_100": 64, "mobilenetv4_conv_small": 64,
    "ghostnet_100": 64, "lcnet_050": 64, "tinynet_e": 64, "hardcorenas_a": 64, "spnasnet_100": 64, "regnetx_002": 64,
    "regnety_002": 64, "repvgg_a0": 64, "mobileone_s0": 64, "repghostnet_050": 64, "repvit_m0_9": 64,
    "densenet121": 64, "dla34": 64, "dla46x_c": 64, "dpn48b": 64, "inception_v4": 107, "inception_resnet_v2": 107,
    "xception41p": 64, "legacy_xception": 75, "nasnetalarge": 96, "pnasnet5large": 96, "hrnet_w18_small": 64,
    "cspresnet50": 64, "cspdarknet53": 64, "darknet53": 64, "vovnet39a": 64, "ese_vovnet19b_dw": 64, "rexnet_100": 64,
    "nf_regnet_b0": 64, "dm_nfnet_f0": 64, "eca_nfnet_l0": 64, "gernet_s": 64, "bat_resnext26ts": 256,
    "eca_botnext26ts_256": (256, {}), "convnext_atto": 32, "convnextv2_atto": 32, "inception_next_atto": 32,
    "convmixer_768_32": 56, "poolformer_s12": 64, "caformer_s18": 64, "edgenext_xx_small": 64, "fasternet_t0": 64,
    "starnet_s1": 64, "hgnet_tiny": 64, "mambaout_femto": 64, "rdnet_tiny": 64, "lcnet_100": 64, "mobilevit_xxs": 64,
    "mobilevitv2_050": 64, "efficientvit_b0": 64, "efficientvit_m0": (224, {}), "fastvit_t8": 64, "swiftformer_xs": 64,
    "shvit_s1": 128, "efficientformer_l1": (224, {}), "efficientformerv2_s0": (224, {}),
    "coat_tiny": (64, {"img_size": 64}), "levit_128s": (224, {}), "convit_tiny": (32, {"img_size": 32}),
    "pvt_v2_b0": 64, "visformer_tiny": (64, {"img_size": 64}), "twins_svt_small": (224, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32}), "vit_tiny_r_s16_p8_224": (64, {"img_size": 64}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32}), "mixer_s32_224": (64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56}), "focalnet_tiny_srf": 64, "nest_tiny": (224, {}),
    "maxvit_rmlp_pico_rw_256": (256, {}), "coatnet_pico_rw_224": (64, {"img_size": 64}), "tiny_vit_5m_224": (224, {}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32}), "crossvit_tiny_240": (240, {}), "tresnet_m": 64,
}  # fmt: skip


def _timm_entry(name, size):
    size, options = size if isinstance(size, tuple) else (size, {})
    return Entry(name, "timm", timm.create_model, size, options=options)


TIMM = [_timm_entry(name, size) for name, size in TIMM_SIZES.items()]
ALL = TORCHVISION + TIMM

# Seconds each rather than fractions: left to `make zoo`, a smaller sister of each is in `make test`.
LARGE = {
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "densenet161", "densenet169", "densenet201",
    "efficientnet_b2", "efficientnet_b3", "efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_b7",
    "efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s", "maxvit_t", "mnasnet0_75", "mnasnet1_0",
    "regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_800mf", "regnet_x_8gf",
    "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf", "regnet_y_800mf",
    "regnet_y_8gf", "resnet101", "resnet152", "resnet34", "resnext101_32x8d", "resnext101_64x4d", "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0", "swin_b", "swin_s", "swin_v2_b", "swin_v2_s", "vgg11", "vgg13", "vgg13_bn", "vgg16",
    "vgg16_bn", "vgg19", "vgg19_bn", "vit_b_16", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2",
    "wide_resnet50_2", "dm_nfnet_f0", "eca_botnext26ts_256", "bat_resnext26ts", "inception_resnet_v2", "nest_tiny",
    "nasnetalarge", "pnasnet5large", "twins_svt_small", "crossvit_tiny_240",
}  # fmt: skip
