"""Heads that classify the tokens of a text (GLIP, Grounding DINO)."""
from typing import Optional, Sequence, Tuple

from torch import Tensor, nn

from mmdist.errors import ConfigError

LEAST_LOGIT = -50.
"""Logit of a token that a caption does not have but others of the batch do."""


def reads_text(model: nn.Module) -> bool:
    """Whether a model classifies the tokens of a text."""
    return hasattr(model, 'language_model')


def check_texts(student: nn.Module, teacher: nn.Module,
                class_map: Optional[Sequence[int]]) -> None:
    """Raise ConfigError if one model alone classifies the tokens of a text,
    or if both do and there is a class map."""
    texts = [reads_text(model) for model in (student, teacher)]
    if texts[0] != texts[1]:
        raise ConfigError(
            'model.teacher.config', f'it is a {type(teacher).__name__} and '
            f'model.student a {type(student).__name__}: one classifies the '
            'tokens of a text, the other classes',
            'choose a teacher of the same kind')
    if texts[0] and class_map is not None:
        raise ConfigError(
            'model.teacher.class_map', 'it is of no use here: the text that '
            'both models are given names the classes', 'leave it out')


def common_tokens(logits_s: Tensor,
                  logits_t: Tensor,
                  dim: int,
                  masks: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Leave out the tokens, along `dim`, that no caption of the batch has.

    Where only some captions miss one, it gets a low number. Missing tokens are
    minus infinity, or those where `masks`, broadcastable to the logits, is
    False. """
    number_s, number_t = logits_s.shape[dim], logits_t.shape[dim]
    if number_s != number_t:
        raise ConfigError(
            'model.teacher.config',
            f'it reads {number_t} tokens of a text but model.student '
            f'{number_s}', 'give both the same language_model and max_tokens')
    if masks is not None:
        logits_s, logits_t = (
            logits.masked_fill(~masks, -float('inf'))
            for logits in (logits_s, logits_t))
    kept_s, kept_t = (
        logits.isfinite().movedim(dim, 0).flatten(1).any(1)
        for logits in (logits_s, logits_t))
    index = (kept_s & kept_t).nonzero()[:, 0]
    return (logits_s.index_select(dim, index).clamp(min=LEAST_LOGIT),
            logits_t.index_select(dim, index).clamp(min=LEAST_LOGIT))
