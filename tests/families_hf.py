"""Tiny models of the families of Hugging Face transformers, from the real classes, with random weights."""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A family of models. `build` returns a model and the keyword arguments of its call."""

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    images_only: bool = False  # the call is model(pixel_values) and nothing else
    classes: bool = False  # its output has .logits [B, classes] for images


# Sizes that most configurations share.
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}  # 16 patches
TOKENS = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TEXT = SMALL | TOKENS | {"max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}  # a decoder whose heads share keys and values
PYRAMID = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
BART = TOKENS | {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
CLASSES = frozenset(dir(transformers))  # listing them takes a second
MARK = 98  # the token that stands for an image's features in a prompt


def sharpen(model: nn.Module) -> nn.Module:
    """Draw weights such that the attention is far from uniform and the outputs stay finite."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                std = 1.7 * math.sqrt(p.shape[0] / p.numel())  # 0.3 for rows of 32 numbers
                p.copy_(torch.randn(p.shape, generator=generator) * std)
            elif (
                "gate" in name.rsplit(".", 1)[-1] or "alpha" in name
            ):  # a closed gate would remove the attention from the output
                p.fill_(0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # MobileViT's weights of 0.02 would make all activations 0
            module.reset_parameters()
            nn.init.constant_(module.weight, 0.75)
    return model.eval()


def model_of(cls: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, cls)
    return sharpen(
        kind._from_config(kind.config_class(**copy.deepcopy(config)))
    )  # some configurations change their arguments


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def images(size: int = 32) -> Inputs:
    return {"pixel_values": normal(2, 3, size, size)}


def words(length: int = 8, *, marks: int = 0) -> Inputs:
    """Token ids and their mask. The last item ends in padding; `marks` image tokens follow the first token."""
    ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[-1, -2:], mask[-1, -2:] = 1, 0
    image = torch.full((2, marks), MARK)
    ids = torch.cat([ids[:, :1], image, ids[:, 1:]], 1)
    return {"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(image), mask], 1)}


def decoder(length: int = 5) -> Inputs:
    return {"decoder_input_ids": words(length)["input_ids"]}


def phrases() -> Inputs:
    """Two phrases in Grounding DINO's format: delimited by BERT's [CLS], full stop and [SEP]."""
    ids = torch.tensor([[101, 5, 6, 1012, 7, 8, 9, 102], [101, 15, 1012, 16, 17, 18, 19, 102]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def known(*classes: str) -> bool:
    """True if this version of transformers has the classes. Their modules are not imported."""
    return CLASSES.issuperset(classes)


def family(name: str, cls: str, inputs: Callable[[], Inputs], **config: Any) -> Family | None:
    return Family(f"HF {name}", lambda: (model_of(cls, **config), inputs())) if known(cls) else None


def seen(name: str, cls: str, size: int = 32, **config: Any) -> Family | None:
    """A family whose model takes images and nothing else."""
    if not known(cls):
        return None
    classes = cls.endswith("ForImageClassification")
    return Family(f"HF {name}", lambda: (model_of(cls, **config), images(size)), images_only=True, classes=classes)


def read(name: str, cls: str, **config: Any) -> Family | None:
    return family(name, cls, words, **(TEXT | config))


def both(
    name: str, cls: str, *, length: int = 8, text: Inputs | None = None, vision: Inputs | None = None, **config: Any
) -> Family | None:
    """A family with a text encoder and an image encoder."""
    config = {"text_config": TEXT | (text or {}), "vision_config": IMAGE | (vision or {})} | config
    return family(name, cls, lambda: words(length) | images(), **config)


def talks(
    name: str,
    cls: str,
    text: str,
    vision: Inputs,
    *,
    marks: int = 16,
    size: int = 32,
    inputs: Callable[[], Inputs] | None = None,
    extra: Inputs | None = None,
    **config: Any,
) -> Family | None:
    """A language model whose prompt has image tokens. `inputs` returns its arguments other than the tokens."""
    config = {
        "text_config": GROUPED | {"model_type": text} | (extra or {}),
        "vision_config": vision,
        "image_token_id": MARK,
    } | config
    return family(name, cls, lambda: words(marks=marks) | (inputs or (lambda: images(size)))(), **config)


def qwen(name: str, cls: str, text: str, **vision: Any) -> Family | None:
    """The Qwen VL models: patches in rows, merged four by four, and rotary positions in three parts."""

    def build() -> tuple[nn.Module, Inputs]:
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        common = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
        model = model_of(
            cls,
            text_config=GROUPED | {"model_type": text, "rope_scaling": rope, "rope_theta": 10000.0},
            vision_config=common | vision,
            image_token_id=MARK,
            video_token_id=97,
            vision_start_token_id=96,
            vision_end_token_id=95,
        )
        inputs = words(marks=4) | {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        inputs["pixel_values"] = normal(2 * 16, 3 * 2 * 8 * 8)
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == MARK).int()
        return model, inputs

    return Family(f"HF {name}", build) if known(cls) else None


def pair(name: str, encoder: tuple[str, Inputs], decoder_: tuple[str, Inputs]) -> Family | None:
    """A VisionEncoderDecoderModel of an encoder of images and a decoder of text."""

    def build() -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        parts = [
            getattr(transformers, cls)._from_config(getattr(transformers, cls).config_class(**copy.deepcopy(config)))
            for cls, config in (encoder, decoder_)
        ]
        model = transformers.VisionEncoderDecoderModel(encoder=parts[0], decoder=parts[1])
        return sharpen(model), images() | decoder()

    return Family(f"HF {name}", build) if known(encoder[0], decoder_[0]) else None


def boxes(length: int) -> torch.Tensor:
    """Boxes of words on a page, [2, length, 4], each with its corners in order."""
    corners = torch.randint(0, 30, (2, length, 2), generator=torch.Generator().manual_seed(3))
    return torch.cat([corners, corners + 5], -1)


def video(frames: int, size: int = 32) -> Inputs:
    return {"pixel_values": normal(2, frames, 3, size, size)}


CLIP_VISION = IMAGE | {"model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP_VISION = IMAGE | {"model_type": "siglip_vision_model"}
QFORMER = TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 1}
OPT = TEXT | {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32}
SWIN = PYRAMID | {"model_type": "swin"}
STAGES = SWIN | {"depths": [1] * 4, "num_heads": [2] * 4, "embed_dim": 8, "image_size": 64}
DETR = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
DETR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 6}
DETR |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
TIED = {"backbone_config": RESNET | {"out_features": ["stage4"]}}

# fmt: off
_ROWS = [
    # Encoders of images.
    seen("ViT", "ViTModel", **IMAGE),
    seen("ViT classifier", "ViTForImageClassification", **IMAGE, num_labels=5),
    seen("DeiT", "DeiTModel", **IMAGE),
    seen("DeiT classifier", "DeiTForImageClassification", **IMAGE, num_labels=5),
    seen("CLIP vision", "CLIPVisionModel", **IMAGE),
    seen("SigLIP vision", "SiglipVisionModel", **IMAGE),
    seen("DINOv2", "Dinov2Model", **IMAGE),
    seen("DINOv2 with registers", "Dinov2WithRegistersModel", **IMAGE, num_register_tokens=4),
    seen("DINOv3 ViT", "DINOv3ViTModel", **IMAGE, num_register_tokens=4),
    seen("BEiT", "BeitModel", **IMAGE),
    seen("BEiT with relative positions", "BeitForImageClassification", **IMAGE, use_relative_position_bias=True,
        num_labels=5),
    seen("Data2Vec vision", "Data2VecVisionModel", **IMAGE, use_relative_position_bias=True),
    seen("ViT MSN", "ViTMSNModel", **IMAGE),
    seen("I-JEPA", "IJepaModel", **IMAGE),
    seen("YOLOS", "YolosModel", **IMAGE | {"image_size": [32, 32], "num_detection_tokens": 4}),
    seen("Swin", "SwinModel", **PYRAMID),
    seen("Swin v2", "Swinv2Model", **PYRAMID),
    seen("Hiera", "HieraModel", 64, embed_dim=16, image_size=[64, 64], patch_size=[7, 7], patch_stride=[4, 4],
        patch_padding=[3, 3], depths=[1, 1, 1], num_heads=[1, 2, 4], num_query_pool=2, masked_unit_size=[8, 8]),
    seen("PVT v2", "PvtV2Model", 64, image_size=64, num_encoder_blocks=4, depths=[1] * 4, hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 4], sr_ratios=[8, 4, 2, 1], mlp_ratios=[2] * 4),
    seen("MobileViT", "MobileViTModel", 64, image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], num_attention_heads=4),
    seen("SegFormer", "SegformerForSemanticSegmentation", 64, depths=[1] * 4, hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32, num_labels=5),
    seen("DPT", "DPTForDepthEstimation", **IMAGE, backbone_out_indices=[0, 1], fusion_hidden_size=16,
        neck_hidden_sizes=[8, 16], reassemble_factors=[2, 1], neck_ignore_stages=[], is_hybrid=False),
    seen("Depth Anything", "DepthAnythingForDepthEstimation", 32, patch_size=8, reassemble_hidden_size=32,
        backbone_config=IMAGE | {"model_type": "dinov2", "out_indices": [1, 2], "reshape_hidden_states": False},
        neck_hidden_sizes=[8, 16], reassemble_factors=[2, 1], fusion_hidden_size=16, head_hidden_size=8),
    family("ViT MAE", "ViTMAEModel", lambda: images() | {"noise": normal(2, 16)}, **IMAGE),
    family("ViT MAE pretraining", "ViTMAEForPreTraining", lambda: images() | {"noise": normal(2, 16)}, **IMAGE,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=64),
    family("SigLIP 2 vision", "Siglip2VisionModel", lambda: {"pixel_values": normal(2, 16, 192),
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
        "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [12]])).long()}, **SMALL, patch_size=8,
        num_patches=16),
    seen("TimmWrapper", "TimmWrapperForImageClassification", architecture="vit_tiny_patch16_224", num_labels=5,
        model_args={"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4}),
    # Videos.
    family("VideoMAE", "VideoMAEModel", lambda: video(4), **IMAGE, num_frames=4),
    family("TimeSformer", "TimesformerModel", lambda: video(2), **IMAGE, num_frames=2),
    family("ViViT", "VivitModel", lambda: video(4), **IMAGE, num_frames=4, tubelet_size=[2, 8, 8]),
    # Detection and segmentation.
    seen("DETR", "DetrModel", 64, **DETR, **TIED),
    seen("Deformable DETR", "DeformableDetrModel", 64, **DETR, num_feature_levels=2, disable_custom_kernels=True,
        backbone_config=RESNET | {"out_features": ["stage3", "stage4"]}),
    seen("RT-DETR", "RTDetrModel", 64, d_model=32, encoder_hidden_dim=32, encoder_layers=1, encoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_layers=2, decoder_ffn_dim=64, decoder_attention_heads=4, num_queries=6,
        encoder_in_channels=[16, 16, 16], decoder_in_channels=[32, 32, 32], eval_size=None, num_labels=5,
        disable_custom_kernels=True, backbone=None, backbone_config=RESNET | {"model_type": "rt_detr_resnet",
        "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}),
    family("Grounding DINO", "GroundingDinoModel", lambda: images(64) | phrases(), **DETR, num_feature_levels=2,
        backbone_config=STAGES | {"out_features": ["stage3", "stage4"]}, text_config=TEXT | {"model_type": "bert",
        "vocab_size": 1100}, max_text_len=8, disable_custom_kernels=True),
    seen("MaskFormer", "MaskFormerModel", 64, backbone_config=STAGES, fpn_feature_size=32, mask_feature_size=32,
        decoder_config=DETR | {"model_type": "detr"} | TIED),
    seen("Mask2Former", "Mask2FormerModel", 64, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=64, dim_feedforward=64, encoder_layers=2, decoder_layers=3, num_attention_heads=4,
        num_queries=6, backbone_config=STAGES | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}),
    family("SAM", "SamModel", lambda: images(64) | {"input_points": torch.tensor([[[[20.0, 30.0]]]] * 2)},
        vision_config=SMALL | {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1],
        "output_channels": 32, "mlp_dim": 64, "num_pos_feats": 16}, prompt_encoder_config={"hidden_size": 32,
        "image_size": 64, "patch_size": 8, "mask_input_channels": 4}, mask_decoder_config={"hidden_size": 32,
        "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}),
    family("SAM 2", "Sam2Model", lambda: images(64) | {"input_points": torch.tensor([[[[20.0, 30.0]]]] * 2)},
        vision_config={"backbone_config": {"model_type": "sam2_hiera_det_model", "hidden_size": 16,
        "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 2, 2], "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [3]}, "backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}, prompt_encoder_config={"hidden_size": 32,
        "image_size": 64, "patch_size": 16, "mask_input_channels": 4}, mask_decoder_config={"hidden_size": 32,
        "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}),
    # Text.
    read("BERT", "BertModel"),
    read("MPNet", "MPNetModel"),
    read("ModernBERT", "ModernBertModel", global_attn_every_n_layers=2, local_attention=4, cls_token_id=3,
        sep_token_id=4),
    read("Llama with grouped heads", "LlamaForCausalLM", num_key_value_heads=2),
    read("Gemma 2", "Gemma2ForCausalLM", num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0,
        query_pre_attn_scalar=8, sliding_window=4),
    read("GPT-OSS", "GptOssForCausalLM", num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=4),
    family("T5 encoder", "T5EncoderModel", words, **T5),
    family("T5", "T5Model", lambda: words() | decoder(), **T5),
    # An image encoder and a text encoder.
    both("CLIP", "CLIPModel", projection_dim=32),
    both("CLIP with as many tokens as patches", "CLIPModel", length=17, projection_dim=32),
    both("SigLIP", "SiglipModel", text={"projection_size": 32}),
    both("AltCLIP", "AltCLIPModel", text={"project_dim": 32}, projection_dim=32),
    both("Chinese CLIP", "ChineseCLIPModel", projection_dim=32),
    family("X-CLIP", "XCLIPModel", lambda: words() | video(3), projection_dim=32, text_config=TEXT,
        vision_config=IMAGE | {"num_frames": 3, "mit_hidden_size": 32, "mit_intermediate_size": 64,
        "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4}, prompt_layers=2, prompt_num_attention_heads=4),
    both("CLIPSeg", "CLIPSegForImageSegmentation", projection_dim=32, extract_layers=[0, 1], reduce_dim=16,
        decoder_num_attention_heads=4, decoder_intermediate_size=32),
    both("OWL-ViT", "OwlViTForObjectDetection", projection_dim=32),
    both("OWLv2", "Owlv2ForObjectDetection", projection_dim=32),
    both("GroupViT", "GroupViTModel", projection_dim=32, projection_intermediate_dim=64, vision={"depths": [1, 1, 1],
        "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]}),
    family("FLAVA", "FlavaModel", lambda: words() | images(), image_config=IMAGE, text_config=TEXT,
        multimodal_config=SMALL, hidden_size=32, projection_dim=32),
    both("BLIP retrieval", "BlipForImageTextRetrieval", projection_dim=32, image_text_hidden_size=32),
    both("BLIP captions", "BlipForConditionalGeneration", projection_dim=32, image_text_hidden_size=32),
    # Called with image_embeds, because the model would put its own patches in random order.
    family("ViLT", "ViltModel", lambda: words() | {"image_embeds": normal(2, 16, 32),
        "pixel_mask": (torch.arange(16) < torch.tensor([[16], [12]])).long()}, **TEXT | IMAGE),
    family("VisualBERT", "VisualBertModel", lambda: words() | {"visual_embeds": normal(2, 5, 24)}, **TEXT,
        visual_embedding_dim=24),
    family("LXMERT", "LxmertModel", lambda: words() | {"visual_feats": normal(2, 5, 24),
        "visual_pos": normal(2, 5, 4)}, **TEXT, l_layers=2, x_layers=2, r_layers=2, visual_feat_dim=24),
    family("BridgeTower", "BridgeTowerModel", lambda: words() | images(), **SMALL | {"hidden_size": 128},
        text_config=TEXT | {"hidden_size": 128}, vision_config=IMAGE | {"hidden_size": 128}),
    family("LayoutLMv3", "LayoutLMv3Model", lambda: words() | images() | {"bbox": boxes(8)}, **TEXT, input_size=32,
        patch_size=8, coordinate_size=4, shape_size=8),
    family("UDOP", "UdopModel", lambda: words() | images() | decoder() | {"bbox": boxes(8) / 40}, **T5, image_size=32,
        patch_size=8),
    # Language models with images.
    talks("LLaVA", "LlavaForConditionalGeneration", "llama", CLIP_VISION, image_token_index=MARK),
    talks("PaliGemma", "PaliGemmaForConditionalGeneration", "gemma", SIGLIP_VISION | {"projection_dim": 32},
        image_token_index=MARK, projection_dim=32),
    talks("Gemma 3", "Gemma3ForConditionalGeneration", "gemma3_text", SIGLIP_VISION, marks=4, image_token_index=MARK,
        mm_tokens_per_image=4, extra={"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    talks("Idefics 3", "Idefics3ForConditionalGeneration", "llama", IMAGE, marks=4, scale_factor=2,
        inputs=lambda: {"pixel_values": normal(2, 1, 3, 32, 32)}),
    talks("SmolVLM", "SmolVLMForConditionalGeneration", "llama", IMAGE, marks=4, scale_factor=2,
        inputs=lambda: {"pixel_values": normal(2, 1, 3, 32, 32)}),
    talks("InternVL", "InternVLForConditionalGeneration", "qwen2", IMAGE | {"model_type": "internvl_vision",
        "image_size": [32, 32], "patch_size": [8, 8]}, marks=4),
    talks("LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", "qwen2", SIGLIP_VISION, marks=16 + 16 + 4,
        image_token_index=MARK, image_grid_pinpoints=[[32, 32]], vision_feature_layer=-1,
        inputs=lambda: {"pixel_values": normal(2, 2, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2)}),
    talks("Mistral 3", "Mistral3ForConditionalGeneration", "mistral", IMAGE | {"model_type": "pixtral", "head_dim": 8},
        marks=4, image_token_index=MARK, vision_feature_layer=-1, spatial_merge_size=2, inputs=lambda: images() |
        {"image_sizes": torch.tensor([[32, 32]] * 2)}),
    seen("Pixtral", "PixtralVisionModel", **IMAGE, head_dim=8),
    qwen("Qwen2-VL", "Qwen2VLForConditionalGeneration", "qwen2_vl_text", embed_dim=32, hidden_size=32, mlp_ratio=2),
    qwen("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_text", hidden_size=32, out_hidden_size=32,
        intermediate_size=64, window_size=16, fullatt_block_indexes=[1]),
    qwen("Qwen3-VL", "Qwen3VLForConditionalGeneration", "qwen3_vl_text", hidden_size=32, out_hidden_size=32,
        intermediate_size=64, num_position_embeddings=16, deepstack_visual_indexes=[0]),
    family("BLIP-2", "Blip2ForConditionalGeneration", lambda: words(marks=6) | images(), vision_config=IMAGE,
        qformer_config=QFORMER, text_config=OPT, num_query_tokens=6, image_token_index=MARK,
        image_text_hidden_size=32),
    family("InstructBLIP", "InstructBlipForConditionalGeneration", lambda: words(marks=6) | images() |
        {f"qformer_{k}": v for k, v in words(6).items()}, vision_config=IMAGE, qformer_config=QFORMER, text_config=OPT,
        num_query_tokens=6, image_token_index=MARK),
    family("Idefics", "IdeficsForVisionText2Text", lambda: words() | {"pixel_values": normal(2, 1, 3, 32, 32),
        "image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long)}, **TEXT, additional_vocab_size=2,
        cross_layer_interval=1, use_resampler=False, vision_config={"embed_dim": 32, "image_size": 32, "patch_size": 8,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    family("Mllama", "MllamaForConditionalGeneration", lambda: words(marks=1) |
        {"pixel_values": normal(2, 1, 2, 3, 32, 32), "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
        "cross_attention_mask": torch.ones(2, 9, 1, 2, dtype=torch.long)}, text_config=GROUPED |
        {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default",
        "rope_theta": 10000.0}}, vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8, "max_num_tiles": 2,
        "vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2],
        [2, 1]]}, image_token_index=MARK),
    family("Florence 2", "Florence2ForConditionalGeneration", lambda: words(marks=17) | images() | decoder(),
        text_config=BART | {"model_type": "bart"}, image_token_id=MARK, vision_config={"embed_dim": [16, 32],
        "depths": [1, 1], "num_heads": [2, 4], "num_groups": [2, 4], "patch_size": [7, 3], "patch_stride": [4, 2],
        "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 2, "projection_dim": 32,
        "max_temporal_embeddings": 4, "max_position_embeddings": 10}),
    family("Kosmos 2", "Kosmos2ForConditionalGeneration", lambda: words(marks=4) | images() |
        {"image_embeds_position_mask": words(marks=4)["input_ids"] == MARK}, latent_query_num=4, vision_config=IMAGE,
        text_config=TOKENS | {"embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 4,
        "max_position_embeddings": 64}),
    family("GIT", "GitModel", lambda: words() | images(), **TEXT, vision_config=IMAGE),
    family("Pix2Struct", "Pix2StructForConditionalGeneration", lambda: decoder() |
        {"flattened_patches": torch.cat([torch.arange(24).view(2, 12, 1) % 12 + 1.0, torch.ones(2, 12, 1),
        normal(2, 12, 192)], -1), "attention_mask": (torch.arange(12) < torch.tensor([[12], [9]])).float()},
        text_config=TOKENS | {"hidden_size": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0}, vision_config={"hidden_size": 32, "patch_embed_hidden_size": 192, "d_kv": 8,
        "d_ff": 64, "seq_len": 16, "num_hidden_layers": 2, "num_attention_heads": 4}),
    pair("TrOCR", ("ViTModel", IMAGE), ("TrOCRForCausalLM", BART | {"cross_attention_hidden_size": 32})),
    pair("Donut", ("DonutSwinModel", PYRAMID), ("MBartForCausalLM", BART | {"is_decoder": True,
        "add_cross_attention": True})),
]
# fmt: on
FAMILIES: list[Family] = [row for row in _ROWS if row is not None]
