"""Lets the API page read docstrings in which the source speaks to doctest, editors and Lightning's own pages."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":[a-z]+:`~?(?P<target>[\w.]+)`")


class Docstrings(Extension):
    """Turns ``:class:`~a.b.C``` into code, and an ``Example:`` into the section that knows doctest's prompt."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe for each object that it has read, before the docstring is taken apart."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda role: f"`{role['target'].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
