_base_ = 'mmpretrain::_base_/datasets/cifar100_bs16.py'
# the paper's strategy A1: 64 images on one GPU
train_dataloader = dict(batch_size=64)
val_dataloader = dict(batch_size=64)
test_dataloader = dict(batch_size=64)
