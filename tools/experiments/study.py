"""The runs that the grids of digit scenes have in common: the paper's
ablation, its sweeps, and teachers of rising strength."""
import itertools
from typing import Any, Dict, Iterable

Entry = Dict[str, Any]
LOSS = 'model.distill_loss.'
WEIGHTS = (0.5, 1.0, 2.0, 4.0)
TEMPERATURES = (1.0, 2.0, 4.0)
ALL = tuple(itertools.product(WEIGHTS, TEMPERATURES))
# Sweeps have a seed of their own, so that no result chose its options.
SWEEP_SEED = 10
MIMIC = {
    'model.mimic_loss.type': 'mmdist.MimicLoss',
    'model.mimic_loss.loss_weight': 1.0
}

# the term of DIST that feature losses take
INTRA = dict(type='mmdist.DISTLoss', beta=0.0, gamma=1.0)


def ablation(student: str, kd: Entry, dist: Entry,
             teachers: Dict[str, Entry]) -> Dict[str, Any]:
    """The fields `runs` and `sweeps` of a grid, from the config of a student,
    its runs with KD and DIST, and the runs of teachers, the weakest first."""
    alone = 'student alone'
    kd, dist = (dict(entry, baseline=alone) for entry in (kd, dist))
    runs = {
        **teachers, alone: dict(config=student),
        'KD': kd,
        'DIST': dist,
        'DIST, inter only': dict(dist, options={LOSS + 'gamma': 0.0}),
        'DIST, intra only': dict(dist, options={LOSS + 'beta': 0.0}),
        'DIST + mimic': dict(dist, options=MIMIC),
        'KD, best of its sweep': dict(kd, best_of='KD'),
        'DIST, best of its sweep': dict(dist, best_of='DIST'),
        'KD, alpha=0': dict(kd, options={'model.alpha': 0.0}),
        'DIST, alpha=0': dict(dist, options={'model.alpha': 0.0})
    }
    for teacher in teachers:
        taught = dict(teacher=teacher, seeds=[0, 1, 2])
        runs[f'KD from {teacher}'] = {**kd, **taught}
        runs[f'DIST from {teacher}'] = {**dist, **taught}
    return dict(
        runs=runs,
        sweeps=dict(
            KD=sweep(kd, 'loss_weight'), DIST=sweep(dist, 'beta', 'gamma')))


def features(dist: Entry, others: Dict[str, Entry], **chosen) -> Entry:
    """Runs with DIST and a feature loss: the ``chosen`` one with the seeds of
    the grid, and others, by their arguments, with three ``seeds`` unless they
    name them; ``logits=False`` leaves DIST on the class logits out."""
    runs = {}
    for name, loss in {'DIST + features': chosen, **others}.items():
        options = {
            f'model.feature_loss.{field}': value
            for field, value in loss.items()
            if field not in ('logits', 'seeds')
        }
        if not loss.get('logits', True):
            options['model.distill_loss'] = None
        seeds = {} if loss is chosen else dict(
            seeds=loss.get('seeds', range(3)))
        runs[name] = dict(
            dist, baseline='student alone', options=options, **seeds)
    return runs


def sweep(run: Entry, *weights: str, settings: Iterable = ALL) -> Entry:
    """Pairs of a value for some weights of a run's loss and a temperature."""
    options = []
    for weight, tau in settings:
        chosen = dict.fromkeys((LOSS + name for name in weights), weight)
        chosen[LOSS + 'tau'] = tau
        options.append({**run.get('options', {}), **chosen})
    return dict(run, seeds=[SWEEP_SEED], options=options)


def widths(config: str, *channels: int) -> Dict[str, Entry]:
    """Teachers by the base channels of their ResNet-18, of one seed."""
    return {
        f'teacher w{width}':
        dict(
            config=config,
            seeds=[0],
            options={
                'model.backbone.base_channels': width,
                'model.backbone.stem_channels': width,
                'model.neck.in_channels': [width * 2**i for i in range(4)]
            })
        for width in channels
    }
