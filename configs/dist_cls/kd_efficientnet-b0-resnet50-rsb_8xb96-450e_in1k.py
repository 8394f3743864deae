_base_ = 'dist_efficientnet-b0-resnet50-rsb_8xb96-450e_in1k.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=4.0, loss_weight=1.0))
