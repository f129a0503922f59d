"""What clients show of the server beside its name: description, website and icon."""

from __future__ import annotations

from base64 import b64encode

from mcp.types import Icon

DESCRIPTION = "Trains a LoRA adapter on your code base, on your own machine, and measures whether it helps."
WEBSITE = "https://pypi.org/project/peft-mcp/"
# Two low-rank matrices, tall and wide, whose product is a square; the colours are readable on light and dark.
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">'
    '<rect x="4" y="14" width="8" height="30" rx="2" fill="#e07a1f"/>'
    '<rect x="14" y="4" width="30" height="8" rx="2" fill="#e07a1f"/>'
    '<rect x="14" y="14" width="30" height="30" rx="3" fill="#3b7dd8"/></svg>'
)
ICONS = [
    Icon(src=f"data:image/svg+xml;base64,{b64encode(_SVG.encode()).decode()}", mime_type="image/svg+xml", sizes=["any"])
]
