"""A whole sampling call on a small U-Net: one program, what it computes once, and its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion.core.rng import example_keys, init_key, sampling_keys
from latent_diffusion.core.types import Conditioning
from latent_diffusion.models import sampling
from latent_diffusion.models.denoiser import Denoiser
from latent_diffusion.models.sampling import in_tiles
from latent_diffusion.nets.conditioners import make_conditioner
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.options import OPTIONS
from latent_diffusion.process.plan import SHARED, plan
from latent_diffusion.process.samplers import SAMPLERS
from latent_diffusion.process.schedules import make_schedule

SHAPE = (4, 4, 2)
SCHEDULE = make_schedule()


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def made(vector=False, **fields):
    """A U-Net whose every parameter is random, the zero-initialised too."""
    unet = UNet(2, 8, (1,), 1, (1,), num_heads=2, num_groups=4, **fields)
    null = Conditioning(
        concat=random(1, 3, 4, 4, 1),
        context=random(2, 3, 5, 6),
        vector=random(3, 3, 32) if vector else None,
        guidance=random(4, 3) if "guidance_dim" in fields else None,
    )
    init = jax.jit(unet.init)(init_key(0), jnp.zeros((3, *SHAPE)), jnp.zeros(3), null)
    leaves, tree = jax.tree.flatten(init["params"])
    params = tree.unflatten([0.3 * random(i, *x.shape) for i, x in enumerate(leaves)])
    denoiser = Denoiser({"unet": params}, SCHEDULE, unet, make_conditioner({}), "v")
    conditioning = jax.tree.map(lambda x: x[::-1] + 0.5, null)
    return denoiser, conditioning, null


VARIANTS = {
    "context": {},
    "vector": {
        "vector": True,
        "use_scale_shift_norm": True,
        "disable_self_attentions": (True,),
        "remat": "full",
    },
    "guidance": {"guidance_dim": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_computed_once_changes_nothing(name):
    """The network with prepared keys, values and embeddings is the network."""
    denoiser, conditioning, null = made(**VARIANTS[name])
    if name == "context":  # whose network is told another time than the timestep
        denoiser = denoiser.replace(schedule=make_schedule("edm", 1000, 0.002, 80.0))
    t = jnp.array([900.0, 300.5, 7.0])
    z_t = random(5, 6, *SHAPE)

    @jax.jit
    def both(now):
        embedded, prepared = denoiser.prepare(t, SHAPE, null, conditioning)
        network = denoiser.prepared_network(embedded)
        two = jax.tree.map(lambda *x: jnp.concatenate(x), *prepared)
        plain = jax.tree.map(lambda *x: jnp.concatenate(x), null, conditioning)
        now = jnp.full(6, now)
        return network(z_t, now, two), denoiser.denoise(z_t, now, plain)

    for now in t:
        ours, expected = both(now)
        assert float(jnp.std(expected)) > 0.1
        np.testing.assert_allclose(ours, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_what_is_stored_does_not_grow_with_the_steps_where_examples_differ():
    """A vector of each example makes all projections of the timestep its own: B·N of them."""
    denoiser, conditioning, null = made(vector=True)

    def stored(steps):
        t = jnp.linspace(0, 999, steps)
        arrays = jax.eval_shape(
            lambda: jax.tree.leaves(denoiser.prepare(t, SHAPE, null, conditioning))
        )
        return sum(x.size for x in arrays) - steps

    assert stored(2) == stored(500)


def test_tiles_see_their_part_of_the_latent_and_of_what_stands_beside_it():
    denoiser, conditioning, _ = made()
    t = jnp.array([300.0])
    z_t = random(5, 3, 4, 8, 2)
    wide = conditioning.replace(concat=random(6, 3, 4, 8, 1))
    embedded, (prepared,) = denoiser.prepare(t, (4, 8, 2), wide)
    network = denoiser.prepared_network(embedded)
    got = in_tiles(network, 4, 0)(z_t, jnp.full(3, t[0]), prepared)
    for part in (np.s_[:, :, :4], np.s_[:, :, 4:]):
        alone = wide.replace(concat=wide.concat[part])
        expected = denoiser.denoise(z_t[part], jnp.full(3, t[0]), alone)
        np.testing.assert_allclose(got[part], expected, atol=1e-4)


def equations(jaxpr):
    """Every equation of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def program(name, **given):
    """Timesteps and equations of a guided sampling call of five steps, traced as a whole."""
    denoiser, conditioning, null = made()
    given = {"sampler": name, "num_steps": 5, "guidance_scale": 3.0, **given}
    timesteps, options = plan(SCHEDULE, denoiser.prediction, {}, given)

    def sample(keys, options):
        keys = sampling_keys(keys)
        return sampling.sample(denoiser, keys, conditioning, null, timesteps, SHAPE, options)

    traced = jax.make_jaxpr(sample)(example_keys(jax.random.key(0), 3), options)
    return timesteps, list(equations(traced.jaxpr))


