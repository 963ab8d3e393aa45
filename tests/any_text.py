"""Text by chance, for the parsers of what others write."""

from __future__ import annotations

from hypothesis import strategies as st

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
"""As `st.text()`: all that UTF-8 can encode.

To find out what that is, hypothesis encodes every character once, which takes 1.5 s of processor time.
"""
