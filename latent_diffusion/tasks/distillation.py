"""Distillation: a student learns to do in few evaluations what its teacher does in many.

There are two methods. "guidance" (Meng et al. 2023, stage 1): the student predicts in one
evaluation the teacher's guided prediction, which takes two. "consistency" (Luo et al. 2023): the
student f jumps to the start of the teacher's guided path,

    L = E over z_t, n of  d( f(z_{t_{n+1}}, t_{n+1}),  f⁻(z_{t_n}, t_n) )

where one step of DDIM by the teacher leads from z_{t_{n+1}} to z_{t_n}, and f⁻ is a moving average
of f. With several `phases` (Wang et al. 2024), f jumps to the end of the phase in which t lies, and
one DDIM step of the student per phase follows the teacher's path. Teacher and student share the
teacher's conditioners, which are frozen like the teacher.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from latent_diffusion.core.rng import (
    example_keys,
    normal_per_example,
    pmean,
    split_per_example,
    uniform_per_example,
)
from latent_diffusion.core.types import (
    Array,
    Axis,
    Batch,
    Conditioning,
    Config,
    Keys,
    Params,
    Rng,
    lookup,
)
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.optimisation.micro_batches import value_and_grad_in_parts
from latent_diffusion.optimisation.optimizers import global_norm
from latent_diffusion.process import consistency, objectives
from latent_diffusion.process.diffusion import Prediction, expand, q_sample, to_z_0_and_eps
from latent_diffusion.process.options import check_ranges
from latent_diffusion.process.spacings import distilled_timesteps
from latent_diffusion.tasks.denoising import (
    Constants,
    Denoising,
    Metrics,
    State,
    batch_size,
    make_denoising,
)

METHODS = ("consistency", "guidance")
OF_DENOISING = (  # fields for the loss of latent denoising that distillation doesn't have
    "drop_rate", "offset_noise", "input_perturbation", "elbo_weight", "learn_logvar",
    "variance_weight",
)  # fmt: skip


@dataclass(frozen=True)
class Distillation:
    """The static parts of a distillation; see `configs/default.py` for the fields.

    student: the student's network, optimiser, loss and pictures, as in latent denoising. The
    network takes the guidance scale as an input if it has a `guidance_dim`.
    """

    student: Denoising
    method: str = "consistency"
    guidance_scales: tuple[float, float] = (1.0, 1.0)  # the least and the largest
    distilled_steps: int = 50
    target_decay: float = 0.95  # 0: the targets are the student's
    phases: int = 1  # equal parts of the path, along each of which the student is consistent

    def init(self, rng: jax.Array, batch_spec: Batch) -> tuple[State, Constants]:
        """Fresh state, and constants with random weights that the loop replaces."""
        state, constants = self.student.init(rng, batch_spec)
        if self.student.lora is None:
            teacher = without_guidance(state.params[self.student.denoiser.name])
            constants = constants.replace(teacher=jax.tree.map(jnp.copy, teacher))
        if self.method == "consistency" and self.target_decay:
            state = state.replace(target=jax.tree.map(jnp.copy, state.params))
        return state, constants

    def components(self, state: State, constants: Constants) -> dict[str, Params]:
        """The parts whose parameters `--dry_run` counts, by name."""
        parts = self.student.components(state, constants)
        teacher = {} if constants.teacher is None else {"teacher (frozen)": constants.teacher}
        return {name: tree for name, tree in parts.items() if tree} | teacher

    def train_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> tuple[State, Metrics]:
        """One update of the student. axis_name: the mapped axis under pmap."""
        rng = jax.random.fold_in(rng, state.step)
        keys = example_keys(rng, batch_size(batch), axis_name)

        def loss_fn(params: Params, batch: Batch, keys: Keys):
            dropout = {"dropout": keys[0]}
            target = params if state.target is None else state.target
            per_example = self._loss(params, target, constants, batch, keys, dropout)
            return jnp.mean(per_example), per_example

        value_and_grad = value_and_grad_in_parts(loss_fn, self.student.grad_accumulation)
        (loss, _), grads = value_and_grad(state.params, batch, keys)
        loss, grads = pmean((loss, grads), axis_name)
        state = state.updated(self.student.tx, grads, self.student.ema_decay)
        if state.target is not None:
            rate = 1 - self.target_decay
            state = state.replace(target=optax.incremental_update(state.params, state.target, rate))
        return state, {"loss": loss, "grad_norm": global_norm(grads)}

    def eval_step(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> Metrics:
        """Per-example [B] losses of the averaged parameters."""
        keys = example_keys(rng, batch_size(batch), axis_name)
        params = state.ema_params
        return {"loss": self._loss(params, params, constants, batch, keys)}

    def show(
        self, state: State, constants: Constants, batch: Batch, rng: Rng, *, axis_name: Axis = None
    ) -> dict[str, jax.Array]:
        """Samples of the student for the batch's conditions, by the averaged parameters."""
        return self.student.show(state, constants, batch, rng, axis_name=axis_name)

    def _loss(
        self,
        params: Params,
        target: Params,
        constants: Constants,
        batch: Batch,
        keys: Keys,
        dropout: dict[str, jax.Array] | None = None,
    ) -> Array:
        """The error [B] of each example. target: the parameters that make the targets."""
        task, first_stage = self.student, constants.first_stage
        schedule, kind = task.denoiser.schedule, task.denoiser.prediction
        k_z, k_t, k_eps, k_scale, k_cond = split_per_example(keys, 5)
        student = task.with_params(params, constants)
        z_0 = first_stage.encode(batch, k_z)
        eps = normal_per_example(k_eps, z_0.shape[1:])
        low, high = self.guidance_scales
        scale = low + (high - low) * uniform_per_example(k_scale)
        entries = student.conditioner.prepare(batch, first_stage, z_0.shape[1:3], k_cond)
        conditioning, null = (
            student.condition(entries, jnp.full(scale.shape, drop)) for drop in (False, True)
        )
        with_scale = conditioning
        if getattr(student.network, "guidance_dim", None) is not None:
            with_scale = dataclasses.replace(conditioning, guidance=scale - 1)
        teacher = (self._teacher(params, constants), conditioning, null, scale)
        train, distance = dropout is not None, objectives.make_loss(task.loss, task.huber_c)

        if self.method == "guidance":
            t, _ = task.timesteps(k_t, None)
            z_t = q_sample(schedule, z_0, t, eps)
            weights = lookup(objectives.LOSS_WEIGHTS, task.loss_weight, "loss_weight")(
                schedule, kind
            )
            goal = jax.lax.stop_gradient(self._guided(*teacher, z_t, t))
            return weights[t] * distance(student.denoise(z_t, t, with_scale, train, dropout), goal)

        grid = jnp.asarray(distilled_timesteps(schedule.num_timesteps, self.distilled_steps))
        index = jnp.minimum(uniform_per_example(k_t) * len(grid), len(grid) - 1).astype(jnp.int32)
        t = grid[index]
        before = jnp.maximum(t - schedule.num_timesteps // self.distilled_steps, 0)
        steps_of_phase = self.distilled_steps // self.phases
        end = jnp.append(0, grid)[index // steps_of_phase * steps_of_phase]
        z_t = q_sample(schedule, z_0, t, eps)
        guided = self._guided(*teacher, z_t, t)
        z_before = consistency.step(schedule, _estimate(student, guided, z_t, t), before)
        z_before = jax.lax.stop_gradient(z_before)
        average = task.with_params(jax.lax.stop_gradient(target), constants)
        goal = average.denoise(z_before, before, with_scale)
        goal = _jump(average, goal, z_before, before, end)
        pred = student.denoise(z_t, t, with_scale, train, dropout)
        return distance(_jump(student, pred, z_t, t, end), goal)

    def _teacher(self, params: Params, constants: Constants) -> Denoiser:
        """The teacher: the constants' `teacher`, or the `base` of an adaptation."""
        name = self.student.denoiser.name
        frozen = constants.base[name] if constants.teacher is None else constants.teacher
        return self.student.denoiser.replace(params={name: frozen})

    def _guided(
        self,
        teacher: Denoiser,
        conditioning: Conditioning,
        null: Conditioning,
        scale: Array,
        z_t: Array,
        t: Array,
    ) -> Array:
        """The teacher's raw prediction with classifier-free guidance at scales [B]."""
        pred = teacher.denoise(z_t, t, conditioning)
        if self.guidance_scales == (1.0, 1.0):
            return pred
        null_pred = teacher.denoise(z_t, t, null)
        return null_pred + scale.reshape(-1, *[1] * (z_t.ndim - 1)) * (pred - null_pred)


def without_guidance(params: Params) -> Params:
    """The parameters of a network without those of its guidance embedding."""
    return {name: tree for name, tree in params.items() if not name.endswith("guidance")}


def _estimate(denoiser: Denoiser, pred: Array, z_t: Array, t: Array) -> Prediction:
    """z_0 and eps of a raw prediction at timesteps t [B]."""
    alpha_t, sigma_t = denoiser.schedule.alpha_t(t), denoiser.schedule.sigma_t(t)
    return to_z_0_and_eps(denoiser.prediction, pred, alpha_t, sigma_t, z_t)


def _jump(denoiser: Denoiser, pred: Array, z_t: Array, t: Array, end: Array) -> Array:
    """f(z_t, t) of a raw prediction: DDIM to timesteps `end` [B], or z_0 where `end` is 0."""
    estimate = _estimate(denoiser, pred, z_t, t)
    at_end = consistency.step(denoiser.schedule, estimate, end)
    start = consistency.consistent(estimate.z_0, z_t, t)
    return jnp.where(expand(end, z_t) == 0, start, at_end)


def make_distillation(config: Config) -> Distillation:
    """Build the task from a resolved experiment config; ValueError for fields that don't fit."""
    fields, names = config["distillation"], frozenset(config["conditioners"])
    check_ranges(config, {"distillation.target_decay": "[0, 1]"})
    other = {
        "control": config["control"],
        "textual_inversion.word": config["textual_inversion"]["word"],
    }
    other |= {f"diffusion.{name}": config["diffusion"][name] for name in OF_DENOISING}
    for name, value in other.items():
        if value:
            raise ValueError(f"a distillation has no {name}, which is {value!r}: turn it off")
    diffusion = config["diffusion"]
    wrong = ["timestep_sampling"] if diffusion["timestep_sampling"] == "loss" else []
    if fields["method"] == "consistency":  # all timesteps of its grid are alike
        usual: Config = {"timestep_sampling": "uniform", "loss_weight": "simple"}
        usual |= {"shift": 1, "max_noise": 1}
        wrong = [name for name, value in usual.items() if diffusion[name] != value]
    for name in wrong:
        raise ValueError(
            f"a distillation by {fields['method']} has no diffusion.{name}={diffusion[name]!r}"
        )
    student = dataclasses.replace(make_denoising(config), pretrained=names)
    if fields["method"] not in METHODS:
        raise ValueError(f"distillation.method={fields['method']!r}; known: {', '.join(METHODS)}")
    low, high = scales = (float(fields["guidance_scales"][0]), float(fields["guidance_scales"][1]))
    if low > high:
        raise ValueError(f"distillation.guidance_scales={scales} must be the least, the largest")
    if scales != (1.0, 1.0) and not student.denoiser.conditioner.keys:
        raise ValueError(f"distillation.guidance_scales={scales}, but there is no condition")
    if student.lora and getattr(student.denoiser.network, "guidance_dim", None) is not None:
        raise ValueError("an adaptation (lora.rank) has no guidance_dim: fix the scale")
    distilled_timesteps(student.denoiser.schedule.num_timesteps, fields["distilled_steps"])
    phases, steps = fields["phases"], fields["distilled_steps"]
    if phases < 1 or steps % phases:
        raise ValueError(f"distillation.phases={phases} must divide distilled_steps={steps}")
    if phases > 1 and fields["method"] != "consistency":
        raise ValueError(f"distillation.phases={phases} are of the method consistency")
    if phases > 1 and (num := student.denoiser.schedule.num_timesteps) % steps:
        raise ValueError(
            f"distillation.distilled_steps={steps} must divide the {num} timesteps, so that "
            "sampling starts its steps where phases end"
        )
    objectives.make_loss(student.loss, student.huber_c)
    return Distillation(
        student=student,
        method=fields["method"],
        guidance_scales=scales,
        distilled_steps=fields["distilled_steps"],
        target_decay=fields["target_decay"],
        phases=phases,
    )


def guidance_range(config: Config) -> tuple[float, float]:
    """The guidance scales that a distilled network accepts: those of training, or only 1."""
    low, high = config["distillation"]["guidance_scales"]
    is_input = config[config["backbone"]].get("guidance_dim") is not None
    return (low, high) if is_input else (1.0, 1.0)
