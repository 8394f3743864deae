"""tools/model_converters/export_student.py with a classifier."""
import pytest
import torch
from mmengine.config import Config

from tests.exporting import assert_onnx_agrees
from .models import build, resnet


@pytest.mark.slow
def test_onnx_of_a_classifier(tmp_path):
    model = resnet()
    torch.save(
        dict(state_dict=build(model, seed=1).state_dict()),
        tmp_path / 'student.pth')
    Config(dict(model=model,
                default_scope='mmpretrain')).dump(str(tmp_path / 'plain.py'))
    names = assert_onnx_agrees(
        build(model), tmp_path / 'plain.py', tmp_path / 'student.pth',
        tmp_path)
    assert names == ['output']
