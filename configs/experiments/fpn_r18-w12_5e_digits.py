# The demo's student with a shorter schedule.
_base_ = '../demo/fpn_r18-w12_8e_digits.py'
train_cfg = dict(max_epochs=5, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=1))
