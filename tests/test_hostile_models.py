"""Malicious checkpoints, model folders and vocabularies give a one-line error, and no code in them runs."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from attnx.models.albef import AlbefConfig
from attnx.models.albef_checkpoint import load_albef
from attnx.models.checkpoint import load_checkpoint, read_weights
from attnx.models.huggingface import image_processor
from attnx.models.loading import load_model
from attnx.models.tokenizer import Tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]


def refused(call: Callable[[], object], *told: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 500
    assert [part for part in told if part not in text] == [], text


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.mark)!r}, 'w').close()",)


def loads(tmp_path: Path, weights: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    torch.save(weights, tmp_path / "w.pth")
    load_checkpoint(model, tmp_path / "w.pth")
    return model


def linear(**others: Tensor) -> dict[str, Tensor]:
    return {"weight": torch.ones(2, 2), "bias": torch.ones(2), **others}


def nested(depth: int) -> Any:
    return linear() if depth == 0 else {"model": nested(depth - 1)}


def test_containers_in_containers(tmp_path: Path) -> None:
    assert loads(tmp_path, nested(8)).bias.tolist() == [1, 1]
    cyclic: dict[str, Any] = {}
    cyclic["model"] = cyclic
    for content in (cyclic, nested(9)):
        refused(lambda content=content: loads(tmp_path, content), "at most 8 containers deep")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = linear(bias=torch.ones(2).to(dtype))
    refused(lambda: loads(tmp_path, weights), "bias: expected floating-point weights", "float32", str(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    assert loads(tmp_path, linear(bias=torch.ones(2).to(dtype))).bias.tolist() == [1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    weights = linear(bias=torch.tensor([0.0, value], dtype=torch.float64))
    refused(lambda: loads(tmp_path, weights), "bias has 1 values that are not finite")


def test_a_buffer_of_infinities_loads(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    load_checkpoint(model, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.ones(2, 2, device="meta"), "meta"),
        (lambda: torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8), "quantized"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (lambda: torch.ones(1).expand(10**9, 10**3), "of 4 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_arrays(tmp_path: Path, tensor: Callable[[], Tensor], told: str) -> None:
    refused(lambda: loads(tmp_path, linear(weight=tensor())), "weight: expected an ordinary tensor", told)


def test_names_are_cut_and_escaped(tmp_path: Path) -> None:
    refused(lambda: loads(tmp_path, linear(**{"\x1b[2J\n" + "x" * 9999: torch.ones(1)})), "\\x1b[2J\\n", "x...")


def test_safetensors_by_any_name(tmp_path: Path) -> None:
    for name in ("w.SAFETENSORS", "w.bin", "w"):
        save_file(linear(), tmp_path / name)
        assert set(read_weights(tmp_path / name)) == {"weight", "bias"}


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), OverflowError("big\nlines")], ids=repr)
def test_errors_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "w.pth").touch()
    (tmp_path / "w.safetensors").touch()
    monkeypatch.setattr(torch, "load", fails)
    monkeypatch.setattr("safetensors.torch.load_file", fails)
    refused(lambda: read_weights(tmp_path / "w.pth"), "expected a torch file of weights only")
    refused(lambda: read_weights(tmp_path / "w.safetensors"), "expected a safetensors file")


def test_a_zip_that_claims_more_than_it_has(tmp_path: Path) -> None:
    torch.save(linear(bias=torch.zeros(10**6)), tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in stored.namelist():
            bomb.writestr(member, stored.read(member))
    refused(lambda: read_weights(tmp_path / "bomb.pth"), "expected a torch file of weights only: it claims")


def test_albef_checks_its_weights(tmp_path: Path) -> None:
    config = AlbefConfig((32, 32), 16, 16, 1, 2, 16, 2, 2, 2, 1, len(PIECES), 8, 8)
    model = load_albef(None, PIECES, None, config).model
    path = tmp_path / "w.pth"
    torch.save(model.state_dict() | {"temp": torch.tensor(float("nan"))}, path)
    refused(lambda: load_albef(path, PIECES, None, config), "temp has 1 values that are not finite")
    for positions in (torch.ones(()), torch.ones(1, 0, 16), torch.ones(1, 10**6, 1)):
        torch.save(model.state_dict() | {"visual_encoder.pos_embed": positions}, path)
        refused(lambda: load_albef(path, PIECES, None, config), "visual_encoder.pos_embed")


def folder(path: Path, weights: bool = True, **changes: object) -> Path:
    """A small ViT with some fields of its config.json changed."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    (transformers.ViTModel(config) if weights else config).save_pretrained(path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | changes))
    (path / "evil.py").write_text(f"open({str(path / 'mark')!r}, 'w').close()\nclass Evil: pass\n")
    return path


