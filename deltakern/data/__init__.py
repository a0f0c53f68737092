"""Data: reading video, drawing clips, the token store, and the clip that comes with the package."""

from pathlib import Path

from deltakern.data.store import TokenDataset

__all__ = ["CLIP", "CLIP_ATTRIBUTION", "TokenDataset"]

CLIP = Path(__file__).parent / "clips" / "bigbuckbunny.mp4"
"""The bundled clip, an excerpt of Big Buck Bunny; see :data:`CLIP_ATTRIBUTION`."""

CLIP_ATTRIBUTION = (
    "Excerpt, cut and scaled, of “Big Buck Bunny”, © 2008 Blender Foundation, www.bigbuckbunny.org, "
    "licensed under CC BY 3.0 (https://creativecommons.org/licenses/by/3.0/)."
)
