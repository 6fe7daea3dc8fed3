"""Other colours for each image of a batch: what contrast, brightness, saturation and hue are to SimCLR."""

from torch import nn

_PROBABILITY = 0.8  # of changing colours at all: SimCLR, arXiv:2002.05709, appendix A


def colour_changes(strength: float, grey: float) -> list[nn.Module]:
    """Random operations on images (B, 3, H, W) in [0, 1], each image on its own, by torch's global generator.

    Args:
        strength: s; in 80 % of the images brightness, contrast (about the mean) and saturation change by factors
            between 1 - s and 1 + s, hue by up to s / 4 of a turn. 0: none does.
        grey: probability of turning grey.
    """
    import kornia.augmentation as K  # a slow import, and the default augmentation needs none of it

    changes: list[nn.Module] = []
    if strength > 0:
        # ColorJitter is torchvision's; the contrast of ColorJiggle is a factor about black, a second brightness.
        changes.append(K.ColorJitter(strength, strength, strength, min(strength / 4, 0.5), p=_PROBABILITY))
    if grey > 0:
        changes.append(K.RandomGrayscale(p=grey))
    return changes