OWN_CODE = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoImageProcessor": "evil.Evil"}


@pytest.fixture
def no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*_: object) -> str:
        raise AssertionError("standard input was read")

    monkeypatch.setattr("builtins.input", asks)


@pytest.mark.usefixtures("no_input")
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_with_code_of_its_own(tmp_path: Path, pretrained: bool) -> None:
    folder(tmp_path, model_type="evil_thing", auto_map=OWN_CODE)
    refused(
        lambda: load_model(f"hf:{tmp_path}", pretrained=pretrained), "has code of its own (auto_map in config.json)"
    )
    assert not (tmp_path / "mark").exists()


@pytest.mark.usefixtures("no_input")
@pytest.mark.filterwarnings("ignore:.*has no image processor")
def test_a_known_type_with_code_of_its_own_is_transformers_own(tmp_path: Path) -> None:
    loaded = load_model(f"hf:{folder(tmp_path, auto_map=OWN_CODE | {'AutoImageProcessor': None})}")
    assert type(loaded.model) is transformers.ViTModel
    assert not (tmp_path / "mark").exists()


@pytest.mark.usefixtures("no_input")
def test_a_processor_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = folder(tmp_path) / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "Evil", "auto_map": OWN_CODE}))
    for load in (load_model, lambda name: image_processor(name.removeprefix("hf:"))):
        refused(lambda load=load: load(f"hf:{tmp_path}"), "has code of its own (auto_map in preprocessor_config.json)")
    assert not (tmp_path / "mark").exists()
    for content in ("{", json.dumps({"image_processor_type": "Unknown"})):
        path.write_text(content)
        refused(lambda: load_model(f"hf:{tmp_path}"), "image processor", "can't be loaded")


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.filterwarnings("ignore:.*has no image processor")
def test_the_attention_that_a_config_asks_for_is_not_followed(tmp_path: Path, pretrained: bool) -> None:
    evil = "someone/evil-kernel"
    folder(tmp_path, attn_implementation=evil, _attn_implementation=evil, experts_implementation=evil, use_kernels=True)
    loaded = load_model(f"hf:{tmp_path}", pretrained=pretrained)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.filterwarnings("ignore:.*has no image processor")
def test_nor_that_of_a_config_inside(tmp_path: Path) -> None:
    half = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = half | {"image_size": 32, "patch_size": 16}
    transformers.CLIPConfig(text_config=half | {"vocab_size": 99}, vision_config=vision).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["vision_config"]["_attn_implementation"] = fields["text_config"]["attn_implementation"] = "someone/evil"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = load_model(f"hf:{tmp_path}", pretrained=False)
    assert loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_size": 10**9}, "parameters"),
        ({"hidden_size": 10**6, "intermediate_size": 10**6}, "GiB; this machine has"),
        ({"num_hidden_layers": 10**9}, "expected 0 to 4096 layers"),
        ({"num_hidden_layers": -1}, "expected 0 to 4096 layers; num_hidden_layers is -1"),
        ({"image_size": 0}, "model: "),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4 runs code from the hub"),
        ({"image_size": "large"}, ""),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_configurations(tmp_path: Path, changes: dict[str, object], told: str, pretrained: bool) -> None:
    folder(tmp_path, **changes)
    refused(lambda: load_model(f"hf:{tmp_path}", pretrained=pretrained), told)


def test_quantization_that_needs_a_package(tmp_path: Path) -> None:
    folder(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(lambda: load_model(f"hf:{tmp_path}"), "holds no model that transformers can load")


def test_pickles_in_model_folders(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    hf = folder(tmp_path / "hf", weights=False)
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(mark)))
    refused(lambda: load_model(f"hf:{hf}"), "holds no model that transformers can load")
    local = tmp_path / "timm"
    local.mkdir()
    architecture = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"custom_load": True}}
    (local / "config.json").write_text(json.dumps(architecture))
    (local / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(mark)))
    refused(lambda: load_model(f"timm:local-dir:{local}"), "timm can't load local-dir:")
    assert not mark.exists()


def test_vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\r\n".join(PIECES))
    assert Tokenizer(path)("dog").ids == (2, 5, 3)
    path.write_bytes(path.read_bytes() + b"\r\n\xff")
    refused(lambda: Tokenizer(path), "vocab: expected word pieces in UTF-8")
    monkeypatch.setattr("attnx.models.tokenizer.VOCAB_BYTES", 8)
    refused(lambda: Tokenizer(path), "vocab: expected at most 8 bytes")
