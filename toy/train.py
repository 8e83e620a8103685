"""Train the model in the box: the autoencoder first, then the transformer with its text encoders.

    python -m toy.train --out build/train --seconds 560 --total-seconds 1525 --result build/result

does one slice and stops; the same command again goes on from the last checkpoint. All work of a call (drawing scenes,
encoding them, noise, the optimizer's steps) is one program on the device. The learning rate and the changes of stage
follow the share of the total that is spent, so a faster machine makes more steps in the same time.
Same machine, same steps (`--total-steps` in place of `--total-seconds`): same weights, bit for bit on CPU.
"""

import argparse
import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from dfa2_jax.families.registry import networks
from dfa2_jax.families.sd3.transformer import PositionTable
from dfa2_jax.sampling.tokens import crop_positions
from toy import scenes, toy

PHASES = {"vae": ("vae",), "flow": ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
PEAK = {"vae": 2e-3, "flow": 1e-3}
WARM_UP = 200  # steps
HOLD = 0.4
"""Share of a phase at the full learning rate; a cosine to nothing follows."""
EMA, CLIP_NORM, WEIGHT_DECAY = 0.999, 1.0, 0.01
ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)
KL = 3e-4
DROPPED = 0.12
"""Share of captions replaced by the empty one, for classifier-free guidance."""
UNIFORM = 0.2
"""Share of noise levels drawn evenly: the logit-normal hardly draws above 0.98, where a sampler decides the layout."""
PAIRS = 0.55
"""Share of scenes with two things."""
GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""cuBLAS's own choice of kernels. H100, 128 pixels: 54 ms a step and 27 s of compilation; Triton's products untuned
take 108 ms, and tuning them compiles for minutes."""
RESULT_BYTES = 15 * 2**20
"""Of one file of a result, which then passes where files may have 16 MB."""


@dataclass(frozen=True)
class Part:
    """What one call of a compiled program does: `steps` steps on images of one size."""

    phase: str
    pixels: int
    batch: int
    steps: int
    t5_length: int = toy.T5_LENGTH


@dataclass(frozen=True)
class Stage:
    """A share of the total; its parts take turns."""

    name: str
    share: float
    parts: tuple[Part, ...]


def stages(batch_64: int, steps: int) -> tuple[Stage, ...]:
    """About as many tokens per step in every part; `batch_64` images of 64 tokens."""
    at_64 = Part("flow", 64, batch_64, steps)
    at_128, at_256 = (Part("flow", 64 * n, max(1, batch_64 // s), steps) for n, s in ((2, 2), (4, 8)))
    long_128 = Part("flow", 128, max(1, batch_64 // 4), max(1, steps // 2), toy.T5_DEFAULT_LENGTH)
    long_256 = Part("flow", 256, max(1, batch_64 // 8), max(1, steps // 4), toy.T5_DEFAULT_LENGTH)
    vae = [Part("vae", pixels, max(1, batch_64 // s), steps) for pixels, s in ((64, 4), (128, 8), (256, 32))]
    return (
        Stage("vae", 0.15, (vae[0], vae[1], vae[2])),
        Stage("64 tokens", 0.28, (at_64,)),
        Stage("256 tokens", 0.33, (at_128, at_128, at_64, at_128, long_128)),
        Stage("1,024 tokens", 0.24, (at_256, at_128, at_256, long_256, at_256, long_128)),
    )


PRESETS = {
    "gpu": lambda: stages(512, 16),
    "cpu": lambda: stages(32, 1),
    "smoke": lambda: (
        Stage("vae", 0.4, (Part("vae", 32, 8, 1),)),
        Stage("16 tokens", 0.6, (Part("flow", 32, 8, 1),)),
    ),
}
"""One step per call on CPU, where it takes a second: a slice ends on time."""


class Weights(NamedTuple):
    """Of one phase's networks, by name: what is trained, its running average, and Adam's moments."""

    params: Any
    ema: Any
    mu: Any
    nu: Any
    step: Any


class State(NamedTuple):
    vae: Weights
    flow: Weights
    latents: Any
    """Mean and standard deviation of the autoencoder's latents; (0, 0) while it trains."""


