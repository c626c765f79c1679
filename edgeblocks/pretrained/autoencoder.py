"""An autoencoder of Hugging Face's diffusers: pictures into latents, and latents into pictures.

Its modules are the library's own. Each half is built without weights and filled from the file where it is used, and
nothing is asked of a hub. Latents are what `shift_factor` and `scaling_factor` of the config make of the encoder's: of
about unit variance.
"""

import functools
import hashlib
import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeblocks.data.file_identity import file_identity
from edgeblocks.data.pictures import pictures_together
from edgeblocks.errors import ConfigError
from edgeblocks.files.tensor_file import READABLE
from edgeblocks.pretrained.model_folder import CONFIG, opened, read_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = ("AutoencoderKL", "AutoencoderTiny")
LIBRARY_BYTES = 280_000_000
"""Of memory that diffusers takes with all that it imports, measured 220 to 260 MB."""
_PROBE = 256
"""Side of the picture whose shapes are followed through the network."""
_FORMER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Parts of the attention as files of before 2023 name them."""


class Encoder(nn.Module):
    """The half that makes latents."""

    def __init__(self, network: nn.Module, *, shift: float, scale: float) -> None:
        super().__init__()
        self.encoder: nn.Module = network.get_submodule("encoder")
        self.quant_conv: nn.Module | None = getattr(network, "quant_conv", None)
        self._is_exact = type(network).__name__ == "AutoencoderTiny"
        self._shift, self._scale = shift, scale

    def forward(self, pixels: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 2 C h w"]:
        """Means and deviations of the latents of pictures between -1 and 1."""
        found = self.encoder(pixels)
        found = found if self.quant_conv is None else self.quant_conv(found)
        # A normal distribution for each latent, log-variances behind the means (arXiv 1312.6114), bounded as there.
        mean, log_variance = (found, None) if self._is_exact else found.chunk(2, dim=1)
        deviation = torch.zeros_like(mean) if log_variance is None else (log_variance.clamp(-30, 20) / 2).exp()
        return torch.stack([(mean - self._shift) * self._scale, deviation * self._scale], dim=1)


class Decoder(nn.Module):
    """The half that makes pictures."""

    def __init__(self, network: nn.Module, *, shift: float, scale: float) -> None:
        super().__init__()
        self.post_quant_conv: nn.Module | None = getattr(network, "post_quant_conv", None)
        self.decoder: nn.Module = network.get_submodule("decoder")
        self._shift, self._scale = shift, scale

    def forward(self, latents: Float[Tensor, "b C h w"]) -> Float[Tensor, "b c H W"]:
        """Pictures, about between 0 and 1."""
        found = latents / self._scale + self._shift
        found = found if self.post_quant_conv is None else self.post_quant_conv(found)
        made: Tensor = self.decoder(found)
        return made / 2 + 0.5


Half = TypeVar("Half", Encoder, Decoder)


class Autoencoder:
    """A folder with an autoencoder. The library is imported, and shapes are checked, where it is first used."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ConfigError: it is no such folder.
        """
        self.path = path
        self.config = read_config(path)
        self._class = self.config.get("_class_name")
        if self._class not in CLASSES:
            found = f"is of the class {self._class}" if isinstance(self._class, str) else "names no _class_name"
            raise ConfigError(
                f"{path / CONFIG} {found}; an autoencoder is needed whose class is {' or '.join(CLASSES)}. A whole "
                f"pipeline has it in its folder vae"
            )
        if not (path / WEIGHTS).exists():
            others = sorted(one.name for end in ("*.safetensors", "*.bin") for one in path.glob(end))
            hint = f" It has {others[0]}: write it with diffusers' save_pretrained." if others else ""
            raise ConfigError(f"{path} has no {WEIGHTS}, the autoencoder's weights; download it.{hint}")
        self._file = opened(path / WEIGHTS)
        unreadable = sorted({one.dtype for one in self._file.tensors.values()} - READABLE.keys())
        if unreadable:
            raise ConfigError(f"{path / WEIGHTS} has tensors of {unreadable[0]}; the autoencoder in float32 is needed")

    @property
    def latent_channels(self) -> int:
        """Of the latents, as the config has them."""
        return self._whole_number("latent_channels", 4)

    @property
    def picture_channels(self) -> int:
        """Of pictures: 3 are colours, 1 is grey."""
        return self._whole_number("in_channels", 3)

    @functools.cached_property
    def factor(self) -> int:
        """Pixels along the side of a latent.

        Raises:
            ConfigError: the library is missing, or builds another network of the config than the file has.
        """
        channels, latents = self.picture_channels, self.latent_channels
        with torch.device("meta"), torch.no_grad(), self._explained():
            encoded = self._half(Encoder)(torch.empty(1, channels, _PROBE, _PROBE))
            made = self._half(Decoder)(encoded[:, 0])
        side: int = encoded.shape[-1]
        if encoded.shape[2] != latents or made.shape != (1, channels, _PROBE, _PROBE):
            raise ConfigError(
                f"{self.path}: pictures of {_PROBE}x{_PROBE}x{channels} become latents of {encoded.shape[2]} channels "
                f"and come back as {'x'.join(map(str, made.shape[2:]))}x{made.shape[1]}; its config says that latents "
                f"have {latents} and that pictures come back as they were"
            )
        return _PROBE // side

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture.

        Raises:
            ConfigError: it cannot be divided; and as `factor`.
        """
        factor = self.factor
        if height % factor or width % factor:
            side = max(factor, min(height, width) // factor * factor)
            raise ConfigError(
                f"pictures are {height}x{width}, and the autoencoder in {self.path} makes a latent of "
                f"{factor}x{factor} pixels, which does not divide them; use --set image_size={side}"
            )
        return self.latent_channels, height // factor, width // factor

    def sha256(self) -> str:
        """Of its two files; they are read once in a process.

        Raises:
            ConfigError: one cannot be read.
        """
        try:
            return _sha256(self.path, *(file_identity((self.path / name).stat()) for name in (CONFIG, WEIGHTS)))
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}; download it again") from error

    def encoder(self, device: str) -> Encoder:
        """With its weights; on "meta" without.

        Raises:
            ConfigError: as `factor`.
        """
        return self._filled(self._half(Encoder), device)

    def decoder(self, device: str) -> Decoder:
        """The same for the other half."""
        return self._filled(self._half(Decoder), device)

    def _half(self, kind: type[Half]) -> Half:
        """A half on the meta device, whose parameters the file has."""
        with self._explained(), torch.device("meta"):
            network: Any = getattr(library(), str(self._class)).from_config(self.config)
            shift, scale = float(network.config.shift_factor or 0), float(network.config.scaling_factor)
            if not 0 < abs(scale) < np.inf or not np.isfinite(shift):
                raise ConfigError(f"{self.path / CONFIG}: shift_factor {shift} and scaling_factor {scale} are no scale")
            half = kind(network, shift=shift, scale=scale).eval().requires_grad_(False)
        for name, parameter in half.named_parameters():
            stored = self._file.tensors.get(self._name_in_file(name))
            if stored is None:
                raise ConfigError(
                    f"{self.path / WEIGHTS} lacks {name}, which an autoencoder of its config has; download it again"
                )
            if stored.shape[: parameter.ndim] != tuple(parameter.shape) or math.prod(stored.shape) != parameter.numel():
                raise ConfigError(
                    f"{self.path / WEIGHTS}: {name} has the shape {list(stored.shape)}, and of its config it is "
                    f"{list(parameter.shape)}; the two are of different autoencoders"
                )
        return half

    def _filled(self, half: Half, device: str) -> Half:
        if device == "meta":
            return half
        for name, parameter in list(half.named_parameters()):
            value = torch.empty(parameter.shape)
            try:
                self._file.read_(self._name_in_file(name), value)
            except OSError as error:
                raise ConfigError(f"{self.path / WEIGHTS} cannot be read: {error}; download it again") from error
            owner, _, leaf = name.rpartition(".")
            half.get_submodule(owner)._parameters[leaf] = nn.Parameter(value.to(device), requires_grad=False)
        return half

    def _name_in_file(self, name: str) -> str:
        if name in self._file.tensors:
            return name
        owner, _, leaf = name.rpartition(".")
        for now, former in _FORMER_NAMES.items():
            if owner.endswith(f".{now}"):
                return f"{owner.removesuffix(now)}{former}.{leaf}"
        return name

    def _whole_number(self, name: str, usual: int) -> int:
        value = self.config.get(name, usual)
        if type(value) is not int or not 1 <= value <= 1024:
            raise ConfigError(f"{self.path / CONFIG}: {name} is {value!r}, and a number of channels is needed")
        return value

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the library says of a config that it cannot use, in our words."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # of any kind: the config may come from anywhere
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{self.path}: diffusers makes no {self._class} of its config.json ({first[:300]}); download it again"
            ) from error


