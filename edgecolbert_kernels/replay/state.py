"""Doing a computation again as it was done: the random states and the autocast settings that it began with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class State:
    """torch's random states, of the CPU and of the devices of `inputs` and in use, and its autocast settings, now."""

    def __init__(self, inputs: Any) -> None:
        values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
        devices = {value.device for value in values if isinstance(value, Tensor)} | _current_device()
        self._random = [RandomState(device) for device in sorted(devices | {torch.device("cpu")}, key=str)]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in _device_types()
        ]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Random numbers and autocast as they were; outside, both go on as if nothing had run."""
        now = [RandomState(state.device) for state in self._random]
        for state in self._random:
            state.restore()
        try:
            with self.autocast():
                yield
        finally:
            for state in now:
                state.restore()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        # Without the cache: the weights that a pass without a graph has cast would be found by the pass with one, where
        # they would cut the gradient off.
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


@contextmanager
def autocast_off() -> Iterator[None]:
    """For backward passes, whose operations keep the dtypes of the forward pass."""
    with ExitStack() as stack:
        for kind in _device_types():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class RandomState:
    """The state of one device's default generator, now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            self._state = torch.get_rng_state()
        elif device.type == "mps":
            self._state = torch.mps.get_rng_state()
        else:
            self._state = torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(self._state)
        elif self.device.type == "mps":
            torch.mps.set_rng_state(self._state)
        else:
            torch.get_device_module(self.device).set_rng_state(self._state, self.device)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def _device_types() -> list[str]:
    accelerator = _accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _current_device() -> set[torch.device]:
    """The accelerator, if this process uses one: an encoder may move its inputs there."""
    accelerator = _accelerator()
    if accelerator is None or not getattr(torch.get_device_module(accelerator), "is_initialized", lambda: True)():
        return set()
    return {torch.device(accelerator.type, torch.accelerator.current_device_index())}
