from .digit_images import write_digit_images
from .digit_scenes import (draw_scene, iter_scenes, scenes_manifest,
                           write_digit_scenes)

__all__ = [
    'draw_scene', 'iter_scenes', 'scenes_manifest', 'write_digit_images',
    'write_digit_scenes'
]
