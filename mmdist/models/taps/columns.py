"""Columns of class logits: classes or tokens, activation and background."""
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mmdist.errors import ConfigError

EPS = 1e-6
"""Distance of probabilities from 0 and 1 where logits are needed."""
LEAST_LOGIT = -50.
"""Logit of a token that a caption does not have but others of the batch do."""


class Columns(NamedTuple):
    """Meaning of the columns of class logits."""
    num_classes: int  # in the first columns
    activation: str  # 'softmax' or 'sigmoid'
    background: bool = False  # whether a last column says 'none of them'

    @property
    def number(self) -> int:
        """Columns in all."""
        return self.num_classes + self.background


# Class logits, ``(N, C, *)``, and the meaning of ``C``.
ClassLogits = Tuple[Tensor, Columns]


def as_columns_of(
        wanted: Columns,
        given: Columns,
        logits: Tensor,
        class_map: Optional[Sequence[int]] = None) -> Tuple[Tensor, str]:
    """Turn the teacher's logits into the columns of the student's.

    With a ``class_map``, classes that the student lacks join the background of
    a softmax; a softmax without one is renormalised. If only the student has a
    background, its column is ``1 - max p`` of the teacher's classes. If only
    the teacher has one, it is left out. The columns of a softmax student then
    sum to 1.

    Returns:
        tuple[Tensor, str]: ``(N, wanted.number, *)``, and their activation:
        the teacher's where both have a background column or neither has.
    """
    if class_map is not None:
        chosen = [logits[:, list(class_map)]]
        if given.background and given.activation == 'softmax':
            # all that the student does not know
            others = set(range(given.number)) - set(class_map)
            rest = logits[:, sorted(others)].float()
            chosen.append(rest.logsumexp(dim=1, keepdim=True))
        elif given.background:
            chosen.append(logits[:, -1:])
        logits = torch.cat(chosen, dim=1)
    if wanted.background == given.background:
        return logits, given.activation
    log_p = _log_probabilities(logits, given)
    if given.background:
        log_p = log_p[:, :-1]
    else:
        nothing = torch.log1p(-log_p.amax(dim=1, keepdim=True).exp() + EPS)
        log_p = torch.cat([log_p, nothing], dim=1)
    if wanted.activation == 'sigmoid':
        log_p = logits_of(log_p.exp())
    return log_p, wanted.activation


def _log_probabilities(logits: Tensor, columns: Columns) -> Tensor:
    logits = logits.float()
    if columns.activation == 'sigmoid':
        return logsigmoid(logits)
    return logits.log_softmax(dim=1)


def logits_of(probabilities: Tensor) -> Tensor:
    """Logits of sigmoid probabilities, finite; float32."""
    return torch.logit(probabilities.float(), eps=EPS)


def class_log_odds(logits: Tensor, columns: Columns) -> Tensor:
    """Logits ``(N, num_classes, *)`` whose sigmoid is a class's
    probability."""
    if columns.activation == 'sigmoid':
        return logits[:, :columns.num_classes]
    return logits_of(class_probabilities(logits, columns))


def class_probabilities(logits: Tensor, columns: Columns) -> Tensor:
    """Probabilities of the classes without the background, in float32."""
    return _log_probabilities(logits, columns).exp()[:, :columns.num_classes]


def classes_of(logits: Tensor,
               num_classes: int,
               background: bool = False,
               threshold: Optional[float] = None) -> Tensor:
    """The class that each row of ``(N, C, *)`` logits predicts, ``(N, *)``.

    One class is 0 where it is there and 1 where it is not: where a second
    column, the background, is higher, or where its probability is at most the
    threshold.
    """
    if num_classes > 1:
        return class_scores(logits, num_classes).argmax(1)
    if background:
        return logits.argmax(1)
    return (logits.amax(1).sigmoid() <= threshold).long()


def class_scores(logits: Tensor, num_classes: int) -> Tensor:
    """The best score of all anchors for each class, ``(N, num_classes, *)``,
    without the background."""
    if logits.shape[1] % num_classes:  # a background
        logits = logits[:, :num_classes]
    return logits.unflatten(1, (-1, num_classes)).amax(1)


def activation_of(head: nn.Module) -> str:
    """Activation of the class logits of a head of MMDetection."""
    loss = getattr(head, 'loss_cls', None)
    sigmoid = getattr(head, 'use_sigmoid_cls',
                      getattr(loss, 'use_sigmoid', False))
    return 'sigmoid' if sigmoid else 'softmax'


def class_logits(scores: Tensor, head: nn.Module) -> Tensor:
    """Logits, for ``activation_of(head)``, of the scores for a head's loss.

    They are those of probabilities (TOOD), of one distribution for the two of
    Seesaw loss, whose scores have the classes last, or the scores as they are.
    """
    loss = getattr(head, 'loss_cls', None)
    if getattr(loss, 'activated', False):
        return logits_of(scores)
    if getattr(head, 'custom_activation', False):
        probabilities = loss.get_activation(scores.float())
        return probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    return scores


def check_alike(what: str,
                own: object,
                theirs: object,
                remedy: str = 'choose a teacher of the same kind') -> None:
    """Raise ConfigError if a fact about two models is not the same; ``what``
    is the fact, with {} for its value."""
    if own != theirs:
        raise ConfigError(
            'model.teacher.config',
            f'it {what.format(theirs)}, but model.student '
            f'{what.format(own)}', remedy)


def reads_text(model: nn.Module) -> bool:
    """Whether a model classifies the tokens of a text (GLIP, Grounding
    DINO)."""
    return hasattr(model, 'language_model')


def common_tokens(student_logits: Tensor,
                  teacher_logits: Tensor) -> Tuple[Tensor, Tensor]:
    """Leave out the tokens that no caption of the batch has.

    They are minus infinity in ``(N, T, *)`` logits. A token that only some
    captions miss gets a low number.
    """
    both = student_logits, teacher_logits
    check_alike('reads {} tokens of a text',
                *[logits.shape[1] for logits in both],
                'give both the same language_model and max_tokens')
    kept = [
        logits.isfinite().transpose(0, 1).flatten(1).any(1) for logits in both
    ]
    index = (kept[0] & kept[1]).nonzero()[:, 0]
    return tuple(
        logits.index_select(1, index).clamp(min=LEAST_LOGIT)
        for logits in both)