@functools.lru_cache(maxsize=4)
def autoencoder(path: str) -> Autoencoder:
    """A folder that was opened before in this process, or is now.

    Raises:
        ConfigError: as `Autoencoder`.
    """
    return Autoencoder(Path(path).expanduser())


@functools.lru_cache(maxsize=4)
def _sha256(path: Path, *_identities: object) -> str:
    together = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (path / name).open("rb") as file:
            together.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return together.hexdigest()


def library() -> Any:
    """diffusers, which says nothing by itself.

    Raises:
        ConfigError: it is not installed.
    """
    former = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what it tries of other libraries while it is imported
    try:
        found = importlib.import_module("diffusers")
        for name in CLASSES:
            getattr(found, name)  # imported when it is asked for
    except ModuleNotFoundError as error:
        raise ConfigError("latents need diffusers, which is not installed: pip install 'edgeblocks[vae]'") from error
    finally:
        logging.disable(former)
    found.utils.logging.set_verbosity_error()
    return found


def encoded(encoder: Encoder, pixels: NDArray[np.uint8], *, channels: int, device: str) -> NDArray[np.float32]:
    """Means and deviations float32 [n, 2, C, h, w] of a piece of pictures uint8 [n, H, W, 1 or `channels`]."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    with torch.inference_mode():
        images = images.expand(-1, channels, -1, -1).to(device)  # grey becomes three equal colours
        rows: NDArray[np.float32] = encoder(images / 127.5 - 1).cpu().contiguous().numpy()
    return rows


def encoded_means(network: Autoencoder, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Means of the latents float32 [N, C, h, w] of pictures uint8 [N, H, W, c], a few at a time on the processor."""
    encoder, together = network.encoder("cpu"), pictures_together(*pixels.shape[1:3])
    pieces = [
        encoded(encoder, pixels[start : start + together], channels=network.picture_channels, device="cpu")[:, 0]
        for start in range(0, len(pixels), together)
    ]
    return np.concatenate(pieces)


def decoded(decoder: Decoder, latents: NDArray[np.float32], *, device: str) -> NDArray[np.float32]:
    """Pictures float32 [n, c, H, W], about between 0 and 1, of a piece of latents [n, C, h, w]."""
    with torch.inference_mode():
        made: NDArray[np.float32] = decoder(torch.from_numpy(latents).to(device)).cpu().contiguous().numpy()
    return made
