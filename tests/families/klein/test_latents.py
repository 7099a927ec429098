"""Latents, tokens and positions against Flux2KleinPipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline
from tiny_models import normal
from tiny_random_klein import tiny_random_klein

from flatlora_diffusion.families.klein.latents import (
    decode_latents,
    decode_one_by_one,
    encode_images,
    from_patches,
    from_tokens,
    image_positions,
    text_positions,
    to_patches,
    to_tokens,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    made = tiny_random_klein()
    decode_one_by_one(made.vae.eval().requires_grad_(False))
    return made


def test_latents_are_those_that_the_pipeline_makes_of_an_image(pipeline: Flux2KleinPipeline) -> None:
    pixels = normal(0, 2, 3, 32, 48).clamp(-1, 1)
    expected = pipeline._encode_vae_image(pixels, generator=torch.Generator())
    assert torch.equal(encode_images(pipeline.vae, pixels), expected)
    assert expected.shape == (2, 16, 4, 6)


def test_patches_and_tokens_are_ordered_as_in_the_pipeline() -> None:
    latents = normal(1, 2, 4, 6, 8)
    patches = Flux2KleinPipeline._patchify_latents(latents)
    assert torch.equal(to_patches(latents), patches)
    assert torch.equal(from_patches(patches), latents)
    tokens = Flux2KleinPipeline._pack_latents(patches)
    assert torch.equal(to_tokens(patches), tokens)
    positions = Flux2KleinPipeline._prepare_latent_ids(patches)
    assert torch.equal(from_tokens(tokens, 3, 4), Flux2KleinPipeline._unpack_latents_with_ids(tokens, positions))
    assert torch.equal(from_tokens(tokens, 3, 4), patches)


def test_positions_are_those_of_the_pipeline() -> None:
    for height, width in ((3, 4), (1, 5)):
        expected = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(2, 16, height, width))
        assert torch.equal(image_positions(height, width, CPU), expected[1])
    assert torch.equal(text_positions(7, CPU), Flux2KleinPipeline._prepare_text_ids(torch.zeros(1, 7, 24))[0])


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_decoding_is_the_end_of_the_pipeline(pipeline: Flux2KleinPipeline) -> None:
    """A step from sigma 0 to 0 changes no latents, so the pipeline only decodes those it is given."""
    latents = normal(2, 2, 16, 4, 6)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt_embeds": torch.zeros(2, 3, 24), "guidance_scale": 1.0, "height": 32, "width": 48}
    with torch.no_grad():
        found = pipeline(latents=latents, num_inference_steps=1, sigmas=[0.0], output_type="pt", **arguments).images
    decoded = pipeline.image_processor.postprocess(decode_latents(pipeline.vae, latents), output_type="pt")
    assert torch.equal(found, decoded)
    assert found.std() > 0
