import math

import pytest
import torch
from diffusers import AutoencoderKLWan
from tests.models import tiny
from tests.pipelines import checkpoints

from stepbatch.models.finite import mark_infinite


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@torch.inference_mode()
def test_what_a_vae_makes_that_is_not_finite_is_nan_even_where_it_is_clamped(value: float) -> None:
    """One output channel of three; the others are as they were."""
    for vae, shape in ((tiny.vae(), (1, 4, 4, 4)), (_for_videos(), (1, 4, 2, 4, 4))):
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = vae.decode(latents, return_dict=False)[0]
        mark_infinite(vae)
        assert torch.equal(vae.decode(latents, return_dict=False)[0], before)
        list(vae.decoder.parameters())[-1][1] = value  # the last layer's bias
        after = vae.decode(latents, return_dict=False)[0]
        assert after[:, 1].isnan().all()
        assert torch.equal(after[:, ::2], before[:, ::2])


def _for_videos() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4)


@torch.inference_mode()
def test_so_it_is_with_a_unet_which_may_make_pixels() -> None:
    unet = checkpoints.unet()
    mark_infinite(unet)
    unet.conv_out.bias.data[1] = math.inf
    text = torch.zeros(1, 3, unet.config["cross_attention_dim"])
    for dictionary in (True, False):
        made = unet(torch.zeros(1, unet.config["in_channels"], 8, 8), 1, text, return_dict=dictionary)[0]
        assert made[:, 1].isnan().all()
        assert made[:, 0].isfinite().all()


def test_other_parts_stay_as_they_are() -> None:
    other = torch.nn.ModuleDict({"decoder": torch.nn.Linear(2, 2)})
    mark_infinite(other)
    other["decoder"].bias.data[0] = math.inf
    assert other["decoder"](torch.zeros(2))[0] == math.inf
