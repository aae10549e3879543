"""How other tools write text: its encoding and, in a CSV file, the delimiter."""

import codecs

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def text_encoding(head: bytes) -> str:
    """The encoding of a file that begins with these bytes: UTF-8, or a kind of UTF-16.

    Excel's "Unicode text" and the `>` of Windows PowerShell write UTF-16.
    """
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if 0 in head[:2]:  # no text begins with the character 0
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8"


def find_delimiter(first_line: str) -> str:
    """What separates the cells: a comma, or where the first line has none, a semicolon or a tab."""
    return next((mark for mark in DELIMITERS if mark in first_line), ",")
