"""Losses of a user's own, in a file outside the package."""
import pytest
import torch
import torch.nn.functional as F

from mmdist.models.losses import LogitLoss
from mmdist.models.losses.functional import dist_terms
from mmdist.registry import MODELS
from tests.segmentors import (batch, build_distiller, prepared, save_teacher,
                              segmentor)


@MODELS.register_module(force=True)
class DecoupledKD(LogitLoss):
    """Zhao et al., *Decoupled Knowledge Distillation*, CVPR 2022."""

    def pair_terms(self, pair):
        labels = pair.labels()
        known = labels >= 0
        s, t = (
            logits.movedim(1, -1)[known].softmax(1)
            for logits in (pair.student, pair.teacher))
        target = F.one_hot(labels[known], s.shape[1]).bool()
        ps, pt = s[target], t[target]
        tckd = (pt * (pt / ps).log() + (1 - pt) * ((1 - pt) /
                                                   (1 - ps)).log()).mean()
        s, t = (p[~target].view(len(p), -1) for p in (s, t))
        s, t = s / s.sum(1, True), t / t.sum(1, True)
        nckd = (t * (t / s).log()).sum(1).mean()
        return dict(target=tckd, rest=8 * nckd)


@MODELS.register_module(force=True)
class StandardisedDIST(LogitLoss):
    """DIST of logits standardised per row (Sun et al., *Logit Standardization
    in Knowledge Distillation*, CVPR 2024)."""

    def terms(self, student_logits, teacher_logits, *activations):
        s, t = ((x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-7)
                for x in (student_logits, teacher_logits))
        return dist_terms(s, t, 2., *activations)


@pytest.mark.parametrize('loss, names', [
    ('DecoupledKD', ['target', 'rest']),
    ('StandardisedDIST', ['inter', 'intra']),
])
def test_a_loss_of_ones_own_trains_a_segmentor(tmp_path, loss, names):
    """Its terms are logged by their names, weighted as the heads are, and
    reach the student."""
    model = segmentor('pspnet')
    wrapper = build_distiller(
        model,
        save_teacher(model, tmp_path),
        distill_loss=dict(type=f'mmdist.{loss}')).train()
    inputs, samples = prepared(wrapper, batch())
    torch.manual_seed(0)
    pairs = wrapper.kd_pairs(inputs, samples)
    expected = {name: 0. for name in names}
    for pair in pairs:
        for name, term in wrapper.distillation.loss.pair_terms(pair).items():
            expected[name] += pair.weight * term
    torch.manual_seed(0)
    losses = wrapper.loss(inputs, samples)
    for name in names:
        torch.testing.assert_close(losses[f'loss_kd_{name}'], expected[name])
        assert losses[f'loss_kd_{name}'] > 0
    sum(losses[f'loss_kd_{name}'] for name in names).backward()
    assert wrapper.decode_head.conv_seg.weight.grad.abs().sum() > 0


def test_an_equal_teacher_has_nothing_to_say():
    """Decoupled KD of equal logits is 0 whatever the labels."""
    logits = torch.randn(5, 4, dtype=torch.float64)

    class Pair:
        student = teacher = logits
        labels = staticmethod(lambda: torch.tensor([0, 3, -1, 2, 1]))

    terms = DecoupledKD().pair_terms(Pair)
    assert all(abs(float(term)) < 1e-12 for term in terms.values())