@dataclass
class Progress:
    """What is done, in the unit of the total."""

    unit: str
    seed: int
    total: float
    spent: float = 0.0
    calls: dict[str, int] = field(default_factory=dict)
    """By stage."""
    images: int = 0
    seconds: float = 0.0
    slices: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)

    def note(self, stage: Stage, part: Part, loss: float, step: int, seconds: float) -> dict[str, Any]:
        """One call of a program, as the log keeps it."""
        self.calls[stage.name] = self.calls.get(stage.name, 0) + 1
        self.images += part.steps * part.batch
        self.spent += seconds if self.unit == "seconds" else part.steps
        entry = {"stage": stage.name, "pixels": part.pixels, "t5": part.t5_length, "loss": round(loss, 5)}
        entry |= {"spent": round(self.spent, 2), "step": step, "ms": round(1000 * seconds / part.steps, 2)}
        self.log.append(entry)
        return entry


# --- networks ---------------------------------------------------------------------------------------------------------


def build(name: str, dtype: Any, seed: int = 0) -> nnx.Module:
    class_name, config = toy.configs()[name]
    kind = networks()[class_name]
    module = kind.build(kind.config(config), dtype=dtype, rngs=nnx.Rngs(seed))
    if name == "transformer":
        nnx.pop(module, PositionTable)
    return module


def graph_of(name: str, dtype: Any) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: build(name, dtype)))[0]


def initial(name: str, seed: int) -> nnx.State:
    """Parameters to start from, drawn on the host, so that every device and version starts from the same."""
    random = np.random.default_rng([seed, *name.encode()])
    state = nnx.state(nnx.eval_shape(lambda: build(name, jnp.float32)))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        spelled, shape = ".".join(map(str, path)), variable.shape
        value = first_value(name, spelled, shape, random).astype(np.float32)
        filled.append((path, variable.replace(value)))
    return nnx.from_flat_state(filled)


