from .cli import load_tool_config, run_tool, tool_parser
from .config import (class_names_of, find_config, load_config, scope_of,
                     student_of, wrapper_for)
from .running import run
from .setup_env import (allow_mmengine_checkpoints, check_version,
                        find_forks_configs)

__all__ = [
    'allow_mmengine_checkpoints', 'check_version', 'class_names_of',
    'find_config', 'find_forks_configs', 'load_config', 'load_tool_config',
    'run', 'run_tool', 'scope_of', 'student_of', 'tool_parser', 'wrapper_for'
]
