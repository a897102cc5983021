"""Batches of ever new lengths are not to wait for plans of cuDNN's."""

from __future__ import annotations

import pytest
import torch

from albireo.device import attention_for_many_shapes

pytestmark = pytest.mark.gpu


def test_cudnn_is_left_out_within_and_is_back_after() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with attention_for_many_shapes(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
