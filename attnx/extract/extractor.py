"""`Extractor`: maps of images, computing only the part of the model that the method reads."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attnx.extract.cuda_graphs import Graphs
from attnx.extract.inputs import check_arguments, check_images, image_call
from attnx.extract.model_state import model_state
from attnx.extract.place import layout_of_tokens
from attnx.extract.plan import Plan, PlanMismatchError
from attnx.extract.trial import Trial
from attnx.methods import cls_map, layer_maps, rollout
from attnx.methods.maps import cls_layer
from attnx.methods.queries import renamed
from attnx.methods.rollout import last_needed
from attnx.methods.token_map import token_map
from attnx.ops.checks import integer
from attnx.trace.adapters.sharding import is_sharded
from attnx.trace.capture import capture, uncompiled
from attnx.trace.layers import Layers, attention_layers
from attnx.trace.layout import TokenLayout, declared_input
from attnx.trace.recorder import Recorder
from attnx.trace.structure import structure_of
from attnx.trace.trace import Trace

# One extraction at a time per model, because an extraction binds forwards to its blocks.
_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_NEW_LOCK = Lock()


class Extractor:
    """Maps of images: `Extractor(model, method="rollout")(images)`. The model is not changed.

    Only what the method reads is computed. The first call runs the model on one image, records which layers attend and
    in which order, and makes a `plan`. In later calls the forward pass stops as soon as the method has its input: for
    rollout and CLS maps after one query row and the keys of the last layer. Known blocks run with attnx's attention in
    place of SDPA; the calls of other blocks are intercepted as in `attnx.capture`. The maps equal those of `capture`
    followed by the method.

    Rollout stores the whole map of each layer, or q and k of a large layer (see `keep` of `attnx.capture`). The other
    methods store the row of their token.

    Args:
        model: a model in eval mode.
        method: "rollout": `attnx.rollout`, [B, h, w]. "cls": the class token's map of one layer, [B, h, w], or
            [B, H, h, w] with heads="each", or [B, L, h, w] for L requested layers. "layers": the class token's map of
            each layer, [B, L, h, w]. "token": `attnx.token_map` of the token `token`, with the shapes of "cls".
        layers: as in `attnx.capture`; for "cls" the default is the layer that `attnx.cls_map` reads, for "token" the
            last self-attention layer over the patches.
        heads: "mean", "max" or "min"; for "cls" and "token" also "each".
        keep, layout: as in `attnx.capture`.
        dtype: dtype of autocast; None: no autocast.
        channels_last: convert the images to torch's channels-last memory format.
        compile: record the computation from images to maps as CUDA graphs, one for each shape of images. This removes
            the Python overhead of small batches. The pass must depend on nothing but its images and the model's
            weights, which may be written in place. True: record at the first call with a shape, or raise an error.
            "auto": at the second call, on GPUs; where that fails, one warning says why, and the model runs without
            graphs. A graph must give the maps that the model gives. The four used last are kept, in at most a quarter
            of the GPU's memory (with True, the newest in any case), see `graph_nbytes`.
        backend: as in `attnx.attention`.
        model_kwargs: further arguments of each call of the model, such as interpolate_pos_encoding=True.
        options: further arguments of `attnx.rollout` (residual, discard, start, preset, query); for "token": token, its
            index, such as `TokenLayout.token(row, column)` gives it.

    Raises:
        ValueError: an unknown method, options that the method does not have, a model in training mode, or compile with
            a model that is not on a CUDA device.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.vit import demo_model
        >>> model = demo_model()
        >>> extractor = attnx.Extractor(model, method="rollout")
        >>> extractor(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 12, 12])
        >>> extractor.plan.last
        'blocks.3.attn'
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
        compile: bool | str = False,
        backend: str = "auto",
        model_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_arguments(model, method, heads, dtype, compile, options)
        self.model = model
        self.method = method
        self.layers = layers
        self.dtype = dtype
        self.channels_last = channels_last
        self.model_kwargs = model_kwargs or {}
        if "rows" in options:
            options["query"] = renamed(options.get("query"), options.pop("rows"))
        self.options = options
        self._call = image_call(model, self.model_kwargs)
        self._recorder = Recorder(
            model, heads, None if method == "rollout" else [options.get("token", 0)], keep, layout, backend,
            internal=True,
        )  # fmt: skip
        self._graphs = Graphs(self._maps, partial(model_state, model), compile == "auto") if compile else None
        self._plan: Plan | None = None
        self._size: torch.Size | None = None  # height and width of the last images

    @property
    def graph_nbytes(self) -> int:
        """Bytes of GPU memory that recorded CUDA graphs take; 0 without `compile`."""
        return 0 if self._graphs is None else self._graphs.nbytes

    @property
    def plan(self) -> Plan:
        """The plan: which layers run and what is stored of each. `print(extractor.plan)` prints a table.

        Raises:
            RuntimeError: the extractor was not called yet, and the model does not declare its input size.
        """
        if self._plan is None:
            size = declared_input(self.model)
            if size is None:
                raise RuntimeError(
                    "plan: expected an extractor that was called once, since the model declares no input size; got none"
                )
            weight = next(self.model.parameters())
            with self._lock(), self._no_gradients():
                self._try(torch.zeros(1, *size, dtype=weight.dtype, device=weight.device))
        assert self._plan is not None
        return self._plan

    def __call__(self, images: Tensor) -> Tensor:
        """The maps of a batch of images.

        Args:
            images: [B, 3, height, width] on the model's device.

        Returns:
            float32 maps, see the class. They are inference tensors, except for a model sharded by FSDP, whose gathered
            weights must not become inference tensors.

        Raises:
            ValueError: as in `attnx.capture` and the method; compile=True with a model that has hooks.
            RuntimeError: as in `attnx.capture`; or the layers that attend differ from those of the plan; or
                compile=True with a pass that can't be recorded.
        """
        check_images(images)
        if self.model.training:
            raise ValueError("model: expected eval mode; got training mode; call model.eval()")
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self._lock(), self._no_gradients():
            if self._plan is None:
                # Tensors in model_kwargs may have one item per image, so the trial takes the whole batch.
                whole = any(isinstance(value, Tensor) for value in self.model_kwargs.values())
                maps = self._try(images if whole else images[:1])
                if len(maps) == len(images):
                    if self._graphs is not None:
                        self._graphs.note(images)
                    return maps
            return self._maps(images) if self._graphs is None or not images.is_cuda else self._graphs(images)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Iterate over the maps of batches. On a GPU, the next batch is copied from pinned memory during computation.

        Args:
            batches: batches of images as in `__call__`, on the CPU or on the model's device.

        Yields:
            the maps of each batch, as from `__call__`.
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

    def _lock(self) -> Any:
        with _NEW_LOCK:
            return _LOCKS.setdefault(self.model, RLock())

    @contextmanager
    def _no_gradients(self) -> Iterator[None]:
        structure = self._recorder.trace.tokens.structure = structure_of(self.model)
        sharded = is_sharded(structure)
        with torch.inference_mode(not sharded), torch.no_grad():
            yield

    def _maps(self, images: Tensor) -> Tensor:
        assert self._plan is not None
        plan, size = self._plan, images.shape[-2:]
        if plan.of_one_size and size != self._size:
            # Only an interceptor reads windows and feature maps. What it reads then holds for the next images.
            plan = plan.intercepting("the images have another size than before")
        self._size = None
        with uncompiled(), self._autocast(images):
            try:
                plan.run(self._recorder, self.model, lambda: self._call(images))
            except PlanMismatchError:
                if not plan.bound:
                    raise
                # A forward that names SDPA may call it in another function.
                reason = "bound forwards ran other layers than the trial: one may attend in another function"
                self._plan = plan.intercepting(reason)
                self._plan.run(self._recorder, self.model, lambda: self._call(images))
        self._size = size
        # The layers before `start` were not recorded.
        maps = self._reduce(self._recorder.trace, {k: v for k, v in self.options.items() if k != "start"})
        self._recorder.clear()
        return maps

    def _reduce(self, trace: Trace, options: dict[str, Any]) -> Tensor:
        if self.method == "rollout":
            return rollout(trace, **options)
        token = self.options.get("token")
        if self.method == "layers" or (len({name.partition("#")[0] for name in trace}) > 1 and self.layers is not None):
            return layer_maps(trace, trace.heads, token=token).maps
        return cls_map(trace) if token is None else token_map(trace, token)

    def _autocast(self, images: Tensor) -> torch.autocast:
        # A CUDA graph holds the addresses of cast weights, so these must not be in the autocast cache.
        return torch.autocast(
            images.device.type,
            dtype=self.dtype,
            enabled=self.dtype is not None or torch.is_autocast_enabled(images.device.type),
            cache_enabled=self._graphs is None or not images.is_cuda,
        )

    def _try(self, image: Tensor) -> Tensor:
        """The map of one image from a pass of the whole model; makes the plan."""
        layers = [self._token_layer(image)] if self.method == "token" and self.layers is None else self.layers
        trial = Trial(self.model, layers, self._recorder)
        with uncompiled(), self._autocast(image), trial:
            self._call(image)
        trace = self._recorder.trace
        maps = self._reduce(trace, self.options)
        names = list(trace)
        row: int | None = 0
        if self.method == "rollout":
            last, row = last_needed(trace, **self.options)
            names = names[self.options.get("start", 0) : names.index(last) + 1]
        elif self.method == "cls" and self.layers is None:
            names = self._last(names, cls_layer(trace))
        elif self.method == "token":
            row = integer(self.options["token"])
        with self._autocast(image):
            self._plan = trial.plan(names, row)
        self._size = image.shape[-2:]
        self._recorder.clear()
        return maps

    def _token_layer(self, image: Tensor) -> str:
        """Name of the layer whose token is read by default. Raise ValueError if there is none over the whole grid."""
        given, backend = self._recorder.trace.tokens.given, self._recorder.backend
        with self._autocast(image), capture(self.model, rows=0, layout=given, backend=backend) as trace:
            self._call(image)
        layer, _ = layout_of_tokens(trace)
        if trace.windows(layer) is not None:
            raise ValueError(
                "token: expected a layer of self-attention over all patches of an image; "
                f"got {layer}, which attends in windows: use attnx.capture and token_map"
            )
        self._check_last(list(trace), layer)
        return layer.partition("#")[0]

    def _last(self, names: list[str], layer: str) -> list[str]:
        """The names in the trace of the layer whose token is read; several if a block attends more than once."""
        self._check_last(names, layer)
        return [name for name in names if name.partition("#")[0] == layer.partition("#")[0]]

    def _check_last(self, names: list[str], layer: str) -> None:
        """Raise RuntimeError if the model's last layer was not intercepted, and another one is read in its place."""
        block = layer.partition("#")[0]
        depth = attention_layers(self.model)
        if block in depth and depth[-1] != block and depth[-1] not in names:
            raise RuntimeError(f"not intercepted: {depth[-1]}, the model's last attention layer; pass layers={block!r}")
