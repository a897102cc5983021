"""What a model wants of a picture: its size, and what its numbers are shifted and scaled by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from albireo.data.mixing import random_bits, random_key
from albireo.errors import DataError, ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PROCESSOR_FILE", "PictureForm", "load_picture_form"]

PROCESSOR_FILE = "preprocessor_config.json"
_BILINEAR = 2
# The least and the most of a picture's area, and of width over height, that a random part has: as is usual since Inception.
_AREA = 0.35, 1.0
_RATIO = 3 / 4, 4 / 3


@dataclass(frozen=True)
class PictureForm:
    """How a picture becomes a model's input, as transformers' image processor for ViT makes it with PIL.

    Attributes:
        height: of what the model sees, in pixels.
        width: the same.
        mean: of red, green and blue, from 0 to 1: subtracted.
        std: the same: divided by.
        resample: PIL's number of the filter.
        scale: what a byte is multiplied by.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = _BILINEAR
    scale: float = 1 / 255

    def whole(self, picture: Image) -> torch.Tensor:
        """Return all of a picture, squeezed into the size: uint8, `[3, height, width]`.

        Args:
            picture: in any mode.
        """
        return self._resized(picture, None)

    def part(self, picture: Image, *, seed: int, epoch: int, index: int) -> torch.Tensor:
        """Return a random part of a picture, mirrored or not: uint8, `[3, height, width]`.

        Which is decided by the numbers alone, so that a run that goes on sees what it would have seen.

        Args:
            picture: in any mode.
            seed: the run's.
            epoch: from 0.
            index: the picture's in the data set.
        """
        bits = random_bits(random_key(seed, epoch, index), np.arange(5, dtype=np.uint64))
        draws = [float(word >> np.uint64(11)) / 2**53 for word in bits]
        area = picture.width * picture.height * (_AREA[0] + draws[0] * (_AREA[1] - _AREA[0]))
        ratio = _RATIO[0] * (_RATIO[1] / _RATIO[0]) ** draws[1]
        width = min(picture.width, max(1, round((area * ratio) ** 0.5)))
        height = min(picture.height, max(1, round((area / ratio) ** 0.5)))
        left, top = int(draws[2] * (picture.width - width + 1)), int(draws[3] * (picture.height - height + 1))
        found = self._resized(picture, (left, top, left + width, top + height))
        return found.flip(-1) if draws[4] < 0.5 else found

    def normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return bytes as a model reads them, in fp32.

        Args:
            pixels: uint8, `[..., 3, height, width]`.
        """
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() * self.scale - mean) / std

    def save(self, folder: Path) -> None:
        """Write it as transformers' `AutoImageProcessor` loads it.

        Args:
            folder: made if it is not there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PROCESSOR_FILE).write_text(json.dumps(self._options(), indent=2) + "\n")

    def _options(self) -> dict[str, Any]:
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.height, "width": self.width},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.scale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def _resized(self, picture: Image, box: tuple[int, int, int, int] | None) -> torch.Tensor:
        from PIL.Image import Resampling

        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        # Cut first: a picture that is resized with a box sees what lies around it.
        picture = picture if box is None else picture.crop(box)
        resized = picture.resize((self.width, self.height), Resampling(self.resample))
        return torch.from_numpy(np.array(resized, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def load_picture_form(folder: Path, size: tuple[int, int]) -> PictureForm:
    """Return the form of a Hugging Face folder; a usual one where it has none.

    Args:
        folder: a model's.
        size: height and width that its model wants.

    Raises:
        ModelError: the file is damaged, or does what is not done here.
        DataError: the pictures it makes are not those that the model wants.
    """
    path = folder / PROCESSOR_FILE
    if not path.is_file():
        return PictureForm(*size)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = found.get("size", {})
        # Older files have one number.
        own = (wanted, wanted) if isinstance(wanted, int) else (int(wanted["height"]), int(wanted["width"]))
        form = PictureForm(
            *own,
            mean=tuple(float(value) for value in found["image_mean"]),  # type: ignore[arg-type]
            std=tuple(float(value) for value in found["image_std"]),  # type: ignore[arg-type]
            resample=int(found.get("resample", _BILINEAR)),
            scale=float(found.get("rescale_factor", 1 / 255)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} describes no image processor of ViT's kind: {error}") from error
    if {len(found["image_mean"]), len(found["image_std"])} != {3} or min(form.std) <= 0 or not 0 <= form.resample <= 5:
        raise ModelError(f"{path} describes no image processor of ViT's kind: mean, std or resample are wrong")
    if own != size:
        raise DataError(f"{path} makes pictures of {own[0]} x {own[1]}, and the model wants {size[0]} x {size[1]}")
    return form
