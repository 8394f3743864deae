# The end of each training video (a fifth of its frames) is for validation,
# since neighbouring frames look alike. The 101 validation frames are then the
# test set.
_base_ = './camvid.py'
held_out = [*range(50, 62), *range(143, 163), *range(326, 367)]
train_dataloader = dict(
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(indices=[i for i in range(367) if i not in held_out]))
val_dataloader = dict(
    dataset=dict(
        data_prefix=dict(
            img_path='images/train', seg_map_path='annotations/train'),
        indices=held_out))
