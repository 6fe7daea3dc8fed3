"""If these fail, training sees other pictures than configured, or every image of a batch the same change."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import ColorJitter
from torchvision.transforms.functional import to_tensor

from heatssl.config import DataConfig
from heatssl.data import augment, denormalise, normalise
from heatssl.data.shapes import Shapes


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_nothing_configured_changes_nothing(images: Tensor) -> None:
    result = augment(images, DataConfig(flip=False))
    assert result.dtype == torch.float32
    assert torch.equal(result, images / 255)


def test_half_of_the_images_are_mirrored(images: Tensor) -> None:
    torch.manual_seed(0)
    result = augment(images.expand(400, -1, -1, -1), DataConfig())
    mirrored = (result == (images / 255).flip(-1)).flatten(1).all(1)
    untouched = (result == images / 255).flatten(1).all(1)
    assert torch.equal(mirrored, ~untouched)
    assert 160 < mirrored.sum() < 240


def test_every_image_gets_its_own_colours(images: Tensor) -> None:
    torch.manual_seed(0)
    result = augment(images.expand(40, -1, -1, -1), DataConfig(flip=False, colour_jitter=0.4))
    untouched = (result - images / 255).flatten(1).abs().amax(1) < 1e-5
    assert 1 <= untouched.sum() <= 18  # 20 % on average
    changed = result[~untouched]
    distances = torch.cdist(changed.flatten(1), changed.flatten(1)) + torch.eye(len(changed))
    assert distances.min() > 1e-3
    assert result.min() >= 0
    assert result.max() <= 1


def test_grey_is_drawn_for_each_image(images: Tensor) -> None:
    torch.manual_seed(0)
    result = augment(images.expand(200, -1, -1, -1), DataConfig(flip=False, grey=0.3))
    is_grey = (result.amax(1) - result.amin(1)).flatten(1).amax(1) < 1e-6
    assert 35 < is_grey.sum() < 90


def test_the_global_seed_repeats_a_batch(images: Tensor) -> None:
    config = DataConfig(colour_jitter=0.4, grey=0.2)
    batch, results = images.expand(8, -1, -1, -1), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(batch, config))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_half_precision_around_it_does_not_reach_it(images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert augment(images, DataConfig(colour_jitter=0.4)).dtype == torch.float32


def test_an_empty_batch_passes(images: Tensor) -> None:
    assert augment(images[:0], DataConfig(colour_jitter=0.4)).shape == (0, 3, 16, 16)


def test_normalise_and_back(images: Tensor) -> None:
    config = DataConfig()
    result = normalise(images, config)
    assert torch.allclose(result[0, 1, 2, 3], (images[0, 1, 2, 3] / 255 - config.mean[1]) / config.std[1])
    assert torch.equal(result, normalise(images / 255, config))
    assert torch.allclose(denormalise(result, config), images / 255, atol=1e-6)


def test_strong_changes_of_colour_leave_something_to_see() -> None:
    """Contrast about black is a second brightness: at SimCLR's strength a sixth of the scenes became one colour."""
    scenes = Shapes("train", 32, 200)
    images = torch.stack([to_tensor(scenes.load(i)) for i in range(200)])
    torch.manual_seed(0)
    changed = augment(images, DataConfig(flip=False, colour_jitter=0.8))
    torchvisions = torch.stack([ColorJitter(0.8, 0.8, 0.8, 0.2)(image) for image in images])

    def flat(views: Tensor) -> float:
        return (views.std(dim=(2, 3)).amax(dim=1) < 0.02).float().mean().item()

    assert flat(changed) < flat(torchvisions) + 0.03
