"""From images to maps: a model, a method, and how little of the one answers the other."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attnx.extract.cuda_graphs import Graphs
from attnx.extract.inputs import image_call
from attnx.extract.plan import Plan, PlanMismatchError
from attnx.extract.trial import Trial
from attnx.methods import cls_map, layer_maps, rollout
from attnx.methods.maps import cls_layer
from attnx.methods.rollout import last_needed
from attnx.trace.adapters.sharding import is_sharded
from attnx.trace.capture import uncompiled
from attnx.trace.layers import Layers, attention_layers
from attnx.trace.layout import TokenLayout, declared_input
from attnx.trace.recorder import Recorder
from attnx.trace.trace import Trace

METHODS = ("rollout", "cls", "layers")
_ROLLOUT = ("residual", "discard", "start", "preset", "rows")

# One extraction at a time of every model: its blocks are bound by one thread.
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_NEW_LOCK = Lock()


class Extractor:
    """Images in, maps out: `Extractor(model, method="rollout")(images)`. The model is left as it was.

    Only what the method reads is computed. The first call tries the model on one image, sees which layers attend and
    in which order, and makes a `plan`; from then on the model is left where the method needs no more of it: for rollout
    and CLS maps after one query row and the keys of the last layer. Known blocks run with attnx's attention in place of
    SDPA; of others the calls are heard, as in `attnx.capture`. The maps are those of `capture` and the method.

    Rollout keeps the whole map of every layer, or q and k of a large one (see `keep` of `attnx.capture`); the other
    methods keep the class token's row.

    Args:
        model: in eval mode.
        method: "rollout" gives [B, h, w]; "cls" the class token's map of one layer, [B, h, w] ([B, H, h, w] with
            heads="each"), of L layers that are asked for [B, L, h, w]; "layers" that of every layer, [B, L, h, w].
        layers: as in `attnx.capture`; for "cls" the one that `attnx.cls_map` takes unless given.
        heads: "mean", "max", "min"; "each" for "cls" only.
        keep: as in `attnx.capture`.
        layout: as in `attnx.capture`.
        dtype: run the model under autocast to this dtype; None: as it is.
        channels_last: hand the images over in torch's channels-last memory format.
        compile: record the whole way from images to maps as a CUDA graph, one for every shape of images: at small
            batches a GPU otherwise waits for Python. The model's input must then be all that its pass depends on.
        backend: as in `attnx.attention`.
        model_kwargs: further arguments of every call of the model, such as interpolate_pos_encoding=True.
        options: further arguments of `attnx.rollout` (residual, discard, start, preset, rows).

    Raises:
        ValueError: an unknown method, options that the method doesn't have, a model in training mode; compile of a
            model that is not on a CUDA device.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "rollout",
        *,
        layers: Layers = None,
        heads: str = "mean",
        keep: str = "auto",
        layout: TokenLayout | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        compile: bool = False,
        backend: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
        known = _ROLLOUT if method == "rollout" else ()
        if not set(options) <= set(known):
            raise ValueError(
                f"options of method {method!r}: expected {', '.join(known) or 'none'}; got {', '.join(options)}"
            )
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        if heads == "each" and method != "cls":
            raise ValueError(f"heads='each' is for method 'cls'; got method {method!r}")
        if model.training:
            raise ValueError("model: expected eval mode; got training mode; call model.eval()")
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if compile and device.type != "cuda":
            raise ValueError(f"compile: expected a model on a CUDA device; got {device}")
        self.model = model
        self.method = method
        self.layers = layers
        self.dtype = dtype
        self.channels_last = channels_last
        self.model_kwargs = model_kwargs or {}
        self.options = options
        self._call = image_call(model, self.model_kwargs)
        self._recorder = Recorder(
            model, heads, None if method == "rollout" else [0], keep, layout, backend, internal=True
        )
        self._graphs = Graphs(self._maps) if compile else None
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """What runs and what is kept; `print(extractor.plan)` is a table.

        Raises:
            RuntimeError: it was not called yet, and the model doesn't say what images it takes.
        """
        if self._plan is None:
            size = declared_input(self.model)
            if size is None:
                raise RuntimeError("plan: it is made on the first call, from its first image; call the extractor once")
            weight = next(self.model.parameters())
            with self._alone(), self._no_gradients():
                self._try(torch.zeros(1, *size, dtype=weight.dtype, device=weight.device))
        assert self._plan is not None
        return self._plan

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] on the model's device -> float32 maps, see the class; they are inference tensors.

        Of a model that is sharded by FSDP they are not: it keeps what it gathers, and could train no more.

        Raises:
            ValueError, RuntimeError: as `attnx.capture` and the method do; RuntimeError if the layers that attend are
                not those of the plan.
        """
        if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
            came = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: expected a tensor [B, channels, height, width] with B >= 1; got {came}")
        if self.model.training:
            raise ValueError("model: expected eval mode; got training mode; call model.eval()")
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self._alone(), self._no_gradients():
            if self._plan is None:
                # Other tensors that the model is given may be one for every image.
                whole = any(isinstance(value, Tensor) for value in self.model_kwargs.values())
                tried = self._try(images if whole else images[:1])
                if len(tried) == len(images):
                    return tried
            return self._graphs(images) if self._graphs is not None else self._maps(images)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The maps of every batch. On a GPU the next batch is copied, from pinned memory, while one is computed.

        Args:
            batches: of images as in a call, but on the CPU (or the model's device already).
        """
        device = next(self.model.parameters()).device
        if device.type != "cuda":
            yield from (self(images.to(device)) for images in batches)
            return
        side = torch.cuda.Stream(device)
        before: Tensor | None = None
        for images in batches:
            with torch.cuda.stream(side):
                ahead = (images if images.is_cuda else images.pin_memory()).to(device, non_blocking=True)
            if before is not None:
                yield self(before)
            torch.cuda.current_stream(device).wait_stream(side)
            ahead.record_stream(torch.cuda.current_stream(device))
            before = ahead
        if before is not None:
            yield self(before)

    def _alone(self) -> Any:
        with _NEW_LOCK:
            return _LOCKS.setdefault(self.model, RLock())

    @contextmanager
    def _no_gradients(self) -> Iterator[None]:
        sharded = is_sharded(self.model)
        with torch.inference_mode(not sharded), torch.no_grad():
            yield

    def _maps(self, images: Tensor) -> Tensor:
        assert self._plan is not None
        with uncompiled(), self._autocast(images):
            try:
                self._plan.run(self._recorder, self.model, lambda: self._call(images))
            except PlanMismatchError:
                if not self._plan.bound:
                    raise
                # Code that names SDPA need not be the code that calls it.
                self._plan = replace(self._plan, bound=False)
                self._plan.run(self._recorder, self.model, lambda: self._call(images))
        # Nothing was kept of the layers before `start`.
        answer = self._answer(self._recorder.trace, {k: v for k, v in self.options.items() if k != "start"})
        self._recorder.clear()
        return answer

    def _answer(self, trace: Trace, options: dict[str, Any]) -> Tensor:
        if self.method == "rollout":
            return rollout(trace, **options)
        if self.method == "layers" or (len({name.partition("#")[0] for name in trace}) > 1 and self.layers is not None):
            return layer_maps(trace, trace.heads).maps
        return cls_map(trace)

    def _autocast(self, images: Tensor) -> torch.autocast:
        # A graph holds the addresses of weights that were cast: they may not be those of a cache.
        return torch.autocast(
            images.device.type,
            dtype=self.dtype,
            enabled=self.dtype is not None or torch.is_autocast_enabled(images.device.type),
            cache_enabled=self._graphs is None,
        )

    def _try(self, image: Tensor) -> Tensor:
        """The map of one image, from a pass of the whole model, which gives the plan."""
        trial = Trial(self.model, self.layers, self._recorder)
        with uncompiled(), self._autocast(image), trial:
            self._call(image)
        trace = self._recorder.trace
        answer = self._answer(trace, self.options)
        names = list(trace)
        row: int | None = 0
        if self.method == "rollout":
            last, row = last_needed(trace, **self.options)
            names = names[self.options.get("start", 0) : names.index(last) + 1]
        elif self.method == "cls" and self.layers is None:
            names = self._last(names, cls_layer(trace))
        with self._autocast(image):
            self._plan = trial.plan(names, row)
        self._recorder.clear()
        return answer

    def _last(self, names: list[str], layer: str) -> list[str]:
        """The names, in the trace, of the layer whose class token is looked at: a block may attend twice.

        Raises:
            RuntimeError: the model's last layer was not heard.
        """
        block = layer.partition("#")[0]
        depth = attention_layers(self.model)
        if block in depth and depth[-1] != block:
            raise RuntimeError(f"not heard: {depth[-1]}, the model's last attention layer; layers={block!r} was heard")
        return [name for name in names if name.partition("#")[0] == block]
