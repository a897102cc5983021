"""How both sides must compute so that they can be compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from albireo.errors import AlbireoError
from albireo.verify.reference import Form

__all__ = ["comparable"]

# torch takes cuBLAS to add in a fixed order under these settings alone.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_FIXED = ":4096:8"
_NO_FIXED_ORDER = "does not have a deterministic implementation"


@contextmanager
def comparable(form: Form) -> Iterator[None]:
    """Have both sides compute so that they can be compared.

    fp32 matrices are multiplied in fp32: TF32 has 10 bits of mantissa, which hide what is to be seen. On a GPU sums are
    made in a fixed order: attention's backward otherwise adds in whatever order its blocks are done, and in 16 bits two
    runs of one program then differ by a hundredth after some tens of layers. What the user has asked torch for stays.

    Raises:
        AlbireoError: an operation of the model has no kernel that adds in a fixed order.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    fixed = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(_CUBLAS)
    if form.precision == "fp32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if form.device.type == "cuda" and not fixed[0]:
        # With warn_only, attention keeps to its kernels that add in any order.
        torch.use_deterministic_algorithms(mode=True)
        os.environ.setdefault(_CUBLAS, _CUBLAS_FIXED)
    try:
        yield
    except RuntimeError as error:
        if _NO_FIXED_ORDER not in str(error):
            raise
        raise AlbireoError(
            f"verify has sums made in a fixed order, and an operation of this model cannot: {str(error).splitlines()[0]} "
            "(to compare all the same, call torch.use_deterministic_algorithms(True, warn_only=True) before)"
        ) from error
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        torch.use_deterministic_algorithms(mode=fixed[0], warn_only=fixed[1])
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
