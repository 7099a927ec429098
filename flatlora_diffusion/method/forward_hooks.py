"""Standing in for the forward of a module, and giving it back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn


class Seam:
    """A module whose forward another one can stand in for; `forward` stays what it was."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._outer: Callable[..., Tensor] | None = module.__dict__.get("forward")  # of a library that wraps it
        self._replacement: Callable[..., Tensor] | None = None
        self.forward: Callable[..., Tensor] = module.forward

    def attach(self, forward: Callable[..., Tensor]) -> None:
        self._replacement = Interception(forward)
        self._module.forward = self._replacement

    def restore(self) -> None:
        """Undo `attach`, unless another library has wrapped the module since: then ours stays below, inert."""
        if self._replacement is None or not self.is_ours:
            return
        del self._module.forward
        if self._outer is not None:
            self._module.forward = self._outer

    @property
    def is_bare(self) -> bool:
        """Whether nobody else stood in for it before."""
        return self._outer is None

    @property
    def is_ours(self) -> bool:
        """Whether nobody has stood in for it since."""
        return self._module.__dict__.get("forward") is self._replacement


class Interception(partial[Tensor]):
    """The forward that an attached layer has; its type tells that one is attached already."""
