"""If these fail, colours give the class away or shape cannot be learnt: the demo's accuracies mislead."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heatssl.data.shapes import Shapes

pytestmark = pytest.mark.slow


def tensors(data: Shapes) -> tuple[Tensor, Tensor]:
    images = np.stack([np.asarray(data.load(i)) for i in range(len(data))])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5, torch.tensor(data.labels)


@pytest.fixture(scope="module")
def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *tensors(Shapes("train")), *tensors(Shapes("val"))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return (predicted == labels).float().mean().item()


def test_a_linear_probe_on_raw_pixels_stays_under_25_percent(split: tuple[Tensor, ...]) -> None:
    """Ridge regression, solved exactly through the Gram matrix; the best of the grid on val itself is meant."""
    images, labels, val_images, val_labels = split
    mean, std = images.mean(0), images.std(0)
    pixels = ((images - mean) / std).flatten(1)
    val_pixels = ((val_images - mean) / std).flatten(1)
    gram, val_gram = pixels @ pixels.T, val_pixels @ pixels.T
    one_hot = torch.nn.functional.one_hot(labels).float() - 0.1
    reached = {}
    for strength in (1e3, 1e4, 3e4, 1e5, 3e5, 1e6):
        dual = torch.linalg.solve(gram + strength * torch.eye(len(gram)), one_hot)
        reached[strength] = ((val_gram @ dual).argmax(1) == val_labels).float().mean().item()
    print("linear probe on raw pixels:", {f"{strength:.0e}": f"{share:.2%}" for strength, share in reached.items()})
    best = max(reached.values())
    assert best == max(list(reached.values())[1:-1]), "the grid must reach over the best strength"
    assert best < 0.25


def test_a_small_supervised_network_passes_90_percent(split: tuple[Tensor, ...]) -> None:
    images, labels, val_images, val_labels = split
    torch.manual_seed(0)

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    stem = [nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    network = nn.Sequential(*stem, *block(24, 64), *block(64, 128), *block(128, 128), *head)
    network = network.to(memory_format=torch.channels_last)
    epochs, batch = 8, 64
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * len(images) // batch)
    for _ in range(epochs):
        network.train()
        for chosen in torch.randperm(len(images)).split(batch):
            quarters = images[chosen].split(batch // 4)
            turned = torch.cat([torch.rot90(part, turns, (2, 3)) for turns, part in enumerate(quarters)])
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(2 * turned), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    reached = accuracy(network, 2 * val_images, val_labels)
    print(f"small supervised network: {reached:.2%}")
    assert reached > 0.9
