"""Kernels in eight bits: how far they are off, and who reads them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_adapters import adapter_files, sampled
from test_model import model
from test_prior_files import made

import latent_diffusion as ldm
from latent_diffusion.convert.adapters import ControlWeights
from latent_diffusion.nets.eight_bits import EightBits, in_eight_bits, layer_params


def kernels(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, EightBits))
    return [leaf for leaf in leaves if isinstance(leaf, EightBits)]


def test_a_weight_is_off_by_half_a_step_of_its_output():
    weights = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32)
    weights *= [1e-3, 1, 10, 100, 0]  # outputs of very different sizes, and one without weights
    rounded = in_eight_bits("conv/kernel", weights, "float32")
    step = np.abs(weights).max((0, 1, 2)) / 127
    assert rounded.values.dtype == jnp.int8 and rounded.shape == weights.shape
    assert (np.abs(np.asarray(rounded) - weights) <= step * 0.501).all()


def test_biases_norms_and_tables_are_no_kernels():
    for path, shape in (("conv/bias", (4,)), ("norm/scale", (4,)), ("table/embedding", (4, 4))):
        assert in_eight_bits(path, np.ones(shape, np.float32), "bfloat16").dtype == jnp.bfloat16
    assert in_eight_bits("table/ids", np.arange(3), "bfloat16").dtype == jnp.int32


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("eight_bits") / "model"
    model().save(path, "orbax")
    return path


def test_pictures_are_nearly_those_of_bfloat16_with_and_without_adapters(saved, tmp_path):
    half, eighth = (ldm.load(saved, dtype=dtype) for dtype in ("bfloat16", "int8"))
    assert kernels(eighth.denoiser.params["unet"])
    assert not kernels(eighth.first_stage.params)
    one, two = map(ldm.load_adapter, adapter_files(tmp_path))
    for adapters in ((), [(one, 0.8), (two, 0.5)]):
        pictures = [sampled(m, adapters) for m in (half, eighth)]
        difference = np.abs(pictures[0] - pictures[1]) * 127.5
        assert 0 < difference.max() < 4  # of 255
    assert np.abs(sampled(eighth) - pictures[1]).max() > 0.01  # adapters change something


def test_a_control_net_may_be_a_difference_to_a_model_in_eight_bits():
    theirs = in_eight_bits("kernel", np.random.default_rng(0).normal(size=(4, 5)), "float32")
    change = np.ones((4, 5), np.float32)
    net = ControlWeights(path="net", params={"a/kernel": change}, fields={}, difference=True)
    whole = net.tree({"a": {"kernel": theirs}})["a"]["kernel"]
    np.testing.assert_allclose(whole, np.asarray(theirs) + change, rtol=1e-6)


def test_a_model_in_eight_bits_is_written_as_its_rounded_weights(saved, tmp_path):
    eighth = ldm.load(saved, dtype="int8")
    eighth.save(tmp_path / "again", "orbax")
    again = ldm.load(tmp_path / "again", dtype="bfloat16")
    expected = layer_params(eighth.denoiser.params)
    jax.tree.map(np.testing.assert_array_equal, again.denoiser.params, expected)
    assert jax.tree.leaves(expected)[0].dtype == ml_dtypes.bfloat16


def test_a_sampling_loop_reads_kernels_in_eight_bits(saved):
    """They are widened in each turn, behind a barrier that keeps compilers from doing it before."""
    denoiser = ldm.load(saved, dtype="int8").denoiser
    t, z, drop = jnp.array([9.0, 3.0]), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, bool)

    def loop(params, z):
        own = denoiser.replace(params=params)
        told = own.condition({"tokens": jnp.zeros((1, 3), jnp.int32)}, drop)
        embedded, (prepared,) = own.prepare(t, z.shape[1:], told)
        network = own.prepared_network(embedded)
        return jax.lax.fori_loop(0, 2, lambda i, z: network(z, t[:1], prepared), z)

    program = jax.make_jaxpr(loop)(denoiser.params, z).jaxpr
    (turns,) = (equation for equation in program.eqns if equation.primitive.name == "scan")
    shapes = sorted(kernel.shape for kernel in kernels(denoiser.params["unet"]))
    read = [x.aval for x in turns.invars if x.aval.shape in shapes]
    assert {x.dtype for x in read} == {jnp.dtype("int8")}
    assert sorted(x.shape for x in read) == shapes
    names = [equation.primitive.name for equation in turns.params["jaxpr"].eqns]
    assert "optimization_barrier" in names


def test_a_prior_is_not_for_eight_bits(tmp_path):
    made({"class_token": {"num_classes": 5}}).save(tmp_path / "prior", "orbax")
    with pytest.raises(ValueError, match=r"prior: dtype='int8' is for denoisers, not for a prior"):
        ldm.load(tmp_path / "prior", dtype="int8")
