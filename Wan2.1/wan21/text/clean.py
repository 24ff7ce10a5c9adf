"""Cleaning of prompts, as the released text encoder expects them."""

import html
import re

import ftfy


def clean(text: str) -> str:
    """The text with broken characters repaired, HTML entities resolved and whitespace made single spaces.

    Entities are resolved twice: text copied from web pages is often escaped twice.

    Reference: the official tokenizer's "whitespace" mode.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()
