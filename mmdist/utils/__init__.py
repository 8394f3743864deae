from .cli import add_class_map, load_tool_config, run_tool, tool_parser
from .config import (class_names_of, data_sets_in, find_config, library_of,
                     load_config, scope_of, student_of, wrapper_for)
from .running import run
from .setup_env import (allow_mmengine_checkpoints, check_version,
                        find_forks_configs)

__all__ = [
    'add_class_map', 'allow_mmengine_checkpoints', 'check_version',
    'class_names_of', 'data_sets_in', 'find_config', 'find_forks_configs',
    'library_of', 'load_config', 'load_tool_config', 'run', 'run_tool',
    'scope_of', 'student_of', 'tool_parser', 'wrapper_for'
]
