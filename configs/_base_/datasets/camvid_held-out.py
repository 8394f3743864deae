# CamVid with the end of each of the three training videos for validation (a
# fifth of their frames: neighbours look alike), so that the validation frames
# are a test, which chooses nothing.
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
test_dataloader = dict(
    dataset=dict(
        data_prefix=dict(
            img_path='images/val', seg_map_path='annotations/val')))
