"""Tells torch.compile's caches on disk which fastnn a graph was compiled with: they do not look inside operators."""

import hashlib
from pathlib import Path

import torch


def _digest():
    """A digest of the fake kernels: sizes and strides of operators' results are all that generated code depends on."""
    files = sorted((Path(__file__).parent / "_fake").glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def tag_cache_keys():
    """Appends the digest to torch.compiler.config.cache_key_tag, behind a tag that is set already."""
    config, own = torch.compiler.config, f"fastnn-{_digest()}"
    if own not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {own}".strip()
