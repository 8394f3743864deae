_base_ = 'resnet18_8xb96-450e_in1k.py'
model = dict(backbone=dict(depth=50), head=dict(in_channels=2048))
