"""Agreement of two rankings of classes, row by row."""
from torch import Tensor


def _ranks(scores: Tensor) -> Tensor:
    """The place of each score in its row, float64; ties share the mean."""
    below = (scores[:, :, None] > scores[:, None]).sum(2)
    same = (scores[:, :, None] == scores[:, None]).sum(2)
    return below.double() + (same.double() - 1) / 2


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation of each row.

    Args:
        x (Tensor): Scores, ``(R, C)``.
        y (Tensor): The same shape.

    Returns:
        Tensor: ``(R, )``, float64; 0 where all scores of a row are equal.
    """
    a, b = (r - r.mean(1, keepdim=True) for r in map(_ranks, (x, y)))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / norms.clamp(min=0.5)


def kendall(x: Tensor, y: Tensor) -> Tensor:
    """Kendall's tau-b of each row.

    Args:
        x (Tensor): Scores, ``(R, C)``.
        y (Tensor): The same shape.

    Returns:
        Tensor: ``(R, )``, float64; 0 where all scores of a row are equal.
    """
    a, b = ((z[:, :, None] - z[:, None]).sign().flatten(1).double()
            for z in (x, y))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / norms.clamp(min=0.5)
