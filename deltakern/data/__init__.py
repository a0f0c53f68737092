"""Data: reading video, and the clip that comes with the package."""

from pathlib import Path

CLIP = Path(__file__).parent / "clips" / "bigbuckbunny.mp4"
"""The bundled clip, an excerpt of Big Buck Bunny; see :data:`CLIP_ATTRIBUTION`."""

CLIP_ATTRIBUTION = (
    "Excerpt, cut and scaled, of “Big Buck Bunny”, © 2008 Blender Foundation, www.bigbuckbunny.org, "
    "licensed under CC BY 3.0 (https://creativecommons.org/licenses/by/3.0/)."
)
