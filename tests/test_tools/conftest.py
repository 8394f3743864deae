"""What tests of tools that look at two models share."""
import pytest

from tests import helpers, segmentors

TASKS = dict(
    retina=(helpers, lambda: helpers.detector('retina'), helpers.write_coco),
    faster=(helpers, lambda: helpers.detector('faster'), helpers.write_coco),
    pspnet=(segmentors, lambda: segmentors.segmentor('pspnet'),
            segmentors.write_masks))


@pytest.fixture
def prepared(tmp_path):
    """A config, and weights of two models of it."""

    def prepare(name):
        task, model, write = TASKS[name]
        cfg = task.run_cfg(model(), write(tmp_path / 'data'), tmp_path, 1)
        cfg.val_dataloader = cfg.test_dataloader
        config = tmp_path / f'{name}.py'
        cfg.dump(str(config))
        return config, *(
            task.save_teacher(model(), tmp_path, seed=seed)['checkpoint']
            for seed in (1, 2))

    return prepare
