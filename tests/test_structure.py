"""The structure of a model, which a capture keeps from call to call, and the modules that it follows and watches."""

import gc
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import attnx
from attnx.trace.followed import is_followed, norms_to_hook, quiet_modules
from attnx.trace.layers import attention_layers
from attnx.trace.quiet import is_quiet
from attnx.trace.structure import structure_of


class Attention(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.heads = 2

    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Calls its modules and adds their results."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = Attention()

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Model(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


def tokens():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def captured(model, **options):
    """The names in the trace of a capture; the output must be the model's own."""
    x = tokens()
    with torch.inference_mode():
        expected = model(x)
        with attnx.capture(model, **options) as trace:
            out = model(x)
        assert torch._C._len_torch_function_stack() == 0
    torch.testing.assert_close(out, expected)
    return list(trace)


# Structure


def test_a_structure_is_kept_while_the_modules_are_the_same():
    model = Model(Block(), Block())
    first = structure_of(model)
    assert structure_of(model) is first
    assert [name for name, _ in first.named_modules()] == [name for name, _ in model.named_modules()]
    assert attention_layers(model) == ["blocks.0.attn", "blocks.1.attn"]
    model.blocks.append(Block())
    assert attention_layers(model) == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    model.blocks[0].attn = nn.Identity()
    assert attention_layers(model) == ["blocks.1.attn", "blocks.2.attn"]
    model.blocks[1].__class__ = type("OtherBlock", (Block,), {})
    assert structure_of(model) is not first
    before = structure_of(model)
    model.towers = model.blocks
    del model.blocks
    assert structure_of(model) is not before
    assert attention_layers(model) == ["towers.1.attn", "towers.2.attn"]


def test_a_structure_keeps_no_model_alive():
    model = Model(Block())
    captured(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_module_inside_itself():
    model = Model(Block())
    model.blocks[0].attn.__dict__["_modules"]["around"] = model
    assert attention_layers(model) == ["blocks.0.attn"]
    assert structure_of(model) is not structure_of(model)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_inside_a_model():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    model = Model(Block(), scripted, Block())
    first = structure_of(model)
    assert structure_of(model) is first
    assert [name for name, _ in first.named_modules()] == [name for name, _ in model.named_modules()]
    assert attention_layers(model) == ["blocks.0.attn", "blocks.2.attn"]


# Followed and watched modules


def test_few_modules_of_a_vit_are_followed_and_fewer_watched():
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    structure = structure_of(model)
    followed = [name for name, _ in structure.where(is_followed)]
    quiet = structure.derived(quiet_modules)
    watched = [name for name in followed if name not in quiet]
    assert len(followed) == 10 < 60 < len(structure.names)
    assert set(watched) - {"", "patch_embed"} == {"patch_embed.proj", *(f"blocks.{i}.attn" for i in range(3))}
    assert structure.derived(norms_to_hook) == ()


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.LayerNorm(2), nn.GELU(), nn.Dropout(), nn.Identity()], ids=str)
def test_modules_that_need_no_hooks(module):
    assert not is_followed(module)


def test_softmax_and_unknown_classes_are_followed():
    assert is_followed(nn.Softmax(-1))
    assert is_followed(nn.MultiheadAttention(4, 2))
    assert is_followed(type("Mine", (nn.Module,), {"forward": lambda self, x: x})())
    assert is_followed(nn.Sequential(nn.Linear(2, 2), Attention()))
    assert not is_followed(nn.Sequential(nn.Linear(2, 2), nn.GELU()))


class CallsAMethod(Block):
    def forward(self, x):
        return x + self.attn.attend(x)


class CallsAFunction(Block):
    def __init__(self):
        super().__init__()
        self.mix = self.attn.attend

    def forward(self, x):
        return x + self.mix(x)


class CallsAnArgument(Block):
    def forward(self, x, mix=None):
        mix = self.attn.attend
        return x + mix(x)


def mixed(block, x):
    return block.attn.attend(x)


class CallsAHelper(Block):
    def forward(self, x):
        return x + mixed(self, x)


class Decorated(Block):
    @staticmethod
    def around(function):
        def run(self, x):
            return function(self, x)

        return run

    @around
    def forward(self, x):
        return x + self.attn.attend(x)


class UsesAProperty(Block):
    @property
    def attended(self):
        return self.attn.attend

    def forward(self, x):
        return x + self.attended(x)


class Settings:
    def mix(self, block, x):
        return block.attn.attend(x)


class CallsASetting(Block):
    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, x):
        return x + self.settings.mix(self, x)


