"""The settings of the adapter: its kind (`ADAPTERS`), its layers, and new tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flatlora_diffusion.config.setting import Choice, Section, setting


@dataclass(frozen=True)
class AdapterSpec:
    """A value of --adapter.

    Attributes:
        help: its clause in the help of --adapter.
        defaults: settings that only some adapters have, with their default.
        start: `module:function` that initializes the weights, given a model with the new adapter, its PEFT config, the
            `AdapterConfig` and the seed; None for PEFT's initialization.
        directions: singular directions of W or its gradient per rank of the initialization; 0 for a random one.
        is_lora: whether it trains the factors A and B of a LoRA.
        is_linear_only: whether it does not support convolutions.
        has_nonzero_start: whether BA is not 0 before the first step, so that its initial value is subtracted.
        bytes_per_weight: device memory per trained weight, without gradient and optimizer state.
    """

    help: str
    defaults: Mapping[str, int] = field(default_factory=dict)
    start: str | None = None
    directions: int = 0
    is_lora: bool = True
    is_linear_only: bool = False
    has_nonzero_start: bool = False
    bytes_per_weight: int = 0


_PACKAGE = "flatlora_diffusion.adapter"

ADAPTERS: dict[str, AdapterSpec] = {
    "lora": AdapterSpec("lora"),
    "pissa": AdapterSpec(
        "pissa (starts at principal directions of the weights, saved as a LoRA of twice the rank, arXiv:2404.02948)",
        defaults={"pissa_iterations": 4},
        start=f"{_PACKAGE}.svd_start:start_pissa",
        directions=1,
        is_linear_only=True,
        has_nonzero_start=True,
    ),
    "lora-ga": AdapterSpec(
        "lora-ga (starts at the principal directions of the first gradients, saved as a LoRA of twice the rank, "
        "arXiv:2407.05000)",
        defaults={"lora_ga_steps": 8},
        start=f"{_PACKAGE}.svd_start:prepare_lora_ga",
        directions=2,  # different directions for A and B
        is_linear_only=True,
        has_nonzero_start=True,
    ),
    "adalora": AdapterSpec(
        "adalora (starts with 1.5 times the rank and prunes the least important ranks of all layers to the given "
        "mean rank, arXiv:2303.10512)",
        is_lora=False,
        is_linear_only=True,
        bytes_per_weight=12,
    ),
    "full": AdapterSpec(
        "full (trains all weights of the selected layers, saves the merged pipeline and a LoRA of its difference)",
        start=f"{_PACKAGE}.full:start_full",
        is_lora=False,
        is_linear_only=True,
    ),
}


if TYPE_CHECKING:
    Adapter = str  # values are plain strings
else:

    class Adapter(Choice):
        """A value of --adapter."""

        rows = ADAPTERS


def default_of_adapter(setting: str, adapter: str) -> int | None:
    """Return the default of `setting` for `adapter`; None if the adapter does not have it."""
    return ADAPTERS[adapter].defaults.get(setting)


def adapters_with(setting: str) -> tuple[str, ...]:
    """Return the adapters that use `setting`; all adapters for a general setting."""
    return tuple(name for name, row in ADAPTERS.items() if setting in row.defaults) or tuple(ADAPTERS)


@dataclass(frozen=True)
class AdapterConfig(Section):
    """Kind, size and layers of the adapter."""

    adapter: Adapter = setting("lora", "adapter type", affects="weights", legacy_default="lora")
    pissa_iterations: int | None = setting(
        None,
        "power iterations of the fast SVD of pissa; 0: exact SVD; default: "
        f"{default_of_adapter('pissa_iterations', 'pissa')}",
        min=0,
        max=100,
        affects="weights",
        legacy_default=None,
    )
    lora_ga_steps: int | None = setting(
        None,
        "training steps whose gradients initialize lora-ga; default: "
        f"{default_of_adapter('lora_ga_steps', 'lora-ga')}",
        min=1,
        max=10_000,
        affects="weights",
        legacy_default=None,
    )
    rank: int = setting(4, "rank (network dim) of the LoRA", min=1, max=1024, affects="weights")
    lora_alpha: float | None = setting(
        None, "LoRA alpha: the LoRA is scaled by alpha / rank; default: the rank", min=1e-6
    )
    lora_dropout: float = setting(0.0, "dropout probability of the LoRA's input", min=0, max=0.99)
    use_dora: bool = setting(
        False,
        "DoRA: train magnitude and direction of the weights separately (arXiv:2402.09353)",
        affects="weights",
    )
    use_rslora: bool = setting(False, "rsLoRA: scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    lora_target_modules: str = setting(
        "attn",
        "layers with LoRA: attn, attn+ff, all-linear, conv (all-linear and convolutions), or comma-separated names",
        affects="weights",
    )
    lora_unet_blocks: str | None = setting(
        None,
        "only these blocks, comma-separated, such as up_blocks.0.attentions.0,mid_block or transformer_blocks.0; "
        "default: all",
        affects="weights",
    )
    use_blora: bool = setting(
        False, "B-LoRA (arXiv:2403.14572): only the blocks up_blocks.0.attentions.0 and .1", affects="weights"
    )
    lora_block_ranks: str | None = setting(
        None, "different rank for some blocks, such as mid_block=16,up_blocks.0=8", affects="weights"
    )
    train_text_encoder: bool = setting(
        False, "also train a LoRA on the attention of both text encoders", affects="weights"
    )
    init_lora: str | None = setting(
        None,
        "LoRA file to start from, instead of a new LoRA",
        path_kind="read",
        read_at_runtime=True,
        affects="weights",
    )
    lora_init_seed: int | None = setting(
        None, "seed of the initial LoRA weights; default: --seed", min=0, max=2**63 - 1, affects="weights"
    )

    @property
    def effective_pissa_iterations(self) -> int:
        """The pissa_iterations in use."""
        return self._effective("pissa_iterations", self.pissa_iterations)

    @property
    def effective_lora_ga_steps(self) -> int:
        """The lora_ga_steps in use."""
        return self._effective("lora_ga_steps", self.lora_ga_steps)

    def _effective(self, name: str, value: int | None) -> int:
        return value if value is not None else default_of_adapter(name, self.adapter) or 0


@dataclass(frozen=True)
class TokenConfig(Section):
    """Pivotal tuning: new tokens with trained embeddings (textual inversion)."""

    token_abstraction: str = setting("TOK", "comma-separated words of the prompts to replace by new tokens")
    num_new_tokens_per_abstraction: int = setting(2, "number of new tokens per placeholder word", min=1, max=64)
    train_text_encoder_ti: bool = setting(False, "pivotal tuning: train new token embeddings with the LoRA")
    train_text_encoder_ti_frac: float = setting(
        0.5, "fraction of the steps that train the new token embeddings", min=0, max=1
    )
    train_text_encoder_frac: float = setting(1.0, "fraction of the steps that train the text encoders", min=0, max=1)

    @property
    def placeholders(self) -> list[str]:
        """The words of the prompts that are replaced by new tokens."""
        return [word.strip() for word in self.token_abstraction.split(",") if word.strip()]
