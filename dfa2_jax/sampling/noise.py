"""The noise that sampling starts from and that solvers add, equal to torch's without torch."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float


class TorchNoise:
    """`torch.Generator().manual_seed(seed)` on a CPU, without torch: every draw goes on with its stream.

    The Mersenne Twister's stream is the same bit for bit, and so are the uniforms. Logarithm and cosine of the
    Box-Muller transform differ from torch's vectorised ones, by 7.2e-7 at most in 5 million draws.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, seed: int):
        if seed < 0:
            raise ValueError(f"{seed=} must not be negative.")
        self._stream = np.random.RandomState(seed & 0xFFFFFFFF)  # as torch: the low 32 bits seed the twister

    def randn(self, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
        """The next `torch.randn(shape, generator=generator)`.

        Raises:
            ValueError: fewer than 16 numbers (torch draws those differently).
        """
        count = math.prod(shape)
        if count < 16:
            raise ValueError(f"{shape=} must hold 16 numbers or more.")
        whole = count // 16 * 16
        draws = self._uniform(count)
        noise = np.empty(count, np.float32)
        noise[:whole] = _box_muller(draws[:whole])
        if whole != count:  # torch draws the last 16 numbers afresh, over some of the ones before
            noise[-16:] = _box_muller(self._uniform(16))
        return noise.reshape(shape)

    def _uniform(self, size: int) -> Float[np.ndarray, " size"]:
        bits = self._stream.randint(0, 2**32, size=size, dtype=np.uint32) & np.uint32(2**24 - 1)
        return bits.astype(np.float32) * np.float32(2**-24)


def torch_randn(seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
    """`torch.randn(shape, generator=torch.Generator().manual_seed(seed))`: the first draw of `TorchNoise`.

    Raises:
        ValueError: a negative seed, or fewer than 16 numbers (torch draws those differently).
    """
    return TorchNoise(seed).randn(shape)


def _box_muller(u: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Blocks of 16: eight radii, then eight angles; cosines fill the first half, sines the second."""
    u = u.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0]))
    angle = np.float32(2 * np.pi) * u[:, 1]  # rounded to float32, as torch's is: cosines of it move by 5e-7
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


class BatchNoise:
    """Noise of a batch, draw by draw, as diffusers draws it.

    Args:
        seed: an int seeds one stream, which draws the whole batch; a list seeds a stream of each.
        shape: of the noise of one image or video.
    """

    def __init__(self, seed: int | Sequence[int], batch: int, shape: tuple[int, ...]):
        seeds = [seed] if isinstance(seed, int) else list(seed)
        self._streams = [TorchNoise(each) for each in seeds]
        self._shape = batch // len(seeds), *shape

    def draw(self, count: int | None = None) -> Float[np.ndarray, "B ..."]:
        """Args: `count`: of the first images alone; None: of all."""
        (each, *shape), streams = self._shape, self._streams
        if count is not None and len(streams) == 1:
            return streams[0].randn((count, *shape))
        return np.concatenate([stream.randn((each, *shape)) for stream in streams[:count]])


class StepNoise:
    """What a solver adds at each step, drawn in the order of the steps. An earlier step is drawn again from the start.

    Args:
        begin: makes the noise before the first step.
        draws: of each step; the last of them is the step's noise.
    """

    def __init__(self, begin: Callable[[], BatchNoise], draws: Sequence[int]):
        self._begin, self._draws = begin, draws
        self._step, self._noise, self._last = -1, begin(), np.empty(0, np.float32)

    def __getitem__(self, step: int) -> Float[np.ndarray, "B ..."]:
        if step < self._step:
            self._step, self._noise = -1, self._begin()
        while self._step < step:
            self._step += 1
            for _ in range(self._draws[self._step]):
                self._last = self._noise.draw()
        return self._last
