_base_ = 'resnet18_8xb96-450e_in1k.py'
model = dict(
    backbone=dict(_delete_=True, type='MobileNetV2'),
    head=dict(in_channels=1280))
