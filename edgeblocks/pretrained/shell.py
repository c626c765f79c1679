"""A Hugging Face model's own forward pass around its layers: nothing of an architecture is written anew.

The model is built without weights, and its `forward` is run with its layers replaced.

- Before the layers: the first one is given what the model makes of the embedded tokens, which is where the pass stops
  (embedding scales, learned positions).
- Between: every layer notes what it is called with beside the hidden values (masks, rotary tables), and is later called
  alone with that.
- After the layers: all of them are left out, and the last gives hidden values that come from elsewhere (final norm,
  head, scale and cap of the logits).

So whatever a version of the library names its arguments, the numbers are its own. Where layers talk to each other
beside the hidden values that is not so, and such models are refused: see `gate`.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeblocks.errors import ConfigError
from edgeblocks.pretrained.library import built, library, read_config, replaced, without_values
from edgeblocks.pretrained.model_folder import FileTable, ModelFolder, Table, model_folder
from edgeblocks.pretrained.named_tensors import NamedTensors
from edgeblocks.pretrained.trained_tables import HeldTable, TrainedReadout, TrainedTable, gradient_of

SLICE_BYTES = 2**24
"""Of the head's matrix as float32, which is multiplied with some rows at a time."""


class UnsupportedModelError(Exception):
    """A model whose layers cannot be called one by one; the message says why."""


