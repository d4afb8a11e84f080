"""`attnx models`: the stored table is that of the tests' families, and one model is tried."""

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from families_timm import ScaledDotProduct
from packaging.version import Version
from test_families import FAMILIES
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner, Result

from attnx.cli.main import app
from attnx.cli.models import stored
from attnx.extract.support import support

# Which families have SDPA, and so the rows, change with the versions of these packages.
SAME_VERSIONS = all(Version(version(name)) == Version(stored()["versions"][name]) for name in ("timm", "transformers"))
FAST = ("timm vit", "timm swin", "torch decoder", "HF Data2Vec vision", "HF GIT")


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["models", *args])


@pytest.fixture(scope="module")
def make_models() -> Any:
    path = Path(__file__).resolve().parents[1] / "docs" / "make_models.py"
    spec = importlib.util.spec_from_file_location("make_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not SAME_VERSIONS, reason="the table was made with other versions of timm or transformers")
def test_the_table_has_the_families_of_the_tests() -> None:
    assert list(stored()["families"]) == list(FAMILIES)


@pytest.mark.skipif(not SAME_VERSIONS, reason="the table was made with other versions of timm or transformers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.long) for name in stored()["families"]]
)
def test_a_row_is_what_the_model_does_now(name: str, make_models: Any) -> None:
    assert make_models.row_of(FAMILIES[name]) == stored()["families"][name]


def test_the_page_is_that_of_the_table(make_models: Any) -> None:
    assert make_models.PAGE.read_text() == make_models.page(stored())


def test_every_refusal_has_a_reason() -> None:
    for name, row in stored()["families"].items():
        outcomes = [value for value in row.values() if isinstance(value, dict)]
        assert len(outcomes) == 7
        assert all(bool(each["reason"]) == (each["works"] is not True) for each in outcomes), name
        assert row["captured"] == row["layers"] or row["missing"], name


def test_without_a_model_the_table_is_printed() -> None:
    table = run()
    assert table.exit_code == 0
    missing = [w for w in ("timm", "transformers", "torchvision", "open_clip", "vit clip") if w not in table.output]
    assert not missing, table.output[:2000]
    assert json.loads(run("--json").output) == stored()


def test_a_table_of_other_versions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnx.cli.models.version", lambda name: "0.4.12" if name == "timm" else version(name))
    made = stored()["versions"]["timm"]
    assert f"timm {made} (installed: 0.4.12)" in run().output


def test_one_model() -> None:
    found = json.loads(run("demo", "--device", "cpu", "--json").output)
    assert (found["layers"], found["captured"], found["own_maps"]) == (4, 4, 0)
    assert found["layouts"] == ["4 layers: 12x12 image, 1 prefix"]
    assert all((found["unchanged"], found["restored"], found["extractor"]["works"]))
    assert "4 of 4 captured" in run("demo", "--device", "cpu").output


@pytest.mark.parametrize("arguments", [["nope"], [""], ["timm:nope"], ["--image-size", "64"]])
def test_an_error_is_one_line(arguments: list[str]) -> None:
    failed = run(*arguments)
    assert failed.exit_code == 2
    assert len(failed.stderr.strip().splitlines()) == 1
    assert failed.stderr.startswith("attnx: model: ")


class OwnSoftmax(ScaledDotProduct):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = F.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, -1)
        return x + self.proj((p @ v).transpose(1, 2).flatten(2))


class OwnAttention(OwnSoftmax):
    """The class name says that it attends."""


def test_own_maps_are_counted() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 32)
    fused, own = (torch.nn.Sequential(kind()).eval() for kind in (ScaledDotProduct, OwnAttention))
    assert support(fused, lambda: fused(x)).own_maps == 0
    found = support(own, lambda: own(x))
    assert (found.layers, found.captured, found.own_maps, found.unchanged, found.restored) == (1, 1, 1, True, True)


def test_a_change_that_stays_is_reported() -> None:
    """A model whose output changes from call to call is not restored."""
    model = torch.nn.Sequential(ScaledDotProduct()).eval()
    calls: list[Tensor] = []

    def call() -> Tensor:
        calls.append(torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(len(calls))))
        return model(calls[-1])

    found = support(model, call)
    assert not found.unchanged
    assert not found.restored
