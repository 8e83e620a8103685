"""How autoencoders decode: frames go through in chunks, one call each, and what the calls return is joined.

An autoencoder's config says how (`Decodes`).
"""

from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from dfa2_jax.vae.tiles import Tiles, blend


class Chunk(NamedTuple):
    """Latent frames that one call decodes, and what becomes of the frames that it returns.

    latents: of the video; a number for a method that takes a frame [B, h, w, C], not frames [B, f, h, w, C].
    num_frames: frames of the video that are ready once the chunk is decoded.
    method: of the autoencoder.
    gives_cache, takes_cache: the method returns, beside frames, what the next chunk's takes beside latents.
    dropped: first frames, which are left out.
    blended: frames over which the chunk before, that far beyond its `num_frames`, fades into this one.
    """

    latents: slice | int
    num_frames: int
    method: str = "decode"
    gives_cache: bool = False
    takes_cache: bool = False
    dropped: int = 0
    blended: int = 0

    def join(
        self, pixels: Float[np.ndarray, "F H W 3"], before: Float[np.ndarray, "b H W 3"] | None
    ) -> tuple[Float[np.ndarray, "f H W 3"], Float[np.ndarray, "a H W 3"]]:
        """Frames that are ready, and those beyond them, which the next chunk's call takes as `before`."""
        pixels = pixels[self.dropped :]
        if self.blended and before is not None:
            pixels = blend(before, pixels, self.blended, axis=0)
        return pixels[: self.num_frames], pixels[self.num_frames :]


@runtime_checkable
class Decodes(Protocol):
    """An autoencoder's config, as decoding sees it.

    tiles_itself: where memory lacks for the whole, and the caller did not ask for tiles, they are taken, as diffusers'
        example of the model takes them. Other models leave the choice to the caller.
    """

    tiles_itself: ClassVar[bool]

    def chunks(self, latent_frames: int) -> list[Chunk]:
        """In order. Raises ValueError where there is no frame."""
        ...

    def num_frames(self, latent_frames: int) -> int:
        """Frames that latent frames are decoded to."""
        ...

    def tiles(self) -> Tiles:
        """Those that a video can be decoded in. Raises ValueError where they do not meet, or there are none."""
        ...