class _StopError(Exception):
    """The pass has come to where it is to end."""


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside the hidden values."""


class Shell:
    """A model without its layers' weights, on one kind of device: the processor, a GPU, or meta."""

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        """
        Raises:
            ConfigError: the library is missing, or does not know the model.
            UnsupportedModelError: it is no decoder of layers of one kind.
        """
        self._take_(folder, device, _without_weights(folder))
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if (
            embedding is None
            or head is None
            or list(dict(head.named_parameters())) not in (["weight"], ["weight", "bias"])
        ):
            raise UnsupportedModelError("it has no table of tokens, or no head that is one matrix")
        self._embedding, self._head = embedding, head
        names = {id(module): name for name, module in self.model.named_modules()}
        of_embedding = f"{names[id(embedding)]}.weight"
        of_head = self._name_of_head(f"{names[id(head)]}.weight")
        config = getattr(self.model.config, "text_config", None) or self.model.config
        is_tied = bool(
            getattr(self.model.config, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False)
        )
        self.is_tied = is_tied
        self.table_names = of_embedding, of_embedding if is_tied else of_head
        """Of the table of tokens and of the head, in the files."""
        self.frozen_names = {of_embedding} if is_tied else {of_embedding, of_head}
        """Of tensors in the files that are used and not trained; those of vectors and positions join them below."""
        self.frozen_names |= {name for name, _ in self.model.named_buffers() if name in self.stored.tensors}
        self.embedding_table = self._table(of_embedding, embedding.weight.shape)
        self.head_table = self._table(self.table_names[1], head.weight.shape)
        for module in self.model.modules():
            self._restore_(module)
        for name, parameter in list(self.model.named_parameters()):
            tables = (of_embedding, f"{names[id(head)]}.weight")
            if name in tables or name.startswith(f"{self.layers_name}."):
                continue
            self.frozen_names.add(name)
            owner, _, leaf = name.rpartition(".")
            value = torch.empty(parameter.shape, device=device)
            if device.type != "meta":
                value = self._read(name, parameter.shape).to(device)
            self.model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _take_(self, folder: ModelFolder, device: torch.device, model: Any, *, part: str = "text_config") -> None:
        """Hold a model that was built without weights.

        Args:
            part: of a config of several, the one that counts the layers.
        """
        self.device, self.model, self.stored = device, model, NamedTensors(folder, model)
        self.layers_name, self.layers = _layers_of(model, part)
        shapes = [tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in self.layers]
        self.kind_of = [shapes.index(one) for one in shapes]
        """Of each layer the number of the first one that has weights of the same names and shapes."""
        self._is_tuple = False
        self._calls: dict[tuple[object, ...], list[Call]] = {}
        self._packed: tuple[tuple[object, ...], Tensor, list[Call]] | None = None
        """Of the positions that were asked for last: calls hold masks, which are large."""

    @functools.cached_property
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the vectors behind the layers, such as the last norm's: those that logits have a gradient for where
        what the last layer gives is given. Asked on the meta device."""
        assert self.device.type == "meta"
        outside = {
            name: parameter.requires_grad_()
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == 1 and not name.startswith(f"{self.layers_name}.")
        }
        hidden = self.enter(torch.empty(1, 2, dtype=torch.int64, device="meta")).detach().requires_grad_()
        self.calls(hidden)  # which tells whether layers give tuples
        with torch.enable_grad():
            logits = self.leave(hidden)
        given = [hidden, *outside.values()]
        _, *found = torch.autograd.grad(logits, given, torch.ones_like(logits), allow_unused=True)
        for parameter in outside.values():
            parameter.requires_grad_(False)
        return {
            name: tuple(parameter.shape)
            for (name, parameter), gradient in zip(outside.items(), found, strict=True)
            if gradient is not None
        }

    @property
    def kinds(self) -> frozenset[tuple[str, ...]]:
        """The names of a layer's weights, of each kind that there is."""
        return frozenset(tuple(name for name, _ in self.layers[number].named_parameters()) for number in self.kind_of)

    def layer(self, number: int) -> nn.Module:
        """A layer of its own, without weights."""
        return copy.deepcopy(self.layers[number])

    def restore_tables_(self, layer: nn.Module, number: int) -> None:
        """Make the fixed tables inside a layer on the shell's device; those that files have are read."""
        for name, buffer in list(layer.named_buffers()):
            stored = f"{self.layers_name}.{number}.{name}"
            if stored in self.stored.tensors:
                owner, _, leaf = name.rpartition(".")
                is_meta = self.device.type == "meta"
                value = torch.empty(buffer.shape) if is_meta else self._read(stored, buffer.shape)
                layer.get_submodule(owner)._buffers[leaf] = value.to(self.device, buffer.dtype)
        for part in layer.modules():
            self._restore_(part)

    def _read(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of the files, float32.

        Raises:
            ConfigError: they have none of this shape.
        """
        there = self.stored.tensors.get(name)
        if there is None or there.shape != tuple(shape):
            raise ConfigError(f"{self.stored.path}: its files have no tensor {name} of the model's shape")
        value = torch.empty(there.shape)
        self.stored.read_(name, value)
        return value

    def _name_of_head(self, name: str) -> str:
        """The head's weight; older files have another name for it, which no table has."""
        if name in self.stored.tensors:
            return name
        known = {own for own, _ in self.model.named_parameters()}
        shape = tuple(self.model.get_parameter(name).shape)
        others = [own for own, one in self.stored.tensors.items() if one.shape == shape and own not in known]
        return others[0] if len(others) == 1 else name

    def _table(self, name: str, shape: Sequence[int]) -> Table:
        """A matrix of the files.

        Raises:
            ConfigError: they have none of this shape, which is that of the model's config.
        """
        if self.stored.folder.is_plan_only:
            return Table(shape)
        stored = self.stored.alone(name)
        if stored is None:
            raise ConfigError(f"{self.stored.path}: its files have no tensor {name}, which the model needs")
        table = FileTable(self.stored.folder.file_of(stored), stored)
        if table.shape != tuple(shape):
            wanted, there = (" x ".join(f"{size:,}" for size in one) for one in (shape, table.shape))
            raise ConfigError(
                f"{self.stored.path}: by its config.json {name} is {wanted} (vocab_size x width), and its files have "
                f"it as {there}, so they do not belong together; download both again"
            )
        return table

    def _restore_(self, module: nn.Module) -> None:
        """Make the tables of a module that are not stored in files as the library initialises them."""
        tables = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
        names = [name for name, table in tables.items() if table is not None]
        for name in names:
            table = tables[name]
            assert table is not None
            module._buffers[name] = torch.empty_like(table, device=self.device)
        if names and self.device.type != "meta":
            self.model._init_weights(module)

    def enter(self, tokens: Tensor, positions: Tensor | None = None, table: TrainedTable | None = None) -> Tensor:
        """What the first layer is given: hidden values [batch, length, width] of tokens [batch, length].

        Args:
            positions: as for `calls`.
            table: of tokens, where it is trained; None: the files'.
        """
        if tokens.is_meta:  # the trace: as if all tokens differed
            numbers, ids = torch.empty(tokens.numel(), dtype=torch.int64, device="meta"), tokens
        else:
            # The table stays in its file: of what is read, the rows of these tokens alone.
            numbers, ids = torch.unique(tokens, return_inverse=True)
        found: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _StopError

        with self._rows(numbers, table), self._layers_as([first] * len(self.layers)):
            self._run(input_ids=ids, **_as_positions(positions))
        return found[0]

    @contextlib.contextmanager
    def _rows(self, numbers: Tensor, table: TrainedTable | None = None) -> Iterator[None]:
        """The table of tokens has these rows alone while this lasts."""
        rows = self.embedding_table.rows(numbers) if table is None else table.rows(numbers)
        with (
            replaced(self._embedding._parameters, "weight", rows),
            # Of gradients alone, and a number of the whole table.
            replaced(self._embedding.__dict__, "padding_idx", None),
        ):
            yield

    def calls(self, hidden: Tensor, positions: Tensor | None = None) -> list[Call]:
        """What each layer is called with beside hidden values of this shape [batch, length, width] and type.

        Args:
            positions: of tokens [batch, length], where a window holds several texts: those of each begin with 0, by
                which the model's own masks keep texts apart. None: one text a window.

        Raises:
            UnsupportedModelError: layers talk to each other beside the hidden values.
        """
        key = hidden.shape, hidden.dtype, hidden.device
        if positions is not None:
            former = self._packed
            same = former is not None and former[0] == key and not positions.is_meta
            if former is None or not same or not torch.equal(former[1], positions):
                self._packed = former = key, positions.clone(), self._noted_calls(hidden, positions)
            return former[2]
        if key not in self._calls:
            self._calls[key] = self._noted_calls(hidden, None)
        return self._calls[key]

    def _noted_calls(self, hidden: Tensor, positions: Tensor | None) -> list[Call]:
        for self._is_tuple in (False, True):  # some models take what a layer gives out of a tuple
            try:
                return self._noted(torch.zeros_like(hidden), positions)
            except (KeyError, TypeError, IndexError, AttributeError, UnsupportedModelError) as error:
                if self._is_tuple:
                    raise UnsupportedModelError(f"its layers cannot be called one by one ({error})") from error
        raise AssertionError

    def _noted(self, hidden: Tensor, positions: Tensor | None) -> list[Call]:
        calls: list[Call | None] = [None] * len(self.layers)
        first: list[Tensor] = []

        def noting(number: int) -> Callable[..., Any]:
            def note(*args: Any, **kwargs: Any) -> Any:
                given = args[0] if args else kwargs.pop("hidden_states")
                first.append(given)
                if calls[number] is not None:
                    raise UnsupportedModelError(f"layer {number} is called twice")
                if given is not first[0]:
                    raise UnsupportedModelError(f"something is done to hidden values before layer {number}")
                calls[number] = (args[1:], kwargs)
                if number == len(calls) - 1:
                    raise _StopError
                return (given,) if self._is_tuple else given

            return note

        with torch.no_grad(), self._layers_as([noting(number) for number in range(len(calls))]):
            self._run(inputs_embeds=hidden, **_as_positions(positions))
        noted = [call for call in calls if call is not None]
        if len(noted) < len(calls):
            raise UnsupportedModelError("its layers are not called in their order")
        for args, kwargs in noted:
            for value in (*args, *kwargs.values()):
                if isinstance(value, dict | list):
                    raise UnsupportedModelError(f"its layers share a {type(value).__name__} that they may change")
        return noted

    def leave(self, hidden: Tensor, readout: TrainedReadout | None = None) -> Tensor:
        """Logits [batch, length, vocabulary], float32, of what the last layer gives.

        Args:
            readout: what comes after the layers, where it is trained; None: the files'.
        """
        last = len(self.layers) - 1

        def passing(number: int) -> Callable[..., Any]:
            def skip(*args: Any, **kwargs: Any) -> Any:
                given = hidden if number == last else (args[0] if args else kwargs["hidden_states"])
                return (given,) if self._is_tuple else given

            return skip

        with (
            self._layers_as([passing(number) for number in range(last + 1)]),
            self._vectors_of(readout),
            replaced(self._head.__dict__, "forward", functools.partial(self._through_head, readout=readout)),
        ):
            out = self._run(inputs_embeds=hidden.detach())
        logits: Tensor = out.logits
        return logits.float()

    def continued(
        self,
        tokens: Tensor,
        layers: Sequence[Callable[..., Any]],
        cache: object | None,
        *,
        table: TrainedTable | None = None,
        readout: TrainedReadout | None = None,
    ) -> tuple[Tensor, object]:
        """Logits [batch, vocabulary], float32, of what comes after tokens [batch, length]; and the KV cache with these.

        Args:
            layers: called as the model calls its own.
            cache: the library's, of the tokens before; None where there are none.
            table: of tokens, where it is trained; None: the files'.
            readout: what comes after the layers, where it is trained; None: the files'.
        """
        numbers, ids = torch.unique(tokens, return_inverse=True)
        former = {} if cache is None else {"cache": cache}
        with (
            torch.no_grad(),
            self._rows(numbers, table),
            self._layers_as(layers),
            self._vectors_of(readout),
            replaced(self._head.__dict__, "forward", lambda states: self._through_head(states[:, -1:], readout)),
        ):
            out = self.model(input_ids=ids, use_cache=True, **former)
        return out.logits[:, -1].float(), out.cache

    @contextlib.contextmanager
    def _vectors_of(self, readout: TrainedReadout | None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, value in () if readout is None else readout.named_vectors():
                owner, _, leaf = name.rpartition(".")
                stack.enter_context(replaced(self.model.get_submodule(owner)._parameters, leaf, value))
            yield

    def _through_head(self, states: Tensor, readout: TrainedReadout | None = None) -> Tensor:
        table: Table = self.head_table if readout is None else HeldTable(readout.head)
        trained = None if readout is None else readout.head
        logits: Tensor = _Product.apply(states, table, trained)  # type: ignore[no-untyped-call]
        bias = self._head._parameters.get("bias")
        return logits if bias is None else logits + bias

    def _run(self, **inputs: Any) -> Any:
        with (
            contextlib.suppress(_StopError),
            without_values(self.device, are_several="position_ids" in inputs),
        ):
            return self.model(**inputs, use_cache=False)
        return None

    @contextlib.contextmanager
    def _layers_as(self, functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """The layers do other things while this lasts."""
        with contextlib.ExitStack() as stack:
            for layer, function in zip(self.layers, functions, strict=True):
                stack.enter_context(replaced(layer.__dict__, "forward", function))
            yield


@functools.lru_cache(maxsize=8)
def shell_of(path: str, device: str) -> Shell:
    """The shell of a model's folder on a kind of device; one a process.

    Raises:
        ConfigError, UnsupportedModelError: as `Shell`.
    """
    return Shell(model_folder(path), torch.device(device))


class _Product(torch.autograd.Function):
    """States times a matrix that stays in its file, or is trained, a slice of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Table, trained: Tensor | None) -> Tensor:
        ctx.table, ctx.dtype, ctx.trained = table, states.dtype, trained
        if trained is not None:
            ctx.save_for_backward(states)
        out: Tensor | None = None
        for columns, matrix in table.slices(states.device, most_bytes=SLICE_BYTES):
            part = nn.functional.linear(states, matrix)
            if out is None:
                out = part.new_empty(*states.shape[:-1], table.shape[0])
            out[..., columns] = part
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        found = gradient.new_zeros(*gradient.shape[:-1], ctx.table.shape[1])
        for columns, matrix in ctx.table.slices(gradient.device, most_bytes=SLICE_BYTES):
            found += gradient[..., columns] @ matrix.to(gradient.dtype)
            if ctx.trained is not None:
                (states,) = ctx.saved_tensors
                by_rows = gradient[..., columns].flatten(0, -2).T.to(ctx.trained.dtype)
                gradient_of(ctx.trained)[columns].addmm_(by_rows, states.flatten(0, -2).to(ctx.trained.dtype))
        return found.to(ctx.dtype), None, None


def _without_weights(folder: ModelFolder) -> Any:
    """The model as the library builds it, on the meta device."""
    return built(folder, library().AutoModelForCausalLM, read_config(folder), "no decoder that writes text")


def _as_positions(positions: Tensor | None) -> dict[str, Tensor]:
    return {} if positions is None else {"position_ids": positions}


def _layers_of(model: Any, part: str) -> tuple[str, nn.ModuleList]:
    """The list of the model's layers, and its name."""
    config = getattr(model.config, part, None) or model.config
    count = getattr(config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise UnsupportedModelError(f"it has no list of {count} layers")
    return min(found, key=lambda one: one[0].count("."))
