"""Word maps and Grad-CAM of an ALBEF with random weights, beside the original code.

    python -m benchmarks.suites.words --original ALBEF          a checkout of https://github.com/salesforce/ALBEF
    python -m benchmarks.suites.words --original ALBEF --mkl-as-on-intel
    python -m benchmarks.suites.words --original ALBEF --device cuda
    python -m benchmarks.suites.words --quick                   a tiny model

The floor is the forward pass of attnx's model up to the end of the layer. `word_maps` and `gradcam` are attnx's.
`original_words` is the original with `save_attention`, which needs gradients, and the mean over heads.
`original_gradcam` adds a backward pass and the products of the original notebook, which LAVIS's `compute_gradcam` also
uses. All have the same weights. Results that differ from the original by more than 1e-4 of its largest entry are not
timed. Contestant and floor run alternately. On a CPU each measurement has its own process.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnx
from attnx.models.albef import Albef, AlbefConfig
from attnx.models.tokenizer import Caption
from benchmarks import mkl
from benchmarks.machine import ROOT, ResultFile, environment, file_stem
from benchmarks.peers.original import Original, load_original
from benchmarks.suites import memory
from benchmarks.timing import race, wall_timer

LAYER = 8
AGREEMENT = 1e-4
TOKENS = (13, 9, 17, 11)  # lengths of the captions, repeated
OURS, ORIGINAL = ("word_maps", "gradcam"), ("original_words", "original_gradcam")
TINY = AlbefConfig((32, 32), 16, 32, 2, 2, 32, 12, 2, vocab_size=100, embed_dim=8)


class Run(NamedTuple):
    """Number of pairs in a batch, and height and width of the images."""

    batch: int
    pixels: int

    def __str__(self) -> str:
        return f"{self.pixels} px b{self.batch}"


RUNS = (Run(1, 256), Run(1, 384), Run(16, 256), Run(16, 384))


class Tokens:
    """A tokenizer for captions that are numbers: the number of tokens."""

    def __call__(self, caption: str) -> Caption:
        count = int(caption)
        ids = (2, *(5 + i % 90 for i in range(count - 2)), 3)
        return Caption(caption, ids, ("x",) * count, (), (None,) * count)

    def id_of(self, piece: str) -> int:
        return 0


class Case:
    """A model and a batch of pairs; with a checkout, also the original with the same weights."""

    def __init__(self, run: Run, checkout: Path | None, quick: bool = False, device: str = "cpu") -> None:
        torch.manual_seed(0)
        config = replace(TINY if quick else AlbefConfig(), image_size=(run.pixels, run.pixels))
        self.model = Albef(config, Tokens()).eval().to(device)
        with torch.no_grad():  # at initialisation attention is almost uniform, and wrong maps pass
            for name, parameter in self.model.named_parameters():
                if name.endswith(("query.weight", "key.weight")):
                    parameter.mul_(4)
        self.original: Original | None = None
        if checkout is not None:
            self.original = load_original(checkout, config).to(device)
            # BertModel has additional buffers.
            self.original.load_state_dict(self.model.state_dict(), strict=False)
            self.original.cross_attention(LAYER).save_attention = True
        self.images = torch.randn(run.batch, 3, run.pixels, run.pixels).to(device)
        counts = [TOKENS[i % len(TOKENS)] for i in range(run.batch)]
        self.captions = [str(count) for count in counts]
        self.ids = torch.zeros(run.batch, max(counts), dtype=torch.long)
        for row, caption in zip(self.ids, self.captions, strict=True):
            ids = Tokens()(caption).ids
            row[: len(ids)] = torch.tensor(ids)
        self.ids = self.ids.to(device)
        self.mask = self.ids != 0

    @torch.inference_mode()
    def forward(self) -> Tensor:
        image = self.model.encode_image(self.images)
        return self.model.encode_text(self.ids, self.mask, image, layers=range(LAYER + 1))

    def word_maps(self) -> list[Tensor]:
        return [found.maps for found in attnx.word_maps(self.model, self.images, self.captions, LAYER)]

    def gradcam(self) -> list[Tensor]:
        return [found.maps for found in attnx.gradcam(self.model, self.images, self.captions, LAYER)]

    def original_words(self) -> Tensor:
        assert self.original is not None
        self.original(self.images, self.ids, self.mask)
        return self._grid(self.original.cross_attention(LAYER).get_attention_map().detach().mean(1))

    def original_gradcam(self) -> Tensor:
        assert self.original is not None
        loss = self.original(self.images, self.ids, self.mask)[:, 1].sum()
        self.original.zero_grad()
        loss.backward()
        cross, mask = self.original.cross_attention(LAYER), self.mask[:, None, :, None]
        with torch.no_grad():
            gradients = cross.get_attn_gradients().clamp(0) * mask
            return self._grid((cross.get_attention_map() * mask * gradients).mean(1))

    def _grid(self, maps: Tensor) -> Tensor:
        return maps[:, :, 1:].unflatten(-1, self.model.grid(self.images))

    def error(self, name: str) -> float:
        """The largest difference of attnx from the original, as a share of the original's largest entry."""
        exact = getattr(self, f"original_{'words' if name == 'word_maps' else name}")()
        ours = getattr(self, name)()
        wrong = [(one - exact[i, : len(one)]).abs().max() for i, one in enumerate(ours)]
        return float(torch.stack(wrong).max() / exact.max())


