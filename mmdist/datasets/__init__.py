from .digit_scenes import draw_scene, iter_scenes, write_digit_scenes

__all__ = ['draw_scene', 'iter_scenes', 'write_digit_scenes']