class CallsAnItem(Block):
    def __init__(self):
        super().__init__()
        self.steps = [self.attn.attend]

    def forward(self, x):
        return x + self.steps[0](x)


class CallsWhatAModuleHolds(Block):
    def __init__(self):
        super().__init__()
        self.attn.own = self.attn.attend

    def forward(self, x):
        return x + self.attn.own(x)


class AttendsItself(Block):
    def forward(self, x):
        q = k = v = self.norm(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


LOUD = [
    *(CallsAMethod, CallsAFunction, CallsAnArgument, CallsAHelper, CallsASetting, CallsAnItem, CallsWhatAModuleHolds),
    *(Decorated, UsesAProperty, AttendsItself),
]


@pytest.mark.parametrize("kind", LOUD)
def test_attention_that_runs_in_another_modules_code_is_captured(kind):
    """The map is of the block whose code runs, since no module inside it was called."""
    model = Model(Block(), kind())
    assert not is_quiet(model.blocks[1])
    assert captured(model) == ["blocks.0.attn", "blocks.1"]


def test_a_plain_block_is_quiet():
    assert is_quiet(Block())
    assert is_quiet(Model(Block()).blocks)
    assert captured(Model(Block(), Block())) == ["blocks.0.attn", "blocks.1.attn"]


def test_a_forward_that_a_user_sets_later_is_watched():
    model = Model(Block(), Block())
    assert captured(model) == ["blocks.0.attn", "blocks.1.attn"]
    block = model.blocks[1]
    block.forward = lambda x: x + block.attn.attend(x)
    assert captured(model) == ["blocks.0.attn", "blocks.1"]
    del block.forward
    assert captured(model) == ["blocks.0.attn", "blocks.1.attn"]


class InPlace(Block):
    def forward(self, x):
        x = x.clone()
        x += self.attn(self.norm(x))
        return x


def test_blocks_that_write_in_place_are_watched():
    assert not is_quiet(InPlace())
    assert captured(Model(InPlace(), InPlace())) == ["blocks.0.attn", "blocks.1.attn"]


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x):
        return x + self.attn1(self.norm1(x)) + self.attn2(self.norm2(x))


def test_layers_side_by_side_in_a_quiet_block_are_found():
    model = Model(Parallel())
    assert is_quiet(model.blocks[0])
    assert set(structure_of(model).derived(norms_to_hook)) == {"blocks.0.norm1", "blocks.0.norm2"}
    with torch.inference_mode(), attnx.capture(model) as trace:
        model(tokens())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn2 runs beside blocks\.0\.attn1"):
        attnx.rollout(trace, query="all")


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_a_users_mode_and_another_capture_stay_on():
    model, x = Model(Block(), Block()), tokens()
    with torch.inference_mode(), Seen() as alone:
        model(x)
    with torch.inference_mode(), Seen() as outside, attnx.capture(model) as first, attnx.capture(model) as second:
        model(x)
        assert torch._C._get_function_stack_at(0) is outside
        assert torch._C._len_torch_function_stack() == 1
    assert list(first) == list(second) == ["blocks.0.attn", "blocks.1.attn"]
    torch.testing.assert_close(first[0], second[0])
    assert outside.names.count("layer_norm") == alone.names.count("layer_norm") == 2


class Inside(Block):
    def forward(self, x):
        with Seen() as seen:
            out = super().forward(x)
        assert "layer_norm" in seen.names
        return out


def test_a_mode_inside_a_module_stays_on_top():
    assert captured(Model(Inside(), Block())) == ["blocks.0.attn", "blocks.1.attn"]


class Fails(Block):
    def forward(self, x):
        self.attn(x)
        raise KeyboardInterrupt if self.interrupt else ValueError("no")


@pytest.mark.parametrize("interrupt", [False, True])
def test_no_mode_is_left_after_an_error(interrupt):
    model = Model(Block(), Fails())
    model.blocks[1].interrupt = interrupt
    with torch.inference_mode(), pytest.raises((KeyboardInterrupt, ValueError)), attnx.capture(model):
        model(tokens())
    assert torch._C._len_torch_function_stack() == 0
    model.blocks[1] = Block()
    assert captured(model) == ["blocks.0.attn", "blocks.1.attn"]
