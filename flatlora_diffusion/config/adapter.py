"""The settings of what is trained: the adapter, its layers, and new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flatlora_diffusion.config.setting import Section, setting

AdapterKind = Literal["lora", "rslora", "dora", "pissa", "lora-ga", "adalora", "full"]
_PISSA_ITERATIONS, _LORA_GA_STEPS = 4, 8


@dataclass(frozen=True)
class AdapterConfig(Section):
    """The LoRA."""

    adapter: AdapterKind = setting(
        "lora",
        "lora; rslora, as --use_rslora; dora, as --use_dora; pissa, which starts at W's largest directions "
        "(arXiv:2404.02948), or lora-ga, which starts at those of the first gradients (arXiv:2407.05000): both are "
        "saved as a plain LoRA of twice the rank; adalora, which begins with half as many ranks again and takes those "
        "that matter least over all layers until --rank is the mean (arXiv:2303.10512); full, which trains all of "
        "each layer's weights and saves the merged pipeline beside a LoRA of --rank by SVD",
        moves="weights",
        before="lora",
    )
    pissa_iterations: int | None = setting(
        None,
        f"power iterations of PiSSA's fast SVD; 0: the exact one; default: {_PISSA_ITERATIONS}",
        min=0,
        max=100,
        moves="weights",
        before=None,
    )
    lora_ga_steps: int | None = setting(
        None,
        f"steps whose batches give the gradients that LoRA-GA starts from; default: {_LORA_GA_STEPS}",
        min=1,
        max=10_000,
        moves="weights",
        before=None,
    )
    rank: int = setting(4, "rank of the LoRA", min=1, max=1024, moves="weights")
    lora_alpha: float | None = setting(None, "scale numerator, W + alpha/rank * BA; default: the rank", min=1e-6)
    lora_dropout: float = setting(0.0, "dropout in front of A", min=0, max=0.99)
    use_dora: bool = setting(
        False,
        "DoRA: train the rows' magnitudes apart from their directions (arXiv:2402.09353); as --adapter dora",
        moves="weights",
    )
    use_rslora: bool = setting(
        False, "rank-stabilized scale, alpha/sqrt(rank) (arXiv:2312.03732); as --adapter rslora"
    )
    lora_target_modules: str = setting(
        "attn",
        "UNet layers: attn, attn+ff, all-linear, conv (all-linear and convolutions), or names with commas",
        moves="weights",
    )
    lora_unet_blocks: str | None = setting(
        None,
        "only these UNet blocks, with commas, such as up_blocks.0.attentions.0,mid_block; default: all",
        moves="weights",
    )
    use_blora: bool = setting(
        False, "B-LoRA (arXiv:2403.14572): only up_blocks.0.attentions.0 and .1", moves="weights"
    )
    lora_block_ranks: str | None = setting(
        None, "another rank for some blocks, such as mid_block=16,up_blocks.0=8", moves="weights"
    )
    train_text_encoder: bool = setting(False, "a LoRA on the attention of both text encoders too", moves="weights")
    init_lora: str | None = setting(
        None, "start from this LoRA file instead of from zero", place="read", stays_open=True, moves="weights"
    )
    lora_init_seed: int | None = setting(
        None, "seed of the LoRA's first weights alone; default: --seed", min=0, max=2**63 - 1, moves="weights"
    )

    @property
    def is_dora(self) -> bool:
        return self.use_dora or self.adapter == "dora"

    @property
    def is_rslora(self) -> bool:
        return self.use_rslora or self.adapter == "rslora"

    @property
    def iterations(self) -> int:
        """Those of PiSSA's SVD in force."""
        return _PISSA_ITERATIONS if self.pissa_iterations is None else self.pissa_iterations

    @property
    def slope_steps(self) -> int:
        """The steps in force whose batches give LoRA-GA's gradients."""
        return _LORA_GA_STEPS if self.lora_ga_steps is None else self.lora_ga_steps


@dataclass(frozen=True)
class TokenConfig(Section):
    """Pivotal tuning: new tokens whose embeddings are trained."""

    token_abstraction: str = setting("TOK", "words in the prompts that stand for new tokens, with commas")
    num_new_tokens_per_abstraction: int = setting(2, "new tokens for each of these words", min=1, max=64)
    train_text_encoder_ti: bool = setting(False, "train embeddings of new tokens along with the UNet's LoRA")
    train_text_encoder_ti_frac: float = setting(0.5, "share of the run that trains them", min=0, max=1)
    train_text_encoder_frac: float = setting(1.0, "share of the run that trains the text encoders", min=0, max=1)

    @property
    def placeholders(self) -> list[str]:
        """The words in the prompts that stand for new tokens."""
        return [word.strip() for word in self.token_abstraction.split(",") if word.strip()]
