"""Runs tools/model_converters/export_student.py, and what it exports."""
import os.path as osp
import runpy
import sys
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
TOOL = osp.join(ROOT, 'tools', 'model_converters', 'export_student.py')


def export(*arguments):
    """Run the tool in this process."""
    with mock.patch.object(sys, 'argv', [TOOL, *map(str, arguments)]):
        runpy.run_path(TOOL, run_name='__main__')


def assert_onnx_agrees(model, config, checkpoint, folder):
    """Export a student, and compare onnxruntime with PyTorch.

    Args:
        model (nn.Module): The plain student, with any weights.

    Returns:
        list[str]: The names of what the exported network returns.
    """
    for module in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(module, reason='ONNX cannot be written or run')
    import onnxruntime
    path = folder / 'student.onnx'
    export(config, checkpoint, path, '--size', 64, 96)
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    model.load_state_dict(weights, strict=False)  # trained projections
    images = torch.randn(3, 3, 64, 96)  # it was exported with two images
    with torch.no_grad():
        expected = tree_leaves(model.eval()(images))
    session = onnxruntime.InferenceSession(str(path))
    outputs = session.run(None, dict(images=images.numpy()))
    assert len(outputs) == len(expected)
    for output, tensor in zip(outputs, expected):
        torch.testing.assert_close(
            torch.from_numpy(output), tensor, rtol=1e-4, atol=1e-5)
    return [output.name for output in session.get_outputs()]
