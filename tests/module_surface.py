"""What a guest may leave behind on a model: classes, attributes, children, parameters and hooks."""

from __future__ import annotations

from torch import nn

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]


def surface(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """What may be hung on a module: its class, attributes, children, parameters and hooks."""
    return {
        name: (
            type(module),
            tuple(vars(module)),
            tuple(module._modules),
            tuple((key, value is not None and value.data_ptr()) for key, value in module._parameters.items()),
            tuple(module._buffers),
            tuple(len(getattr(module, hooks)) for hooks in HOOKS),
        )
        for name, module in model.named_modules()
    }
