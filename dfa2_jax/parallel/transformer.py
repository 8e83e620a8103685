"""A transformer that the devices of a mesh run together."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dfa2_jax.nn.attention import Attend, Dense, Planned
from dfa2_jax.parallel.mesh import ROWS, TOKENS, DeviceMesh
from dfa2_jax.parallel.ulysses import Ulysses


@dataclass(frozen=True)
class ParallelTransformer:
    """`families.base.Transformer` inside `DeviceMesh.run`: arguments and prediction are whole on every device.

    Each device makes its rows of the batch and its tokens. The model sees a shorter sequence, and nothing of devices.
    """

    model: Any
    mesh: DeviceMesh

    @property
    def config(self) -> Any:
        return self.model.config

    def __call__(
        self,
        tokens: Float[Array, "B V C"],
        timestep: Float[Array, "#B E"],
        conditions: Any,
        attend: Attend,
        *,
        memory: dict[str, Any] | None = None,
        plans: dict[str, Any] | None = None,
        skipped_blocks: Bool[Array, " blocks"] | None = None,
        unroll: int | bool = 1,
    ) -> tuple[Float[Array, "B V C"], dict[str, Any]]:
        """As the model's; rows of a batch that `mesh.rows` does not divide are made on all."""
        mesh, tokens, (batch, num_visual, _) = self.mesh, jnp.asarray(tokens), tokens.shape
        apart = mesh.rows > 1 and batch % mesh.rows == 0
        num_text = conditions.text.shape[1]
        if apart:
            tokens = mesh.own_rows(tokens)
        own = mesh.own_tokens(tokens, 1)
        conditions = conditions.share(mesh.own_rows if apart else jnp.asarray, mesh.own_tokens)
        options: dict[str, Any] = {"memory": memory, "plans": plans, "skipped_blocks": skipped_blocks, "unroll": unroll}
        attend = attend if mesh.tokens == 1 else self._over_tokens(attend, num_text, num_visual)
        out, remembered = self.model(own, timestep, conditions, attend, **options)
        if mesh.tokens > 1:
            out = lax.all_gather(out, TOKENS, axis=1, tiled=True)[:, :num_visual]
        return (lax.all_gather(out, ROWS, axis=0, tiled=True) if apart else out), remembered

    def _over_tokens(self, attend: Attend, num_text: int, num_visual: int) -> Ulysses:
        if not isinstance(attend, Dense | Planned):
            raise NotImplementedError(
                f"{type(attend).__name__} sees all tokens of an image, which {self.mesh.tokens} devices share: leave "
                "devices out, or let them divide the batch."
            )
        planned = attend if isinstance(attend, Planned) else None
        return Ulysses(self.mesh, num_text, num_visual, attend.implementation, planned)
