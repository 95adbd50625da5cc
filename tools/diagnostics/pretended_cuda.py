"""Two GPUs pretended on a machine without one, so that what CUDA would refuse, wait for or replay shows there.

Tensors stay on the CPU and keep their values. `pretended()` notes for each storage the device that it would be on, says
so where a tensor is asked, raises where CUDA would, counts what waits for a GPU, and keeps a random stream for each.
`emulated_graphs()` stands for CUDA graphs: operations are carried out, noted, undone, and carried out again at each
replay, on the same memory with the same constants. tests/test_devices.py uses both, gpu_check.py the second.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
RANDOM = re.compile(r"rand(n|int|perm)?(_like)?|normal_?|uniform_|dropout_?")
WAITS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero", "unique"}
WAITS |= {"equal", "masked_select", "__format__", "__repr__", "_local_scalar_dense", "_unique2"}
# Of tensors, but no operation on what is in them
ASIDE = {"__get__", "__set__", "__deepcopy__", "__hash__", "__len__", "__reduce_ex__", "__setstate__", "grad"}
ASIDE |= {"requires_grad_", "size", "dim", "numel", "stride", "data_ptr", "storage_offset", "element_size"}
ASIDE |= {"is_floating_point", "is_complex", "is_contiguous", "is_pinned", "untyped_storage", "register_hook", "set_"}
ASIDE |= {"_has_compatible_shallow_copy_type", "get_device", "type"}


class DeviceError(RuntimeError):
    """What CUDA would raise."""


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def whole(device: Any) -> torch.device:
    """With its number."""
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


# --- Devices
class Pretend(TorchFunctionMode):
    """`waits` counts what waits for a GPU, `touched` the tensors that were made on each."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[int, tuple] = {}  # of each storage by its address: a weak reference, and the device
        self.waits, self.touched = Counter(), Counter()
        self.streams: dict[torch.device, torch.Tensor] = {}  # states of the random generators

    def place(self, tensor: torch.Tensor) -> torch.device:
        reference, device = self.notes.get(tensor.untyped_storage()._cdata, (None, CPU))
        return CPU if reference is None or reference.expired() else device

    def put(self, value: Any, device: torch.device, anew: bool = False) -> None:
        """Note where a result is; what has a place keeps it, unless it is `anew`."""
        for tensor in tensors_in(value):
            storage = tensor.untyped_storage()
            if anew or self.place(tensor) == CPU:
                self.notes.pop(storage._cdata, None)
                if device != CPU:
                    self.notes[storage._cdata] = StorageWeakRef(storage), device
                    self.touched[str(device)] += 1

    # --- Random streams
    def get_state(self, device: Any = "cuda") -> torch.Tensor:
        if whole(device) not in self.streams:
            self.streams[whole(device)] = torch.Generator().manual_seed(1).get_state()
        return self.streams[whole(device)].clone()

    def set_state(self, state: torch.Tensor, device: Any = "cuda") -> None:
        self.streams[whole(device)] = state.clone()

    def seed(self, seed: int) -> None:
        self.streams = {torch.device("cuda", i): torch.Generator().manual_seed(seed + 1).get_state() for i in (0, 1)}

    @contextlib.contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Random numbers come from this GPU's stream."""
        own = torch.get_rng_state()
        torch.set_rng_state(self.get_state(device))
        try:
            yield
        finally:
            self.set_state(torch.get_rng_state(), device)
            torch.set_rng_state(own)

    # --- Operations
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        given = [*tensors_in(args), *tensors_in([*kwargs.values()])]
        places = [self.place(tensor) for tensor in given]
        kwargs.pop("pin_memory", None)
        if func in (torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            kind = places[0].type
            return {torch.Tensor.is_cuda.__get__: kind == "cuda", torch.Tensor.is_cpu.__get__: kind == "cpu"}.get(
                func, places[0]
            )
        if name == "pin_memory":
            return args[0]
        if name in ("to", "cpu", "cuda"):
            return self.move(name, args, kwargs)
        if name in ("numpy", "__array__") and places[0] != CPU:
            raise DeviceError("can't convert cuda tensor to numpy: use Tensor.cpu()")
        target = whole(kwargs.pop("device")) if kwargs.get("device") is not None else None
        if name == "copy_":
            if places[0] != places[1] and not kwargs.get("non_blocking"):
                self.waits["copy"] += 1
        elif name in ("__getitem__", "__setitem__"):
            self.check_index(name, args, places)
        elif name not in ASIDE and target is None:
            if len({place for tensor, place in zip(given, places) if tensor.dim() or place != CPU}) > 1:
                raise DeviceError(f"{name}: expected all tensors to be on the same device, found {places}")
            if name in WAITS and CPU not in places[:1]:
                self.waits[name] += 1
        gpus = [place for place in places if place != CPU]
        home = target or (places[0] if name in ("__getitem__", "__setitem__", "copy_") else (gpus or [CPU])[0])
        with self.drawing(home) if RANDOM.fullmatch(name) and home != CPU else contextlib.nullcontext():
            result = func(*args, **kwargs)
        if name != "__set__":
            self.put(result, home, anew=target is not None)
        return result

    def move(self, name: str, args: tuple, kwargs: dict) -> torch.Tensor:
        """Tensor.to and its like: a copy, where the device is another."""
        here, there, rest = self.place(args[0]), CPU if name == "cpu" else None, []
        waits = not kwargs.pop("non_blocking", False)
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, torch.Tensor):
                there, value = self.place(value), value.dtype
            if isinstance(value, torch.dtype):
                rest.append(value)
            elif isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
                there = whole(value)
        there = there or (whole("cuda") if name == "cuda" else here)
        moved = args[0].to(*rest) if rest else args[0]
        if there != here:
            self.waits["copy"] += waits
            moved = moved.clone() if moved.untyped_storage()._cdata == args[0].untyped_storage()._cdata else moved
        self.put(moved, there, anew=there != here)
        return moved

    def check_index(self, name: str, args: tuple, places: list[torch.device]) -> None:
        for index in tensors_in(args[1]):
            if self.place(index) not in (CPU, places[0]):
                raise DeviceError(f"an index on {self.place(index)} of a tensor on {places[0]}")
            if places[0] != CPU and (index.dtype == torch.bool or (self.place(index) == CPU and index.dim())):
                self.waits["index"] += 1
        if name == "__setitem__" and isinstance(args[2], torch.Tensor) and self.place(args[2]) != places[0]:
            if any(tensors_in(args[1])) and args[2].dim():
                raise DeviceError(f"values on {self.place(args[2])} for places on {places[0]}")
            self.waits["copy"] += 1