def rows_of_the_network(jaxpr):
    """How many images the convolutions of a program work on."""
    return {
        equation.invars[0].aval.shape[0]
        for equation in equations(jaxpr)
        if equation.primitive.name == "conv_general_dilated"
    }


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm2_ancestral", "unipc"])
def test_a_sampling_call_is_one_loop_on_the_device(name):
    """It traces as a whole, so nothing returns to the host; both passes are one batch in it."""
    timesteps, found = program(name)
    loops = [equation.params for equation in found if equation.primitive.name == "scan"]
    (loop,) = [loop for loop in loops if rows_of_the_network(loop["jaxpr"].jaxpr)]
    assert loop["length"] == len(SAMPLERS[name].table(SCHEDULE, timesteps).t)
    assert rows_of_the_network(loop["jaxpr"].jaxpr) == {6}
    assert not any("callback" in equation.primitive.name for equation in found)


def test_outside_the_interval_the_loop_has_a_branch_without_the_null_pass():
    _, found = program("ddim", guidance_interval=(300, 700))
    (choice,) = [equation for equation in found if equation.primitive.name == "cond"]
    branches = [rows_of_the_network(branch.jaxpr) for branch in choice.params["branches"]]
    assert branches == [{3}, {6}]


def test_an_unconditional_model_takes_no_guidance():
    denoiser, _, _ = made()
    keys, none = sampling_keys(example_keys(jax.random.key(0), 1)), Conditioning()
    for scale in (3.0, [1.0, 2.0]):
        given = {"num_steps": 2, "guidance_scale": scale}
        planned = plan(SCHEDULE, "v", {}, given)
        with pytest.raises(ValueError, match="guidance_scale needs a condition: this model"):
            sampling.sample(denoiser, keys, none, none, planned[0], SHAPE, planned[1])


DEFAULTS = {"sampler": "ddim", "eta": 0.0, "num_steps": 4, "spacing": "leading", "offset": 1}
OF_A_FILE = {"network_timesteps": "round", "spread": "sigma"}  # of its scheduler alone


@pytest.mark.parametrize(
    ("given", "timesteps", "options"),
    [
        ({}, [751, 501, 251, 1, -1], {"eta": 0.0}),
        ({"num_steps": 2, "eta": 1}, [501, 1, -1], {"eta": 1.0, "temperature": 1.0}),
        # Another sampler has its own eta; another spacing knows no offset.
        ({"sampler": "euler_ancestral"}, [751, 501, 251, 1, -1], {"eta": 1.0}),
        ({"spacing": "trailing"}, [999, 749, 499, 249, -1], {"eta": 0.0}),
        ({"last": 0}, [751, 501, 251, 1, 0], {"eta": 0.0}),
        # What asks for nothing isn't there at all.
        ({"guidance_scale": 1, "clip_x0": 0}, [751, 501, 251, 1, -1], {"guidance_scale": None}),
        ({"guidance_scale": np.float64(2)}, [751, 501, 251, 1, -1], {"guidance_scale": 2.0}),
        ({"guidance_scale": jnp.array(2.0)}, [751, 501, 251, 1, -1], {"guidance_scale": 2.0}),
        # Image-to-image takes the last share of the steps, and of scales by step.
        ({"strength": 1.0}, [751, 501, 251, 1, -1], {"strength": None}),
        ({"strength": 0.75}, [501, 251, 1, -1], {"strength": True}),
        ({"strength": 0.3}, [1, -1], {}),
        ({"strength": 0}, [-1], {}),
        # A step that begins at the very share of the noise belongs to the first of two calls.
        ({"end": 0.251}, [751, 501, 251, 1], {}),
        ({"start": 0.251}, [1, -1], {}),
    ],
)
def test_what_is_asked_for_goes_over_the_defaults(given, timesteps, options):
    visited, planned = plan(SCHEDULE, "eps", DEFAULTS, {"clip_x0": None, **given})
    assert visited.tolist() == timesteps
    assert {name: getattr(planned, name) for name in options} == options


def test_the_share_of_steps_that_strength_leaves_is_not_rounded_down_by_rounding_errors():
    visited, _ = plan(SCHEDULE, "eps", {}, {"num_steps": 100, "strength": 0.29})
    assert len(visited) - 1 == 29  # 0.29 · 100 is 28.999999999999996


