from .cli import add_class_map, load_tool_config, run_tool, tool_parser
from .config import (data_sets_in, find_config, library_of, load_config,
                     running_config, scope_of, student_of, wrapper_for)
from .data_classes import (DataClasses, class_names_of, classes_in_training,
                           data_classes_of, first_difference, names_in,
                           spelt_alike)
from .markdown import markdown_table
from .running import run
from .setup_env import (allow_mmengine_checkpoints, check_version,
                        find_forks_configs)

__all__ = [
    'DataClasses', 'add_class_map', 'allow_mmengine_checkpoints',
    'check_version', 'class_names_of', 'classes_in_training',
    'data_classes_of', 'data_sets_in', 'find_config', 'find_forks_configs',
    'first_difference', 'library_of', 'load_config', 'load_tool_config',
    'markdown_table', 'names_in', 'run', 'run_tool', 'running_config',
    'scope_of', 'spelt_alike', 'student_of', 'tool_parser', 'wrapper_for'
]
