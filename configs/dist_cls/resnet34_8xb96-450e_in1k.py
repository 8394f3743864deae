_base_ = 'resnet18_8xb96-450e_in1k.py'
model = dict(backbone=dict(depth=34))
