"""Docstrings are written for Sphinx, as those of OpenMMLab; shown as
Markdown, they need their roles and formulas taken over."""
import re
import textwrap

import griffe

ROLE = re.compile(r':(?:class|func|meth|mod|math):`~?([^`]+)`')
FORMULA = re.compile(r'\.\. math::\n((?:[ ]+.*\n?)+)')


class Roles(griffe.Extension):
    """Changes docstrings while they are read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Turn roles into code, and formulas into blocks of code."""
        if obj.docstring:
            text = ROLE.sub(r'`\1`', obj.docstring.value)
            obj.docstring.value = FORMULA.sub(as_block, text)


def as_block(match: re.Match) -> str:
    """A formula of TeX as it is written."""
    return f'```tex\n{textwrap.dedent(match[1]).strip()}\n```\n'