# --- Graphs
class Recording(TorchDispatchMode):
    """Stands for a torch.cuda.CUDAGraph."""

    def __init__(self, drawing: Callable) -> None:
        super().__init__()
        self.calls, self.before, self.drawing, self.device = [], {}, drawing, CPU

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if (name := schema.name.split("::")[1]) in WAITS:
            raise DeviceError(f"{name} cannot be recorded: it waits for the GPU")
        for argument, value in (*zip(schema.arguments, args), *((a, kwargs.get(a.name)) for a in schema.arguments)):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors_in(value):
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage._cdata, (storage, storage.clone()))
        result = func(*args, **kwargs)
        if not schema.returns or any(r.alias_info is None or r.alias_info.is_write for r in schema.returns):
            self.calls.append((func, args, kwargs, result))  # all but views
        return result

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)
        self.before = {}

    def replay(self) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad(), self.drawing(self.device):
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tensors_in(result), tensors_in(func(*args, **kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class Stream:
    """Stands for a torch.cuda.Stream and its events: waiting for one counts."""

    waits = Counter()

    def __init__(self, device: Any = "cuda") -> None:
        self.device = whole(device)

    def wait_stream(self, other: "Stream") -> None:
        pass

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        self.waits["synchronize"] += 1


@contextlib.contextmanager
def emulated_graphs(mode: Pretend | None = None) -> Iterator[None]:
    """CUDA graphs, on the CPU; with `mode` the random numbers are those of its GPUs."""

    @contextlib.contextmanager
    def record(graph: Recording, stream: Stream) -> Iterator[None]:
        state = mode.get_state(stream.device) if mode else torch.get_rng_state()
        graph.device = stream.device
        try:
            with graph:
                yield
        finally:
            graph.undo()
            mode.set_state(state, stream.device) if mode else torch.set_rng_state(state)

    drawing = mode.drawing if mode else lambda device: contextlib.nullcontext()
    replaced = {"Stream": Stream, "current_stream": Stream, "graph": record, "CUDAGraph": lambda: Recording(drawing)}
    with mock.patch.multiple(torch.cuda, stream=lambda stream: contextlib.nullcontext(), **replaced):
        yield


@contextlib.contextmanager
def pretended() -> Iterator[Pretend]:
    """torch.cuda as on a machine with two GPUs."""
    mode, optimizer = Pretend(), sys.modules["torch.optim.optimizer"]
    mode.seed(0)
    group = optimizer._group_tensors_by_device_and_dtype  # of C++, which sees the true devices

    def group_by_place(lists: list, *rest: Any) -> dict:
        return {(mode.place(found[0][0][0]), dtype): found for (_, dtype), found in group(lists, *rest).items()}

    replaced = {"is_available": lambda: True, "device_count": lambda: 2, "synchronize": lambda *_: None}
    replaced |= {"get_rng_state": mode.get_state, "set_rng_state": mode.set_state, "manual_seed_all": mode.seed}
    replaced |= {"max_memory_allocated": lambda device="cuda": mode.touched.update([str(whole(device))]) or 0}
    with (
        mock.patch.multiple(torch.cuda, **replaced),
        mock.patch.object(optimizer, "_group_tensors_by_device_and_dtype", group_by_place),
        mock.patch.object(Stream, "waits", mode.waits),
        emulated_graphs(mode),
        mode,
    ):
        yield mode
