"""Control nets: made from a U-Net's fields, read and written, sampled with, trained."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from test_model import RNG, model
from tiny import make_batch, make_config

import latent_diffusion as ldm
from configs import default
from latent_diffusion.convert.adapters import ControlWeights, read_adapter, write_control
from latent_diffusion.convert.adapters import control as files
from latent_diffusion.convert.bundle import Bundle, as_part
from latent_diffusion.convert.unet import shapes as unet_shapes
from latent_diffusion.core.rng import init_key
from latent_diffusion.core.types import Conditioning
from latent_diffusion.generation.controls import bound, entries, inputs, numbers_of, with_nets
from latent_diffusion.nets import control
from latent_diffusion.nets.control import HINT, control_net, init_control
from latent_diffusion.nets.unet import UNet
from latent_diffusion.process.hints import edges
from latent_diffusion.process.options import SamplingOptions
from latent_diffusion.runtime import workdir
from latent_diffusion.runtime.checkpoint import Checkpointer
from latent_diffusion.tasks import TASKS
from latent_diffusion.tasks.beside import hinted, with_control
from latent_diffusion.training import init_from
from latent_diffusion.training.batch_spec import batch_spec

HINTS = np.random.default_rng(7).uniform(0, 1, (2, 8, 8, 3)).astype(np.float32)
XL = dict(
    channel_mult=(1, 2, 4), attention_resolutions=(2, 4), transformer_depth=(1, 2, 10),
    num_head_channels=64, vector_projection=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "context", "vector", "count"),
    [
        ({}, 768, None, 361_279_120),
        ({"num_head_channels": 64}, 1024, None, 364_228_240),
        (XL, 2048, 2816, 1_251_014_160),
    ],
    ids=["SD 1.5", "SD 2.1", "SDXL"],
)
def test_a_net_made_of_the_fields_of_a_u_net_has_the_size_of_the_released_ones(
    fields, context, vector, count
):
    net = control_net(UNet(**fields))
    own = {**fields, "hint_channels": net.hint_channels}
    tree = files.shapes(own, 4, context, vector)
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) == count
    # Every parameter but those of the hint and of the zero convolutions is one of the U-Net.
    theirs = flatten_dict(unet_shapes(fields, 4, context, vector), sep="/")
    for path, x in flatten_dict(tree, sep="/").items():
        if not path.startswith((HINT, "zero_convs", "middle_block_out")):
            assert x.shape == theirs[path].shape


@pytest.mark.parametrize("f", [1, 2, 8, 32])
def test_a_hint_shrinks_to_the_size_of_the_latent(f):
    net = control_net(UNet(model_channels=8), f)
    hint = jax.ShapeDtypeStruct((1, 64, 96, 3), "float32")
    made, _ = jax.eval_shape(net.hint_net.init_with_output, RNG, hint)
    assert made.shape == (1, 64 // f, 96 // f, 8)


def random_control(seed=0, scale=0.3, **own):
    """A control net of the model of test_model whose parameters are all random."""
    unet, params = model().denoiser.network, model().denoiser.params["unet"]
    context = Conditioning(context=jnp.zeros((1, 3, 6)))
    net = control_net(unet, 1)
    make = functools.partial(init_control, net, z_t=jnp.zeros((1, 8, 8, 3)), conditioning=context)
    tree = jax.eval_shape(make, RNG, params)
    rng = np.random.default_rng(seed)
    drawn = {
        k: (scale * rng.normal(size=x.shape)).astype(np.float32)
        for k, x in flatten_dict(tree, sep="/").items()
    }
    fields = {"hint_channels": net.hint_channels, "global_pooling": False}
    whole = {**dataclasses.asdict(dataclasses.replace(unet, parent=None)), **fields}
    whole = {k: v for k, v in whole.items() if k not in ("parent", "name")}
    return ControlWeights(path="net", params=drawn, fields=files.frozen(whole), **own)


def untrained():
    denoiser = model().denoiser
    net = control_net(denoiser.network, 1)
    context = Conditioning(context=jnp.zeros((1, 3, 6)))
    params = init_control(net, RNG, denoiser.params["unet"], jnp.zeros((1, 8, 8, 3)), context)
    return random_control().replace(params=flatten_dict(params, sep="/"))


def sampled(controls=(), **options):
    options = {"mode": "single", "num_steps": 2, **options}
    return model().sample(RNG, ["red cat", "blue dog"], controls=controls, **options)


@functools.cache
def plain():
    return sampled()


def test_an_untrained_net_changes_nothing_and_a_difference_of_zeros_is_the_u_net():
    np.testing.assert_array_equal(sampled([(untrained(), HINTS, 1.0)]), plain())
    whole, theirs = random_control(), flatten_dict(model().denoiser.params["unet"], sep="/")
    part = {k: v - np.asarray(theirs[k]) if k in theirs else v for k, v in whole.params.items()}
    difference = whole.replace(params=part, difference=True)
    want = sampled([(whole, HINTS, 1.0)])
    assert np.abs(want - plain()).max() > 0.05
    np.testing.assert_allclose(sampled([(difference, HINTS, 1.0)]), want, atol=1e-4)


def test_weights_windows_and_blocks_are_inputs_of_one_program(caplog):
    net, other = random_control(), random_control(1)
    both = [(net, HINTS, 1.0), (other, HINTS[:1], 0.5)]
    want = sampled(both)
    with caplog.at_level("WARNING"), jax.log_compiles():
        caplog.clear()

        def again(*settings):
            return sampled([(net, HINTS, *settings[0]), (other, HINTS[:1], *settings[1])])

        off = again([0.0], [0])
        blocks = again([{"": 1.0, "mid_block": 0.0}], [0.0])
        listed = again([[1.0] * (len(net.blocks) - 1) + [0.0]], [0.0])
        late = again([1.0, {"start": 0.5}], [0.5, {"end": 0.5}])
        guess = again([1.0, {"guess": True}], [0.5, {"null": False}])
        turned = sampled([(other, HINTS[:1], 0.5), (net, HINTS, 1.0)])
    assert len([r for r in caplog.records if "Compiling" in r.getMessage()]) == 0
    np.testing.assert_allclose(off, plain(), atol=1e-4)
    np.testing.assert_allclose(turned, want, atol=1e-4)
    np.testing.assert_array_equal(listed, blocks)
    found = [plain(), want, blocks, late, guess]
    for i, one in enumerate(found):
        for two in found[:i]:
            assert np.abs(one - two).max() > 1e-3


def test_a_window_ends_where_steps_do_and_guess_mode_weighs_as_its_definition():
    net = random_control()
    # Of two steps, one begins at a half of them; the first ends there.
    np.testing.assert_array_equal(
        sampled([(net, HINTS, 1.0, {"end": 0.4})]), sampled([(net, HINTS, 0.0)])
    )
    np.testing.assert_array_equal(
        sampled([(net, HINTS, 1.0, {"start": 0.4})]), sampled([(net, HINTS, 1.0, {"start": 0.5})])
    )
    weights = np.logspace(-1, 0, len(net.blocks))
    guess = sampled([(net, HINTS, 0.7, {"guess": True})])
    same = sampled([(net, HINTS, 0.7 * weights, {"null": False})])
    np.testing.assert_allclose(guess, same, atol=1e-5)


def test_negative_prompts_see_the_hint_or_not_as_the_unconditional_does():
    net, alone = random_control(), {"negative_prompts": "blue cat", "guidance_scale": 0.0}
    without = sampled(**alone)
    unseen = sampled([(net, HINTS, 1.0, {"null": False})], **alone)
    np.testing.assert_allclose(unseen, without, atol=1e-5)
    assert np.abs(sampled([(net, HINTS, 1.0)], **alone) - without).max() > 1e-3


def test_a_net_sees_no_other_adapter_and_may_see_no_concat_and_average_its_outputs():
    weights = random_control()
    net = control_net(model().denoiser.network, 1)
    tree = unflatten_dict({tuple(k.split("/")): x for k, x in weights.params.items()})
    rng = np.random.default_rng(0)
    z, hint = (
        jnp.asarray(rng.normal(size=(1, 8, 8, c)), jnp.float32) for c in (3, net.model_channels)
    )
    told = Conditioning(context=jnp.ones((1, 3, 6)))

    def outputs(net=net, **more):
        return net.apply({"params": tree}, z, jnp.ones(1), told.replace(**more), hint)

    want = outputs()
    features = tuple(jnp.ones(x.shape) for x in want)  # of a T2I-Adapter: the net has the hint
    jax.tree.map(np.testing.assert_array_equal, outputs(features=features), want)
    without = outputs(net.clone(takes_concat=False), concat=jnp.ones((1, 8, 8, 2)))
    jax.tree.map(np.testing.assert_array_equal, without, want)
    distilled = control_net(model().denoiser.network.clone(guidance_dim=4), 1)
    jax.tree.map(np.testing.assert_array_equal, outputs(distilled, guidance=jnp.ones(1)), want)
    pooled = outputs(net.clone(global_pooling=True))
    for one, other in zip(pooled, want, strict=True):
        np.testing.assert_allclose(one, other.mean((1, 2), keepdims=True), atol=1e-5)


def test_hints_in_the_other_order_and_nets_whose_outputs_are_means():
    net = random_control()
    turned = entries([(net.replace(bgr=True), HINTS, 1.0)], (8, 8), 2)["hint_0"]
    np.testing.assert_array_equal(turned, HINTS[..., ::-1])
    pooled = net.replace(fields=files.frozen({**net.fields, "global_pooling": True}))
    for settings in ({}, {"guess": True}):  # it never steers the unconditional, nor weighs
        (own,) = numbers_of([(pooled, HINTS, 0.5, settings)])
        assert own["null"] == 0
        np.testing.assert_array_equal(own["scales"], np.float32(0.5))
    (own,) = numbers_of([(net, HINTS, 0.5)])
    assert own["null"] == 1
    each = jnp.arange(len(net.blocks)) / 8
    np.testing.assert_array_equal(numbers_of([(net, HINTS, each)])[0]["scales"], each)


def test_a_hint_determines_the_size_of_the_pictures():
    wide = np.concatenate([HINTS, HINTS], 2)
    with pytest.raises(ValueError, match="parallel mode"):  # before anything is compiled
        sampled([(random_control(), wide, 1.0)], mode="none")


def test_a_window_is_of_the_timesteps_that_the_network_sees():
    net = random_control()
    options = SamplingOptions(network_timesteps="round")
    tree, hint = net.tree(model().denoiser.params["unet"]), {"hint_0": jnp.asarray(HINTS)}
    _, own, _ = bound(model(), [(net, HINTS, 1.0)])[0]
    denoiser = with_nets(model().denoiser, (own,))
    numbers = numbers_of([(net, HINTS, 1.0, {"start": 0.5})])
    told, _ = inputs(denoiser, [tree], hint, numbers, jnp.array([900.6, 300.6, -1.0]), options)
    after, until = np.asarray(told["controls"][0].window[0])
    used = [after < t <= until for t in (901, 301)]  # in the second of two steps
    assert used == [False, True]


def test_in_training_a_net_counts_at_every_timestep():
    denoiser, tree = model().denoiser, unflatten_dict(random_control().params, sep="/")
    net, z_t = control_net(denoiser.network, 1), jnp.ones((2, 8, 8, 3))
    plain = Conditioning(context=jnp.ones((2, 1, 6)))
    added = with_control(denoiser, net, tree, denoiser.params)
    told = hinted(plain, net, tree, jnp.asarray(HINTS))
    t = jnp.array([0, 999])
    seen, without = added.denoise(z_t, t, told), denoiser.denoise(z_t, t, plain)
    assert np.abs(seen - without).max((1, 2, 3)).min() > 0.05


def test_a_hint_of_a_net_for_inpainting_has_holes_of_minus_one():
    holed = HINTS.copy()
    holed[:, 2:4, 3:5] = -1
    net = random_control()
    for hint in (holed, holed[0], -np.ones_like(HINTS)):
        got = entries([(net, hint, 1.0)], (8, 8), 2)["hint_0"]
        np.testing.assert_array_equal(got, np.broadcast_to(hint, HINTS.shape), strict=True)
    partly, edges = holed.copy(), np.sign(HINTS - 0.5)[..., :1] * np.ones(3, np.float32)
    partly[0, 2, 3, 0] = 0.5
    for hint in (partly, edges, 0.5 * holed):
        with pytest.raises(ValueError, match=r"hint: values in .*, expected \[0, 1\]"):
            entries([(net, hint, 1.0)], (8, 8), 2)


def test_hints_are_embedded_once_a_call_and_by_tiles_as_a_whole(monkeypatch):
    net, seen, hint_net = random_control(), [], control.ControlNet.hint_net

    class Counting:
        def __init__(self, own):
            self.own = own

        def apply(self, variables, hint):
            jax.debug.callback(lambda x: seen.append(x.shape), hint)
            return self.own.apply(variables, hint)

    counted = property(lambda self: Counting(hint_net.fget(self)))
    monkeypatch.setattr(control.ControlNet, "hint_net", counted)
    whole = sampled([(net, HINTS, 1.0)], num_steps=3)
    jax.effects_barrier()
    assert seen == [(1, 8, 8, 3)] * 2  # of two batches, each of three steps with guidance
    monkeypatch.undo()
    np.testing.assert_allclose(
        sampled([(net, HINTS, 1.0)], num_steps=3, tile_size=8), whole, atol=2e-4
    )


def test_files_of_the_original_and_of_diffusers_are_read_and_written_bitwise(tmp_path):
    with pytest.raises(ValueError, match="has 32 groups in every norm, this model 4"):
        write_control(random_control(), tmp_path / "net.safetensors", "compvis")
    fields = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 8}
    fields |= {"attention_resolutions": (1, 2), "out_channels": 4, "hint_channels": (16, 32)}
    tree = flatten_dict(files.shapes(fields, 4, 768, None), sep="/")
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=x.shape).astype(np.float32) for k, x in tree.items()}
    fields = {**fields, "global_pooling": True}
    net = ControlWeights(path="net", params=params, fields=files.frozen(fields), bgr=True)
    write_control(net, tmp_path / "folder", "diffusers")
    with pytest.raises(ValueError, match="net averages its residuals"):
        write_control(net, tmp_path / "net.safetensors", "compvis")
    plain = files.frozen({**fields, "global_pooling": False})
    write_control(net.replace(bgr=False, fields=plain), tmp_path / "net.safetensors", "compvis")
    folder = read_adapter(tmp_path / "folder")
    assert folder.bgr and folder.fields["global_pooling"] and folder.blocks == net.blocks
    single = read_adapter(tmp_path / "net.safetensors")
    for read in (folder, single):
        assert read.params.keys() == net.params.keys()
        for name, array in net.params.items():
            np.testing.assert_array_equal(read.params[name], array)
    # The original's hints are RGB; its files don't say that residuals are averaged.
    write_control(net.replace(fields=plain), tmp_path / "bgr.safetensors", "compvis")
    turned, hint = (
        read_adapter(tmp_path / "bgr.safetensors").params,
        "input_hint_block/conv_0/kernel",
    )
    np.testing.assert_array_equal(turned[hint], net.params[hint][:, :, ::-1])
    shuffle = tmp_path / "control_v11e_sd15_shuffle.safetensors"
    shutil.copy(tmp_path / "net.safetensors", shuffle)
    assert read_adapter(shuffle).fields["global_pooling"]
    assert not single.fields["global_pooling"]
    for pooled in (False, True):
        yaml = f"model:\n  params:\n    global_average_pooling: {pooled}\n"
        for path in (shuffle, tmp_path / "net.safetensors"):
            path.with_suffix(".yaml").write_text(yaml)
            assert read_adapter(path).fields["global_pooling"] == pooled
    write_control(folder, tmp_path / "again", "diffusers")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        old, new = ((tmp_path / f / name).read_bytes() for f in ("folder", "again"))
        assert old == new
    alone = tmp_path / "again" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="is diffusers' control net without settings: give its f"):
        read_adapter(alone.rename(tmp_path / "alone.safetensors"))
    # Beside a whole model, and as a difference.
    tensors = load_file(tmp_path / "net.safetensors")
    assert all(name.startswith("control_model.") for name in tensors)
    save_file({**tensors, "model.x": HINTS}, tmp_path / "whole.safetensors")
    assert not read_adapter(tmp_path / "whole.safetensors").difference
    save_file({**tensors, "difference": np.zeros(0)}, tmp_path / "difference.safetensors")
    difference = read_adapter(tmp_path / "difference.safetensors")
    assert difference.difference and difference.params.keys() == net.params.keys()
    with pytest.raises(ValueError, match="is a difference to a U-Net; diffusers has no such"):
        write_control(difference, tmp_path / "no", "diffusers")
    with pytest.raises(ValueError, match=r"ControlNetModel is no model: give it to load_adapter"):
        ldm.load(tmp_path / "folder")


BAD = [
    (lambda net: [(net, HINTS[:, :4], 1.0)], r"net: hint has shape \(2, 4, 8, 3\), expected"),
    (lambda net: [(net, 255 * HINTS, 1.0)], r"net: hint: values in .*, expected \[0, 1\]"),
    (lambda net: [(net, HINTS[[0, 1, 1]], 1.0)], "net: 3 of hint for 2 images"),
    (lambda net: [(net, HINTS)], "controls are .adapter, hint, weight."),
    (lambda net: [("net", HINTS, 1.0)], "controls come from load_adapter, not net"),
    (lambda net: [(net, HINTS, [1.0])], r"net: 1 weights for \d outputs"),
    (lambda net: [(net, HINTS, {"up_blocks": 1.0})], "net: no module 'up_blocks'"),
    (lambda net: [(net, HINTS, 1.0, {"begin": 0})], "net: unknown setting 'begin'; known: start"),
    (lambda net: [(net, HINTS, 1.0, {"start": 0.5, "end": 0.5})], "0 ≤ start < end ≤ 1"),
    (lambda net: [(narrow(net), HINTS, 1.0)], r"net: middle_block_0/.* is .*, that of the U-Net"),
]


@pytest.mark.parametrize("xl", [False, True])
def test_a_net_that_was_trained_here_is_written_for_the_pipeline_of_its_base(
    xl, tmp_path, monkeypatch
):
    fields = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_heads": 1}
    fields |= {"attention_resolutions": (2,), "out_channels": 4, "vector_projection": xl}
    net = {**fields, "hint_channels": (16, 32), "global_pooling": False}
    shapes = files.shapes(net, 4, 16, 24 if xl else None)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    config = default.get_config()
    config.unet.update(fields)
    config.conditioners = ConfigDict({"sizes": {"width": 8}} if xl else {})
    monkeypatch.setattr(files, "read_config", lambda path: config)
    monkeypatch.setattr(files.workdir, "open_entry", lambda path, name: {"control": params})
    write_control(files.read_workdir(tmp_path), tmp_path / "net", "diffusers")
    written = json.loads((tmp_path / "net" / "config.json").read_text())
    tensors = load_file(tmp_path / "net" / "diffusion_pytorch_model.safetensors")
    named = "add_embedding.linear_1.weight" in tensors
    assert (written.get("addition_embed_type"), named) == (
        ("text_time", True) if xl else (None, False)
    )
    assert written.get("class_embed_type") is None and written["use_linear_projection"] == xl


def test_a_difference_to_an_inpainting_u_net_is_added_to_the_part_for_the_latent():
    kernel = "input_blocks_0_0/kernel"
    rng = np.random.default_rng(0)
    whole, change = rng.normal(size=(3, 3, 9, 8)), rng.normal(size=(3, 3, 4, 8))
    net = ControlWeights(
        path="net", params={kernel: change}, fields=files.frozen({}), difference=True
    )
    got = flatten_dict(net.tree({"input_blocks_0_0": {"kernel": whole}}), sep="/")[kernel]
    np.testing.assert_allclose(got, whole[:, :, :4] + change, atol=1e-6)


def narrow(net):
    name = "middle_block_0/in_layers_2/kernel"
    return net.replace(params={**net.params, name: net.params[name][..., :4]})


@pytest.mark.parametrize(("controls", "message"), BAD)
def test_bad_controls_are_refused_in_a_line(controls, message):
    with pytest.raises(ValueError, match=message) as error:
        sampled(controls(random_control()), image_size=(8, 8))
    assert "\n" not in str(error.value)


def test_a_net_is_for_pictures_that_shrink_as_its_hints_do():
    with pytest.raises(ValueError, match="net: its hints shrink by 1, the pictures by f=2"):
        random_control().net(model().denoiser.network, model().denoiser.params["unet"], 2)


def test_a_net_is_no_change_of_parameters_and_a_change_is_no_net(tmp_path):
    with pytest.raises(ValueError, match=r"^net: give this adapter as controls="):
        model().sample(RNG, ["red cat"], adapters=[(random_control(), 1.0)])


# ----------------------------------------------------------------------------------------- training


def test_edges_are_where_the_brightness_changes():
    image = -np.ones((1, 6, 6, 3), np.float32)
    image[:, :, 3:] = 1.0
    lines = np.asarray(edges(image))
    np.testing.assert_array_equal(lines[0, :, :, 0], np.tile([0, 0, 1, 1, 0, 0], (6, 1)))
    np.testing.assert_array_equal(lines, np.asarray(edges(-image)))
    assert not np.asarray(edges(0 * image)).any()


def test_training_moves_the_net_alone_and_its_workdir_is_an_adapter(tmp_path):
    groups = {"unet.model_channels": 32, "unet.num_groups": 32}  # as files of the original
    config = make_config("denoising", control="edges", **{"first_stage.cache": False}, **groups)
    task = TASKS["denoising"](config)
    state, constants = jax.jit(lambda rng: task.init(rng, batch_spec(config)))(init_key(0))
    assert set(state.params) == {"control"} and constants.base.keys() == {"unet", "conditioner"}
    # The last convolution starts at zero, which would hide all that comes before it.
    out = constants.base["unet"]["out_2"]
    out["kernel"] = 0.1 * jax.random.normal(jax.random.key(1), out["kernel"].shape)
    trained = jax.tree.map(lambda x: x + 0.1, constants.base["unet"])  # no fresh U-Net's
    base = {f"unet/{k}": v for k, v in flatten_dict(trained, sep="/").items()}
    bundle = Bundle(unet=as_part(config.unet.to_dict(), trained))
    state = init_from.start_from(config, state, bundle)
    before = flatten_dict(state.params["control"], sep="/")
    shared = [k for k in before if f"unet/{k}" in base]
    assert len(shared) > 10
    for path in shared:
        np.testing.assert_array_equal(before[path], base[f"unet/{path}"])
    step, batch = jax.jit(task.train_step), make_batch(config)
    for _ in range(3):
        state, values = step(state, constants, batch, jax.random.key(1))
    assert np.isfinite(values["loss"])
    # The pictures of a run are of the averaged parameters, those of its hints, too.
    averaged = state.replace(params=None)
    shown = jax.eval_shape(task.show, averaged, constants, batch, jax.random.key(2))
    assert shown["samples"].shape == shown["inputs"].shape
    after = flatten_dict(state.params["control"], sep="/")
    moved = {path for path in after if not np.array_equal(after[path], before[path])}
    assert {f"{HINT}/conv_0/kernel", "middle_block_out_0/kernel", "zero_convs_0_0/kernel"} <= moved
    # As the loop leaves it.
    workdir.save_config(ConfigDict({**config.to_dict(), "init_from": "base"}), tmp_path)
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, {"ema_params": state.ema_params})
    adapter = read_adapter(tmp_path)
    for path, x in flatten_dict(state.ema_params["control"], sep="/").items():
        np.testing.assert_array_equal(adapter.params[path], x)
    net = adapter.net(task.denoiser.network, constants.base["unet"], 2)
    assert net == control_net(task.denoiser.network, 2)
    # In both layouts of others it is the same net of the same parameters.
    for form, name in (("diffusers", "folder"), ("compvis", "net.safetensors")):
        write_control(adapter, tmp_path / name, form)
        again = read_adapter(tmp_path / name)
        assert again.net(task.denoiser.network, constants.base["unet"], 2) == net
        assert again.params.keys() == adapter.params.keys()
        for path, x in adapter.params.items():
            np.testing.assert_array_equal(again.params[path], x)
    with pytest.raises(ValueError, match=f"^{tmp_path} is a control net of base, no model"):
        ldm.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control": "depth"}, "unknown control 'depth'; known: edges"),
        ({"control": "edges", "lora.rank": 1}, "control='edges' trains a control net of a U-Net"),
    ],
)
def test_fields_that_exclude_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        TASKS["denoising"](make_config("denoising", **fields))
