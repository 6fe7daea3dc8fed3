"""The grouped-convolution stencil against shifted slices written out by hand."""

import pytest
import torch

from heatssl.ops import depthwise_stencil


def by_slices(z: torch.Tensor, stencil: torch.Tensor) -> torch.Tensor:
    height, width = z.shape[2:]
    return sum(stencil[i, j] * z[:, :, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_shifted_slices_for_any_stencil_and_layout(layout):
    """An asymmetric stencil: a flipped or transposed kernel would pass with a Laplacian."""
    z = torch.randn(2, 5, 6, 7, dtype=torch.float64).to(memory_format=layout)
    stencil = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    assert torch.allclose(depthwise_stencil(z, stencil), by_slices(z, stencil))


@pytest.mark.parametrize("boundary", ["replicate", "reflect"])
def test_padded_boundaries_keep_the_interior(boundary):
    z, stencil = torch.randn(1, 2, 5, 4), torch.randn(3, 3)
    padded = depthwise_stencil(z, stencil, boundary)
    assert padded.shape == z.shape
    assert torch.allclose(padded[:, :, 1:-1, 1:-1], depthwise_stencil(z, stencil), atol=1e-6)


def test_adjoint():
    """<Lz, w> = <z, L^T w>: what autograd applies backward is the stencil's transpose."""
    z = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    stencil = torch.randn(3, 3, dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(depthwise_stencil(z, stencil), z, w)
    v = torch.randn_like(z)
    assert (depthwise_stencil(v, stencil) * w).sum().item() == pytest.approx((v * adjoint).sum().item())


@pytest.mark.parametrize(("boundary", "size"), [("interior", 2), ("reflect", 1)])
def test_too_small_a_field_is_named(boundary, size):
    with pytest.raises(ValueError, match=f"not {size}x4"):
        depthwise_stencil(torch.randn(1, 1, size, 4), torch.ones(3, 3), boundary)
