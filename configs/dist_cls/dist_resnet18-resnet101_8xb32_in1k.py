_base_ = 'dist_resnet18-resnet34_8xb32_in1k.py'
model = dict(
    teacher=dict(
        config='mmpretrain::resnet/resnet101_8xb32_in1k.py',
        checkpoint='https://download.openmmlab.com/mmclassification/v0/resnet/'
        'resnet101_8xb32_in1k_20210831-539c63f8.pth'))