def first_value(network: str, path: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    kind = path.rpartition(".")[2]
    if kind in ("scale", "bias"):
        return np.full(shape, kind == "scale")
    if kind != "kernel":  # tables of embeddings, of order one, as what is added to them
        return random.normal(size=shape) * (0.2 if kind == "position_embedding" else 0.5)
    if network == "transformer" and ("norm1" in path or path.startswith(("norm_out", "proj_out"))):
        return np.zeros(shape)  # adaLN-Zero (arXiv 2212.09748)
    stacked = path.startswith(("segments", "layers"))
    fan_in = math.prod(shape[stacked:-1])
    spread = fan_in**-0.5
    return random.normal(size=shape) * (spread / 4 if path.endswith("attention.q.kernel") else spread)  # T5: no 1/sqrt


def fresh_weights(names: tuple[str, ...], seed: int) -> Weights:
    params = {name: initial(name, seed) for name in names}

    def zeros() -> Any:
        return jax.tree.map(np.zeros_like, params)

    return Weights(params, jax.tree.map(np.copy, params), zeros(), zeros(), np.zeros((), np.int32))


@dataclass(frozen=True)
class Attention:
    """Attention that has a gradient: the library's arrow attention refuses one."""

    implementation: str | None = None

    def __call__(self, project: Any, layout: Any, memory: None, row: None) -> tuple[jax.Array, None]:
        return jax.nn.dot_product_attention(*project(), implementation=self.implementation), None


def best_attention(dtype: Any) -> str:
    """cuDNN's where its forward and backward compile, else XLA's."""
    if jax.default_backend() != "gpu" or dtype == jnp.float32:
        return "xla"
    x = jnp.zeros((2, 120, toy.HEADS, toy.WIDTH // toy.HEADS), dtype)
    try:
        loss = jax.grad(lambda x: Attention("cudnn")(lambda: (x, x, x), None, None, None)[0].sum().astype(jnp.float32))
        jax.block_until_ready(jax.jit(loss)(x))
    except Exception as error:  # whatever this version of cuDNN lacks
        print(f"cuDNN attention is not usable here ({str(error)[:120]!r}): XLA's in its place", flush=True)
        return "xla"
    return "cudnn"


def timestep_embedding(sigma: jax.Array) -> jax.Array:
    """`dfa2_jax.models.layers.sinusoid` of 1000 sigma, traced."""
    frequencies = np.exp(-math.log(10000.0) * np.arange(128) / 128).astype(np.float32)
    angles = (1000 * sigma)[:, None] * jnp.asarray(frequencies)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def patchify(latents: jax.Array) -> jax.Array:
    """[B, h, w, C] as tokens of (row, column, channel), [B, V, 4 C]."""
    batch, height, width, channels = latents.shape
    grid = latents.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, 4 * channels)


class Lookup:
    """A table whose rows are looked up by a product, `table[...][ids]`, so that its gradient is one too.

    On an H100 steps took 5 microseconds for each token of text, 200 of 230 ms, with the gradient of a gather: a scatter
    in bfloat16, most of whose rows are padding and collide.
    """

    def __init__(self, table: jax.Array):
        self.table = table

    def __getitem__(self, ids: Any) -> Any:
        if ids is Ellipsis:
            return self
        return jax.nn.one_hot(ids, len(self.table), dtype=self.table.dtype) @ self.table


class Product(nnx.Module):
    """A convolution as one product of each pixel's neighbourhood, [B h w, size^2 C], with the kernel.

    These networks' convolutions are narrow (16 and 32 channels): XLA's take 20 times as long inside a scan on CPU; on
    an H100 cuDNN's took 200 s of autotuning, or without it 290 ms a step of the autoencoder where these take 22.
    """

    def __init__(self, conv: nnx.Conv):
        self.kernel, self.bias = conv.kernel, conv.bias
        self.stride, self.padding = conv.strides, conv.padding

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, stride = self.kernel[...], self.stride
        size = kernel.shape[0]
        x = jnp.pad(x, ((0, 0), *self.padding, (0, 0)))
        height, width = ((length - size) // stride + 1 for length in x.shape[1:3])
        ends = [(height - 1) * stride + 1, (width - 1) * stride + 1]
        near = [
            x[:, row : row + ends[0] : stride, column : column + ends[1] : stride]
            for row, column in np.ndindex(size, size)
        ]
        out = jnp.concatenate(near, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
        return out + self.bias[...][None, None, None]


def convolve_by_products(module: nnx.Module) -> nnx.Module:
    for _, one in list(nnx.iter_modules(module)):
        for name, child in list(vars(one).items()):
            if isinstance(child, nnx.Conv):
                setattr(one, name, Product(child))
    return module


# --- losses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """All that is fixed while a program is traced."""

    dtype: Any
    attention: str
    mesh: Mesh | None
    warm_up: int = WARM_UP

    def merge(self, name: str, params: Any) -> Any:
        """The network with parameters in the dtype of the computation; gradients reach the float32 ones."""
        module = nnx.merge(graph_of(name, self.dtype), jax.tree.map(lambda x: x.astype(self.dtype), params))
        return convolve_by_products(module)

    def spread(self, x: jax.Array) -> jax.Array:
        """The batch over all devices."""
        if self.mesh is None:
            return x
        spec = PartitionSpec("batch", *(None for _ in x.shape[1:]))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def draw(self, part: Part, data: dict[str, Any], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows of the tables, and images in [-1, 1]."""
        kind, single, pair, picture = jax.random.split(key, 4)
        shape = (part.batch,)
        singles = jax.random.randint(single, shape, 0, data["singles"].shape[0])
        pairs = jax.random.randint(pair, shape, 0, data["pairs"].shape[0])
        two = jax.random.uniform(kind, shape) < PAIRS
        rows = self.spread(jnp.where(two, data["pairs"][pairs], data["singles"][singles]))
        images = scenes.draw(data["numbers"][rows], picture, part.pixels)
        return rows, self.spread(images * 2 - 1)

    def moments(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the autoencoder's posterior, float32 [B, h, w, C]."""
        moments = self.merge("vae", params).encoder(images.astype(self.dtype)).astype(jnp.float32)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    def vae_loss(self, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
        picture, noise = jax.random.split(key)
        _, images = self.draw(part, data, picture)
        mean, log_variance = self.moments(params["vae"], images)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(noise, mean.shape)
        decoded = self.merge("vae", params["vae"]).decoder(z.astype(self.dtype)).astype(jnp.float32)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance).mean()
        return jnp.abs(decoded - images).mean() + jnp.square(decoded - images).mean() + KL * kl

    def encode(self, name: str, params: Any, ids: jax.Array) -> Any:
        """A text encoder's output."""
        encoder = self.merge(name, params[name])
        table = "shared" if name == "text_encoder_3" else "token_embedding"
        setattr(encoder, table, Lookup(getattr(encoder, table)[...]))
        return encoder(ids)

    def text(self, params: Any, ids: dict[str, jax.Array], t5_length: int) -> tuple[jax.Array, jax.Array]:
        """Text states and pooled text, as `dfa2_jax.families.SD3.encode` puts them together."""
        first, second = (self.encode(name, params, ids[name]) for name in ("text_encoder", "text_encoder_2"))
        t5_ids = jnp.pad(ids["text_encoder_3"], ((0, 0), (0, t5_length - ids["text_encoder_3"].shape[1])))
        t5 = self.encode("text_encoder_3", params, t5_ids)
        clip = jnp.concatenate([first.hidden, second.hidden], axis=-1)
        clip = jnp.pad(clip, ((0, 0), (0, 0), (0, t5.shape[-1] - clip.shape[-1])))
        return jnp.concatenate([clip, t5], axis=1), jnp.concatenate([first.pooled, second.pooled], axis=-1)

    def flow_loss(self, part: Part, params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
        """Rectified flow (arXiv 2403.03206, section 3.1): velocity from image to noise."""
        picture, dropped, level, kind, even, noise = jax.random.split(key, 6)
        rows, images = self.draw(part, data, picture)
        mean, _ = self.moments(data["vae"], images)
        latents = patchify((mean - data["latents"][0]) / data["latents"][1])
        tokens = latents.shape[1]

        shape = (part.batch,)
        sigma = jax.nn.sigmoid(jax.random.normal(level, shape))
        shift = 3 * math.sqrt(tokens / 256)  # more tokens hide less under the same noise (equation 23)
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        sigma = jnp.where(jax.random.uniform(kind, shape) < UNIFORM, jax.random.uniform(even, shape), sigma)
        eps = jax.random.normal(noise, latents.shape)
        noisy = (1 - sigma)[:, None, None] * latents + sigma[:, None, None] * eps

        empty = data["numbers"].shape[0]
        rows = jnp.where(jax.random.uniform(dropped, shape) < DROPPED, empty, rows)
        text, pooled = self.text(params, {name: table[rows] for name, table in data["ids"].items()}, part.t5_length)
        side = math.isqrt(tokens)
        positions = jnp.asarray(crop_positions(toy.position_table(), side, side))
        model = self.merge("transformer", params["transformer"])
        attend = Attention(self.attention)
        args = noisy, text, pooled, positions, timestep_embedding(sigma), None, attend
        velocity = model.velocity(*args)[0].astype(jnp.float32)
        return jnp.square(velocity - (eps - latents)).mean()

    def run(
        self, part: Part, weights: Weights, data: dict[str, Any], key: jax.Array, rate: jax.Array
    ) -> tuple[Weights, jax.Array]:
        """`part.steps` steps, and their mean loss."""
        loss = partial(self.vae_loss if part.phase == "vae" else self.flow_loss, part)

        def step(weights: Weights, _: None) -> tuple[Weights, jax.Array]:
            value, grads = jax.value_and_grad(loss)(weights.params, data, jax.random.fold_in(key, weights.step))
            return update(weights, grads, rate, self.warm_up), value

        if part.steps == 1:
            return step(weights, None)
        weights, losses = jax.lax.scan(step, weights, None, length=part.steps)
        return weights, losses.mean()


run = jax.jit(Trainer.run, static_argnums=(0, 1), donate_argnums=2)


def update(weights: Weights, grads: Any, rate: jax.Array, warm_up: int) -> Weights:
    """AdamW with clipped gradients, and the running average."""
    params, ema, mu, nu, step = weights
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, CLIP_NORM / (norm + 1e-6)), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax takes a float to an integer power
        moves, adam = ADAM.update(grads, optax.ScaleByAdamState(step, mu, nu))
    count = step.astype(jnp.float32)
    rate = rate * jnp.minimum(1.0, (count + 1) / warm_up)
    params = jax.tree.map(lambda p, m: p - rate * (m + WEIGHT_DECAY * p), params, moves)
    decay = jnp.minimum(EMA, (1 + count) / (10 + count))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
    return Weights(params, ema, adam.mu, adam.nu, adam.count)


# --- files ------------------------------------------------------------------------------------------------------------


def named(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path; of a network's parameter, the path that `convert.rules` gives it."""
    names = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", "")))) for key in path]
        names[".".join(part for part in parts if part != "value")] = leaf
    return names


def save(folder: Path, state: State, progress: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial_file = folder / ".checkpoint.partial"
    arrays = {name: np.asarray(leaf) for name, leaf in named(state).items()}
    save_file(arrays, partial_file, metadata={"progress": json.dumps(asdict(progress))})
    partial_file.replace(folder / "checkpoint.safetensors")


def restore(folder: Path, state: State) -> tuple[State, Progress] | None:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "numpy") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        leaves = [file.get_tensor(name) for name in named(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves), progress


def begin(out: Path, unit: str, total: float, seed: int) -> tuple[State, Progress]:
    """The checkpoint in `out`, or a fresh start, as arrays of the host."""
    fresh = State(*(fresh_weights(PHASES[phase], seed) for phase in PHASES), np.zeros(2, np.float32))
    state, progress = restore(out, fresh) or (fresh, Progress(unit, seed, total))
    if (progress.unit, progress.seed) != (unit, seed):
        raise ValueError(
            f"The checkpoint in {out} counts {progress.unit} from seed {progress.seed}, not {unit} from {seed}."
        )
    progress.total, progress.slices = total, progress.slices + (progress.spent < total)
    return state, progress


def write_result(folder: Path, state: State, progress: Progress) -> None:
    """The running averages in files of at most `RESULT_BYTES`, and the log."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in named({**state.vae.ema, **state.flow.ema}).items()}
    files: list[dict[str, np.ndarray]] = [{"latents": np.asarray(state.latents)}]
    for name, array in arrays.items():
        if sum(one.nbytes for one in files[-1].values()) + array.nbytes > RESULT_BYTES:
            files.append({})
        files[-1][name] = array
    for number, part in enumerate(files):
        save_file(part, folder / f"weights-{number}.safetensors")
    steps = {phase: int(getattr(state, phase).step) for phase in PHASES}
    device = jax.devices()[0].device_kind
    log = asdict(progress) | {"steps": steps, "device": device, "devices": jax.device_count()}
    (folder / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    (folder / "summary.json").write_text(json.dumps(in_short(log), indent=1) + "\n")


def in_short(log: dict[str, Any]) -> dict[str, Any]:
    """A log whose calls are gathered by the program that they ran: median time, first loss, mean of the last 5 %."""
    programs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for call in log["log"]:
        programs.setdefault((call["stage"], call["pixels"], call["t5"]), []).append(call)
    rows = [
        dict(zip(("stage", "pixels", "t5"), name, strict=True))
        | {"calls": len(calls), "ms": float(np.median([call["ms"] for call in calls])), "first_loss": calls[0]["loss"]}
        | {"last_loss": round(float(np.mean([call["loss"] for call in calls[-max(1, len(calls) // 20) :]])), 5)}
        for name, calls in programs.items()
    ]
    return {name: value for name, value in log.items() if name != "log"} | {"programs": rows}


# --- the loop ---------------------------------------------------------------------------------------------------------


@cache
def tables() -> dict[str, Any]:
    """Token ids and scene numbers of every caption, the empty one last, and which to train on."""
    singles, pairs, _ = scenes.split()
    ids = toy.token_ids([*(scene.caption for scene in scenes.scenes()), ""])
    return {"numbers": scenes.number_table(), "singles": singles, "pairs": pairs, "ids": ids}


def stage_at(plan: tuple[Stage, ...], fraction: float) -> tuple[Stage, float]:
    """The stage at a share of the total, and the learning rate there."""
    ends = np.cumsum([stage.share for stage in plan])
    index = min(int(np.searchsorted(ends, fraction + 1e-9, side="right")), len(plan) - 1)
    phase = plan[index].parts[0].phase
    mine = [(end - one.share, end) for one, end in zip(plan, ends, strict=True) if one.parts[0].phase == phase]
    (begin, _), (_, end) = mine[0], mine[-1]
    done = min(1.0, max(0.0, (fraction - begin) / (end - begin)))
    falling = max(0.0, (done - HOLD) / (1 - HOLD))
    return plan[index], PEAK[phase] * 0.5 * (1 + math.cos(math.pi * falling))


class Programs:
    """Compiled programs, made ahead in threads so that the device need not wait for the next stage's."""

    def __init__(self, trainer: Trainer, plan: tuple[Stage, ...], state: State, data: dict[str, Any]):
        self.pool = ThreadPoolExecutor(4)
        self.futures: dict[Part, Future] = {}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, data))
        self.trainer, self.plan, (self.state, self.data) = trainer, plan, shapes

    def prepare(self, stage: Stage) -> None:
        """Compile the stage's programs, and after those the next one's, where other work runs on an accelerator."""
        first, ahead = self.plan.index(stage), jax.default_backend() != "cpu"
        for one in self.plan[first : first + 1 + ahead]:
            for part in one.parts:
                if part not in self.futures:
                    self.futures[part] = self.pool.submit(self.compile, part)
            if not all(self.futures[part].done() for part in one.parts):
                return

    def compile(self, part: Part) -> Any:
        scalar, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
        options = GPU_OPTIONS if jax.default_backend() == "gpu" else None
        lowered = run.lower(self.trainer, part, getattr(self.state, part.phase), self.data, key, scalar)
        return lowered.compile(compiler_options=options)

    def choose(self, stage: Stage, number: int, *, wait: bool) -> Part:
        """The part whose turn it is; unless to `wait` for it, the next one that is compiled."""
        turns = [stage.parts[(number + i) % len(stage.parts)] for i in range(len(stage.parts))]
        return next((part for part in turns if wait or self.futures[part].done()), turns[0])

    def __getitem__(self, part: Part) -> Any:
        return self.futures[part].result()


def latent_statistics(trainer: Trainer, pixels: int, state: State, data: dict[str, Any], key: jax.Array) -> jax.Array:
    @jax.jit
    def statistics(params: Any, data: dict[str, Any], key: jax.Array) -> jax.Array:
        _, images = trainer.draw(Part("vae", pixels, 64, 1), data, key)
        mean, _ = trainer.moments(params, images)
        return jnp.stack([mean.mean(), mean.std()])

    return jnp.round(statistics(state.vae.ema["vae"], data, key), 4)


def train(
    plan: tuple[Stage, ...],
    out: Path,
    *,
    unit: str,
    total: float,
    amount: float = math.inf,
    dtype: Any = jnp.float32,
    seed: int = 0,
    warm_up: int = WARM_UP,
    save_every: float = 60.0,
    quiet: bool = False,
) -> tuple[State, Progress]:
    """One slice from the checkpoint in `out`, or from scratch.

    Args:
        unit: of `total`: "steps", or "seconds" that the device trains; compiling does not count.
        amount: of this slice: steps, or seconds by the clock.
    """
    started = last_saved = time.monotonic()
    mesh = Mesh(np.array(jax.devices()), ("batch",)) if jax.device_count() > 1 else None
    everywhere = jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    trainer = Trainer(dtype, best_attention(dtype), mesh, warm_up)
    state, progress = begin(out, unit, total, seed)
    frozen = {"vae": jax.tree.map(np.copy, state.vae.ema["vae"]), "latents": state.latents}  # the state is given away
    state, data = jax.device_put((state, tables() | frozen), everywhere)
    programs, key = Programs(trainer, plan, state, data), jax.random.key(seed)
    already, earlier, last_steps = progress.spent, progress.seconds, 0.0

    def goes_on() -> bool:
        if unit == "steps":
            return progress.spent < min(total, already + amount)
        return progress.spent + last_steps < total and time.monotonic() - started + last_steps < amount

    bar = tqdm(total=round(total), initial=round(already), unit=unit[:-1], disable=quiet, mininterval=5)
    while goes_on():
        stage, rate = stage_at(plan, progress.spent / total)
        programs.prepare(stage)
        part = programs.choose(stage, progress.calls.get(stage.name, 0), wait=unit == "steps")
        phase, weights = part.phase, getattr(state, part.phase)
        if phase == "flow" and not float(state.latents[1]):
            statistics = latent_statistics(trainer, part.pixels, state, data, key)
            state = state._replace(latents=jax.device_put(statistics, everywhere))
            data = data | {"vae": state.vae.ema["vae"], "latents": state.latents}
        program, called = programs[part], time.monotonic()
        rate_array = jax.device_put(np.float32(rate), everywhere)
        weights, loss = program(weights, data, jax.random.fold_in(key, phase == "flow"), rate_array)
        state = state._replace(**{phase: weights})
        loss = float(loss)  # waits
        last_steps = time.monotonic() - called
        progress.seconds = earlier + time.monotonic() - started
        entry = progress.note(stage, part, loss, int(weights.step), last_steps)
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(f"The loss is {entry['loss']} at {entry}: the last checkpoint in {out} is good.")
        shown = f"{stage.name}, {part.pixels} px, loss {entry['loss']:.4f}, {entry['ms']} ms"
        bar.set_postfix_str(shown, refresh=False)
        bar.update(round(progress.spent) - bar.n)
        if time.monotonic() - last_saved > save_every:
            save(out, state, progress)
            last_saved = time.monotonic()
    bar.close()
    programs.pool.shutdown(wait=False, cancel_futures=True)
    save(out, state, progress)
    return state, progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/train"), help="checkpoint of the training")
    parser.add_argument("--result", type=Path, help="where to write the weights and the log at the end of the slice")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this slice, by the clock")
    parser.add_argument("--total-seconds", type=float, default=1525, help="of training in all slices, less compilation")
    parser.add_argument("--total-steps", type=int, help="count steps, not seconds")
    parser.add_argument("--preset", choices=PRESETS, help="batch sizes; by default those of the device")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    plan = PRESETS[args.preset or ("gpu" if gpu else "cpu")]()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(args.out / "xla"))
    steps = args.total_steps
    state, progress = train(
        plan,
        args.out,
        unit="steps" if steps else "seconds",
        total=steps or args.total_seconds,
        amount=math.inf if steps else args.seconds,
        dtype=jnp.bfloat16 if gpu else jnp.float32,
        seed=args.seed,
    )
    if args.result:
        write_result(args.result, state, progress)
    print(json.dumps(progress.log[-1:] + [{"spent": progress.spent, "of": progress.total, "images": progress.images}]))


if __name__ == "__main__":
    main()
