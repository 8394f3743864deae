"""What the tests of the benchmarks have in common."""
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / 'benchmarks'


def run(tool, *arguments):
    """Run a tool of that folder."""
    return subprocess.run(
        [sys.executable,
         str(TOOLS / tool), *map(str, arguments)],
        capture_output=True,
        text=True)
