"""Artifacts under keys: canonical JSON, atomic put and get with checksums, cards. Standard library only."""

from kd.store.keys import SCHEMA, SHOWN, canonical, digest, document, plain, short, with_neutral, without_neutral
from kd.store.store import CARD, Artifact, Store, sha256_file, write_json, write_text

__all__ = [
    "CARD",
    "SCHEMA",
    "SHOWN",
    "Artifact",
    "Store",
    "canonical",
    "digest",
    "document",
    "plain",
    "sha256_file",
    "short",
    "with_neutral",
    "without_neutral",
    "write_json",
    "write_text",
]
