"""The table of families in attnx/models/table.json and its page: python docs/make_models.py [--check].

The families are those of tests/families_timm.py and tests/families_hf.py. --check writes nothing; the exit code is 1 if
the stored table or page is out of date, or a family does not run.
"""

import argparse
import gc
import json
import logging
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attnx.cli.models import METHODS, by_package, reasons
from attnx.extract.support import support

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "attnx" / "models" / "table.json"
PAGE = ROOT / "docs" / "models.md"
VERSIONS = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "transformers": "transformers",
            "open_clip": "open_clip_torch"}  # fmt: skip
SYMBOLS = {True: "✓", False: "✗", None: "-"}
INTRODUCTION = """\
# Models

What works for each family of models, found by trying it on a small model with the family's real classes and random
weights. Written by `python docs/make_models.py`, with {versions}.

```bash
attnx models
attnx models demo
```

prints this table, and tries one model. It needs no weights. For the names see
[Command line](guides/command-line.md#models).

| column | meaning |
|---|---|
| layers | attention layers that a capture has maps of / that run |
| rollout, CLS | `attnx.rollout` and `attnx.cls_map` of a capture of all layers |
| gradients | maps weighted by their gradients, in every layer |
| relevance | `attnx.class_maps` of a classifier of images, else `attnx.relevance` |
| words | a map of the image for each token of a text: `trace.layout_of(layer).patches(trace[layer])`, `[B, T, h, w]` |
| Extractor | the rollout of `attnx.Extractor`; it equals that of a capture |
| attn_impl | `attnx.huggingface.use`, transformers only |
| own maps | layers that compute their own softmax, so the model itself holds [B, heads, M, N] |

✓ works, ✗ does not (the reasons are below each table), - does not apply. Where rollout finds several stacks of layers,
`layers=` chooses one of them, as the reason says. A capture changed no output by more than rounding, and left every
model as it was{exceptions}.
"""


def families() -> dict[str, Any]:
    """{name: family} of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    import families_hf
    import families_timm

    return {family.name: family for family in (*families_timm.FAMILIES, *families_hf.FAMILIES)}


def row_of(family: Any) -> dict[str, Any]:
    """The row of one family."""
    model, given = family.build()
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    images = next(iter((*args, *kwargs.values()))) if family.images_only else None
    return support(model, lambda: model(*args, **kwargs), images).row()


def rows(names: list[str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """{name: row} of the families, and a message for each that does not run."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found, failed = {}, []
    for name, family in families().items():
        if names is not None and name not in names:
            continue
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        try:
            found[name] = row_of(family)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
        gc.collect()
    return found, failed


def versions() -> dict[str, str]:
    """{package: version} of the packages that are installed."""
    found = {}
    for package, distribution in VERSIONS.items():
        try:
            found[package] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def page(table: dict[str, Any]) -> str:
    """The text of the page."""
    used = ", ".join(f"{package} {number}" for package, number in table["versions"].items())
    odd = [name for name, row in table["families"].items() if not (row["unchanged"] and row["restored"])]
    parts = [INTRODUCTION.format(versions=used, exceptions=f", except: {', '.join(odd)}" if odd else "")]
    header = ("family", "layers", *METHODS.values(), "own maps")
    for package, group in by_package(table["families"]).items():
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for name, row in group.items():
            symbols = [SYMBOLS[row[key]["works"]] for key in METHODS]
            cells = (name, f"{row['captured']}/{row['layers']}", *symbols, str(row["own_maps"] or "-"))
            lines.append(f"| {' | '.join(cells)} |")
        why = [
            f"- {name}: {', '.join(what)}: `{reason.replace('`', chr(39))}`"
            for name, row in group.items()
            for reason, what in reasons(row).items()
        ]
        parts.append("\n".join((f"## {package}\n", *lines)) + "\n")
        if why:
            parts.append("\n".join((f"### Reasons: {package}\n", *why)) + "\n")
    return "\n".join(parts)


def out_of_date(table: dict[str, Any]) -> list[str]:
    """Names of the families whose stored row differs from that of `table`, and of the page."""
    before = json.loads(TABLE.read_text(encoding="utf-8"))["families"] if TABLE.exists() else {}
    names = dict.fromkeys([*before, *table["families"]])
    changed = [name for name in names if before.get(name) != table["families"].get(name)]
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return changed + ["docs/models.md"] * (not changed and written != page(stored_versions(table)))


def stored_versions(table: dict[str, Any]) -> dict[str, Any]:
    """The table with the versions of the stored one, because versions alone make no page out of date."""
    return table | {"versions": json.loads(TABLE.read_text(encoding="utf-8"))["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the table is out of date")
    check = parser.parse_args().check
    found, failed = rows()
    table = {"versions": versions(), "families": found}
    for message in failed:
        print(f"does not run: {message}", file=sys.stderr)
    if check:
        changed = out_of_date(table)
        for name in changed:
            print(f"out of date: {name}", file=sys.stderr)
        sys.exit(1 if changed or failed else 0)
    lines = ",\n".join(f"{json.dumps(n)}: {json.dumps(row, ensure_ascii=False)}" for n, row in found.items())
    text = f'{{"versions": {json.dumps(table["versions"])},\n"families": {{\n{lines}\n}}}}\n'
    TABLE.write_text(text, encoding="utf-8")
    PAGE.write_text(page(table), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
