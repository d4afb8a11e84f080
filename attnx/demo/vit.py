"""The demo network: a small vision transformer that classifies the coloured shape of a scene."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attnx.demo.scenes import CLASSES

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

    from attnx.models.loaded import Loaded

IMAGE_SIZE = 96
PATCH_SIZE = 8
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
WEIGHTS = Path(__file__).with_name("weights.safetensors")


def load_demo_vit(pretrained: bool = True, image_size: tuple[int, int] | None = None) -> Loaded:
    """The network with the preprocessing of its images. image_size: (height, width); None: 96 x 96."""
    from attnx.models.timm import with_timm_config

    return with_timm_config("demo", demo_model(pretrained=pretrained), image_size)


def demo_model(pretrained: bool = True) -> VisionTransformer:
    """Build the network in eval mode: images [B, 3, 96, 96] to logits [B, len(CLASSES)], float32.

    pretrained: load the bundled weights; otherwise the weights are random (torch's global generator).
    The preprocessing is in ``model.pretrained_cfg``, as in timm's own models.
    """
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_classes=len(CLASSES),
        global_pool="token",
        embed_dim=96,
        depth=4,
        num_heads=6,
        mlp_ratio=3.0,
        class_token=True,
        dynamic_img_size=True,
    )
    config: dict[str, object] = {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": len(CLASSES),
    }
    # timm reads a dict here, too; its type names only PretrainedCfg.
    model.pretrained_cfg = config  # type: ignore[assignment]
    if pretrained:
        from safetensors.torch import load_file

        model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval()
