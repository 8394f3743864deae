"""Run mmcv's own ``setup.py`` with torch's headers precompiled.

Usage, in mmcv's source folder: ``python build_mmcv.py bdist_wheel``. Nearly
all the time of a build goes into parsing the same torch headers for each of
mmcv's files; GCC can parse them once. GCC ignores a precompiled header that
does not fit, so the worst case is a build at the usual speed.
"""
import hashlib
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

# what all of mmcv's files include; torch/extension.h would leave pybind11's
# templates to be instantiated in each of them (9 s a file instead of 2)
HEADER = '#include <torch/types.h>\n'


def precompile(cflags, post_cflags, folder):
    """Compile ``torch_headers.h`` with the flags of the files to come."""
    command = ' '.join([
        cpp_extension.get_cxx_compiler(), *cflags, *post_cflags,
        '-x c++-header'
    ])
    key = hashlib.sha1(f'{torch.__version__} {command}'.encode()).hexdigest()
    header = Path(folder, f'pch-{key[:8]}', 'torch_headers.h')
    compiled = Path(f'{header}.gch')
    if not compiled.exists():
        print('Precompiling the headers of torch', flush=True)
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(HEADER)
        # renamed when complete, so that an interruption leaves no half
        part = Path(f'{compiled}.part')
        subprocess.run(
            f'{command} -c "{header}" -o "{part}"', shell=True, check=True)
        part.rename(compiled)
    return header


def is_gcc():
    compiler = cpp_extension.get_cxx_compiler()
    version = subprocess.run([*compiler.split(), '--version'],
                             capture_output=True,
                             text=True).stdout
    return 'Free Software Foundation' in version


def with_precompiled(write):
    """Wrap torch's compile function to include the precompiled header."""

    def compile_objects(*args, **kwargs):
        try:
            header = precompile(kwargs['cflags'], kwargs['post_cflags'],
                                kwargs['build_directory'])
            kwargs['cflags'] = [
                '-include',
                shlex.quote(str(header)), *kwargs['cflags']
            ]
        except (KeyError, subprocess.CalledProcessError) as error:
            print(f'going on without precompiled headers: {error!r}')
        return write(*args, **kwargs)

    return compile_objects


def main():
    name = '_write_ninja_file_and_compile_objects'
    if hasattr(cpp_extension, name) and is_gcc():
        setattr(cpp_extension, name,
                with_precompiled(getattr(cpp_extension, name)))
    sys.path.insert(0, os.getcwd())
    sys.argv[0] = 'setup.py'
    runpy.run_path('setup.py', run_name='__main__')


if __name__ == '__main__':
    main()
