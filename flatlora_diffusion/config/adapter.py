"""The settings of what is trained: the adapter, its layers, and new tokens."""

from __future__ import annotations

from dataclasses import dataclass

from flatlora_diffusion.config.adapters import Adapter, default_of_adapter
from flatlora_diffusion.config.setting import Section, setting


@dataclass(frozen=True)
class AdapterConfig(Section):
    """The LoRA."""

    adapter: Adapter = setting("lora", "what is trained", moves="weights", before="lora")
    pissa_iterations: int | None = setting(
        None,
        "power iterations of PiSSA's fast SVD; 0: the exact one; default: "
        f"{default_of_adapter('pissa_iterations', 'pissa')}",
        min=0,
        max=100,
        moves="weights",
        before=None,
    )
    lora_ga_steps: int | None = setting(
        None,
        "steps whose batches give the gradients that LoRA-GA starts from; default: "
        f"{default_of_adapter('lora_ga_steps', 'lora-ga')}",
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
        "DoRA: train the rows' magnitudes apart from their directions (arXiv:2402.09353)",
        moves="weights",
    )
    use_rslora: bool = setting(False, "rank-stabilized scale, alpha/sqrt(rank) (arXiv:2312.03732)")
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
    def iterations(self) -> int:
        """The pissa_iterations in force."""
        return self._in_force("pissa_iterations", self.pissa_iterations)

    @property
    def slope_steps(self) -> int:
        """The lora_ga_steps in force."""
        return self._in_force("lora_ga_steps", self.lora_ga_steps)

    def _in_force(self, name: str, given: int | None) -> int:
        return given if given is not None else default_of_adapter(name, self.adapter) or 0


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
