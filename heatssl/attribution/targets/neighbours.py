"""The class of the nearest neighbours: a class target that no classifier has been trained for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.targets.similarity import Similarity
from heatssl.attribution.targets.target import Target, TargetMaker, embed
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe
from heatssl.evaluation.knn import nearest


def neighbours(train_x: Tensor, train_y: Tensor, k: int = 20, temperature: float = 0.07) -> TargetMaker:
    """Cosine to the prototype of the class that each image's nearest neighbours vote for.

    The vote is that of :func:`heatssl.evaluation.knn_accuracy`, exp(cosine / T) (Wu et al., arXiv 1805.01978, section
    3.4). The prototype is the mean of the unit features of the neighbours that voted for the winner, weighted by their
    votes: the direction along which the vote grows.

    Args:
        train_x: pooled features (N, C) of train.
        train_y: (N,) integer labels.
        k: neighbours, at most N.
        temperature: of the votes.

    Raises:
        UserError: on features of another width than the model's, labels that do not fit them, or k out of range.
    """
    if train_x.ndim != 2 or train_y.shape != train_x.shape[:1] or not 1 <= k <= len(train_x):
        raise UserError(
            f"neighbours need features (N, C), labels (N,) and 1 <= k <= N, not {tuple(train_x.shape)}, "
            f"{tuple(train_y.shape)} and k={k}"
        )

    @torch.no_grad()
    def make(model: nn.Module, images: Tensor, probe: LinearProbe | None) -> Target:  # noqa: ARG001
        own = F.normalize(embed(model, images).float(), dim=1)
        if own.shape[1] != train_x.shape[1]:
            raise UserError(
                f"features of train have {train_x.shape[1]} channels, the model {own.shape[1]}: extract them with it"
            )
        cosine, index = nearest(own, train_x.to(own.device), k)
        votes = ((cosine - cosine.amax(dim=1, keepdim=True)) / temperature).exp()
        index = index.to(train_y.device)
        labels, position = train_y.unique(return_inverse=True)
        belongs = position[index].to(own.device)
        tally = votes.new_zeros(len(own), len(labels)).scatter_add_(1, belongs, votes)
        winner = tally.argmax(dim=1, keepdim=True)
        weight = torch.where(belongs == winner, votes, 0.0)
        members = F.normalize(train_x[index.to(train_x.device)].to(own), dim=2)
        return Similarity(model, (weight[..., None] * members).sum(dim=1))

    return make
