"""A stand-in for kohya's sd-scripts: a network module and a training loop with its seam, in its order of calls.

As `train_network.py` and `networks/lora.py` of sd-scripts have it at commit 48d368f (February 2026): the network
replaces the forward of each base layer and lets go of the layer, the step begins inside of `accumulate`, a sample is
drawn after each optimizer step with the network still in training mode, and validation puts it into evaluation.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Unet(nn.Module):
    """Linear layers and a convolution, such as the network finds in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.to_q = nn.Linear(8, 8, bias=False)
        self.to_out = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(image)).flatten(2).mT
        return self.to_out(torch.tanh(self.to_q(hidden)))


class LoraModule(nn.Module):
    def __init__(self, name: str, base: Any, rank: int, alpha: float, dropout: float | None) -> None:
        super().__init__()
        self.lora_name, self.org_module, self.dropout = name, base, dropout
        if isinstance(base, nn.Conv2d):
            self.lora_down: nn.Module = nn.Conv2d(base.in_channels, rank, 3, padding=1, bias=False)
            self.lora_up: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(base.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.scale, self.multiplier = alpha / rank, 1.0
        self.register_buffer("alpha", torch.tensor(alpha))

    def apply_to(self) -> None:
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward
        del self.org_module

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lora_down(x)
        if self.dropout is not None and self.training:
            hidden = nn.functional.dropout(hidden, self.dropout)
        result: Tensor = self.org_forward(x) + self.lora_up(hidden) * self.multiplier * self.scale
        return result


class Network(nn.Module):
    def __init__(
        self, text_encoders: list[nn.Module], unet: nn.Module, rank: int, alpha: float, **others: Any
    ) -> None:
        super().__init__()
        self.others = others

        def modules(prefix: str, root: nn.Module) -> list[LoraModule]:
            found = [(name, part) for name, part in root.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
            dropout = others.get("dropout")
            return [LoraModule(f"{prefix}_{name}", part, rank, alpha, dropout) for name, part in found]

        self.unet_loras = modules("lora_unet", unet)
        self.text_encoder_loras = [lora for one in text_encoders for lora in modules("lora_te1", one)]

    def set_multiplier(self, multiplier: float) -> None:
        for lora in [*self.text_encoder_loras, *self.unet_loras]:
            lora.multiplier = multiplier

    def apply_to(self, _text_encoder: Any, _unet: Any, with_text_encoder: bool, with_unet: bool) -> None:
        self.text_encoder_loras = self.text_encoder_loras if with_text_encoder else []
        self.unet_loras = self.unet_loras if with_unet else []
        for lora in [*self.text_encoder_loras, *self.unet_loras]:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def prepare_optimizer_params(self, _text_rate: Any, rate: float, _default: float) -> Any:
        self.requires_grad_(True)
        return [{"params": list(self.parameters()), "lr": rate}], ["unet"]

    def prepare_grad_etc(self, _text_encoder: Any, _unet: Any) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, _text_encoder: Any, _unet: Any) -> None:
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def save_weights(self, file: str, _dtype: Any, metadata: dict[str, str]) -> None:
        save_file(self.state_dict(), file, metadata)


def networks_lora() -> ModuleType:
    """What `importlib` finds as `networks.lora`."""
    module: Any = ModuleType("networks.lora")

    def create_network(
        multiplier: float, rank: int, alpha: float, vae: Any, text_encoder: Any, unet: Any, **others: Any
    ) -> Network:
        return Network(text_encoder, unet, rank, alpha, **others)

    def create_network_from_weights(
        multiplier: float, file: str, vae: Any, text_encoder: Any, unet: Any, weights_sd: Any = None, **others: Any
    ) -> tuple[Network, dict[str, Tensor]]:
        weights = load_file(file)
        rank = len(next(tensor for name, tensor in weights.items() if "lora_down" in name))
        return Network(text_encoder, unet, rank, rank, **others), weights

    module.create_network, module.create_network_from_weights = create_network, create_network_from_weights
    return module


class Training:
    """`NetworkTrainer.train`, as far as the network sees it."""

    def __init__(self, network_module: Any, images: list[Tensor], **arguments: Any) -> None:
        usual = {"seed": 3, "max_train_steps": 4, "gradient_accumulation_steps": 1, "network_args": [], "resume": None}
        self.args = Namespace(**(usual | arguments))
        self.images = images
        self.samples: list[Tensor] = []
        self.validations: list[Tensor] = []
        torch.manual_seed(0)
        self.unet, self.text_encoder = Unet(), nn.Sequential(nn.Linear(4, 4))
        pairs = dict(argument.split("=", 1) for argument in self.args.network_args)
        self.network = network_module.create_network(
            1.0, 2, 3.0, None, [self.text_encoder], self.unet, neuron_dropout=None, **({"dropout": None} | pairs)
        )
        if hasattr(self.network, "prepare_network"):
            self.network.prepare_network(self.args)
        self.network.apply_to([self.text_encoder], self.unet, False, True)

    def train(self, steps: int | None = None, save_state: Path | None = None) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.args.gradient_accumulation_steps)
        groups, _ = self.network.prepare_optimizer_params(None, 0.05, 0.05)
        optimizer = torch.optim.AdamW(groups)
        self.unet.requires_grad_(False).eval()
        unet = accelerator.prepare(self.unet)
        network, optimizer = accelerator.prepare(self.network, optimizer)
        bare: Any = accelerator.unwrap_model(network)
        bare.prepare_grad_etc(self.text_encoder, unet)
        if self.args.resume is not None:
            accelerator.load_state(str(self.args.resume))
        on_step_start: Callable[..., Any] = getattr(bare, "on_step_start", lambda *_: None)
        bare.on_epoch_start(self.text_encoder, unet)
        wanted = self.args.max_train_steps if steps is None else steps
        for step in range(wanted * self.args.gradient_accumulation_steps):
            with accelerator.accumulate(network):
                on_step_start(self.text_encoder, unet)
                loss = unet(self.images[step % len(self.images)]).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(bare.get_trainable_params(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if accelerator.sync_gradients:
                with torch.no_grad():
                    self.samples.append(unet(self.images[0]))
                    with self.eval_mode(bare):
                        self.validations.append(unet(self.images[0]))
        if save_state is not None:
            accelerator.save_state(str(save_state))

    @contextmanager
    def eval_mode(self, network: nn.Module) -> Iterator[None]:
        network.eval()
        yield
        network.train()

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """What sd-scripts would save."""
        file = folder / "saved.safetensors"
        self.network.save_weights(str(file), None, {"ss_steps": "4"})
        return load_file(file)
