"""Between pictures or videos and rows of latents: the VAE with its scaling, and how latent pixels make up tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch.nn import functional as F

from stepbatch.image import InputImage

PATCH = 2  # latent pixels to a side of a token, in every family so far


@dataclass(eq=False)
class Posterior:
    """A picture as its VAE sees it, before scaling: ``[C, h, w]`` each, fp32."""

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.mean.nbytes + self.std.nbytes

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Draws first of all that a request's generator draws, as in diffusers."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator).to(self.mean.device)


class LatentSpace:
    """A VAE and what surrounds it.

    Args:
        vae: Of diffusers; ``AutoencoderKL``, or one for videos, whose latents are scaled channel by channel.
        pixel: Sides of a latent pixel, in pixels.
        channels_first: Whether a token's numbers are ordered (channel, row, column), else (row, column, channel).
        device: Where the VAE computes, wherever its weights are.
        frame: How many frames a latent frame stands for; the first stands for one.
    """

    def __init__(self, vae: Any, pixel: int, channels_first: bool, device: torch.device, frame: int = 1) -> None:
        self.vae = vae
        self.pixel = pixel
        self.token = PATCH * pixel  # sides of a token, pixels
        self.channels_first = channels_first
        self.device = device
        self.frame = frame
        config = vae.config
        self.is_video = "z_dim" in config
        self.channels: int = config["z_dim"] if self.is_video else config["latent_channels"]
        if self.is_video:
            shift, scale = torch.tensor(config["latents_mean"]), 1.0 / torch.tensor(config["latents_std"])
        else:
            shift, scale = torch.tensor([config["shift_factor"] or 0.0]), torch.tensor([config["scaling_factor"]])
        self._shift, self._scale = shift.view(-1, 1, 1).to(device), scale.view(-1, 1, 1).to(device)
        self._pictures = VaeImageProcessor(vae_scale_factor=self.token)
        self._masks = VaeImageProcessor(
            vae_scale_factor=self.token, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tokens of a picture of this size, pixels."""
        return height // self.token, width // self.token

    def latent_frames(self, frames: int) -> int:
        """How many latent frames there are of so many frames."""
        return (frames - 1) // self.frame + 1

    def noise(self, width: int, height: int, generator: torch.Generator, frames: int = 1) -> torch.Tensor:
        """Noise of a picture or video of this size, ``[N, C']``."""
        rows, columns = self.grid(width, height)
        shape = self.channels, self.latent_frames(frames), PATCH * rows, PATCH * columns
        return torch.cat([self.pack(frame) for frame in torch.randn(shape, generator=generator).unbind(1)])

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """``[C, h, w]`` to rows, ``[N, C']``."""
        channels, height, width = latents.shape
        tokens = latents.reshape(channels, height // PATCH, PATCH, width // PATCH, PATCH)
        order = (1, 3, 0, 2, 4) if self.channels_first else (1, 3, 2, 4, 0)
        return tokens.permute(order).reshape(height // PATCH * (width // PATCH), -1)

    def unpack(self, tokens: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """Rows ``[N, C']`` of a picture of this size to ``[C, h, w]``."""
        rows, columns = self.grid(width, height)
        if self.channels_first:
            latents = tokens.view(rows, columns, self.channels, PATCH, PATCH).permute(2, 0, 3, 1, 4)
        else:
            latents = tokens.view(rows, columns, PATCH, PATCH, self.channels).permute(4, 0, 2, 1, 3)
        return latents.reshape(self.channels, PATCH * rows, PATCH * columns)

    def encode(self, image: InputImage, width: int, height: int) -> Posterior:
        """An input image, brought to this size, through the VAE."""
        picture = Image.frombytes("RGB", (image.width, image.height), image.pixels)
        pixels = self._pictures.preprocess(picture, height, width).to(self.device, self.vae.dtype)
        seen = self.vae.encode(pixels.unsqueeze(2) if self.is_video else pixels).latent_dist
        shape = (self.channels, height // self.pixel, width // self.pixel)
        return Posterior(seen.mean.float().reshape(shape).clone(), seen.std.float().view(shape))

    def rows(self, latents: torch.Tensor) -> torch.Tensor:
        """``[C, h, w]`` out of the VAE to rows of what the transformer works on, ``[N, C']``."""
        return self.pack((latents - self._shift) * self._scale)

    def mask(self, mask: InputImage, width: int, height: int) -> torch.Tensor:
        """A mask brought to this size, for each number of each row, ``[N, C']``: 1 where it is painted anew."""
        picture = Image.frombytes("L", (mask.width, mask.height), mask.pixels)
        pixels = self._masks.preprocess(picture, height, width)  # [1, 1, H, W]
        latents = F.interpolate(pixels, size=(height // self.pixel, width // self.pixel))[0]
        return self.pack(latents.repeat(self.channels, 1, 1)).to(self.device)

    def decode(self, tokens: torch.Tensor, width: int, height: int, frames: int = 1) -> torch.Tensor:
        """Rows ``[N, C']`` to pictures in fp32 ``[F, H, W, 3]``, 0 to 1."""
        parts = tokens.chunk(self.latent_frames(frames))
        latents = torch.stack([self.unpack(part, width, height) for part in parts], dim=1).to(self.vae.dtype)
        latents = (latents / self._scale[:, None] + self._shift[:, None]).to(self.vae.dtype)  # [C, F', h, w]
        given = latents.unsqueeze(0) if self.is_video else latents.transpose(0, 1)
        decoded: torch.Tensor = self.vae.decode(given, return_dict=False)[0]  # [1, 3, F, H, W] or [1, 3, H, W]
        pictures = decoded.view(3, frames, height, width).float()
        return pictures.div_(2).add_(0.5).clamp_(0, 1).permute(1, 2, 3, 0)  # in place, as a video is large
