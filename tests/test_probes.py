"""Statistics of a capture, mean attention distance and row entropy: against the maps of each head, in float64.

`ATTNX_PROBING=probing-vits pytest tests/test_probes.py` also runs the functions of a checkout of
sayakpaul/probing-vits.
"""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from original_code import checkout
from torch import nn
from windowed_blocks import CASES as WINDOWED

import attnx
from attnx.methods.probes import head_means, uniform_means
from attnx.trace.windows import Windows

NAMES = ("entropy", "distance", "max", "mass")


def vit(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), depth=3, **options).eval()


def sharpened(model):
    """The model with larger queries and keys, so that heads differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name or "query" in name or "key" in name:
                parameter.mul_(4)
    return model


def captured(model, *inputs, **options):
    with torch.no_grad(), attnx.capture(model, **options) as trace:
        model(*inputs)
    return trace


def grid_distances(rows, columns):
    """[N, N] float64: distance of each two cells of a grid."""
    at = torch.tensor([(i, j) for i in range(rows) for j in range(columns)], dtype=torch.float64)
    return (at[:, None] - at[None]).square().sum(-1).sqrt()


def stats_of(p, prefix, far):
    """The statistics of weights [B, H, N, N] in float64; `far`: [N - prefix, N - prefix]."""
    p = p.double()
    distance = torch.full(p.shape[:3], torch.nan, dtype=torch.float64)
    distance[..., prefix:] = (p[..., prefix:, prefix:] * far).sum(-1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    return {"entropy": entropy, "distance": distance, "max": p.amax(-1), "mass": p[..., :prefix].sum(-1)}


def assert_same(ours, exact, rtol=1e-5, atol=2e-6):
    assert list(ours) == list(exact)
    for name in exact:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=rtol, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": "stats"},
        {"keep": "qk"},
        {"keep": "auto"},
        {"rows": [0, 3]},
        {"heads": "each"},
        {"heads": "max"},
        {"backend": "eager", "keep": "stats"},
        {"backend": "eager"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_capture_has_the_stats_of_its_maps_and_the_models_output(options, dtype):
    model, x = sharpened(vit()).to(dtype), torch.randn(2, 3, 48, 64).to(dtype)
    with torch.no_grad():
        plain = model(x)
    maps = captured(model, x, heads="each", backend="eager")
    with torch.no_grad(), attnx.capture(model, stats=NAMES, **options) as trace:
        out = model(x)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, plain, rtol=close, atol=close)
    assert list(trace.stats) == list(trace) == list(maps)
    for layer in maps:
        exact = stats_of(maps[layer], 1, grid_distances(3, 4))
        loose = 1 if dtype == torch.float32 else 2e4  # layers see the rounded outputs of earlier ones
        assert_same(trace.stats[layer], exact, 1e-5 * loose, 2e-6 * loose)
    if options.get("keep") == "stats":
        with pytest.raises(RuntimeError, match=r"no map was stored: the capture has keep='stats'; read trace\.stats"):
            trace[0]
        with pytest.raises(RuntimeError, match="no map was stored"):
            trace.kept(0).row(0)
    else:
        assert torch.equal(trace[1], captured(model, x, **options)[1])


@pytest.mark.parametrize("grad", [True, "signed"])
def test_stats_beside_maps_weighted_by_gradients(grad):
    model, x = vit(), torch.randn(2, 3, 48, 64)
    expected = captured(model, x, stats=NAMES)
    with attnx.capture(model, grad=grad, stats=NAMES) as trace:
        score = model(x)[:, 0].sum()
    trace.backward(score)
    for layer in expected:
        assert trace[layer].shape == expected[layer].shape
        assert not trace.stats[layer]["entropy"].requires_grad
        assert_same(trace.stats[layer], {name: stat.double() for name, stat in expected.stats[layer].items()})


@pytest.mark.parametrize("options", [{}, {"keep": "stats"}, {"rows": [0]}, {"heads": "each"}], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_importance_of_heads(options, own):
    torch.manual_seed(0)
    model, x = (Own().eval(), torch.randn(2, 3, 16, 24)) if own else (vit(), torch.randn(2, 3, 48, 64))

    def loss():
        out = model(x)
        return -(out if out.dim() == 2 else out.mean(1)).log_softmax(-1)[:, 1].sum()

    with attnx.capture(model, heads="each", grad="signed", backend="eager") as trace:
        score = loss()
    trace.backward(score)
    exact = torch.stack([trace[layer].double().abs().sum(-1).mean(-1) for layer in trace], 1)
    with attnx.capture(model, grad=True, stats=("max", "importance"), **options) as trace:
        score = loss()
    with pytest.raises(RuntimeError, match=r"no gradient reached \S*attn: call trace\.backward\(score\)"):
        attnx.head_importance(trace)
    with pytest.raises(KeyError, match="'importance': no gradient reached"):
        trace.stats[0]["importance"]
    trace.backward(score)
    torch.testing.assert_close(attnx.head_importance(trace).double(), exact, rtol=1e-4, atol=1e-8)
    one = trace.item(1)
    torch.testing.assert_close(attnx.head_importance(one).double(), exact[1:], rtol=1e-4, atol=1e-8)
    if options.get("keep") == "stats":
        for each in (trace, one):
            with pytest.raises(RuntimeError, match="no map was stored"):
                each[0]


def test_maps_weighted_by_gradients_are_not_probed():
    model, x = vit(), torch.randn(2, 3, 48, 64)
    with attnx.capture(model, heads="each", grad=True) as trace:
        score = model(x).sum()
    trace.backward(score)
    for each in (trace, trace.item(1)):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn: expected a capture with stats=\('entropy',\)"):
            attnx.row_entropy(each)
    assert torch.equal(trace.item(1)[0], trace[0][1:])


def test_importance_needs_gradients():
    with pytest.raises(ValueError, match="stats: 'importance' needs grad=True; got grad=False"):
        captured(vit(), torch.randn(1, 3, 48, 64), stats=["importance"])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: expected a capture with grad=True and stats="):
        attnx.head_importance(captured(vit(), torch.randn(1, 3, 48, 64), stats=["max"]))


def test_gradients_are_the_models_own_and_stats_are_detached():
    model, x = vit(), torch.randn(2, 3, 48, 64)
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with attnx.capture(model, keep="stats", stats=NAMES) as trace:
        model(x).sum().backward()
    for p, grad in zip(model.parameters(), plain, strict=True):
        assert torch.equal(p.grad, grad)
    assert not trace.stats[0]["max"].requires_grad


@pytest.mark.long
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_have_the_distances_of_the_image(name):
    model, size = WINDOWED[name]()
    x = torch.randn(2, 3, *size)
    each = captured(model, x, heads="each")
    trace = captured(model, x, keep="stats", stats=NAMES)
    several = False
    for layer in trace:
        windows = trace.windows(layer)
        if windows is None:
            continue
        several |= windows.count > 1
        at = torch.stack([windows.index // windows.grid[1], windows.index % windows.grid[1]], -1).double()
        far = (at[:, :, None] - at[:, None]).square().sum(-1).sqrt()  # [nW, K, K]
        real = windows.index >= 0
        p = each[layer].double().unflatten(0, (-1, windows.count))  # [B, nW, H, K, K]
        distance = (p * (far * real[:, None])[:, None]).sum(-1)
        distance = torch.where(real[:, None], distance, torch.nan).flatten(0, 1)
        exact = {**stats_of(each[layer], 0, torch.zeros(())), "distance": distance}
        del exact["mass"]
        assert_same(trace.stats[layer], exact, atol=1e-5)
        ours = attnx.mean_attention_distance(trace.select([layer]), patch_size=2)[:, 0]
        mean = 2 * torch.where(real[:, None], distance.unflatten(0, (-1, windows.count)), 0).sum((1, 3)) / real.sum()
        torch.testing.assert_close(ours.double(), mean, rtol=1e-5, atol=1e-5)
        entropy = torch.where(real[:, None], exact["entropy"].unflatten(0, (-1, windows.count)), 0).sum((1, 3))
        ours = attnx.row_entropy(trace.select([layer]))[:, 0]
        torch.testing.assert_close(ours.double(), entropy / real.sum(), rtol=1e-5, atol=1e-5)
        one = trace.item(1).stats[layer]
        assert torch.equal(one["max"], trace.stats[layer]["max"][windows.count :])
    assert several or name == "timm swin one window"


def test_pixels_of_each_stage_and_heads_that_differ():
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 3), embed_dim=24, window_size=7
    ).eval()
    trace = captured(model, torch.randn(2, 3, 56, 56), stats=NAMES)
    with pytest.raises(
        KeyError, match=r"'mass': layers\.0\.blocks\.0\.attn has no prefix tokens: its keys are windows"
    ):
        trace.stats[0]["mass"]
    distance, entropy = attnx.mean_attention_distance(trace), attnx.row_entropy(trace)
    assert distance.shape == entropy.shape == (2, 2, 3)
    assert distance.isnan().tolist() == entropy.isnan().tolist() == [[[False, False, True], [False] * 3]] * 2
    # A patch of the second stage is 8 pixels wide. Weights are nearly uniform, over 7 x 7 patches in both stages.
    uniform = float(grid_distances(7, 7).mean())
    assert distance[:, 0, 0].tolist() == pytest.approx([4 * uniform] * 2, rel=0.1)
    assert distance[:, 1, 0].tolist() == pytest.approx([8 * uniform] * 2, rel=0.1)
    with pytest.raises(ValueError, match=r"rows='all': expected layers without windows; got windows in layers\.0"):
        attnx.row_entropy(trace, rows="all")


@pytest.mark.parametrize("source", [{"heads": "each"}, {"keep": "qk"}, {"keep": "stats", "stats": NAMES}], ids=str)
def test_probes_from_maps_from_q_and_k_and_from_stats(source):
    model, x = sharpened(vit()), torch.randn(2, 3, 48, 64)
    exact = captured(model, x, heads="each", backend="eager")
    stats = [stats_of(exact[layer], 1, grid_distances(3, 4)) for layer in exact]
    trace = captured(model, x, **source)
    distance = torch.stack([16 * stat["distance"][..., 1:].mean(-1) for stat in stats], 1)
    torch.testing.assert_close(attnx.mean_attention_distance(trace).double(), distance, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attnx.mean_attention_distance(trace, 1).double(), distance / 16, rtol=1e-5, atol=1e-5)
    rows = torch.stack([stat["entropy"] for stat in stats], 1)
    torch.testing.assert_close(attnx.row_entropy(trace).double(), rows.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attnx.row_entropy(trace, rows="all").double(), rows, rtol=1e-5, atol=1e-5)
    for chosen, want in ((0, [0]), (-1, [-1]), ([2, -2], [2, -2])):
        found = attnx.row_entropy(trace, rows=chosen).double()
        torch.testing.assert_close(found, rows[..., want], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="rows: expected integers in"):
        attnx.row_entropy(trace, rows=10_000)
    one = attnx.row_entropy(trace.item(1).select([-1]))
    torch.testing.assert_close(one, attnx.row_entropy(trace)[1:, -1:])


def test_the_tutorials_own_functions_give_the_same():
    notebook = checkout("ATTNX_PROBING", "sayakpaul/probing-vits") / "notebooks" / "mean-attention-distance-1k.ipynb"
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]]
    code = {"np": np, "num_cls_tokens": 1}
    exec(next(cell for cell in cells if "def compute_mean_attention_dist" in cell), code)
    model = sharpened(timm.create_model("vit_tiny_patch16_224", depth=3).eval())
    x = torch.randn(2, 3, 224, 224)
    maps = captured(model, x, heads="each")
    theirs = np.stack([code["compute_mean_attention_dist"](16, maps[layer].numpy()) for layer in maps], 1)
    for trace in (maps, captured(model, x, keep="stats", stats=["distance"]), captured(model, x, keep="qk")):
        assert np.abs(attnx.mean_attention_distance(trace).numpy() - theirs).max() < 1e-4


@pytest.mark.parametrize(
    ("make", "size", "patch", "prefix"),
    [
        (lambda: vit(), (48, 64), 16, 1),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2), (32, 32), 16, 2),
        (
            lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=42, depth=2, embed_dim=48, num_heads=3),
            (42, 42),
            14,
            5,
        ),
        (
            lambda: transformers.ViTModel(
                transformers.ViTConfig(
                    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32,
                    patch_size=8,
                )
            ),
            (32, 32),
            8,
            1,
        ),
        (
            lambda: transformers.SiglipVisionModel(
                transformers.SiglipVisionConfig(
                    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32,
                    patch_size=8,
                )
            ),
            (32, 32),
            8,
            0,
        ),
    ],
    ids=["vit", "deit", "dinov2 with registers", "transformers vit", "siglip"],
)  # fmt: skip
def test_patch_size_and_prefix_are_those_of_the_model(make, size, patch, prefix):
    torch.manual_seed(0)
    model = make().eval()
    trace = captured(model, torch.randn(1, 3, *size), layers=[0], heads="each", stats=["mass"])
    (p,) = trace.values()
    exact = stats_of(p, prefix, grid_distances(size[0] // patch, size[1] // patch))
    mean = patch * exact["distance"][..., prefix:].mean(-1)
    torch.testing.assert_close(attnx.mean_attention_distance(trace)[:, 0].double(), mean, rtol=1e-5, atol=1e-5)
    if prefix:
        torch.testing.assert_close(trace.stats[0]["mass"].double(), exact["mass"], rtol=1e-5, atol=1e-6)
    uniform = stats_of(torch.full_like(p, 1 / p.shape[-1]), prefix, grid_distances(size[0] // patch, size[1] // patch))
    found = uniform_means(trace, ["entropy", "distance", "max"])[:, 0]
    means = [uniform["entropy"].mean(), patch * uniform["distance"][..., prefix:].mean(), uniform["max"].mean()]
    torch.testing.assert_close(found.double(), torch.stack(means), rtol=1e-5, atol=1e-6)


def test_keys_of_a_coarser_grid_are_at_the_centres_of_their_cells():
    torch.manual_seed(0)
    options = dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), sr_ratios=(4, 2, 1, 1))
    model = timm.create_model("pvt_v2_b0", num_classes=2, **options).eval()
    layer = "stages.0.blocks.0.attn"
    trace = captured(model, torch.randn(1, 3, 64, 64), heads="each", stats=["distance"])
    assert trace[layer].shape == (1, 1, 256, 16)
    queries = torch.tensor([(i, j) for i in range(16) for j in range(16)], dtype=torch.float64)
    keys = torch.tensor([(i, j) for i in range(4) for j in range(4)], dtype=torch.float64) * 4 + 1.5
    far = (queries[:, None] - keys[None]).square().sum(-1).sqrt()
    exact = (trace[layer].double() * far).sum(-1)
    torch.testing.assert_close(trace.stats[layer]["distance"].double(), exact, rtol=1e-5, atol=1e-6)
    distance = attnx.mean_attention_distance(trace.select([layer]))
    torch.testing.assert_close(distance[:, 0].double(), 4 * exact.mean(-1), rtol=1e-5, atol=1e-5)


def test_frames_of_a_video_have_the_same_places():
    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.VideoMAEModel(config).eval()
    trace = captured(model, torch.randn(1, 4, 3, 32, 32), heads="each", stats=["distance"])
    far = grid_distances(2, 2).repeat(2, 2)
    exact = (trace[0].double() * far).sum(-1)
    torch.testing.assert_close(trace.stats[0]["distance"].double(), exact, rtol=1e-5, atol=1e-6)


class Own(nn.Module):
    """A vision transformer of one block that computes its own softmax."""

    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.attn = OwnAttention()

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.attn(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))


class OwnAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-2, -1)).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("options", [{}, {"keep": "stats"}, {"rows": [0]}, {"heads": "each"}], ids=str)
def test_blocks_that_compute_their_own_softmax(options):
    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(2, 3, 16, 24)
    with pytest.warns(UserWarning, match="computes the softmax of attn itself"):
        exact = captured(model, x, heads="each")
    trace = captured(model, x, stats=NAMES, **options)
    assert_same(trace.stats["attn"], stats_of(exact["attn"], 1, grid_distances(2, 3)))
    with attnx.capture(model, grad=True, stats=["max"]) as trace:
        score = model(x).sum()
    trace.backward(score)
    assert torch.equal(trace.stats["attn"]["max"], exact["attn"].amax(-1))


@pytest.mark.parametrize("mode", ["last", "all"])
def test_stats_of_each_pass(mode):
    model, images = vit(), torch.randn(3, 2, 3, 48, 64)
    with torch.no_grad(), attnx.capture(model, keep="stats", stats=["entropy"], calls=mode) as trace:
        for x in images:
            model(x)
    expected = [captured(model, x, keep="stats", stats=["entropy"]) for x in images]
    assert torch.equal(trace.stats[0]["entropy"], expected[-1].stats[0]["entropy"])
    if mode == "all":
        for call, other in zip(trace.calls, expected, strict=True):
            assert torch.equal(attnx.row_entropy(call), attnx.row_entropy(other))


def test_a_patched_model_and_a_selection():
    model, x = vit(), torch.randn(2, 3, 48, 64)
    handle = attnx.patch(model, stats=["max"], layers=["blocks.*"])
    with torch.no_grad():
        model(x)
    trace = handle.trace
    handle.remove()
    assert list(trace.select([0, 2]).stats) == ["blocks.0.attn", "blocks.2.attn"]
    assert torch.equal(trace.select([0, 2]).stats[1]["max"], trace.stats[2]["max"])
    assert trace.nbytes == sum(record.nbytes for record in map(trace.kept, trace)) + sum(
        stat["max"].nbytes for stat in trace.stats.values()
    )
    assert repr(trace.stats[0]) == "RowStats({max: [2, 3, 13]})"
    silent = captured(model, x, keep="stats", stats=["max"], layers=[0])
    assert repr(silent) == "Trace(1 layer: no map, heads='mean')"


def clip():
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
        "max_position_embeddings": 12,
    }  # fmt: skip
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    return transformers.CLIPModel(config).eval()


def test_layers_over_words_have_entropies_and_say_why_they_have_no_distances():
    ids, x = torch.randint(3, 50, (2, 7)), torch.randn(2, 3, 32, 32)
    trace = captured(clip(), ids, x, keep="stats", stats=NAMES)
    text, vision = "text_model.encoder.layers.0.self_attn", "vision_model.encoder.layers.0.self_attn"
    text, vision = (next(name for name in trace if name.startswith(part.split(".")[0])) for part in (text, vision))
    assert list(trace.stats[vision]) == list(NAMES)
    assert list(trace.stats[text]) == ["entropy", "max"]
    with pytest.raises(
        KeyError, match=r"'distance': text_model\S+ has no distances: expected patches of an image; got 7 text"
    ):
        trace.stats[text]["distance"]
    with pytest.raises(KeyError, match=r"'mass': text_model\S+ has no known prefix tokens"):
        trace.stats[text]["mass"]
    message = r"text_model\S+ has no distances: .* can choose the 2 layers that do: vision_model\S+ \.\.\. vision_model"
    for each in (trace, captured(clip(), ids, x, keep="qk"), captured(clip(), ids, x, heads="each")):
        with pytest.raises(ValueError, match=message):
            attnx.mean_attention_distance(each)
        with pytest.raises(ValueError, match=r"text_model\S+ has no known prefix tokens: .* the 2 layers that do"):
            head_means(each, ["mass"])
    vision_only = attnx.mean_attention_distance(trace.select("vision_model.*"))
    assert vision_only.shape == (2, 2, 2)
    assert vision_only.isfinite().all()
    only = captured(clip(), ids, x, keep="stats", stats=["distance"])
    assert list(only.stats[text]) == []


def test_patches_that_are_no_squares_and_sizes_that_are_not_known():
    model = timm.create_model("vit_tiny_patch16_224", img_size=(48, 64), patch_size=(16, 8), depth=1).eval()
    trace = captured(model, torch.randn(1, 3, 48, 64), keep="stats", stats=["distance"])
    with pytest.raises(ValueError, match=r"expected square patches; got 16 x 8 pixels in blocks\.0\.attn"):
        attnx.mean_attention_distance(trace)
    assert attnx.mean_attention_distance(trace, patch_size=8).shape == (1, 1, 3)

    class NoGrid(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    trace = captured(NoGrid().eval(), torch.randn(1, 10, 16), keep="stats", stats=NAMES)
    with pytest.raises(
        KeyError, match=r"got 10 tokens of no known grid: if they are patches, pass layout=attnx\.TokenLayout"
    ):
        trace.stats[0]["distance"]
    layout = attnx.TokenLayout(1, (3, 3))
    trace = captured(NoGrid().eval(), torch.randn(1, 10, 16), keep="stats", stats=NAMES, layout=layout)
    assert trace.stats[0]["distance"].isnan().sum() == 2
    with pytest.raises(ValueError, match=r"patch_size: expected it, since it is unknown in attn; pass patch_size=16"):
        attnx.mean_attention_distance(trace)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats": "entropy"}, "stats: expected a sequence of entropy, distance, max, mass, importance; got 'entropy'"),
        ({"stats": ["median"]}, r"stats: expected a sequence of entropy, .*, importance; got \['median'\]"),
        ({"stats": [["max"]]}, r"stats: expected a sequence of entropy, .*, importance; got \[\['max'\]\]"),
        ({"stats": None}, "stats: expected a sequence of entropy, .*, importance; got None"),
        ({"keep": "stat", "stats": ["max"]}, "keep: expected one of map, qk, auto, or stats where .*; got 'stat'"),
        ({"keep": "stats"}, r"keep: expected stats=\('entropy', ...\) with keep='stats'; got no statistics"),
        ({"calls": "mean", "stats": ["max"]}, "calls: expected 'last' or 'all' with stats, .*; got 'mean'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message), attnx.capture(vit(), **options):
        pass


def test_traces_without_what_the_probes_read():
    model, x = vit(), torch.randn(1, 3, 48, 64)
    for options in ({}, {"heads": "max"}, {"rows": [0], "heads": "each"}, {"stats": ["max"]}):
        trace = captured(model, x, **options)
        with pytest.raises(ValueError, match=r"blocks.0.attn: expected a capture with stats=\('entropy',\), or with"):
            attnx.row_entropy(trace)
    with pytest.raises(KeyError, match=r"no statistics were captured; pass stats= to attnx\.capture"):
        captured(model, x).stats["blocks.0.attn"]
    with pytest.raises(KeyError, match="'entropy': expected one of max; pass it in stats= of the capture"):
        trace.stats[0]["entropy"]
    with pytest.raises(KeyError, match=r"'entrpy': expected one of max\"$"):
        trace.stats[0]["entrpy"]
    for given in (model, torch.zeros(2, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"row_entropy: expected a Trace, which attnx\.capture gives; got"):
            attnx.row_entropy(given)
    for size in (0, -3, float("nan"), (8, 8)):
        with pytest.raises(ValueError, match="patch_size: expected a finite number of pixels above 0; got"):
            attnx.mean_attention_distance(trace, size)
    with pytest.raises(KeyError, match=r"layer 'nothing': expected one of blocks\.0\.attn, blocks\.1\.attn"):
        trace.stats["nothing"]
    with pytest.raises(ValueError, match="rows: expected 'mean', 'all', or indices of queries; got 'each'"):
        attnx.row_entropy(trace, rows="each")
    with pytest.raises(ValueError, match="row_entropy: expected a trace with layers; got none"):
        attnx.row_entropy(trace.select("blocks.0.attn").item(0).__class__(model, "mean", None, None))


def test_images_with_padding_are_probed_one_by_one():
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=8, num_patches=16
    )
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(config).eval()
    x, shapes = torch.randn(2, 12, 192), torch.tensor([[3, 4], [2, 3]])
    mask = torch.zeros(2, 12, dtype=torch.long)
    for i, (h, w) in enumerate(shapes.tolist()):
        mask[i, : h * w] = 1
    each = captured(model, x, mask, shapes, heads="each", layers=["*layers.0.self_attn"]).item(1)
    entropy = torch.special.entr(each[0]).sum(-1).mean(-1)
    distance = 8 * (each[0].double() * grid_distances(2, 3)).sum(-1).mean(-1)
    for options in ({"keep": "stats", "stats": NAMES}, {"keep": "qk"}, {"heads": "each"}):
        trace = captured(model, x, mask, shapes, layers=["*layers.0.self_attn"], **options)
        with pytest.raises(ValueError, match=r"expected images without padding; take one by trace\.item\(i\)"):
            attnx.row_entropy(trace)
        one = trace.item(1)
        torch.testing.assert_close(attnx.row_entropy(one)[:, 0], entropy)
        ours = attnx.mean_attention_distance(one)[:, 0].double()
        torch.testing.assert_close(ours, distance, rtol=1e-5, atol=1e-5)
        if "stats" in options:
            assert one.stats[0]["entropy"].shape == (1, 2, 6)


def test_windows_share_places_and_padding_has_none():
    from attnx.trace.row_stats import places_of
    from attnx.trace.tokens import Tokens

    windows = Windows(torch.tensor([[0, 1], [2, -1]]), (1, 3))
    tokens = Tokens("windows", grid=(1, 3), count=2)
    queries, keys = places_of(tokens, tokens, windows, torch.device("cpu"))
    assert queries.nan_to_num(-1).tolist() == [[[0, 0], [0, 1]], [[0, 2], [-1, -1]]]
    assert keys is queries


def hf_swin(size):
    config = transformers.SwinConfig(image_size=size, embed_dim=16, depths=[1] * 4, num_heads=[1] * 4, window_size=4)
    return transformers.SwinModel(config)


def segformer():
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[16] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=16, mlp_ratios=[1] * 4
    )
    return transformers.SegformerModel(config)


def detr():
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
        ),
    )  # fmt: skip
    return transformers.DetrModel(config)


class Resized(nn.Module):
    """A vision transformer that halves its input first."""

    num_prefix_tokens = 1

    def __init__(self, channels=3):
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, patch_size=8, in_chans=channels)

    def forward(self, x):
        return self.vit(torch.nn.functional.interpolate(x, size=(32, 32)))


FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 1, 1, 1), "num_classes": 2}


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "size", "pixels"),
    [
        (lambda: timm.create_model("davit_tiny", **FOUR), (224, 224), [4, 8, 16, 32]),
        (lambda: timm.create_model("efficientvit_m0"), (224, 224), [32, 64]),
        (lambda: timm.create_model("pit_ti_224"), (224, 224), [8, 16, 32]),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), (224, 224), [32]),
        (lambda: timm.create_model("crossvit_tiny_240"), (240, 240), [12, 240 / 14]),
        (lambda: hf_swin(228), (228, 228), [4, 8, 16, 32]),
        (segformer, (130, 166), [4, 8, 16, 32]),
        (detr, (225, 225), [32]),
        (detr, (417, 480), [32]),
        (lambda: timm.create_model("pvt_v2_b0", **FOUR), (224, 224), [4, 8, 16, 32]),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=3), (224, 224), [16]),
        (Resized, (64, 64), [8]),  # of what the first convolution sees
    ],
    ids=[
        "davit", "efficientvit", "pit", "hybrid", "crossvit", "swin", "segformer", "detr", "detr of any size", "pvt",
        "beit", "resized",
    ],
)  # fmt: skip
def test_pixels_of_patches_of_many_models(make, size, pixels):
    torch.manual_seed(0)
    trace = captured(make().eval(), torch.randn(1, 3, *size), keep="stats", stats=["distance"])
    found = set()
    for layer in trace:
        if "distance" in trace.stats[layer]:
            distance = attnx.mean_attention_distance(trace.select([layer]))
            in_patches = attnx.mean_attention_distance(trace.select([layer]), patch_size=1)
            if in_patches.max() > 0:
                found.add(round(float((distance / in_patches).mean()), 3))
    assert sorted(found) == [round(value, 3) for value in pixels]


def test_pixels_of_an_input_with_many_channels_are_asked_for():
    torch.manual_seed(0)
    trace = captured(Resized(12).eval(), torch.randn(1, 12, 64, 64), keep="stats", stats=["distance"])
    with pytest.raises(ValueError, match="patch_size: expected it, since it is unknown"):
        attnx.mean_attention_distance(trace)
    assert attnx.mean_attention_distance(trace, 8).shape == (1, 1, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_places_do_not_depend_on_the_default_dtype(dtype):
    model, x = sharpened(vit()), torch.randn(2, 3, 48, 64)
    expected = attnx.mean_attention_distance(captured(model, x, keep="stats", stats=["distance"]))
    q = torch.randn(1, 1, 10, 16)
    rows = attnx.attention_stats(q, q, grid=(3, 3), prefix=1)["distance"]
    torch.set_default_dtype(dtype)
    try:
        found = attnx.mean_attention_distance(captured(model, x, keep="stats", stats=["distance"]))
        assert torch.equal(attnx.attention_stats(q, q, grid=(3, 3), prefix=1)["distance"][..., 1:], rows[..., 1:])
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


def test_a_pass_of_fake_tensors_leaves_nothing_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, x = vit(), torch.randn(1, 3, 48, 64)
    handle = attnx.patch(model, stats=["distance"], keep="stats")
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.empty(1, 3, 48, 64))
    with torch.no_grad():
        model(x)
    found = attnx.mean_attention_distance(handle.trace)
    handle.remove()
    assert type(found) is torch.Tensor
    assert torch.equal(found, attnx.mean_attention_distance(captured(model, x, stats=["distance"], keep="stats")))


def test_head_means_of_wrong_names():
    trace = captured(vit(), torch.randn(1, 3, 48, 64), keep="stats", stats=["max"])
    for names in ([], ["median"]):
        with pytest.raises(ValueError, match="stats: expected names among entropy, distance, max, mass, importance"):
            head_means(trace, names)
