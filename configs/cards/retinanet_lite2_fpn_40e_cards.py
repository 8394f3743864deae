_base_ = [
    '../_base_/models/retinanet_efficientnet-lite2_fpn.py',
    '../_base_/datasets/cards_detection.py',
    '../_base_/schedules/schedule_cards.py', '../_base_/default_runtime.py'
]
train_cfg = dict(max_epochs=40)
model = dict(bbox_head=dict(num_classes=6))
default_hooks = dict(
    logger=dict(interval=30), checkpoint=dict(interval=5, max_keep_ckpts=1))
randomness = dict(seed=0)