_case = lru_cache(maxsize=1)(Case)


def timed(name: str, run: Run, checkout: Path | None, quick: bool, device: str = "cpu") -> dict[str, Any]:
    """Times in milliseconds of a contestant and the floor between its rounds, and the error of attnx."""
    case = _case(run, checkout, quick, device)
    error = case.error(name) if name in OURS and checkout is not None else None
    if error is not None and error > AGREEMENT:
        raise AssertionError(f"{name}, {run}: off by {error:.1e} of the largest entry")
    call, floor = (wall_timer(getattr(case, which), [()], grad=True) for which in (name, "forward"))
    times = race(call, floor, 12.0, quick)
    rate = 1e3 * run.batch / times["median_ms"]
    return dict(contestant=name, batch=run.batch, pixels=run.pixels, **times, pairs_per_s=rate, error=error)


def peak(name: str, run: Run, checkout: Path | None, quick: bool, device: str = "cpu") -> dict[str, Any]:
    """Megabytes (10^6 bytes) of the first run above the loaded model."""
    getattr(Case(Run(2, 32), checkout, quick=True, device=device), name)()
    case = _case(run, checkout if device == "cuda" or name in ORIGINAL else None, quick, device)
    with memory.peak_of(device) as most:
        result = getattr(case, name)()  # noqa: F841  keep until the peak is read
    return dict(peak_mb=round(most[0] / 1e6, 1))


def measure(checkout: Path | None, quick: bool, device: str, only: str | None) -> Iterator[dict[str, Any]]:
    """A row for every contestant and run, each in its own processes; `only`: the name of one run."""
    for run in (Run(2, 64),) if quick else RUNS:
        if only not in (None, str(run)):
            continue
        for name in ("forward", *OURS, *(ORIGINAL if checkout else ())):
            print(f"== {name}, {run}", flush=True)
            if device == "cuda":  # its allocator counts exactly, so no separate process is needed
                yield timed(name, run, checkout, quick, device) | peak(name, run, checkout, quick, device)
                continue
            options = ["--device", device, *(["--original", str(checkout.resolve())] if checkout else [])]
            options += ["--quick"] if quick else []
            module, one = "benchmarks.suites.words", [name, str(run.batch), str(run.pixels), *options]
            row = memory.run_module(module, ["--one", "timed", *one])
            row |= memory.run_module(module, ["--one", "peak", *one])
            if memory.GIVES_BACK:
                row["needed_mb"] = memory.run_module(module, ["--one", "peak", *one], needed=True)["peak_mb"]
            yield row


def main(argv: list[str] | None = None) -> int:
    """Write words-HARDWARE.json and print its rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.suites.words", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--original", type=Path, help="a checkout of the original code; default: only attnx")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", choices=[str(run) for run in RUNS], help="only this run")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--mkl-as-on-intel", action="store_true", help="see benchmarks/mkl.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one is not None:
        what, name, batch, pixels = options.one
        measured = {"timed": timed, "peak": peak}[what]
        run = Run(int(batch), int(pixels))
        print(json.dumps(measured(name, run, options.original, options.quick, options.device)))
        return 0
    with mkl.as_on_intel() if options.mkl_as_on_intel else nullcontext():
        about = {**environment(options.device), "quick": options.quick, "layer": LAYER}
        file, rows = ResultFile(options.out, f"words-{file_stem(options.device)}", options.quick), []
        for row in measure(options.original, options.quick, options.device, options.only):
            rows.append(row)
            times = f"{row['median_ms']:9.1f} ms {row['ratio_to_floor']:6.2f} x {row['peak_mb']:8.1f} MB"
            print(f"{row['contestant']:18}{times}", flush=True)
            file.save({**about, "rows": rows})
    print(file.finish().name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
