"""Views: inside the image, of the size and area asked for, each image on its own, in the image's own colours."""

import pytest
import torch

from heatssl.objectives.views import random_view, view_settings

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def plain(size: int = 32, scale: tuple[float, float] = (0.2, 0.9)):
    return view_settings(size, scale, colour_jitter=0.0, grey=0.0, blur=0.0)


def view(images, settings):
    return random_view(images, settings, MEAN, STD)


def unit(images):
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_crops_have_the_areas_asked_for():
    """On a ramp, what a view spans is the side of its crop; mirrored ones fall where they would rise."""
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 64).expand(64, 64)
    images = torch.stack([ramp, ramp.T, torch.zeros(64, 64)]).repeat(300, 1, 1, 1)
    shown = unit(view((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), plain(24)))
    assert shown.shape == (300, 3, 24, 24)
    width = shown[:, 0, 12, -1] - shown[:, 0, 12, 0]
    height = shown[:, 1, -1, 12] - shown[:, 1, 0, 12]
    area = width.abs() * height
    assert 0.17 < area.min() < 0.3
    assert 0.75 < area.max() < 0.95
    assert 110 < (width < 0).sum() < 190, "half of them are mirrored"
    assert area.unique().numel() > 100, "each image has its own crop"
    assert shown[:, 2].abs().max() < 1e-5, "no border is drawn in"


def test_the_whole_image_stays_as_it_is():
    images = torch.randn(16, 3, 32, 32).clamp(-1, 1)
    torch.manual_seed(0)
    shown = view(images, plain(scale=(1.0, 1.0)))
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(shown, images, strict=True)]
    mirrored = [torch.allclose(a, b, atol=1e-4) for a, b in zip(shown, images.flip(3), strict=True)]
    # A square crop of the whole image is the image; other shapes cannot have its area.
    assert any(same)
    assert any(mirrored)


def test_colours_change_in_pixel_values_whatever_the_normalisation():
    images = torch.rand(32, 3, 16, 16)
    settings = view_settings(16, (1.0, 1.0), colour_jitter=0.8, grey=0.3, blur=0.5)
    shown = []
    for mean, std in (((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), (MEAN, STD)):
        centre, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        torch.manual_seed(0)
        shown.append(random_view((images - centre) / scale, settings, mean, std) * scale + centre)
    assert torch.allclose(*shown, atol=1e-4)
    assert shown[0].min() >= 0
    assert shown[0].max() <= 1 + 1e-6
    grey = (shown[0].amax(1) - shown[0].amin(1)).flatten(1).amax(1) < 1e-5
    assert 3 <= grey.sum() <= 18


def test_the_seed_repeats_a_view_and_no_gradient_flows():
    images = torch.randn(8, 3, 32, 32, requires_grad=True)
    settings = view_settings(32, (0.2, 1.0), 0.8, 0.2, 0.5)
    shown = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            shown.append(view(images, settings))
    assert torch.equal(shown[0], shown[1])
    assert not torch.equal(shown[0], shown[2])
    assert shown[0].dtype == torch.float32
    assert not shown[0].requires_grad


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.9, 0.2), (0.5, 1.5), (0.5,)])
def test_a_crop_scale_that_is_no_range_is_refused(scale):
    with pytest.raises(ValueError, match="two fractions"):
        view_settings(32, scale, 0.0, 0.0, 0.0)
