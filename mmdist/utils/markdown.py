"""Tables in Markdown."""
from typing import Any, Dict, List


def markdown_table(rows: List[Dict[str, Any]], missing: str = '-') -> str:
    """A table with a row for each dict and a column for each key; floats get
    four digits, and ``missing`` stands where a row has no such key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ['---'] * len(columns)]
    for row in rows:
        cells = [row.get(column, missing) for column in columns]
        lines.append([
            f'{cell:.4f}' if isinstance(cell, float) else str(cell)
            for cell in cells
        ])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