def test_other_numbers_are_the_same_program_where_the_docs_say_so():
    """A program's inputs: timesteps and options."""

    def program(**given):
        leaves, structure = jax.tree.flatten(plan(SCHEDULE, "eps", DEFAULTS, given))
        return structure, [np.shape(leaf) for leaf in leaves]

    numbers = {name for name in SHARED if OPTIONS[name].traced}
    assert {"guidance_scale", "clip_x0"} < numbers
    for name in numbers:
        one, other = (x if OPTIONS[name].count != 2 else (0, 100 * x) for x in (0.5, 0.75))
        if name == "threshold_limit":
            one, other = 1 + one, 1 + other
        assert program(**{name: one}) == program(**{name: other}), name
    assert program(strength=0.5) == program(strength=0.6) != program(strength=0.75)


def test_another_sampler_sees_and_starts_from_what_it_would_without_the_files_scheduler():
    defaults = {**DEFAULTS, **OF_A_FILE}
    for given, expected in (
        ({}, OF_A_FILE),
        ({"spacing": "trailing"}, OF_A_FILE),
        ({"sampler": "euler"}, dict.fromkeys(OF_A_FILE)),
    ):
        _, planned = plan(SCHEDULE, "eps", defaults, given)
        assert {name: getattr(planned, name) for name in OF_A_FILE} == expected


def test_a_scale_for_each_step_loses_those_of_the_steps_that_strength_skips():
    given = {"guidance_scale": [1, 2, 3, 4], "strength": 0.5}
    _, planned = plan(SCHEDULE, "eps", DEFAULTS, given)
    np.testing.assert_array_equal(planned.guidance_scale, [3, 4])
    visited, _ = plan(SCHEDULE, "eps", DEFAULTS, {"num_steps": 50, "strength": 0.58})
    assert len(visited) == 29 + 1  # 0.58 · 50 is a little less than 29 in floating point


def test_a_network_with_its_guidance_in_it_refuses_what_needs_the_null():
    """And is told the scale minus one, as it was distilled."""
    told = Conditioning(context=jnp.ones((2, 3, 6)))

    def given(negative=None, more=(), **options):
        _, planned = plan(SCHEDULE, "v", {}, {"num_steps": 3, **options})
        return sampling._with_guidance_input(told, planned, negative, more)

    with_scale, left = given(guidance_scale=7.5)
    np.testing.assert_array_equal(with_scale.guidance, [6.5, 6.5])
    assert left.guidance_scale is None
    np.testing.assert_array_equal(given()[0].guidance, [0, 0])
    for name, wrong in {
        "guidance_interval": {"guidance_interval": (100, 900)},
        "guidance_rescale": {"guidance_rescale": 0.5},
        "perpendicular": {"perpendicular": 1.0},
        "cfg_pp": {"cfg_pp": True},
        "negative_prompts": {"negative": told},
        "more_prompts": {"more": [(told, 1.0)]},
        "a guidance_scale for each step": {"guidance_scale": (2, 3, 4)},
    }.items():
        with pytest.raises(ValueError, match=f"has its guidance in it, which rules out {name}$"):
            given(**wrong)


def test_pure_noise_tells_a_network_of_eps_nothing():
    schedule = make_schedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"timestep 999 is noise alone .*'leading'"):
        plan(schedule, "eps", {}, {})
    plan(schedule, "v", {}, {})
    visited, _ = plan(schedule, "eps", {}, {"spacing": "leading"})
    assert visited[0] < 999


def test_the_network_sees_whole_timesteps():
    """Of fractional ones, while the noise stays theirs."""
    denoiser, conditioning, null = made()
    given = {"spacing": "given", "timesteps": (900.6, 300.6), "num_steps": 2, "sampler": "ddim"}

    def sample(**own):
        timesteps, options = plan(SCHEDULE, "v", {}, {**given, **own})
        keys = sampling_keys(example_keys(jax.random.key(0), 3))
        return sampling.sample(denoiser, keys, conditioning, null, timesteps, SHAPE, options)

    exact, nearest, below = (sample(network_timesteps=n) for n in ("exact", "round", "floor"))
    np.testing.assert_array_equal(exact, sample())
    assert np.abs(exact - nearest).max() > 1e-3 and np.abs(nearest - below).max() > 1e-3
    with pytest.raises(ValueError, match="unknown network_timesteps 'ceil'; known: exact, floor"):
        sample(network_timesteps="ceil")
