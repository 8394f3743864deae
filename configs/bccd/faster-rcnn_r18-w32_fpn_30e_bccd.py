_base_ = [
    '../_base_/models/faster-rcnn_r18-w32_fpn_bccd.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/schedule_bccd.py'
]
